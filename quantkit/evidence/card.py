"""The model card: which file to choose, the evidence, how to run it, and how to make it again."""

from __future__ import annotations

import math

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from quantkit.checkpoint.info import ModelInfo
from quantkit.checkpoint.quantized import source_of
from quantkit.config import RunConfig
from quantkit.evidence import report as reports
from quantkit.evidence import run_with
from quantkit.evidence.escaping import all_markdown, markdown, metadata, repo_ids, web_link
from quantkit.evidence.escaping import tags as tags_of
from quantkit.evidence.report import beside, tables, text
from quantkit.evidence.report.schema import OURS, Output, Report, Row, Search, Tuning, to_json
from quantkit.llamacpp.output import safe_name
from quantkit.markdown import table
from quantkit.run.artifacts import RELATIVE
from quantkit.sizes import size
from quantkit.tensors import UNCHANGED

_EQUALIZED = (
    "Channels are equalized: powers of two were moved from what writes them to the layers that read"
    " them, so that rounding costs less. At full precision the model answers as before, bit for"
    " bit, but its weights are others: adapters that were made for the original do not fit this"
    " file. llama.cpp's files were made of the original, whose importance matrix is beside them."
)
_TAGS = ("gguf", "llama.cpp", "quantized", "quantkit", "imatrix", "gptq")
PROJECT = "https://github.com/quantkit/quantkit"
BADGE = "made-with-quantkit.png"  # lies in quantkit/data
_MADE_WITH = (
    f"[![made with quantkit]({BADGE})]({PROJECT}) Make one like it of any model: `quantkit run"
    f" MODEL --like Q4_K_M`, or its web page, which also"
    f" [runs as a Space of your own]({PROJECT}/blob/main/docs/space.md)."
)
_NOT_OURS = ("safetensors", "pytorch", "onnx", "transformers.js", "tensorboard")  # of the base


def card_data(info: ModelInfo, report: Report) -> ModelCardData:
    """Return the card's YAML: the base card's license, languages and tags, where the model comes
    from, measured results.
    """
    kept = metadata(info.card, _repo(info))
    tags = dict.fromkeys([*_TAGS, *tags_of(info.card.get("tags"))])
    return ModelCardData(
        model_name=_title(info, report),
        base_model=_base_model(info),
        base_model_relation="quantized",
        quantized_by="quantkit",
        tags=[tag for tag in tags if tag not in _NOT_OURS],
        eval_results=results(report),
        **{"pipeline_tag": "text-generation", **kept},
    )


def results(report: Report) -> list[EvalResult]:
    """Return the figures that stand in the card's YAML."""
    results = []
    for output in report.outputs:
        text_name = "held-out text" + _of_one(report, output)
        results += [
            _result(text_name, "perplexity", "Perplexity", output.perplexity.value),
            _result(text_name, "kl_divergence", "Mean KL divergence, nats", output.kl.value),
            _result(text_name, "top1_agreement", "Same most likely token", output.top1),
        ]
        results += [
            _result(name + _of_one(report, output), "accuracy", "Accuracy", task.acc.value)
            for name, task in (output.tasks or {}).items()
        ]
    return [r for r in results if not math.isnan(r.metric_value)]


def _title(info: ModelInfo, report: Report) -> str:
    """The file's name, or of several the model's."""
    if len(report.outputs) == 1:
        return report.first.name.removesuffix(".gguf")
    return f"{safe_name(info.id)}-EVO-GGUF"


def _of_one(report: Report, output: Output) -> str:
    return f" ({output.name})" if len(report.outputs) > 1 else ""


def _base_model(info: ModelInfo) -> str | list[str] | None:
    """The Hub id that this is quantized from; for a local folder what its card names, if
    anything.
    """
    if info.base is not None:  # the fine-tune, and what it was merged onto
        found = [i.id for i in (info, info.base) if not i.local_path]
        return found or None
    if not info.local_path:
        return info.id
    named = repo_ids(info.card.get("base_model"))
    return named if len(named) > 1 else next(iter(named), None)


def _repo(info: ModelInfo) -> str | None:
    return None if info.local_path else info.id


def _result(dataset: str, metric: str, name: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset.replace(" ", "-"),
        dataset_name=dataset,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 5),
    )


def model_card(
    info: ModelInfo,
    measured: Report,
    config: RunConfig,
    repo: str | None,
    receipt_sha256: str | None = None,
) -> str:
    """Return the whole card as Markdown with YAML in front.

    Args:
        measured: the report of a run.
        config: what the run was asked for.
        repo: where it will be published; None leaves a place to fill in.
        receipt_sha256: the sum of the receipt beside the card, if there is one.
    """
    report = _escaped(measured)
    outputs = report.outputs
    middle = outputs[len(outputs) // 2]  # of several sizes the commands name the one in the middle
    parts = [
        f"# {_title(info, report)}",
        f"{_origin(info)} as {_size(report)}. The type of every tensor was searched by measuring"
        " the KL divergence to the full-precision model; the weights were quantized with GPTQ onto"
        f" llama.cpp's own grids. {_runtimes(report)}",
        _verdict(report),
        _MADE_WITH,
        "## Which file should I choose?",
        _choice(report, repo),
        "## Measured",
        _measured(report, repo),
        _plot("frontier", "KL divergence over file size, ours and llama.cpp's"),
        *map(reports.set_table, tables.of_one_size(report)),
        text.protocol_line(report)
        + " The llama.cpp rows were made in the same run from the same base with the same"
        " importance matrix. Weight KL is that of the file expanded to F16: llama.cpp also rounds"
        " the activations of quantized files, which costs each the same few thousandths.",
        *_losses(report),
        *_missing(report),
        *_details(report),
        *_in_use(report),
        *(["## Verify it", _verify(repo, receipt_sha256)] if receipt_sha256 else []),
        "## Run it",
        run_with.in_markdown(middle, outputs, repo or "<owner>/<repo>"),
        "## What is inside",
        *(
            part
            for output in outputs
            for part in (
                _plot(
                    report.numbered("tensor-map", output),
                    f"The type of every tensor{_of_one(report, output)}",
                ),
                _inside(output),
            )
        ),
        *([reports.bullets(lines)] if (lines := text.carried(report)) else []),
        "## How it was made",
        _made(report, config),
        "## Checked before upload",
        reports.bullets(
            f"{name}: {state}. {about}." for name, state, about in text.check_lines(report)
        ),
        "## Limits and license",
        _limits(info),
    ]
    groups = tables.fallbacks(report)
    if groups is not None:
        parts += ["## Fallbacks", reports.set_table(groups)]
    body = "\n\n".join(parts) + "\n"
    return str(ModelCard(f"---\n{card_data(info, measured).to_yaml()}\n---\n\n{body}"))


def _escaped(measured: Report) -> Report:
    return reports.read(all_markdown(to_json(measured)))


def evidence(measured: Report, repo: str | None) -> list[str]:
    """Return the parts of a card that hold its figures: each stands in it as it is."""
    report = _escaped(measured)
    return [
        _verdict(report),
        _choice(report, repo),
        _measured(report, repo),
        *map(reports.set_table, tables.of_one_size(report)),
        text.protocol_line(report),
        *_losses(report),
        *_missing(report),
        *_details(report),
        *_in_use(report),
        *(_sum(output) for output in report.outputs),
    ]


def _verdict(report: Report) -> str:
    verdicts = text.verdicts(report)
    return verdicts[0] if len(verdicts) == 1 else reports.bullets(verdicts)


def _details(report: Report) -> list[str]:
    """The figures by kind of text, in long contexts and on tasks."""
    return [
        reports.set_table(tables.domains(report)),
        *([reports.set_table(spoken)] if (spoken := tables.languages(report)) else []),
        *([reports.set_table(long)] if (long := tables.long_contexts(report)) else []),
        *([reports.bullets(lines)] if (lines := text.task_lines(report)) else []),
    ]


def _sum(output: Output) -> str:
    said = f"sha256 of `{output.name}`:\n`{output.sha256}`"
    return "\n\n".join(
        [said, *(f"sha256 of `{p.name}`:\n`{p.sha256}`" for p in output.parts or ())]
    )


def _verify(repo: str | None, receipt_sha256: str) -> str:
    return (
        f"```\nquantkit verify {repo or '<owner>/<repo>'}\n```\n\n"
        "measures windows of the texts again that it draws itself, makes the full-precision file"
        " for that, and compares what comes out, all files and this card with `receipt.json`"
        f" (its sum: `{receipt_sha256}`)."
    )


def _runtimes(report: Report) -> str:
    return " ".join(text.runtimes(report)) or "It runs in every llama.cpp build."


def _size(report: Report) -> str:
    said = [f"{size(o.n_bytes)} ({o.bpw:.2f} bits per weight)" for o in report.outputs]
    return f"one GGUF of {said[0]}" if len(said) == 1 else f"{len(said)} GGUFs: {', '.join(said)}"


def _origin(info: ModelInfo) -> str:
    """The model's name, with a link where its place on the Hub is known."""
    if info.base is not None:
        return f"{_named(info)}, a LoRA merged onto {_named(info.base)},"
    return _named(info)


def _named(info: ModelInfo) -> str:
    if not info.local_path:
        return f"[{info.id}](https://huggingface.co/{info.id})"
    name = markdown(info.id.rsplit("/", 1)[-1])
    base = next(iter(repo_ids(info.card.get("base_model"))), None)
    return f"{name} ([{base}](https://huggingface.co/{base}))" if base else name


def _link(row: Row, repo: str | None) -> str:
    """A file's name with its link; of one in parts a link for each."""
    parts = isinstance(row, Output) and row.parts
    if not parts:
        return _file_link(row.name, row.name, repo)
    links = (_file_link(str(i), part.name, repo) for i, part in enumerate(parts, 1))
    return f"`{row.name}`, in {len(parts)} parts: {', '.join(links)}"


def _file_link(said: str, name: str, repo: str | None) -> str:
    if repo is None:
        return f"`{said}`"
    return f"[{said}](https://huggingface.co/{repo}/resolve/main/{name}?download=true)"


def _choice(report: Report, repo: str | None) -> str:
    """The files by the memory that they need."""
    made = tables.choice(report, lambda row: _link(row, repo))
    base = report.base.speed
    about = (
        f"Memory is that of a process with a context of {base.n_ctx:,} tokens, measured; devices"
        " are the smallest of their kind that leave so much free. Longer contexts take more."
        if base
        else "Memory was not measured; it is about the size of the file, plus its context."
    )
    return f"{reports.plain_table(made)}\n\n{about}"


def _measured(report: Report, repo: str | None) -> str:
    """Every file with all of its figures; ours are links."""

    def name(row: Row) -> str:
        return _link(row, repo) if row.kind == OURS else row.title

    return reports.set_table(tables.comparison(report, name, wide=True))


def _plot(name: str, about: str) -> str:
    return f"![{about}](plots/{name}.png)"


def _losses(report: Report) -> list[str]:
    lost = text.losses(report)
    return [f"{text.losing(report)}:", reports.bullets(lost)] if lost else []


def _missing(report: Report) -> list[str]:
    """What could not be measured, and why."""
    lines = text.not_measured(report)
    return ["Not measured:", reports.bullets(lines)] if lines else []


def _in_use(report: Report) -> list[str]:
    """Answers beside the original's, and KL in conversations."""
    parts = []
    answers, spoken = beside.answer_table(report), beside.conversation_tables(report)
    if answers:
        lines = reports.bullets(beside.answer_lines(report))
        parts += [f"## {beside.HEADING}", reports.set_table(answers), lines]
    if spoken:
        lines = reports.bullets(beside.conversation_lines(report))
        parts += [f"## {beside.IN_CONVERSATIONS}", *map(reports.set_table, spoken), lines]
    return parts


def _inside(output: Output) -> str:
    """How many tensors have each type, and by which method it was made."""
    counts: dict[tuple[str, str], int] = {}
    for tensor in (output.tensors or {}).values():
        key = (tensor.qtype, tensor.method or "")
        counts[key] = counts.get(key, 0) + 1
    said = [
        f"{n} {qtype}{' by' * (method not in ('', UNCHANGED))} {method}".rstrip()
        for (qtype, method), n in sorted(counts.items())
    ]
    return f"Quantized tensors: {', '.join(said)}. `{_recipe_of(output)}` names every one."


def _recipe_of(output: Output) -> str:
    return f"recipes/{output.name.removesuffix('.gguf')}.json"


def _made(report: Report, config: RunConfig) -> str:
    texts, note = report.calibration.domains if report.calibration else (), report.calibration_note
    mix = [[t.name, t.source, f"{100 * t.weight:.0f} %", f"`{t.sha256[:16]}…`"] for t in texts]
    base = RELATIVE.equalized_base.name if config.equalize else RELATIVE.base.name
    rebuild = "\n".join(
        f"quantkit rebuild {_recipe_of(o)} --base {base} --out {o.name}" for o in report.outputs
    )
    whole = f"the full-precision GGUF (sha256 `{report.base.sha256}`)"
    if config.equalize:
        whole = f"`{base}`, which `quantkit run` with `--equalize` leaves in its folder"
    searches = [_search(output.search) for output in report.outputs if output.search]
    lines = [
        f"Model revision `{report.revision}`, profile {config.profile}, seed"
        f" {config.seed}. {note[:1].upper() + note[1:]}.",
        f"Levels to choose from: {', '.join(config.level_names)}"
        f"{'' if config.levels else ', or 16 bits as in the original'}; methods:"
        f" {', '.join(config.methods)}.",
        *([_EQUALIZED] if config.equalize else []),
        searches[0] if len(searches) == 1 else reports.bullets(searches),
        table(["calibration", "source", "share", "sha256"], mix),
        f"The same again, from {whole}:",
        f"```\n{rebuild}\n```",
        "Type lists for `llama-quantize --tensor-type-file` are in `recipes/`, too.",
        "\n\n".join(map(_sum, report.outputs)),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in report.versions.items()) + ".",
    ]
    return "\n\n".join(lines)


def _search(search: Search) -> str:
    budget = f"Budget: {search.limit_bytes:,} bytes"
    if not search.searched:
        return f"{budget}; every type was given, so nothing was searched."
    return (
        f"{budget} ({search.target}), used: {search.n_bytes:,}. Search:"
        f" {search.generations} generation{'s' if search.generations != 1 else ''} over"
        f" {search.tokens:,} evaluated tokens, from KL"
        f" {text.number(search.proposal_kl)} to {text.number(search.kl)} on its own text"
        f"{', as tuning is expected to leave it' if search.expects_tuning else ''}."
        + _tuning(search.tuning)
    )


def _tuning(tuning: Tuning | None) -> str:
    """What tuning came to, as a sentence that follows another."""
    if tuning is None:
        return ""
    if tuning.reason is not None:
        return f" Not tuned: {tuning.reason}."
    before, after = text.number(tuning.kl_before), text.number(tuning.kl_after)
    said = f" Tuned by {tuning.steps} gradient steps per block: KL {before} to {after}"
    return (
        f"{said} on held-out text."
        if tuning.n_tensors
        else f"{said}, so the untuned file was kept."
    )


def _limits(info: ModelInfo) -> str:
    lines = [
        "The figures above are for the texts named there; on other text they differ. Speed was"
        " measured on the machine that made the file, and only compares the rows.",
        f"The license is that of the base model{_license(info)}.",
    ]
    source = source_of(info.id, info.config, info.base_model)
    if source is not None:
        lines.append(source.sentence(tuple(map(markdown, info.base_model))))
    if info.gated:
        lines.append(
            f"Access to {markdown(info.id)} is gated: its owner's terms apply to this file, too."
            " Such files are published privately unless their maker decides otherwise."
        )
    return "\n\n".join(lines)


def _license(info: ModelInfo) -> str:
    if not info.license:
        return ", which does not state one"
    name = markdown(info.license_name or info.license)
    link = web_link(info.license_link, _repo(info))
    return f" ([{name}]({link}))" if link else f" ({name})"
