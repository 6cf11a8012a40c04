"""Any text calibrates: whatever layout, encoding, length and name a file has."""

from __future__ import annotations

import codecs
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantkit.calibration import files
from quantkit.calibration.documents import Domain, split
from quantkit.cli import main
from quantkit.config import calibration
from quantkit.errors import QuantkitError, UsageError

PARAGRAPHS = [f"{i} " + f"word{i} " * 60 for i in range(60)]


def read(path: Path, limit: int = 10**7) -> list[str]:
    return list(files.read(path, limit).documents)


def words(documents: list[str]) -> list[str]:
    return " ".join(documents).split()


LAYOUTS = {
    "notes.txt": "\n\n".join(PARAGRAPHS),
    "wiki.train.raw": " \n = Title = \n \n" + "".join(f" {p} \n \n" for p in PARAGRAPHS),
    "one-per-line.txt": "\n".join(PARAGRAPHS),
    "one line.txt": " ".join(PARAGRAPHS),
    "UPPER.TXT": "\n\n".join(PARAGRAPHS),
    "no suffix": "\n\n".join(PARAGRAPHS),
    "windows.txt": "\r\n\r\n".join(PARAGRAPHS),
    "old-mac.txt": "\r\r".join(PARAGRAPHS),
    "blank.jsonl": "".join(f"{json.dumps({'text': p})}\n\n \n" for p in PARAGRAPHS),
    "nulls.JSONL": "\n".join(
        json.dumps({"text": None if i % 2 else PARAGRAPHS[i // 2]}) for i in range(120)
    ),
    "list.json": json.dumps([{"content": p} for p in PARAGRAPHS]),
    "short-rows.jsonl": "\n".join(json.dumps(w) for w in " ".join(PARAGRAPHS).split()),
    "one-row.jsonl": json.dumps("\n\n".join(PARAGRAPHS)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout(name: str, tmp_path: Path) -> None:
    """Nothing is lost, and there is enough to deal out."""
    path = tmp_path / name
    path.write_bytes(LAYOUTS[name].encode())
    found = read(path)
    title = ["=", "Title", "="] if "wiki" in name else []
    assert words(found) == title + words(PARAGRAPHS)
    assert all(len(text) <= 3 * files.PIECE for text in found)
    parts = split(Domain("d", "s", tuple(found)), 0)
    assert all(parts.values())


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
    ],
)
def test_marks_of_byte_order(mark: bytes, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(mark + "\n\n".join(["größer", *PARAGRAPHS]).encode(encoding))
    text = files.read(path, 10**6)
    assert text.documents[0].startswith("größer") and not text.remarks


def test_what_is_not_taken_as_it_stands_is_said(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("\n\n".join(PARAGRAPHS).encode() + b"\n\nna\xefve caf\xe9")
    text = files.read(path, 10**6)
    assert text.remarks == ("2 characters that are not UTF-8 were replaced",)
    assert text.documents[-1].endswith("na\N{REPLACEMENT CHARACTER}ve caf\N{REPLACEMENT CHARACTER}")
    short = tmp_path / "short.txt"
    short.write_text("Hello.\n\nHow are you?\n\nFine, thanks.\n")
    assert words(read(short)) == "Hello. How are you? Fine, thanks.".split()
    (said,) = [line for line in files.look(str(short)) if "short" in line.split(".txt")[1]]
    assert "33 characters" in said


def test_half_a_character_in_json(tmp_path: Path) -> None:
    """It cannot be encoded: it would end the run where the text is hashed."""
    path = tmp_path / "half.jsonl"
    path.write_text('{"text": "' + "long enough " * 9 + '\\ud800"}\n')
    assert "\ud800" not in "".join(read(path))
    "".join(read(path)).encode()


def test_a_cut_inside_a_character_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_text("x" + "ä" * 5000, "utf-8")
    text = files.read(path, 1000)  # 4,000 bytes end inside of one
    assert not any("replaced" in remark for remark in text.remarks)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"txt": "x"}', 'has no "text"'),
        ("a.jsonl", b'{"text": "x"}\n\n{', "line 3 is not JSON"),
        ("a.jsonl", b"3", "is not a string"),
        ("a.jsonl", b'{"text": 3}', "is not a string"),
        ("a.jsonl", b'{"text": null}\n', "holds no text"),
        ("a.jsonl", b"[" * 100_000, "is not JSON"),
        ("a.json", b'["x", ', "is not JSON"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t \n", "holds no text"),
        ("a.txt", codecs.BOM_UTF8, "holds no text"),
        ("a.txt", bytes(range(256)) * 9, "not text"),
        ("a.txt", "plain".encode("utf-16-le") * 99, "not text"),
        ("a.txt", gzip.compress(b"text " * 999, mtime=0), "not text"),
        ("a.pdf", b"%PDF-1.7\n" + bytes(range(128, 256)) * 9, "not text"),
        ("a.parquet", b"PAR1 not", "cannot be read"),
    ],
)
def test_files_that_cannot_be_read(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QuantkitError, match=sentence) as error:
        read(path)
    assert name in error.value.message and error.value.remedy


def test_no_file_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(QuantkitError, match="no calibration file"):
            read(path)


@given(st.text(min_size=1), st.integers(1, 50))
def test_no_character_is_lost_where_a_text_is_cut(text: str, size: int) -> None:
    assert "".join(files._cut(text, size)) == text


# Parquet


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    rows = [None if i % 3 == 0 else PARAGRAPHS[i] for i in range(60)]
    parquet.write_table(pa.table({"other": range(60), "text": rows}), path)
    assert words(read(path)) == words([row for row in rows if row])
    assert sum(map(len, read(path, 500))) < 2000
    parquet.write_table(pa.table({"txt": rows}), path)
    with pytest.raises(QuantkitError, match='no column "text"'):
        read(path)
    parquet.write_table(pa.table({"text": range(60)}), path)
    with pytest.raises(QuantkitError, match="is not a string"):
        read(path)


def test_a_bomb_of_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few kilobytes that are 20,000,000 rows, or one long string."""
    path = tmp_path / "bomb.parquet"
    parquet.write_table(pa.table({"text": pa.nulls(20_000_000, pa.string())}), path)
    assert path.stat().st_size < 50_000
    with pytest.raises(QuantkitError, match="holds no text"):
        read(path, 1_000_000)
    large = pa.table({"text": ["a" * 2**28]})
    parquet.write_table(large, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(files, "_LIMITS", replace(files._LIMITS, memory_bytes=2**28))
    with pytest.raises(QuantkitError, match="bomb.parquet cannot be read: .*memory"):
        read(path, 100_000)


# Names


def test_names_with_commas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["notes, mine.txt", "docs, too", "b,c:2.txt", "x:0.5", "plain.md"]
    for name in names:
        Path(name).write_text("x")
    for name in names:
        (request,) = calibration.parse_spec(calibration.absolute(name))
        assert (request.name, request.weight) == (str(tmp_path / name), 1)
    said = calibration.absolute(
        "docs:2," + ",".join(f"{name}:{i}" for i, name in enumerate(names, 1))
    )
    requests = calibration.parse_spec(said)
    assert [r.name for r in requests] == ["docs", *(str(tmp_path / name) for name in names)]
    assert [r.weight for r in requests] == [2, 1, 2, 3, 4, 5]
    assert calibration.absolute(said) == said
    assert str(tmp_path) not in calibration.shown(
        said
    ) and "notes\\, mine.txt:1" in calibration.shown(said)
    for wrong in ("notes, yours.txt", "none, at all.txt"):
        with pytest.raises(UsageError, match="no calibration text"):
            calibration.parse_spec(calibration.absolute(wrong))


def test_texts_are_looked_at_before_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is not there: it is the text that is complained of."""
    (tmp_path / "a.jsonl").write_text("{")
    (tmp_path / "e.txt").write_bytes(b"\xff")
    (tmp_path / "t.jsonl").write_text('{"question": "x"}')
    for i, (options, sentence) in enumerate(
        [
            (["--calibration", str(tmp_path / "a.jsonl")], "line 1 is not JSON"),
            (["--eval-text", str(tmp_path / "e.txt")], "is not UTF-8"),
            (["--tasks", str(tmp_path / "t.jsonl")], "malformed"),
        ]
    ):
        for command in (["plan", "no/where"], ["run", "no/where", "--out", str(tmp_path / f"{i}")]):
            assert main([*command, "--calibration", "docs", *options]) == 1
            assert sentence in capsys.readouterr().err
