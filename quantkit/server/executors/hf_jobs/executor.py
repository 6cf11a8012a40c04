"""Jobs of Hugging Face as an executor: what they offer, how their runs are started and ended."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping

from quantkit import hub
from quantkit.hub import jobs
from quantkit.planning.nouns import Plan
from quantkit.server.executors.hf_jobs import machines, wheel
from quantkit.server.executors.protocol import Executor, FoundRun, Offer, Order
from quantkit.tensors import to_json

COMMAND: tuple[str, ...] = (sys.executable, "-m", "quantkit.server.executors.hf_jobs.dispatch")
_PRICES_SECONDS = 600.0


class HfJobs(Executor):
    """Runs in a visitor's own account, paid by the minute."""

    name, noun = "hf_jobs", "Job"
    title = "On Hugging Face Jobs, billed to your account"
    is_remote = True
    results_at = (
        "They are in your bucket quantkit-jobs on the Hub. Publish them to download them from"
        " a repository."
    )
    # SIGTERM comes when the server's machine is shut down, too, and the Job has to outlive that.
    cancelled_by = signal.SIGUSR1

    def __init__(self) -> None:
        self._machines: tuple[float, tuple[jobs.Machine, ...]] = (-1e9, ())

    def command(self, order: Order) -> tuple[str, ...]:
        return (*COMMAND, json.dumps(to_json(order)))

    def lacks(self) -> tuple[str, str] | None:
        return wheel.lacks()

    def check(self, token: str | None) -> None:
        jobs.check_token(token)

    def offers(self, plan: Plan, token: str | None) -> tuple[Offer, ...]:
        """Return what the Hub offers and charges, asked of it every ten minutes."""
        asked, known = self._machines
        if time.monotonic() > asked + _PRICES_SECONDS:
            known = jobs.machines(token)
            self._machines = (time.monotonic(), known)
        return machines.offers(plan, known, self.name)

    def end(self, run_id: str, token: str | None) -> None:
        jobs.cancel_all(run_id, jobs.check_token(token or hub.resolve_token()))

    def found(self, token: str) -> tuple[FoundRun, ...]:
        return tuple(
            FoundRun(r.run_id, r.config, r.job.machine or "unknown", r.job.created, r.order)
            for r in jobs.runs(app_labels(os.environ), token)
        )


def app_labels(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what the Jobs of this very server have in common. A label has letters, digits, dashes
    and underscores, at most 100.
    """
    space = environment.get("SPACE_ID", "none")
    label = "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in space)
    return {"app": "quantkit", "space": label[:100]}
