"""Explain errors of the Hub in one sentence with a remedy, and say which are worth another try.

Nothing that leaves this module holds a token: every text that came from a library or a server is
scrubbed, and errors are raised `from None`, because the original carries the request's headers.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.utils import parse_ratelimit_headers

from quantkit.errors import NeedsToken, QuantkitError, UsageError, chain_of

# Everything that huggingface_hub and what lies under it raise when the Hub, the network or the
# disk fails. hf_xet reports its errors as RuntimeError.
CAUGHT: tuple[type[Exception], ...] = (
    httpx2.HTTPError,
    httpx2.StreamError,
    OSError,
    ValueError,
    RuntimeError,
    EntryNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

_TRANSIENT_STATUS = (408, 409, 412, 425, 429, 500, 502, 503, 504)
_TOKEN_PATTERN = re.compile(r"hf_(?:oauth|jwt)_[\w.\-]+|\bhf_[A-Za-z0-9]{8,}|(?<=Bearer )\S+")
_ASKED = "quantkit.retry_after"  # in an answer's extensions: the seconds that it asked to wait
_LONGEST_SLEEP = 300  # seconds that huggingface_hub may sleep by itself
_NUMBERS = re.compile(r"\d+")


class ModelNotFound(NeedsToken):
    """No such repository, or the token does not see it."""


@dataclass(frozen=True)
class Asked:
    """The request to the Hub, for the sentence. Without an id or a file it is the Hub as a
    whole.
    """

    repo_id: str = ""
    revision: str | None = None
    writing: bool = False
    thing: str = ""  # what has no id: "the Jobs of alice"

    @property
    def url(self) -> str:
        return f"{endpoint()}/{self.repo_id}"


def endpoint() -> str:
    """Return the Hub's address, read from the environment at each call (huggingface_hub reads it
    once).
    """
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def scrub(text: str, token: str | None = None) -> str:
    """Return `text` without the token and without anything that looks like one."""
    if token:
        text = text.replace(token, "***")
    return _TOKEN_PATTERN.sub("***", text)


def is_transient(error: BaseException) -> bool:
    """Return whether the same request may well succeed a little later."""
    for link in chain_of(error):
        if isinstance(link, OfflineModeIsEnabled):
            return False
        if isinstance(link, HfHubHTTPError):
            return link.response.status_code in _TRANSIENT_STATUS
        if isinstance(link, (httpx2.TransportError, httpx2.StreamError, json.JSONDecodeError)):
            return True
        if isinstance(link, OSError) and "Consistency check failed" in str(link):
            return True
    return False


def retry_after(error: BaseException) -> float:
    """Return the seconds that the Hub asks to wait; 0 when it does not say."""
    for link in chain_of(error):
        if isinstance(link, HfHubHTTPError):
            return float(link.response.extensions.get(_ASKED, 0.0))
    return 0.0


def tame(response: httpx2.Response) -> None:
    """Leave no header of an answer that huggingface_hub would fail over, or sleep for hours for.

    It takes Retry-After for a number, and any number: a proxy may send a date, or anything.
    """
    value = response.headers.pop("Retry-After", None)
    seconds = None if value is None else _seconds(value)
    if seconds is not None:
        response.extensions[_ASKED] = seconds
        response.headers["Retry-After"] = str(math.ceil(min(seconds, _LONGEST_SLEEP)))
    said = response.headers.get("ratelimit", "") + response.headers.get("ratelimit-policy", "")
    is_tame = all(len(number) < 10 for number in _NUMBERS.findall(said))
    limit = parse_ratelimit_headers(response.headers) if is_tame else None
    if limit is None or limit.reset_in_seconds > _LONGEST_SLEEP:
        response.headers.pop("ratelimit", None)
    if limit is not None and response.status_code == 429:
        response.extensions.setdefault(_ASKED, float(limit.reset_in_seconds))


def _seconds(value: str) -> float | None:
    """Of a Retry-After: a number, or a date; None for anything else."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = parsedate_to_datetime(value)
        return max(0.0, when.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, OSError):
        return None


def translate(error: BaseException, asked: Asked, token: str | None) -> QuantkitError:
    """Translate an error into a sentence and a remedy. The caller raises it `from None`."""
    for link in chain_of(error):
        if isinstance(link, HfHubHTTPError):
            return _from_answer(link, asked, token)
        known = _without_answer(link, asked)
        if known is not None:
            return known
    text = " ".join(scrub(str(error), token).split())[:300]
    return QuantkitError(
        f"The request to the Hub failed unexpectedly ({type(error).__name__}: {text}).",
        "Try again; if it keeps happening, please report it with this sentence.",
    )


def _without_answer(error: BaseException, asked: Asked) -> QuantkitError | None:
    """Errors in which the Hub said nothing."""
    if isinstance(error, OfflineModeIsEnabled):
        return QuantkitError(
            "Access to the Hub is switched off here.",
            "Unset HF_HUB_OFFLINE, or give a local folder.",
        )
    if isinstance(error, LocalTokenNotFoundError):
        return NeedsToken("You need to be signed in to the Hub for this.")
    if isinstance(error, HFValidationError):
        return UsageError(f"{asked.repo_id!r} is not a Hub id.", "Write owner/name.")
    if isinstance(error, httpx2.TimeoutException):
        return QuantkitError(
            f"The Hub at {endpoint()} did not answer in time.",
            "Check the network and try again; finished files are kept.",
        )
    if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError)):
        return QuantkitError(
            f"The Hub at {endpoint()} cannot be reached.",
            "Try again. If it lasts, check the network, the proxy and HF_ENDPOINT.",
        )
    if isinstance(error, (httpx2.TransportError, httpx2.StreamError)):
        return QuantkitError(
            "The connection to the Hub was cut.", "Try again; finished files are kept."
        )
    if isinstance(error, json.JSONDecodeError):
        return QuantkitError(
            f"{endpoint()} does not answer like the Hub.",
            "Try again. If it lasts, check the proxy and HF_ENDPOINT.",
        )
    if isinstance(error, ValueError) and "Invalid metadata in README.md" in str(error):
        details = " ".join(str(error).split())
        return QuantkitError(f"The Hub refuses the model card: {scrub(details)}", "Fix README.md.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return QuantkitError(
            "Ran out of disk space while downloading from the Hub.",
            "Free some space, or point HF_HOME to a larger disk.",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return QuantkitError(
            f"{error.filename} cannot be written.",
            "Point HF_HOME to a folder that you can write to.",
        )
    return None


def _from_answer(error: HfHubHTTPError, asked: Asked, token: str | None) -> QuantkitError:
    """Errors in which the Hub answered with a status."""
    status = error.response.status_code
    said = " ".join(scrub(error.server_message or "", token).split())[:300]
    name = asked.repo_id or asked.thing or "the Hub"
    if isinstance(error, GatedRepoError):
        fine = " A fine-grained token needs the permission for gated repositories."
        return NeedsToken(
            f"{name} is gated: you need to accept its terms first.",
            f"Open {asked.url} and click “Agree and access repository”." + (fine if token else ""),
            "Then run again with a token of that account."
            if token
            else "Then set HF_TOKEN or run `hf auth login` with a token of that account.",
        )
    if isinstance(error, DisabledRepoError):
        return QuantkitError(f"{name} was disabled by the Hub.", "Choose another model.")
    if status == 401 and token and _is_bad_token(error):
        return NeedsToken(
            "The Hub does not accept this token: it is wrong, expired or revoked.",
            f"Make a new one at {endpoint()}/settings/tokens.",
            "Then set HF_TOKEN or run `hf auth login`.",
        )
    if isinstance(error, RevisionNotFoundError):
        return QuantkitError(
            f"{name} has no revision {asked.revision or 'main'}.",
            f"Give a branch, tag or commit that {asked.url}/commits/main shows.",
        )
    if isinstance(error, RemoteEntryNotFoundError):
        file = str(error.response.url).rpartition("/")[2].partition("?")[0]
        return QuantkitError(f"{name} has no file {file}.", "Check the revision, or try again.")
    if isinstance(error, RepositoryNotFoundError) or (status == 404 and asked.repo_id):
        return ModelNotFound(
            f"There is no model {name} on the Hub, or it is private and "
            + ("this token does not see it." if token else "no token was given."),
            "Check the spelling.",
            "" if token else "For a private model set HF_TOKEN or run `hf auth login`.",
        )
    return _from_status(status, name, said, error, asked, token)


def _from_status(
    status: int, name: str, said: str, error: HfHubHTTPError, asked: Asked, token: str | None
) -> QuantkitError:
    quoted = f" The Hub says: {said}" if said else ""
    if status == 401:
        return NeedsToken(f"You need to be signed in to read {name}.")
    if status == 402:
        return QuantkitError(
            f"The Hub requires payment for this.{quoted}", "Check your billing settings on the Hub."
        )
    if status == 403:
        verb = "write to" if asked.writing else "read"
        return NeedsToken(
            f"This token has no permission to {verb} {name}.{quoted}"
            if token
            else f"{name} may not be {'written' if asked.writing else 'read'} without a token.",
            "The token needs the permission to write there."
            if asked.writing
            else "The token's account and permissions have to include it.",
            "Use one that has it.",
        )
    if status == 429:
        seconds = retry_after(error)
        when = f"in {seconds:.0f} seconds" if seconds else "in a few minutes"
        return QuantkitError(
            "The Hub's rate limit is reached.",
            f"Try again {when}" + ("." if token else "; with a token the limit is higher."),
        )
    if status in (409, 412):
        return QuantkitError(f"{name} was changed by someone else at the same time.", "Try again.")
    if status >= 500:
        return QuantkitError(
            f"The Hub has a problem of its own (status {status}).",
            "Try again in a few minutes; finished files are kept.",
        )
    return QuantkitError(
        f"The Hub refused the request for {name} (status {status}).{quoted}",
        "Try again; if it keeps happening, please report it with this sentence.",
    )


def _is_bad_token(error: HfHubHTTPError) -> bool:
    """A 401 that is about the token. The Hub also answers 401 where a repository is missing."""
    said = (error.server_message or str(error)).lower()
    return not isinstance(error, RepositoryNotFoundError) or any(
        word in said for word in ("invalid", "expired", "credentials")
    )
