"""Hugging Face Jobs: machines by the minute in a visitor's own account.

A job is found again by its labels, so nothing about it has to be remembered: a launcher that lost
everything but a run's id asks for the jobs that carry it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub import JobInfo, Volume
from huggingface_hub.errors import HfHubHTTPError

from quantkit.errors import NeedsToken
from quantkit.hub.client import PATIENT, Asked, call, hf_api
from quantkit.hub.errors import CAUGHT, translate
from quantkit.sandbox.untrusted import build

WAITING, RUNNING, COMPLETED = "SCHEDULING", "RUNNING", "COMPLETED"
ENDED = ("COMPLETED", "ERROR", "CANCELED", "DELETED")
LABEL = "quantkit-run"

_ACCOUNT_SECONDS = 600.0
_accounts: dict[bytes, tuple[str, float]] = {}  # by the hash of a token: the name, and when
_UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Machine:
    """A kind of machine that a Job may run on, and its price."""

    name: str
    title: str
    cpu: str
    n_cpu: int
    memory_bytes: int
    disk_bytes: int
    usd_per_hour: float
    gpu: str | None = None  # as in "4x L4"
    gpu_bytes: int = 0  # memory of all its GPUs
    n_gpus: int = 0


@dataclass(frozen=True)
class RemoteJob:
    """A Job as the Hub knows it."""

    id: str
    owner: str
    stage: str  # SCHEDULING, RUNNING, COMPLETED, ERROR, CANCELED or DELETED
    message: str
    machine: str
    url: str
    created: float  # seconds since 1970
    run_seconds: float  # that are paid for

    @property
    def has_ended(self) -> bool:
        return self.stage in ENDED


@dataclass(frozen=True)
class GpuLoad:
    """How busy a GPU is, under the Hub's names; None is what it does not say."""

    utilization: float | None = None  # percent
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None


@dataclass(frozen=True)
class MachineLoad:
    """How busy a Job's machine is, under the Hub's names; None is what it does not say."""

    cpu_usage_pct: float | None = None
    cpu_millicores: float | None = None
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    rx_bps: float | None = None  # received
    tx_bps: float | None = None  # sent
    gpus: dict[str, GpuLoad] | None = None
    replica: str | None = None


@dataclass(frozen=True)
class JobOrder:
    """What to start. `secrets` never travels anywhere but in the request that starts the Job."""

    image: str
    command: tuple[str, ...]
    machine: str
    timeout_seconds: int
    labels: Mapping[str, str]
    environment: Mapping[str, str]
    bucket: str | None = None
    mount_path: str = "/state"


def account(token: str) -> str:
    """Return the name of the account that a token belongs to, asked at most once in ten minutes:
    the Hub limits requests. Raises QuantkitError.
    """
    key, now = hashlib.sha256(token.encode()).digest(), time.monotonic()
    known = _accounts.get(key)
    if known is not None and now < known[1] + _ACCOUNT_SECONDS:
        return known[0]
    api = hf_api(token)
    name = str(call(lambda: api.whoami(), Asked(), token)["name"])
    for old in [k for k, (_, since) in _accounts.items() if now > since + _ACCOUNT_SECONDS]:
        del _accounts[old]
    _accounts[key] = name, now
    return name


def machines(token: str | None = None) -> tuple[Machine, ...]:
    """Return what the Hub offers and charges now. Raises QuantkitError when it does not answer."""
    api = hf_api(token)
    found = call(api.list_jobs_hardware, Asked(thing="the Hub's machines"), token)
    return tuple(_machine(item) for item in found)


def _machine(item: Any) -> Machine:
    hours = {"second": 3600, "minute": 60, "hour": 1}.get(item.unit_label, 60)
    gpu = item.accelerator if item.accelerator and item.accelerator.type == "gpu" else None
    n_cpu = re.match(r"\d+", str(item.cpu))
    return Machine(
        item.name,
        item.pretty_name,
        str(item.cpu),
        int(n_cpu[0]) if n_cpu else 1,
        _n_bytes(item.ram),
        _n_bytes(item.ephemeral_storage),
        round(item.unit_cost_usd * hours, 4),
        f"{gpu.quantity}x {gpu.model}" if gpu else None,
        _n_bytes(gpu.vram) if gpu else 0,
        _count(gpu.quantity) if gpu else 0,
    )


def _count(text: Any) -> int:
    return max(1, int(text)) if str(text).isdecimal() else 1


def _n_bytes(text: Any) -> int:
    match = re.fullmatch(r"\s*([\d.]+)\s*([a-zA-Z]+)\s*", str(text))
    if match is None or match[2].lower() not in _UNITS:
        return 0
    return int(float(match[1]) * _UNITS[match[2].lower()])


def start(order: JobOrder, run_id: str, token: str) -> RemoteJob:
    """Start a Job that carries the label of `run_id`. Raises QuantkitError.

    A request whose answer was lost is not repeated before the Jobs of that label were looked at:
    no machine is paid for twice.
    """
    api, owner = hf_api(token), account(token)
    volumes = None
    if order.bucket:
        volumes = [Volume(type="bucket", source=order.bucket, mount_path=order.mount_path)]
    known = {job.id for job in find(run_id, token)}

    def run() -> RemoteJob:
        started = [job for job in find(run_id, token) if job.id not in known]
        if started:
            return started[0]
        return _remote(
            api.run_job(
                image=order.image,
                command=list(order.command),
                env=dict(order.environment),
                secrets={"HF_TOKEN": token},
                flavor=order.machine,
                timeout=order.timeout_seconds,
                labels={**order.labels, LABEL: run_id},
                volumes=volumes,
                namespace=owner,
            )
        )

    return call(run, _asked(owner), token, PATIENT[:4])


def find(run_id: str, token: str) -> tuple[RemoteJob, ...]:
    """Return the Jobs of a run in any state, newest first. Raises QuantkitError."""
    found = map(_remote, _listed({LABEL: run_id}, token))
    return tuple(sorted(found, key=lambda job: -job.created))


def _listed(labels: Mapping[str, str], token: str) -> list[JobInfo]:
    api, owner = hf_api(token), account(token)
    ask = partial(api.list_jobs, labels=dict(labels), namespace=owner)
    return call(lambda: list(ask()), _asked(owner), token)


@dataclass(frozen=True)
class FoundRun:
    """A run that Jobs of an account know of."""

    run_id: str
    config: str  # as the Job was given it
    job: RemoteJob
    order: str = ""  # the same; Jobs of before there was one have none


def runs(labels: Mapping[str, str], token: str) -> tuple[FoundRun, ...]:
    """Return the runs of an account whose Jobs carry `labels`, each by its newest Job. Raises
    QuantkitError.
    """
    found: dict[str, FoundRun] = {}
    for info in _listed(labels, token):
        run_id = (info.labels or {}).get(LABEL)
        told = info.environment or {}
        config, order = told.get("QUANTKIT_CONFIG"), told.get("QUANTKIT_ORDER")
        job = _remote(info)
        newer = run_id in found and found[run_id].job.created >= job.created
        if run_id and isinstance(config, str) and not newer:
            found[run_id] = FoundRun(run_id, config, job, str(order or ""))
    return tuple(found.values())


def look(job: RemoteJob, token: str) -> RemoteJob:
    """Return the Job as it is now. Raises QuantkitError."""
    api = hf_api(token)
    ask = partial(api.inspect_job, job_id=job.id, namespace=job.owner)
    return _remote(call(ask, _asked(job.owner), token, PATIENT))


def cancel(job: RemoteJob, token: str) -> None:
    """End a Job. Raises QuantkitError."""
    api = hf_api(token)
    stop = partial(api.cancel_job, job_id=job.id, namespace=job.owner)
    call(stop, _asked(job.owner), token)


def cancel_all(run_id: str, token: str) -> None:
    """End every Job of a run that is still at work. Raises QuantkitError."""
    for job in find(run_id, token):
        if not job.has_ended:
            cancel(job, token)


def lines(job: RemoteJob, token: str) -> Iterator[str]:
    """Yield the lines that a Job prints, from its first on, until it has ended.

    Broken connections are taken up again. Raises QuantkitError.
    """
    api = hf_api(token)
    try:
        yield from api.fetch_job_logs(job_id=job.id, namespace=job.owner, follow=True)
    except CAUGHT as error:
        raise translate(error, _asked(job.owner), token) from None


def load(job: RemoteJob, token: str) -> MachineLoad | None:
    """Return how busy the machine is right now; None when the Hub does not say so as it should."""
    api = hf_api(token)
    try:
        said = next(iter(api.fetch_job_metrics(job_id=job.id, namespace=job.owner)), None)
        return build(MachineLoad, said)
    except CAUGHT:  # Damaged, a ValueError, too
        return None


def make_bucket(name: str, token: str) -> str | None:
    """Return the id of the account's private bucket `name`, which is created if needed; None if the
    token may not create one. Raises QuantkitError for everything else.
    """
    api, owner = hf_api(token), account(token)
    bucket = f"{owner}/{name}"

    def make() -> str | None:
        try:
            api.create_bucket(bucket, private=True, exist_ok=True)
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403):
                return None
            raise
        return bucket

    return call(make, _asked(owner), token)


def check_token(token: str | None) -> str:
    """Return the token. Raises NeedsToken without one."""
    if not token:
        raise NeedsToken("A Job runs in your own account, but nobody is signed in.")
    return token


def _asked(owner: str) -> Asked:
    return Asked(thing=f"the Jobs of {owner}", writing=True)


def _remote(job: JobInfo) -> RemoteJob:
    stage = getattr(job.status.stage, "value", job.status.stage)
    seconds = job.durations.running_secs if job.durations else None
    return RemoteJob(
        job.id,
        job.owner.name,
        str(stage),
        job.status.message or "",
        str(getattr(job.flavor, "value", job.flavor) or ""),
        job.url,
        job.created_at.timestamp() if job.created_at else 0.0,
        float(seconds or 0),
    )
