"""Start a run in a Hugging Face Job, or find it again, and listen to it.

    python -m quantkit.server.executors.hf_jobs.dispatch ORDER FOLDER

To everything else in this package it looks like a worker: it holds the run's lock, writes the run's
events, log and results into its folder, and ends when the run has ended. When it is killed, the Job
goes on; started again, it finds the Job by its label and takes up where it was. Only the signal of
`HfJobs.cancelled_by` has the Job ended. ORDER is an `Order` as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType

from quantkit import hub
from quantkit.config import RunConfig
from quantkit.errors import QuantkitError
from quantkit.files import replacing, write_json
from quantkit.hub import jobs
from quantkit.run.events import MOST_EVENT_BYTES, EventLog, outcome, read_events
from quantkit.run.folder import RunDir, read_json
from quantkit.sandbox import secrets
from quantkit.sandbox.untrusted import build, shortened
from quantkit.server.executors.hf_jobs.executor import HfJobs, app_labels
from quantkit.server.executors.hf_jobs.wheel import job_requirement
from quantkit.server.executors.hf_jobs.wire import Listener, SentEvent, SentFile
from quantkit.server.executors.protocol import (
    MACHINE_FILE,
    REMOTE_LOG_FILE,
    RESULTS,
    Order,
    RemoteState,
    choose,
)
from quantkit.tensors import to_json

IMAGE = "ghcr.io/astral-sh/uv:python3.12-bookworm"
BUCKET = "quantkit-jobs"
# A Job gets its secret in the environment, where it would stay readable as long as `uv` lives: it
# goes into a pipe instead (quantkit.sandbox.secrets).
_IN_JOB = f"""exec 9<<EOF
HF_TOKEN=$HF_TOKEN
EOF
unset HF_TOKEN
{secrets.DESCRIPTOR}=9 exec "$@"
"""
_UV = ("uv", "run", "--no-project", "--python", "3.12", "--with")
_RUN = ("python", "-m", "quantkit.server.executors.hf_jobs.in_job")
MOUNT = "/state"
_ENDING = (signal.SIGTERM, HfJobs.cancelled_by)
_METRICS_SECONDS = 15.0
_POLL_SECONDS = 5.0
_TRIES = 20
_READS_AFTER_THE_END = 3
_MOST_LOG, _LONGEST_LINE = 20_000_000, 10_000  # characters of what a Job prints


class Ended(BaseException):
    """A signal that ends this worker came; with `cancelled` it ends its Job, too."""

    def __init__(self, cancelled: bool) -> None:
        super().__init__()
        self.cancelled = cancelled


def main(argv: list[str]) -> int:
    """Dispatch the run. Returns 0 when it has finished, 1 when it failed, 130 when this process was
    ended.
    """
    order, directory = build(Order, json.loads(argv[1])), RunDir(Path(argv[2]))
    for number in _ENDING:
        signal.signal(number, _raise_ended)
    with directory.lock():
        events = EventLog(directory.events_path)
        dispatch = None
        try:
            token = jobs.check_token(hub.resolve_token())
            dispatch = Dispatch(directory, order, token, events)
            return dispatch.run()
        except QuantkitError as error:
            events.fail(None, error)
            return 1
        except Ended as ended:
            if dispatch is not None and ended.cancelled:
                dispatch.cancel()
            return 130


def _raise_ended(number: int, frame: FrameType | None) -> None:
    for one in _ENDING:
        signal.signal(one, signal.SIG_IGN)  # once: ending the Job takes a moment
    raise Ended(number == HfJobs.cancelled_by)


class Dispatch:
    """One run and its Job."""

    def __init__(self, directory: RunDir, order: Order, token: str, events: EventLog) -> None:
        self._dir = directory
        self._order = order
        self._token = token
        self._events = events
        self._run_id = directory.path.name
        self._job: jobs.RemoteJob | None = None
        self._ended = threading.Event()
        self._telling = threading.Lock()  # held to write machine.json, or to end its watcher
        self._heard: dict[str, int] = {}  # Job -> events of it that are in the file
        for event in read_events(directory.events_path)[0]:
            at = event.data.get("at")
            if isinstance(at, list) and len(at) == 2 and type(at[1]) is int:
                self._heard[str(at[0])] = at[1] + 1

    def run(self) -> int:
        """Start or find the Job and listen until it ends."""
        job = self._job = self._find() or self._start()
        self._tell_machine(job)
        self._wait_for_machine()
        watcher = threading.Thread(target=self._watch_machine, daemon=True)
        watcher.start()
        try:
            job = self._job = self._listen_to_the_end()
        finally:
            with self._telling:  # what the watcher has asked meanwhile is older than `job`
                self._ended.set()
        self._tell_machine(job)
        return self._end(job)

    def cancel(self) -> None:
        """End every Job of the run that is still at work."""
        try:
            jobs.cancel_all(self._run_id, self._token)
        except QuantkitError as error:
            self._events.emit(None, "note", f"the Job could not be stopped: {error}")

    def _find(self) -> jobs.RemoteJob | None:
        """The Job to listen to: one at work, or one that finished while nobody listened."""
        found = jobs.find(self._run_id, self._token)
        active = next((job for job in found if not job.has_ended), None)
        if active is not None:
            self._events.emit(None, "note", f"listening to the Job {active.id} again")
            return active
        if found and found[0].stage == jobs.COMPLETED and self._outcome() != "finished":
            return found[0]
        return None

    def _start(self) -> jobs.RemoteJob:
        config = RunConfig.from_json(read_json(self._dir.config_path))
        bucket = jobs.make_bucket(BUCKET, self._token)
        if bucket is None:
            if config.publish is None:
                raise QuantkitError(
                    "There would be no place for the result: your sign-in cannot create a bucket,"
                    " and no repository was named.",
                    "Name a repository to publish to.",
                )
            message = "no bucket can be created: a Job that is cut off starts over"
            self._events.emit(None, "note", message)
        order = self._order = self._order if self._order.hours else self._planned(config)
        assert order.machine is not None and order.hours is not None
        asked = jobs.JobOrder(
            image=IMAGE,
            command=("sh", "-c", _IN_JOB, "sh", *_UV, job_requirement(), *_RUN),
            machine=order.machine,
            timeout_seconds=3600 * order.hours,
            labels=app_labels(os.environ),
            environment={
                "QUANTKIT_CONFIG": json.dumps(to_json(config)),
                "QUANTKIT_ORDER": json.dumps(to_json(order)),  # for who finds the run by its Job
                **({"QUANTKIT_STATE": f"{MOUNT}/{self._run_id}"} if bucket else {}),
                "UV_EXTRA_INDEX_URL": "https://abetlen.github.io/llama-cpp-python/whl/cpu",
                "UV_INDEX_STRATEGY": "unsafe-best-match",
                "OMP_WAIT_POLICY": "PASSIVE",
                "TOKENIZERS_PARALLELISM": "false",
                "PYTHONUNBUFFERED": "1",
            },
            bucket=bucket,
            mount_path=MOUNT,
        )
        job = jobs.start(asked, self._run_id, self._token)
        price = f" at ${order.usd_per_hour:.2f} an hour" if order.usd_per_hour else ""
        self._events.emit(
            None,
            "note",
            f"Job {job.id} on {order.machine}{price}, stopped after {order.hours} h at the latest",
        )
        return job

    def _planned(self, config: RunConfig) -> Order:
        """How to do a run that was found by its Job, which did not say for how long it may take."""
        from quantkit.planning.plan import make_plan  # much, for a process that listens

        self._events.emit(None, "note", "planning again: the Job did not say what it may take")
        plan = make_plan(dataclasses.replace(config, device="cpu"))
        offered = HfJobs().offers(plan, self._token)
        return choose(offered, self._order.machine or "auto").order

    def _wait_for_machine(self) -> None:
        assert self._job is not None
        if self._job.stage == jobs.WAITING:
            self._events.emit(None, "note", f"waiting for a {self._job.machine} machine")
        while self._job.stage == jobs.WAITING:
            time.sleep(_POLL_SECONDS)
            self._job = jobs.look(self._job, self._token)

    def _listen_to_the_end(self) -> jobs.RemoteJob:
        """Listen until the Job has ended and everything it said was heard.

        A connection that is cut just before the end looks like the end: the log of a Job that has
        ended is read again until it says how the run ended, or has been read a few times.
        """
        assert self._job is not None
        job, n_tries, n_reads = self._job, 0, 0
        while True:
            was_over = job.has_ended
            try:
                self._listen(job)
            except QuantkitError as error:
                n_tries += 1
                if n_tries > _TRIES:
                    raise
                self._events.emit(None, "note", f"listening again: {error.message}")
                time.sleep(_POLL_SECONDS * n_tries)
            n_reads += was_over
            job = jobs.look(job, self._token)
            if job.has_ended and (self._outcome() is not None or n_reads == _READS_AFTER_THE_END):
                return job
            time.sleep(_POLL_SECONDS)

    def _outcome(self) -> str | None:
        """How the run ended, by what was heard: finished, failed, or None."""
        return outcome(read_events(self._dir.events_path)[0])

    def _listen(self, job: jobs.RemoteJob) -> None:
        """Take in everything that the Job prints. What was heard before is skipped."""
        listener = Listener()
        n_heard = self._heard.get(job.id, 0)
        # Output is replayed from its beginning: the log file is of one Job, and written anew.
        n_left = _MOST_LOG
        with (self._dir.path / REMOTE_LOG_FILE).open("w", encoding="utf-8") as log:
            for line in jobs.lines(job, self._token):
                said = listener.hear(line.rstrip("\n"))
                if isinstance(said, SentEvent):
                    if said.number >= n_heard:
                        self._take(job, said)
                        n_heard = self._heard[job.id] = said.number + 1
                elif isinstance(said, SentFile):
                    assert said.path in RESULTS
                    with replacing(self._dir.path / said.path) as partial:
                        partial.write_bytes(said.data)
                elif said is not None and n_left > 0:
                    text = shortened(hub.scrub(said, self._token), _LONGEST_LINE)
                    n_left -= len(text) + 1
                    log.write(f"{text}\n" if n_left > 0 else "[the rest is omitted]\n")
                    log.flush()

    def _take(self, job: jobs.RemoteJob, said: SentEvent) -> None:
        """Write down what a Job says has happened, but for what comes after more than any run
        says.
        """
        data = {**said.event.data, "at": [job.id, said.number]}
        self._events.append(dataclasses.replace(said.event, data=data), MOST_EVENT_BYTES)

    def _watch_machine(self) -> None:
        """Note how busy the machine is and what it has cost, until the Job has ended."""
        assert self._job is not None
        while not self._ended.wait(_METRICS_SECONDS):
            try:
                job = jobs.look(self._job, self._token)
            except QuantkitError:
                continue
            load = jobs.load(job, self._token)
            with self._telling:
                if not self._ended.is_set():
                    self._tell_machine(job, load)

    def _tell_machine(self, job: jobs.RemoteJob, load: jobs.MachineLoad | None = None) -> None:
        price = self._order.usd_per_hour
        state = RemoteState(
            job=job.id,
            url=job.url,
            machine=job.machine,
            stage=job.stage,
            run_seconds=job.run_seconds,
            usd=None if price is None else round(price * job.run_seconds / 3600, 4),
            metrics=load,
        )
        write_json(self._dir.path / MACHINE_FILE, state)

    def _end(self, job: jobs.RemoteJob) -> int:
        """Say how the Job ended when the run itself did not."""
        outcome = self._outcome()
        if outcome == "finished" and job.stage == jobs.COMPLETED:
            return 0
        if outcome != "failed":
            said = f" The Hub says: {hub.scrub(job.message, self._token)}" if job.message else ""
            how = {"CANCELED": "was cancelled", "DELETED": "was deleted"}.get(job.stage, "ended")
            self._events.emit(
                None,
                "failed",
                f"The Job {how} before the run was finished.{said}",
                remedy="Resume it: finished stages are kept if there was a bucket.",
            )
        return 1


if __name__ == "__main__":
    secrets.hide()
    sys.exit(main(sys.argv))
