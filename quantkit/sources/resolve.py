"""Turn what a user typed as MODEL into a `ModelInfo`, for fetch and plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from quantkit import hub
from quantkit.checkpoint.info import ModelInfo
from quantkit.sources.fit import Fit, check_fit
from quantkit.sources.inspect import inspect
from quantkit.sources.metadata import fetch_adapter, fetch_metadata

# The converter writes the folder's name into the GGUF as the model's name.
DEMO_FOLDER = "SmolLM2-135M-Instruct"


def resolve(
    model: str,
    revision: str | None,
    token: str | None,
    folder: Path,
    making: Callable[[], None] | None = None,
) -> ModelInfo:
    """Return what is known of a model before its weights are there. The demo's checkpoint, which
    no Hub has, is made in `folder`; `making` is called before that.

    Raise QuantkitError for everything that is refused.
    """
    ref = hub.parse_reference(model, revision)
    if ref.is_demo:
        from quantkit.sources import demo  # needs torch

        if making is not None:
            making()
        demo.make_checkpoint(folder / DEMO_FOLDER)
        ref = hub.ModelRef("local", str(folder / DEMO_FOLDER))
    return inspect(ref, token)


def read_headers(info: ModelInfo, token: str | None, folder: Path) -> tuple[Path, Fit]:
    """Bring a model's files without their weights into `folder`, an adapter's put onto its base.
    Return where they lie, and how transformers' loader finds them.

    Raise QuantkitError where transformers would not load the model whole.
    """
    headers = fetch_metadata(info, token, folder / "headers")
    fit = check_fit(headers)
    if info.base is not None:
        from quantkit.sources.lora import merge_shell  # needs torch

        if merge_shell(headers, fetch_adapter(info, token, folder / "adapter")):
            fit = check_fit(headers)
    return headers, fit
