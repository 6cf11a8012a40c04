"""The commands by which people run a file: from its repository, or from a disk."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from quantkit.evidence.report.schema import Output

# What the commands of a file in a private repository need besides.
PRIVATE = (
    "The repository is private. Ollama needs its key (~/.ollama/id_ed25519.pub) among the SSH keys"
    " of your account on the Hub, llama-server a token in the variable HF_TOKEN, and hf download"
    " that or hf auth login."
)
_OLLAMA_TAG = re.compile(r"\w[\w.-]{0,79}", re.ASCII)


def names(output: Output) -> list[str]:
    """Return what a finished file is published as: its own name, or those of its parts."""
    return [part.name for part in output.parts or ()] or [output.name]


def published(output: Output, outputs: Sequence[Output], repo: str) -> dict[str, str]:
    """Return the commands that run one of the `outputs` in a repository on the Hub, by program. It
    is asked for by its label, or by its name where that label finds another one, too.

    Ollama does not load models in parts: for one, its commands join them first.
    """
    wanted = quote(_pattern(output) if output.parts else output.name)
    download = (
        f"hf download {quote(repo)} {'--include ' * bool(output.parts)}{wanted} --local-dir ."
    )
    found = {program: f"{download}\n{said}" for program, said in local(output, None).items()}
    by_label = _is_found_by_label(output, outputs)
    tag = str(output.label) if by_label else output.name
    if not output.parts and _OLLAMA_TAG.fullmatch(tag):
        found["Ollama"] = f"ollama run {quote(f'hf.co/{repo}:{tag}')}"
    if by_label:
        chosen = f"@{output.label}" if len(outputs) > 1 else ""
        found["LM Studio"] = f"lms get {quote(f'https://huggingface.co/{repo}{chosen}')}"
        found["llama.cpp"] = f"llama-server -hf {quote(f'{repo}:{output.label}')}"
    else:
        found["llama.cpp"] = f"llama-server -hf {quote(repo)} -hff {quote(names(output)[0])}"
    return found


def _is_found_by_label(output: Output, outputs: Sequence[Output]) -> bool:
    """Whether a label is of this file alone, as llama.cpp looks for it: anywhere in a name, before
    a dot or a dash.
    """
    label = re.compile(f"{re.escape(str(output.label))}[.-]", re.IGNORECASE)
    return [o.name for o in outputs if label.search(o.name)] == [output.name]


def local(output: Output, path: Path | None) -> dict[str, str]:
    """Return the commands that run a file, by program. It, or its first part, is at `path`, else in
    the current folder.
    """
    first = names(output)[0] if path is None else str(path)
    whole, joined = first, []
    if output.parts:
        path, whole = None, output.name
        joined = [f"llama-gguf-split --merge {quote(first)} {quote(whole)}"]
    source = f"./{whole}" if path is None else whole
    return {
        "Ollama": "\n".join([*joined, *_created(output.name, source)]),
        "LM Studio": "\n".join([*joined, f"lms import {quote(whole)}"]),
        "llama.cpp": f"llama-server -m {quote(first)}",
    }


def in_markdown(output: Output, outputs: Sequence[Output], repo: str) -> str:
    """Return the card's paragraph: one of its files with llama.cpp, Ollama, LM Studio and
    llama-cpp-python.
    """
    commands = published(output, outputs, repo)
    joined = " does not load models in parts. Join them with llama.cpp's tool first"
    return f"""llama.cpp{" loads all parts" if output.parts else ""}:

```
{commands["llama.cpp"]}
```

Ollama{joined if output.parts else ""}:

```
{commands["Ollama"]}
```

LM Studio: search for `{repo}`, or

```
{commands["LM Studio"]}
```

llama-cpp-python:

```python
{_python(output, repo)}
messages = [{{"role": "user", "content": "Name three things that float on water."}}]
print(llm.create_chat_completion(messages)["choices"][0]["message"]["content"])
```"""


def _created(name: str, path: str) -> list[str]:
    """The commands by which Ollama takes a file, and runs it."""
    model = quote(re.sub(r"[^a-z0-9._-]", "-", name.removesuffix(".gguf").lower()))
    return [
        f"echo {quote(f'FROM {path}')} > Modelfile",
        f"ollama create {model} -f Modelfile",
        f"ollama run {model}",
    ]


def _pattern(output: Output) -> str:
    """What all parts are called."""
    return f"{output.name.removesuffix('.gguf')}-*-of-*.gguf"


def _python(output: Output, repo: str) -> str:
    first = names(output)[0]
    if not output.parts:
        return f"""from llama_cpp import Llama

llm = Llama.from_pretrained(repo_id="{repo}", filename="{first}", n_ctx=4096)"""
    return f"""from huggingface_hub import snapshot_download
from llama_cpp import Llama

folder = snapshot_download("{repo}", allow_patterns="{_pattern(output)}")
llm = Llama(f"{{folder}}/{first}", n_ctx=4096)  # opens the other parts, too"""
