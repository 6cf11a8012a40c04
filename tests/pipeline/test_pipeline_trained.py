"""K-quants on trained weights: a Llama whose rows divide by 256, trained here for a minute on the
documentation that ships with CPython, against llama.cpp's own files of it.

Random weights flatter nobody and punish nobody: every tensor matters alike, and inputs have no
directions that GPTQ could use. This model has learned something, so that the comparison means
something.
"""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from commands import Run, quantkit
from tiny_models import N_TOKENS, save_model, write_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from quantkit.config import PROFILES
from quantkit.ggml.types import QuantType
from quantkit.run.folder import read_json

pytestmark = pytest.mark.slow

N_STEPS, N_BATCH, N_CTX = 150, 8, 256
SHARE = 0.5  # of the KL of the stock file; measured: 0.11


def train(folder: Path) -> Path:
    """300,000 tokens of documentation."""
    torch.manual_seed(0)
    (folder.parent / "tokenizer").mkdir()
    write_tokenizer(folder.parent / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "tokenizer")
    text = "\n\n".join(text for _, text in sorted(topics.items()))
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=N_TOKENS["spm"],
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, N_STEPS, pct_start=0.1)
    losses = []
    for _ in range(N_STEPS):
        starts = torch.randint(len(ids) - N_CTX, (N_BATCH,))
        batch = torch.stack([ids[i : i + N_CTX] for i in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.7 * losses[0], losses[::20]
    return save_model(folder, model.to(torch.bfloat16), "spm")


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory: pytest.TempPathFactory, offline: dict[str, str]) -> Run:
    model = train(tmp_path_factory.mktemp("models") / "Docs-Llama")
    run = Run(tmp_path_factory.mktemp("runs") / "trained")
    options = ("--like", "Q4_K_M", "--profile", "demo", "--calibration", "builtin")
    answer = quantkit("run", model, "--out", run.folder, *options, "--json", env=offline)
    assert answer.code == 0, answer.err
    return run


def test_k_quants_everywhere(trained_run: Run) -> None:
    report = trained_run.report
    assert report["fallbacks"] == []
    used = {QuantType(row["qtype"]) for row in trained_run.recipe["tensors"].values()}
    assert len(used) > 1 and any(str(qtype).endswith("_K") for qtype in used)
    methods = [row["method"] for row in trained_run.recipe["tensors"].values()]
    assert methods.count("gptq") > len(methods) / 2


def test_better_than_the_stock_file(trained_run: Run) -> None:
    """On text that neither has seen, in every domain, at no more bytes."""
    report = trained_run.report
    (output,) = report["outputs"]
    stock = next(row for row in report["baselines"] if row["name"] == "Q4_K_M")
    assert output["n_bytes"] <= output["search"]["limit_bytes"] <= stock["n_bytes"]
    assert output["kl"]["mean"] < SHARE * stock["kl"]["mean"]
    assert output["top1"] > stock["top1"]
    for name, domain in output["domains"].items():
        assert domain["kl"]["mean"] < stock["domains"][name]["kl"]["mean"]


def test_better_than_any_llama_cpp_file_of_its_size(trained_run: Run) -> None:
    report = trained_run.report
    (output,) = report["outputs"]
    smaller = [row for row in report["baselines"] if row["n_bytes"] <= output["n_bytes"]]
    assert smaller
    assert output["kl"]["mean"] < min(row["kl"]["mean"] for row in smaller)


def test_the_model_wrote_some_of_the_text(trained_run: Run) -> None:
    """The built-in mix, without dialogue for want of a chat template, and no language: the model
    knows little of English and nothing of any other.
    """
    made = read_json(trained_run.dir.stage_dir("calibrate") / "calibration.json")
    assert [d["name"] for d in made["domains"]] == ["docs", "code", "prose"]
    assert made["domains"][2]["source"] == "sampled from the model itself"
    assert "no dialogue, because the tokenizer has no chat template" in made["note"]
    demo = PROFILES["demo"]
    wanted = {"train": demo.calibration_tokens, "heldout": demo.heldout_tokens}
    assert made["n_tokens"] == wanted
