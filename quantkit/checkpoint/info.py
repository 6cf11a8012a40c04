"""Find out what a model is from its file list, config and headers, and refuse what is no language
model.

Everything here is decided before a weight is downloaded, and is the same for the Hub and a folder.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from quantkit.checkpoint.quantized import Expanded
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.checkpoint.weight_files import INDEX, SINGLE, shown
from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Settings

_MAX_SMALL_BYTES = 200_000_000  # tokenizers reach 40 MB; more is data that happens to lie there
_SMALL = re.compile(
    r"[^/]+\.(json|jinja|txt|model|tiktoken|bpe)|tokenizer\.model\.v\d+"
    r"|(README|LICENSE|LICENCE|NOTICE)[^/]*|additional_chat_templates/[^/]+\.jinja",
    re.IGNORECASE,
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl", ".npz")


@dataclass(frozen=True)
class RepoFile:
    """A file of a repository. `sha256` is known for large (LFS) files and for local ones."""

    path: str
    n_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Everything known about a model without its weights. Saved as JSON by the fetch stage."""

    kind: str  # "hub" or "local"
    id: str  # owner/name as the Hub spells it; a local folder's name
    revision: str | None  # as asked for
    sha: str  # commit of the Hub, or sha256 over the local files' names and contents
    files: tuple[RepoFile, ...]  # those that are downloaded: weights, tokenizer, config, texts
    weights: tuple[str, ...]  # names of the safetensors files, in order
    n_download_bytes: int
    architectures: tuple[str, ...]
    model_type: str
    n_parameters: int
    n_by_dtype: dict[str, int]  # stored dtype (BF16, F8_E4M3, ...) -> parameters
    dtype: str | None  # that of most weights, whatever the config says
    config: Settings
    quantization: Settings | None  # quantization_config of the config
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    gated: bool = False
    private: bool = False
    is_adapter: bool = False
    pipeline_tag: str | None = None
    base_model: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    card: Settings = field(default_factory=Settings)  # the YAML at the top of README.md
    local_path: str | None = None
    base: ModelInfo | None = None  # of an adapter: the model that it is merged onto
    notes: tuple[str, ...] = ()  # where weights and config disagree and the weights decided


def name_of(folder: Path) -> str:
    """Return what the model in a folder is called; in the Hub's cache it is `owner/name`."""
    folder = folder.absolute()
    repo = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repo.startswith("models--"):
        return repo.removeprefix("models--").replace("--", "/", 1)
    return folder.resolve().name


def is_small_file(file: RepoFile) -> bool:
    """Return whether the file is wanted beside the weights: config, tokenizer, template, card."""
    return (
        _SMALL.fullmatch(file.path) is not None
        and file.path.isprintable()  # of bytes that are no UTF-8 there is no record
        and file.n_bytes <= _MAX_SMALL_BYTES
        and not file.path.endswith(".index.json")  # the one in use is added by name
    )


def count_parameters(tensors: Iterable[StoredTensor | Expanded]) -> dict[str, int]:
    """Return the parameters per dtype, commonest first."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    return dict(counts.most_common())


def is_adapter(paths: Iterable[str]) -> bool:
    """Return whether this is a PEFT adapter and not a whole model with one."""
    present = set(paths)
    return "adapter_config.json" in present and not (
        "config.json" in present and (SINGLE in present or INDEX in present)
    )


def refuse_by_files(
    model: str, paths: Sequence[str], library: str | None, bases: Sequence[str]
) -> None:
    """Raise QuantkitError when the file list alone shows that this cannot be quantized."""
    present = set(paths)
    base = shown(bases[0]) if bases else "the model it was made from"
    has_weights = SINGLE in present or INDEX in present
    if "model_index.json" in present or library == "diffusers":
        raise QuantkitError(
            f"{model} is a diffusers pipeline (images, video or sound), not a language model.",
            "Give the id of a causal language model.",
        )
    if not has_weights:
        _refuse_weights(model, paths, base)
    if "config.json" not in present:
        raise QuantkitError(
            f"{model} has no config.json, so its architecture is unknown.",
            "Use the version of the model that is laid out for transformers.",
        )


def _refuse_weights(model: str, paths: Sequence[str], base: str) -> None:
    """Say why there are no weights to use, and where there may be some."""
    suffixes = {PurePosixPath(path).suffix.lower() for path in paths}
    if ".safetensors" in suffixes:
        raise QuantkitError(
            f"{model} has safetensors files, but no {SINGLE} and no {INDEX}.",
            "Use the version of the model that is laid out for transformers.",
        )
    if ".gguf" in suffixes:
        raise QuantkitError(
            f"{model} holds only GGUF files, which are quantized already.",
            f"Give the original instead: {base}.",
        )
    if suffixes & set(_PICKLED):
        raise QuantkitError(
            f"{model} has no safetensors, only pickled weights, which can run code when loaded.",
            "Convert it to safetensors with https://huggingface.co/spaces/safetensors/convert, or "
            "use a revision that has them.",
        )
    raise QuantkitError(f"{model} has no safetensors weights.", "Give the id of a complete model.")


_CAUSAL = re.compile(
    r"(For(CausalLM|ConditionalGeneration|Generation|TextGeneration|Vision2Seq|ImageTextToText)"
    r"\w*|LMHead\w*|WithLMHead)$"
)
_OTHER_HEAD = re.compile(r"For[A-Z]\w*$|(Encoder|Model|Discriminator|Tower)$")


def refuse_by_config(model: str, config: Settings) -> None:
    """Raise QuantkitError when config.json names something else than a causal language model that
    transformers loads by itself.

    Multimodal models (...ForConditionalGeneration around a text model) pass: the converter takes
    their text model or refuses with its own list of architectures.
    """
    architectures = list(map(shown, config.texts("architectures")))
    model_type = shown(config.text("model_type"))
    if not architectures:
        raise QuantkitError(
            f"The config.json of {model} names no architecture.",
            'Add "architectures": ["...ForCausalLM"] to config.json in a local copy.',
        )
    if config.get("transformers_weights") is not None:
        raise QuantkitError(
            f"The config.json of {model} sets transformers_weights, which makes transformers read"
            f" other files than {SINGLE} or {INDEX}.",
            "Remove it in a local copy, and give the weights their usual names.",
        )
    kind = None
    if config.get("is_encoder_decoder") is True:
        kind = "an encoder-decoder"
    elif not _CAUSAL.search(architectures[0]) and _OTHER_HEAD.search(architectures[0]):
        kind = "an encoder, a classifier or a bare model without a language head"
    if kind is not None:
        raise QuantkitError(
            f"{model} is not a causal language model: {architectures[0]} is {kind}.",
            "Give a model that continues text, such as a ...ForCausalLM one.",
        )
    known = known_model_types()
    if not known or model_type in known:
        return
    if config.get("auto_map"):
        raise QuantkitError(
            f"{model} ({model_type or architectures[0]}) loads only with code from its own "
            "repository, which quantkit never runs.",
            "Use a version of it that transformers supports by itself (often named ...-hf).",
        )
    version = importlib.metadata.version("transformers")
    raise QuantkitError(
        f"transformers {version} does not know this kind of model: {model_type or 'unnamed'}.",
        "Update transformers if a newer one supports it, or choose another model.",
    )


@cache
def known_model_types() -> frozenset[str]:
    """Return the model types that the installed transformers can load; empty when it is not
    installed.

    Read from its source: importing it takes seconds and pulls torch in, which a front end that
    only previews a model must not do.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "auto_mappings.py"
    if source.is_file():
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
                and node.targets[0].id == "CONFIG_MAPPING_NAMES"
                and isinstance(node.value, ast.Call)
            ):
                return frozenset(name for name, _ in ast.literal_eval(node.value.args[0]))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return frozenset(CONFIG_MAPPING_NAMES)
