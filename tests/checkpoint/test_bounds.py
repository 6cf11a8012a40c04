"""Numbers and texts of strangers: refused by name, or planned; nothing is built of absurd ones."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_server import look
from hub_store import CARD, CONFIG, tiny_model, write
from test_fit import fit_of
from tiny_models import tiny_llama

from quantkit.checkpoint.bounds import check_numbers
from quantkit.checkpoint.safetensors import StoredTensor
from quantkit.config import RunConfig
from quantkit.config.targets import BitsPerWeight, LikeMix
from quantkit.errors import QuantkitError
from quantkit.hub.card_data import read_card
from quantkit.llamacpp.converter.snapshot import sanitize
from quantkit.planning.here import here
from quantkit.planning.nouns import Plan
from quantkit.planning.plan import make_plan
from quantkit.planning.render import render
from quantkit.sandbox.untrusted import build
from quantkit.tensors import to_json

TABLE = [StoredTensor("model.embed_tokens.weight", "BF16", (512, 64), 0, 65536)]


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1,000,000,000; .* 512 rows"),
        ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000"),
        ({"hidden_size": 2**31}, "hidden_size is 2,147,483,648"),
        ({"n_layers": 10**6}, "n_layers is 1,000,000"),
        ({"text_config": {"hidden_size": 2**40}}, "text_config.hidden_size is 1,099"),
        ({"vision_config": {"depth": 10**8}}, "vision_config.depth is 100,000,000"),
        ({"num_attention_heads": -1}, "num_attention_heads is -1, which is not a size"),
        ({"hidden_size": True}, "hidden_size is True, which is not a size"),
        ({"vocab_size": "512"}, "vocab_size is '512', which is not a size"),
        ({"vocab_size": float("nan")}, "vocab_size is nan, which is not a size"),
        ({"head_dim": 1e300}, "head_dim is 1e[+]300, which is not a size"),
        ({"max_position_embeddings": 2**60}, "max_position_embeddings is 1,152"),
        ({"intermediate_size": [512, {}]}, "intermediate_size is .512, {}., which is not a size"),
        ({"a": {"b": {"c": {"d": {"e": {"f": {"g": {}}}}}}}}, None),
        ({"num_hidden_layers": 2, "time_step_limit": [0.0, float("inf")]}, None),
        ({"intermediate_size": [512, 512], "num_experts_per_tok": None}, None),
        ({"max_position_embeddings": 10_485_760, "rope_theta": 1e7, "head_dim": None}, None),
    ],
)
def test_numbers(config: dict[str, Any], sentence: str | None) -> None:
    if sentence is None:
        check_numbers("a/b", config, TABLE)
        return
    with pytest.raises(QuantkitError, match=sentence):
        check_numbers("a/b", config, TABLE)


def test_settings_within_settings() -> None:
    config: dict[str, Any] = {}
    for _ in range(100):
        config = {"x": config}
    with pytest.raises(QuantkitError, match="more than 16 levels deep"):
        check_numbers("a/b", config, [])


ODD = [
    0, -1, 1, 3, 7, 2**31, 2**63, 10**9, 10**30, 0.5, -1.5, 1e300, float("nan"), float("inf"),
    True, False, None, "", "auto", "9" * 400, [], [1], [None], {}, {"a": 1}, [[]],
    "\x1b[31m", "x\0y",
]  # fmt: skip
MORE = (
    "layer_types quantization_config text_config rope_scaling rope_parameters auto_map n_layer"
    " num_experts transformers_weights sliding_window dtype id2label pruned_heads problem_type"
    " generation_config attn_implementation fusion_config tp_plan sub_configs bos_token_id"
).split()


def mutated(seed: int, config: dict[str, Any]) -> dict[str, Any]:
    """One to three settings are something else, or gone."""
    rng = random.Random(seed)
    config = dict(config)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*config, *MORE])
        config[key] = rng.choice(ODD)
        if rng.random() < 0.1:
            del config[key]
    return config


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("bounds") / "llama")


def with_config(folder: Path, into: Path, config: dict[str, Any]) -> Path:
    """The same model with another config.json."""
    into.mkdir()
    for path in folder.iterdir():
        if path.name != "config.json":
            (into / path.name).symlink_to(path)
    (into / "config.json").write_text(json.dumps(config))
    return into


@pytest.mark.parametrize(
    "seeds", [range(20), *(pytest.param(range(i, 200), marks=pytest.mark.slow) for i in (20,))]
)
def test_any_config_is_refused_in_a_sentence_or_fits(
    seeds: range, llama: Path, tmp_path: Path
) -> None:
    """And nothing large is built of it on the way."""
    config = json.loads((llama / "config.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        folder = with_config(llama, tmp_path / str(seed), mutated(seed, config))
        try:
            look(str(folder))
            fit_of(folder)
        except QuantkitError as error:
            assert error.message.isprintable(), (seed, error.message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 500_000  # kB


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_any_config_is_refused_or_planned(seed: int, llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    folder = with_config(llama, tmp_path / "m", mutated(1000 + seed, config))
    try:
        plan = make_plan(RunConfig(str(folder), profile="demo", calibration="docs"))
    except QuantkitError as error:
        assert error.message.isprintable() and error.remedy
    else:
        assert plan.sizes.budgets


# Model cards

BOMB = "---\na: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


def test_a_card_of_aliases_takes_nothing(tmp_path: Path) -> None:
    """400 bytes that are 9 ** 10 words, for a local card and for what the converter reads."""
    bomb = BOMB + "---\nhello\n"
    with pytest.raises(QuantkitError, match="not plain YAML"):
        read_card(bomb.encode())
    folder = write(tmp_path / "m", tiny_model(README__md=bomb))
    code = (
        "import sys; sys.path[:0] = ['tests/support']\n"
        "from evaluators.speed_probe import peak_rss\nfrom hub_server import look\n"
        "before = peak_rss(); print(dict(look(sys.argv[1]).card), peak_rss() < before + 1e8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.split() == ["{}", "True"], done.stderr
    copy = sanitize(folder, tmp_path / "copy", "m")
    assert not (copy.folder / "README.md").exists()
    assert any(text.startswith("README.md left out") for text in copy.removed)


DEEP = b"---\na: " + b"[" * 100_000 + b"]" * 100_000 + b"\n---\n"


def test_cards() -> None:
    assert read_card(CARD.encode()) == {
        "license": "apache-2.0",
        "language": ["en", "fr"],
        "base_model": "someone/base",
        "tags": ["chat"],
    }
    assert read_card(b"\xef\xbb\xbf---\r\nlicense: mit\r\ndate: 2026-01-02\r\n---\r\n") == {
        "license": "mit",
        "date": "2026-01-02",
    }
    for nothing in (b"", b"# Hello", b"---\nlicense: mit\n", b"---\n- a\n---\n", b"---\n---\n"):
        assert read_card(nothing) == {}
    for bad in (
        b"---\na: [\n---\n",
        b"---\n" + b"[" * 5000 + b"\n---\n",
        b"---\n\xff: 1\n---\n",
        DEEP,
    ):
        with pytest.raises(QuantkitError, match="not plain YAML"):
            read_card(bad)
    with pytest.raises(QuantkitError, match="more than 2,000,000 bytes"):
        read_card(b"---\n" + b"a: b\n" * 500_000)


# Times


def test_one_file_takes_search_and_tuning(llama: Path) -> None:
    """A Job's limit is made from it."""
    asked = RunConfig(str(llama), targets=(LikeMix("Q4_K_M"),), profile="demo")
    one = make_plan(asked).estimates
    assert one.seconds == pytest.approx(sum(one.stage_seconds.values()), abs=5)
    assert one.seconds == round(one.cpu.on(here("cpu").speed)) > one.per_file.seconds
    assert one.gpu.on(1) > one.per_file.gpu.on(1) > 0
    more = one.for_files(2)
    assert more.seconds == one.seconds + one.per_file.seconds
    assert more.for_files(1).cpu.on(1) == pytest.approx(one.cpu.on(1))


def test_a_plan_in_json(llama: Path) -> None:
    """Everything that it says comes back from what `quantkit plan --json` prints."""
    targets = (BitsPerWeight("0.5"), LikeMix("Q4_K_M"))
    plan = make_plan(RunConfig(str(llama), targets=targets, profile="demo"))
    told = json.loads(json.dumps(to_json(plan)))
    assert build(Plan, told) == plan and told["schema"] == 1
    assert len(plan.sizes.budgets) == len(plan.sizes.refused) == 1
    assert list(told)[:4] == ["schema", "model", "sizes", "stock"]
    said, everything = render(plan), render(plan, everything=True)
    assert "0.5" in said and f"{plan.sizes.budgets[0].limit_bytes:,} bytes" in said
    assert len(said.splitlines()) <= 10 + len(plan.warnings) + len(plan.sizes.budgets)
    shown = {f"| {label} | {n_bytes:,} |" for label, n_bytes in plan.stock.items()}
    assert shown <= set(everything.splitlines()) and not shown & set(said.splitlines())


def test_the_tiny_model_is_within_bounds() -> None:
    check_numbers("a/b", CONFIG, TABLE)
