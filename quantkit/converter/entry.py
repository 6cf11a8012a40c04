"""What runs inside the sandbox: `python -I -B entry.py JOB.json`. Never imported by quantkit.

It first gives up what it does not need (limits, network, programs), then puts the converter's own
folder and its own `gguf` before the environment's, and does the job:

    convert         the converter's own main program, with its tensor writer wrapped: for progress,
                    or to leave the tensor data a hole (skeleton), and with the models of added.py
    list            the architectures that the converter registers with this transformers
    match           which of llama.cpp's pre-tokenizers give the same tokens as the original

The job's outcome goes to a small JSON file that the parent reads; everything else is log.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import resource
import runpy
import sys
import traceback
import unicodedata
from pathlib import Path
from typing import Any

_STATUS: dict[str, Any] = {}


def report(path: str, **facts: Any) -> None:
    """Merge `facts` into the status file, which is always whole."""
    _STATUS.update(facts)
    partial = path + ".new"
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(_STATUS, file)
    os.replace(partial, path)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:  # it ended before we asked
        sys.exit(1)


def set_limits(cpu_seconds: int, address_bytes: int, file_bytes: int) -> None:
    """Hard limits of the kernel; they cannot be raised again. A second after the soft CPU limit
    (SIGXCPU, which tells the parent what happened) comes the hard one (SIGKILL).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (address_bytes, address_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def close_network() -> str:
    """Deny sockets and new programs to this process. Says by which means."""
    denied = ("socket.", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")

    def refuse(event: str, _arguments: Any) -> None:
        if event.startswith(denied) and event != "socket.gethostname":
            raise PermissionError(f"{event} is denied while a model is converted")

    sys.addaudithook(refuse)
    return "denied by the kernel (seccomp)" if deny_syscalls() else "denied within Python only"


def deny_syscalls() -> bool:
    """A seccomp filter (a BPF program over struct seccomp_data: number at 0, architecture at 4)
    that answers EACCES to socket, execve, execveat and io_uring_setup, and to every call of another
    architecture's table. False where the system has no such thing.
    """
    # AUDIT_ARCH value, then the numbers of the four calls
    known = {
        "x86_64": (0xC000003E, (41, 59, 322, 425)),
        "aarch64": (0xC00000B7, (198, 221, 281, 425)),
    }
    if sys.platform != "linux" or platform.machine() not in known or sys.maxsize < 2**32:
        return False
    architecture, calls = known[platform.machine()]
    load, equal, result = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    allow, deny = 0x7FFF0000, 0x00050000 | 13  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EACCES

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),
            ("if_false", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        ]

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("code", ctypes.POINTER(Instruction))]

    n = len(calls)
    code = [
        Instruction(load, 0, 0, 4),
        Instruction(equal, 0, n + 2, architecture),  # else: deny
        Instruction(load, 0, 0, 0),
        *(Instruction(equal, n - i, 0, call) for i, call in enumerate(calls)),
        Instruction(result, 0, 0, allow),
        Instruction(result, 0, 0, deny),
    ]
    array = (Instruction * len(code))(*code)
    program = Program(len(code), array)
    libc = ctypes.CDLL(None, use_errno=True)
    # PR_SET_NO_NEW_PRIVS, then PR_SET_SECCOMP with SECCOMP_MODE_FILTER
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0


def convert(job: dict[str, Any]) -> None:
    """Run the converter's main program with `job["arguments"]`."""
    wrap_writer(job)
    if (Path(job["tree"]) / "conversion" / "base.py").is_file():
        accept_pre_tokenizer(job)
        add_models(job)
    script = str(Path(job["tree"]) / "convert_hf_to_gguf.py")
    sys.argv = [script, *job["arguments"]]
    runpy.run_path(script, run_name="__main__")


def wrap_writer(job: dict[str, Any]) -> None:
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
        report(job["status"], total=sum(sizes))
        if not job["skeleton"]:
            for name, info in tensors.items():
                if isinstance(info.tensor, gguf.LazyNumpyTensor):
                    info.tensor = Checked(name, info.dtype.name, info.tensor)
            write_tensors(self)
            return
        self.write_ti_data_to_file()
        (file,) = self.fout
        self.write_padding(file, file.tell())
        file.truncate(file.tell() + sum(self.ggml_pad(n, self.data_alignment) for n in sizes))
        self.state = type(self.state).WEIGHTS

    gguf.GGUFWriter.write_tensors_to_file = write  # type: ignore[method-assign]


def check_blocks(arch: str, keys: dict[str, Any], tensors: dict[str, Any]) -> None:
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


class Checked:
    """A tensor that is evaluated when it is written, and refused when a number is not finite."""

    def __init__(self, name: str, dtype: str, tensor: Any) -> None:
        self.name, self.dtype, self.tensor = name, dtype, tensor
        self.nbytes = tensor.nbytes

    def tofile(self, file: Any) -> None:
        data = type(self.tensor).to_eager(self.tensor)
        self.tensor = None
        # All bits of the exponent set: infinite or not a number.
        exponents = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
        if self.dtype in exponents:
            kind, exponent = exponents[self.dtype]
            bits = data.reshape(-1).view(kind)
            for start in range(0, bits.size, 2**22):
                if (bits[start : start + 2**22] & exponent == exponent).any():
                    raise ValueError(f"{self.name} has a number that is not finite in {self.dtype}")
        data.tofile(file)


def accept_pre_tokenizer(job: dict[str, Any]) -> None:
    """Where the converter does not know a tokenizer, use `job["pre"]` for it. If that is not given,
    tell the parent how the tokenizer splits the probes, and go on to a skeleton, in whose
    vocabulary the right one can be looked for.
    """
    from conversion.base import TextModel

    recognize = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> str:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            if job["pre"] is not None:
                return job["pre"]
        probes = job["probes"]
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
        report(job["status"], probes=probes, composes=same, plain=plain, special=special)
        job["skeleton"] = True
        return "default"

    TextModel.get_vocab_base_pre = get_vocab_base_pre


def add_models(job: dict[str, Any]) -> None:
    """Have the converter take the class that `added.py` names for this model."""
    import conversion

    added = runpy.run_path(str(Path(__file__).with_name("added.py")))
    folder = Path(job["arguments"][0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    get_model_class = conversion.get_model_class

    def get(name: str, mmproj: bool = False) -> Any:
        found = get_model_class(name, mmproj=mmproj)
        if mmproj:
            return added["projector_class_for"](found)
        return added["class_for"](folder, config, found)

    conversion.get_model_class = get
    index_tensors = conversion.ModelBase.index_tensors

    def index(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = index_tensors(self, *args, **kwargs)
        unread = added["unread"](tensors, self.hparams, job["skeleton"])
        return {name: tensor for name, tensor in tensors.items() if name not in unread}

    conversion.ModelBase.index_tensors = index
    load_hparams = conversion.ModelBase.load_hparams
    conversion.ModelBase.load_hparams = staticmethod(
        lambda *args, **kwargs: added["with_older_names"](load_hparams(*args, **kwargs))
    )


def list_architectures(job: dict[str, Any]) -> None:
    """Report `{Hugging Face architecture: GGUF architecture}` of what loads, per kind of model."""
    import conversion
    import gguf

    failed: list[str] = []
    conversion.logger.warning = lambda message, *_: failed.append(str(message))
    conversion.load_all_models()
    kinds = conversion.ModelBase._model_classes
    text, mmproj = kinds[conversion.ModelType.TEXT], kinds[conversion.ModelType.MMPROJ]
    report(
        job["status"],
        text={
            name: gguf.MODEL_ARCH_NAMES[text[name].model_arch]
            for name in conversion.TEXT_MODEL_MAP
            if name in text
        },
        mmproj=sorted(name for name in conversion.MMPROJ_MODEL_MAP if name in mmproj),
        failed=failed,
    )


def match(job: dict[str, Any]) -> None:
    """Report the first of `job["candidates"]` that, put in place of the file's pre-tokenizer, makes
    llama.cpp give the tokens `job["plain"]` for the probes, preferably also `job["special"]`, those
    with special tokens around them.
    """
    import llama_cpp

    @llama_cpp.llama_log_callback
    def quiet(_level: int, _text: bytes, _data: Any) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    report(job["status"], matching=None, same_special=False)
    for candidate in job["candidates"]:
        override = (llama_cpp.llama_model_kv_override * 2)()  # the second, empty, ends the list
        override[0].tag, override[0].key = 3, b"tokenizer.ggml.pre"  # 3: a string
        override[0].value.val_str = candidate.encode()  # type: ignore[union-attr]
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        parameters.kv_overrides = override
        model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), parameters)
        if not model:  # llama.cpp does not know this name
            continue
        vocab = llama_cpp.llama_model_get_vocab(model)
        same = {
            special: all(
                tokenize(llama_cpp, vocab, text, special) == tokens
                for text, tokens in zip(job["probes"], wanted, strict=True)
            )
            for special, wanted in ((False, job["plain"]), (True, job["special"]))
        }
        llama_cpp.llama_model_free(model)
        if same[False] and (same[True] or _STATUS["matching"] is None):
            report(job["status"], matching=candidate, same_special=same[True])
        if same[False] and same[True]:
            return


def tokenize(llama_cpp: Any, vocab: Any, text: str, special: bool) -> list[int] | None:
    """llama.cpp's tokens for a text, None where it fails."""
    data = text.encode()
    tokens = (ctypes.c_int32 * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), tokens, len(tokens), special, True)
    return list(tokens[:n]) if n >= 0 else None


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    die_with_parent(job["parent"])
    set_limits(**job["limits"])
    report(job["status"], network=close_network())
    logging.basicConfig(level=logging.INFO)
    # The converter's folder comes first because it looks for its data files in sys.path[0].
    sys.path[:0] = [job["tree"], str(Path(job["tree"]) / "gguf-py")]
    modes = {"convert": convert, "list": list_architectures, "match": match}
    try:
        modes[job["mode"]](job)
    except SystemExit as error:
        if error.code not in (None, 0):
            report(job["status"], error="SystemExit", message=str(error.code))
            raise
    except BaseException as error:
        # MemoryError leaves little room: the report comes first, the long traceback after it.
        report(job["status"], error=type(error).__name__, message=str(error)[:4000])
        traceback.print_exc()
        sys.exit(1)
    report(
        job["status"],
        done=True,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


if __name__ == "__main__":
    main()
