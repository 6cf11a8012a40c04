"""The report's schema, words and tables: ours beside theirs, wins and losses said alike."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from quantkit.errors import QuantkitError
from quantkit.evidence import report
from quantkit.evidence.report import plots, tables, text
from quantkit.evidence.report.render import pictures
from quantkit.sizes import size


def interval(mean: float, stderr: float, ci95: list[float] | None = None) -> dict[str, Any]:
    return {"mean": mean, "stderr": stderr, "ci95": ci95, "n": 2040}


def divergence(mean: float, stderr: float, ci95: list[float] | None = None) -> dict[str, Any]:
    spread = dict.fromkeys(("median", "p99", "p999", "max"), mean)
    return {**interval(mean, stderr, ci95), **spread}


def perplexity(value: float) -> dict[str, Any]:
    return {"value": value, "stderr": 0.1, "ci95": None, "n": 2040}


KL = divergence(0.0123, 0.0004, [0.0115, 0.0131])


def versus(difference: float, p_value: float) -> dict[str, Any]:
    test = {"difference": difference, "stderr": 0.1, "ci95": [-1.0, 1.0], "p_value": p_value}
    test["significant"] = p_value < 0.05
    return {"kl": {**test, "n_windows": 20}, "weight_kl": {**test, "n_windows": 8}}


def row(**changes: Any) -> dict[str, Any]:
    """One file's figures."""
    values = {
        "kind": "stock",
        "n_bytes": 1_000_000,
        "bpw": 4.5,
        "kl": KL,
        "top1": 0.912,
        "perplexity": perplexity(12.3456),
        "domains": {"docs": {"kl": KL}, "code": {"kl": divergence(0.00002, 0.1)}},
    }
    return {**values, **changes}


def tensors() -> dict[str, Any]:
    table = {
        f"blk.{block}.{kind}.weight": {
            "qtype": qtype,
            "n_elements": 4096,
            "n_bytes": n_bytes,
            "method": "gptq",
        }
        for block in range(3)
        for kind, qtype, n_bytes in (("attn_q", "Q4_K", 2304), ("ffn_up", "Q8_0", 4352))
    }
    embedding = {"qtype": "Q6_K", "n_elements": 8192, "n_bytes": 6720, "method": "imatrix"}
    return table | {"token_embd.weight": embedding}


def speed(rate: float) -> dict[str, Any]:
    return {
        "n_bytes": 1_000_000,
        "n_ctx": 2048,
        "load_seconds": 0.25,
        "prompt": {"tokens": 128, "tokens_per_second": 10 * rate, "repeats": [10 * rate]},
        "generation": {"tokens": 32, "tokens_per_second": rate, "repeats": [rate]},
        "peak_rss_bytes": 180_000_000,
        "buffers": {"model_bytes": 1_000_000},
        "n_threads": 2,
        "n_gpu_layers": 0,
    }


OURS = "Tiny-EVO-Q4_K_M.gguf"


def values() -> dict[str, Any]:
    ours = row(
        kind="ours",
        name=OURS,
        path="7-stitch/Tiny-EVO-Q4_K_M.gguf",
        zero_shot={"status": "not run", "reason": "no --tasks file"},
        sha256="ab" * 32,
        tensors=tensors(),
        speed=speed(50),
        generation={"prompt": "Say <hi>.", "asked": "chat template", "text": "Hi | there."},
        trace=[
            {"generation": i, "tokens": 1000 * (i + 1), "kl": 0.03 / (i + 1), "stderr": 0.001}
            for i in range(4)
        ],
        integrity=[
            {"name": "dequantized weights", "passed": True, "about": "all of them"},
            {"name": "logits", "passed": None, "about": "too little memory"},
        ],
    )
    return {
        "schema": report.SCHEMA,
        "kind": "run",
        "model": "owner/Tiny",
        "outputs": [ours],
        "baselines": [
            row(name="Q4_K_S", n_bytes=900_000, kl=divergence(0.05, 0.001)),
            row(
                name="Q5_1 --pure",
                n_bytes=990_000,
                kl=divergence(0.0246, 0.001),
                versus={OURS: versus(0.0123, 0.0001)},
            ),
            row(name="Q4_K_M", n_bytes=1_100_000, kl=divergence(0.001, 0.001)),
        ],
        "base": {
            "n_bytes": 4_000_000,
            "n_parameters": 2_000_000,
            "perplexity": perplexity(11.0),
        },
        "protocol": "llama.cpp",
        "n_windows": None,
        "texts": {"docs": "ab", "code": "cd"},
        "calibration": {"note": "built-in text"},
        "fallbacks": [],
        "unmapped": [],
        "versions": {"quantkit": "0.1.0"},
    }


def losing() -> dict[str, Any]:
    """A smaller stock file is better, and ours fails a check."""
    worse = values()
    worse["outputs"][0]["kl"] = divergence(0.0738, 0.001)
    worse["baselines"][0]["domains"]["code"]["kl"]["mean"] = 0.00001
    failed = {"name": "chat turn", "passed": False, "about": "0 characters"}
    worse["outputs"][0]["integrity"][1] = failed
    return worse


def test_the_comparison_is_by_size_and_marks_ours() -> None:
    made = tables.comparison(report.read(values()))
    assert [line.cells[0] for line in made.lines] == [
        "llama.cpp Q4_K_S",
        "llama.cpp Q5_1 pure",
        "Tiny-EVO-Q4_K_M.gguf",
        "llama.cpp Q4_K_M",
        "full precision",
    ]
    ours = made.lines[2]
    assert ours.kind == "ours"
    assert ours.cells[1:6] == ("1.0 MB", "4.50", "0.0123 ± 0.0004", "91.2 %", "12.346")
    assert made.lines[1].cells[-1] == "worse (p < 0.001)" and ours.cells[-1] == "-"
    assert made.lines[-1].cells[1:6] == ("4.0 MB", "16.00", "0", "100 %", "11.000")
    assert all(len(line.cells) == len(made.headers) for line in made.lines)
    assert "weight KL" not in made.headers, "a column that no file has"


def test_weight_kl_is_a_column_where_it_was_measured() -> None:
    changed = values()
    changed["outputs"][0]["weight_kl"] = divergence(0.005, 0.0002)
    made = tables.comparison(report.read(changed))
    at = made.headers.index("weight KL")
    assert made.lines[2].cells[at] == "0.00500 ± 0.00020"
    assert made.lines[0].cells[at] == "-"


def test_the_verdict_is_against_the_best_file_of_at_most_our_size() -> None:
    found = report.verdict(report.read(values()))
    assert "Q5_1 pure" in found and "50 % below" in found and "; significant" in found
    assert "Q4_K_M," not in found, "larger files are no fair baseline"


def test_the_verdict_knows_the_weights_too() -> None:
    changed = values()
    changed["outputs"][0]["weight_kl"] = divergence(0.03, 0.0002)
    changed["baselines"][1]["weight_kl"] = divergence(0.02, 0.0002)
    assert "weight KL is 50 % ABOVE that file" in report.verdict(report.read(changed))


def test_a_uniform_file_is_no_llama_cpp_file() -> None:
    changed = values()
    small = divergence(0.001, 0.0001)
    changed["baselines"].append(row(kind="uniform", name="Q4_K", n_bytes=980_000, kl=small))
    read = report.read(changed)
    assert "Q5_1 pure" in report.verdict(read)
    assert any("uniform Q4_K" in line and "no larger" in line for line in report.losses(read))


def test_a_loss_is_said_plainly() -> None:
    found = report.read(losing())
    assert "200 % ABOVE" in report.verdict(found)
    lines = report.losses(found)
    assert any(line.startswith("llama.cpp Q4_K_S") and "0.0738" in line for line in lines)
    assert lines[-1] == "FAILED: chat turn: 0 characters."
    text_of_all = report.markdown(found)
    assert "## Where this file loses" in text_of_all and "FAILED" in text_of_all
    assert "Where this file loses" in report.html(found)


def test_a_domain_lost_is_said() -> None:
    changed = values()
    changed["baselines"][0]["domains"]["code"]["kl"]["mean"] = 0.00001
    assert report.losses(report.read(changed)) == [
        "llama.cpp Q4_K_S is closer to the base on code (0.0000100 against 0.0000200)."
    ]


def family() -> dict[str, Any]:
    """Two outputs; the stock file in between is tested against both."""
    value = values()
    large = {
        **row(kind="ours", name="Tiny-EVO-Q6_K.gguf", n_bytes=2_000_000),
        "tensors": tensors(),
        "kl": divergence(0.002, 0.0001),
    }
    value["outputs"].append(large)
    value["baselines"].append(
        row(
            name="Q5_K_M",
            n_bytes=1_200_000,
            kl=divergence(0.001, 0.0001),
            versus={OURS: versus(0.5, 0.0001), large["name"]: versus(-0.001, 0.3)},
        )
    )
    value["refused"] = [{"target": "1B", "limit_bytes": 1, "refusal": "The budget is too small."}]
    return value


def test_every_file_of_a_family_has_its_verdict_and_its_losses() -> None:
    read = report.read(family())
    small, large = report.verdicts(read)
    assert small.startswith(OURS) and "Q5_1 pure" in small, "larger files are not its baselines"
    assert "(Q4_K_M, " in large, "the closest of at most its size, whoever it is tested against"
    lines = report.losses(read)
    assert all(line.startswith("Tiny-EVO-Q6_K.gguf: ") for line in lines)
    assert any("Q5_K_M" in line and "NOT significant" in line for line in lines)


def test_a_row_is_tested_against_the_output_of_nearest_size() -> None:
    read = report.read(family())
    between = next(r for r in read.baselines if r.name == "Q5_K_M")
    assert text.tested(read.tests(between).kl) == "worse (p < 0.001)"
    alone = read.about(read.outputs[1])
    assert text.tested(alone.tests(between).kl) == "no difference (p = 0.3)"
    assert tables.comparison(read).headers[-1] == "against ours of nearest size"


def test_a_family_is_shown_whole() -> None:
    read = report.read(family())
    for shown in (report.markdown(read), report.html(read)):
        assert "The budget is too small." in shown and "Tiny-EVO-Q6_K.gguf" in shown
    figures = dict.fromkeys(plots.draw_all(read), "<svg></svg>")
    page = report.html(read, figures)
    for output in read.outputs:
        assert f"Types of {output.name}" in page
        assert (f"Search of {output.name}" in page) == bool(output.trace)
    assert page.count("<svg>") == 7 and "Types of" not in report.sections(read)


def test_nothing_lost_is_no_section() -> None:
    assert report.losses(report.read(values())) == []
    assert "loses" not in report.markdown(report.read(values()))


def test_nothing_as_small() -> None:
    alone = values()
    alone["baselines"] = alone["baselines"][2:]
    assert "No llama.cpp file" in report.verdict(report.read(alone))


@pytest.mark.parametrize(
    ("difference", "p_value", "said"),
    [
        (0.01, 0.0004, "worse (p < 0.001)"),
        (-0.01, 0.031, "BETTER (p = 0.031)"),
        (-0.01, 0.4, "no difference (p = 0.4)"),
    ],
)
def test_significance_in_words(difference: float, p_value: float, said: str) -> None:
    changed = values()
    changed["baselines"][0]["versus"] = {OURS: versus(difference, p_value)}
    read = report.read(changed)
    assert text.tested(read.tests(read.baselines[0]).kl) == said


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.5, "1.50"), (0.0506, "0.0506"), (0.00431, "0.00431"), (0.0000431, "0.0000431"), (0, "0")],
)
def test_digits_that_count(value: float, shown: str) -> None:
    assert report.number(value) == shown


def test_an_error_has_the_digits_of_its_value() -> None:
    assert report.with_error(report.Mean(0.01234, 0.00041)) == "0.0123 ± 0.0004"


def test_sizes_for_people() -> None:
    assert size(105_454_144) == "105.5 MB"
    assert size(999_000_000) == "999.0 MB"
    assert size(5_500_000_000) == "5.50 GB"


def test_languages_one_row_each() -> None:
    """Beside how well the base knows them; not among the domains a second time."""
    changed = values()
    for row in (*changed["outputs"], *changed["baselines"]):
        row["domains"] = {**row["domains"], "prose-de": {"kl": KL}, "lang-hi": {"kl": KL}}
    changed["calibration"] = {"note": "x", "languages": {"de": 1.234}}
    made = report.read(changed)
    found = tables.languages(made)
    assert found is not None
    assert [line.cells[:2] for line in found.lines] == [("German", "1.23"), ("Hindi", "-")]
    assert tables.domains(made).headers == tables.domains(report.read(values())).headers
    assert tables.languages(report.read(values())) is None
    assert "German" in report.markdown(made) and "German" in report.html(made)


def test_domains_one_column_each() -> None:
    made = tables.domains(report.read(values()))
    assert made.headers == ("mean KL on", "docs", "code")
    assert made.lines[2].cells == ("Tiny-EVO-Q4_K_M.gguf", "0.0123", "0.0000200")
    assert len(made.lines) == 4


def test_zero_shot_run_and_not_run() -> None:
    assert text.task_lines(report.read(values())) == [
        "Zero-shot tests were not run: no --tasks file."
    ]
    done = values()
    accuracy = {"value": 0.62, "stderr": 0.031, "n": 200}
    done["outputs"][0]["tasks"] = {
        "everyday": {
            **{"task": "everyday", "n_items": 200, "acc": accuracy},
            **{"items_sha256": "ab", "seconds": 1.0, "source": "everyday"},
            "base": {"acc": {**accuracy, "value": 0.64}},
            "flips": {"acc": {"n": 7, "fraction": 0.035, "gained": 3, "lost": 4, "p_value": 1.0}},
        }
    }
    assert text.task_lines(report.read(done)) == [
        "Tiny-EVO-Q4_K_M.gguf, everyday (200 items): 62.0 ± 3.1 %, full precision 64.0 %;"
        " 7 answers differ from full precision's."
    ]
    task = done["outputs"][0]["tasks"]["everyday"]
    task["overlap"] = {"n_items": 200, "n_short": 2, "n_seen": 0}
    assert text.task_lines(report.read(done))[0].endswith(
        "; no item overlaps with the calibration text (2 are too short to be judged)."
    )
    task["overlap"] = {"n_items": 200, "n_short": 0, "n_seen": 3}
    assert text.task_lines(report.read(done))[0].endswith(
        "; 3 items OVERLAP with the calibration text."
    )


def test_text_that_was_seen_is_told() -> None:
    changed = values()
    assert "runs of 13 words" not in text.protocol_line(report.read(changed))
    changed["overlap"] = {
        "docs": {"n": 1000, "n_seen": 0, "share": 0.0},
        "code": {"n": 1000, "n_seen": 123, "share": 0.123},
    }
    said = text.protocol_line(report.read(changed))
    assert "(runs of 13 words that the calibration text has, too: docs none, code 12 %)" in said


def fallback(tensor: str, asked: str = "Q4_K", reason: str = "rows of 96") -> dict[str, str]:
    return {"tensor": tensor, "asked": asked, "used": "Q5_0", "reason": reason}


def test_fallbacks_are_grouped() -> None:
    changed = values()
    changed["fallbacks"] = [fallback("a"), fallback("b"), fallback("c", "Q5_K"), fallback("d")]
    made = tables.fallbacks(report.read(changed))
    assert made is not None
    assert [line.cells for line in made.lines] == [
        ("Q4_K", "Q5_0", "3", "rows of 96"),
        ("Q5_K", "Q5_0", "1", "rows of 96"),
    ]


def test_types_that_not_every_runtime_reads_are_said() -> None:
    plain = report.read(values())
    assert text.runtimes(plain) == []
    assert "Runtimes" not in report.markdown(plain) + report.html(plain)
    newer = values()
    tensor = next(iter(newer["outputs"][0]["tensors"].values()))
    tensor["qtype"] = "Q2_0"
    made = report.read(newer)
    (said,) = text.runtimes(made)
    assert "Q2_0" in said and "llama-cpp-python" in said
    assert said in report.markdown(made) and said in report.html(made)


def test_what_is_carried_over_is_counted_where_it_is_used() -> None:
    made = values()
    for name, tensor in made["outputs"][0]["tensors"].items():
        if "attn_q" in name:
            tensor |= {"qtype": "Q4_0", "method": "exact"}
        elif "ffn_up" in name:
            tensor |= {"qtype": "Q4_1", "method": "carried" if "0" in name else "gptq"}
    row = {"n_weights": 4096, "n_equal": 4096, "relative": 0.0}
    near = {"qtype": "Q4_1", "n_weights": 4096, "n_equal": 4000, "relative": 1e-8}
    made["carried"] = [
        {"tensor": f"blk.{block}.{kind}.weight", **about}
        for block in range(3)
        for kind, about in (("attn_q", {"qtype": "Q4_0", **row}), ("ffn_up", near))
    ]
    said = text.carried(report.read(made))
    assert len(said) == 2
    assert "3 tensors" in said[0] and "exactly as Q4_0: 12,288 of 12,288" in said[0]
    assert "1 tensors" in said[1] and "4,000 of 4,096" in said[1] and "1e-04 off" in said[1]
    assert all(line in report.markdown(report.read(made)) for line in said)
    assert text.carried(report.read(values())) == []


def test_the_whole_report() -> None:
    shown = report.markdown(report.read(values()))
    assert shown.startswith("# owner/Tiny\n") and shown.endswith("\n")
    for part in ("50 % below", "By domain", "not run", "built-in text", "docs, code", "180.0 MB"):
        assert part in shown
    assert "Fallbacks" not in shown and "not found in the model" not in shown
    changed = values()
    changed["fallbacks"], changed["unmapped"] = [fallback("a")], ["blk.0.x", "blk.1.x"]
    changed["not_measured"] = [{"name": "other.gguf", "reason": "another vocabulary."}]
    shown = report.markdown(report.read(changed))
    assert "## Fallbacks" in shown and "blk.0.x, blk.1.x." in shown
    assert "- other.gguf: another vocabulary." in shown


def test_nothing_is_changed() -> None:
    given = values()
    before = copy.deepcopy(given)
    report.markdown(report.read(given))
    assert given == before


def test_names_cannot_break_a_table_or_a_page() -> None:
    changed = values()
    changed["baselines"][0] |= {"kind": "given", "name": "a|b<script>\n.gguf"}
    read = report.read(changed)
    lines = report.markdown(read).splitlines()
    line = next(x for x in lines if "script" in x and x.startswith("|"))
    assert "a\\|b" in line
    page = report.html(read)
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("name", ["model", "protocol", "calibration", "versions", "generation"])
def test_strangers_words_are_escaped(name: str) -> None:
    """Wherever a report holds a sentence, and in an attribute, too."""
    evil = '"><script>alert(1)</script>'
    changed = values()
    changed |= {
        "model": {"model": evil},
        "protocol": {"protocol": evil},
        "calibration": {"calibration": {"note": evil}},
        "versions": {"versions": {evil: evil}},
        "generation": {},
    }[name]
    if name == "generation":
        changed["outputs"][0]["generation"] = {"prompt": evil, "text": evil}
    read = report.read(changed)
    for page in (report.html(read), report.sections(read)):
        assert "<script" not in page
    assert "&#34;&gt;&lt;script&gt;" in report.html(read)


def test_a_page_of_its_own() -> None:
    read = report.read(values())
    figures = {name: pictures(plot)[0] for name, plot in plots.draw_all(read).items()}
    page = report.html(read, figures)
    assert page.count("<svg") == 5
    page = page.replace("http://www.w3.org/2000/svg", "")
    for outside in ("http://", "https://", "<script", "<link", "@import", "url("):
        assert outside not in page, outside
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {"schema": 1},
        {**values(), "schema": 99},
        {**values(), "outputs": []},
        {**values(), "outputs": [{}]},
        {**values(), "base": {}},
        {**values(), "base": None},
        {**values(), "outputs": [{**values()["outputs"][0], "kind": "mine"}]},
        {**values(), "baselines": 3},
    ],
)
def test_a_broken_report_is_one_sentence(broken: dict[str, Any]) -> None:
    with pytest.raises(QuantkitError, match=r"report (has schema|cannot be read)"):
        report.read(broken)


def test_all_files_are_written(tmp_path: Path) -> None:
    written = report.write_report(tmp_path, report.read(values()))
    names = {path.relative_to(tmp_path).as_posix() for path in written}
    plots = ("frontier", "domains", "tensor-map", "bits-by-kind", "convergence")
    assert names == {"report.json", "report.md", "report.html"} | {
        f"plots/{name}.{kind}" for name in plots for kind in ("svg", "png")
    }
    assert written[0].name == "report.json"
    assert report.read(json.loads(written[0].read_text("utf-8"))).model == "owner/Tiny"


def test_the_schema_is_documented() -> None:
    """Every key of a report stands in docs/report.md."""
    told = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")
    assert f"schema {report.SCHEMA}" in told
    for key in [
        *values(),
        *values()["outputs"][0],
        *values()["base"],
        "versus",
        "weight_kl",
        "long",
    ]:
        assert f"`{key}`" in told, key


def test_long_contexts() -> None:
    assert tables.long_contexts(report.read(values())) is None
    changed = values()
    changed["outputs"][0]["long"] = {"16384": KL, "4096": divergence(0.02, 0.001)}
    changed["baselines"][0]["long"] = {"4096": divergence(0.03, 0.001)}
    made = tables.long_contexts(report.read(changed))
    assert made is not None
    assert made.headers == ("mean KL in a context of", "4,096 tokens", "16,384 tokens")
    small, ours = (line.cells for line in made.lines)
    assert small == ("llama.cpp Q4_K_S", "0.0300 ± 0.0010", "-")
    assert ours[1:] == ("0.0200 ± 0.0010", "0.0123 ± 0.0004")
    for shown in (report.markdown(report.read(changed)), report.html(report.read(changed))):
        assert "In long contexts" in shown and "16,384 tokens" in shown


def test_the_tail_of_the_tokens() -> None:
    assert tables.tails(report.read(values())) is None
    changed = values()
    changed["outputs"][0]["kl"] = {**KL, "median": 0.01, "p99": 0.05, "p999": 0.2, "max": 1.25}
    changed["outputs"][0]["ln_ppl_ratio"] = interval(-0.002, 0.001)
    read = report.read(changed)
    made = tables.tails(read)
    assert made is not None
    cells = ("0.0100", "0.0500", "0.200", "1.25", "-0.0020 ± 0.0010")
    assert made.lines[0].cells[1:] == cells and len(made.lines) == 1
    assert "99.9 %" in report.markdown(read) and "99.9 %" in report.html(read)


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("/home/me/models/x.gguf has 7 tokens.", "x.gguf has 7 tokens."),
        ("There is no file ~/a/b.gguf. Check it.", "There is no file b.gguf. Check it."),
        ("hf://owner/name/x.gguf is gone", "hf://owner/name/x.gguf is gone"),
        ("see https://huggingface.co/a/b, 3/4", "see https://huggingface.co/a/b, 3/4"),
    ],
)
def test_folders_of_a_machine_are_not_published(said: str, shown: str) -> None:
    assert text.without_folders(said) == shown
