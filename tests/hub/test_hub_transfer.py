"""Downloads that resume, and publishing that changes nothing the second time, under faults."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hub_server import ALICE, BOB, READER, SECRETS, HubServer, look, running_hub
from hub_store import CARD, CONFIG, bf16, safetensors, sharded_model, tiny_model, write
from huggingface_hub import snapshot_download

from quantkit import hub, sources
from quantkit.errors import QuantkitError
from quantkit.hub import upload as hub_upload

WEIGHTS = tiny_model()["model.safetensors"]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub(monkeypatch, tmp_path) as hub_server:
        yield hub_server


# Downloads


def test_download(server: HubServer) -> None:
    server.add_model("alice/x", sharded_model())
    info = look("alice/x")
    server.add_model("alice/x", {"config.json": "{}"})  # main moves on; the snapshot does not
    seen: list[tuple[int, int]] = []
    folder = hub.download(info, None, lambda done, total: seen.append((done, total)))
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {file.path for file in info.files}
    assert not any(name.endswith((".py", ".bin", ".gguf")) for name in names)
    assert all((folder / name).read_bytes() == sharded_model()[name] for name in names)
    assert folder.name == info.sha
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (info.n_download_bytes, info.n_download_bytes)
    n_requests = len(server.requests)
    assert hub.download(info, None) == folder
    assert not server.requests[n_requests:]


def test_download_continues_after_a_cut(server: HubServer) -> None:
    n = 12_000_000  # huggingface_hub reads 10 MB at a time, and resumes after whole reads
    data = safetensors({"t": ("BF16", (n,), bf16(n))})
    server.add_model("alice/x", tiny_model(model__safetensors=data))
    info = look("alice/x")
    server.requests.clear()
    server.cut_next("/lfs/", after_bytes=21_000_000)
    folder = hub.download(info, None)
    assert (folder / "model.safetensors").read_bytes() == data
    ranges = [r.range for r in server.asked("/lfs/")]
    assert ranges[0] is None and re.fullmatch(r"bytes=[12]\d{7}-", ranges[1])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_download_survives_bad_answers(server: HubServer, status: int) -> None:
    server.add_model("alice/x", tiny_model())
    info = look("alice/x")
    server.fail_next("/resolve/.*/config.json", status)
    server.fail_next("/lfs/", status)
    server.fail_next("/tree/", status)
    assert (hub.download(info, None) / "model.safetensors").read_bytes() == WEIGHTS


def test_download_gives_up_with_a_sentence(server: HubServer) -> None:
    server.add_model("alice/x", tiny_model())
    info = look("alice/x")
    server.fail_next("/resolve/|/lfs/", 503, times=999)
    with pytest.raises(QuantkitError, match="problem of its own"):
        hub.download(info, None)


def test_damaged_cache_is_mended(server: HubServer) -> None:
    server.add_model("alice/x", tiny_model())
    info = look("alice/x")
    path = hub.download(info, None) / "model.safetensors"
    path.resolve().write_bytes(b"short")
    assert (hub.download(info, None) / "model.safetensors").read_bytes() == WEIGHTS


def test_not_enough_disk(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add_model("alice/x", tiny_model())
    info = look("alice/x")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 99})())
    with pytest.raises(QuantkitError, match=r"needs \d+ kB .* has 1 kB free.*HF_HOME"):
        hub.download(info, None)
    assert not server.asked("/tree/")


def test_local_folder_that_changed(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", tiny_model())
    info = look(str(folder))
    assert hub.download(info, None) == folder
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(QuantkitError, match="tokenizer.json of x is not the file"):
        hub.download(info, None)


@pytest.mark.parametrize("where", ["hub", "local"])
def test_metadata_without_weights(server: HubServer, tmp_path: Path, where: str) -> None:
    n = 3_000_000
    data = safetensors({"t": ("BF16", (n,), bf16(n))})
    files = tiny_model(model__safetensors=data)
    server.add_model("alice/x", files)
    info = look("alice/x" if where == "hub" else str(write(tmp_path / "x", files)))
    server.requests.clear()
    folder = sources.fetch_metadata(info, None, tmp_path / "meta")
    sources.fetch_metadata(info, None, folder)  # again over the first
    assert {path.name for path in folder.iterdir()} == {file.path for file in info.files}
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    shell = folder / "model.safetensors"
    assert shell.stat().st_size == len(data)
    assert shell.stat().st_blocks * 512 < 100_000 and not shell.is_symlink()
    n_header = 8 + int.from_bytes(data[:8], "little")
    assert shell.read_bytes()[:n_header] == data[:n_header]
    assert all(request.range for request in server.asked("/lfs/"))


def test_search(server: HubServer) -> None:
    for name, downloads, task in [
        ("lab/llama-small", 10, "text-generation"),
        ("lab/llama-big", 999, "text-generation"),
        ("lab/llama-sees", 50, "image-text-to-text"),
        ("lab/llama-draws", 9999, "text-to-image"),
        ("lab/other", 5, "text-generation"),
    ]:
        server.add_model(name, tiny_model(), downloads=downloads, likes=1, pipeline_tag=task)
    hits = hub.search_models("llama", limit=10)
    assert [hit.id.split("-")[1] for hit in hits] == ["big", "sees", "small"]
    assert hits[0] == hub.ModelHit("lab/llama-big", 999, 1)
    assert len(hub.search_models("llama", limit=1)) == 1


# Publishing


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as a run publishes it: a large file (LFS, in three parts) and small ones."""
    numbers = np.random.default_rng(0).integers(0, 256, 2_500_000, dtype=np.uint8)
    return write(
        tmp_path / "results",
        {
            "Tiny-EVO-Q4_K_M.gguf": numbers.tobytes(),
            "Tiny-imatrix.gguf": b"imatrix",
            "README.md": CARD.encode(),
            "plots/frontier.svg": b"<svg/>",
            ".hidden/secret": b"never sent",
            "report.json.partial": b"never sent",
        },
    )


PUBLISHED = {"Tiny-EVO-Q4_K_M.gguf", "Tiny-imatrix.gguf", "README.md", "plots/frontier.svg"}


def remote_files(server: HubServer, repo_id: str) -> dict[str, bytes]:
    files = server.repos["model", repo_id].head.files
    return {path: blob.data for path, blob in files.items() if path != ".gitattributes"}


def local_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PUBLISHED}


def test_publish_and_download_back(server: HubServer, results: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    published = hub.publish(results, "alice/Tiny-GGUF", ALICE, message="Two files", progress=report)
    assert published.url == f"{server.url()}/alice/Tiny-GGUF"
    assert remote_files(server, "alice/Tiny-GGUF") == local_files(results)
    assert server.repos["model", "alice/Tiny-GGUF"].head.sha == published.sha
    assert server.repos["model", "alice/Tiny-GGUF"].head.message == "Two files"
    assert set(published.changed) == PUBLISHED
    back = Path(snapshot_download("alice/Tiny-GGUF", endpoint=server.url(), cache_dir=tmp_path))
    for file in published.files:
        assert hashlib.sha256((back / file.path).read_bytes()).hexdigest() == file.sha256
    assert seen[0][0] == 0 and seen[-1] == (seen[0][1], seen[0][1]) and seen == sorted(seen)
    assert {r.user for r in server.requests if "/lfs-" in r.path} <= {None, "alice"}
    assert not any(r.user for r in server.requests if r.path.startswith("/lfs-part"))


def test_publish_twice_is_one_commit(server: HubServer, results: Path) -> None:
    first = hub.publish(results, "alice/t", ALICE)
    n_uploads, n_lfs = len(server.asked("/lfs-|/commit/")), len(server.asked("/lfs-"))
    second = hub.publish(results, "alice/t", ALICE)
    assert (second.sha, second.changed) == (first.sha, ())
    assert len(server.repos["model", "alice/t"].commits) == 2  # the Hub's own and ours
    assert len(server.asked("/lfs-|/commit/")) == n_uploads
    (results / "README.md").write_text("# New card\n")
    third = hub.publish(results, "alice/t", ALICE)
    assert third.changed == ("README.md",)
    assert len(server.asked("/lfs-")) == n_lfs
    assert remote_files(server, "alice/t") == local_files(results)


def test_what_is_not_what_was_made_is_not_published(server: HubServer, results: Path) -> None:
    name = "Tiny-EVO-Q4_K_M.gguf"
    with pytest.raises(QuantkitError, match=f"{name} is not the file that was made"):
        hub.publish(results, "alice/t", ALICE, known={name: "0" * 64})
    assert not server.requests and ("model", "alice/t") not in server.repos


def test_bytes_that_change_while_they_are_sent(server: HubServer, results: Path) -> None:
    """No commit is made of them."""
    path = results / "Tiny-EVO-Q4_K_M.gguf"

    def flip(done: int, total: int) -> None:
        if done == 0:  # everything is hashed, nothing is sent yet
            data = bytearray(path.read_bytes())
            data[1_000_000] ^= 1
            path.write_bytes(data)

    with pytest.raises(QuantkitError, match=r"its bytes have changed.*Nothing was published"):
        hub.publish(results, "alice/t", ALICE, progress=flip)
    assert len(server.repos["model", "alice/t"].commits) == 1  # the Hub's own


def test_publish_keeps_what_others_put_there(server: HubServer, results: Path) -> None:
    server.add_model("lab/t", {"their.gguf": b"theirs", "README.md": "their card"})
    hub.publish(results, "lab/t", ALICE)
    files = remote_files(server, "lab/t")
    assert files["their.gguf"] == b"theirs" and files["README.md"] == CARD.encode()


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("times", [1, 7])
def test_publish_through_bad_answers(
    server: HubServer, results: Path, status: int, times: int
) -> None:
    for path in ("create", "paths-info", "preupload", "batch", "lfs-part", "lfs-complete"):
        server.fail_next(path, status, times)
    server.fail_next("validate-yaml|/commit/|lfs-verify", status, times)
    hub.publish(results, "alice/t", ALICE)
    assert remote_files(server, "alice/t") == local_files(results)
    assert len(server.repos["model", "alice/t"].commits) == 2


@pytest.mark.parametrize(
    "path", ["create", "paths-info", "preupload", "batch", "lfs-part", "lfs-complete", "/commit/"]
)
@pytest.mark.parametrize("how", ["cut", "lose"])
def test_publish_through_cut_connections(
    server: HubServer, results: Path, path: str, how: str
) -> None:
    if how == "cut":
        server.cut_next(path, after_bytes=5)
    else:
        server.lose_next(path)
    published = hub.publish(results, "alice/t", ALICE)
    repo = server.repos["model", "alice/t"]
    assert remote_files(server, "alice/t") == local_files(results)
    assert len(repo.commits) == 2 and published.sha == repo.head.sha
    assert set(published.changed) == PUBLISHED


def test_publish_while_someone_else_commits(
    server: HubServer, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_model("alice/t", {"a.txt": "1"})
    original, other = hub_upload._Upload.differing, iter([True])

    def differing(*args: object) -> object:
        result = original(*args)
        if next(other, False):  # between our look and our commit
            server.add_model("alice/t", {"a.txt": "1", "b.txt": "2"})
        return result

    monkeypatch.setattr(hub_upload._Upload, "differing", differing)
    hub.publish(results, "alice/t", ALICE)
    assert {"a.txt", "b.txt", *PUBLISHED} == set(remote_files(server, "alice/t"))


def test_publish_sees_a_wrong_upload(server: HubServer, results: Path) -> None:
    hub.publish(results, "alice/t", ALICE)
    repo = server.repos["model", "alice/t"]
    digest = hashlib.sha256((results / "Tiny-imatrix.gguf").read_bytes()).hexdigest()
    server.lfs[digest] = b"IMATRIX"
    repo.commit("vandal", {})
    with pytest.raises(QuantkitError, match="Tiny-imatrix.gguf in alice/t is not the file"):
        hub.publish(results, "alice/t", ALICE)


def test_bad_card(server: HubServer, results: Path) -> None:
    (results / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(QuantkitError, match="refuses the model card.*must be a string"):
        hub.publish(results, "alice/t", ALICE)
    assert len(server.repos["model", "alice/t"].commits) == 1


def test_nothing_to_publish(server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(QuantkitError, match="nothing to publish"):
        hub.publish(tmp_path, "alice/t", ALICE)
    assert not server.requests


def fine_grained(*permissions: str, name: str = "carol") -> dict[str, object]:
    scope = {"entity": {"type": "user", "name": name}, "permissions": list(permissions)}
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}}


def test_check_write(server: HubServer) -> None:
    server.add_user("hf_carolSecretToken1", "carol", auth=fine_grained("repo.write"))
    server.add_user("hf_carolSecretToken2", "carol", auth=fine_grained("repo.content.read"))
    server.add_model("alice/public", {"a": b""})
    assert hub.check_write("alice/new", ALICE) == "alice/new"
    assert hub.check_write("new", ALICE) == "alice/new"
    assert hub.check_write("lab/new", ALICE) == "lab/new"
    assert hub.check_write("alice/public", ALICE) == "alice/public"
    assert hub.check_write("carol/new", "hf_carolSecretToken1") == "carol/new"
    for repo_id, token, private, sentence in [
        ("alice/new", None, False, "Publishing needs a token"),
        ("alice/new", SECRETS[3], False, "does not accept this token"),
        ("alice/new", BOB, False, "belongs to bob, who cannot publish under alice"),
        ("alice/new", READER, False, "read-only"),
        ("carol/new", "hf_carolSecretToken2", False, "read-only"),
        ("alice/public", ALICE, True, "is public, but"),
        ("a/b/c", ALICE, False, "not a model's id"),
    ]:
        with pytest.raises(QuantkitError, match=sentence) as caught:
            hub.check_write(repo_id, token, private)
        assert caught.value.remedy
    assert ("model", "alice/new") not in server.repos  # nothing was created on the way


def test_private_stays_private(server: HubServer, results: Path) -> None:
    hub.publish(results, "alice/t", ALICE, private=True)
    assert server.repos["model", "alice/t"].private
    server.add_model("alice/public", {"a": b""})
    with pytest.raises(QuantkitError, match="public is public, but"):
        hub.publish(results, "alice/public", ALICE, private=True)
    assert len(server.repos["model", "alice/public"].commits) == 1


def test_publish_without_permission(server: HubServer, results: Path) -> None:
    for token, sentence in [(None, "needs a token"), (BOB, "no permission to write to alice/t")]:
        with pytest.raises(QuantkitError, match=sentence):
            hub.publish(results, "alice/t", token)


def test_progress_inside_a_large_file(server: HubServer, results: Path) -> None:
    """While a part hangs, the report says how far the file was read."""
    seen: list[int] = []
    server.hang_next("/lfs-part/.*", 1.6)
    hub.publish(results, "alice/t", ALICE, progress=lambda done, total: seen.append(done))
    assert any(900_000 <= done <= 1_100_000 for done in seen), seen
    assert seen == sorted(seen)
