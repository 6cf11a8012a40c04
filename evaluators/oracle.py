"""Compare a GGUF with the model that transformers loads from its author's own files.

transformers (and PEFT, for an adapter) computes in float32; llama.cpp computes with the file. It is
the one comparison that shares nothing with what made the file: not the list of files that were
read, nor the order of rows, nor the merge of an adapter.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluators.agreement import compare_logits
from evaluators.errors import EvaluationError, NotFinite
from evaluators.llama_runtime import Runtime
from evaluators.weights import expand_file

_INSIDE = Runtime(launch=None)  # the caller has made a process for all of this
_OFFLOADED = " by disk offload"


def compare(
    file: str,
    ids: Sequence[int],
    sources: Sequence[Mapping[str, str | None]],
    n_tokens: int,
    scratch: str,
    offloaded: bool,
    offload_bytes: int,
    closer_above: float,
) -> Iterator[dict[str, Any]]:
    """Return KL(transformers || llama.cpp) over the first `n_tokens` of `ids`, as JSON values.

    For a BF16 file llama.cpp rounds activations to the 8 bits that BF16 has, which costs a few
    1e-4: where the KL is above `closer_above`, the file is expanded to F16 and measured again, and
    the last that is yielded counts.

    Args:
        file: the GGUF.
        sources: where the model lies, the best oracle first: `name`, `folder`, and the `adapter`
            that PEFT lays over it, if any. The first that loads and runs is compared with.
        scratch: a folder for the expanded file and offloaded weights.
        offloaded: whether the weights stay on disk, but for `offload_bytes`.

    Yields:
        `oracle`, its name; `passed_over`, a sentence for every source before it; and one of
        `agreement`, an Agreement, with `first`, the first token apart (None: there is none),
        `expanded` to F16 or not, and `not_expanded`, why it was not though it should have been;
        `missing`, names of weights that the checkpoint lacks;
        `error`, why nothing was compared.
    """
    ids = ids[:n_tokens]
    if len(ids) < 2:
        yield {"oracle": "", "passed_over": [], "error": "there are fewer than two tokens"}
        return
    passed_over: list[str] = []
    offload = Path(scratch, "weights") if offloaded else None
    for source in sources:
        name = f"{source['name']}{f'{_OFFLOADED}, {len(ids)} tokens' if offloaded else ''}"
        found = {"oracle": name, "passed_over": passed_over}
        try:
            model, missing = _load(source, offload, offload_bytes)
            if missing:
                yield {**found, "missing": missing}
                return
            logits = _logits(model, ids)
            del model
            gc.collect()
        except Exception as error:  # whatever a strange checkpoint makes transformers raise
            first = (str(error).splitlines() or [""])[0][:300].rstrip(".")
            passed_over.append(f"{name}: {type(error).__name__}: {first}")
            continue
        try:
            for facts in _measured(Path(file), ids, logits, Path(scratch), closer_above):
                yield {**found, **facts}
        except NotFinite:
            yield {**found, "not_finite": True}
        except EvaluationError as error:
            yield {**found, "error": error.message}
        return
    yield {"oracle": "", "passed_over": passed_over, "error": "; ".join(passed_over)}


def _measured(
    file: Path,
    ids: Sequence[int],
    logits: NDArray[np.float32],
    scratch: Path,
    closer_above: float,
) -> Iterator[dict[str, Any]]:
    tokens = np.asarray(ids, np.int32)
    agreement, kl = compare_logits(file, tokens, logits, _INSIDE)

    def facts(expanded: str = "", not_expanded: str = "") -> dict[str, Any]:
        apart = np.flatnonzero(kl > 10 * closer_above)
        return {
            "agreement": asdict(agreement),
            "first": int(apart[0]) if len(apart) else None,
            "expanded": expanded,
            "not_expanded": not_expanded,
        }

    yield facts()
    reason = ""
    for bits in (16, 32) if agreement.mean_kl > closer_above else ():
        larger = scratch / f"f{bits}.gguf"  # the caller's to delete, as the whole folder
        try:
            expand_file(file, larger, _INSIDE, bits)
            agreement, kl = compare_logits(larger, tokens, logits, _INSIDE)
        except NotFinite:
            raise
        except EvaluationError as error:  # no disk for it, or a weight beyond F16
            reason = error.message
        else:
            yield facts(f"F{bits}")
            return
    if reason:
        yield facts(not_expanded=reason)


def _load(
    source: Mapping[str, str | None], offload: Path | None, offload_bytes: int
) -> tuple[Any, list[str]]:
    """The model in float32, and the names of weights that its checkpoint lacks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    folder = str(source["folder"])
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(part, name, False):
                setattr(part, name, False)
    kinds: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)
    kind = next((k for k in kinds if type(config) in k._model_mapping), kinds[0])
    where: dict[str, Any] = {}
    if offload is not None:
        where = {
            "device_map": "auto",
            "max_memory": {"cpu": offload_bytes},
            "offload_folder": offload,
        }
    model, about = kind.from_pretrained(
        folder,
        config=config,
        trust_remote_code=False,
        dtype=torch.float32,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **where,
    )
    missing = sorted(about["missing_keys"])
    adapter = source.get("adapter")
    if adapter and not missing:
        from peft import PeftModel

        if not Path(adapter, "adapter_model.safetensors").is_file():
            raise ValueError("the adapter has no safetensors")
        model = PeftModel.from_pretrained(model, adapter, local_files_only=True)
    return model.eval(), missing


def _logits(model: Any, ids: Sequence[int]) -> NDArray[np.float32]:
    import torch

    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    values: NDArray[np.float32] = logits.float().numpy()
    if not np.isfinite(values).all():
        raise ValueError("its logits are not finite")
    return values
