"""Setting the converter up, with a tiny package in place of the real one: pinned, checked, refused
when changed.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.llamacpp.converter import install


def tiny_sdist(folder: Path, extra: tarfile.TarInfo | None = None) -> Path:
    """A source package shaped like the real one, with a tree of two files to keep."""
    path = folder / install.SDIST_NAME
    top = f"llama_cpp_python-{install.VERSION}"
    files = {
        f"{top}/PKG-INFO": b"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n",
        f"{top}/pyproject.toml": b'[build-system]\nrequires = ["scikit-build-core"]\n'
        b'build-backend = "scikit_build_core.build"\n[project]\nname = "llama_cpp_python"\n'
        b'dynamic = ["version"]\n',
        f"{top}/vendor/llama.cpp/convert_hf_to_gguf.py": b"pass\n",
        f"{top}/vendor/llama.cpp/conversion/base.py": b"pass\n",
        f"{top}/vendor/llama.cpp/src/llama.cpp": b"not kept",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if extra is not None:
            tar.addfile(extra)
    return path


@pytest.fixture
def pinned_sdist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny package, with its hashes in place of the real ones and an empty home."""
    package = tiny_sdist(tmp_path)
    install.extract(package, tmp_path / "tree")
    monkeypatch.setattr(install, "SDIST_SHA256", hashlib.sha256(package.read_bytes()).hexdigest())
    monkeypatch.setattr(install, "TREE_SHA256", install.tree_sha256(tmp_path / "tree"))
    monkeypatch.setenv("QUANTKIT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("QUANTKIT_CONVERTER", raising=False)
    monkeypatch.setenv("QUANTKIT_SDIST", str(package))
    return package


def test_only_what_is_needed_is_taken(pinned_sdist: Path):
    tree = install.ensure_converter()
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file())
    assert names == ["conversion/base.py", "convert_hf_to_gguf.py"]


@pytest.mark.parametrize("change", ["edit", "add", "link", "remove"])
def test_a_changed_converter_is_set_up_again(
    change: str, pinned_sdist: Path, caplog: pytest.LogCaptureFixture
):
    tree = install.ensure_converter()
    if change == "edit":
        (tree / "conversion" / "base.py").write_text("import evil\n")
    elif change == "add":  # a planted bytecode cache would be run
        (tree / "conversion" / "__pycache__").mkdir()
        (tree / "conversion" / "__pycache__" / "base.cpython-311.pyc").write_bytes(b"evil")
    elif change == "link":
        (tree / "conversion" / "more.py").symlink_to("/etc/passwd")
    else:
        (tree / "conversion" / "base.py").unlink()
    assert install.ensure_converter() == tree
    assert install.tree_sha256(tree) == install.TREE_SHA256
    assert "was changed" in caplog.text


def test_a_changed_converter_is_refused_without_the_package(
    pinned_sdist: Path, monkeypatch: pytest.MonkeyPatch
):
    tree = install.ensure_converter()
    (tree / "conversion" / "base.py").write_text("import evil\n")
    monkeypatch.setenv("QUANTKIT_SDIST", "/nowhere.tar.gz")
    with pytest.raises(QuantkitError, match="was changed and is refused") as it:
        install.ensure_converter()
    assert "QUANTKIT_SDIST" in it.value.remedy


def test_another_package_is_refused(pinned_sdist: Path):
    pinned_sdist.write_bytes(pinned_sdist.read_bytes() + b"more")
    with pytest.raises(QuantkitError, match="its sha256 differs"):
        install.ensure_converter()


@pytest.mark.parametrize("kind", ["traversal", "link"])
def test_a_package_with_tricks_is_refused(kind: str, tmp_path: Path):
    prefix = f"llama_cpp_python-{install.VERSION}/vendor/llama.cpp/conversion/"
    member = tarfile.TarInfo(prefix + ("../../../../evil.py" if kind == "traversal" else "x.py"))
    if kind == "link":
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with pytest.raises(QuantkitError, match="not a regular file"):
        install.extract(tiny_sdist(tmp_path, member), tmp_path / "tree")
    assert not (tmp_path / "evil.py").exists()


def test_another_checkout_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QUANTKIT_CONVERTER", str(tmp_path))
    with pytest.raises(QuantkitError, match="has no convert_hf_to_gguf.py"):
        install.ensure_converter()
    (tmp_path / "convert_hf_to_gguf.py").touch()
    assert install.ensure_converter() == tmp_path


@pytest.mark.slow
def test_pip_hands_over_the_package_without_building_it(
    pinned_sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """From whatever index pip is configured with: here a folder."""
    index = tmp_path / "simple" / "llama-cpp-python"
    index.mkdir(parents=True)
    shutil.copy(pinned_sdist, index)
    (index / "index.html").write_text(f'<a href="{pinned_sdist.name}">{pinned_sdist.name}</a>')
    monkeypatch.delenv("QUANTKIT_SDIST")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", index.parent.as_uri())
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    assert (install.ensure_converter() / "convert_hf_to_gguf.py").is_file()


def test_no_index_is_a_sentence(
    pinned_sdist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("QUANTKIT_SDIST")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nothing").as_uri())
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    with pytest.raises(QuantkitError, match="pip could not fetch") as it:
        install.ensure_converter()
    assert "QUANTKIT_CONVERTER" in it.value.remedy
