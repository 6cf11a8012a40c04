"""Chat templates of strangers, rendered in the sandbox: the same text as transformers makes, or a
sentence.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from test_broken_ggufs import TEMPLATES
from tiny_models import tiny_llama

from quantkit.calibration import sampling
from quantkit.errors import QuantkitError
from quantkit.llamacpp import answering
from quantkit.llamacpp.chat import ChatTemplate
from quantkit.model.blockwise import load_tokenizer

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [{"role": "user", "content": "Grüße \N{OBJECT REPLACEMENT CHARACTER}"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(tiny_llama(tmp_path_factory.mktemp("chat") / "model"))


def with_template(tokenizer: Any, template: str) -> Any:
    found = copy.deepcopy(tokenizer)
    found.chat_template = template
    return found


def test_the_same_text(tokenizer: Any) -> None:
    given = with_template(tokenizer, PLAIN)
    template = ChatTemplate(given)
    for prompt in (False, True):
        wanted = given.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
        assert template.render(TURNS, prompt) == wanted


@pytest.mark.parametrize(
    "name", ["a large text", "attributes", "recursion", "an error of its own", "endless"]
)
def test_one_that_cannot_be_used(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "endless":
        monkeypatch.setattr(answering, "SECONDS", 12.0)
    template = ChatTemplate(with_template(tokenizer, TEMPLATES[name]))
    assert sampling.why_no_chat(template).isprintable() and sampling.why_no_chat(template)
    with pytest.raises(QuantkitError, match="cannot be rendered") as caught:
        template.render(TURNS)
    assert len(caught.value.message) < 2200


def test_none(tokenizer: Any) -> None:
    found = with_template(tokenizer, "")
    assert sampling.why_no_chat(ChatTemplate(found)) == "the tokenizer has no chat template"
