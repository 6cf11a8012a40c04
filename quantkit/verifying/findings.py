"""What a verification found, and what it comes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantkit.errors import printable
from quantkit.markdown import table

Column = NDArray[np.float64]

VERIFIED, NOT_VERIFIED, NOT_CHECKED = 0, 1, 2  # exit statuses


@dataclass(frozen=True)
class Finding:
    """One check. `passed` is None where it could not be made, and `about` says why. A figure that
    was measured again has what was claimed, what came out, and how far apart they may be.
    """

    name: str
    passed: bool | None
    about: str
    claimed: float | None = None
    again: float | None = None
    allowed: float | None = None


def compared(
    title: str, names: Sequence[str], claimed: Column, again: Column, allowed: Column
) -> Finding:
    """Return whether figures that were measured again are as claimed, each within what it may
    differ by and so their mean: what is measured separately is rounded independently.

    Args:
        names: of what was measured, for those that are off.
        claimed, again, allowed: float64 (n,).
    """
    of_all = float(allowed.mean()) / math.sqrt(len(allowed))
    wrong = [
        f"{name}: {c:.4g} claimed, {a:.4g} now"
        for name, c, a, most in zip(names, claimed, again, allowed, strict=True)
        if not abs(a - c) <= most
    ]
    passed = not wrong and bool(abs(again.mean() - claimed.mean()) <= of_all)
    means = float(claimed.mean()), float(again.mean())
    return Finding(title, passed, "; ".join(wrong[:3]), *means, of_all)


_ON_CPU = "CPU"


def other_device(title: str, claimed: str, here: str) -> Finding | None:
    """Return the finding that is to be made where a measure was taken; None if it is here."""
    if (claimed == _ON_CPU) == (here == _ON_CPU):
        return None
    about = f"claimed of {claimed}, which rounds otherwise than {here}: see --device"
    return Finding(title, None, about)


@dataclass(frozen=True)
class Verdict:
    """All findings on one folder or repository. `sample` says what was measured again."""

    name: str
    findings: tuple[Finding, ...]
    sample: str = ""
    notes: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        """The exit status: one check that failed outweighs those that could not be made."""
        states = {finding.passed for finding in self.findings}
        if False in states:
            return NOT_VERIFIED
        return NOT_CHECKED if None in states or not states else VERIFIED

    @property
    def sentence(self) -> str:
        """The verdict in one sentence."""
        failed = [f.name for f in self.findings if f.passed is False]
        left = [f.name for f in self.findings if f.passed is None]
        if failed:
            return f"NOT verified: {_listed(failed)}."
        if left or not self.findings:
            return f"Could NOT be checked: {_listed(left) or 'nothing was'}. All else agrees."
        return "Verified: files, figures and card agree, and what was measured again is as claimed."


def _listed(names: list[str]) -> str:
    shown = names[:5]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return "; ".join(shown) + more


def render(verdict: Verdict) -> str:
    """Return the whole verdict for a terminal, strangers' words made harmless."""
    words = {True: "ok", False: "FAILED", None: "NOT CHECKED"}
    measured = [f for f in verdict.findings if f.again is not None]
    parts = [f"# {verdict.name}"]
    parts.append(
        "\n".join(
            f"- {f.name}: {words[f.passed]}{f'. {f.about}' if f.about else ''}"
            for f in verdict.findings
            if f not in measured
        )
    )
    if measured:
        rows = [
            [f.name, _figure(f.claimed), _figure(f.again), _figure(f.allowed), words[f.passed]]
            for f in measured
        ]
        parts.append(table(["measured again", "claimed", "now", "may differ by", ""], rows))
        parts += [f"{f.name}: {f.about}" for f in measured if f.about]
    parts += [verdict.sample, *verdict.notes]
    if verdict.not_covered:
        parts.append(f"Not measured again: {'; '.join(verdict.not_covered)}.")
    parts.append(verdict.sentence)
    return printable("\n\n".join(part for part in parts if part))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
