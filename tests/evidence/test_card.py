"""The model card: its YAML, its links, and what it must say."""

from __future__ import annotations

import copy
import dataclasses
from importlib.resources import files
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_report import family, losing, values

from quantkit.checkpoint.info import ModelInfo
from quantkit.config import RunConfig
from quantkit.evidence.card import model_card
from quantkit.evidence.escaping import web_link
from quantkit.evidence.report import read
from quantkit.sandbox.untrusted import Settings

INFO = ModelInfo(
    kind="hub",
    id="owner/Tiny",
    revision="main",
    sha="c0ffee" * 6 + "abcd",
    files=(),
    weights=(),
    n_download_bytes=0,
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    n_parameters=2_000_000,
    n_by_dtype={"BF16": 2_000_000},
    dtype="bfloat16",
    config=Settings(),
    quantization=None,
    license="apache-2.0",
    license_name=None,
    license_link=None,
    gated=False,
    private=False,
    is_adapter=False,
    pipeline_tag="text-generation",
    base_model=(),
    languages=("en", "de"),
    tags=(),
    card=Settings(
        {"license": "apache-2.0", "language": ["en", "de"], "tags": ["chat", "safetensors"]}
    ),
    local_path=None,
)

CONFIG = RunConfig(INFO.id, profile="demo", seed=7)


def report_value() -> dict[str, Any]:
    value = values()
    value["revision"], value["base"]["sha256"] = INFO.sha, "cd" * 32
    value["outputs"][0]["label"] = "Q4_K_M"
    value["outputs"][0]["search"] = {
        "target": "like Q4_K_M",
        "limit_bytes": 1_050_000,
        "n_bytes": 1_000_000,
        "searched": True,
        "generations": 2,
        "tokens": 4000,
        "proposal_kl": 0.03,
        "kl": 0.01,
    }
    value["calibration"]["domains"] = [
        {"name": "docs", "source": "a | b", "weight": 1.0, "sha256": "12" * 32}
    ]
    return value


def card(
    info: ModelInfo = INFO, value: dict[str, Any] | None = None, repo: str | None = "me/T"
) -> ModelCard:
    return ModelCard(model_card(info, read(value or report_value()), CONFIG, repo))


def test_an_equalized_model_is_rebuilt_from_its_own_base() -> None:
    """And adapters of the original do not fit it."""
    report = read(report_value())
    text = model_card(INFO, report, dataclasses.replace(CONFIG, equalize=True), "me/T")
    assert "--base equalized.gguf" in text and "--base base.gguf" not in text
    assert "adapters that were made for the original do not fit" in text
    assert "equalized" not in str(card().content)


def test_the_yaml_is_the_base_cards_and_ours() -> None:
    data = card().data.to_dict()
    assert data["license"] == "apache-2.0" and data["language"] == ["en", "de"]
    assert data["base_model"] == "owner/Tiny" and data["base_model_relation"] == "quantized"
    assert data["quantized_by"] == "quantkit" and data["pipeline_tag"] == "text-generation"
    assert "chat" in data["tags"] and "gguf" in data["tags"]
    assert "safetensors" not in data["tags"], "that is what the base is stored as"
    (entry,) = data["model-index"]
    metrics = {m["type"]: m["value"] for r in entry["results"] for m in r["metrics"]}
    assert metrics == {"perplexity": 12.3456, "kl_divergence": 0.0123, "top1_agreement": 0.912}


def test_a_license_of_its_own_is_carried() -> None:
    own = {"license": "other", "license_name": "tiny", "license_link": "https://example.org/l"}
    shown = card(dataclasses.replace(INFO, card=Settings(own), **own))
    assert shown.data.to_dict()["license_link"] == "https://example.org/l"
    assert "[tiny](https://example.org/l)" in shown.text


def test_it_says_everything_that_it_must() -> None:
    shown = card().text
    for part in (
        "Which file should I choose?",
        "](https://huggingface.co/me/T/resolve/main/Tiny-EVO-Q4_K_M.gguf?download=true)",
        "llama.cpp Q5_1 pure",
        "(plots/frontier.png)",
        "(plots/tensor-map.png)",
        "llama-server -hf me/T:Q4_K_M",
        "ollama run hf.co/me/T:Q4_K_M",
        "lms get",
        "Llama.from_pretrained",
        "quantkit rebuild recipes/Tiny-EVO-Q4_K_M.json --base base.gguf --out Tiny-EVO-Q4_K_M.gguf",
        "seed 7",
        INFO.sha,
        "ab" * 32,
        "cd" * 32,
        "2 generations over 4,000",
        "a &#124; b",
        "apache-2.0",
        "dequantized weights: passed",
        "logits: not run. too little memory",
        "180.0 MB",
    ):
        assert part in shown, part
    assert "gated" not in shown and "{" not in shown.split("```python")[0]


def test_tables_have_one_width() -> None:
    width = None
    for line in card().text.splitlines():
        n = line.replace("\\|", "").count("|") if line.startswith("|") else None
        assert n is None or width in (None, n), line
        width = n


def test_the_card_of_a_family() -> None:
    value = family()
    value["calibration"] = report_value()["calibration"]
    for row in value["outputs"]:
        row["search"] = report_value()["outputs"][0]["search"]
    value["outputs"][1]["sha256"] = "ef" * 32
    shown = ModelCard(model_card(INFO, read(value), CONFIG, "me/T"))
    for part in (
        "# Tiny-EVO-GGUF",
        "2 GGUFs: 1.0 MB",
        "resolve/main/Tiny-EVO-Q6_K.gguf?download=true",
        "plots/tensor-map-2.png",
        "recipes/Tiny-EVO-Q6_K.json",
        "ef" * 32,
    ):
        assert part in shown.text, part
    names = {r["dataset"]["name"] for r in shown.data.to_dict()["model-index"][0]["results"]}
    assert len(names) == 2, "every file has its own figures"


def test_losses_stand_on_the_card() -> None:
    value = report_value()
    lost = losing()
    value["baselines"] = lost["baselines"]
    value["outputs"][0] |= {key: lost["outputs"][0][key] for key in ("kl", "integrity")}
    shown = card(value=value).text
    assert "% ABOVE" in shown and "Where this file loses" in shown and "chat turn: FAILED" in shown


def test_a_gated_base_says_so() -> None:
    shown = card(dataclasses.replace(INFO, gated=True)).text
    assert "gated" in shown and "published privately" in shown


def test_a_local_folder_names_no_address() -> None:
    info = dataclasses.replace(
        INFO, local_path="/home/me/Tiny", id="/home/me/Tiny", card=Settings()
    )
    shown = card(info, repo=None)
    assert "/home/me" not in shown.content
    assert shown.data.to_dict().get("base_model") is None
    assert "<owner>/<repo>" in shown.text


HOSTILE = [
    "x\n---\nlicense: mit\n---\n# Owned",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](https://evil.example/pixel.png)",
    "`code` *bold* _it_ ~~x~~",
    "# Heading",
    "a | b | c",
    "\\[x](https://evil.example)",
    "&#91;x](https://evil.example)",
    "@everyone see https://evil.example and www.evil.example",
    "\x1b]0;owned\x07\x9b31m\u202egnp.exe",
    "<https://evil.example>",
    "x" * 100_000,
]


def visible(markdown: str) -> list[tuple[str, str]]:
    """What a renderer makes of a card: its tags and addresses, in order."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)
    found: list[tuple[str, str]] = []
    for token in tokens:
        for part in [token, *(token.children or [])]:
            about = str(part.attrs.get("href", part.attrs.get("src", "")))
            if part.type not in ("text", "inline", "softbreak", "code_inline", "fence"):
                found.append((part.type, about))
    return found


@pytest.mark.parametrize("words", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("where", ["hub", "folder"])
def test_strangers_words_are_data(words: str, where: str) -> None:
    """Whatever a model's card says of itself, ours has the shape of an honest one's."""
    local = {"local_path": "/models/x"} if where == "folder" else {}
    names = ("license", "license_name", "license_link", "language", "pipeline_tag", "base_model")

    def made(text: str) -> ModelCard:
        own = {name: text for name in names} | {"tags": [text, "chat"], "evil": text}
        info = dataclasses.replace(
            INFO,
            id=text if where == "folder" else INFO.id,
            card=Settings(own),
            license=text,
            license_name=text,
            license_link=text,
            base_model=(text,),
            gated=True,
            **local,
        )
        value = report_value()
        value["calibration"]["note"] = text
        value["calibration"]["domains"][0] |= {"name": text, "source": text}
        return card(info, value)

    honest, found = made("an honest text"), made(words)
    assert visible(found.text) == visible(honest.text)
    data = found.data.to_dict()
    assert "evil" not in data and data["tags"][-1] == "chat"
    for name in ("license", "license_link", "language"):
        assert name not in data or "example" not in str(data[name])
    assert data.get("pipeline_tag") == "text-generation"
    if where == "folder":
        assert "base_model" not in data
    assert not [c for c in found.content if not c.isprintable() and c != "\n"]
    assert len(found.content) < 40_000


@pytest.mark.parametrize(
    "card_says",
    [
        {"license": ["mit", "apache-2.0"], "language": "en", "tags": "one"},
        {"license": {"a": 1}, "language": 7, "tags": {"x": 1}, "license_link": ["x"]},
        {"license": None, "language": [None, 3, "en"], "tags": [["x"]], "pipeline_tag": []},
        {"license_name": 3, "base_model": {"x": 1}, "language": [True]},
    ],
)
def test_cards_of_another_shape(card_says: dict[str, Any]) -> None:
    for local_path in (None, "/models/x"):
        card(dataclasses.replace(INFO, card=Settings(card_says), local_path=local_path))


def test_links_of_licenses() -> None:
    assert web_link("LICENSE.md", "o/n") == "https://huggingface.co/o/n/blob/main/LICENSE.md"
    assert web_link("LICENSE", None) is None
    good = "https://example.org/a/b?c=d#e"
    assert web_link(good, "o/n") == good
    for link in (
        "javascript:alert(1)",
        "data:text/html,x",
        "//evil.example",
        "https://",
        "../../x",
        "https://huggingface.co@evil.example/x",
        "file:///etc/passwd",
        "x y",
        7,
        None,
    ):
        assert web_link(link, "o/n") is None  # fmt: skip
    assert web_link("https://e.org/a)[b](c", "o/n") == "https://e.org/a%29%5Bb%5D%28c"


def test_a_file_in_parts() -> None:
    """Every part has a link and a sum; Ollama, which cannot load it, is not told to."""
    value = report_value()
    output = value["outputs"][0]
    stem = output["name"].removesuffix(".gguf")
    output["parts"] = [
        {"name": f"{stem}-0000{i}-of-00002.gguf", "n_bytes": 500_000, "sha256": f"{i}{i}" * 32}
        for i in (1, 2)
    ]
    text = str(card(value=value).content)
    for part in output["parts"]:
        assert f"(https://huggingface.co/me/T/resolve/main/{part['name']}?download=true)" in text
        assert part["sha256"] in text
    assert "in 2 parts" in text and f"resolve/main/{output['name']}" not in text
    first = output["parts"][0]["name"]
    assert f"llama-gguf-split --merge {first} {output['name']}" in text
    assert "ollama run hf.co" not in text and "llama-server -hf me/T:Q4_K_M" in text
    assert "ollama run hf.co/me/T:Q4_K_M" in str(card().content)


def test_files_of_one_label_are_named_themselves() -> None:
    value = report_value()
    first, second = value["outputs"][0], copy.deepcopy(value["outputs"][0])
    second["name"] = first["name"].replace("Q4_K_M", "4.62bpw-Q4_K_M")
    value["outputs"].append(second)
    text = str(card(value=value).content)
    assert f"llama-server -hf me/T -hff {second['name']}" in text
    assert f"ollama run hf.co/me/T:{second['name']}" in text


def test_it_says_with_what_it_was_made() -> None:
    before, _, _ = str(card().content).partition("## Which file")
    assert "](made-with-quantkit.png)](https://github.com/quantkit/quantkit)" in before
    assert files("quantkit").joinpath("data", "made-with-quantkit.png").is_file()
