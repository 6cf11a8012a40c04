"""Files of others in a report: the verdict, those of one size, and what a file runs on."""

from __future__ import annotations

from typing import Any

from test_report import OURS, divergence, row, values, versus

from quantkit.evidence import report
from quantkit.evidence.report import tables, text


def opponent(n_bytes: int, kl: float, p_value: float = 0.0001) -> dict[str, Any]:
    return row(
        kind="given",
        name="lab/Tiny-Q4_K_M.gguf",
        n_bytes=n_bytes,
        kl=divergence(kl, 0.001),
        versus={OURS: versus(kl - 0.0123, p_value)},
    )


def test_files_of_others_in_the_verdict() -> None:
    """Of those that are no larger the best; where ours loses it says which to use."""
    made = values()
    made["baselines"].append(opponent(980_000, 0.0246))
    said = text.verdict(report.read(made))
    assert "It is 50 % below that of lab/Tiny-Q4_K_M.gguf (0.0246; significant" in said
    assert "rather" not in said
    made["baselines"][-1] = opponent(980_000, 0.00615)
    said = text.verdict(report.read(made))
    assert "100 % ABOVE that of lab/Tiny-Q4_K_M.gguf" in said
    assert said.endswith("Use lab/Tiny-Q4_K_M.gguf rather than this file.")
    made["baselines"][-1] = opponent(980_000, 0.0120, p_value=0.4)
    said = text.verdict(report.read(made))
    assert "NOT significant" in said and "rather" not in said
    made["baselines"][-1] = opponent(1_000_001, 0.001)  # larger: not in the verdict
    assert "lab/" not in text.verdict(report.read(made))


def test_files_of_one_size() -> None:
    assert tables.of_one_size(report.read(values())) == [], "nobody named one"
    made = values()
    made["baselines"].append(opponent(1_030_000, 0.00615))
    (table,) = tables.of_one_size(report.read(made))
    found = {line.cells[0]: line.cells[1:] for line in table.lines}
    assert list(found) == [OURS, "llama.cpp Q5_1 pure", "lab/Tiny-Q4_K_M.gguf"]
    assert found["lab/Tiny-Q4_K_M.gguf"][1] == "+3.0 %"
    assert found["lab/Tiny-Q4_K_M.gguf"][3:] == ("0.50 times", "BETTER (p < 0.001)")
    made["baselines"][-1] = opponent(2_000_000, 0.001)  # none is near: the nearest all the same
    (table,) = tables.of_one_size(report.read(made))
    assert table.lines[-1].cells[2] == "+100.0 %"
    assert table.headers[0] in report.markdown(report.read(made))
    assert table.headers[0] in report.html(report.read(made))


def test_the_choice_names_devices() -> None:
    made = values()
    made["outputs"][0]["speed"]["peak_rss_bytes"] = 8 * 2**30
    lines = tables.choice(report.read(made)).lines
    assert lines[0].cells[1] == "12 GB card, Mac 16 GB, PC 16 GB"
    assert lines[1].cells[:2] == ("not measured", "-")
