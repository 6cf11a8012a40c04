"""The commands that run a file with what people have: from its repository, or from this disk."""

from __future__ import annotations

import re
from pathlib import Path
from shlex import quote

_REPO = re.compile(r"https?://[^/]+/([\w.-]+/[\w.-]+)/?", re.ASCII)
_LABEL = re.compile(r"[-.]([A-Za-z0-9_]+)\.gguf", re.ASCII)


def commands(name: str, published: str | None, path: Path | None) -> list[tuple[str, str]]:
    """Return programs and their commands for a file, in its repository at the address `published`,
    else at `path`; without either for a download in the current folder.
    """
    repo, label = _REPO.fullmatch(published or ""), _LABEL.search(name)
    if repo is not None and label is not None:
        return [
            ("Ollama", f"ollama run hf.co/{repo[1]}:{label[1]}"),
            ("LM Studio", f"lms get {published}"),
            ("llama.cpp", f"llama-server -hf {repo[1]}:{label[1]}"),
        ]
    file = quote(name if path is None else str(path))
    model = quote(re.sub(r"[^a-z0-9._-]", "-", name.removesuffix(".gguf").lower()))
    from_line = quote(f"FROM {'./' + name if path is None else path}")
    return [
        (
            "Ollama",
            f"echo {from_line} > Modelfile && ollama create {model} && ollama run {model}",
        ),
        ("LM Studio", f"lms import {file}"),
        ("llama.cpp", f"llama-server -m {file}"),
    ]
