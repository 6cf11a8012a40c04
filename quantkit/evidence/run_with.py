"""The commands by which a published file is run, in Markdown."""

from __future__ import annotations

from quantkit.evidence.report.schema import Output


def commands(output: Output, repo: str) -> str:
    """Return the commands for llama.cpp, Ollama, LM Studio and llama-cpp-python. Ollama does not
    load models in parts: for one the command that joins them comes first.
    """
    return f"""llama.cpp{" loads all parts" if output.parts else ""}:

```
llama-server -hf {repo}:{output.label}
```

{_ollama(output, repo)}

LM Studio: search for `{repo}`, or

```
lms get https://huggingface.co/{repo}
```

llama-cpp-python:

```python
{_python(output, repo)}
messages = [{{"role": "user", "content": "Name three things that float on water."}}]
print(llm.create_chat_completion(messages)["choices"][0]["message"]["content"])
```"""


def _ollama(output: Output, repo: str) -> str:
    if not output.parts:
        return f"Ollama:\n\n```\nollama run hf.co/{repo}:{output.label}\n```"
    first, stem = output.parts[0].name, output.name.removesuffix(".gguf")
    return f"""Ollama does not load models in parts. Join them with llama.cpp's tool first:

```
hf download {repo} --include "{_pattern(output)}" --local-dir .
llama-gguf-split --merge {first} {output.name}
echo "FROM ./{output.name}" > Modelfile
ollama create {stem.lower()} -f Modelfile
ollama run {stem.lower()}
```"""


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
