"""What the processes of the sandbox start with: an environment, and a home."""

from __future__ import annotations

import os
import tempfile


def environment(home: str) -> dict[str, str]:
    """Return the environment that the child sees: no token, no cache, no proxy."""
    n_threads = str(min(8, os.cpu_count() or 1))
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return {
        **kept,
        "PATH": "/usr/bin:/bin",
        "HOME": home,
        "TMPDIR": home,
        "HF_HOME": home,
        "TORCHINDUCTOR_CACHE_DIR": home,  # made when it is imported, if it is not there
        "LANG": "C.UTF-8",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        # Each thread and malloc arena reserves address space, which is limited.
        "OMP_NUM_THREADS": n_threads,
        "RAYON_NUM_THREADS": n_threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_ARENA_MAX": "2",
        # numpy's would start when it is imported, and a fork server has one thread; what takes long
        # is torch's and llama.cpp's, which have their own.
        "OPENBLAS_NUM_THREADS": "1",
    }


def empty_folder() -> str:
    """Return what a child's home is called. With a file system of its own only the name is used."""
    try:
        return os.path.realpath(tempfile.mkdtemp(prefix="quantkit-"))
    except OSError:  # no place for temporary files: it has none then, either
        return "/nonexistent"


def remove_empty(folder: str) -> None:
    """Remove a home, unless somebody else has."""
    try:
        os.rmdir(folder)
    except OSError:
        pass
