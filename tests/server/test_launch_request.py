"""A filled-in form as a run: what is understood, what is refused, and in which words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from quantkit.config import RunConfig
from quantkit.config.targets import LikeMix
from quantkit.errors import QuantkitError, UsageError
from quantkit.server.executors.protocol import Order
from quantkit.server.runs import again as runs_again
from quantkit.server.runs.again import form_of
from quantkit.server.runs.request import RunForm, check_pattern, check_repo, models_of, to_config


class TestForm:
    """What a stranger may ask for."""

    def test_one_id_is_enough(self) -> None:
        config = to_config(RunForm("HuggingFaceTB/SmolLM2-135M"), public=True)
        assert config == RunConfig("HuggingFaceTB/SmolLM2-135M", targets=(LikeMix("Q4_K_M"),))

    def test_all_fields(self) -> None:
        form = RunForm(
            "https://huggingface.co/a/b/tree/main",
            "size",
            size="5.5GB",
            profile="fast",
            levels=("Q4_K", "Q6_K"),
            methods=("rtn", "gptq"),
            calibration="docs:2,code",
            types='{"ffn_down": "Q6_K", "default": "Q4_K"}',
            seed=7.0,
            publish="me/it",
            visibility="private",
        )
        config = to_config(form, public=True)
        assert (config.model, config.revision, config.seed) == ("a/b", "main", 7)
        assert config.methods == ("gptq", "rtn") and config.levels == ("Q4_K", "Q6_K")
        assert config.types == (("ffn_down", "Q6_K"), ("default", "Q4_K"))
        assert (config.publish, config.private) == ("me/it", True)

    def test_folders_are_for_private_pages(self, tmp_path: Path) -> None:
        assert to_config(RunForm(str(tmp_path)), public=False).model == str(tmp_path)
        with pytest.raises(UsageError, match="Local folders"):
            to_config(RunForm(str(tmp_path)), public=True)

    @pytest.mark.parametrize(
        "field",
        [
            {"model": ""},
            {"model": "a/b/c/d"},
            {"model": "../../etc"},
            {"model": "file:///etc/passwd"},
            {"model": "x" * 600},
            {"model": 3},
            {"model": "https://evil.example/a/b"},
            {"revision": "../../x"},
            {"revision": "-rf"},
            {"size_kind": "huge"},
            {"size_kind": "size", "size": ""},
            {"size_kind": "size", "size": "9" * 40},
            {"size_kind": "size", "size": "-4GB"},
            {"size_kind": "bpw", "bpw": None},
            {"size_kind": "bpw", "bpw": float("nan")},
            {"size_kind": "bpw", "bpw": 1e300},
            {"like": "Q9_X"},
            {"profile": "enormous"},
            {"levels": ("F16",)},
            {"levels": ("Q4_K",) * 50},
            {"levels": "Q4_K;rm"},
            {"methods": ("magic",)},
            {"calibration": "/etc/passwd.txt"},
            {"calibration": "notes.jsonl"},
            {"calibration": "docs:1e99"},
            {"types": "{"},
            {"types": "[1]"},
            {"types": '{"a": 3}'},
            {"types": '{"(a+)+$": "Q4_K"}'},
            {"types": '{"[": "Q4_K"}'},
            {"types": "[" * 9000},
            {"types": json.dumps({f"p{i}": "Q4_K" for i in range(200)})},
            {"types": " " * 20_000},
            {"seed": -1},
            {"seed": 1.5},
            {"seed": float("inf")},
            {"seed": "0; drop"},
            {"device": "tpu"},
            {"publish": "no-owner"},
            {"publish": "../../x"},
            {"publish": "a/b/c"},
        ],
    )
    def test_hostile_input_is_one_sentence(self, field: dict[str, object]) -> None:
        form = RunForm(**{"model": "a/b", **field})  # type: ignore[arg-type]
        with pytest.raises(QuantkitError) as caught:
            to_config(form, public=True)
        assert caught.value.message.endswith(".") and len(str(caught.value)) < 700

    @pytest.mark.parametrize(
        "pattern",
        ["(a+)+$", "(a|a)*b", "a*" * 9, "a?" * 30 + "a" * 30, "(a|a)" * 30, r"(a)\1", "(?=x)x"],
    )
    def test_patterns_that_explode_are_refused(self, pattern: str) -> None:
        with pytest.raises(UsageError):
            check_pattern(pattern)

    @pytest.mark.parametrize(
        "pattern", ["ffn_down", r"blk\.0\.", r"blk\.(0|1|29)\.attn_[kv]", r"^blk\.\d+\.ffn_.*$"]
    )
    def test_useful_patterns_pass(self, pattern: str) -> None:
        check_pattern(pattern)

    def test_repositories(self) -> None:
        assert check_repo(" me/My-Model.GGUF ") == "me/My-Model.GGUF"


def test_a_field_of_several_models() -> None:
    """Ids and addresses may be listed; anything else that has a comma or a space is one name."""
    listed = "a/b, https://huggingface.co/c/d\ndemo:smollm2-135m;a/b"
    assert models_of(listed) == ("a/b", "https://huggingface.co/c/d", "demo:smollm2-135m")
    assert models_of("/models/one, two") == ("/models/one, two",)
    assert models_of("a/b") == models_of("a/b,") == models_of("a/b, a/b") == ("a/b",)
    assert models_of("a/b,two") == ("a/b", "two"), "two is refused by itself"
    with pytest.raises(UsageError, match="at most 10"):
        models_of(" ".join(f"a/m{i}" for i in range(11)))


@pytest.mark.parametrize(
    "form",
    [
        RunForm(
            "a/b", "like", "Q5_K_M", seed=3, equalize=True, revision="v1", levels=("Q4_K", "Q8_0")
        ),
        RunForm("a/b", "size", size="5GB", types='{"token_embd": "Q8_0"}', visibility="private"),
        RunForm("a/b", "bpw", bpw=4.25, methods=("gptq",), publish="me/x", prefer="speed"),
        RunForm("a/b", "family", family=("Q3_K_M", "Q6_K"), calibration="docs:2,code"),
        RunForm("a/b", "fits", memory="9GB", context=4096, devices=("gpu-8gb", "mac-16gb")),
    ],
)
def test_a_config_is_a_form_again(form: RunForm) -> None:
    config = to_config(form, public=True)
    again = form_of(config, Order())
    assert to_config(again.form, public=True) == dataclasses.replace(config, publish=None)
    assert not again.left_out and again.published_to == config.publish
    more = dataclasses.replace(config, max_types=3, split_bytes=5, collection="mine", device="cuda")
    there = form_of(more, Order("hf_jobs", "t4-small"))
    assert there.left_out == ("max_types", "split_bytes", "collection")
    assert there.form.device == "" and form_of(more, Order()).form.device == "cuda"


def test_every_option_is_filled_in_or_named() -> None:
    """One that is added later, too: nothing is dropped in silence."""
    filled = {f.name for f in dataclasses.fields(RunForm)} | {"targets", "private", "public"}
    options = {f.name for f in dataclasses.fields(RunConfig)}
    assert options - filled == set(runs_again._NOT_IN_THE_FORM)
