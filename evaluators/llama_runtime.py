"""Open a GGUF in llama.cpp, in a process of its own: tokens in, logits of chosen tokens out.

`Model` is the weights and the vocabulary, `Context` the memory of one computation. Both are context
managers and give back what they hold when left. The file may be anybody's: llama.cpp ends its whole
process over some broken ones, and never comes back from others, which is a sentence here
(`evaluators.session`). Only the tokens asked for leave a row of logits, and a context says
beforehand how many rows it will ever hold, so a vocabulary of 150k costs what it must and no more.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.closing import Closing
from evaluators.errors import EvaluationError
from evaluators.session import Launch, Session, T, as_it_is, plainly, whole_numbers

F16_BYTES = 2
MAX_STEP = 512  # tokens of one llama_decode; llama.cpp's own ubatch, more is not faster
_MOST_VOCAB = 1 << 20  # the largest that is known has 262,208: rows of logits are as long
_FACTS = ("n_vocab", "n_params", "n_ctx_train", "adds_bos", "bos", "eos", "is_recurrent")
# A process may take so long for what it is asked, and more for larger files: far above what honest
# ones need on slow machines.
_SECONDS = 600.0
_BYTES_PER_SECOND = 1e9  # of weights, for each token; of prompts that is slow
_DISK_BYTES_PER_SECOND = 2e6
_LETTERS_PER_SECOND = 20_000
_RENDER_SECONDS = 60.0


@dataclass(frozen=True)
class Runtime:
    """Where to compute. `n_threads` 0 means every core this process may use; `n_gpu_layers` 0 is
    the CPU, -1 every layer. `launch` starts the process that opens a file; the caller may have a
    place for it that is safer than a plain process, or be in one already (None).
    """

    n_threads: int = 0
    n_gpu_layers: int = 0
    launch: Launch | None = plainly

    @property
    def threads(self) -> int:
        if self.n_threads > 0:
            return self.n_threads
        affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
        return len(affinity(0)) if affinity else os.cpu_count() or 1


CPU = Runtime()


def shard_paths(path: Path) -> list[Path]:
    """Return every file of a split model given its first, or the one file itself."""
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    stem, total = match.group(1), int(match.group(2))
    return [path.with_name(f"{stem}-{i:05d}-of-{total:05d}.gguf") for i in range(1, total + 1)]


def check_gguf(path: Path) -> int:
    """Return the total bytes of a GGUF (all its parts). Raises EvaluationError when it is missing
    or is something else; what is inside is llama.cpp's to judge.
    """
    n_bytes = 0
    for part in shard_paths(path):
        if not part.is_file():
            raise EvaluationError(f"There is no file {part}.", "Check the path.")
        with part.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise EvaluationError(
                f"{part} is not a GGUF file: it starts with {magic!r}.",
                "Give a .gguf file, and download it again if it should be one.",
            )
        n_bytes += part.stat().st_size
    return n_bytes


def check_context(path: Path, n_ctx: int, n_ctx_train: int) -> None:
    """Raise EvaluationError when the model in `path` was not trained for `n_ctx` tokens."""
    if n_ctx > n_ctx_train:
        raise EvaluationError(
            f"A context of {n_ctx} tokens is longer than the {n_ctx_train} that {path} was trained"
            " with.",
            f"Use --ctx {n_ctx_train} or less.",
        )


def model_sha256(path: Path) -> str:
    """Return the sha256 over all parts of a model, in order."""
    digest = hashlib.sha256()
    for part in shard_paths(path):
        with part.open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


class Opened(Closing):
    """A process of llama.cpp's for one file, before anything is loaded there. `writable` is the one
    folder that it may write into; with `holds_weights` it has memory for the weights at F16.

    Raises EvaluationError when the file is missing or not a GGUF.
    """

    def __init__(
        self,
        path: Path | str,
        runtime: Runtime = CPU,
        writable: Path | None = None,
        holds_weights: bool = False,
    ) -> None:
        self.path = Path(path)
        self.runtime = runtime
        self.n_bytes = check_gguf(self.path)
        self.session = Session(
            self.path, shard_paths(self.path), runtime.launch, writable, holds_weights
        )

    def call(
        self,
        function: Callable[..., Any],
        n_tokens: int = 1,
        read: Callable[[Any], T] = as_it_is,
        **arguments: Any,
    ) -> T:
        """Run a function of `evaluators` there, which takes the path first: JSON in, JSON out,
        which `read` takes. It may take as long as `n_tokens` tokens may.
        """
        name = f"{function.__module__}:{function.__name__}"
        seconds = self._seconds(n_tokens) + self.n_bytes / _DISK_BYTES_PER_SECOND
        return self.session.ask(
            "call",
            seconds,
            read,
            function=name,
            file=str(self.path.absolute()),
            arguments=arguments,
        )

    def _seconds(self, n_tokens: int) -> float:
        return _SECONDS + n_tokens * self.n_bytes / _BYTES_PER_SECOND

    def close(self) -> None:
        """End the process. Harmless when done before."""
        self.session.close()


class Model(Opened):
    """The weights and vocabulary of a GGUF, read for inference.

    Raises EvaluationError when the file is missing, not a GGUF, truncated, of an architecture this
    llama.cpp does not know, without a vocabulary, not a decoder, or ends llama.cpp.
    """

    def __init__(
        self,
        path: Path | str,
        runtime: Runtime = CPU,
        writable: Path | None = None,
        holds_weights: bool = False,
    ) -> None:
        super().__init__(path, runtime, writable, holds_weights)
        try:
            facts = self.session.ask(
                "open",
                _SECONDS + self.n_bytes / _DISK_BYTES_PER_SECOND,
                lambda value: {name: int(value[name]) for name in _FACTS},
                file=str(self.path.absolute()),
                n_threads=runtime.n_threads,
                n_gpu_layers=runtime.n_gpu_layers,
            )
            self.n_vocab = facts["n_vocab"]
            self.n_params = facts["n_params"]
            self.n_ctx_train = facts["n_ctx_train"]
            self.adds_bos = bool(facts["adds_bos"])
            self.bos = facts["bos"]  # -1 when there is none
            self.eos = facts["eos"]
            # A recurrent state belongs to one sequence: it cannot be shared as cached keys can.
            self.is_recurrent = bool(facts["is_recurrent"])
            if not 0 < self.n_vocab <= _MOST_VOCAB:
                raise EvaluationError(
                    f"{self.path} has an impossible vocabulary of {self.n_vocab:,} tokens.",
                    "Download or write the file again.",
                )
        except BaseException:
            self.close()
            raise

    def expand(self, n_bytes: int) -> bool:
        """Go on with the weights at F16, in memory, if `n_bytes` hold them and the process was
        given such memory; return whether it does. Raises EvaluationError when llama.cpp cannot.
        """
        expanded = F16_BYTES * self.n_params
        if expanded > n_bytes or not self.session.ask("can_expand", _SECONDS, bool):
            return False
        self.session.ask("expand", _SECONDS + (expanded + self.n_bytes) / _DISK_BYTES_PER_SECOND)
        return True

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Return the token ids of `text`, plain text throughout: "<s>" in it is three characters,
        unless `parse_special`.

        With `add_special` a BOS is put first where the vocabulary asks for one; an EOS never is
        added, since a text here goes on.
        """
        ids = self.session.ask(
            "tokenize",
            _SECONDS + len(text) / _LETTERS_PER_SECOND,
            whole_numbers,
            text=text,
            add_special=add_special,
            parse_special=parse_special,
        )
        return np.array(ids, dtype=np.int32)

    def text_of(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of tokens; special ones are left out unless `special`."""
        return self.texts_of([ids], special)[0]

    def texts_of(self, sequences: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        """Return the text of each sequence of tokens; special ones as `text_of`."""
        asked = [list(ids) for ids in sequences]

        def read(found: Any) -> list[str]:
            if len(found) != len(asked):
                raise ValueError("there are more or fewer")
            return [str(text) for text in found]

        return self.session.ask("texts", _SECONDS, read, sequences=asked, special=special)

    def ends(self) -> frozenset[int]:
        """Return the tokens that end an answer."""
        return frozenset(self.session.ask("ends", _SECONDS, whole_numbers))

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        asks: bool = True,
        thinks: bool | None = None,
    ) -> str | None:
        """Render `messages` with the file's own chat template; None without one.

        Args:
            messages: as the OpenAI API has them, tool calls with arguments as objects.
            tools: the functions that may be called, as that API has them.
            asks: end where the assistant begins to answer (`add_generation_prompt`).
            thinks: what the switches `enable_thinking` and `thinking` of a template are set to;
                None leaves them to the template.

        Raises EvaluationError when the template cannot be used; the model may be gone then.
        """
        return self.session.ask(
            "render",
            _RENDER_SECONDS,
            lambda said: None if said is None else str(said),
            messages=[dict(message) for message in messages],
            tools=None if tools is None else [dict(tool) for tool in tools],
            asks=asks,
            thinks=thinks,
        )

    def check_context(self, n_ctx: int) -> None:
        """Raise EvaluationError when the model was not trained for `n_ctx` tokens."""
        check_context(self.path, n_ctx, self.n_ctx_train)


class Context(Closing):
    """Memory to decode batches with one model: `n_ctx` cells of keys and values, `n_step` tokens
    and `n_outputs` rows of logits at a time.

    With `n_seqs` > 1 the cells are one pool (`kv_unified`) and a token may belong to several
    sequences, which is how a shared prefix is computed once. `apart`, every sequence has an equal
    part of the cells, and only looks at those: less work where nothing is shared.
    """

    def __init__(
        self,
        model: Model,
        n_ctx: int,
        n_step: int,
        n_outputs: int,
        n_seqs: int = 1,
        apart: bool = False,
    ) -> None:
        self.model = model
        self.n_step = n_step
        self.n_outputs = n_outputs
        self._is_open = False
        self._logits = model.session.share(n_outputs * model.n_vocab)
        model.session.ask(
            "context",
            model._seconds(n_step),
            n_ctx=n_ctx,
            n_step=n_step,
            n_outputs=n_outputs,
            n_seqs=n_seqs,
            apart=apart,
        )
        self._is_open = True

    def clear(self) -> None:
        """Forget every sequence."""
        self.model.session.ask("clear", _SECONDS)

    def copy(self, source: int, target: int) -> None:
        """Have one sequence, which is empty, know all that another does."""
        self.model.session.ask("copy", _SECONDS, source=source, target=target)

    def forget(self, sequence: int, kept: int = 0) -> None:
        """Forget one sequence but for its first `kept` tokens, so that another can take its place.
        A recurrent model cannot keep some: EvaluationError.
        """
        self.model.session.ask("forget", _SECONDS, sequence=sequence, kept=kept)

    def decode(
        self,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        wanted: NDArray[np.int8],
        sequences: Sequence[Sequence[int]] | None = None,
    ) -> NDArray[np.float32]:
        """Run one batch of at most `n_step` tokens; logits of those with `wanted` 1.

        Args:
            tokens: ids, [n].
            positions: place of each token in its sequence, [n].
            wanted: 1 where the row of logits is needed, [n].
            sequences: for each token the sequences it belongs to; all in sequence 0 when None.

        Returns:
            Logits [wanted.sum(), n_vocab] in the order of the batch, in memory that the next call
            writes over: read it before.
        """
        n, n_rows = len(tokens), int(wanted.sum())
        # llama.cpp would end its process over either
        if not 0 < n <= self.n_step or n_rows > self.n_outputs:
            raise ValueError(f"{n} tokens, {n_rows} rows; made for {self.n_step}, {self.n_outputs}")
        if int(tokens.max()) >= self.model.n_vocab or int(tokens.min()) < 0:
            raise EvaluationError(
                f"A token id is outside the {self.model.n_vocab} tokens of {self.model.path}.",
                "The text was tokenized for another model; give files of the same model.",
            )
        self.model.session.ask(
            "decode",
            self.model._seconds(n),
            tokens=tokens.tolist(),
            positions=positions.tolist(),
            wanted=wanted.tolist(),
            sequences=sequences,
        )
        return self._logits[: n_rows * self.model.n_vocab].reshape(n_rows, self.model.n_vocab)

    def close(self) -> None:
        """Free the memory. Harmless when done before, or when the process is gone."""
        if self._is_open and self.model.session.is_alive:
            self.model.session.ask("close_context", _SECONDS)
        self._is_open = False
