"""No question, no code: what a model's folder says of code is not even read."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import environment
from tiny_models import tiny_llama, write_tokenizer

from quantkit.checkpoint.codeless import codeless
from quantkit.errors import QuantkitError
from quantkit.model.blockwise import empty_model, load_model, load_tokenizer
from quantkit.model.streaming import StreamedWeights

CODE = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
MAP = {
    "AutoConfig": "configuration_x.XConfig",
    "AutoModelForCausalLM": "modeling_x.XForCausalLM",
    "AutoTokenizer": ["tokenization_x.XTokenizer", None],
}


def with_code(folder: Path, model_type: str = "llama", tokenizer: str = "LlamaTokenizer") -> Path:
    """A model whose every setting names code that lies beside it."""
    tiny_llama(folder)
    for name in ("configuration_x", "modeling_x", "tokenization_x", "generate"):
        (folder / f"{name}.py").write_text(CODE + f"class X{name[-6:]}: ...\n")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE)
    edits = {
        "config.json": {"auto_map": MAP, "model_type": model_type, "nested": {"auto_map": MAP}},
        "generation_config.json": {"auto_map": MAP},
        "tokenizer_config.json": {"auto_map": MAP, "tokenizer_class": tokenizer},
    }
    for name, edit in edits.items():
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    return folder


def test_a_known_architecture_goes_on_with_its_own_class(tmp_path: Path) -> None:
    plain = tiny_llama(tmp_path / "plain")
    folder = with_code(tmp_path / "coded")
    ids = torch.arange(3, 20)[None]
    wanted = load_model(plain, torch.float32)(input_ids=ids).logits
    assert torch.equal(load_model(folder, torch.float32)(input_ids=ids).logits, wanted)
    assert type(empty_model(folder)).__module__.startswith("transformers.")
    streamed = StreamedWeights(folder, torch.float32, "cpu")
    assert type(streamed.model).__module__.startswith("transformers.")
    tokens = load_tokenizer(folder)("The same text").input_ids
    assert tokens == load_tokenizer(plain)("The same text").input_ids
    assert not list(tmp_path.rglob("ran"))


def test_nothing_that_is_read_names_code(tmp_path: Path) -> None:
    folder = with_code(tmp_path / "coded")
    # Written otherwise, and twice.
    text = (folder / "config.json").read_text().replace('"auto_map"', '"auto\\u005fmap"', 1)
    (folder / "config.json").write_text(text)
    with codeless(folder) as view:
        assert view != folder
        assert {path.name for path in view.iterdir()} == {
            path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"
        }
        for path in view.glob("*.json"):
            assert "auto_map" not in json.dumps(json.loads(path.read_bytes()))
    assert not view.exists()
    plain = tiny_llama(tmp_path / "plain")
    with codeless(plain) as view:
        assert view == plain


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    folder = with_code(tmp_path / "coded", model_type="x-new")
    with pytest.raises(QuantkitError, match="cannot load this model"):
        load_model(folder)


def test_an_unknown_tokenizer_is_refused(tmp_path: Path) -> None:
    """transformers would take another class without a word, which gives other tokens."""
    folder = with_code(tmp_path / "coded", tokenizer="XTokenizer")
    with pytest.raises(QuantkitError, match="cannot load this tokenizer: it has no XTokenizer"):
        load_tokenizer(folder)
    write_tokenizer(folder, "bpe")  # its tokenizer.json says everything
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "XTokenizer"}))
    assert load_tokenizer(folder)("The same text").input_ids


@pytest.mark.slow
def test_nobody_is_asked(tmp_path: Path) -> None:
    """On a terminal, with an eager user: nothing is asked, read or run."""
    folders = [with_code(tmp_path / kind, kind) for kind in ("llama", "x-new")]
    ours, theirs = pty.openpty()
    os.write(ours, b"y\ny\ny\n")
    code = (
        "import sys; from pathlib import Path\n"
        "from quantkit.model.blockwise import load_model, load_tokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    for load in (load_tokenizer, load_model):\n"
        "        try: load(Path(folder))\n"
        "        except Exception as error: print(folder, type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, folders)],
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(tmp_path / "hf"),
    )
    assert done.returncode == 0, done.stderr
    assert "wish to run" not in done.stdout + done.stderr
    said = done.stdout.splitlines()
    assert said and all(line.startswith(f"{folders[1]} QuantkitError") for line in said)
    assert not list(tmp_path.rglob("ran"))
    assert os.read(theirs, 100) == b"y\n"  # nobody read the answers
    os.close(ours)
    os.close(theirs)
