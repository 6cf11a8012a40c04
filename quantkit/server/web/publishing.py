"""Show what publishing would change in a repository, as HTML."""

from __future__ import annotations

from html import escape

from quantkit.hub import RepoChanges
from quantkit.sizes import size

_WORDS = {"new": "new", "changed": "replaced", "same": "unchanged", "kept": "stays"}
_SIGNS = {"new": "+", "changed": "~", "same": "=", "kept": " "}
_MAX_LINES = 200


def changes(found: RepoChanges, closed: str = "") -> str:
    """Return the files, each with what happens to it, and the card's changed lines, as HTML.
    `closed` says "private" or "gated" if that property of the model makes the repository private.
    """
    where = escape(found.repo_id)
    kind = "private" if found.private else "public"
    lead = (
        f"<b>{where}</b> exists and is {kind}."
        if found.exists
        else f"<b>{where}</b> will be created, {kind}."
    )
    terms = {"gated": ", and the terms apply to this file, too"}
    why = f" Its model is {closed}{terms.get(closed, '')}." if closed else ""
    n_sent = sum(change.kind in ("new", "changed") for change in found.changes)
    what = (
        f"{n_sent} {'file is' if n_sent == 1 else 'files are'} uploaded in one commit,"
        f" {size(found.n_bytes)}."
        if n_sent
        else "It already has these files: nothing is uploaded."
    )
    rows = "".join(
        f'<li class="{change.kind}"><b>{_SIGNS[change.kind]}</b><span>{escape(change.path)}</span>'
        f"<small>{_WORDS[change.kind]}"
        + (f", {size(change.n_bytes)}" if change.kind in ("new", "changed") else "")
        + "</small></li>"
        for change in found.changes
    )
    card = ""
    if found.card_diff:
        lines = "".join(_line(line) for line in found.card_diff[2 : 2 + _MAX_LINES])
        card = (
            "<details><summary>Changes of the model card</summary>"
            f'<pre class="qk-diff" tabindex="0">{lines}</pre></details>'
        )
    said = f"<p>{lead}{why} {what}</p>"
    return f'<div class="qk-changes" role="status">{said}<ul>{rows}</ul>{card}</div>'


def _line(line: str) -> str:
    kind = {"+": "new", "-": "gone", "@": "place"}.get(line[:1], "")
    return f'<span class="{kind}">{escape(line)}</span>\n'
