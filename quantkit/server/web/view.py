"""A run as HTML: pure functions of what is known of it. Everything is escaped here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from markdown_it import MarkdownIt

from quantkit.evidence import report as reports
from quantkit.hub.jobs import MachineLoad
from quantkit.server.executors.registry import EXECUTORS
from quantkit.server.runs import RunSummary, RunView, StageView
from quantkit.sizes import size
from quantkit.stages import STAGES

STAGE_ABOUT = {stage.name: stage.about for stage in STAGES}
STATE_TEXT = {
    "queued": "Waiting",
    "running": "Running",
    "finished": "Finished",
    "failed": "Failed",
    "interrupted": "Interrupted",
    "cancelled": "Cancelled",
    "damaged": "Damaged",
}
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
_MARKS = {"done": "✓", "failed": "!", "running": "", "waiting": ""}


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


def notice(message: str, remedy: str = "", kind: str = "error") -> str:
    """Return a sentence and what to do about it as HTML; empty without a message."""
    if not message:
        return ""
    role = "alert" if kind == "error" else "status"
    advice = f" <span>{escape(remedy)}</span>" if remedy else ""
    text = f"<strong>{escape(message)}</strong>{advice}"
    return f'<div class="qk-notice {kind}" role="{role}">{text}</div>'


def badge(state: str) -> str:
    return f'<span class="qk-badge {escape(state)}">{STATE_TEXT.get(state, escape(state))}</span>'


def model_name(model: str) -> str:
    """Return the model's name without its owner or folder."""
    return model.rstrip("/").rsplit("/", 1)[-1] or model


def head(run: RunView) -> str:
    """Return the title, the state, and what the state means for the visitor, as HTML."""
    facts = [run.target, f"profile {run.profile}", f"started {ago(run.created)}"]
    if run.revision:
        facts.insert(0, f"revision {run.revision[:16]}")
    if run.is_local:
        facts.append("from the command line")
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    owner = escape(run.model[: -len(model_name(run.model))])
    title = f"<h2><span>{owner}</span>{escape(model_name(run.model))}</h2>"
    state = badge("stopping") if run.stopping else badge(run.state)
    return (
        f'<div class="qk-head"><div class="qk-title">{title}{state}</div>'
        f'<ul class="qk-facts">{items}</ul>{_state_note(run)}{_machine(run)}{_downloads(run)}</div>'
    )


def _machine(run: RunView) -> str:
    """Where a run elsewhere is, how busy it is and what it has cost; empty for one done here."""
    if not run.is_remote:
        return ""
    noun = EXECUTORS[run.executor].noun
    facts = [f"{noun} on {run.machine}" if run.machine else noun]
    if run.usd_per_hour:
        facts.append(f"${run.usd_per_hour:.2f} an hour")
    if run.hours:
        facts.append(f"stopped after {run.hours} h at the latest")
    link, load = "", ""
    if run.remote is not None:
        facts.append(f"${run.remote.usd:.2f} so far")
        load = _load(run.remote.metrics) if run.state == "running" else ""
        url = run.remote.url
        if url.startswith(("https://", "http://")):
            link = f' <a href="{escape(url)}" rel="noopener" target="_blank">its page</a>'
    return f'<p class="qk-machine">{escape(" · ".join(facts))}{escape(load)}{link}</p>'


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


def _state_note(run: RunView) -> str:
    if run.stopping:
        return notice("Stopping…", "Completed stages are kept.", "info")
    if run.state == "queued":
        place = run.position or 1
        text = "Next in the queue." if place == 1 else f"Number {place} in the queue."
        if run.is_remote:
            text = f"Its {EXECUTORS[run.executor].noun} is about to be started."
        elif run.wait_seconds:
            text += f" It starts in about {duration(60 * max(1, round(run.wait_seconds / 60)))}."
        return notice(
            text, "You can close this page: its address and your list find it again.", "info"
        )
    if run.state in ("failed", "interrupted", "damaged"):
        return notice(run.error or "The run ended without an error message.", run.remedy)
    if run.state == "cancelled":
        return notice("Cancelled.", "Completed stages are kept; you can resume.", "info")
    if run.published_url and run.state == "finished":
        url = run.published_url
        if url.startswith(("https://", "http://")):
            link = f'<a href="{escape(url)}" rel="noopener" target="_blank">{escape(url)}</a>'
            return (
                f'<div class="qk-notice ok" role="status"><strong>Published:</strong> {link}</div>'
            )
    return ""


def stages(run: RunView) -> str:
    """Return the nine stages as HTML, while there is something to watch."""
    if run.state == "finished":
        return ""
    items = "".join(_stage(n, stage, run) for n, stage in enumerate(run.stages, 1))
    return f'<section aria-label="Stages"><ol class="qk-stages">{items}</ol></section>'


def strip(run: RunView) -> str:
    """Return the nine stages of a finished run as HTML, with the time each took."""
    if run.state != "finished":
        return ""
    total = sum(stage.seconds or 0 for stage in run.stages)
    items = "".join(
        f'<li class="done"><b>✓</b>{stage.name}<small>{_seconds(stage)}</small></li>'
        for stage in run.stages
    )
    return (
        f'<section class="qk-section" aria-label="Stages"><h3>Nine stages in {duration(total)}</h3>'
        f'<ol class="qk-strip">{items}</ol></section>'
    )


def _seconds(stage: StageView) -> str:
    return "" if stage.seconds is None else duration(stage.seconds)


def _stage(number: int, stage: StageView, run: RunView) -> str:
    state = stage.state
    if state == "running" and run.state != "running":
        state = "stopped"  # the process that was at it is gone
    mark = _MARKS.get(state) or str(number)
    text = stage.message if state in ("running", "failed", "stopped") else ""
    about = escape(text or STAGE_ABOUT[stage.name])
    side, bar = "", ""
    if state == "running":
        left = time_left(run.eta_seconds)
        percent = stage.percent
        side = "" if percent is None else f"{percent} %"
        side += f"<small>{left}</small>" if left else ""
        value = "" if percent is None else f' aria-valuenow="{percent}" style="--p:{percent}%"'
        kind = "qk-bar" if percent is not None else "qk-bar unknown"
        bar = (
            f'<div class="{kind}" role="progressbar" aria-label="{stage.name}" aria-valuemin="0"'
            f' aria-valuemax="100"{value}></div>'
        )
    elif state == "done":
        side = _seconds(stage)
    current = ' aria-current="step"' if state == "running" else ""
    return (
        f'<li class="{state}"{current}><b class="mark">{mark}</b><div class="body">'
        f'<div class="line"><span class="name">{stage.name}</span>'
        f'<span class="side">{side}</span></div>'
        f'<div class="about">{about}</div>{bar}</div></li>'
    )


def curve(run: RunView) -> str:
    """Return what the search's KL curve shows; empty while there is none, and when the report shows
    it.
    """
    if run.report or len(run.curve) < 2:
        return ""
    last = run.curve[-1]
    title = "Search progress" if run.is_active else "Search"
    known = reports.with_error(reports.Mean(last.kl, last.stderr))
    tuned = ", as tuning is expected to leave it" if last.is_expected else ""
    return (
        f'<section class="qk-section"><h3>{title}</h3><p class="qk-help">KL divergence to the'
        f" original, lower is better: {known} after generation {last.generation}{tuned}."
        "</p></section>"
    )


def log(run: RunView) -> str:
    """Return the log of the run in plain words, newest last."""
    if not run.log:
        return '<p class="qk-help">Nothing has happened yet.</p>'
    lines = []
    for line in run.log[-200:]:
        text = line.text
        if line.kind == "started" and line.stage:
            text = STAGE_ABOUT.get(line.stage, "")
        elif line.kind == "finished" and line.stage:
            text = f"done in {text}"
        moment = time.strftime("%H:%M:%S", time.gmtime(line.time))
        lines.append(
            f'<li class="{escape(line.kind)}"><time>{moment}</time>'
            f"<b>{escape(line.stage or 'run')}</b><span>{escape(text or line.kind)}</span></li>"
        )
    left_out = f" {run.n_dropped:,} lines could not be read." if run.n_dropped else ""
    return (
        f'<ol class="qk-log">{"".join(lines)}</ol><p class="qk-help">Times are UTC.{left_out}</p>'
    )


def raw_log(text: str) -> str:
    if not text:
        return '<p class="qk-help">The worker has not printed anything.</p>'
    # A progress line that rewrote itself: only what it ended as.
    lines = [line.rsplit("\r", 1)[-1].replace("\x1b[K", "") for line in text.splitlines()]
    return f'<pre class="qk-raw" tabindex="0">{escape(chr(10).join(lines[-150:]))}</pre>'


def files(run: RunView) -> str:
    """Return what can be downloaded, with what it weighs and the hash to check it by."""
    if not run.files:
        return ""
    rows = []
    for file in run.files:
        url = f"files/{quote(run.id)}/{quote(file.name)}"
        link = (
            f'<a href="{escape(url)}" download="{escape(file.name)}">{escape(file.name)}</a>'
            if file.is_here
            else f"<b>{escape(file.name)}</b>"
        )
        rows.append(
            f"<li>{link}"
            f"<span>{size(file.n_bytes)}</span>"
            f'<code title="sha256">{escape(file.sha256)}</code></li>'
        )
    where = "" if any(file.is_here for file in run.files) else _elsewhere(run)
    return (
        f'<section class="qk-section"><h3>Files</h3>{where}'
        f'<ul class="qk-files">{"".join(rows)}</ul></section>'
    )


def _downloads(run: RunView) -> str:
    """A button for every finished GGUF that lies here: what most people came for."""
    links = "".join(
        f'<a class="qk-download" href="{escape(f"files/{quote(run.id)}/{quote(file.name)}")}"'
        f' download="{escape(file.name)}">Download {escape(file.name)}<small>'
        f"{size(file.n_bytes)}</small></a>"
        for file in run.files
        if file.is_model and file.is_here and run.state == "finished"
    )
    return f'<p class="qk-downloads">{links}</p>' if links else ""


def _elsewhere(run: RunView) -> str:
    """Where the files of a run are that was done elsewhere."""
    if not run.is_remote:
        return ""
    text = (
        "They are in the repository that it was published to."
        if run.published_url
        else EXECUTORS[run.executor].results_at
    )
    return f'<p class="qk-help">{text}</p>'


def run_list(runs: Sequence[RunSummary]) -> str:
    """Return the visitor's runs as links; a friendly word if there are none."""
    if not runs:
        return (
            '<section class="qk-section"><h2>Your runs</h2><div class="qk-empty">'
            "<p>No runs yet.</p><p>Choose a model above and press Start. Not sure? The demo model"
            " needs no network and takes a few minutes.</p></div></section>"
        )
    items = "".join(_run_line(run) for run in runs[:200])
    return (
        f'<section class="qk-section"><h2>Your runs</h2><ul class="qk-jobs">{items}</ul></section>'
    )


def _run_line(run: RunSummary) -> str:
    detail = f"{run.target} · {run.profile} · {ago(run.created)}"
    if run.is_local:
        detail += " · command line"
    now = ""
    if run.state == "running" and run.stage:
        now = run.stage + ("" if run.percent is None else f" {run.percent} %")
    elif run.state == "queued" and run.position:
        now = f"number {run.position} in the queue"
    name = escape(model_name(run.model))
    return (
        f'<li><a href="?job={quote(run.id)}"><span class="name">{name}</span>'
        f'<span class="detail">{escape(detail)}</span><span class="now">{escape(now)}</span>'
        f"{badge(run.state)}</a></li>"
    )


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
            token.attrs["src"] = f"files/{quote(run.id)}/{quote(name)}"
        elif token.type == "image":
            token.type = "text"  # what the picture shows
    return _MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {})
