"""Let a GGUF give a short answer, through its own chat template if it has one.

python -m evaluators.generation FILE.gguf --prompt TEXT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluators import command
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Context, Model, Runtime

_CONTEXT = 512


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


def _continued(model: Model, prompt: str, chat: str | None, n_tokens: int) -> str:
    """What follows `chat`, or the plain `prompt`."""
    if chat is None:
        ids = model.tokenize(prompt)
    else:
        ids = model.tokenize(chat, add_special=False, parse_special=True)
    ids, ends = ids[-(_CONTEXT - n_tokens) :], model.ends()
    said: list[int] = []
    position = 0
    with Context(model, _CONTEXT, _CONTEXT, n_outputs=1) as context:
        while len(ids) and len(said) < n_tokens:
            wanted = np.zeros(len(ids), dtype=np.int8)
            wanted[-1] = 1
            positions = np.arange(position, position + len(ids), dtype=np.int32)
            token = int(context.decode(ids, positions, wanted)[0].argmax())
            if token in ends:
                break
            said.append(token)
            position += len(ids)
            ids = np.array([token], dtype=np.int32)
    return model.text_of(said)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="evaluators.generation", description="Let a GGUF answer a prompt."
    )
    parser.add_argument("file", type=Path, metavar="FILE.gguf")
    parser.add_argument("--prompt", default="Name three things that float on water.")
    parser.add_argument("--tokens", type=command.positive, default=64, metavar="N")
    command.add_runtime_options(parser)

    def run(options: argparse.Namespace) -> dict[str, Any]:
        runtime = command.runtime_of(options)
        return answer(options.file, options.prompt, options.tokens, runtime)

    return command.run_command(parser, run, lambda result: print(result["text"]), argv)


if __name__ == "__main__":
    sys.exit(main())
