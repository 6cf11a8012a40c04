"""Forty-odd requests of somebody who means harm, at a public page: none succeeds, each is answered,
the page stays up, and nothing of the other visitor has changed.

    pytest tests/server/test_app_hostile.py
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import app_fixtures as fixtures
import pytest
from hub_server import HubServer, running_hub
from hub_store import tiny_model
from test_app import get
from test_space import call

from quantkit.errors import QuantkitError
from quantkit.server.runs.store import RunStore
from quantkit.server.web.rate_limit import ALLOWED, RateLimit
from quantkit.server.web.visitor import Visitors

DEEP = "[" * 100_000 + "]" * 100_000
BOMBS = [
    "(a+)+$",
    "(a|a)*b",
    "(.*)(.*)(.*)(.*)x",
    ".*.*.*.*.*.*x",
    "(?=(a+))a*b",
    r"(a)\1+",
    "a" * 201,
    "(((((a)))))",
    "[",
]
TOKENS = ["x\ny", "x" * 10_000, "hf_Ä", "hf_\x00", "a b\r\nX-Evil: 1"]
PLACES = ["/etc", "../../etc/passwd", "file:///etc/passwd", "~root", ".", "a/b/../../c", "C:\\x"]
START = ["start_job", "estimate"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    sleep = time.sleep
    with pytest.MonkeyPatch.context() as patch:
        with running_hub(patch, tmp_path_factory.mktemp("hub")) as server:
            patch.setattr("time.sleep", sleep)
            for name, value in server.env.items():
                patch.setenv(name, value)
            yield server


@pytest.fixture(scope="module")
def site(
    hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, RunStore, Visitors, str]]:
    """A public page with a run of hers; yields also his cookie."""
    root = tmp_path_factory.mktemp("web") / "runs"
    with fixtures.serving(root, public=True, planned=False, schedule=False) as (
        url,
        store,
        visitors,
    ):
        hers = visitors.new_key()
        fixtures.own(fixtures.write_run(root / "hers"), f"visitor:{visitors.check(hers)}")
        fixtures.write_run(root / "local")
        (root.parent / "secret.txt").write_text("secret")
        before = digest(root)
        yield url, store, visitors, visitors.new_key()
        assert digest(root) == before, "something of hers has changed"
        assert get(url)[0] == 200, "the page is down"


def digest(root: Path) -> str:
    """Of everything under the run of hers, names and bytes."""
    whole = hashlib.sha256()
    for path in sorted((root / "hers").rglob("*")):
        whole.update(str(path).encode() + (path.read_bytes() if path.is_file() else b""))
    return whole.hexdigest()


def event(site: tuple[str, RunStore, Visitors, str], name: str, data: list[Any]) -> tuple[int, str]:
    """Send one of the page's own events, as a page that lies would."""
    url, _, visitors, key = site
    config = json.loads(get(f"{url}config")[2])
    ids = {c["id"]: c["props"].get("elem_id") for c in config["components"]}
    found = next(
        d for d in config["dependencies"] if d["targets"] and ids.get(d["targets"][0][0]) == name
    )
    body = {"data": data, "fn_index": found["id"], "session_hash": "evil"}
    request = urllib.request.Request(
        f"{url}gradio_api/run/predict",
        json.dumps(body).encode(),
        fixtures.page_headers(url, visitors, key),
    )
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "path",
    [
        f"files/hers/{fixtures.GGUF}",
        "files/hers/config.json",
        "files/hers/..%2Fjob.json",
        "files/..%2Fhers/README.md",
        "files/%2e%2e/secret.txt",
        "files/local/README.md",
        "files/.secret/x",
        "gradio_api/file=/etc/passwd",
        "gradio_api/file=../secret.txt",
        "gradio_api/proxy=http://169.254.169.254/latest/",
        "?job=hers",
    ],
)
def test_nothing_of_others_is_read(site: tuple[str, RunStore, Visitors, str], path: str) -> None:
    status, _, body = get(site[0] + path, site[3])
    assert status in (400, 403, 404) or path.startswith("?")
    assert not any(word in body for word in (b"secret\n", b"root:", b"Traceback", b"SmolLM2-135M"))


@pytest.mark.parametrize("name", ["job_status", "cancel_job"])
@pytest.mark.parametrize("job_id", ["hers", "local", "../hers", "hers/../hers", "", "x" * 500])
def test_foreign_jobs_do_not_exist(
    site: tuple[str, RunStore, Visitors, str], name: str, job_id: str
) -> None:
    said = call(site[0], name, {"job_id": job_id, "key": site[3]})
    assert "event: error" in said and "There is no such run" in said


@pytest.mark.parametrize("name", ["cancel", "resume", "delete-now", "publish"])
def test_the_page_does_not_act_for_others(
    site: tuple[str, RunStore, Visitors, str], name: str
) -> None:
    data: dict[str, list[Any]] = {
        "cancel": ["hers", {}, ""],
        "resume": ["hers", {}, ""],
        "publish": ["hers", "evil/repo", "model", "", "hf_aliceSecretToken01", {}],
    }
    status, body = event(site, name, data.get(name, ["hers"]))
    assert status == 200 and "There is no such run" in body


@pytest.mark.parametrize("pattern", BOMBS)
def test_patterns_that_never_end(site: tuple[str, RunStore, Visitors, str], pattern: str) -> None:
    from quantkit.server.runs.request import RunForm, to_config

    began = time.process_time()
    with pytest.raises(QuantkitError):
        to_config(RunForm("a/b", types=json.dumps({pattern: "Q4_K"})), public=True)
    assert time.process_time() - began < 30


@pytest.mark.parametrize("place", PLACES)
def test_no_place_of_this_machine_is_a_model(
    site: tuple[str, RunStore, Visitors, str], place: str
) -> None:
    for name in START:
        said = call(site[0], name, {"model": place})
        assert "event: error" in said and "Traceback" not in said, said[:300]


@pytest.mark.parametrize(
    "field",
    [
        {"model": "a/" + "b" * 100_000},
        {"calibration": "/etc/passwd"},
        {"calibration": "docs:1e999"},
        {"calibration": "docs," * 1000},
        {"size": "9" * 200 + "GB"},
        {"size": "-5GB"},
        {"like": "Q4_K_M; rm -rf /"},
        {"profile": "--help"},
        {"revision": "../../main"},
        {"revision": "--upload-pack=x"},
        {"machine": "h200 --flavor x", "size": "1GB"},
        {"seed": 10**40},
        {"bpw": 1e308},
        {"memory": "8GB", "context": -1},
    ],
)
def test_fields_out_of_range(
    site: tuple[str, RunStore, Visitors, str], field: dict[str, Any]
) -> None:
    said = call(site[0], "start_job", {"model": "a/b", **field})
    assert "event: error" in said and "Traceback" not in said
    assert len(said) < 2000


@pytest.mark.parametrize("token", TOKENS)
def test_tokens_that_are_none(site: tuple[str, RunStore, Visitors, str], token: str) -> None:
    status, body = event(site, "publish", ["hers", "a/b", "model", "", token, {}])
    assert status == 200 and "is not a token" in body and token not in body


def test_large_and_endless_requests(site: tuple[str, RunStore, Visitors, str]) -> None:
    url = site[0]
    big = urllib.request.Request(
        f"{url}gradio_api/call/v2/start_job", b"x" * 2_000_000, {"Content-Type": "text/plain"}
    )
    for request, status in (
        (big, 413),
        (urllib.request.Request(f"{url}gradio_api/upload", b"x" * 100), 404),
    ):
        try:
            urllib.request.urlopen(request, timeout=120)
        except urllib.error.HTTPError as error:
            assert error.code == status
        except (urllib.error.URLError, ConnectionError):
            continue  # it hung up on the flood
        else:
            raise AssertionError("it was taken")


def test_a_forged_cookie_is_nobody(site: tuple[str, RunStore, Visitors, str]) -> None:
    url, _, visitors, key = site
    forged = Visitors(b"other").new_key()
    said = call(url, "job_status", {"job_id": "hers", "key": forged})
    assert "That is not a key" in said  # and whether there is such a run is not told
    assert visitors.check(key) and visitors.check(forged) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("length", {"model__safetensors": struct.pack("<Q", 2**60) + b"{}"}, "header|safetensors"),
        ("short", {"model__safetensors": b"\x08"}, "safetensors|header|empty|ends"),
        ("deep", {"config__json": DEEP}, "is not a JSON object"),
        ("list", {"config__json": "[]"}, "is not a JSON object"),
        ("pickle", {"model__safetensors": None, "tiny-Q4_K_M__gguf": None}, "pickled"),
        ("code", {"config__json": {"architectures": ["EvilForCausalLM"], "model_type": "evil",
                                   "auto_map": {"AutoModel": "evil.Evil"}}}, "never runs"),
        ("path", {"model__safetensors": None, "model__safetensors__index__json":
                  {"weight_map": {"a": "../../etc/passwd"}}}, "not a safetensors file in"),
    ],
)  # fmt: skip
def test_models_that_mean_harm(
    site: tuple[str, RunStore, Visitors, str],
    hub: HubServer,
    name: str,
    files: dict[str, Any],
    words: str,
) -> None:
    import re

    hub.add_model(f"evil/{name}", tiny_model(**files))
    said = call(site[0], "estimate", {"model": f"evil/{name}"})
    assert "event: error" in said and re.search(words, said), said[:500]
    assert "Traceback" not in said


def test_often_is_too_often() -> None:
    now = [0.0]
    rate_limit = RateLimit(lambda: now[0])
    times, seconds = ALLOWED["start"]
    for _ in range(times):
        rate_limit.take("start", "1.2.3.4")
    with pytest.raises(QuantkitError, match="Too many requests"):
        rate_limit.take("start", "1.2.3.4")
    rate_limit.take("start", "5.6.7.8")
    rate_limit.take("search", "1.2.3.4")
    now[0] += seconds / times + 0.001
    rate_limit.take("start", "1.2.3.4")


def test_the_page_stops_a_flood(site: tuple[str, RunStore, Visitors, str]) -> None:
    """The same address again and again, a new cookie each time."""
    times, _ = ALLOWED["start"]
    said = [call(site[0], "start_job", {"model": "demo:smollm2-135m"}) for _ in range(times + 3)]
    assert any("Too many requests" in text or "Too many" in text for text in said[-3:])
