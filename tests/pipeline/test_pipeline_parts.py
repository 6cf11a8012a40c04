"""A file that is too large for the Hub: published in parts, verified, compared with, killed on the
way.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Answer, Run, environment, kill, quantkit, start, wait_for
from hub_server import ALICE, HubServer
from huggingface_hub import snapshot_download

from quantkit.files import sha256_file
from quantkit.gguf_file.cut import whole_sha256
from quantkit.gguf_file.read import GgufFile
from quantkit.run.folder import read_json

pytestmark = pytest.mark.slow

REPO = "alice/Tiny-GGUF"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer(part_bytes=100_000) as running:
        running.add_user(ALICE, "alice")
        yield running


@pytest.fixture(scope="module")
def env(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("hf"), **server.env, HF_TOKEN=ALICE)


@pytest.fixture(scope="module")
def run(
    whole_run: tuple[Run, Answer], env: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Stitched again with a limit of a third, validated and published."""
    most = whole_run[0].output.stat().st_size // 3
    folder = tmp_path_factory.mktemp("parts") / "run"
    made = whole_run[0].fork(folder, "stitch", split_bytes=most)
    answer = quantkit("resume", folder, env=env)
    assert answer.code == 0, answer.err
    assert "parts" in answer.err
    published = quantkit("publish", folder, REPO, env=env)
    assert published.code == 0, published.err
    return made


@pytest.fixture(scope="module")
def repository(run: Run, server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user downloads it."""
    folder = tmp_path_factory.mktemp("downloads")
    found = snapshot_download(REPO, endpoint=server.url(), token=ALICE, cache_dir=folder)
    return Path(found)


def test_all_parts_are_published_and_named(
    run: Run, repository: Path, whole_run: tuple[Run, Answer]
) -> None:
    (output,) = run.report["outputs"]
    parts = output["parts"]
    assert len(parts) >= 3
    assert sha256_file(run.output) == sha256_file(whole_run[0].output) == output["sha256"]
    assert not (repository / output["name"]).exists()
    for part in parts:
        path = repository / part["name"]
        assert path.stat().st_size == part["n_bytes"] and sha256_file(path) == part["sha256"]
    names = [part["name"] for part in parts]
    assert sorted(p.name for p in repository.glob("Tiny-Llama-EVO-*.gguf")) == names
    assert whole_sha256(GgufFile(repository / names[0])) == output["sha256"]

    receipt = read_json(repository / "receipt.json")
    assert {n: receipt["files"][n]["sha256"] for n in names} == {
        part["name"]: part["sha256"] for part in parts
    }
    assert receipt["joined"][output["name"]]["parts"] == names
    recipe = read_json(repository / "recipes" / run.recipe_path.name)
    assert recipe["output"]["parts"] == parts
    card = (repository / "README.md").read_text("utf-8")
    assert all(part["name"] in card and part["sha256"] in card for part in parts)
    assert f"llama-gguf-split --merge {names[0]} {output['name']}" in card
    assert "ollama run hf.co" not in card
    assert f"resolve/main/{names[-1]}?download=true" in card


def test_they_are_verified(run: Run, repository: Path, env: dict[str, str], tmp_path: Path) -> None:
    base = ("--base", run.base)
    verified = quantkit("verify", REPO, *base, "--json", env=env)
    assert verified.code == 0, verified.out + verified.err
    name = run.output.name
    states = {f["name"]: f["passed"] for f in verified.json["findings"]}
    assert states[name] and states[f"{name}, KL"] and states["files"]

    folder = tmp_path / "copy"
    shutil.copytree(repository, folder)
    last = folder / run.report["outputs"][0]["parts"][-1]["name"]
    data = bytearray(last.read_bytes())
    data[-40] ^= 1
    last.write_bytes(data)
    changed = quantkit("verify", folder, *base, "--json", env=env)
    assert changed.code == 1 and last.name in changed.json["verdict"]
    last.unlink()
    missing = quantkit("verify", folder, *base, "--json", env=env)
    assert missing.code == 1 and last.name in missing.json["verdict"]


def test_they_are_compared(run: Run, env: dict[str, str], tmp_path: Path) -> None:
    """From the Hub by the name of the first, beside the whole file: no difference at all."""
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and looked at the sun. " * 300)
    first = run.report["outputs"][0]["parts"][0]["name"]
    words = ("--base", run.base, "--text", text, "--chunks", "2", "--out", tmp_path / "report")
    answer = quantkit("compare", run.output, f"hf://{REPO}/{first}", *words, env=env)
    assert answer.code == 0, answer.err
    report = read_json(tmp_path / "report" / "report.json")
    (whole,), (parts,) = report["outputs"], report["baselines"]
    assert whole["kl"]["mean"] == parts["kl"]["mean"] > 0
    assert parts["n_bytes"] > whole["n_bytes"]


def test_a_kill_leaves_the_same_bytes(run: Run, env: dict[str, str], tmp_path: Path) -> None:
    copy = Run(tmp_path / "run")
    shutil.copytree(run.folder, copy.folder)
    parts = copy.dir.artifacts.parts
    expected = {path.name: sha256_file(path) for path in parts.iterdir()}
    shutil.rmtree(parts.parent)
    process = start("publish", copy.folder, "alice/killed", env=env)
    assert wait_for(process, copy.folder, "publish", "started progress")
    kill(process)
    assert 0 < len(list(parts.glob("*.gguf")))
    answer = quantkit("publish", copy.folder, "alice/killed", env=env)
    assert answer.code == 0, answer.err
    assert {path.name: sha256_file(path) for path in parts.iterdir()} == expected
