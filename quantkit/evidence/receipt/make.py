"""Write the receipt of a run, and complete it when its files are published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shlex import quote

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.config.calibration import shown
from quantkit.evidence.receipt.claims import Claims
from quantkit.evidence.receipt.limits import TOLERANCE
from quantkit.evidence.receipt.schema import Engine, FileSum, Joined, Receipt, UsedText
from quantkit.evidence.report.schema import CalibrationText, Report
from quantkit.files import sha256_file
from quantkit.run.stage import Run

TEXTS = "texts"  # the folder beside the receipt
LONG = "(all texts)"  # joined, for long contexts

_NOT_COVERED = (
    "the files beside ours, whose windows the receipt has",
    "speed and memory, which are the machine's",
    "medians, percentiles and the largest KL",
    "the checks of integrity and the chat turn",
    "the share of text that the calibration text has, too",
    "how the search went",
)


def of_run(run: Run, report: Report, claims: Claims, engine: Engine) -> Receipt:
    """Return the receipt of what validate measured, with the sums of the files so far."""
    stitched = run.records["stitch"].outputs
    outputs = {f"{Path(o.path).name}": o for o in stitched if o.path.endswith(".gguf")}
    files = {name: FileSum(o.n_bytes, o.sha256) for name, o in outputs.items()}
    base = report.base
    return Receipt(
        model=report.model,
        source=source_of(run.config),
        revision=report.revision,
        seed=run.config.seed,
        commands=_commands(report, claims),
        versions=report.versions,
        engine=engine,
        base=FileSum(base.n_bytes, base.sha256 or ""),
        files=files,
        texts=_texts(report, claims, run.config.eval_text is not None),
        tokens=tuple(claims.tokens),
        windows=tuple(claims.windows),
        answers=tuple(claims.answers),
        used_talks=claims.used_talks,
        talks=tuple(claims.talks),
        used_prompts=claims.used_prompts,
        replies=tuple(claims.replies),
        tolerance=TOLERANCE,
        not_covered=_NOT_COVERED,
    )


def source_of(config: RunConfig) -> str | None:
    """Return what a stranger gives `quantkit run` to get the same model: a Hub id or the demo's
    name; None for a folder.
    """
    reference = hub.parse_reference(config.model, config.revision)
    return None if reference.is_local else reference.id


def complete(
    receipt: Receipt, folder: Path, known: Mapping[str, str], joined: Mapping[str, Joined]
) -> Receipt:
    """Return the receipt with the sums of all files in `folder` but the card. `known` are sums that
    need not be taken again, `joined` our files that are there in parts.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files = {
        name: FileSum(path.stat().st_size, known.get(name) or sha256_file(path))
        for name, path in paths.items()
        if name != "README.md"
    }
    return replace(receipt, files=files, joined=dict(joined))


def _texts(report: Report, claims: Claims, are_given: bool) -> tuple[UsedText, ...]:
    """`are_given`: they are the user's own, whatever they are called."""
    domains = report.calibration.domains if report.calibration and not are_given else ()
    held_out: dict[str, CalibrationText] = {t.held_out: t for t in domains if t.held_out}
    found = []
    for name, sha256 in report.texts.items():
        of = held_out.get(name)
        if of is None or of.license is None:
            source = f"held out of {shown(of.source)}" if of else "given by who made the file"
            found.append(UsedText(name=name, sha256=sha256, source=source))
            continue
        found.append(
            UsedText(
                name=name,
                sha256=sha256,
                source=f"held out of {of.name}: {of.source}",
                license=of.license,
                file=f"{TEXTS}/{name}.txt",
            )
        )
    if any(tokens.text == LONG for tokens in claims.tokens):
        names = tuple(report.texts)
        found.append(UsedText(name=LONG, sha256="", source="the texts joined", joins=names))
    return tuple(found)


def _commands(report: Report, claims: Claims) -> tuple[str, ...]:
    """What measures the same by hand, beside the published files and `base.gguf`."""
    texts = " ".join(f"--text {quote(f'{name}={TEXTS}/{name}.txt')}" for name in report.texts)
    first = next((t for t in claims.tokens if t.text != LONG), None)
    tasks = {a.task: a for a in claims.answers}.values()
    lines = ["quantkit verify ."]
    for output in report.outputs:
        name = quote(output.parts[0].name if output.parts else output.name)
        if first is not None:
            chunks = max(t.n_windows for t in claims.tokens if t.n_ctx == first.n_ctx)
            lines.append(
                f"python -m evaluators.kl base.gguf {name} {texts}"
                f" --ctx {first.n_ctx} --chunks {chunks} --weight-kl"
            )
        for a in tasks:
            of = f"--task choices --data {quote(a.source)}" if a.is_given else f"--task {a.task}"
            lines.append(
                f"python -m evaluators.zeroshot {name} --base base.gguf {of} --limit {len(a.picks)}"
            )
        if (talks := claims.used_talks) is not None:
            some = f" --documents {talks.limit}" if talks.limit else ""
            lines.append(
                f"python -m evaluators.kl base.gguf {name} --domains --long none --weight-kl{some}"
            )
        if (prompts := claims.used_prompts) is not None:
            lines.append(
                f"python -m evaluators.generation base.gguf {name} --limit {prompts.n}"
                f" --tokens {prompts.n_new}"
            )
    return tuple(lines)
