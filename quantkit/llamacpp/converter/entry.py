"""The code that runs inside the sandbox: llama.cpp's converter and llama.cpp's tokenizer.
quantkit's parent process never imports it.

The converter's own folder and its own `gguf` come before the environment's in sys.path.

    convert              the converter's own main program, with its tensor writer wrapped: for
                         progress, or to leave the tensor data a hole (skeleton), and with the
                         models of added.py
    list_architectures   the architectures that the converter registers with this transformers
    match                which of llama.cpp's pre-tokenizers give the same tokens as the original
"""

from __future__ import annotations

import ctypes
import logging
import runpy
import sys
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluators.sandbox import tell
from quantkit.llamacpp.converter import added, faster, vocabulary
from quantkit.llamacpp.converter.ahead import Ahead, Checked
from quantkit.sandbox.untrusted import Settings

if TYPE_CHECKING:
    from gguf.gguf_writer import GGUFValue

    from quantkit.llamacpp.tokens import Found, NotFound


@dataclass
class Conversion:
    """What is asked for, and whether it has become a probe of an unknown tokenizer."""

    script: str  # the converter's main program
    arguments: Sequence[str]  # its own; the first is the model's folder
    skeleton: bool
    left_out: Collection[str]
    pre: str | None
    probes: Sequence[str]
    is_probe: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.arguments[0])


def convert(**asked: Any) -> None:
    """Run the converter's main program, as a `Conversion` says."""
    job = Conversion(**asked)
    logging.basicConfig(level=logging.INFO)
    wrap_writer(job)
    if (Path(job.script).parent / "conversion" / "base.py").is_file():
        faster.install()
        accept_pre_tokenizer(job)
        add_models(job)
        complete_vocabulary(job)
    sys.argv = [job.script, *job.arguments]
    try:
        runpy.run_path(job.script, run_name="__main__")
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
    if "--mmproj" not in job.arguments and not job.is_probe:
        tell(tokens=compare_tokens(job))


def compare_tokens(job: Conversion) -> Found | NotFound:
    """Compare the tokens of the file that was written with the tokenizer's."""
    try:
        from quantkit.llamacpp.tokens import compare_in
    except AttributeError as error:  # a converter of one's own with another `gguf`
        return {"error": str(error)}
    return compare_in(job.arguments[0], job.arguments[job.arguments.index("--outfile") + 1])


def wrap_writer(job: Conversion) -> None:
    """Replace the last step of the converter's GGUF writer: check that every block is there, report
    the bytes to come, then write them as always but for a look at every number, or only make the
    file as long as it would be.
    """
    import gguf

    write_tensors = gguf.GGUFWriter.write_tensors_to_file

    def write(self: Any, *, progress: bool = False) -> None:
        del progress
        (tensors,) = self.tensors  # one file: the converter was not asked to split
        check_blocks(self.arch, self.kv_data[0], tensors)
        sizes = [tensor.nbytes for tensor in tensors.values()]
        tell(total=sum(sizes))
        if not job.skeleton:
            lazy = {
                name: Checked(name, info.dtype.name, info.tensor)
                for name, info in tensors.items()
                if isinstance(info.tensor, gguf.LazyNumpyTensor)
            }
            for name, tensor in lazy.items():
                tensors[name].tensor = tensor
            Ahead(lazy.values())
            write_tensors(self)
            return
        self.write_ti_data_to_file()
        (file,) = self.fout
        self.write_padding(file, file.tell())
        file.truncate(file.tell() + sum(self.ggml_pad(n, self.data_alignment) for n in sizes))
        self.state = type(self.state).WEIGHTS

    gguf.GGUFWriter.write_tensors_to_file = write  # type: ignore[method-assign]


def check_blocks(arch: str, keys: Mapping[str, GGUFValue], tensors: Collection[str]) -> None:
    """Raise ValueError when the file would lack a whole block, which nothing else notices until the
    model is loaded. Prediction heads (NextN) count as blocks and may be left out; deci has blocks
    that do nothing.
    """
    count = keys.get(f"{arch}.block_count")
    if count is None or arch == "deci" or f"{arch}.nextn_predict_layers" in keys:
        return
    present = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    missing = [i for i in range(count.value) if str(i) not in present]
    if present and missing:
        raise ValueError(f"Block {missing[0]} of {count.value} has no tensors")


def accept_pre_tokenizer(job: Conversion) -> None:
    """Use `job.pre` for a tokenizer that the converter does not know. If that is not given, tell
    the parent how the tokenizer splits the probes, and go on to a skeleton, in whose vocabulary the
    right one can be looked for.
    """
    from conversion.base import TextModel

    recognize = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            if job.pre is not None:
                return job.pre
        probes = job.probes
        plain = [tokenizer.encode(text, add_special_tokens=False) for text in probes]
        # A tokenizer that composes accents first (NFC) is asked for texts where there are none to
        # compose: llama.cpp does not.
        composed = [unicodedata.normalize("NFC", text) for text in probes]
        same = [tokenizer.encode(text, add_special_tokens=False) for text in composed] == plain
        probes = composed if same else probes
        special = [tokenizer.encode(text) for text in probes]
        if len({token for tokens in plain for token in tokens}) < 100:
            # transformers makes an empty tokenizer where the vocabulary is missing
            raise ValueError("the tokenizer has no vocabulary")
        tell(probes=probes, composes=same, plain=plain, special=special)
        job.skeleton = job.is_probe = True
        return "default"

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def complete_vocabulary(job: Conversion) -> None:
    """Put what `vocabulary.py` knows into the keys before the header is written, and tell the
    parent which ends llama.cpp will miss.
    """
    import gguf
    from conversion.base import TextModel

    write_header = gguf.GGUFWriter.write_header_to_file

    def looks_special(text: str) -> bool:
        return bool(TextModel.does_token_look_special(None, text))

    def write(self: Any, path: Path | None = None) -> None:
        gguf.GGUFWriter.write_header_to_file = write_header  # type: ignore[method-assign]
        target = Path(path or self.path)  # the one file that may be written
        tell(missed_ends=vocabulary.complete(self, job.folder, target, looks_special))
        write_header(self, path)

    gguf.GGUFWriter.write_header_to_file = write  # type: ignore[method-assign]


def add_models(job: Conversion) -> None:
    """Have the converter take the class that `added.py` names for this model."""
    import conversion
    import gguf

    left_out = set(job.left_out)
    enter = gguf.utility.SafetensorsLocal.__enter__

    def of_the_model(self: Any) -> dict[str, object]:
        return {name: tensor for name, tensor in enter(self).items() if name not in left_out}

    gguf.utility.SafetensorsLocal.__enter__ = of_the_model  # type: ignore[method-assign]
    config = Settings.parse((job.folder / "config.json").read_bytes(), "config.json")
    get_model_class = conversion.get_model_class

    def get(name: str, mmproj: bool = False) -> Any:
        found = get_model_class(name, mmproj=mmproj)
        if mmproj:
            return added.projector_class_for(found)
        return added.class_for(job.folder, config, found)

    conversion.get_model_class = get
    index_tensors = conversion.ModelBase.index_tensors

    def index(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = index_tensors(self, *args, **kwargs)
        unread = added.unread(tensors, self.hparams)
        return {name: tensor for name, tensor in tensors.items() if name not in unread}

    conversion.ModelBase.index_tensors = index
    load_hparams = conversion.ModelBase.load_hparams
    conversion.ModelBase.load_hparams = staticmethod(
        lambda *args, **kwargs: added.with_older_names(load_hparams(*args, **kwargs))
    )


def list_architectures() -> None:
    """Report `{Hugging Face architecture: GGUF architecture}` of what loads, per kind of model."""
    import conversion
    import gguf

    conversion.load_all_models()
    kinds = conversion.ModelBase._model_classes
    text, mmproj = kinds[conversion.ModelType.TEXT], kinds[conversion.ModelType.MMPROJ]
    found = {
        name: gguf.MODEL_ARCH_NAMES[text[name].model_arch]
        for name in conversion.TEXT_MODEL_MAP
        if name in text
    }
    encoders = sorted(name for name in conversion.MMPROJ_MODEL_MAP if name in mmproj)
    tell(tables={"text": found, "mmproj": encoders})


def match(
    gguf: str,
    candidates: Sequence[str],
    probes: Sequence[str],
    plain: Sequence[Sequence[int]],
    special: Sequence[Sequence[int]],
) -> None:
    """Report the first of `candidates` that, put in place of the file's pre-tokenizer, makes
    llama.cpp give the tokens `plain` for the probes, preferably also `special`, those with special
    tokens around them.
    """
    import llama_cpp

    @llama_cpp.llama_log_callback
    def quiet(_level: int, _text: bytes, _data: Any) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    found = None
    for candidate in candidates:
        override = (llama_cpp.llama_model_kv_override * 2)()  # the second, empty, ends the list
        override[0].tag, override[0].key = 3, b"tokenizer.ggml.pre"  # 3: a string
        override[0].value.val_str = candidate.encode()  # type: ignore[union-attr]
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        parameters.kv_overrides = override
        model = llama_cpp.llama_model_load_from_file(gguf.encode(), parameters)
        if not model:  # llama.cpp does not know this name
            continue
        vocab = llama_cpp.llama_model_get_vocab(model)
        same = {
            is_special: all(
                tokenize(llama_cpp, vocab, text, is_special) == tokens
                for text, tokens in zip(probes, wanted, strict=True)
            )
            for is_special, wanted in ((False, plain), (True, special))
        }
        llama_cpp.llama_model_free(model)
        if same[False] and (same[True] or found is None):
            found = candidate
            tell(matching=found, same_special=same[True])
        if same[False] and same[True]:
            return


def tokenize(llama_cpp: Any, vocab: Any, text: str, special: bool) -> list[int] | None:
    """Return llama.cpp's tokens for a text, None if it fails."""
    data = text.encode()
    tokens = (ctypes.c_int32 * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, len(tokens), special, True)
    return list(tokens[:n]) if n >= 0 else None
