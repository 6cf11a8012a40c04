"""The Hugging Face Hub: download, search, publish, Jobs. Only `quantkit.sources` talks
to it besides, through `client`.

`token=None` means anonymous everywhere; `resolve_token()` says whose token a process may use. No
function stores, logs or returns a token. All errors are QuantkitError: one sentence and a remedy.
The work is done in the modules next to this one; what callers need is importable from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from quantkit.hub.changes import Change, RepoChanges, add_to_collection, compare
from quantkit.hub.client import Asked, call, endpoint, hf_api, resolve_token, why_offline
from quantkit.hub.download import (
    Progress,
    cache_dir,
    cached_folder,
    cached_snapshot,
    check_disk,
    damaged_files,
    download,
)
from quantkit.hub.errors import ModelNotFound, scrub
from quantkit.hub.reference import ModelRef, parse_reference
from quantkit.hub.upload import PublishedFile, PublishedRepo, check_write, is_open, publish


@dataclass(frozen=True)
class ModelHit:
    """One answer of the search."""

    id: str
    downloads: int
    likes: int


def search_models(query: str, limit: int = 10, token: str | None = None) -> tuple[ModelHit, ...]:
    """Return the language models whose name fits `query`, most downloaded first.

    Models that also see or hear are filed under another task on the Hub and are asked for too.
    Raises QuantkitError when the Hub does not answer.
    """
    api = hf_api(token)

    def ask(task: str) -> list[ModelHit]:
        found = api.list_models(
            search=query[:100], pipeline_tag=task, sort="downloads", limit=limit
        )
        return [ModelHit(m.id, m.downloads or 0, m.likes or 0) for m in found]

    hits = [
        hit
        for task in ("text-generation", "image-text-to-text")
        for hit in call(partial(ask, task), Asked(), token, waits=())
    ]
    return tuple(sorted(hits, key=lambda hit: -hit.downloads)[:limit])
