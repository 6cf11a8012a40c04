"""What a run shows on a terminal."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from quantkit.run.events import Event
from quantkit.run.live import Live

ROOT = Path(__file__).parents[2]
EVENTS = [
    Event(1.0, None, "started", "[bold]model[/bold], like Q4_K_M"),
    Event(1.0, "fetch", "started"),
    Event(1.0, "fetch", "note", "a licence with \x1b[31mcolors"),
    Event(1.0, "fetch", "finished", "7 s"),
    Event(2.0, "convert", "started"),
    Event(2.0, "convert", "progress", "base.gguf is written", {"done": 1, "total": 4}),
]


def shown(events: list[Event], width: int = 100) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=width, color_system=None)
    with Live(console) as live:
        for event in events:
            live(event)
        live._progress.refresh()
        return written.getvalue()


def test_stages_and_a_bar() -> None:
    text = shown(EVENTS)
    assert "[bold]model[/bold], like Q4_K_M" in text, "markup is a stranger's word"
    assert "\x1b[31m" not in text
    assert "fetch      finished  7 s" in text
    bar = text.splitlines()[-1]
    assert "2/9 convert" in bar and "25%" in bar and "base.gguf is written" in bar


def test_a_narrow_terminal_keeps_the_bar_on_a_line() -> None:
    last = shown(
        [*EVENTS, Event(3.0, "convert", "progress", "x" * 300, {"done": 2, "total": 4})], 80
    )
    assert max(map(len, last.replace("\r", "\n").splitlines())) <= 80 + len("\x1b[2K\x1b[1A")
    assert "50%" in last


def test_on_a_terminal_and_not(tmp_path: Path) -> None:
    """The command itself, with a terminal as its stderr and with a file."""
    code = (
        "from quantkit.run import terminal\n"
        "from quantkit.run.events import Event\n"
        "with terminal.printing() as show:\n"
        "    show(Event(1.0, 'fetch', 'started'))\n"
        "    show(Event(1.0, 'fetch', 'progress', 'asks', {'done': 1, 'total': 3}))\n"
        "    show(Event(1.0, 'fetch', 'finished', '7 s'))\n"
    )
    mine, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    subprocess.run([sys.executable, "-c", code], stderr=theirs, cwd=ROOT, env=env, check=True)
    os.close(theirs)
    seen = os.read(mine, 1 << 16).decode()
    os.close(mine)
    assert "1/9" in seen and "fetch      finished  7 s" in seen
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stderr.decode().splitlines() == [
        "  0:00  fetch      started",
        "  0:00  fetch       33 %  asks",
        "  0:00  fetch      finished  7 s",
    ]
