"""The model card: what the files are, which to choose, the evidence, and how to make them again."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from quantkit import report as reports
from quantkit.hub import ModelInfo

_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag")


def card_data(info: ModelInfo, report: dict[str, Any]) -> ModelCardData:
    """The card's YAML: the base card's licence and languages, where the model comes from, measured
    results.
    """
    output = report["outputs"][0]
    name = output["path"].rsplit("/", 1)[-1]
    kept = {key: info.card[key] for key in _KEPT if info.card.get(key)}
    results = [
        _result(
            name,
            "text-generation",
            "held-out calibration domains",
            "perplexity",
            output["perplexity"]["value"],
        ),
        _result(
            name,
            "text-generation",
            "held-out calibration domains",
            "kl_divergence",
            output["kl"]["mean"],
        ),
    ]
    zero = output["zero_shot"]
    if zero["status"] == "done":
        results.append(
            _result(name, "text-generation", zero["task"], "accuracy", zero["acc"]["value"])
        )
    return ModelCardData(
        model_name=name.removesuffix(".gguf"),
        base_model=_base_model(info),
        base_model_relation="quantized",
        quantized_by="quantkit",
        tags=["gguf", "llama.cpp", "quantized", "quantkit", "imatrix", "gptq"],
        eval_results=results,
        **{"pipeline_tag": "text-generation", **kept},
    )


def _base_model(info: ModelInfo) -> str | list[str] | None:
    """The Hub id that this is quantized from; for a local folder what its card names, if
    anything.
    """
    return info.card.get("base_model") if info.local_path else info.id


def _result(name: str, task: str, dataset: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        metric_type=metric,
        metric_value=round(value, 5),
    )


def model_card(
    info: ModelInfo, report: dict[str, Any], recipe: dict[str, Any], repo: str | None
) -> str:
    """The whole card as Markdown with YAML in front."""
    output = report["outputs"][0]
    name = output["path"].rsplit("/", 1)[-1]
    where = repo or "<owner>/<repo>"
    calibration = report["calibration"]
    mix = [
        [d["name"], d["source"], f"{100 * d['weight']:.0f} %", f"`{d['sha256'][:16]}…`"]
        for d in calibration["domains"]
    ]
    body = f"""# {name.removesuffix(".gguf")}

{info.id} as one GGUF of {reports.size(output["n_bytes"])} ({output["bpw"]:.2f} bits per weight).
The type of every tensor was searched by measuring the KL divergence to the full-precision model;
the weights were quantized with GPTQ onto llama.cpp's own grids. It runs in every llama.cpp build.

{reports.verdict(report)}

## Measured

{reports.comparison(report)}

Protocol: {report["protocol"]}. The text was held out: {", ".join(report["texts"])}.
The llama.cpp rows were made in the same run from the same base with the same importance matrix.

{reports.domains(report)}

{reports.zero_shot(report)}

## Run it

```
llama serve -hf {where}:{recipe["output"]["label"]}
ollama run hf.co/{where}:{recipe["output"]["label"]}
```

```python
from llama_cpp import Llama
llm = Llama.from_pretrained(repo_id="{where}", filename="{name}")
```

## How it was made

quantkit {report["versions"]["quantkit"]}, from revision `{recipe["revision"][:12]}`,
seed {recipe["config"]["seed"]}, profile {recipe["config"]["profile"]}.
{calibration["note"][0].upper() + calibration["note"][1:]}.

{reports.table(["calibration", "source", "share", "sha256"], mix)}

Every tensor's type and method, and the sha256 of everything that went in, are in `recipe.json`:

```
quantkit rebuild recipe.json --base base.gguf --out {name}
```

sha256 of `{name}`: `{output["sha256"]}`

## Limits

The figures above are for the texts named there; on other text they differ.
The licence is that of the base model{_licence(info)}.
"""
    if report["fallbacks"]:
        body += f"\n## Fallbacks\n\n{reports.fallbacks(report)}\n"
    return str(ModelCard(f"---\n{card_data(info, report).to_yaml()}\n---\n\n{body}"))


def _licence(info: ModelInfo) -> str:
    if not info.license:
        return ", which does not state one"
    return f" ({info.license_name or info.license})"
