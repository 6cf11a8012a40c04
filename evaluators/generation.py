"""A short answer from a GGUF: does the file talk at all, through its own chat template when it has
one.

    python -m evaluators.generation FILE.gguf --prompt TEXT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evaluators import command
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Runtime, check_gguf


def answer(
    file: Path | str, prompt: str, n_tokens: int = 64, runtime: Runtime = CPU
) -> dict[str, str]:
    """The greedy answer to `prompt`, of at most `n_tokens` tokens, and how it was asked.

    Raises:
        EvaluationError: a broken file, or one whose chat template cannot be rendered.
    """
    import llama_cpp

    check_gguf(Path(file))
    llm = llama_cpp.Llama(
        str(file),
        n_ctx=512,
        n_threads=runtime.threads,
        n_gpu_layers=runtime.n_gpu_layers,
        verbose=False,
    )
    try:
        if "tokenizer.chat_template" in llm.metadata:
            messages: Any = [{"role": "user", "content": prompt}]
            said: Any = llm.create_chat_completion(messages, max_tokens=n_tokens, temperature=0)
            return {
                "prompt": prompt,
                "asked": "chat template",
                "text": said["choices"][0]["message"]["content"] or "",
            }
        said = llm.create_completion(prompt, max_tokens=n_tokens, temperature=0)
        return {"prompt": prompt, "asked": "plain text", "text": said["choices"][0]["text"]}
    except (ValueError, RuntimeError) as error:
        raise EvaluationError(
            f"{file} does not answer: {error}.", "Its chat template may be broken."
        ) from error
    finally:
        llm.close()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="evaluators.generation", description=__doc__)
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
