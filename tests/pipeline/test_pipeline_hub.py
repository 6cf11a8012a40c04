"""Runs from and to the Hub: a protocol server, the real client, and processes that are killed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from commands import Answer, Run, environment, kill, quantkit, start, wait_for
from hub_server import ALICE, BOB, SECRETS, HubServer
from huggingface_hub import ModelCard, snapshot_download

from quantkit.files import sha256_file
from quantkit.run.artifacts import NAMES
from quantkit.run.folder import read_json

pytestmark = pytest.mark.slow

CARD = """---
license: apache-2.0
language: [en]
tags: [chat]
---
# Tiny Llama
"""


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer(cdn=True, part_bytes=100_000) as running:
        running.add_user(ALICE, "alice")
        running.add_user(BOB, "bob")
        yield running


@pytest.fixture
def env(server: HubServer, tmp_path: Path) -> dict[str, str]:
    return environment(tmp_path / "hf", **server.env, HF_TOKEN=ALICE)


def download(server: HubServer, repo: str, folder: Path) -> Path:
    """A repository as a user downloads it."""
    found = snapshot_download(
        repo, endpoint=server.url(), token=ALICE, cache_dir=folder / "downloads", max_workers=2
    )
    return Path(found)


def front_matter(path: Path) -> dict:
    _, block, _ = path.read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(block)


def assert_no_secret_in(run: Run, *answers: Answer) -> None:
    said = "".join(a.out + a.err for a in answers).encode()
    told = b"".join(p.read_bytes() for p in run.folder.rglob("*") if p.is_file())
    assert not any(secret.encode() in said + told for secret in SECRETS)


def test_from_the_hub_to_the_hub(
    server: HubServer, env: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """A private model, a dataset of the Hub as calibration, a kill in the middle of the download
    and one in the middle of the upload; what is downloaded in the end is what was measured.
    """
    files: dict[str, bytes | str | Path] = {p.name: p for p in tiny_checkpoint.iterdir()}
    files["README.md"] = CARD
    files["generation_config.json"] = '{"eos_token_id": 2, "temperature": 0.6, "top_p": 0.9}'
    about = yaml.safe_load(CARD.split("---\n")[1])  # the Hub reads it out of the card
    server.add_model("alice/Tiny-Llama", files, private=True, cardData=about)
    sha = server.repos["model", "alice/Tiny-Llama"].head.sha
    # Other documents than those of `docs`: what is in both counts once.
    texts = [text.upper() for _, text in sorted(topics.items()) if len(text) > 400]
    table = io.BytesIO()
    parquet.write_table(pa.table({"text": texts}), table, row_group_size=64)
    config = {"config_name": "wikitext-2-raw-v1", "data_files": "wiki/train-*.parquet"}
    server.add_model(
        "Salesforce/wikitext",
        {
            "README.md": f"---\n{yaml.safe_dump({'configs': [config]})}---\n",
            "wiki/train-00000-of-00001.parquet": table.getvalue(),
        },
        kind="dataset",
    )
    run = Run(tmp_path / "run")
    options = ("--profile", "demo", "--calibration", "wikitext2:3,docs:1")
    target = ("--publish", "alice/Tiny-Llama-GGUF", "--private")
    command = ("run", "alice/Tiny-Llama", "--out", run.folder, *options, *target)

    server.hang_next("/lfs/", seconds=0)  # the header of the weights
    server.hang_next("/lfs/", seconds=600)  # the weights
    process = start(*command, env=env)
    assert wait_for(process, run.folder, "fetch", "started note")
    while len(server.asked("/lfs/", "GET")) < 2:
        assert process.poll() is None
    kill(process)
    assert tuple(run.dir.records()) == ()

    server.hang_next("/commit/", seconds=600)
    process = start(*command, env=env)
    assert wait_for(process, run.folder, "publish", "started")
    while not server.asked("/commit/", "POST"):
        assert process.poll() is None
    kill(process)
    assert tuple(run.dir.records()) == NAMES[:-1]
    n_uploads = len(server.asked("/lfs-(upload|part|complete)", "PUT"))
    assert n_uploads

    answer = quantkit(*command, "--json", env=env)
    assert answer.code == 0, answer.err
    assert len(server.asked("/lfs-(upload|part|complete)", "PUT")) == n_uploads  # none again
    repo = server.repos["model", "alice/Tiny-Llama-GGUF"]
    assert repo.private and [c.message for c in repo.commits][0] == "initial commit"
    assert len(repo.commits) == 2  # one for all files
    published = answer.json["stages"]["publish"]
    assert published["published"] and published["commit"] == repo.head.sha

    folder = download(server, "alice/Tiny-Llama-GGUF", tmp_path)
    name = "Tiny-Llama-EVO-Q4_K_M.gguf"
    expected = run.report["outputs"][0]["sha256"]
    assert sha256_file(folder / name) == sha256_file(run.output) == expected
    assert sha256_file(folder / "Tiny-Llama-imatrix.gguf") == sha256_file(run.imatrix)
    assert published["files"][name] == expected
    recipe = read_json(folder / "recipes" / "Tiny-Llama-EVO-Q4_K_M.json")
    assert recipe["output"]["sha256"] == expected
    assert (recipe["model"], recipe["revision"]) == ("alice/Tiny-Llama", sha)

    ollama = read_json(folder / "params")
    assert (ollama["temperature"], ollama["top_p"]) == (0.6, 0.9) and len(ollama["stop"]) == 1

    card = front_matter(folder / "README.md")
    assert card["base_model"] == "alice/Tiny-Llama"
    assert card["base_model_relation"] == "quantized"
    assert (card["license"], card["language"]) == ("apache-2.0", ["en"])
    assert "gguf" in card["tags"] and card["quantized_by"] == "quantkit"
    assert ModelCard.load(folder / "README.md").data.eval_results
    made = read_json(run.dir.stage_dir("calibrate") / "calibration.json")
    assert [(d["name"], d["source"], d["weight"]) for d in made["domains"]][0] == (
        "wikitext2",
        "Salesforce/wikitext",
        0.75,
    )
    assert {*run.report["outputs"][0]["domains"]} == {"wikitext2", "docs"}
    zero_shot = run.report["outputs"][0]["zero_shot"]
    assert "piqa" in zero_shot["reason"]  # this Hub has no such data set
    assert_no_secret_in(run, answer)
    assert not any(r.user for r in server.requests if r.server == "cdn")
    everything = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    assert str(tmp_path).encode() not in everything  # nothing of this machine

    verified = quantkit("verify", "alice/Tiny-Llama-GGUF", "--json", env=env)
    assert verified.code == 0, verified.out + verified.err
    states = {f["name"]: f["passed"] for f in verified.json["findings"]}
    assert states["full-precision file"] and states[f"{name}, KL"]  # made again, measured again
    assert verified.json["name"] == f"alice/Tiny-Llama-GGUF at {repo.head.sha[:12]}"
    assert_no_secret_in(run, verified)

    data = bytearray((folder / name).read_bytes())  # somebody changes a byte of it
    data[-1] ^= 1
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    server.add_model("alice/Tiny-Llama-GGUF", {**files, name: bytes(data)}, private=True)
    spoiled = quantkit("verify", "alice/Tiny-Llama-GGUF", "--json", env=env)
    assert spoiled.code == 1 and name in spoiled.json["verdict"]
    pinned = ("alice/Tiny-Llama-GGUF", "--revision", published["commit"], "--sample", "1")
    assert quantkit("verify", *pinned, env=env).code == 0


def test_publish_a_finished_run(
    server: HubServer, env: dict[str, str], whole_run: tuple[Run, Answer], tmp_path: Path
) -> None:
    run = whole_run[0].fork(tmp_path / "run", "publish")
    answer = quantkit("publish", run.folder, "alice/tiny", "--json", env=env)
    assert answer.code == 0, answer.err
    assert answer.json["published"] and answer.json["url"] == f"{server.url()}/alice/tiny"
    folder = download(server, "alice/tiny", tmp_path)
    assert sha256_file(folder / run.output.name) == sha256_file(run.output)
    names = {"README.md", "report.json", "receipt.json", "Tiny-Llama-imatrix.gguf"}
    names |= {run.output.name, "made-with-quantkit.png"}
    assert {p.name for p in folder.iterdir() if p.is_file()} - {".gitattributes"} == names
    assert json.loads((folder / "report.json").read_text()) == run.report
    card = front_matter(folder / "README.md")  # a local folder without a card names no base
    assert "base_model" not in card and card["pipeline_tag"] == "text-generation"

    commits = server.repos["model", "alice/tiny"].commits
    n_commits = len(commits)
    again = quantkit("publish", run.folder, "alice/tiny", "--json", env=env)
    assert again.code == 0 and len(commits) == n_commits

    other = quantkit("publish", run.folder, "alice/second", "--private", "--json", env=env)
    assert other.code == 0 and other.json["repo"] == "alice/second"
    assert server.repos["model", "alice/second"].private
    assert len(commits) == n_commits

    cleaned = quantkit("clean", run.folder, env=env)
    assert cleaned.code == 0
    third = quantkit("publish", run.folder, "alice/third", "--json", env=env)
    assert third.code == 0, third.err
    assert sha256_file(download(server, "alice/third", tmp_path) / run.output.name) == sha256_file(
        run.output
    )
    assert not list(run.levels.glob("*.gguf"))  # nothing was made again for it
    assert_no_secret_in(run, answer, again, other, third)


def test_what_is_not_published(
    server: HubServer, env: dict[str, str], whole_run: tuple[Run, Answer], tmp_path: Path
) -> None:
    """A run that is not validated, a namespace of someone else, no token: refused, nothing made."""
    unfinished = whole_run[0].fork(tmp_path / "unfinished", "validate")
    refused = quantkit("publish", unfinished.folder, "alice/x", env=env)
    assert refused.code == 1 and "is not validated" in refused.err
    assert f"quantkit resume {unfinished.folder}" in refused.err
    run = whole_run[0].fork(tmp_path / "run", "publish")
    taken = quantkit("publish", run.folder, "bob/x", env=env)
    assert taken.code == 1 and "cannot publish under bob" in taken.err
    nobody = quantkit("publish", run.folder, "alice/x", env={**env, "HF_TOKEN": ""})
    assert nobody.code == 1 and "Publishing needs a token." in nobody.err
    empty = quantkit("publish", tmp_path / "nothing", "alice/x", env=env)
    assert empty.code in (1, 2) and "Traceback" not in empty.err
    assert not (tmp_path / "nothing").exists()
    assert not server.repos
    assert tuple(run.dir.records()) == NAMES[:-1]
