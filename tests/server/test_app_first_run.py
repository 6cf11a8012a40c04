"""What the page says of a Space that was duplicated.

pytest tests/server/test_app_first_run.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantkit import hub
from quantkit.machine import kind
from quantkit.server.executors.hf_jobs import wheel
from quantkit.server.executors.registry import remote
from quantkit.server.web.first_run import SCOPES, SIGN_IN, duplicate, hardware, missing
from quantkit.server.web.view import first_run

BARE = {"SYSTEM": "spaces", "SPACE_ID": "me/quantkit", "CPU_CORES": "2", "MEMORY": "16Gi"}
WORDS = re.compile(r" --[a-z]|deploy\.py|python |[A-Z]{2,}_[A-Z]")


def test_a_space_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing({}) == ()
    html = first_run(missing(BARE), hardware(BARE), duplicate(BARE))
    for words in ("3 things", SIGN_IN, "wheel", "/data", "2 cores and 16 GiB", "Its owner"):
        assert words in html, words
    for place in ("edit/main/README.md", "settings", "?duplicate=true"):
        assert f'{hub.endpoint()}/spaces/me/quantkit{"" if "?" in place else "/"}{place}"' in html
    assert not WORDS.search(html), "strangers read it, too"
    private = ("This Space is private: Jobs cannot fetch their wheel.", "Make it public.")
    monkeypatch.setattr(wheel, "lacks", lambda: private)
    assert private in [(lack.what, lack.remedy) for lack in missing(BARE)] and remote() == ()
    monkeypatch.undo()
    monkeypatch.setenv("QUANTKIT_WHEEL", "https://example.org/q.whl")
    whole = {**BARE, "OAUTH_CLIENT_ID": "x", "QUANTKIT_DATA": str(tmp_path)}
    assert missing(whole) == ()
    assert missing({**whole, "OAUTH_SCOPES": " ".join(["openid", "profile", *SCOPES])}) == ()
    (lack,) = missing({**whole, "OAUTH_SCOPES": "openid profile jobs"})  # of hf_oauth alone
    assert "contribute-repos, gated-repos must" in lack.what and lack.lines == SIGN_IN


@pytest.mark.parametrize(
    ("gpu", "torch", "more", "said"),
    [
        (False, "2.13.0+cpu", {}, "small models run here, larger ones as Jobs"),
        (True, "2.13.0+cpu", {}, "small models run here, larger ones as Jobs"),
        (True, "2.13.0", {}, "use the GPU, and its owner pays"),
        (True, "2.13.0", {"SPACES_ZERO_GPU": "1"}, "do not use ZeroGPU"),
    ],
)
def test_what_the_machine_means(
    gpu: bool, torch: str, more: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name if gpu else None)
    monkeypatch.setattr(kind.metadata, "version", lambda _: torch)
    assert said in hardware({**BARE, **more})
    unused = [lack for lack in missing({**BARE, **more}) if "PyTorch" in lack.what]
    assert bool(unused) == (gpu and torch.endswith("+cpu"))
