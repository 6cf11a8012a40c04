"""What llama.cpp computes on: the CPU, or the GPUs that this build of it finds."""

from __future__ import annotations

import ctypes
from collections import Counter

import llama_cpp
import llama_cpp.llama_cpp as lib

from evaluators.errors import EvaluationError
from evaluators.llama_runtime import Runtime

_GPUS = (1, 2)  # GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU of ggml-backend.h


def gpus() -> tuple[str, ...]:
    """Return the names of the GPUs that layers can lie on, such as "NVIDIA H200". There are none in
    a build without GPU support, and where its driver finds none.
    """
    ggml = lib._lib  # libllama, through which libggml's symbols are found, too
    ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
    ggml.ggml_backend_dev_get.restype = ctypes.c_void_p
    ggml.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    ggml.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    ggml.ggml_backend_dev_description.restype = ctypes.c_char_p
    ggml.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    if not lib.llama_supports_gpu_offload():  # loads backends that are files of their own
        return ()
    found = (ggml.ggml_backend_dev_get(i) for i in range(ggml.ggml_backend_dev_count()))
    return tuple(
        ggml.ggml_backend_dev_description(device).decode("utf-8", "replace")
        for device in found
        if ggml.ggml_backend_dev_type(device) in _GPUS
    )


def build() -> dict[str, str]:
    """Return what tells this build of llama.cpp from others, as far as its library knows:
    `llama_cpp_python`, `ggml` (version and commit) and `system` (what it uses of the processor).
    """
    told = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(lib._lib, name, None)  # not in older ones
        if function is not None:
            function.restype = ctypes.c_char_p
            told.append(function().decode("utf-8", "replace"))
    return {
        "llama_cpp_python": llama_cpp.__version__,
        "ggml": " ".join(told),
        "system": " ".join(lib.llama_print_system_info().decode("utf-8", "replace").split()),
    }


def check_gpu() -> None:
    """Raise EvaluationError where llama.cpp finds no GPU."""
    if not gpus():
        raise EvaluationError(
            "llama.cpp finds no GPU: this llama-cpp-python was built without GPU support, or no GPU"
            " is visible.",
            "Install a build for your GPU (evaluators/README.md says how), or measure on the CPU.",
        )


def described(runtime: Runtime) -> str:
    """Return what a runtime computes on: "CPU", or the GPUs by name, with the number of layers
    where some stay on the CPU. Raises EvaluationError when a GPU is asked for and there is none.
    """
    if not runtime.n_gpu_layers:
        return "CPU"
    check_gpu()
    names = [f"{n} x {name}" if n > 1 else name for name, n in Counter(gpus()).items()]
    partly = f" ({runtime.n_gpu_layers} layers)" if runtime.n_gpu_layers > 0 else ""
    return ", ".join(names) + partly
