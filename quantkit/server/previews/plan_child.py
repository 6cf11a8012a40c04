"""The planner as a process of its own: everything that a stranger wrote about a model is read here.

    python -m quantkit.server.previews.plan_child CONFIG.json

Tells one JSON object a line: `looked`, the first facts, as soon as they are known; then `plan`, or
`error` with a sentence and a remedy, `needs_token` with a sentence and what to do before, or
`ended` with the limit that was reached.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from quantkit.sandbox import secrets


def main(argv: list[str]) -> int:
    """Plan, and return 0 when a plan was reported, 1 when an error was."""
    secrets.hide()
    from quantkit.checkpoint.info import ModelInfo
    from quantkit.config import RunConfig
    from quantkit.errors import NeedsToken, QuantkitError
    from quantkit.planning.plan import make_plan
    from quantkit.run.folder import read_json
    from quantkit.server.previews.first_look import FirstLook

    def looked(info: ModelInfo) -> None:
        _tell("looked", FirstLook.of(info))

    try:
        _tell("plan", make_plan(RunConfig.from_json(read_json(Path(argv[1]))), looked=looked))
    except NeedsToken as error:
        _tell("needs_token", [error.message, error.step])
        return 1
    except QuantkitError as error:
        _tell("error", [error.message, error.remedy])
        return 1
    except MemoryError:
        _tell("ended", "memory")
        return 1
    except Exception:  # a fault of ours: without a plan the page knows what to say
        logging.exception("a preview failed")
        return 1
    return 0


def _tell(kind: str, value: Any) -> None:
    from quantkit.tensors import to_json

    sys.stdout.write(json.dumps({kind: to_json(value)}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
