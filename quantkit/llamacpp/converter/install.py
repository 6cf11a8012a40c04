"""Set up llama.cpp's converter: `python -m quantkit.llamacpp.converter.install [SDIST]`.

The converter is a part of the tree `vendor/llama.cpp` inside the llama-cpp-python source package:
the same tree as the runtime that will load the file, so whatever converts also runs. pip obtains
the package (whatever index the user has configured), its sha256 is checked, and only the files
named in `KEPT` are taken out. The tree is hashed again at each use.

    QUANTKIT_HOME       where it is set up, by default ~/.cache/quantkit
    QUANTKIT_SDIST      a source package (or a folder that holds it) to use instead of asking pip
    QUANTKIT_CONVERTER  another llama.cpp checkout to convert with; taken as it is
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from quantkit.errors import QuantkitError
from quantkit.files import sha256_file
from quantkit.machine.home import home, locked

log = logging.getLogger(__name__)

VERSION = "0.3.36"  # of llama-cpp-python; the same as in requirements.txt
SDIST_NAME = f"llama_cpp_python-{VERSION}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TREE_SHA256 = "f7453b4e144c51acc5a48e4d2acd2b58ddea1058750fd51d04db88c20bbaa16c"

# Files and folders of vendor/llama.cpp that are taken: the converters, their libraries, and the
# data that they read (vocabularies for Mamba and OpenELM checkpoints that ship none, chat
# templates).
KEPT = (
    "convert_hf_to_gguf.py",
    "convert_lora_to_gguf.py",
    "conversion/",
    "gguf-py/",
    "models/ggml-vocab-gpt-neox.gguf",
    "models/ggml-vocab-llama-spm.gguf",
    "models/templates/",
    "LICENSE",
)
_PREFIX = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
_MAX_FILE_BYTES = 8 * 2**20

_REMEDY = (
    f"Set QUANTKIT_SDIST to the path of {SDIST_NAME}, "
    "or QUANTKIT_CONVERTER to a llama.cpp checkout."
)


def install_dir() -> Path:
    """Return where the pinned converter lives; the hash in the name keeps versions apart."""
    return home() / f"converter-{VERSION}-{TREE_SHA256[:8]}"


def ensure_converter(sdist: Path | None = None) -> Path:
    """Return the folder of a converter that is whole and unchanged; set it up if it is missing.

    Raises QuantkitError when it cannot be obtained or is not the pinned one.
    """
    other = os.environ.get("QUANTKIT_CONVERTER")
    if other:
        if not (Path(other) / "convert_hf_to_gguf.py").is_file():
            raise QuantkitError(
                f"The converter {other} has no convert_hf_to_gguf.py.",
                "Set QUANTKIT_CONVERTER to the top folder of a llama.cpp checkout, or unset it.",
            )
        return Path(other).resolve()
    tree = install_dir() / "llama.cpp"
    if tree.is_dir() and tree_sha256(tree) == TREE_SHA256:
        return tree
    with locked("converter"):
        if tree.is_dir():
            if tree_sha256(tree) == TREE_SHA256:  # another process was faster
                return tree
            log.warning("The converter in %s was changed: setting it up again.", tree)
        try:
            _install(sdist, tree)
        except QuantkitError as error:
            if not tree.is_dir():
                raise
            raise QuantkitError(
                f"The converter in {tree} was changed and is refused; "
                f"setting it up again failed: {error.message}",
                error.remedy,
            ) from None
    return tree


def describe(tree: Path) -> str:
    """Return the version and hash of a converter, for the record."""
    if os.environ.get("QUANTKIT_CONVERTER"):
        return f"{tree} (given by QUANTKIT_CONVERTER, hash not checked)"
    return f"llama-cpp-python {VERSION}, vendor/llama.cpp, tree sha256 {TREE_SHA256}"


def tree_sha256(tree: Path) -> str:
    """Return one hash over the sorted relative paths and contents of everything below `tree`.

    Anything that is not a plain file (a link, say) makes it a hash that is never the pinned one.
    """
    lines = []
    for path in sorted(tree.rglob("*")):
        name = path.relative_to(tree).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            lines.append(f"{name} not a file\n")
        elif path.is_file():
            lines.append(f"{name} {sha256_file(path)}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def _install(sdist: Path | None, tree: Path) -> None:
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home(), prefix="converter-") as scratch:
        package = sdist or _given_sdist() or _download(Path(scratch))
        if not package.is_file():
            raise QuantkitError(f"There is no source package {package}.", _REMEDY)
        if sha256_file(package) != SDIST_SHA256:
            raise QuantkitError(
                f"{package} is not the pinned {SDIST_NAME}: its sha256 differs.", _REMEDY
            )
        fresh = Path(scratch) / "llama.cpp"
        extract(package, fresh)
        found = tree_sha256(fresh)
        if found != TREE_SHA256:
            raise QuantkitError(
                f"The converter taken from {package} has the tree hash {found}, not {TREE_SHA256}.",
                _REMEDY,
            )
        if tree.exists():
            os.replace(tree, Path(scratch) / "changed")
        os.replace(fresh, tree)


def _given_sdist() -> Path | None:
    given = os.environ.get("QUANTKIT_SDIST")
    if not given:
        return None
    path = Path(given)
    return path / SDIST_NAME if path.is_dir() else path


def extract(package: Path, folder: Path) -> None:
    """Write the files of `KEPT` from a source package to `folder`: plain files only, no links, no
    path that leads outside.
    """
    with tarfile.open(package, "r:gz") as tar:
        for member in tar:
            if not member.name.startswith(_PREFIX):
                continue
            name = member.name.removeprefix(_PREFIX)
            if not any(
                name == kept or (kept[-1] == "/" and name.startswith(kept)) for kept in KEPT
            ):
                continue
            if member.isdir():
                continue
            content = tar.extractfile(member) if member.isreg() else None
            if (
                content is None
                or ".." in PurePosixPath(name).parts
                or member.size > _MAX_FILE_BYTES
            ):
                raise QuantkitError(f"{package} holds {member.name}, which is not a regular file.")
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.read())


# pip unpacks a source package and asks its build backend for metadata before it hands it over, and
# the real backend wants CMake and half a minute. This one answers at once. It is found through
# PYTHONPATH because build isolation is off; nothing of the package itself is run.
_STUB_BACKEND = f"""
import pathlib

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "llama_cpp_python-{VERSION}.dist-info")
    info.mkdir()
    text = "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {VERSION}\\n"
    (info / "METADATA").write_text(text)
    return info.name
"""


def _download(scratch: Path) -> Path:
    """Have pip fetch the source package, with the user's own index, proxy and cache."""
    stub = scratch / "stub" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    (stub / "build.py").write_text(_STUB_BACKEND)
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"llama-cpp-python=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", "llama-cpp-python"]
    command += ["--require-hashes", "--requirement", str(wanted), "--dest", str(scratch)]
    environment = {**os.environ, "PYTHONPATH": str(stub.parent)}
    log.info("Fetching %s for its converter (76 MB, once).", SDIST_NAME)
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        reason = (lines or result.stderr.strip().splitlines() or ["no message"])[0]
        raise QuantkitError(f"pip could not fetch {SDIST_NAME}: {reason}.", _REMEDY)
    return scratch / SDIST_NAME


def main(arguments: list[str]) -> int:
    """Set the converter up and print where it is."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print(__doc__)  # noqa: T201
        return 2
    try:
        print(ensure_converter(Path(arguments[0]) if arguments else None))  # noqa: T201
    except QuantkitError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main(sys.argv[1:]))
