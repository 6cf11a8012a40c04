"""What a file answers beside what the full-precision model answers, without labels.

    python -m evaluators.generation BASE.gguf FILE.gguf [FILE2.gguf ...] [--limit N]

Both answer the same prompts greedily, through the base's chat template: whether the answers are
equal, where they part, whether one is longer, goes round, does not come to an end, and whether its
JSON and tool calls can be read. Then the file reads the base's answers: which of their tokens would
it have chosen (`agreement`), which is steadier, because one early difference changes all that
follows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from evaluators import command, conversations, greedy
from evaluators.beside import Asked, Reply, compare_replies
from evaluators.chat import I32, Chat, Gone
from evaluators.command import Progress
from evaluators.conversations import Prompt
from evaluators.errors import EvaluationError
from evaluators.figures import AnswersBeside
from evaluators.greedy import Answer
from evaluators.llama_runtime import CPU, Model, Runtime, check_gguf, model_sha256

NEW_TOKENS = 128


@dataclass(frozen=True)
class Replies:
    """The base's answers to prompts, and its likeliest token at each place of them, read again."""

    file: str
    asked: Asked
    replies: tuple[Reply, ...]
    choices: tuple[I32, ...]


@dataclass(frozen=True)
class GenerationResult:
    """A file beside a base. `replies` (texts) stay out of the JSON unless asked for; `agreed` are
    the tokens of each of the base's answers that the file would choose, too.
    """

    file: str
    n_bytes: int
    base: str
    answers: AnswersBeside
    replies: tuple[tuple[Reply, Reply], ...]
    agreed: tuple[int, ...]


def ask(
    base: Path | str,
    prompts: Sequence[Prompt],
    n_new: int = NEW_TOKENS,
    runtime: Runtime = CPU,
) -> Asked:
    """Render prompts with the base's chat template, thinking on where it has a switch; as plain
    text where it has none that can be used, which `reason` then explains.

    Raises EvaluationError for a broken base, and where no prompt is left.
    """
    without = ""
    for _ in range(2):
        with Model(base, runtime) as model:
            try:
                return _asked(Chat(model, without), model, prompts, n_new)
            except Gone as error:  # the template ended llama.cpp's process
                without = error.message
    raise EvaluationError(f"{base} cannot be asked: {without}", "Download or make it again.")


def _asked(chat: Chat, model: Model, prompts: Sequence[Prompt], n_new: int) -> Asked:
    kept: list[tuple[Prompt, I32, str]] = []
    reason = chat.reason
    for prompt in prompts:
        try:
            text = chat.prompt_text(prompt.talk, thinks=True)
        except Gone:
            raise
        except EvaluationError as error:
            reason = error.message
            continue
        ids = chat.tokens_of(text)
        if len(ids) + n_new <= model.n_ctx_train:
            end = text.rstrip()
            begun = next((tag for tag in ("<think>", "<thought>") if end.endswith(tag)), "")
            kept.append((prompt, ids, begun))
    if not kept:
        raise EvaluationError(
            f"No prompt can be given to {model.path}{': ' + reason.rstrip('.') if reason else ''}.",
            f"Use shorter prompts, or fewer than {n_new} tokens an answer.",
        )
    found, ids_, begun_ = zip(*kept, strict=True)
    n_left_out = len(prompts) - len(kept)
    return Asked(found, ids_, begun_, n_new, chat.asked, reason, n_left_out)


def answers(
    base: Path | str,
    asked: Asked,
    cache: Path | None = None,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
) -> Replies:
    """Return the base's greedy answers, out of `cache` where they are there already: by the file's
    content, the tokens of the prompts, the runtime's version and its device.

    Raises EvaluationError for a broken file, and for logits that are not finite.
    """
    found = _replies(Path(base), asked, None, cache, runtime, progress)
    return Replies(str(base), asked, *found)


def _replies(
    path: Path,
    asked: Asked,
    read: Sequence[Reply] | None,
    cache: Path | None,
    runtime: Runtime,
    progress: Progress | None,
) -> tuple[tuple[Reply, ...], tuple[I32, ...]]:
    """A model's answers, and its choices in those that it is to read: its own where None."""
    n = len(asked.ids)
    of = [model_sha256(path), asked.sha256(), llama_cpp.__version__, runtime.n_gpu_layers]
    of.append([reply.answer.tokens for reply in read or ()])
    key = hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]
    kept = cache and cache / f"{path.stem}.{key}.answers"
    if kept and kept.is_file() and (known := _kept(kept, n)):
        return known
    with Model(path, runtime) as model:
        given = greedy.answer_all(model, asked.ids, asked.n_new, _part(progress, 0, n))
        texts = [model.text_of(_said(answer), special=True) for answer in given]
        replies = tuple(Reply(a, t) for a, t in zip(given, texts, strict=True))
        told = [reply.answer for reply in read or replies]
        chosen = tuple(greedy.choices(model, asked.ids, told, _part(progress, n, n)))
    if kept:
        _keep(kept, replies, chosen)
    return replies, chosen


def _part(progress: Progress | None, first: int, n: int) -> Progress | None:
    """Progress of one of two equal parts."""
    return (lambda done, _: progress(first + done, 2 * n)) if progress else None


def _said(answer: Answer) -> tuple[int, ...]:
    """The tokens without the one that ended it."""
    return answer.tokens[:-1] if answer.ended else answer.tokens


def _keep(path: Path, replies: Sequence[Reply], chosen: Sequence[I32]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    rows = [
        [reply.answer.tokens, reply.answer.ended, reply.text, ids.tolist()]
        for reply, ids in zip(replies, chosen, strict=True)
    ]
    partial.write_text(json.dumps(rows), "utf-8")
    os.replace(partial, path)


def _kept(path: Path, n: int) -> tuple[tuple[Reply, ...], tuple[I32, ...]] | None:
    """What `_keep` has written; None where it is not that, so that it is made again."""
    try:
        rows = json.loads(path.read_text("utf-8"))
        replies = [Reply(Answer(tuple(map(int, t)), bool(e)), str(s)) for t, e, s, _ in rows]
        chosen = [np.array(row[3], np.int32) for row in rows]
    except (OSError, ValueError, TypeError, RecursionError, OverflowError):
        return None
    return (tuple(replies), tuple(chosen)) if len(rows) == n else None


def measure(
    base: Replies,
    file: Path | str,
    cache: Path | None = None,
    runtime: Runtime = CPU,
    progress: Progress | None = None,
) -> GenerationResult:
    """Compare a file's answers with the base's.

    Args:
        base: of `answers`.
        cache: where the file's answers are kept and looked for.
        progress: called with (answers done, answers in all), those that are read included.

    Raises:
        EvaluationError: as `answers`, and for a file without some of the base's tokens.
    """
    path, asked = Path(file), base.asked
    replies, chosen = _replies(path, asked, base.replies, cache, runtime, progress)
    pairs = tuple(zip(base.replies, replies, strict=True))
    agreed = equal_choices(base.choices, chosen)
    beside = compare_replies(asked, pairs, agreed)
    return GenerationResult(str(path), check_gguf(path), base.file, beside, pairs, agreed)


def equal_choices(a: Sequence[I32], b: Sequence[I32]) -> tuple[int, ...]:
    """Return of each answer how many tokens two models that read it would both choose."""
    return tuple(int((mine == theirs).sum()) for mine, theirs in zip(a, b, strict=True))


# ---- one answer


def answer(
    file: Path | str, prompt: str, n_tokens: int = 64, runtime: Runtime = CPU
) -> dict[str, str]:
    """Return the greedy answer to `prompt`, of at most `n_tokens` tokens, and how it was asked.
    Where the file's chat template cannot be used, plain text is asked for, and `template` says why.

    Raises EvaluationError for a broken file.
    """
    said = {"prompt": prompt, "asked": "plain text"}
    chat: str | None = None
    with Model(file, runtime) as model:
        try:
            chat = model.chat_prompt([{"role": "user", "content": prompt}])
        except EvaluationError as error:
            said["template"] = error.message
        if model.session.is_alive:
            said["asked"] = "plain text" if chat is None else "chat template"
            return {**said, "text": _continued(model, prompt, chat, n_tokens)}
    with Model(file, runtime) as model:
        return {**said, "text": _continued(model, prompt, None, n_tokens)}


_ONE_CONTEXT = 512


def _continued(model: Model, prompt: str, chat: str | None, n_tokens: int) -> str:
    """What follows `chat`, or the plain `prompt`."""
    if chat is None:
        ids = model.tokenize(prompt)
    else:
        ids = model.tokenize(chat, add_special=False, parse_special=True)
    ids = ids[-(min(_ONE_CONTEXT, model.n_ctx_train) - n_tokens) :]
    if not len(ids):
        return ""
    return model.text_of(_said(greedy.answer_all(model, [ids], n_tokens)[0]))


# ---- the command


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    runtime = command.runtime_of(options)
    prompts = conversations.prompts(options.prompts, options.limit)
    asked = ask(options.base, prompts, options.tokens, runtime)
    line = command.ProgressLine("base answers")
    base = answers(options.base, asked, options.cache, runtime, line)
    rows = []
    for file in options.files:
        line = command.ProgressLine(f"{file.name} answers")
        result = measure(base, file, options.cache, runtime, line)
        row = {"file": str(file), "n_bytes": result.n_bytes, "base": str(options.base)}
        row |= asdict(result.answers)
        if options.texts:
            row["texts"] = [
                {"name": prompt.name, "base": mine.text, "file": theirs.text}
                for prompt, (mine, theirs) in zip(asked.prompts, result.replies, strict=True)
            ]
        rows.append(row)
    return rows[0] if len(rows) == 1 else {"files": rows}


def _show(result: dict[str, Any]) -> None:
    rows = result.get("files", [result])
    names = ["", *(Path(row["file"]).name for row in rows)]
    lines = []
    for title, key in (("same answer", "identical"), ("same calls, of those made", "same_calls")):
        if any(row[key] for row in rows):
            lines.append([title, *(_share_cell(row[key]) for row in rows)])
    for title, key, digits in (
        ("tokens before the first difference", "before_difference", 1),
        ("agrees, reading the base's answers", "agreement", 3),
        ("length, over the base's", "length", 3),
    ):
        lines.append([title, *(_estimate_cell(row[key], digits) for row in rows)])
    for title, key in (
        ("unfinished, base and file", "unfinished"),
        ("going round", "loops"),
        ("tool calls that can be used", "tool_calls"),
        ("valid JSON", "json"),
    ):
        if any(row[key] for row in rows):
            lines.append([title, *(_both_cell(row[key]) for row in rows)])
    print(f"{rows[0]['n_prompts']} prompts, answers of at most {rows[0]['n_new']} tokens,", end=" ")
    print(f"through the {rows[0]['asked']}\n")
    command.print_table(names, lines)
    if options := [row["texts"] for row in rows if "texts" in row]:
        for text in options[0]:
            print(f"\n--- {text['name']}\nbase: {text['base']}\nfile: {text['file']}")


def _share_cell(share: dict[str, Any] | None) -> str:
    if share is None:
        return "-"
    low, high = share["ci95"]
    return f"{share['n_yes']}/{share['n']} ({100 * low:.0f} to {100 * high:.0f} %)"


def _estimate_cell(found: dict[str, Any], digits: int) -> str:
    said = f"{found['value']:.{digits}f}"
    if found["ci95"] is None:
        return said
    low, high = found["ci95"]
    return f"{said} ({low:.{digits}f} to {high:.{digits}f})"


def _both_cell(both: dict[str, Any] | None) -> str:
    if both is None:
        return "-"
    n = both["base"]["n"]
    return f"{both['base']['n_yes']} and {both['file']['n_yes']} of {n} (p = {both['p_value']:.2g})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.generation",
        description="Compare what GGUFs answer with what the full-precision model answers.",
    )
    parser.add_argument("base", type=Path, metavar="BASE.gguf", help="the full-precision GGUF")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.gguf")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE.jsonl", help="default: the 40 of this package"
    )
    parser.add_argument("--limit", type=command.positive, metavar="N", help="the first N prompts")
    parser.add_argument(
        "--tokens",
        type=command.positive,
        default=NEW_TOKENS,
        metavar="N",
        help=f"of an answer at most (default: {NEW_TOKENS})",
    )
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="keep answers here for the next run"
    )
    parser.add_argument("--texts", action="store_true", help="also give the answers themselves")
    command.add_runtime_options(parser)
    return command.run_command(parser, _evaluate, _show, argv)


if __name__ == "__main__":
    sys.exit(main())
