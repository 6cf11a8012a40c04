"""GGUFs of others, named on the page: what is understood, which file of a repository is taken.

pytest tests/server/test_app_compared.py
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import app_fixtures as fixtures
import pytest
from hub_server import HubServer, isolate

from quantkit.errors import NeedsToken, QuantkitError, UsageError
from quantkit.run.artifacts import Artifacts
from quantkit.server.runs import compared
from quantkit.server.runs.store import RunStore
from quantkit.server.web.form_handlers import Client
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.visitor import Visitors

ME = Client("visitor:me", None, "1.2.3.4")


def test_what_is_named() -> None:
    web = "https://huggingface.co/a/b"
    assert compared.parse(f"a/b, hf://c/d/x.gguf\n{web}/blob/main/q/y.gguf, {web}/tree/main") == (
        *("a/b", "c/d/x.gguf", "a/b/q/y.gguf"),
    )
    assert compared.parse(" ") == () == compared.parse(None)
    for bad in ("x", "../a/b", "a/../b/x.gguf", "/etc/x.gguf", "https://evil.example/a/b", 3):
        with pytest.raises(UsageError):
            compared.parse(bad)
    with pytest.raises(UsageError, match="at most 4"):
        compared.parse(",".join(f"a/b{i}" for i in range(5)))


def test_the_nearest_file_is_taken_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    isolate(monkeypatch, tmp_path)
    with HubServer() as hub:
        for name, value in hub.env.items():
            monkeypatch.setenv(name, value)
        sizes = {"m-Q2_K.gguf": 40, "m-Q4_K_M.gguf": 100, "m-F16.gguf": 9000, "m-imatrix.gguf": 99}
        sizes |= {"m-00001-of-00002.gguf": 100}
        hub.add_model("lab/m-GGUF", {name: b"x" * n for name, n in sizes.items()})
        assert compared.settle(["lab/m-GGUF"], [90, 50], None) == (
            *("hf://lab/m-GGUF/m-Q4_K_M.gguf", "hf://lab/m-GGUF/m-Q2_K.gguf"),
        )
        with pytest.raises(UsageError, match="times as large"):
            compared.settle(["lab/m-GGUF/m-F16.gguf"], [90], None)
        with pytest.raises(UsageError, match="has no file"):
            compared.settle(["lab/m-GGUF/none.gguf"], [90], None)
        with pytest.raises(QuantkitError, match="lab/none"):
            compared.settle(["lab/none"], [90], None)

        store = RunStore(tmp_path / "runs", public=True)
        run = fixtures.own(fixtures.write_run(store.root / "done"), ME.owner)
        handlers = Handlers(store, Visitors(b"k"), on_space=False, sign_in=False)
        with pytest.raises(UsageError, match="original is no longer"):
            handlers.compare_with("done", "lab/m-GGUF/m-Q2_K.gguf", ME, "")
        base = Artifacts(run).base
        base.parent.mkdir(exist_ok=True)
        base.write_bytes(b"GGUF")
        handlers.compare_with("done", "lab/m-GGUF/m-Q2_K.gguf", ME, "")
        config, _ = store.asked("done", ME.owner)
        assert config == dataclasses.replace(
            fixtures.CONFIG, compare=("hf://lab/m-GGUF/m-Q2_K.gguf",)
        )
        assert store.view("done", ME.owner).state == "queued"

        # The repository to publish to is proposed from the account of the token.
        hub.add_user("hf_aliceToken0123", "alice")
        proposed = handlers.proposed("done", " ", "hf_aliceToken0123", ME)
        assert proposed == "alice/SmolLM2-135M-Instruct-GGUF"
        assert handlers.proposed("done", "me/x", None, ME) == "me/x"
        with pytest.raises(NeedsToken):
            handlers.proposed("done", "", None, ME)
