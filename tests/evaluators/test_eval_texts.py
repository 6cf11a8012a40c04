"""Reading files byte for byte, and how the Hub's data sets become text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import evaluators
from evaluators import __main__ as programs
from evaluators import choice_items
from evaluators.command import named_paths
from evaluators.errors import EvaluationError
from evaluators.texts import load_dataset_text, read_text

datasets = pytest.importorskip("datasets")


class FakeHub:
    """Stands in for datasets.load_dataset: gives rows and remembers the request."""

    def __init__(self, rows: list[str]) -> None:
        self.rows = rows
        self.request: tuple[Any, ...] = ()

    def load_dataset(self, path: str, name: str | None, **options: Any) -> Iterator[dict[str, str]]:
        self.request = (path, name, options)
        return ({"text": row} for row in self.rows)


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[str]) -> FakeHub:
    fake = FakeHub(rows)
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


def test_newlines_and_marks_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\rc\n\x00d")
    assert read_text(path) == "\ufeffa\r\nb\rc\n\x00d"


def test_wikitext2_is_the_raw_file_or_joined_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ["", " = Robert = \n", "", " He sat . \n"]
    fake = hub(monkeypatch, rows)
    # wiki.test.raw has " \n" where the Hub's rows are empty
    assert load_dataset_text("wikitext2", "llama.cpp") == " \n = Robert = \n \n He sat . \n"
    assert fake.request[:2] == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert fake.request[2]["split"] == "test"
    assert load_dataset_text("wikitext2", "gptq") == "\n\n".join(rows)


@pytest.mark.parametrize(("name", "n_documents"), [("c4", 1100), ("fineweb-edu", 1000)])
def test_documents_are_counted_and_joined(
    monkeypatch: pytest.MonkeyPatch, name: str, n_documents: int
) -> None:
    fake = hub(monkeypatch, [f"document {i}" for i in range(2000)])
    text = load_dataset_text(name, "gptq")
    assert text.split("\n\n") == [f"document {i}" for i in range(n_documents)]
    assert fake.request[2]["streaming"] is True


def test_a_stream_that_breaks_off_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(*_: Any, **__: Any) -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets, "load_dataset", breaking)
    with pytest.raises(EvaluationError, match="TimeoutError: read timed out"):
        load_dataset_text("c4", "gptq")


def test_an_unreachable_hub_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to host\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(EvaluationError, match="cannot be loaded.*no route to host") as caught:
        choice_items.load("piqa")
    assert "trace" not in caught.value.message


def test_unknown_data_set() -> None:
    with pytest.raises(EvaluationError, match="no data set 'imdb'"):
        load_dataset_text("imdb", "gptq")


def test_domains_are_named_by_file_or_by_hand() -> None:
    assert named_paths(["a/wiki.b.txt", "code=b/x.py", "./dir/with=sign.txt"]) == {
        "wiki.b": Path("a/wiki.b.txt"),
        "code": Path("b/x.py"),
        "with=sign": Path("dir/with=sign.txt"),
    }
    with pytest.raises(EvaluationError, match="Two texts"):
        named_paths(["a/x.txt", "b/x.txt"])


def test_the_programs_are_those_that_can_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert programs.main() == 2
    said = capsys.readouterr().err
    for path in Path(evaluators.__file__).parent.glob("*.py"):
        if path.stem in ("__main__", "sandbox", "serve"):  # started by other programs
            continue
        is_one = '__name__ == "__main__"' in path.read_text("utf-8")
        assert (f"evaluators.{path.stem} " in said) == is_one, path.stem
