"""Open a GGUF through llama-cpp-python's C API in this very process: tokens in, logits of chosen
tokens out. A broken file may end the process: `evaluators.llama_runtime` has one of its own for it,
and only `evaluators.serve` imports this.

`Model` is the weights and the vocabulary, `Context` the memory of one computation. Both are context
managers and free what they hold when left. Batches are numpy arrays handed to `llama_decode`
without copying; only the tokens asked for leave a row of logits, and a context says beforehand how
many rows it will ever hold, so a vocabulary of 150k costs what it must and no more.

llama.cpp writes nothing to stderr here: its last lines are kept to explain a failure.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np
from numpy.typing import NDArray

from evaluators.closing import Closing
from evaluators.devices import check_gpu
from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, MAX_STEP, Runtime

_VOCAB_TYPE_NONE = 0
_GPU_SUMS = "GGML_CUDA_CUBLAS_COMPUTE_TYPE"  # llama.cpp reads it at every product
_LOG_ERROR, _LOG_CONT = 4, 5  # as in ggml.h; llama_cpp._logger has an older table


class LogTail:
    """llama.cpp's log, kept instead of printed: the last lines, and which of them are errors."""

    def __init__(self) -> None:
        self.lines: deque[str] = deque(maxlen=2000)
        self._errors: deque[str] = deque(maxlen=8)
        self._level = 0
        # ctypes frees a callback that nobody holds, and llama.cpp would call into nothing
        self._callback = lib.llama_log_callback(self._write)

    def _write(self, level: int, text: bytes, _user_data: int | None) -> None:
        line = text.decode("utf-8", "replace").strip()
        self._level = self._level if level == _LOG_CONT else level
        if line and level != _LOG_CONT:
            self.lines.append(line)
            if level == _LOG_ERROR:
                self._errors.append(line)

    def start(self) -> None:
        """Take over llama.cpp's log (there is one per process) and forget earlier lines."""
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))
        self.lines.clear()
        self._errors.clear()

    def reason(self) -> str:
        """Return the first error since `start` as half a sentence, or nothing. The first names the
        cause; the ones after it are callers giving up.
        """
        if not self._errors:
            return ""
        text = re.sub(r"^(\w+: )+(error loading model: )?", "", self._errors[0])
        return text.rstrip(".")


LOG = LogTail()


def because(reason: str) -> str:
    """Return ' (reason)' for the end of a clause, nothing without a reason."""
    return f" ({reason})" if reason else ""


class Model(Closing):
    """The weights and vocabulary of a GGUF, read for inference.

    Raises EvaluationError when the file is missing, not a GGUF, truncated, of an architecture this
    llama.cpp does not know, without a vocabulary, or not a decoder; or when the runtime has layers
    on a GPU and there is none.

    A GPU sums up products of unquantized weights in 32 bits, as the CPU does; with `exact` False in
    as many as llama.cpp chooses, mostly 16, as users have it.
    """

    def __init__(self, path: Path | str, runtime: Runtime = CPU, exact: bool = True) -> None:
        self.path = Path(path)
        self.runtime = runtime
        self._model: Any = None
        if runtime.n_gpu_layers:
            check_gpu()
        os.environ[_GPU_SUMS] = "f32" if exact else "auto"
        LOG.start()
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        params.n_gpu_layers = runtime.n_gpu_layers
        if not runtime.n_gpu_layers:  # else a GPU, where there is one, would have its part in it
            params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_NONE, -1
        self._model = lib.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise EvaluationError(
                f"llama.cpp cannot load {self.path}{because(LOG.reason())}.",
                "Download or write the file again; a newer llama-cpp-python may be needed for a "
                "new architecture.",
            )
        try:
            self._read_vocabulary()
        except EvaluationError:
            self.close()
            raise

    def _read_vocabulary(self) -> None:
        self._vocab = lib.llama_model_get_vocab(self._model)
        if not lib.llama_model_has_decoder(self._model) or (
            lib.llama_model_has_encoder(self._model)
        ):
            raise EvaluationError(
                f"{self.path} is not a causal language model.",
                "Perplexity, KL and choices need a decoder that predicts the next token.",
            )
        if lib.llama_vocab_type(self._vocab) == _VOCAB_TYPE_NONE:
            raise EvaluationError(
                f"{self.path} has no vocabulary.", "Convert the model with its tokenizer."
            )
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_params: int = lib.llama_model_n_params(self._model)
        self.n_ctx_train: int = lib.llama_model_n_ctx_train(self._model)
        self.adds_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self.bos: int = lib.llama_vocab_bos(self._vocab)  # -1 when there is none
        self.eos: int = lib.llama_vocab_eos(self._vocab)
        # A recurrent state belongs to one sequence: it cannot be shared as cached keys can.
        self.is_recurrent: bool = lib.llama_model_is_recurrent(
            self._model
        ) or lib.llama_model_is_hybrid(self._model)

    def tokenize(
        self, text: str, add_special: bool = True, parse_special: bool = False
    ) -> NDArray[np.int32]:
        """Return the token ids of `text`, plain text throughout: "<s>" in it is three characters,
        unless `parse_special`.

        With `add_special` a BOS is put first where the vocabulary asks for one; an EOS never is
        added, since a text here goes on.
        """
        data = text.encode("utf-8")
        capacity = len(data) + 16
        while True:
            ids = np.empty(capacity, dtype=np.int32)
            n = lib.llama_tokenize(
                self._vocab,
                data,
                len(data),
                ids.ctypes.data_as(lib.llama_token_p),
                capacity,
                add_special,
                parse_special,
            )
            if n >= 0:
                break
            if n == -(2**31):
                raise EvaluationError(
                    "The text has more than 2 billion tokens.", "Give a shorter text."
                )
            capacity = -n
        if add_special and n > 0 and lib.llama_vocab_get_add_eos(self._vocab):
            n -= 1
        return ids[:n].copy()

    def text_of(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of tokens; special ones are left out unless `special`."""
        tokens = (lib.llama_token * len(ids))(*ids)
        capacity = 64 + 16 * len(ids)
        while True:
            buffer = ctypes.create_string_buffer(capacity)
            n = lib.llama_detokenize(
                self._vocab, tokens, len(ids), buffer, capacity, False, special
            )
            if n >= 0:
                return buffer.raw[:n].decode("utf-8", "replace")
            capacity = -n

    def ends(self) -> list[int]:
        """Return the tokens that end an answer."""
        return [i for i in range(self.n_vocab) if lib.llama_vocab_is_eog(self._vocab, i)]

    def token_text(self, which: str) -> str:
        """Return the text of the token "bos" or "eos", empty where there is none."""
        token = self.bos if which == "bos" else self.eos
        if not 0 <= token < self.n_vocab:
            return ""
        found: bytes = lib.llama_vocab_get_text(self._vocab, token)
        return found.decode("utf-8", "replace")

    def chat_template(self) -> str | None:
        """Return the file's chat template, None without one."""
        found: bytes | None = lib.llama_model_chat_template(self._model, None)
        return None if found is None else found.decode("utf-8", "replace")

    def close(self) -> None:
        """Free the weights. Harmless when done before."""
        if self._model:
            lib.llama_model_free(self._model)
            self._model = None


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
        params = lib.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_step
        params.n_ubatch = min(n_step, MAX_STEP)
        params.n_seq_max = n_seqs
        # llama.cpp keeps at least one row per sequence
        params.n_outputs_max = max(n_outputs, n_seqs)
        params.kv_unified = n_seqs > 1 and not apart
        params.n_threads = params.n_threads_batch = model.runtime.threads
        # Without layers on the GPU nothing else may wander there either: the CPU means the CPU.
        params.offload_kqv = params.op_offload = model.runtime.n_gpu_layers != 0
        LOG.start()
        self._context: Any = lib.llama_init_from_model(model._model, params)
        if not self._context:
            raise EvaluationError(
                f"llama.cpp cannot make a context of {n_ctx} tokens for {model.path}"
                f"{because(LOG.reason())}.",
                "Use a smaller --ctx, or a machine with more memory.",
            )
        self.log_lines = tuple(LOG.lines)  # its buffer sizes

    def clear(self) -> None:
        """Forget every sequence."""
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)

    def copy(self, source: int, target: int) -> None:
        """Have one sequence, which is empty, know all that another does."""
        lib.llama_memory_seq_cp(lib.llama_get_memory(self._context), source, target, -1, -1)

    def forget(self, sequence: int, kept: int = 0) -> None:
        """Forget one sequence but for its first `kept` tokens, so that another can take its place.
        Raises EvaluationError where some cannot be kept: a recurrent state is that of all tokens.
        """
        memory = lib.llama_get_memory(self._context)
        if not lib.llama_memory_seq_rm(memory, sequence, kept or -1, -1):
            raise EvaluationError(
                f"{self.model.path} cannot go back to its first {kept} tokens.",
                "Give it every sequence in full.",
            )

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
            Logits [wanted.sum(), n_vocab] in the order of the batch. This is llama.cpp's own
            buffer: read it before the next call.
        """
        n, n_rows = len(tokens), int(wanted.sum())
        # llama.cpp ends the whole process over either
        if not 0 < n <= self.n_step or n_rows > self.n_outputs:
            raise ValueError(f"{n} tokens, {n_rows} rows; made for {self.n_step}, {self.n_outputs}")
        if int(tokens.max()) >= self.model.n_vocab or int(tokens.min()) < 0:
            raise EvaluationError(
                f"A token id is outside the {self.model.n_vocab} tokens of {self.model.path}.",
                "The text was tokenized for another model; give files of the same model.",
            )
        tokens = np.ascontiguousarray(tokens, dtype=np.int32)
        positions = np.ascontiguousarray(positions, dtype=np.int32)
        wanted = np.ascontiguousarray(wanted, dtype=np.int8)
        counts, flat, pointers = _sequence_table(n, sequences)
        batch = lib.llama_batch(
            n_tokens=n,
            token=_pointer(tokens, ctypes.c_int32),
            embd=None,
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(counts, ctypes.c_int32),
            seq_id=ctypes.cast(
                _pointer(pointers, ctypes.c_void_p),
                ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)),
            ),
            logits=_pointer(wanted, ctypes.c_int8),
        )
        LOG.start()
        status = lib.llama_decode(self._context, batch)
        del flat  # held until here: `pointers` holds its addresses as plain numbers
        if status != 0:
            raise EvaluationError(
                f"llama.cpp failed to run {self.model.path}: llama_decode gave {status}"
                f"{because(LOG.reason())}.",
                "Free some memory or use a smaller --ctx.",
            )
        if n_rows == 0:
            return np.empty((0, self.model.n_vocab), dtype=np.float32)
        rows = lib.llama_get_logits(self._context)
        if not rows:
            raise EvaluationError(
                f"{self.model.path} gives no logits.", "Give a causal language model."
            )
        return np.ctypeslib.as_array(rows, shape=(n_rows, self.model.n_vocab))

    def close(self) -> None:
        """Free the memory. Harmless when done before."""
        if self._context:
            lib.llama_free(self._context)
            self._context = None


def _pointer(array: NDArray[Any], kind: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(kind))


def _sequence_table(
    n: int, sequences: Sequence[Sequence[int]] | None
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.uintp]]:
    """How many sequences each token has [n], their ids end to end, and the address of each token's
    first id [n]: the `llama_seq_id **` of a batch.
    """
    if sequences is None:
        counts = np.ones(n, dtype=np.int32)
        flat = np.zeros(n, dtype=np.int32)
    else:
        counts = np.array([len(ids) for ids in sequences], dtype=np.int32)
        flat = np.array([seq for ids in sequences for seq in ids], dtype=np.int32)
    starts = np.cumsum(counts) - counts
    pointers = (flat.ctypes.data + starts * flat.itemsize).astype(np.uintp)
    return counts, flat, pointers
