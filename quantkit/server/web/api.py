"""The documented API endpoints: what a run would take, and what can be done with runs.

For gradio_client, plain HTTP and agents. A caller is known by its `key`: `start_job` returns one,
and it is given to the other calls. On a Space a caller signs in with its Hub token instead: in the
header Authorization, or as `oauth_token` of a call over HTTP.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from quantkit.errors import NeedsToken, QuantkitError, UsageError
from quantkit.hub import jobs
from quantkit.server.executors.protocol import Offer
from quantkit.server.runs.request import RunForm, models_of, to_config
from quantkit.server.web import view, words
from quantkit.server.web.form_handlers import Client, checked_token
from quantkit.server.web.handlers import Handlers
from quantkit.server.web.words import Audience
from quantkit.tensors import to_json

logger = logging.getLogger(__name__)
T = TypeVar("T")


def add_endpoints(handlers: Handlers) -> frozenset[str]:
    """Register the endpoints with the Blocks under construction. Return their names."""

    audience = words.of_api(handlers.store.public)
    told = functools.partial(_told, audience)

    def caller(
        key: str, request: gr.Request, profile: gr.OAuthProfile | None, given: gr.OAuthToken | None
    ) -> tuple[Client, str]:
        """Return the caller, who is a signed-in user, the owner of a Hub token, the holder of a key
        or nobody known; and the token, empty without one. Raises QuantkitError.
        """
        client = handlers.client(request, profile)
        token = checked_token(given.token if given else _bearer(request)) or ""
        key = str(key or "").strip()
        visitor = handlers.visitors.check(key)
        if key and visitor is None:
            raise UsageError("That is not a key.", "Give the one that start_job returned.")
        if client.username is None and handlers.on_space and token:
            name = jobs.account(token)
            return Client(f"hf:{name}", name, client.address), token
        if client.username is None and visitor is not None:
            return Client(f"visitor:{visitor}", None, client.address), token
        return client, token

    def known(
        key: str, request: gr.Request, profile: gr.OAuthProfile | None, given: gr.OAuthToken | None
    ) -> tuple[Client, str, str]:
        """Return the caller, its owner's name of runs and the token. Raises QuantkitError for
        nobody.
        """
        client, token = caller(key, request, profile, given)
        if client.owner is None:
            if handlers.sign_in:
                raise NeedsToken("No token was sent.")
            raise UsageError("No key was given.", "Give the one that start_job returned.")
        return client, client.owner, token

    @told
    def estimate(
        request: gr.Request,
        model: str,
        size: str = "",
        like: str = "Q4_K_M",
        bpw: float = 0.0,
        profile: str = "standard",
        revision: str = "",
        memory: str = "",
        context: int = 8192,
        family: str = "",
        levels: str = "",
        machine: str = "here",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Return what a run would take, before anything runs: architecture, license, sizes, time,
        disk; and the machines elsewhere that it fits on, each with time, price and limit.

        Args:
            model: owner/name on the Hugging Face Hub, its URL, or demo:smollm2-135m.
            size: bytes of the whole file, such as 5.5GB; empty to use bpw or like.
            like: the stock mix whose size is the limit, such as Q4_K_M.
            bpw: bits per weight of the whole file, such as 4.5; 0 to use size or like.
            profile: how much work to spend: demo, fast, standard or thorough.
            revision: branch, tag or commit of the model; empty for its main branch.
            memory: for the file and its context, such as 8GB, gpu-8gb or mac-16gb; empty: no limit.
            context: tokens of context that have to fit, too.
            family: stock mixes with commas, such as Q3_K_M,Q4_K_M: a file of each one's size.
            levels: types to choose from with commas, such as Q4_K,Q6_K; empty for the profile's.
            machine: here, or auto or a name for a Hugging Face Job, billed to the caller.
        """
        form = RunForm(
            model,
            _kind(memory, size, bpw, family),
            like,
            size,
            bpw,
            memory,
            context,
            family=_listed(family),
            levels=_listed(levels),
            profile=profile,
            revision=revision,
            machine=machine,
        )
        to_config(form, handlers.store.public)  # what is wrong is said before it is counted
        client, secret = caller("", request, user, token)
        handlers.allow("preview", client)
        plan, offers, chosen = handlers.estimate(form, secret or None, client)
        told = {"offers": [_offer(o) for o in offers], "offer": chosen and _offer(chosen)}
        return {**to_json(plan), **told}

    @told
    def start_job(
        request: gr.Request,
        model: str,
        size: str = "",
        like: str = "Q4_K_M",
        bpw: float = 0.0,
        profile: str = "standard",
        revision: str = "",
        calibration: str = "auto",
        seed: int = 0,
        memory: str = "",
        context: int = 8192,
        family: str = "",
        levels: str = "",
        compare: str = "",
        machine: str = "here",
        publish: str = "",
        visibility: str = "model",
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Start turning a model into a GGUF. Returns the job's id and the key for later calls, and
        of a Hugging Face Job its machine, price and limit.

        Args:
            model: owner/name on the Hugging Face Hub, its URL, or demo:smollm2-135m.
            size: bytes of the whole file, such as 5.5GB; empty to use bpw or like.
            like: the stock mix whose size is the limit, such as Q4_K_M.
            bpw: bits per weight of the whole file, such as 4.5; 0 to use size or like.
            profile: how much work to spend: demo, fast, standard or thorough.
            revision: branch, tag or commit of the model; empty for its main branch.
            calibration: calibration texts, name[:weight],...; auto chooses.
            seed: seed of the search.
            memory: for the file and its context, such as 8GB, gpu-8gb or mac-16gb; empty: no limit.
            context: tokens of context that have to fit, too.
            family: stock mixes with commas, such as Q3_K_M,Q4_K_M: a file of each one's size.
            levels: types to choose from with commas, such as Q4_K,Q6_K; empty for the profile's.
            compare: repositories or files on the Hub to measure beside it, with commas.
            machine: here, or auto or a name for a Hugging Face Job, billed to the caller.
            publish: owner/name on the Hub to upload the result to; empty for none.
            visibility: model (private if that is private or gated), private or public.
            key: the key of an earlier answer, to keep jobs together; empty for a new one.
        """
        form = RunForm(
            model,
            _kind(memory, size, bpw, family),
            like,
            size,
            bpw,
            memory,
            context,
            family=_listed(family),
            levels=_listed(levels),
            profile=profile,
            revision=revision,
            calibration=calibration,
            seed=seed,
            publish=publish,
            visibility=visibility,
            machine=machine,
            compare=compare,
        )
        client, secret = caller(key, request, user, token)
        if client.owner is None and not handlers.sign_in:
            key = handlers.visitors.new_key()
            client = Client(f"visitor:{handlers.visitors.check(key)}", None, client.address)
        if len(models_of(model)) > 1:
            raise UsageError("Those are several models.", "Start a job for each.")
        (job_id,) = handlers.start(form, secret, client)
        run = handlers.store.view(job_id, client.owner)
        price, hours = run.usd_per_hour, run.hours
        most = round(price * hours, 2) if price is not None and hours is not None else None
        paid = {"usd_per_hour": price, "hours": hours, "most_usd": most}
        return {"job_id": job_id, "key": key, "machine": run.machine, **paid}

    @told
    def job_status(
        request: gr.Request,
        job_id: str,
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Return a job's progress: its state, its nine stages, the addresses of its files, and the
        report when there is one.

        Args:
            job_id: as `start_job` returned it.
            key: as `start_job` returned it.
        """
        client, _ = caller(key, request, user, token)
        run = audience.run_of(handlers.store.view(job_id, client.owner))
        job = to_json(run)
        job["job_id"] = job.pop("id")
        job["job"] = job.pop("remote")  # as clients have known it
        for file in job["files"]:
            file["url"] = view.file_url(run, file["name"])
        for left_out in ("log", "allocation", "card", "curve", "percent"):
            job.pop(left_out)
        return _without_paths(job)

    @told
    def list_jobs(
        request: gr.Request,
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> list:
        """Return the caller's jobs, newest first: job_id, model, sizes, profile, state, stage.

        Args:
            key: as `start_job` returned it.
        """
        _, owner, _ = known(key, request, user, token)
        return [
            {
                **{"job_id": run.id, "model": run.model, "target": run.target},
                **{"profile": run.profile, "state": run.state, "created": run.created},
                **{"stage": run.current, "percent": run.percent, "position": run.position},
            }
            for run in handlers.store.runs(owner)
        ]

    @told
    def resume_job(
        request: gr.Request,
        job_id: str,
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Go on with a job that failed, was interrupted or cancelled, from its finished stages.

        Args:
            job_id: as `start_job` returned it.
            key: as `start_job` returned it.
        """
        client, owner, secret = known(key, request, user, token)
        handlers.allow("start", client)
        handlers.store.resume(job_id, owner, secret or None)
        return {"job_id": job_id, "state": handlers.store.view(job_id, owner).state}

    @told
    def publish_job(
        request: gr.Request,
        job_id: str,
        repo: str = "",
        visibility: str = "model",
        collection: str = "",
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Upload the files of a finished job to a repository of the Hub, with its card and report.

        Args:
            job_id: as `start_job` returned it.
            repo: owner/name; empty: that of the last time, else MODEL-GGUF of the caller's.
            visibility: model (private if that is private or gated), private or public.
            collection: the title of one, made if there is none, or the end of its URL; or empty.
            key: as `start_job` returned it.
        """
        client, owner, secret = known(key, request, user, token)
        handlers.publish(job_id, repo, visibility, collection, client, secret)
        return {"job_id": job_id, "state": handlers.store.view(job_id, owner).state}

    @told
    def share_job(
        request: gr.Request,
        job_id: str,
        is_open: bool = True,
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Open a finished job's result to everybody who has its link, or close it again.

        Args:
            job_id: as `start_job` returned it.
            is_open: false to close it.
            key: as `start_job` returned it.
        """
        client, owner, _ = known(key, request, user, token)
        handlers.allow("act", client)
        handlers.store.share(job_id, owner, is_open)
        share = handlers.store.view(job_id, owner).shared
        return {"job_id": job_id, "url": f"shared/{share}" if share else ""}

    @told
    def cancel_job(
        request: gr.Request,
        job_id: str,
        key: str = "",
        user: gr.OAuthProfile | None = None,
        token: gr.OAuthToken | None = None,
    ) -> dict:
        """Stop a job that waits or runs. Finished stages are kept.

        Args:
            job_id: as `start_job` returned it.
            key: as `start_job` returned it.
        """
        _, owner, secret = known(key, request, user, token)
        handlers.store.cancel(job_id, owner, secret or None)
        return {"job_id": job_id, "state": handlers.store.view(job_id, owner).state}

    gr.api(estimate, api_name="estimate", concurrency_limit=16, concurrency_id="preview")
    gr.api(start_job, api_name="start_job", concurrency_limit=8)
    gr.api(job_status, api_name="job_status", concurrency_limit=8)
    others = (cancel_job, list_jobs, resume_job, publish_job, share_job)
    for endpoint in others:
        gr.api(endpoint, api_name=endpoint.__name__, concurrency_limit=8)
    return frozenset(made.__name__ for made in (estimate, start_job, job_status, *others))


def _offer(offer: Offer) -> dict[str, Any]:
    """An offer as JSON, with what it comes to."""
    usd = {"usd": round(offer.usd, 4), "most_usd": round(offer.most_usd, 2)}
    return {**to_json(offer), **usd}


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in str(text).split(",") if part.strip())


def _kind(memory: str, size: str, bpw: float, family: str) -> str:
    """What the size is given as: the first of these that is."""
    given = {"fits": memory, "size": size, "bpw": bpw, "family": family}
    return next((kind for kind, value in given.items() if value), "like")


def _without_paths(value: Any) -> Any:
    """The same with `path` called `file`: what has a `path`, Gradio takes for a file to send."""
    if isinstance(value, dict):
        return {"file" if k == "path" else k: _without_paths(item) for k, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value


def _bearer(request: gr.Request) -> str:
    """The Hub token in the header Authorization; other tokens are a proxy's, and nobody's here."""
    kind, _, token = str(request.headers.get("authorization", "")).partition(" ")
    return token.strip() if kind.lower() == "bearer" and token.strip().startswith("hf_") else ""


def _told(audience: Audience, endpoint: Callable[..., T]) -> Callable[..., T]:
    """The endpoint, with its signature and its words; what goes wrong becomes one sentence."""

    @functools.wraps(endpoint)
    def call(*values: Any) -> T:
        try:
            return endpoint(*values)
        except QuantkitError as error:
            said = f"{error.message} {audience.remedy(error)}".strip()
            raise gr.Error(said, print_exception=False) from None
        except Exception:
            logger.exception("an API call failed")
            raise gr.Error("Something went wrong here. Try again.", print_exception=False) from None

    return call
