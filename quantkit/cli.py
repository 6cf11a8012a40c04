"""The command line. Heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from quantkit.sizes import parse_bytes, size

# Waiting threads must sleep: busy-waiting ones starve every other process on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from quantkit import __version__
from quantkit.config import SPLIT_BYTES, RunConfig, load_types_map
from quantkit.config.targets import BitsPerWeight, FileSize, FitsMemory, LikeMix, Target
from quantkit.errors import QuantkitError, UsageError, check_writable_name, printable
from quantkit.machine import faults
from quantkit.planning import compare_options, model_options, verify_options
from quantkit.ranks import join, launch
from quantkit.run import terminal
from quantkit.run.artifacts import NAMES
from quantkit.run.events import read_events
from quantkit.run.folder import RunDir
from quantkit.sandbox import secrets
from quantkit.stages import TASKS
from quantkit.tensors import to_json


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 when done, 2 for wrong use, 1 when it failed with a sentence on
    stderr.
    """
    terminal.settle_streams()
    try:
        if argv is None:  # a program of its own, not a call
            launch.leave_secrets()
            secrets.hide()
        words = terminal.readable(sys.argv[1:] if argv is None else argv)
        arguments = _parser().parse_args(words)
        arguments.words = words
    except QuantkitError as error:
        return terminal.failed(error)
    folder = getattr(arguments, "out", None) or getattr(arguments, "folder", None)
    try:
        with terminal.ending_with_threads(folder):
            answer = arguments.command(arguments)
        if getattr(arguments, "json", False):
            print(printable(json.dumps(to_json(answer), ensure_ascii=False)))
        sys.stdout.flush()
    except QuantkitError as error:
        return terminal.failed(faults.explain(error, folder) or error)
    except BrokenPipeError:  # `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return terminal.failed(QuantkitError("interrupted; run the same command again to continue"))
    except Exception as error:
        return terminal.failed(faults.explain(error, folder) or terminal.bug(error, folder))
    return int(getattr(arguments, "status", 0))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="quantkit",
        description="Make the best GGUF of a given size from a Hugging Face model, and measure it.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run all stages, or continue an interrupted run")
    model_options.add(run)
    run.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the run's folder (default: runs/ and the names of model and sizes)",
    )
    run.add_argument("--publish", metavar="REPO", help="upload the result to this Hub repository")
    _add_visibility(run)
    run.set_defaults(command=_run)

    plan = commands.add_parser(
        "plan", help="show what a run would make and cost, without running it"
    )
    model_options.add(plan)
    plan.add_argument("--all", action="store_true", help="also list all sizes and fallbacks")
    plan.set_defaults(command=_plan)

    app = commands.add_parser("app", help="serve the web page on this machine")
    app.add_argument(
        "--port",
        type=int,
        metavar="N",
        help="the port to listen on (default: from 7860 on, a free one)",
    )
    app.set_defaults(command=_app)

    for name, help_text, function in (
        ("status", "show a run's progress", _status),
        ("resume", "continue an interrupted run", _resume),
        ("clean", "delete intermediate files, keep the results", _clean),
    ):
        sub = commands.add_parser(name, help=help_text)
        sub.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
        sub.set_defaults(command=function)
        if name == "resume":
            for option in ("--compare", "--eval-text", "--tasks"):
                sub.add_argument(
                    option,
                    action="append",
                    metavar="FILE",
                    help="use this file instead of the run's; `none` drops it",
                )

    publish = commands.add_parser("publish", help="upload a finished run to the Hub")
    publish.add_argument("folder", type=Path, metavar="DIR", help="the run's folder")
    publish.add_argument("repo", metavar="REPO", help="owner/name on the Hub")
    _add_visibility(publish)
    publish.set_defaults(command=_publish)

    compare = commands.add_parser("compare", help="compare any GGUFs of the same model")
    compare_options.add(compare)
    compare.set_defaults(command=_compare)

    verify = commands.add_parser(
        "verify", help="check published files against their receipt, and measure them again"
    )
    verify_options.add(verify)
    verify.set_defaults(command=_verify)

    rebuild = commands.add_parser("rebuild", help="make a published file again from its recipe")
    rebuild.add_argument("recipe", type=Path, metavar="RECIPE", help="recipes/NAME.json")
    rebuild.add_argument("--base", type=Path, required=True, metavar="BASE.gguf")
    rebuild.add_argument(
        "--levels",
        type=Path,
        metavar="DIR",
        help="folder of the level files, or of the run; without it, make the levels again",
    )
    rebuild.add_argument("--out", type=Path, required=True, metavar="FILE")
    rebuild.set_defaults(command=_rebuild)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print one JSON object at the end")
    return parser


def _add_visibility(parser: argparse.ArgumentParser) -> None:
    seen = parser.add_mutually_exclusive_group()
    seen.add_argument("--private", action="store_true", help="make the repository private")
    seen.add_argument(
        "--public", action="store_true", help="make it public even if the model is private or gated"
    )


def _compare(arguments: argparse.Namespace) -> object:
    from quantkit.evidence import compare, report

    options = compare_options.chosen(arguments)
    made = compare.compare(arguments.base, arguments.files, options, arguments.out)
    if not arguments.json:
        print(printable(report.markdown(made)))
    print(f"report: {printable(str(arguments.out / 'report.html'))}", file=sys.stderr)
    return {"folder": str(arguments.out), "verdict": report.verdict(made)}


def _config(arguments: argparse.Namespace) -> RunConfig:
    """The RunConfig of `run` and `plan`. Raises UsageError."""
    from quantkit.config import calibration
    from quantkit.hub import given

    for name in (*arguments.compare, *arguments.levels_from):
        given.check_name(name)
    asked: tuple[tuple[type[Target], str | None], ...] = (
        (BitsPerWeight, arguments.target_bpw),
        (FileSize, arguments.target_size),
        (LikeMix, arguments.like or arguments.family),
        (FitsMemory, arguments.fits),
    )
    targets = [kind(value) for kind, given in asked for value in _listed(given)]
    return RunConfig(
        model=arguments.model,
        revision=arguments.revision,
        targets=tuple(targets),
        profile=arguments.profile,
        levels=tuple(arguments.levels.split(",")) if arguments.levels else None,
        prefer=arguments.prefer,
        levels_from=tuple(_given_file("--levels-from", n) for n in arguments.levels_from),
        methods=tuple(arguments.methods.split(",")),
        types=load_types_map(arguments.types) if arguments.types else (),
        max_types=arguments.max_types,
        tuning=arguments.tuning,
        tensors=arguments.tensors,
        equalize=arguments.equalize,
        calibration=calibration.absolute(arguments.calibration),
        eval_text=arguments.eval_text and _given_file("--eval-text", arguments.eval_text),
        tasks=arguments.tasks and _given_file("--tasks", arguments.tasks),
        compare=tuple(_given_file("--compare", name) for name in arguments.compare),
        split_bytes=parse_bytes(arguments.split_at) if arguments.split_at else SPLIT_BYTES,
        seed=arguments.seed,
        device=arguments.device,
        publish=getattr(arguments, "publish", None),
        private=getattr(arguments, "private", False),
        public=getattr(arguments, "public", False),
    )


# 5,5GB and 4,5; not 3.5,4.5 nor 2,3,4. A context, as in 8GB@4,096, has no comma either.
_DECIMAL_COMMA = re.compile(r"(?<![\w.,@])\d+,\d{1,3}(?![\d.,])|(?<=@)\d{1,3},\d{3}(?!\w)")


def _listed(given: str | None) -> list[str]:
    """The entries of a list with commas. Raises UsageError where one may be that of a number."""
    if given and (found := _DECIMAL_COMMA.search(given)):
        raise UsageError(
            f"The comma in {found[0]} can be part of a number or between two.",
            "Write a point, as in 5.5GB; no comma in a context; and a space after one between two.",
        )
    return [entry.strip() for entry in given.split(",")] if given is not None else []


def _given_file(option: str, name: str) -> str:
    """A file that an option names, by a path that means the same wherever the run is taken up
    again. Raises UsageError when it is not there.
    """
    if name.startswith("hf://"):
        return name
    path = Path(name).expanduser().absolute()
    if not path.is_file():
        raise UsageError(f"There is no file {name}.", f"Check the path after {option}.")
    check_writable_name(str(path))
    return str(path)


def _run(arguments: argparse.Namespace) -> object:
    config = _config(arguments)
    folder = arguments.out or Path("runs", model_options.folder_name(config))
    check_writable_name(str(folder.absolute()))
    return _execute(config, folder, arguments.words)


def _resume(arguments: argparse.Namespace) -> object:
    from quantkit import pipeline

    config = pipeline.load_config(pipeline.open_run(arguments.folder))
    return _execute(_measured_on(config, arguments), arguments.folder, arguments.words)


def _measured_on(config: RunConfig, arguments: argparse.Namespace) -> RunConfig:
    """The config with what `resume` was asked to change. Raises UsageError."""
    from quantkit.hub import given

    if arguments.eval_text is not None:
        config = dataclasses.replace(config, eval_text=_one("--eval-text", arguments.eval_text))
    if arguments.tasks is not None:
        config = dataclasses.replace(config, tasks=_one("--tasks", arguments.tasks))
    if arguments.compare is not None:
        files = _all("--compare", arguments.compare)
        for file in files:
            given.check_name(file)
        config = dataclasses.replace(config, compare=files)
    return config


def _all(option: str, asked: Sequence[str]) -> tuple[str, ...]:
    return tuple(_given_file(option, name) for name in asked if name != "none")


def _one(option: str, asked: Sequence[str]) -> str | None:
    files = _all(option, asked)
    if len(files) > 1:
        raise UsageError(f"A run takes only one {option}.", "Give one file, or none.")
    return files[0] if files else None


def _execute(config: RunConfig, folder: Path, words: Sequence[str]) -> object:
    """Run as many processes as there are GPUs, or be one of those that were started."""
    from quantkit import pipeline

    if not join.is_launched() and (n := launch.n_gpus(config.device)) > 1:
        told = {name: value for name in secrets.HUB if (value := secrets.get(name)) is not None}
        raise SystemExit(launch.launch(n, words, told))
    with join.joined(config.device) as ranks:
        if ranks.rank:
            join.serve(
                ranks, TASKS, lambda error: faults.explain(error) or terminal.bug(error, None)
            )
        with terminal.printing() as printer:
            records = pipeline.run(config, folder, printer, ranks=ranks)
    report_path = RunDir(folder).artifacts.report.with_suffix(".md")
    with suppress(OSError):
        print(printable(report_path.read_text("utf-8")), file=sys.stderr)
        files = printable(str(RunDir(folder).artifacts.upload.parent))
        print(f"\nfiles: {files}\nweb page: quantkit app", file=sys.stderr)
    return {
        "folder": str(folder),
        "stages": {name: record.summary for name, record in records.items()},
    }


def _status(arguments: argparse.Namespace) -> object:
    from quantkit import pipeline

    directory = pipeline.open_run(arguments.folder)
    records = directory.records()
    events, _ = read_events(directory.events_path)
    last = events[-1] if events else None
    state = "failed" if last is not None and last.kind == "failed" else "interrupted"
    if directory.is_locked():
        state = "running"
    elif len(records) == len(NAMES):
        state = "done"
    likely = pipeline.last_end(directory) if state == "interrupted" else ""
    if not arguments.json:
        folder = printable(str(arguments.folder))
        print(f"{folder}: {state}")
        for stage in NAMES:
            record = records.get(stage)
            print(f"  {stage:<10} " + (f"done in {record.seconds:.0f} s" if record else "-"))
        if last is not None and state != "done":
            words = last.stage or "run", last.kind, last.message, last.data.get("remedy", "")
            print(printable(" ".join(map(str, ("  last:", *words))).rstrip(), ""))
        if likely:
            print(f"  {printable(likely)}")
        if state in ("interrupted", "failed"):
            print(f"  go on with: quantkit resume {folder}")
    return {
        "folder": str(arguments.folder),
        "state": state,
        "done": list(records),
        "last": last,
        **({"likely": likely} if likely else {}),
    }


def _clean(arguments: argparse.Namespace) -> object:
    from quantkit import pipeline

    freed = pipeline.clean(arguments.folder)
    if not arguments.json:
        print(f"{size(freed)} freed; results are kept")
    return {"folder": str(arguments.folder), "freed_bytes": freed}


def _app(arguments: argparse.Namespace) -> object:
    from quantkit.server.web.start import serve

    serve(lambda text: print(printable(text), flush=True), arguments.port)
    return {}


def _plan(arguments: argparse.Namespace) -> object:
    from quantkit.planning import plan, render

    made = plan.make_plan(_config(arguments))
    if not arguments.json:
        print(printable(render.render(made, everything=arguments.all)))
    return made


def _publish(arguments: argparse.Namespace) -> object:
    from quantkit import pipeline

    with terminal.printing() as printer:
        return pipeline.publish(
            arguments.folder, arguments.repo, arguments.private, printer, public=arguments.public
        )


def _verify(arguments: argparse.Namespace) -> object:
    from quantkit.verifying import findings
    from quantkit.verifying.verify import Asked, verify

    asked = Asked(**verify_options.chosen(arguments))
    try:
        with terminal.printing() as printer:
            verdict = verify(asked, printer, lambda said: print(printable(said), file=sys.stderr))
    except QuantkitError as error:  # nothing was found wrong: it could not be looked at
        terminal.failed(error)
        raise SystemExit(findings.NOT_CHECKED) from None
    arguments.status = verdict.status
    if not arguments.json:
        print(findings.render(verdict))
    return {**to_json(verdict), "status": verdict.status, "verdict": verdict.sentence}


def _rebuild(arguments: argparse.Namespace) -> object:
    from quantkit import rebuild

    made = rebuild.rebuild(arguments.recipe, arguments.base, arguments.levels, arguments.out)
    if made.reason:
        print(made.reason, file=sys.stderr)
    return made
