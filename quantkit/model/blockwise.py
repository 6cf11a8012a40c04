"""A causal language model cut into embedding, blocks and head, run one block at a time.

Nothing about an architecture is written down here. The model's own forward is run with the blocks'
forwards replaced: in a
*trace* every block passes its input through and notes the other arguments that the model hands it
(masks, rotary tables); in a
*head* run the first block answers with a hidden state from elsewhere, so that the model's own norm,
head, scaling and soft-capping turn it into logits. Between the two, blocks run for real, one at a
time, on whatever device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils import logging

from quantkit.checkpoint.codeless import codeless
from quantkit.checkpoint.quantized import is_stale
from quantkit.checkpoint.weight_files import few, main_dtype, shown, tensors_of
from quantkit.errors import QuantkitError
from quantkit.sandbox.untrusted import Settings

if TYPE_CHECKING:
    from quantkit.model.streaming import StreamedWeights


def load_model(
    folder: Path, dtype: torch.dtype | str = "auto", device: str = "cpu"
) -> PreTrainedModel:
    """Load the checkpoint in `folder` for inference: safetensors only, no remote code, no network.

    Raises QuantkitError when transformers cannot load it, or would draw a weight at random.
    """
    model = from_checkpoint(folder, dtype)
    model.requires_grad_(False)
    return model.eval().to(device)


def from_checkpoint(
    folder: Path, dtype: torch.dtype | str = "auto", **placing: Any
) -> PreTrainedModel:
    """Load the model as transformers does from the checkpoint in `folder`: safetensors only, no
    remote code, no network, and every weight from the files. `placing` goes to `from_pretrained`.

    Raises QuantkitError when transformers cannot load it, or would draw a weight at random.
    """
    logging.disable_progress_bar()  # it would write over the run's own lines
    with refusals_told(), codeless(folder) as plain:
        kind, config = class_of(plain)
        model, report = kind.from_pretrained(
            plain,
            config=config,
            trust_remote_code=False,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            **placing,
        )
    check_loaded(report["missing_keys"], [name for name, *_ in report["mismatched_keys"]])
    loaded: PreTrainedModel = model
    return loaded


def empty_model(folder: Path) -> PreTrainedModel:
    """Make the model of a config without weights: names and shapes (device `meta`).

    Raises QuantkitError when transformers cannot make it.
    """
    with refusals_told(), codeless(folder) as plain, torch.device("meta"):
        kind, config = class_of(plain)
        return kind.from_config(config, trust_remote_code=False)


def check_loaded(missing: Iterable[str], mismatched: Iterable[str] = ()) -> None:
    """Raise QuantkitError for weights that the checkpoint does not give: transformers draws them at
    random. Those that it has beside are known from the headers (`quantkit.sources.fit`).
    """
    lacking = sorted({*missing, *mismatched})
    if lacking:
        raise QuantkitError(f"The checkpoint lacks {few(lacking)}.", "Use another revision.")


def class_of(folder: Path) -> tuple[Any, Any]:
    """Return the auto class that loads the checkpoint in `folder`, and its config. Of the models
    that also see, transformers lists some as language models and some not.

    Fine-tunes are saved with what their training asked for. Here a model gives logits alone (a
    router's are read off modules that do not run when it is traced), in its usual kind of answer,
    by the attention that this transformers has. The type is that of most weights, and where none is
    quantized the config does not say otherwise.
    """
    tensors = {name: tensor for name, (_, tensor) in tensors_of(folder).items()}
    settings = Settings.parse((folder / "config.json").read_bytes(), "config.json")
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        for name in ("output_router_logits", "output_hidden_states", "output_attentions"):
            if getattr(part, name, False):
                setattr(part, name, False)
        part.return_dict = True
        part._attn_implementation = None
        if is_stale(settings, tensors) and hasattr(part, "quantization_config"):
            del part.quantization_config
    dtype = main_dtype(tensors.values())
    if dtype is not None:
        config.dtype = getattr(torch, dtype)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText)
    return next((k for k in kinds if type(config) in k._model_mapping), kinds[0]), config


@contextmanager
def refusals_told(what: str = "model") -> Iterator[None]:
    """Turn transformers' errors into sentences for people. A config can make it raise anything."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise QuantkitError(
            f"transformers cannot load this {what}: {shown((lines or [type(error).__name__])[0])}",
            "It must be a causal language model that loads without remote code.",
        ) from error


def compute_dtype(device: str) -> torch.dtype:
    """Return bfloat16 where the device multiplies it faster than float32, else float32."""
    if device != "cpu" or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's tokenizer, without remote code or network. Raises QuantkitError."""
    with refusals_told("tokenizer"), codeless(folder) as plain:
        _check_tokenizer_class(plain)
        return AutoTokenizer.from_pretrained(plain, local_files_only=True, trust_remote_code=False)


def _check_tokenizer_class(folder: Path) -> None:
    """Raises ValueError for a class that transformers lacks where nothing but that class says how
    the vocabulary is used: transformers would take another and give other tokens.
    """
    path = folder / "tokenizer_config.json"
    if (folder / "tokenizer.json").exists() or not path.exists():
        return
    settings = json.loads(path.read_bytes())
    name = settings.get("tokenizer_class") if isinstance(settings, dict) else None
    if isinstance(name, str) and tokenizer_class_from_name(name) is None:
        raise ValueError(f"it has no {shown(name)}, and there is no tokenizer.json")


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block, beside the hidden state.

    `shared` names the arguments in which blocks leave tensors for later blocks (Gemma 4: keys and
    values): one mapping for all calls of a trace, empty before the first block.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shared: tuple[str, ...] = ()

    def with_shared_kv(self, shared_kv: SharedKV) -> BlockCall:
        """Return the same call with the keys and values that earlier blocks left; this block adds
        its own.
        """
        return replace(self, kwargs=self.kwargs | dict.fromkeys(self.shared, shared_kv))


SharedKV = dict[str, tuple[torch.Tensor, ...]]  # by the names that the blocks give them


class BlockwiseModel:
    """A model whose blocks can be run one at a time.

    With `weights` they are streamed: a block has weights while it runs, or as long as it is held.
    Hidden states are (batch, n_tokens, n_embd), ids (batch, n_tokens).
    """

    def __init__(self, model: PreTrainedModel, weights: StreamedWeights | None = None) -> None:
        self.model = model
        self.blocks_name, blocks = find_blocks(model)
        self.blocks: list[nn.Module] = list(blocks)
        # Where it computes, wherever its tables of the vocabulary lie.
        self.device: torch.device = next(model.get_input_embeddings().parameters()).device
        self._weights = weights
        self._held: set[int] = set()
        self._prepare: Callable[[int], None] | None = None
        if weights is not None:  # the model's own forward holds blocks, too
            for index, block in enumerate(self.blocks):
                block.forward = self._holding_forward(index, block.forward)
        self._returns_tuple = self._probe_returns()

    @property
    def is_streamed(self) -> bool:
        return self._weights is not None

    @property
    def embedding_name(self) -> str:
        """The module that looks tokens up."""
        table = self.model.get_input_embeddings()
        return next(name for name, module in self.model.named_modules() if module is table)

    def is_held(self, index: int) -> bool:
        """Return whether block `index` has weights now."""
        return self._weights is None or index in self._held

    @contextmanager
    def holding(self, index: int) -> Iterator[None]:
        """Keep the weights of block `index` for as long as the context lasts."""
        if self._weights is None or self.is_held(index):
            yield
            return
        self._weights.bring(index)
        self._held.add(index)
        try:
            if self._prepare is not None:
                self._prepare(index)
            yield
        finally:
            self._held.discard(index)
            self._weights.drop(index)

    def prepare_with(self, prepare: Callable[[int], None]) -> None:
        """Call `prepare` for every block that has weights now, and for those that are streamed
        whenever theirs have come.
        """
        self._prepare = prepare
        for index in range(len(self.blocks)):
            if self.is_held(index):
                prepare(index)

    def text_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return what takes part when text is read: not what sees or hears."""
        stack = self.blocks_name.rpartition(".")[0]
        parts = (self.model.get_submodule(stack), self.model.get_output_embeddings())
        read = {id(parameter) for part in parts for parameter in part.parameters()}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in read:
                yield name, parameter

    def block_of(self, parameter: str) -> int | None:
        """Return the block that a parameter belongs to; None for one outside of blocks."""
        if not parameter.startswith(self.blocks_name + "."):
            return None
        return int(parameter.removeprefix(self.blocks_name + ".").split(".", 1)[0])

    def weight(self, parameter: str) -> torch.Tensor:
        """Return a parameter's values; those of a streamed block are read from the checkpoint."""
        block = self.block_of(parameter)
        with nullcontext() if block is None else self.holding(block):
            return self.model.get_parameter(parameter).data

    def _holding_forward(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self.holding(index):
                return forward(*args, **kwargs)

        return run

    def block_name(self, index: int) -> str:
        return f"{self.blocks_name}.{index}"

    @contextmanager
    def _forwards(self, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
        """Replace every block's forward by `make(index)` for a while."""
        before = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = make(index)
        try:
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                _restore_forward(block, own)

    def _answer(self, index: int, hidden: torch.Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    def _probe_returns(self) -> bool:
        """Whether blocks return tuples: asked of the first block with two tokens."""
        found: list[bool] = []
        first = self.blocks[0]
        original, own = first.forward, first.__dict__.get("forward")

        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            found.append(isinstance(answer, tuple))
            raise _Probed

        first.forward = ask
        try:
            ids = torch.zeros((1, 2), dtype=torch.long, device=self.device)
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except _Probed:
            pass
        finally:
            _restore_forward(first, own)
        return found[0]

    @torch.no_grad()
    def trace(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[BlockCall]]:
        """Embed `ids`, and return the first block's hidden state and the model's calls of its
        blocks.
        """
        calls: dict[int, BlockCall] = {}
        embedded: list[torch.Tensor] = []

        def make(index: int) -> Callable[..., Any]:
            def note(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                if index == 0:
                    embedded.append(hidden)
                shared = tuple(
                    n for n, v in kwargs.items() if isinstance(v, MutableMapping) and not v
                )
                calls[index] = BlockCall(args, kwargs, shared)
                return self._answer(index, hidden)

            return note

        with self._forwards(make):
            self._base()(input_ids=ids, use_cache=False)
        return embedded[0], [calls[index] for index in range(len(self.blocks))]

    def run_block(self, index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        """Return the hidden state after block `index`."""
        answer = self.blocks[index](hidden, *call.args, **call.kwargs)
        return answer[0] if isinstance(answer, tuple) else answer

    def head_with_grad(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (batch, n_tokens, n_vocab) of the last block's hidden state, by the
        model's own norm and head.
        """

        def make(index: int) -> Callable[..., Any]:
            def answer(_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                return self._answer(index, hidden)

            return answer

        # The embedded input only carries shape and position, so any ids will do.
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with self._forwards(make):
            return self.model(input_ids=ids, use_cache=False).logits

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Do `head_with_grad` for inference."""
        return self.head_with_grad(hidden)

    def head_linears(self) -> dict[str, nn.Module]:
        """Return the output head by name, when it is a linear layer."""
        head = self.model.get_output_embeddings()
        return {
            name: m
            for name, m in self.model.named_modules()
            if m is head and isinstance(m, nn.Linear)
        }

    def head_input(self, hidden: torch.Tensor) -> None:
        """Run the last block's hidden state up to the head, whose hooks see its input; no logits
        are made.
        """
        (head,) = self.head_linears().values()

        def stop(_: torch.Tensor) -> torch.Tensor:
            raise _Probed

        head.forward = stop
        try:
            self.head(hidden)
        except _Probed:
            pass
        finally:
            del head.forward

    def _base(self) -> nn.Module:
        """The model without its head, where the architecture separates them."""
        return self.model.base_model


def _restore_forward(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """Put back a forward of the module's own, or its class's."""
    if own is None:
        del module.forward
    else:
        module.forward = own


class _Probed(Exception):
    """Leaves the model's forward once the first block has answered."""


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the stack of decoder blocks: the module list of the text model that is as long as the
    config says.
    """
    config = model.config.get_text_config()
    n_layers = getattr(config, "num_hidden_layers", None) or getattr(config, "n_layer", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers and "vision" not in name:
            return name, module
    raise QuantkitError(
        f"The decoder blocks of {type(model).__name__} were not found.",
        "This architecture is not supported yet: please open an issue with the model's id.",
    )
