"""What a user meets when something is wrong: one sentence with a remedy, an exit code, and a folder
in which nothing is broken.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import CHEAP, Answer, Run, environment, quantkit
from hub_server import ALICE, BOB, READER, SECRETS, HubServer
from hub_store import Blob, tiny_model, write
from safetensors.torch import load_file, save_file
from tiny_models import save_model
from transformers import BertConfig, BertForMaskedLM

from quantkit import cli


def sentence(answer: Answer, code: int = 1) -> str:
    """The command's last words. They are one line, and no traceback is above it."""
    assert answer.code == code, answer.err
    assert answer.out == ""
    last = answer.err.splitlines()[-1]
    assert re.fullmatch(r"quantkit: \S.*[.!?:)/>\w\"'}]", last), last
    assert "Traceback" not in answer.err and "Error:" not in answer.err
    return last.removeprefix("quantkit: ")


# Wrong use: nothing is started, exit code 2.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--like", "Q4_K_XXL"), "no stock mix 'Q4_K_XXL'. Did you mean Q4_K_S"),
        (("--target-size", "5 parsecs"), "'5 parsecs' is not a size. Write 90MB"),
        (("--target-bpw", "400"), "not a number of bits per weight. Use something like 4.5"),
        (("--tensors", "ffn_(down"), "'ffn_(down' is not a regular expression"),
        (("--types", "no-such-map.json"), "type map no-such-map.json cannot be read"),
        (("--levels", "Q4_K,Q9_K"), "Q9_K"),
        (("--levels", "F16"), "F16 is not a quantized type"),
        (("--levels", "Q4_K,F32"), "F32 is not a quantized type"),
        (("--methods", "gptq,magic"), "Unknown method magic. Use some of gptq, imatrix, rtn"),
        (("--calibration", "tea-leaves"), "text 'tea-leaves'. Use auto, hub, builtin"),
        (("--calibration", "docs:0"), "weight in 'docs:0' is not a positive number"),
    ],
)
def test_wrong_use(
    options: tuple[str, str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "model", tiny_model())
    code = cli.main(["run", str(model), "--out", str(tmp_path / "run"), *options])
    said = capsys.readouterr()
    assert words in sentence(Answer(code, said.out, said.err), 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("run",),
        ("run", "model", "--out", "x", "--like", "Q4_0", "--target-bpw", "4"),
        ("run", "model", "--out", "x", "--profile", "leisurely"),
        ("walk",),
        (),
    ],
)
def test_wrong_words(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and "usage: quantkit" in said.err


def test_a_folder_with_other_things(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", tiny_model())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    code = cli.main(["run", str(model), "--out", str(tmp_path / "photos")])
    said = capsys.readouterr()
    words = sentence(Answer(code, said.out, said.err), 2)
    assert "is not empty and holds no run. Choose another --out." in words
    assert (tmp_path / "photos" / "cat.png").read_bytes() == b"cat"


# Models that are refused


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def poison(value: float) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
        save_file(weights, path, metadata={"format": "pt"})

    return spoil


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>404</html>" * 100)


def pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    config = BertConfig(
        vocab_size=512,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    save_model(folder, BertForMaskedLM(config), "spm")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "nan": (poison(float("nan")), r"NaN or infinite weights in model.layers.1.mlp.up_proj.weight"),
    "inf": (poison(float("-inf")), r"NaN or infinite weights in model.layers.1.mlp.up_proj"),
    "truncated": (truncate, r"model\.safetensors"),
    "not safetensors": (garble, r"model\.safetensors"),
    "pickled": (pickle, r"only pickled weights, which can run code.*Convert it to safetensors"),
    "encoder": (encoder, r"not a causal language model: BertForMaskedLM.*Give a model that"),
    "no config": (lambda f: (f / "config.json").unlink(), r"no config.json"),
    "unknown kind": (
        lambda f: edit(f / "config.json", model_type="florp", architectures=["FlorpForCausalLM"]),
        r"does not know this kind of model: florp",
    ),
    "remote code": (
        lambda f: edit(
            f / "config.json",
            model_type="florp",
            architectures=["FlorpForCausalLM"],
            auto_map={"AutoModelForCausalLM": "modeling_florp.FlorpForCausalLM"},
        ),
        r"loads only with code from its own repository, which quantkit never runs",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_refused_model(
    case: str, tiny_checkpoint: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    """Before any work; and with a whole model the same command then works in the same folder."""
    spoil, words = REFUSED[case]
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    spoil(model)
    run = Run(tmp_path / "run")
    said = sentence(quantkit("run", model, "--out", run.folder, *CHEAP, env=offline))
    assert re.search(words, said), said
    assert re.search(r"\. [A-Z]", said)  # a remedy follows
    left = {p.name for p in run.folder.rglob("*") if p.is_file()}
    assert left <= {"config.json", "events.jsonl", "lock"}
    last = run.events[-1]
    assert last.kind == "failed" and f"{last.message} {last.data['remedy']}" == said
    status = quantkit("status", run.folder, "--json", env=offline)
    assert status.code == 0 and status.json["state"] == "failed" and status.json["done"] == []


@pytest.mark.slow
def test_unsupported_architecture(
    tiny_checkpoint: Path, tmp_path: Path, offline: dict[str, str]
) -> None:
    """One that transformers loads and llama.cpp's converter does not."""
    model = tmp_path / "model"
    shutil.copytree(tiny_checkpoint, model)
    edit(model / "config.json", architectures=["MoonLlamaForCausalLM"])
    run = Run(tmp_path / "run")
    said = sentence(quantkit("run", model, "--out", run.folder, *CHEAP, env=offline))
    assert "MoonLlamaForCausalLM" in said
    assert not list(run.folder.rglob("*.gguf*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("100kB", r"budget of 100,000 bytes is below the smallest possible file, [\d,]+ bytes\."),
        ("0.9MB", r"budget of 900,000 bytes is above the largest file .*[\d,]+ bytes\."),
    ],
)
def test_impossible_budget(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str], size: str, words: str
) -> None:
    """Told by the convert stage, before calibration and everything that takes long."""
    run = whole_run[0].fork(tmp_path / "run", "convert", targets=[{"kind": "size", "value": size}])
    said = sentence(quantkit("resume", run.folder, env=offline))
    assert re.search(words, said), said
    assert tuple(run.dir.records()) == ("fetch",)
    assert not (run.folder / "3-calibrate").exists()
    assert not list(run.folder.rglob("*.partial"))


@pytest.mark.slow
def test_a_budget_that_the_model_does_not_reach(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    """The sizes in the sentence are true: asking for them works."""
    run = whole_run[0].fork(tmp_path / "a", "search", targets=[{"kind": "size", "value": "100kB"}])
    said = sentence(quantkit("resume", run.folder, env=offline))
    smallest = int(re.search(r"smallest possible file, ([\d,]+) bytes", said)[1].replace(",", ""))
    asked = {"kind": "size", "value": str(smallest)}
    run = whole_run[0].fork(tmp_path / "b", "search", targets=[asked])
    answer = quantkit("resume", run.folder, env=offline)
    assert answer.code == 0, answer.err
    assert run.output.stat().st_size == smallest


@pytest.mark.slow
def test_calibration_that_is_not_there(
    whole_run: tuple[Run, Answer], tmp_path: Path, offline: dict[str, str]
) -> None:
    missing = str(tmp_path / "missing.txt")
    run = whole_run[0].fork(tmp_path / "run", "calibrate", calibration=missing)
    said = sentence(quantkit("resume", run.folder, env=offline))
    assert f"There is no calibration file {missing}. Check the path" in said


# The Hub, over HTTP


@dataclass(frozen=True)
class Hole(Blob):
    """A file whose header is real and whose weights are said to be large."""

    claimed: int = 0

    @property
    def n_bytes(self) -> int:
        return self.claimed

    @cached_property
    def sha256(self) -> str:
        return "0" * 64


def huge_model() -> dict[str, Any]:
    n = 2**46  # weights: 128 TiB in bf16
    table = {"model.norm.weight": {"dtype": "BF16", "shape": [n], "data_offsets": [0, 2 * n]}}
    header = json.dumps(table).encode()
    content = len(header).to_bytes(8, "little") + header
    return {"model.safetensors": Hole(content, True, claimed=len(content) + 2 * n)}


def model_of(architecture: str) -> dict[str, Any]:
    files = tiny_model()
    config = json.loads(files["config.json"])
    return {**files, "config.json": json.dumps(config | {"architectures": [architecture]})}


@pytest.fixture
def server():
    with HubServer() as running:
        running.add_user(ALICE, "alice")
        running.add_user(BOB, "bob")
        running.add_user(READER, "alice", auth={"accessToken": {"role": "read"}})
        running.add_model("lab/gated", tiny_model(), gated=True)
        running.add_model("alice/private", tiny_model(), private=True)
        running.add_model("lab/huge", tiny_model())
        files = running.repos["model", "lab/huge"].commits[0].files
        files.update(huge_model())
        running.add_model("lab/text", {"a.txt": "x"}, kind="dataset")
        running.add_model("lab/moon", model_of("MoonLlamaForCausalLM"))
        running.add_model("lab/gemma-3n", model_of("Gemma3nForConditionalGeneration"))
        yield running


# model, options, token, words
ON_THE_HUB = {
    "missing": ("lab/missing", (), None, r"no model lab/missing on the Hub.*Check the spelling"),
    "private": ("alice/private", (), BOB, r"no model alice/private on the Hub, or it is private"),
    "gated": ("lab/gated", (), None, r"lab/gated is gated.*Agree and access.*HF_TOKEN"),
    "gated, token": ("lab/gated", (), BOB, r"lab/gated is gated.*token of that account"),
    "dataset": ("lab/text", (), None, r"lab/text is a dataset"),
    "revision": (
        "lab/gated",
        ("--revision", "v9"),
        ALICE,
        r"has no revision v9. Give a branch, tag or commit",
    ),
    "wrong token": ("lab/gated", (), SECRETS[3], r"does not accept this token.*Make a new one"),
    "disk": (
        "lab/huge",
        (),
        None,
        r"Not enough disk space: a run of lab/huge needs [\d,]{7,}.*GB free. Free some space",
    ),
    "unknown": ("lab/moon", (), None, r"does not know the architecture MoonLlamaForCausalLM"),
    "beyond reach": ("lab/gemma-3n", (), None, r"not supported: its blocks hand on four hidden"),
    "publish, anonymous": ("lab/gated", ("--publish", "alice/x"), None, r"needs a token"),
    "publish, reader": ("lab/gated", ("--publish", "alice/x"), READER, r"read-only"),
    "publish, other": ("lab/gated", ("--publish", "alice/x"), BOB, r"belongs to bob.*bob/x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_THE_HUB)
def test_refused_by_the_hub(server: HubServer, tmp_path: Path, case: str) -> None:
    model, options, token, words = ON_THE_HUB[case]
    env = environment(tmp_path / "hf", **server.env)
    if token:
        env["HF_TOKEN"] = token
    run = Run(tmp_path / "run")
    said = sentence(quantkit("run", model, "--out", run.folder, *CHEAP, *options, env=env))
    assert re.search(words, said), said
    told = b"".join(p.read_bytes() for p in run.folder.rglob("*") if p.is_file())
    assert not any(secret.encode() in told for secret in SECRETS)
    assert not any(secret in said for secret in SECRETS)
    assert not any("model.safetensors" in r.path and not r.range for r in server.requests)
    assert not server.asked("/create|/commit/", "POST")
    assert tuple(run.dir.records()) == ()


@pytest.mark.slow
def test_nobody_answers(tmp_path: Path) -> None:
    env = environment(tmp_path / "hf", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="0")
    said = sentence(quantkit("run", "lab/x", "--out", tmp_path / "run", *CHEAP, env=env))
    assert "http://127.0.0.1:9 cannot be reached. Try again." in said


@pytest.mark.slow
def test_offline(tmp_path: Path, offline: dict[str, str]) -> None:
    said = sentence(quantkit("run", "lab/x", "--out", tmp_path / "run", *CHEAP, env=offline))
    assert "switched off here. Unset HF_HUB_OFFLINE, or give a local folder." in said


@pytest.mark.slow
def test_a_folder_that_is_not_there(tmp_path: Path, offline: dict[str, str]) -> None:
    said = quantkit("run", tmp_path / "nowhere", "--out", tmp_path / "run", *CHEAP, env=offline)
    assert str(tmp_path / "nowhere") in sentence(said, said.code) and said.code in (1, 2)
