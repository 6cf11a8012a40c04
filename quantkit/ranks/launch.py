"""Start a command as several processes of this machine, one a GPU, by torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence

from quantkit.sandbox import secrets


def n_gpus(device: str) -> int:
    """Return how many processes use this machine's GPUs; 1 on a CPU."""
    if device != "cuda":
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def leave_secrets() -> None:
    """Leave what is handed on to rank 0: the others need no secrets. To be called before
    `secrets.hide`.
    """
    if os.environ.get("RANK", "0") != "0":
        os.environ.pop(secrets.DESCRIPTOR, None)


def launch(n: int, arguments: Sequence[str], told: Mapping[str, str]) -> int:
    """Run `python -m quantkit ARGUMENTS` as `n` processes under torchrun, rank 0 with the secrets
    `told`; return the exit status of rank 0. Signals are handed on; where one ends rank 0 or this
    process, this process ends by it, too.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # rank 0 says what happened
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        with secrets.on_stdin(told):
            elastic_launch(config, sys.executable)("-m", "quantkit", *arguments)
    except ChildFailedError as error:
        status = error.failures[0].exitcode if 0 in error.failures else 0
    except SignalException as error:
        status = -error.sigval
    else:
        return 0
    if status < 0 and -status != signal.SIGINT:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return 1 if status < 0 else status
