"""All requests to the Hub: which token, which URL, how long to wait, how often to try.

Every request goes through `call`, which retries what may pass and turns the rest into sentences.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import httpx2
from huggingface_hub import HfApi, get_session, get_token, hf_hub_url, set_client_factory
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from quantkit import __version__
from quantkit.errors import QuantkitError
from quantkit.hub.errors import (
    CAUGHT,
    Asked,
    endpoint,
    is_transient,
    retry_after,
    tame,
    translate,
)
from quantkit.sandbox import secrets

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Seconds between tries. A person waits for the first; a long transfer may take the second.
QUICK = (0.5, 2.0)
PATIENT = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
_LONGEST_PAUSE = {QUICK: 5.0, PATIENT: 300.0}  # a longer Retry-After is reported, not waited for

# Seconds without a byte. huggingface_hub sets none for most requests and would wait forever.
_SECONDS = {"connect": 15.0, "read": 20.0, "write": 60.0, "pool": 60.0}
_SECONDS_TO_WRITE = {**_SECONDS, "read": 120.0}  # a commit of large files is answered late


def resolve_token() -> str | None:
    """Return the token of the person this process works for; None: anonymous.

    QUANTKIT_HF_TOKEN first: a launcher sets it in a worker's environment to the token of the
    visitor who started the run (empty: anonymous). On a Space nothing else counts, because
    HF_TOKEN and a cached login belong to the Space's owner there. Elsewhere: what huggingface_hub
    itself would use (HF_TOKEN, then `hf auth login`).
    """
    given = secrets.get("QUANTKIT_HF_TOKEN")
    if given is not None:
        return given.strip() or None
    if os.environ.get("SYSTEM") == "spaces":
        return None
    named = secrets.get("HF_TOKEN") or secrets.get("HUGGING_FACE_HUB_TOKEN") or ""
    return named.strip() or get_token()


def hf_api(token: str | None) -> HfApi:
    """Return the API for one token. None is anonymous: huggingface_hub's own fallbacks are not
    used.
    """
    _limit_waiting()
    return HfApi(
        endpoint=endpoint(),
        token=token or False,
        library_name="quantkit",
        library_version=__version__,
    )


@cache
def _limit_waiting() -> None:
    """Make huggingface_hub's shared HTTP client, and those that follow it, end every wait."""

    def limit(request: httpx2.Request) -> None:
        limits = _SECONDS if request.method in ("GET", "HEAD") else _SECONDS_TO_WRITE
        asked = request.extensions.get("timeout", {})
        timeout = {name: asked.get(name) or seconds for name, seconds in limits.items()}
        request.extensions = {**request.extensions, "timeout": timeout}

    hooks = get_session().event_hooks
    hooks = {
        "request": [*hooks["request"], limit],
        "response": [tame, *hooks.get("response", [])],
    }
    set_client_factory(
        lambda: httpx2.Client(event_hooks=hooks, follow_redirects=True, timeout=None)
    )


def call(
    action: Callable[[], T],
    asked: Asked,
    token: str | None,
    waits: tuple[float, ...] = QUICK,
) -> T:
    """Return the result of `action`, tried again after each of `waits` while the error looks
    temporary.

    Raises QuantkitError with one sentence and a remedy.
    """
    _limit_waiting()
    for wait in (*waits, None):
        try:
            return action()
        except QuantkitError:
            raise
        except CAUGHT as error:
            pause = max(wait or 0.0, retry_after(error))
            if wait is None or not is_transient(error) or pause > _LONGEST_PAUSE.get(waits, 60.0):
                raise translate(error, asked, token) from None
            logger.info("%s; trying again in %.0f s", translate(error, asked, token).message, pause)
        time.sleep(pause)
    raise AssertionError("unreachable: the last try returns or raises")


def read_start(
    repo_id: str, sha: str, path: str, n_bytes: int, token: str | None, skip: int = 0
) -> bytes:
    """Read up to `n_bytes` of a file on the Hub from byte `skip` on, never more, whatever it
    sends.
    """
    url = hf_hub_url(repo_id, path, revision=sha, endpoint=endpoint())
    headers = build_hf_headers(
        token=token or False,
        library_name="quantkit",
        library_version=__version__,
        headers={"Range": f"bytes={skip}-{skip + n_bytes - 1}", "Accept-Encoding": "identity"},
    )

    def read() -> bytes:
        data = bytearray()
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            start = 0 if response.status_code == 206 else skip  # a server may ignore ranges
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= start + n_bytes:
                    break
        return bytes(data[start : start + n_bytes])

    return call(read, Asked(repo_id, sha), token)


def is_public(url: str) -> bool:
    """Return whether anybody gets what lies at an address of the Hub, which is asked once and not
    waited for: it counts as public when there is no answer.
    """
    _limit_waiting()
    try:
        headers = build_hf_headers(token=False)
        answer = get_session().head(url, headers=headers, follow_redirects=False)
    except CAUGHT:
        return True
    return answer.status_code not in (401, 403, 404)


def why_offline(token: str | None) -> str | None:
    """Return None when the Hub answers a small question at once, else a clause that says why
    not.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "the Hub is switched off here"
    try:
        call(lambda: hf_api(token).repo_exists("datasets/none"), Asked(), token, waits=())
    except QuantkitError as error:
        return f"the Hub does not answer ({error.message.rstrip('.')})"
    return None
