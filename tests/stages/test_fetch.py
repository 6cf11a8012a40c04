"""The fetch stage: snapshots of the Hub, of a folder and of the demo; broken weights refused."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hub_server import ALICE, HubServer, look, running_hub
from hub_store import bf16, safetensors, sharded_model, tiny_model, write
from tiny_models import tiny_llama

from quantkit import pipeline
from quantkit.checkpoint import safetensors as stored_headers
from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.safetensors import parse_header, read_header, scan
from quantkit.config import DEMO_MODEL, RunConfig
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError
from quantkit.run.artifacts import RELATIVE
from quantkit.run.events import EventLog, read_events
from quantkit.run.folder import RunDir, read_json
from quantkit.run.stage import Run
from quantkit.sandbox import untrusted
from quantkit.sources.snapshot import load_snapshot
from quantkit.stages import fetch


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


def make_run(folder: Path, model: str, revision: str | None = None) -> Run:
    """What the pipeline hands to a stage."""
    run_dir = RunDir(folder)
    run_dir.stage_dir("fetch").mkdir(parents=True)
    config = RunConfig(model, revision)
    return Run(config, run_dir, EventLog(run_dir.events_path))


def test_fetch_from_the_hub(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTKIT_HF_TOKEN", ALICE)
    repo = server.add_model("alice/x", sharded_model(), private=True)
    run = make_run(tmp_path / "run", "https://huggingface.co/alice/x/tree/main")
    result = fetch.Fetch().execute(run)
    assert [path.name for path in result.outputs] == ["snapshot.json"]
    assert result.summary["sha"] == repo.head.sha
    assert (result.summary["n_parameters"], result.summary["license"]) == (156, None)
    snapshot = load_snapshot(run.dir)
    assert snapshot.info.weights[0] == "model-00001-of-00003.safetensors"
    assert {path.suffix for path in snapshot.folder.iterdir()} == {".json", ".md", ".safetensors"}
    events, _ = read_events(run.dir.events_path)
    last = [event for event in events if event.kind == "progress"][-1]
    assert last.data["done"] == last.data["total"]
    written = run.dir.events_path.read_text() + (run.dir.path / "1-fetch/snapshot.json").read_text()
    assert ALICE not in written


def test_fetch_again_finds_everything(server: HubServer, tmp_path: Path) -> None:
    server.add_model("alice/x", tiny_model())
    first = make_run(tmp_path / "1", "alice/x")
    fetch.Fetch().execute(first)
    server.requests.clear()
    second = make_run(tmp_path / "2", "alice/x")
    fetch.Fetch().execute(second)
    assert not server.asked("/lfs/", "GET")[2:]  # the header only, looked at and compared
    paths = [run.dir.path / "1-fetch/snapshot.json" for run in (first, second)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_load_downloads_again_what_the_cache_lost(server: HubServer, tmp_path: Path) -> None:
    server.add_model("alice/x", tiny_model())
    run = make_run(tmp_path / "run", "alice/x")
    fetch.Fetch().execute(run)
    n_requests = len(server.requests)
    load_snapshot(run.dir)
    assert len(server.requests) == n_requests
    weights = load_snapshot(run.dir).folder / "model.safetensors"
    weights.resolve().unlink()
    server.add_model("alice/x", {"config.json": "{}"})
    assert (load_snapshot(run.dir).folder / "model.safetensors").is_file()
    assert load_snapshot(run.dir).info.sha == weights.parent.name


def test_damaged_download_is_refused(server: HubServer, tmp_path: Path) -> None:
    server.add_model("alice/x", tiny_model())
    run = make_run(tmp_path / "run", "alice/x")
    fetch.Fetch().execute(run)
    blob = (load_snapshot(run.dir).folder / "model.safetensors").resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(QuantkitError, match="is damaged: its bytes are not those of the Hub"):
        fetch.Fetch().execute(make_run(tmp_path / "again", "alice/x"))


def test_fetch_a_local_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "My-Model", tiny_model())
    run = make_run(tmp_path / "run", str(folder))
    result = fetch.Fetch().execute(run)
    assert (result.summary["model"], result.summary["license"]) == ("My-Model", "apache-2.0")
    assert load_snapshot(run.dir).folder == folder
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(QuantkitError, match="model.safetensors of My-Model is not the file"):
        load_snapshot(run.dir)


def test_fetch_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo = ModuleType("quantkit.sources.demo")
    demo.make_checkpoint = lambda folder: write(folder, tiny_model())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "quantkit.sources.demo", demo)
    monkeypatch.setattr("quantkit.sources.demo", demo, raising=False)
    run = make_run(tmp_path / "run", DEMO_MODEL)
    result = fetch.Fetch().execute(run)
    assert {path.name for path in result.outputs} >= {"snapshot.json", "model.safetensors"}
    assert all(path.is_relative_to(run.dir.path) for path in result.outputs)
    assert load_snapshot(run.dir).info.id == "SmolLM2-135M-Instruct"


def test_snapshot_json(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", tiny_model())
    run = make_run(tmp_path / "run", str(folder))
    fetch.Fetch().execute(run)
    value = read_json(run.dir.path / "1-fetch/snapshot.json")
    assert value["folder"] == str(folder)
    assert value["info"]["architectures"] == ["LlamaForCausalLM"]
    assert untrusted.build(ModelInfo, value["info"]) == load_snapshot(run.dir).info


# Weights


BAD = {
    "BF16 nan": ("BF16", np.uint16(0x7FC0)),
    "BF16 -inf": ("BF16", np.uint16(0xFF80)),
    "F16 inf": ("F16", np.float16("inf")),
    "F16 nan": ("F16", np.float16("nan")),
    "F32 nan": ("F32", np.float32("nan")),
    "F32 inf": ("F32", np.float32("-inf")),
    "F64 nan": ("F64", np.float64("nan")),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("where", [0, -1, 700_001])
def test_non_finite_weights_are_refused(tmp_path: Path, case: str, where: int) -> None:
    dtype, value = BAD[case]
    good = np.ones(1_000_003, value.dtype)
    bad = good.copy()
    bad[where] = value
    data = safetensors(
        {
            "a.weight": (dtype, good.shape, good.tobytes()),
            "b.weight": (dtype, bad.shape, bad.tobytes()),
        }
    )
    folder = write(tmp_path / "x", tiny_model(model__safetensors=data))
    with pytest.raises(QuantkitError, match=r"NaN or infinite weights in b\.weight \(model\.safe"):
        fetch.check_weights(look(str(folder)), folder)


def test_extreme_but_finite_weights_pass(tmp_path: Path) -> None:
    tensors = {
        "f32": np.array([3.4e38, -3.4e38, 1e-45, 0.0], np.float32),
        "f16": np.array([65504, -65504, 6e-8], np.float16),
        "bf16": np.array([0x7F7F, 0xFF7F, 0x0001], np.uint16),
        "i64": np.array([-1, 2**62], np.int64),
        "f8": np.array([0xFF, 0x7F], np.uint8),  # NaN in this format: its scales tell, not it
    }
    dtypes = {"i64": "I64", "f8": "F8_E4M3"}
    data = safetensors(
        {n: (dtypes.get(n, n.upper()), a.shape, a.tobytes()) for n, a in tensors.items()}
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert scan(path).non_finite is None


def test_masks_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    infinite = np.array([-np.inf], np.float32).tobytes()
    path = tmp_path / "x.safetensors"
    path.write_bytes(safetensors({"h.0.attn.masked_bias": ("F32", (1,), infinite)}))
    assert scan(path).non_finite is None
    path.write_bytes(safetensors({"h.0.attn.c_attn.bias": ("F32", (1,), infinite)}))
    assert scan(path).non_finite == "h.0.attn.c_attn.bias"


def test_scan_hashes_the_whole_file_in_any_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 10_007
    data = safetensors({f"t{i}": ("BF16", (n + i,), bf16(n + i, i)) for i in range(4)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    monkeypatch.setattr(stored_headers, "_CHUNK_BYTES", 4096)
    seen: list[int] = []
    found = scan(path, hashing=True, on_bytes=seen.append)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data)


def test_headers_agree_with_the_library(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    arrays = {
        "b": np.zeros((3, 5), np.float32),
        "a": np.ones(7, np.float16),
        "scalar": np.zeros((), np.int8),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = read_header(tmp_path / "x.safetensors")
    assert {t.name: t.shape for t in header.tensors} == {n: a.shape for n, a in arrays.items()}
    assert header.n_file_bytes == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"shape": [2], "data_offsets": [0, 8]}},
        {"a": [0, 8]},
        ["a"],
        None,
        7,
    ],
)
def test_hostile_headers_are_refused(header: object) -> None:
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(8)
    with pytest.raises(QuantkitError, match="x is broken"):
        parse_header(data, "x", len(data))


@pytest.mark.parametrize("n_json", [0, 1, 2**31, 2**63])
def test_absurd_header_lengths_are_refused(n_json: int) -> None:
    with pytest.raises(QuantkitError, match="does not start like safetensors"):
        parse_header(n_json.to_bytes(8, "little") + b"{}", "x", 10)


def test_names_relative_to_where_the_command_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs in the sandbox stands in another folder."""
    tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    config = RunConfig("model", targets=(LikeMix("Q4_K_M"),), profile="demo", calibration="docs")
    pipeline.run(config, Path("runs/one"), until="convert")
    assert (tmp_path / "runs/one" / RELATIVE.base).is_file()
    assert load_snapshot(RunDir(Path("runs/one"))).folder == tmp_path / "model"
