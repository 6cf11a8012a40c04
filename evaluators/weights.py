"""Measure a file's weights without the rounding of activations, by expanding the file to F16.

For quantized weights llama.cpp also rounds *activations* to 8 bits, which the full-precision base
does not: even a Q8_0 file, whose weights are all but exact, has a KL of some thousandths. Expanded
to F16 the same weights run as the base runs, and what is left of the KL is theirs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import CPU, Model, Runtime
from evaluators.logit_store import check_space


@contextmanager
def at_f16(
    file: Path, folder: Path | None = None, runtime: Runtime = CPU, memory: int = 0
) -> Iterator[Model]:
    """Yield the model of `file` with its weights at F16: in memory where `memory` bytes hold them,
    else from a temporary copy in `folder`, as `expanded_to_f16` makes it. The bytes
    are the same.

    Raises EvaluationError as `expanded_to_f16`.
    """
    if memory and runtime.launch is not None and hasattr(os, "memfd_create"):
        with Model(file, runtime, holds_weights=True) as model:
            if model.expand(memory):
                yield model
                return
    with expanded_to_f16(file, folder, runtime) as copy, Model(copy, runtime) as model:
        yield model


@contextmanager
def expanded_to_f16(
    file: Path, folder: Path | None = None, runtime: Runtime = CPU
) -> Iterator[Path]:
    """Yield a temporary F16 copy of `file` (in `folder`, or the system's), deleted on leaving.

    Raises EvaluationError when the disk has no room or llama.cpp cannot expand the file.
    """
    with tempfile.TemporaryDirectory(prefix="weight-kl-", dir=folder) as name:
        target = Path(name) / f"{file.stem}.f16.gguf"
        expand_file(file, target, runtime)
        yield target


def expand_file(file: Path, target: Path, runtime: Runtime = CPU, bits: int = 16) -> None:
    """Write the copy of `file` at F16, or at F32, to `target`. Raises EvaluationError as
    `expanded_to_f16`; F32 takes twice the disk and holds every weight.
    """
    with Model(file, runtime, writable=target.parent) as model:
        check_space(
            target.parent,
            bits // 8 * model.n_params,
            f"The weights at F{bits}",
            "Use --cache on another disk, or less.",
        )
        model.call(expand, target=str(target.absolute()), n_threads=runtime.threads, bits=bits)


def expand(file: str, target: str, n_threads: int, bits: int = 16) -> None:
    """Write the copy, in the process that may do so. Raises EvaluationError when llama.cpp
    cannot.
    """
    import llama_cpp.llama_cpp as lib

    from evaluators.llama_native import LOG, because

    LOG.start()
    params = lib.llama_model_quantize_default_params()
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_F16 if bits == 16 else lib.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    params.nthread = n_threads
    if lib.llama_model_quantize(os.fsencode(file), os.fsencode(target), params) != 0:
        raise EvaluationError(
            f"llama.cpp cannot expand {file} to F{bits}{because(LOG.reason())}.",
            "Leave --weight-kl out for this file.",
        )
