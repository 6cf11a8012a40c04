"""The command `python -m evaluators.kl BASE FILE --domains`: KL where people use it, by domain."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluators import command, conversations, document_kl
from evaluators.document_kl import DocumentLogits
from evaluators.documents import ALL, LONG, gather
from evaluators.errors import EvaluationError
from evaluators.texts import read_text

_PROTOCOL = "documents, the assistant's last answer scored; of long ones the last 512 tokens"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with --domains."""
    group = parser.add_argument_group("with --domains, instead of --text")
    group.add_argument(
        "--domains",
        action="store_true",
        help="KL through the chat template: chat, code, tool calls, mathematics, eight languages"
        " and long documents, with documents as the unit of every interval",
    )
    group.add_argument(
        "--conversations", type=Path, metavar="FILE.jsonl", help="instead of this package's"
    )
    group.add_argument(
        "--documents", type=command.positive, metavar="N", help="of each domain (default: all)"
    )
    group.add_argument(
        "--long",
        type=_lengths,
        default=tuple(LONG),
        metavar="N,N",
        help=f"tokens of long documents, or none (default: {','.join(map(str, LONG))})",
    )
    group.add_argument(
        "--long-text", type=Path, metavar="FILE", help="default: Python's language reference"
    )


def _lengths(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 16:
        raise argparse.ArgumentTypeError("a long document has 16 tokens or more")
    return found


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every file, with the figures of the weights alone where asked for, and the floor."""
    if options.text or options.dataset:
        raise EvaluationError("--domains brings its own texts.", "Leave --text and --dataset out.")
    runtime = command.runtime_of(options)
    talks = conversations.dialogues(options.conversations, options.documents)
    text = read_text(options.long_text) if options.long_text else python_reference()
    documents = gather(options.base, talks, text, options.long, runtime)
    line = command.ProgressLine("base documents")
    rows = []
    with DocumentLogits.compute(options.base, documents, options.cache, runtime, line) as base:
        line = command.ProgressLine("base at F16 documents")
        floor = document_kl.measure_weights(base, options.base, options.cache, runtime, line)
        for file in options.files:
            line = command.ProgressLine(f"{file.name} documents")
            found = document_kl.measure(base, file, runtime, line)
            row = {"file": found.file, "n_bytes": found.n_bytes}
            row["domains"] = {name: asdict(one) for name, one in found.domains.items()}
            if options.weight_kl:
                line = command.ProgressLine(f"{file.name} at F16 documents")
                alone = document_kl.measure_weights(base, file, options.cache, runtime, line)
                row["weight_domains"] = {n: asdict(one) for n, one in alone.domains.items()}
            rows.append(row)
    return {
        "files": rows,
        "base": str(options.base),
        "floor": {name: asdict(one) for name, one in floor.domains.items()},
        "protocol": _PROTOCOL,
        "asked": documents.asked,
        "reason": documents.reason or None,
        "left_out": documents.left_out,
        "n_documents": len(documents.documents),
        "n_tokens": documents.n_tokens,
        "n_scored": documents.n_scored,
        "documents_sha256": documents.sha256(),
    }


def python_reference() -> str:
    """Return the language reference that comes with Python: some 180,000 tokens of technical
    English, under Python's license.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(text for _, text in sorted(topics.items()))


def show(result: dict[str, Any]) -> None:
    """Print a table for each file: a line for each domain."""
    for row in result["files"]:
        weights = row.get("weight_domains", {})
        headers = [Path(row["file"]).name, "documents", "tokens", "mean KL", "95 %"]
        headers += ["weight KL"] if weights else []
        headers += ["floor", "median", "99 %", "99.9 %", "same top-1"]
        lines = []
        for name, found in row["domains"].items():
            kl = found["kl"]
            line = [name, str(kl["n"]), f"{found['n_tokens']:,}", f"{kl['value']:.5f}"]
            line += [_interval(kl["ci95"])]
            line += [f"{weights[name]['kl']['value']:.5f}"] if weights else []
            line += [f"{result['floor'][name]['kl']['value']:.5f}"]
            line += [f"{found[key]['value']:.4f}" for key in ("median", "p99", "p999")]
            line += [f"{100 * found['top1']['value']:.1f} %"]
            lines.append(line)
        command.print_table(headers, lines)
        print()
    print(f"{result['n_documents']} documents through the {result['asked']}; {ALL}: without the")
    print("long ones. Intervals of fewer than 20 documents are rough, and wider for it.")
    for name, reason in result["left_out"].items():
        print(f"{name} left out: {reason}")


def _interval(ci95: tuple[float, float] | None) -> str:
    return "-" if ci95 is None else f"{ci95[0]:.5f} to {ci95[1]:.5f}"
