"""Compare any GGUFs of the same model: the same report, for files made elsewhere.

`evaluators.compare` measures, every file open in a sandboxed process; here its JSON becomes a
report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evidence.report import SCHEMA, Report, read, write_report
from quantkit.evidence.report.schema import GIVEN
from quantkit.gguf_file.read import GgufFile
from quantkit.gguf_file.sound import check_sound
from quantkit.hub import given
from quantkit.llamacpp import place

_KEPT = ("kl", "top1", "top1_stderr", "perplexity", "ln_ppl_ratio")
_MORE = ("weight_kl", "weight_top1", "weight_domains", "tasks", "speed")


def compare(base: str, files: Sequence[str], options: Sequence[str], out: Path) -> Report:
    """Measure `files` against `base` and write the report into `out`.

    Args:
        base: the full-precision GGUF; like the others a path or hf://owner/name/file.gguf.
        files: at least one.
        options: handed to evaluators.compare as they are, such as --text FILE.

    Raises:
        UsageError: a file that is not there.
        QuantkitError: a broken file, or whatever the evaluators say; nothing is written then.
    """
    base_path, *paths = [given.locate(name) for name in (base, *files)]
    for path in (base_path, *paths):
        check_sound(GgufFile(path))
    measured = _measure(base_path, paths, options)
    value = to_report(measured, base_path, paths, given.short_names(files))
    out.mkdir(parents=True, exist_ok=True)
    write_report(out, value)
    return read(value)


def _measure(base: Path, files: Sequence[Path], options: Sequence[str]) -> dict[str, Any]:
    """What the evaluators' command answers; its progress goes to stderr."""
    from evaluators import compare as evaluated
    from evaluators.errors import EvaluationError

    arguments = ["--base", str(base), *options, "--", *(str(file) for file in files)]
    try:
        return evaluated.answer(arguments, place.sandboxed)
    except EvaluationError as error:
        raise QuantkitError(error.message, error.remedy) from error


def to_report(
    measured: dict[str, Any], base: Path, files: Sequence[Path], names: Sequence[str]
) -> dict[str, Any]:
    """Turn the JSON of evaluators.compare into that of a report (kind compare), where `names` are
    the names of the files.
    """
    opened = GgufFile(base)
    n_parameters = opened.n_elements
    about, settings = measured["base"], measured["settings"]
    shown = zip(measured["files"], names, strict=True)
    rows = [_row(row, name, n_parameters, names[0]) for row, name in shown]
    rows[0]["tensors"] = _tensors(GgufFile(files[0]))
    if "tasks" not in rows[0]:
        rows[0]["zero_shot"] = {"status": "not run", "reason": "no --task"}
    name = opened.metadata.get("general.name") or base.stem
    return {
        "schema": SCHEMA,
        "kind": "compare",
        "model": str(name),
        "base": {
            "path": base.name,
            "n_bytes": about["n_bytes"],
            "n_parameters": n_parameters,
            "perplexity": about["perplexity"],
            "speed": {k: v for k, v in about.get("speed", {}).items() if k != "file"},
        },
        "outputs": rows[:1],
        "baselines": sorted(rows[1:], key=lambda row: row["n_bytes"]),
        "protocol": f"{settings['protocol']}'s windows of {settings['n_ctx']} tokens, second half"
        " scored, KL(base || file) in nats",
        "n_windows": settings["n_windows"],
        "texts": settings["texts"],
        "versions": {"llama-cpp-python": settings["llama_cpp_python"]},
    }


def _row(row: dict[str, Any], name: str, n_parameters: int, first: str) -> dict[str, Any]:
    made = {
        "kind": GIVEN,
        "name": name,
        "n_bytes": row["n_bytes"],
        "bpw": 8 * row["n_bytes"] / n_parameters,
        **{key: row[key] for key in _KEPT},
        "domains": {n: {k: d[k] for k in _KEPT} for n, d in row["domains"].items()},
        **{key: row[key] for key in _MORE if key in row},
    }
    if "speed" in made:
        made["speed"] = {k: v for k, v in made["speed"].items() if k != "file"}
    tests = {
        "kl": row.get("versus_first"),
        "nll": row.get("nll_versus_first"),
        "weight_kl": row.get("weight_versus_first"),
    }
    found = {name: test for name, test in tests.items() if test}
    return {**made, "versus": {first: found}} if found else made


def _tensors(file: GgufFile) -> dict[str, dict[str, Any]]:
    """The matrices of a file: what each is stored as."""
    return {
        t.name: {
            "qtype": str(t.qtype),
            "n_elements": math.prod(t.shape),
            "n_bytes": t.n_bytes,
        }
        for t in file.tensors.values()
        if len(t.shape) > 1
    }
