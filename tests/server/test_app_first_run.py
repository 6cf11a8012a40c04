"""What the page says to the owner of a Space that was duplicated.

pytest tests/server/test_app_first_run.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from quantkit.server.executors.hf_jobs import wheel
from quantkit.server.executors.registry import remote
from quantkit.server.web.first_run import missing
from quantkit.server.web.view import first_run


def test_a_space_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing({}) == ()
    bare = {"SYSTEM": "spaces", "SPACE_ID": "me/quantkit"}
    html = first_run(missing(bare))
    for words in ("3 things", "hf_oauth: true", "wheel", "/data"):
        assert words in html, words
    private = ("This Space is private: Jobs cannot fetch their wheel.", "Make it public.")
    monkeypatch.setattr(wheel, "lacks", lambda: private)
    assert private in missing(bare) and remote() == ()
    monkeypatch.undo()
    monkeypatch.setenv("QUANTKIT_WHEEL", "https://example.org/q.whl")
    whole = {**bare, "OAUTH_CLIENT_ID": "x", "QUANTKIT_DATA": str(tmp_path)}
    assert missing(whole) == ()
