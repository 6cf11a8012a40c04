"""What the documents say of the tree, of the command line and of each other is so."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.cli import _parser
from quantkit.run.artifacts import NAMES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
README, ARCHITECTURE = ROOT / "README.md", ROOT / "ARCHITECTURE.md"
MOST_LINES = 110  # of the README: a screen and a half
OWN_MODEL_BY = 30  # the line by which a newcomer has read how to run their own model


def tracked() -> list[str]:
    """Paths of all files that git knows of, new ones included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in found.stdout.splitlines() if (ROOT / path).exists()]


def section(page: Path, title: str) -> str:
    """The text of a page under a heading, up to the next one."""
    found = re.search(rf"^## {title}$(.*?)(?=^## |\Z)", page.read_text("utf-8"), re.M | re.S)
    assert found, f"{page.name} has no section {title}"
    return found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links and pictures."""
    text = page.read_text("utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    links += re.findall(r"(?:src|srcset)=\"(?!https?:)([^\"]+)", text)
    assert not [link for link in links if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", [README, ARCHITECTURE], ids=lambda page: page.name)
def test_the_nine_stages_are_in_order(page: Path) -> None:
    rows = re.findall(r"^\| `?(\w+)`? \|", page.read_text("utf-8"), re.MULTILINE)
    assert [row for row in rows if row in NAMES] == list(NAMES)


def test_the_map_is_the_tree() -> None:
    """Every path of the README's map is there, and no folder of the repository is left out."""
    lines = re.findall(r"^( *)(\S+) {2,}(\S.*)$", section(README, "The repository"), re.MULTILINE)
    shown, folder = [], ""
    for indent, name, about in lines:
        shown.append(folder + name if indent else name)
        folder = folder if indent else name
        if name == "stages/":
            assert about.split() == list(NAMES)
    known = tracked()
    assert not [path for path in shown if not any(f.startswith(path) for f in known)]
    top = {path.partition("/")[0] + "/" for path in known if "/" in path}
    assert {name for name in top if not name.startswith(".")} <= set(shown)


@pytest.mark.parametrize("page", [ARCHITECTURE, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_named_files_are_there(page: Path) -> None:
    """Files in code spans, by the end of their path."""
    named = re.findall(r"[\w/]+\.py\b", page.read_text("utf-8"))
    known = ["/" + path for path in tracked()]
    assert named
    assert not [name for name in named if not any(path.endswith("/" + name) for path in known)]


def test_the_readme_is_short() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= MOST_LINES
    assert any(line.startswith("quantkit run ") for line in lines[:OWN_MODEL_BY])


def options() -> dict[str, set[str]]:
    """The long options of every subcommand."""
    (commands,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {o for action in sub._actions for o in action.option_strings if o.startswith("--")}
        for name, sub in commands.choices.items()
    }


def test_options_are_described() -> None:
    """Every subcommand and option of the command line is in docs/options.md, and none besides."""
    text, known = (ROOT / "docs/options.md").read_text("utf-8"), options()
    assert {f"quantkit {name} " for name in known} <= set(re.findall(r"quantkit \w+ ", text))
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
    assert shown == set().union(*known.values()) - {"--help"}


def test_tables_are_those_of_the_code() -> None:
    """`make docs` would change nothing."""
    command = [sys.executable, "dev/docs.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0
