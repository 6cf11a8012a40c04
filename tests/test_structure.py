"""The shape of the code, read from its syntax trees: who imports whom, what is never written, and
one spelling of the nine stages everywhere.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
import pytest

from quantkit.config import PROFILES
from quantkit.rundir import STAGES

ROOT = Path(__file__).parent.parent
PACKAGES = ("quantkit", "evaluators")
OURS = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
EVERYTHING = sorted(
    {*OURS, *ROOT.glob("*.py")}
    | {p for name in ("tests", "spaces", "benchmarks", "dev") for p in (ROOT / name).rglob("*.py")}
)


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path) for path in OURS}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def for_types_alone(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not for_types_alone(child):
            yield from walk(child)


def imported(nodes: Iterator[ast.AST] | list[ast.stmt]) -> set[str]:
    """Full names of what is imported; of `from package import module` the module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def imports(path: Path) -> set[str]:
    """Of the whole file, functions included."""
    return imported(walk(tree(path)))


# From the bottom up. A module may import from lower layers, and from its own where it is said to.
LAYERS = {
    "quantkit": 0,
    "quantkit.errors": 1,
    "quantkit.sandbox": 2,
    "quantkit.secrets": 3,
    "quantkit.qtypes": 2,
    "quantkit.tensors": 3,
    "quantkit.untrusted": 1,
    "quantkit.calibration.languages": 2,
    "quantkit.calibration.spec": 3,
    "quantkit.config": 4,
    "quantkit.rundir": 4,
    "quantkit.safetensors_file": 4,
    "tools": 5,  # everything not named here; among themselves as long as it is no circle
    "quantkit.stages": 6,
    "quantkit.launch": 6,
    "quantkit.pipeline": 7,
    "quantkit.web": 7,
    "quantkit.rebuild": 8,
    "quantkit.cli": 9,
    "quantkit.__main__": 10,
}
_AMONG_THEMSELVES = (
    "tools",
    "quantkit.sandbox",
    "quantkit.stages",
    "quantkit.launch",
    "quantkit.web",
)


def layer(module: str) -> str:
    if module == "quantkit":
        return module
    return next(
        (x for x in LAYERS if x != "quantkit" and f"{module}.".startswith(f"{x}.")), "tools"
    )


def test_imports_only_go_down() -> None:
    wrong = []
    for path in OURS:
        own = module_of(path)
        if not own.startswith("quantkit"):
            continue
        for name in sorted(imports(path) & MODULES):
            if not name.startswith("quantkit"):
                continue
            mine, theirs = layer(own), layer(name)
            among = mine == theirs and mine in _AMONG_THEMSELVES
            below = LAYERS[theirs] < LAYERS[mine]
            reads_stages = mine == "quantkit.web" and theirs == "quantkit.stages"
            if not (among or below) or reads_stages:
                wrong.append(f"{own} ({mine}) imports {name} ({theirs})")
    assert not wrong, "\n".join(wrong)


def test_no_circles() -> None:
    """Among all modules, imports in functions included: an order exists in which each is below."""
    left = {module_of(p): imports(p) & MODULES - {module_of(p)} for p in OURS}
    while left:
        free = [m for m, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


def test_only_checks_look_at_the_evaluators() -> None:
    """The search never grades itself. (quantkit.parity has `evaluators.oracle` run by its name.)"""
    found = {
        module_of(path)
        for path in OURS
        if path.is_relative_to(ROOT / "quantkit")
        and any(f"{name}.".startswith("evaluators.") for name in imports(path))
    }
    judges = {"quantkit.stages.validate", "quantkit.meter", "quantkit.tokens", "quantkit.compare"}
    assert found == judges | {"quantkit.llama_place"}


def test_evaluators_know_nothing_of_quantkit() -> None:
    for path in OURS:
        if path.is_relative_to(ROOT / "evaluators"):
            ours = {name for name in imports(path) if f"{name}.".startswith("quantkit.")}
            assert not ours, short(path)


HEAVY = ("torch", "transformers", "llama_cpp", "numba", "datasets", "gradio", "safetensors")
HEAVY += ("jinja2", "vl_convert")
LIGHT = ("quantkit", "quantkit.cli", "quantkit.config", "quantkit.rundir", "quantkit.launch")


@pytest.mark.parametrize("module", [*LIGHT, "quantkit.pipeline"])
def test_starting_is_quick(module: str) -> None:
    """What the command line loads before it knows what is wanted."""
    code = f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not set(json.loads(result.stdout)) & set(HEAVY)


def may_print(path: Path) -> bool:
    """The command line, the evaluators' commands, and files that are run by themselves."""
    name = short(path)
    command = ("quantkit/cli.py", "quantkit/terminal.py")
    entries = ("quantkit/converter/entry.py", "quantkit/converter/install.py")
    return name.startswith(("evaluators/", "app.py")) or name in (*command, *entries)


def test_only_the_command_line_prints() -> None:
    for path in OURS:
        if not may_print(path):
            calls = [ast.unparse(n.func) for n in walk(tree(path)) if isinstance(n, ast.Call)]
            assert "print" not in calls, short(path)


_NEVER_IMPORTED = {"pickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
_NEVER_CALLED = {"eval", "exec", "os.system", "os.popen", "torch.load", "np.load", "pickle.loads"}


def test_nothing_that_runs_what_it_reads() -> None:
    """No pickle in any disguise, no evaluation of text, no shell."""
    for path in OURS:
        assert not {name.split(".")[0] for name in imports(path)} & _NEVER_IMPORTED, short(path)
        for node in walk(tree(path)):
            if isinstance(node, ast.Call):
                where = f"{short(path)}:{node.lineno}"
                keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert ast.unparse(node.func) not in _NEVER_CALLED, where
                assert keywords.get("shell", "False") == "False", where
                assert keywords.get("allow_pickle", "False") == "False", where


# What asks on a terminal whether to run a stranger's code when it is not told. `datasets` has not
# run any since its version 4, and takes no such word.
_LOADERS = {"from_pretrained", "from_config", "pipeline", "get_class_from_dynamic_module"}
# llama-cpp-python's, and PEFT's, which reads tensors into a model that is given.
_OTHERS = {"Llama.from_pretrained", "PeftModel.from_pretrained"}


def test_remote_code_is_never_trusted() -> None:
    """`trust_remote_code=False` stands in every call that takes it, and the words nowhere else but
    in comments and texts, where llama.cpp's converter is spoken of.
    """
    n_calls = 0
    for path in EVERYTHING:
        if path.is_relative_to(ROOT / "tests"):
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline)
        n_words = sum(t.type == tokenize.NAME and t.string == "trust_remote_code" for t in tokens)
        n_refused = 0
        for call in (node for node in walk(tree(path)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            said = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("trust_remote_code")
            n_refused += said == "False"
            if name.rpartition(".")[2] in _LOADERS and name not in _OTHERS:
                assert said == "False", f"{short(path)}:{call.lineno}: {name}"
                n_calls += 1
        assert n_words == n_refused, short(path)
    assert n_calls >= 7
    assert "trust_remote_code" not in inspect.signature(datasets.load_dataset).parameters


def test_no_silent_fallback() -> None:
    """No bare except, and none that catches everything and does nothing."""
    for path in OURS:
        for node in walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                where = f"{short(path)}:{node.lineno}"
                assert node.type is not None, where
                everything = ast.unparse(node.type) in ("Exception", "BaseException")
                nothing = all(isinstance(n, (ast.Pass, ast.Continue)) for n in node.body)
                assert not (everything and nothing), where


def test_files_are_short() -> None:
    """450 lines is the aim, 600 the end."""
    for path in EVERYTHING:
        n = len(path.read_text("utf-8").splitlines())
        assert n <= (450 if path in OURS else 600), f"{short(path)}: {n} lines"


def test_every_module_says_what_it_is_for() -> None:
    for path in EVERYTHING:
        assert ast.get_docstring(tree(path)) or not path.read_text("utf-8").strip(), short(path)


_VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc|common)(_|$)")


def test_names_say_something() -> None:
    assert not [short(path) for path in EVERYTHING if _VAGUE.search(path.stem)]


def test_no_paths_of_one_machine() -> None:
    for path in EVERYTHING:
        found = set(re.findall(r"/(?:home|root|work|Users)/\w+", path.read_text("utf-8")))
        assert found <= {"/home/user", "/home/me", "/home/alice"}, (short(path), found)


NINE = ["fetch", "convert", "calibrate", "quantize", "database", "search", "stitch", "validate"]
NINE += ["publish"]


def test_one_spelling_of_the_nine_stages() -> None:
    """In the run folder, in the modules, and in their own NAME; each has what a stage has."""
    assert list(STAGES) == NINE
    folder = ROOT / "quantkit" / "stages"
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(NINE)
    for stage in NINE:
        defined = {}
        for node in tree(folder / f"{stage}.py").body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                defined[ast.unparse(target)] = node.value
            elif isinstance(node, ast.FunctionDef):
                defined[node.name] = node
        assert {"NAME", "VERSION", "FIELDS", "execute"} <= set(defined), stage
        assert ast.literal_eval(defined["NAME"]) == stage  # type: ignore[arg-type]


def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("there is no README yet")
    return path.read_text("utf-8")


def test_the_readme_names_the_stages_in_order() -> None:
    assert re.search(r"[ ,>|→\W]+".join(NINE), readme())
    rows = re.findall(r"^\| `?(\w+)`? \|", readme(), re.MULTILINE)
    assert [row for row in rows if row in NINE] == NINE


def test_the_readme_shows_the_profiles() -> None:
    for name, profile in PROFILES.items():
        row = re.search(rf"^\| `{name}` \|.*$", readme(), re.MULTILINE)
        assert row, name
        assert f"{profile.calibration_tokens:,}" in row[0]
        assert f"{profile.search_tokens:,}" in row[0]
        assert " ".join(profile.levels) in row[0]


def test_what_the_readme_shows_is_there() -> None:
    """Every path of its tree and every relative link."""
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", readme()):
        assert (ROOT / link).exists(), link
