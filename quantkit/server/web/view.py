"""A run as HTML: what `page.html.jinja` fills in, in words. Everything is escaped there."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt
from markupsafe import Markup

from quantkit import hub
from quantkit.evidence import report as reports
from quantkit.hub.jobs import MachineLoad
from quantkit.server.executors.registry import EXECUTORS
from quantkit.server.runs.progress import KlPoint, LogLine, StageView
from quantkit.server.runs.view import RunView
from quantkit.sizes import size
from quantkit.stages import STAGES

STAGE_ABOUT = {stage.name: stage.about for stage in STAGES}
_STATE_TEXT = {
    "queued": "Waiting",
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "interrupted": "Interrupted",
    "cancelled": "Cancelled",
    "damaged": "Damaged",
}
# What publishing does with a file.
_HAPPENS = {
    "new": ("+", "new"),
    "changed": ("~", "replaced"),
    "same": ("=", "unchanged"),
    "kept": (" ", "stays"),
}
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def macro(name: str) -> Callable[..., str]:
    """Return a function that gives the HTML of a macro of `page.html.jinja`."""

    def render(*values: object) -> str:
        return str(getattr(_templates().get_template("page.html.jinja").module, name)(*values))

    return render


@cache
def _templates() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined)
    made.globals |= {
        **{"STATE_TEXT": _STATE_TEXT, "STAGE_ABOUT": STAGE_ABOUT, "EXECUTORS": EXECUTORS},
        **{"HAPPENS": _HAPPENS, "size": size, "duration": duration, "time_left": time_left},
        **{"ago": ago, "model_name": model_name, "facts": _facts, "in_line": _in_line},
        **{"machine": _machine, "took": _took, "with_error": _with_error, "clock": _clock},
        **{"in_words": _in_words, "last_lines": _last_lines, "file_url": file_url},
        **{"linked": _linked, "web_url": _web_url, "stage_place": _stage_place, "moment": _moment},
    }
    return made


def _linked(text: str) -> Markup:
    """A text whose addresses of the Hub can be clicked; others may be a stranger's."""
    address = re.escape(hub.endpoint()) + r"/[\w./-]*[\w/-]"
    parts = re.split(f"({address})", text)
    link = Markup('<a href="{0}" rel="noopener" target="_blank">{0}</a>')
    return Markup("").join(link.format(p) if i % 2 else p for i, p in enumerate(parts))


# Of a message, a remedy and a kind; empty for no message.
notice = macro("notice")
# Of a run: title and state; what it is at, while it is; what each stage took; the search's curve;
# what happened; what can be downloaded.
head, stages, strip, curve = macro("head"), macro("stages"), macro("strip"), macro("curve")
log, files, share = macro("log"), macro("files"), macro("share")
# Of the worker's output; of the visitor's runs.
raw_log, run_list = macro("raw_log"), macro("run_list")
first_run = macro("first_run")  # of what a Space lacks, its machine, where it is copied


def filled_in(left_out: Sequence[str], published_to: str | None) -> str:
    """Return the notice of a form that is filled in as for an earlier run."""
    said = [f"It has no field for: {', '.join(left_out)}."] if left_out else []
    if published_to:
        said.append(
            f"The repository is left empty: that run was for {published_to}, and another one"
            " would replace its files and card."
        )
    return notice("The form is filled in as for that run.", " ".join(said), "info")


def duration(seconds: float) -> str:
    """Return the seconds for people."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours < 10 else f"{hours} h"


def time_left(seconds: float | None) -> str:
    """Return a remaining time in steps coarse enough not to flicker."""
    if seconds is None:
        return ""
    if seconds < 10:
        return "a few seconds left"
    if seconds < 60:
        return f"about {10 * round(seconds / 10)} s left"
    return f"about {duration(60 * round(seconds / 60))} left"


def ago(moment: float, now: float | None = None) -> str:
    seconds = (time.time() if now is None else now) - moment
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min ago"
    if seconds < 36 * 3600:
        return f"{seconds / 3600:.0f} h ago"
    return f"{seconds / 86400:.0f} days ago"


def model_name(model: str) -> str:
    """Return the model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def _facts(run: RunView) -> list[str]:
    revision = [f"revision {run.revision[:16]}"] if run.revision else []
    facts = [*revision, run.target, f"profile {run.profile}", f"started {ago(run.created)}"]
    return [*facts, "from the command line"] if run.is_local else facts


def _in_line(run: RunView) -> str:
    """What a run waits for."""
    if run.is_remote:
        return f"Its {EXECUTORS[run.executor].noun} is about to be started."
    place = run.position or 1
    text = "Next in the queue." if place == 1 else f"Number {place} in the queue."
    if run.wait_seconds:
        text += f" It starts in about {duration(60 * max(1, round(run.wait_seconds / 60)))}."
    return text


def _machine(run: RunView) -> str:
    """Where a run elsewhere is, how busy it is and what it has cost."""
    noun = EXECUTORS[run.executor].noun
    facts = [f"{noun} on {run.machine}" if run.machine else noun]
    if run.usd_per_hour:
        facts.append(f"${run.usd_per_hour:.2f} an hour")
    is_over = run.state == "finished" or (run.remote is not None and run.remote.has_ended)
    if run.hours and not is_over:
        facts.append(f"stopped after {run.hours} h at the latest")
    if run.remote is None:
        return " · ".join(facts)
    if run.remote.usd is not None:
        heard = "when it was last heard of" if run.is_unattended else "so far"
        facts.append(f"${run.remote.usd:.2f} {'in all' if is_over else heard}")
    return " · ".join(facts) + (_load(run.remote.metrics) if run.state == "running" else "")


def _load(load: MachineLoad | None) -> str:
    if load is None:
        return ""
    said = []
    if load.cpu_usage_pct is not None:
        said.append(f"processor {load.cpu_usage_pct:.0f} %")
    used, total = load.memory_used_bytes, load.memory_total_bytes
    if used is not None and total is not None and total > 0:
        said.append(f"memory {used / 1e9:.1f} of {total / 1e9:.0f} GB")
    for gpu in (load.gpus or {}).values():
        if gpu.utilization is not None:
            said.append(f"GPU {gpu.utilization:.0f} %")
    return " · " + ", ".join(said) if said else ""


def _took(stage: StageView) -> str:
    return "" if stage.seconds is None else duration(stage.seconds)


def _with_error(point: KlPoint) -> str:
    return reports.with_error(reports.Mean(point.kl, point.stderr))


def _stage_place(run: RunView) -> int:
    """The number of the stage at work."""
    names = [stage.name for stage in run.stages]
    return names.index(run.current) + 1 if run.current in names else 0


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))


def _clock(moment: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(moment))


def _in_words(line: LogLine) -> str:
    if line.kind == "started" and line.stage:
        return STAGE_ABOUT.get(line.stage, "")
    return f"done in {line.text}" if line.kind == "finished" and line.stage else line.text


def _last_lines(text: str) -> str:
    # A progress line that rewrote itself: only what it ended as.
    lines = [line.rsplit("\r", 1)[-1].replace("\x1b[K", "") for line in text.splitlines()]
    return "\n".join(lines[-150:])


def file_url(run: RunView, name: str) -> str:
    return f"files/{quote(run.id)}/{quote(name)}"


def _web_url(url: str | None) -> str:
    """An address of the web; nothing for what a script could hide in."""
    return url if url and url.startswith(("https://", "http://")) else ""


def card(run: RunView) -> str:
    """Return the model card without its YAML header. Its pictures are the run's own; markup is
    text.
    """
    text = run.card
    if text.startswith("---\n"):
        text = text[4:].partition("\n---\n")[2]
    here = {file.name for file in run.files if file.is_here}
    tokens = _MARKDOWN.parse(text.strip())
    for token in (child for block in tokens for child in block.children or ()):
        name = str(token.attrGet("src") or "").removeprefix("plots/")
        if token.type == "link_open":
            token.attrs |= {"rel": "noopener", "target": "_blank"}
        elif token.type == "image" and name in here:
            token.attrs["src"] = file_url(run, name)
        elif token.type == "image":
            token.type = "text"  # what the picture shows
    return _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
