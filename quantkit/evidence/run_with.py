"""The commands by which people run a file: from its repository, or from a disk."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

from quantkit.evidence.report.schema import Output


def published(output: Output, repo: str) -> dict[str, str]:
    """Return the commands that run a file from a repository on the Hub, by program.

    Ollama does not load models in parts: for one, its commands join them first.
    """
    tag = quote(f"{repo}:{output.label}")
    ollama = f"ollama run {quote(f'hf.co/{repo}:{output.label}')}"
    if output.parts:
        include, first = quote(_pattern(output)), quote(output.parts[0].name)
        ollama = "\n".join(
            [
                f"hf download {quote(repo)} --include {include} --local-dir .",
                f"llama-gguf-split --merge {first} {quote(output.name)}",
                *_created(output.name, f"./{output.name}"),
            ]
        )
    return {
        "Ollama": ollama,
        "LM Studio": f"lms get {quote(f'https://huggingface.co/{repo}')}",
        "llama.cpp": f"llama-server -hf {tag}",
    }


def local(name: str, path: Path | None) -> dict[str, str]:
    """Return the commands that run a file at `path`, else in the current folder, by program."""
    file = quote(name if path is None else str(path))
    return {
        "Ollama": "\n".join(_created(name, f"./{name}" if path is None else str(path))),
        "LM Studio": f"lms import {file}",
        "llama.cpp": f"llama-server -m {file}",
    }


def in_markdown(output: Output, repo: str) -> str:
    """Return the card's paragraph: a published file with llama.cpp, Ollama, LM Studio and
    llama-cpp-python.
    """
    commands = published(output, repo)
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
    names = [part.name for part in output.parts or ()] or [output.name]
    if len(names) == 1:
        return f"""from llama_cpp import Llama

llm = Llama.from_pretrained(repo_id="{repo}", filename="{names[0]}", n_ctx=4096)"""
    return f"""from huggingface_hub import snapshot_download
from llama_cpp import Llama

folder = snapshot_download("{repo}", allow_patterns="{_pattern(output)}")
llm = Llama(f"{{folder}}/{names[0]}", n_ctx=4096)  # opens the other parts, too"""
