"""Types, methods, tensors, calibration and evaluation as asked for, in whole runs; files without
GPTQ are those of llama.cpp to the byte.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from commands import CHEAP, Answer, Run, packed_tensors, quantkit
from safetensors.numpy import load_file
from tiny_gguf import Shape, write_llama

from quantkit import pipeline
from quantkit.config import PROFILES, RunConfig
from quantkit.errors import QuantkitError
from quantkit.ggml import native
from quantkit.ggml.types import QuantType
from quantkit.gguf_file.imatrix import read_imatrix
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.stitch import stitch
from quantkit.gguf_file.write import lay_out
from quantkit.llamacpp.stock import StockRecipe, make_stock
from quantkit.model.blockwise import compute_dtype
from quantkit.model.row_maps import RowMap, RowMatcher
from quantkit.model.streaming import open_model
from quantkit.run.folder import read_json
from quantkit.sources.snapshot import load_snapshot
from quantkit.statistics.collect import block_names, walk
from quantkit.statistics.inputs import BlockStatistics
from quantkit.tensors import TensorSpec

pytestmark = pytest.mark.slow


@pytest.fixture
def whole(whole_run: tuple[Run, Answer]) -> Run:
    return whole_run[0]


def finish(run: Run, env: dict[str, str]) -> Run:
    answer = quantkit("resume", run.folder, "--json", env=env)
    assert answer.code == 0, answer.err
    return run


def importances(run: Run) -> dict[str, np.ndarray]:
    """What llama-quantize is given: the run's imatrix, and the head's inputs, which
    llama-imatrix collects with --process-output alone.
    """
    made: dict[str, np.ndarray] = {}

    def use(name: str, turns: Iterable[BlockStatistics]) -> None:
        ((head,),) = (turn.inputs for turn in turns)
        made["output.weight"] = head.diagonal.diagonal

    model = open_model(load_snapshot(run.dir).folder, compute_dtype("cpu"))
    blocks = block_names(len(model.blocks))[:-1]
    walk(model, load_file(run.dir.artifacts.tokens), blocks, use, run.folder / "spilled")
    return {**read_imatrix(run.imatrix), **made}


def test_plan_tells_what_the_run_does(whole: Run, offline: dict[str, str]) -> None:
    model = read_json(whole.dir.config_path)["model"]
    answer = quantkit("plan", model, *CHEAP, "--json", env=offline)
    assert answer.code == 0, answer.err
    plan, (budget,) = answer.json, whole.budgets
    assert plan["sizes"]["budgets"] == [budget]
    assert plan["fallbacks"] == whole.report["fallbacks"]
    for name, n_bytes in plan["sizes"]["levels"].items():
        size = (whole.levels / f"{name}.gguf").stat().st_size
        assert size <= n_bytes <= size + 4096


def test_one_type_for_all(whole: Run, tmp_path: Path, offline: dict[str, str]) -> None:
    """`{"default": "Q4_0"}`: llama-quantize's --pure file, tensor for tensor."""
    types = (("default", "Q4_0"),)
    run = whole.fork(tmp_path / "run", "quantize", types=types, methods=("imatrix",))
    finish(run, offline)
    make_stock(run.base, tmp_path / "pure.gguf", StockRecipe("Q4_0", pure=True), importances(run))
    ours, theirs = packed_tensors(run.output), packed_tensors(tmp_path / "pure.gguf")
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    assert {qtype for name, (qtype, _) in ours.items() if "norm" not in name} == {"Q4_0"}
    (output,) = run.report["outputs"]
    assert output["n_bytes"] <= output["search"]["limit_bytes"]
    assert run.output.name == "Tiny-Llama-EVO-Q4_0.gguf"
    assert output["search"]["searched"] is False


def test_types_for_some_tensors(
    tiny_checkpoint: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    """Only what --tensors names is quantized; the first pattern of --types that fits counts; rtn
    is what ggml does without importances.
    """
    (tmp_path / "types.json").write_text(
        '{"blk.0.*gate": "Q6_K", "down": "Q3_K", "default":"Q8_0"}'
    )
    run = Run(tmp_path / "run")
    options = ("--types", tmp_path / "types.json", "--tensors", "ffn_(gate|down)")
    command = ("run", tiny_checkpoint, "--out", run.folder, *CHEAP, *options, "--methods", "rtn")
    answer = quantkit(*command, env=offline)
    assert answer.code == 0, answer.err
    expected = {
        "blk.0.ffn_gate.weight": QuantType("Q8_0"),  # Q6_K with rows of 96
        "blk.1.ffn_gate.weight": QuantType("Q8_0"),
        "blk.0.ffn_down.weight": QuantType("Q3_K"),
        "blk.1.ffn_down.weight": QuantType("Q3_K"),
    }
    base = GgufFile(run.base)
    kept = {name: tensor.qtype for name, tensor in base.tensors.items()}
    assert {n: t.qtype for n, t in GgufFile(run.output).tensors.items()} == {**kept, **expected}
    (fallback,) = run.report["fallbacks"]
    assert fallback["tensor"] == "blk.0.ffn_gate.weight"
    assert (fallback["asked"], fallback["used"]) == ("Q6_K", "Q8_0")
    out = tmp_path / "llama.gguf"
    make_stock(run.base, out, StockRecipe("Q8_0"), {}, {**kept, **expected})
    theirs = packed_tensors(out)
    ours = packed_tensors(run.output)
    assert [name for name in expected if ours[name] != theirs[name]] == []


def test_methods_that_compete(whole: Run) -> None:
    """Every tensor at every type is by the method with the least error on held-out inputs."""
    errors = read_json(whole.levels / "errors.json")["errors"]
    for types in errors.values():
        for solved in types.values():
            tried = {m: e["relative"] for m, e in solved["errors"].items()}
            assert tried[solved["method"]] == min(tried.values())
    assert {"gptq", "imatrix", "rtn"} == {
        m for m in errors["blk.0.ffn_up.weight"]["Q5_0"]["errors"]
    }


def test_gptq_alone_lists_its_fallbacks(
    whole: Run, tmp_path: Path, offline: dict[str, str]
) -> None:
    """The report says what it could not make. The embedding, which nothing is multiplied with, is
    solved by its gradients.
    """
    run = finish(whole.fork(tmp_path / "run", "quantize", methods=("gptq",)), offline)
    errors = read_json(run.levels / "errors.json")["errors"]
    others = {
        (name, qtype, solved["method"])
        for name, types in errors.items()
        for qtype, solved in types.items()
        if solved["method"] != "gptq"
    }
    listed = {
        (f["tensor"], f["asked"].removesuffix("/gptq"), f["used"].rpartition("/")[2])
        for f in run.report["fallbacks"]
        if f["asked"].endswith("/gptq")
    }
    assert listed == others
    assert "gptq" in {level["method"] for level in errors["token_embd.weight"].values()}
    assert {qtype for _, qtype, _ in others} <= {"F16", "BF16"}
    assert {row["method"] for row in run.recipe["tensors"].values()} == {"gptq"}


def test_an_allocation_without_gptq_is_llama_cpps(
    whole: Run, tmp_path: Path, offline: dict[str, str]
) -> None:
    """The searched file equals what llama-quantize makes with the same type for every tensor."""
    run = finish(whole.fork(tmp_path / "run", "quantize", methods=("imatrix",)), offline)
    types = {name: QuantType(row["qtype"]) for name, row in run.recipe["tensors"].items()}
    assert len(set(types.values())) > 2
    out = tmp_path / "llama.gguf"
    make_stock(run.base, out, StockRecipe("Q4_K_M"), importances(run), types)
    ours, theirs = packed_tensors(run.output), packed_tensors(out)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_stitching_one_level_reproduces_it(whole: Run, tmp_path: Path) -> None:
    base = GgufFile(whole.base)
    for path in whole.levels.glob("*.gguf"):
        level = GgufFile(path)
        types = {name: tensor.qtype for name, tensor in level.tensors.items()}
        out = tmp_path / path.name
        stitch(out, lay_out(base, types), base, dict.fromkeys(types, path))
        assert packed_tensors(out) == packed_tensors(path)


def test_text_and_tasks_of_ones_own(whole: Run, tmp_path: Path, offline: dict[str, str]) -> None:
    text = "\r\n".join(text for _, text in sorted(topics.items())[:12])
    (tmp_path / "own.txt").write_bytes(text.encode())
    items = [
        {"context": "Water is", "choices": [" wet.", " dry."], "gold": 0},
        {"context": "Two and two make", "choices": [" five.", " four."], "gold": 1},
    ]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = {"eval_text": str(tmp_path / "own.txt"), "tasks": str(tmp_path / "tasks.jsonl")}
    run = finish(whole.fork(tmp_path / "run", "validate", **asked), offline)
    (output,) = run.report["outputs"]
    assert {*output["domains"]} == {"own"}
    (task,) = output["tasks"].values()
    assert task["n_items"] == 2 and output["zero_shot"] == {"status": "done"}
    assert output["sha256"] == whole.report["outputs"][0]["sha256"]
    before = run.report["texts"]
    # On a file that changed since it is measured again.
    (tmp_path / "own.txt").write_bytes(text.encode() + b"!")
    again = quantkit("resume", run.folder, env=offline)
    assert again.code == 0, again.err
    assert any("eval_text_sha256 was changed" in event.message for event in run.events)
    assert run.report["texts"] != before and run.report["outputs"][0]["sha256"] == output["sha256"]


def test_calibration_from_local_files(whole: Run, tmp_path: Path, offline: dict[str, str]) -> None:
    """.txt, .jsonl and .parquet, weighted; what is held out of them is what is validated on."""
    parts = [text for _, text in sorted(topics.items()) if len(text) > 400]
    (tmp_path / "notes.txt").write_text("\n\n".join(parts[::3]), "utf-8")
    rows = [json.dumps({"text": text}) for text in parts[1::3]]
    (tmp_path / "lines.jsonl").write_text("\n".join(rows), "utf-8")
    parquet.write_table(pa.table({"text": parts[2::3]}), tmp_path / "table.parquet")
    few = [json.dumps(f"Proverb {i}: a stitch in time saves {i} more stitches.") for i in range(9)]
    (tmp_path / "few.jsonl").write_text("\n".join(few), "utf-8")
    weights = {"notes.txt": 4, "lines.jsonl": 3, "table.parquet": 2, "few.jsonl": 1}
    spec = ",".join(f"{tmp_path / name}:{weight}" for name, weight in weights.items())
    run = finish(whole.fork(tmp_path / "run", "calibrate", calibration=spec), offline)
    made = read_json(run.dir.stage_dir("calibrate") / "calibration.json")
    assert {d["name"]: d["weight"] for d in made["domains"]} == {
        "notes.txt": 0.4,
        "lines.jsonl": 0.3,
        "table.parquet": 0.2,
        "few.jsonl": 0.1,
    }
    assert {*run.report["outputs"][0]["domains"]} == {"notes", "lines", "table"}
    assert "few.jsonl has too little text to hold any out for validation" in [
        e.message for e in run.events
    ]
    published = run.dir.stage_dir("publish") / "upload"
    assert made["spec"] == "notes.txt:4,lines.jsonl:3,table.parquet:2,few.jsonl:1"
    for name in ("README.md", "report.json", f"recipes/{run.output.stem}.json"):
        assert str(tmp_path) not in (published / name).read_text("utf-8")
    about = GgufFile(run.output).metadata
    assert about["quantize.imatrix.dataset"] == ", ".join(weights)


def test_somebody_elses_tensors_compete(
    whole: Run, offline: dict[str, str], tmp_path: Path
) -> None:
    """A file with better Q4_K than ours for one tensor (its neighbor's bytes win nothing): the
    better tensor is taken, to the bit, and the recipe says whose it is.
    """
    name = "blk.0.ffn_down.weight"
    level = GgufFile(whole.levels / "Q4_K.gguf")
    their = tmp_path / "their.gguf"
    shutil.copyfile(level.path, their)
    worse = whole.fork(tmp_path / "rtn", "quantize", methods=("rtn",), levels_from=(str(their),))
    run = finish(worse, offline)
    chosen = GgufFile(run.levels / "Q4_K.gguf")
    errors = read_json(run.levels / "errors.json")["errors"][name]["Q4_K"]
    assert errors["method"] == "from their.gguf"
    assert errors["errors"]["rtn"]["relative"] > errors["errors"]["from their.gguf"]["relative"]
    assert np.array_equal(chosen.packed(name), level.packed(name))
    methods = {row["method"] for row in run.recipe["tensors"].values()}
    assert "from their.gguf" in methods
    assert run.recipe["config"]["levels_from"] == [str(their)]
    assert not [f for f in run.report["fallbacks"] if f["used"].endswith("their.gguf")]


def test_a_file_of_another_model_does_not_compete(
    whole: Run, offline: dict[str, str], tmp_path: Path
) -> None:
    other = write_llama(tmp_path / "other.gguf", Shape(n_layer=1))
    run = whole.fork(tmp_path / "run", "quantize", levels_from=(str(other),))
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 1 and "other.gguf is not a GGUF of this model" in answer.err


def test_long_contexts(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the texts and the model allow; what is longer is named with the reason."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    demo = PROFILES["demo"]
    effort = replace(demo.effort, long=(256, 10**6))
    monkeypatch.setitem(PROFILES, "demo", replace(demo, effort=effort))
    run = whole.fork(tmp_path / "run", "validate")
    pipeline.run(RunConfig.from_json(read_json(run.dir.config_path)), run.folder, until="validate")
    (output,) = run.report["outputs"]
    assert list(output["long"]) == ["256"]
    assert 0 < output["long"]["256"]["mean"] < 1
    rivals = [row for row in run.report["baselines"] if row.get("long")]
    assert len(rivals) == 1, "beside the file that it is held against"
    (missing,) = run.report["not_measured"]
    assert "1,000,000" in missing["name"] and "trained for" in missing["reason"]


def test_a_tensor_that_is_not_found_in_the_model(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops the run, unless its reason is known: then it borrows the importances of what reads
    the same input, and the run says so.
    """
    name, lender = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    match = RowMatcher.match

    def blind(matcher: RowMatcher, spec: TensorSpec, packed: native.Bytes) -> RowMap | None:
        return None if spec.name == name else match(matcher, spec, packed)

    monkeypatch.setattr(RowMatcher, "match", blind)
    run = whole.fork(tmp_path / "run", "convert")
    config = RunConfig.from_json(read_json(run.dir.config_path))
    with pytest.raises(QuantkitError, match=f"not found in the model .*: {name}"):
        pipeline.run(config, run.folder, until="convert")
    reason = {name: "a head of another kind"}
    monkeypatch.setattr("quantkit.stages.convert.reason_of", lambda _, tensor: reason.get(tensor))
    pipeline.run(config, run.folder, until="stitch")
    assert run.dir.records()["convert"].summary["unmapped"] == [name]
    table = read_json(run.dir.artifacts.levels / "errors.json")
    said = [f for f in table["fallbacks"] if f["tensor"] == name and lender in f["used"]]
    assert [f["reason"] for f in said] == ["it is not found in the model"]
    weight = GgufFile(run.base).values(name)
    importance = read_imatrix(whole.imatrix)[lender]
    for path in run.levels.glob("*.gguf"):
        file = GgufFile(path)
        qtype = file.tensors[name].qtype
        level = table["errors"][name][str(qtype)]
        assert set(level["errors"]) == {"imatrix", "rtn"}
        given = importance if level["method"] == "imatrix" else None
        assert np.array_equal(file.packed(name), native.quantize(weight, qtype, given))
    assert GgufFile(next(run.dir.stage_dir("stitch").glob("*.gguf"))).tensors[name]
