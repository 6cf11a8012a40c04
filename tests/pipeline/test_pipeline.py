"""A whole run on a tiny model: the real command, converter and llama.cpp, and what it promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import llama_cpp
import pytest
from commands import Answer, Run, packed_tensors, quantkit

from evaluators.overlap import Seen
from quantkit.files import sha256_file
from quantkit.ggml.types import FILE_TYPES, QuantType
from quantkit.gguf_file.read import GgufFile
from quantkit.llamacpp.stock import StockRecipe, stock_bytes, stock_types
from quantkit.run.artifacts import NAMES

pytestmark = pytest.mark.slow


@pytest.fixture
def run(whole_run: tuple[Run, Answer]) -> Run:
    return whole_run[0]


def test_answers_with_one_object(whole_run: tuple[Run, Answer]) -> None:
    run, answer = whole_run
    assert len(answer.out.splitlines()) == 1
    assert answer.json["folder"] == str(run.folder)
    assert tuple(answer.json["stages"]) == NAMES
    assert answer.json["stages"]["stitch"]["outputs"][0]["file"] == run.output.name
    assert "**Tiny-Llama-EVO-Q4_K_M.gguf**" in answer.err  # the table, for people
    assert "Traceback" not in answer.err


def test_budget(run: Run) -> None:
    """Without a size: that of Q4_K_M, and no byte more."""
    (output,) = run.report["outputs"]
    limit = stock_bytes(GgufFile(run.base), StockRecipe("Q4_K_M"))
    assert output["search"]["limit_bytes"] == limit
    assert output["n_bytes"] == run.output.stat().st_size <= limit
    assert output["n_bytes"] > 0.99 * limit  # a budget is there to be used
    assert output["bpw"] == 8 * output["n_bytes"] / GgufFile(run.base).n_elements


def test_report(run: Run) -> None:
    report = run.report
    base = report["base"]
    assert run.folder / base["path"] == run.base and base["n_bytes"] == run.base.stat().st_size
    assert math.isfinite(base["perplexity"]["value"]) and base["perplexity"]["stderr"] > 0
    (output,) = report["outputs"]
    assert run.folder / output["path"] == run.output
    assert output["sha256"] == sha256_file(run.output)
    for row in (output, *report["baselines"]):
        assert 0 < row["kl"]["mean"] < 1 and row["kl"]["stderr"] > 0
        assert 0 < row["top1"] < 1
        assert math.isfinite(row["perplexity"]["value"]) and row["perplexity"]["stderr"] > 0
        assert {*row["domains"]} == {"docs", "code"}
        assert row["bpw"] == pytest.approx(8 * row["n_bytes"] / base["n_parameters"])
    (rival,) = (row for row in report["baselines"] if "answers" in row)
    for row in (output, rival):
        assert row["answers"]["n_prompts"] + row["answers"]["n_left_out"] == 8
        assert 0 < row["answers"]["agreement"]["value"] < 1
        assert {"chat", "languages", "all"} < {*row["conversations"]} == {*base["floor"]}
        assert 0 < row["conversations"]["all"]["kl"]["value"] < 1
    assert 0 < output["weight_conversations"]["all"]["value"] < 1
    assert base["floor"]["all"]["kl"]["value"] < output["conversations"]["all"]["kl"]["value"]
    assert report["documents"]["n_scored"] == output["conversations"]["all"]["n_tokens"]
    assert report["not_measured"] == []
    assert output["tasks"] == {} and output["zero_shot"]["status"] == "not run"
    assert "the Hub is switched off here" in output["zero_shot"]["reason"]
    assert report["versions"].keys() >= {"quantkit", "python", "llama-cpp-python", "torch"}


def test_what_was_calibrated_on_is_kept_and_compared(run: Run) -> None:
    """All text before validation; what is held out shares hardly a run of 13 words with it."""
    seen = run.dir.artifacts.calibrated.read_text("utf-8")
    n_tokens = sum(run.report["calibration"]["n_tokens"].values())
    assert len(seen) > n_tokens  # a token of this tokenizer is more than a letter
    assert "import" in seen and "expression" in seen
    overlap = run.report["overlap"]
    assert {*overlap} == {"docs", "code"}
    for found in overlap.values():
        assert found["n"] > 100 and found["share"] == found["n_seen"] / found["n"] < 0.1
    whole_words = seen[:5000].rsplit(None, 1)[0]
    assert Seen([seen]).overlap(whole_words).share == 1.0
    assert "runs of 13 words that the calibration text has, too: code " in run.card


def test_baselines_are_the_neighbors_in_size(run: Run) -> None:
    """The largest stock files of at most our bytes, and the next one."""
    report = run.report
    n_bytes = report["outputs"][0]["n_bytes"]
    stock = [row for row in report["baselines"] if row["kind"] == "stock"]
    sizes = {row["name"]: row["n_bytes"] for row in stock}
    assert sizes["Q4_K_M"] >= report["outputs"][0]["search"]["limit_bytes"]
    assert any(size <= n_bytes for size in sizes.values())
    assert any(size > n_bytes for size in sizes.values())


def test_output_loads_and_talks(run: Run) -> None:
    model = llama_cpp.Llama(str(run.output), n_ctx=64, verbose=False, seed=0)
    answer = model.create_completion("The import statement", max_tokens=8, temperature=0)
    assert answer["choices"][0]["text"]
    assert model.metadata["general.file_type"] == str(FILE_TYPES["Q4_K_M"])
    assert model.metadata["quantize.imatrix.entries_count"] == "14"
    assert model.metadata["quantkit.base.revision"] == run.recipe["revision"]
    model.close()


def test_metadata_of_the_base_is_carried_whole(run: Run) -> None:
    base, output = (GgufFile(path).fields for path in (run.base, run.output))
    for name in base.keys() - {"general.file_type"}:
        assert output[name] == base[name], name
    added = output.keys() - base.keys()
    assert all(name.startswith(("quantkit.", "quantize.", "general.quant")) for name in added)


def test_fallbacks_are_those_of_llama_cpp(run: Run) -> None:
    """For every level: what llama-quantize --pure makes of the same base."""
    listed = {(f["tensor"], f["asked"]): f for f in run.report["fallbacks"]}
    labels = {"Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M", "Q6_K": "Q6_K"}
    found = 0
    for asked, label in labels.items():
        for name, used in stock_types(run.base, StockRecipe(label, pure=True)).items():
            if "norm" in name:
                continue
            row = listed.get((name, asked))
            assert (row["used"] if row else asked) == str(used)
            if row is not None:
                n_columns = GgufFile(run.base).tensors[name].shape[-1]
                reason = f"rows of {n_columns} do not divide into blocks of 256"
                assert (n_columns, row["reason"]) == (96, reason)
                found += 1
    assert found == len(listed) == 3 * 14
    assert not any("ffn_down" in tensor for tensor, _ in listed)


def test_every_tensor_comes_from_the_level_that_the_recipe_names(run: Run) -> None:
    """And all others from the base."""
    output, base = packed_tensors(run.output), packed_tensors(run.base)
    levels = {path.name: packed_tensors(path) for path in run.levels.glob("*.gguf")}
    tensors = run.recipe["tensors"]
    for name, (qtype, packed) in output.items():
        if name in tensors:
            assert qtype == tensors[name]["qtype"]
            assert packed == levels[tensors[name]["file"]][name][1]
        else:
            assert (qtype, packed) == base[name] and "norm" in name
    assert len({tensors[name]["qtype"] for name in tensors}) > 2  # it did choose


def test_levels_are_whole_files(run: Run) -> None:
    """Every uniform level is a runnable GGUF whose types are the asked ones or their fallbacks."""
    fallbacks = {(f["tensor"], f["asked"]): f["used"] for f in run.report["fallbacks"]}
    for path in run.levels.glob("*.gguf"):
        for name, tensor in GgufFile(path).tensors.items():
            if "norm" not in name:
                used = fallbacks.get((name, path.stem), path.stem)
                assert tensor.qtype == QuantType(used)
        model = llama_cpp.Llama(str(path), n_ctx=64, verbose=False)
        model.eval(model.tokenize(b"import sys"))
        model.close()


def test_events_tell_the_story(run: Run) -> None:
    events = run.events
    for stage in NAMES:
        kinds = [e.kind for e in events if e.stage == stage]
        assert kinds[0] == "started" and kinds[-1] == "finished"
    for event in events:
        if event.kind == "progress":
            assert 0 <= event.data["done"] <= event.data["total"]
    assert (events[0].stage, events[0].kind) == (None, "started")
    assert (events[-1].stage, events[-1].kind) == (None, "finished")
    assert not list(run.folder.rglob("*.partial"))


def test_status(run: Run, offline: dict[str, str]) -> None:
    answer = quantkit("status", run.folder, "--json", env=offline)
    assert answer.code == 0
    assert answer.json["state"] == "done" and tuple(answer.json["done"]) == NAMES
    shown = quantkit("status", run.folder, env=offline).out
    assert all(f"  {stage:<10} done in" in shown for stage in NAMES)


def test_a_second_run_does_nothing(
    run: Run, whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    copy = run.fork(tmp_path / "copy", "publish")
    first = quantkit("resume", copy.folder, "--json", env=offline)
    assert first.code == 0, first.err
    n = len(copy.events)
    again = quantkit("resume", copy.folder, "--json", env=offline)
    assert again.code == 0 and again.json["stages"] == first.json["stages"]
    kinds = [e.kind for e in copy.events[n:]]
    assert kinds == ["started", *["skipped"] * len(NAMES), "finished"]


def test_rebuild_from_kept_levels(run: Run, tmp_path: Path, offline: dict[str, str]) -> None:
    out = tmp_path / "again.gguf"
    options = ("--base", run.base, "--levels", run.levels, "--out", out)
    answer = quantkit("rebuild", run.recipe_path, *options, "--json", env=offline)
    assert answer.code == 0, answer.err
    assert answer.json["equal"] is True
    assert sha256_file(out) == sha256_file(run.output)


def test_rebuild_from_the_base_alone(run: Run, tmp_path: Path, offline: dict[str, str]) -> None:
    out = tmp_path / "again.gguf"
    options = ("--base", run.base, "--out", out, "--json")
    answer = quantkit("rebuild", run.recipe_path, *options, env=offline)
    assert answer.code == 0, answer.err
    assert json.loads(answer.out)["equal"] is True
    assert sha256_file(out) == sha256_file(run.output)
    assert [path.name for path in tmp_path.iterdir()] == ["again.gguf"]
