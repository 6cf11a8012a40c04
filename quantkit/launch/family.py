"""Several sizes of one model: later runs take over what does not depend on the size."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from quantkit.rundir import STAGES, RunDir

# The search is the first stage that asks for the size.
SHARED = STAGES[: STAGES.index("search")]


def share_stages(source: Path, target: Path) -> tuple[str, ...]:
    """Give `target` the finished stages of `source` up to the search, as hard links.

    Returns the names of the stages. A stage whose files were dropped ends the sharing, and what is
    not shared is simply made again.
    """
    theirs, ours = RunDir(source).records(), RunDir(target)
    if ours.records():
        return ()
    shared = []
    for stage in SHARED:
        record = theirs.get(stage)
        if record is None or record.cleaned:
            break
        if not all(RunDir(source).is_whole(output) for output in record.outputs):
            break
        for output in record.outputs:
            _link(source / output.path, target / output.path)
        ours.save_record(record)
        shared.append(stage)
    return tuple(shared)


def _link(source: Path, target: Path) -> None:
    """The same file again; a copy with the same time where there are no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
