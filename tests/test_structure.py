"""The shape of the code, read from its syntax trees: who imports whom, what is never written, and
one spelling of the nine stages everywhere.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import datasets
import pytest

from quantkit.config import RunConfig
from quantkit.run.artifacts import NAMES
from quantkit.stages import STAGES

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


# The floor plan, from the bottom up: packages and the loose modules of `quantkit`. A module imports
# from its own package and from what stands above it in this list, types included.
FLOOR_PLAN = (
    "errors",
    "sandbox",
    "sizes",
    "markdown",
    "ggml",
    "tensors",
    "files",
    "machine",
    "ranks",
    "config",
    "run",
    "checkpoint",
    "gguf_file",
    "model",
    "hub",
    "sources",
    "llamacpp",
    "statistics",
    "gptq",
    "calibration",
    "search",
    "tuning",
    "planning",
    "evidence",
    "stages",
    "pipeline",
    "rebuild",
    "verifying",
    "server.executors",
    "server.runs",
    "server.previews",
    "server.web",
    "cli",
    "__main__",
)
MOST_LOOSE = 8  # modules of `quantkit` itself, beside __init__ and __main__


def place(module: str) -> int:
    """The place of a module of quantkit in the floor plan; the package itself is below all."""
    parts = module.split(".")[1:]
    if not parts or parts == ["server"]:
        return -1
    own = ".".join(parts[:2]) if parts[0] == "server" else parts[0]
    return FLOOR_PLAN.index(own)


def test_imports_only_go_down() -> None:
    """Types alone count, too: what a type needs is known to the reader of the module."""
    wrong = []
    for path in OURS:
        own = module_of(path)
        if own.startswith("quantkit"):
            for name in sorted(imported(ast.walk(tree(path))) & MODULES):
                if name.startswith("quantkit") and place(name) > place(own):
                    wrong.append(f"{own} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_floor_plan_is_whole() -> None:
    """Every package is in the list and says what it holds; few modules stand loose."""
    folder = ROOT / "quantkit"
    loose = {p.stem for p in folder.glob("*.py")} - {"__init__"}
    packages = {p.parent.name for p in folder.glob("*/__init__.py")}
    assert loose | packages == {name.split(".")[0] for name in FLOOR_PLAN}
    assert len(loose - {"__main__"}) <= MOST_LOOSE
    for path in folder.glob("*/__init__.py"):
        assert ast.get_docstring(tree(path)), short(path)


def test_the_floor_plan_is_drawn() -> None:
    """ARCHITECTURE.md has the same list, a line each, in the same order."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    plan = re.search(r"^## Floor plan$.*?^```$(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert plan
    rows = [re.split(r" {2,}", line) for line in plan[1].strip().splitlines()]
    assert [name for name, _ in rows] == list(FLOOR_PLAN)
    assert all(about for _, about in rows)


def test_no_circles() -> None:
    """Among all modules, imports in functions included: an order exists in which each is below."""
    left = {module_of(p): imports(p) & MODULES - {module_of(p)} for p in OURS}
    while left:
        free = [m for m, needs in left.items() if not needs & left.keys()]
        assert free, f"a circle among {sorted(left)}"
        for module in free:
            del left[module]


@cache
def named_in(module: str) -> set[str]:
    """What can be imported from a module of ours: what it defines or imports, and its modules."""
    path = next(p for p in OURS if module_of(p) == module)
    found = {m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == module}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def test_what_is_imported_is_there() -> None:
    """Also in benchmarks and experiments, which no other test starts."""
    wrong = []
    for path in EVERYTHING:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in PACKAGES:
                known = named_in(str(node.module)) if node.module in MODULES else set()
                lost = {alias.name for alias in node.names} - known
                wrong += [f"{short(path)}: {name} of {node.module}" for name in sorted(lost)]
    assert not wrong, "\n".join(wrong)


def test_only_checks_look_at_the_evaluators() -> None:
    """The search never grades itself. (evidence.parity has `evaluators.oracle` run by its name;
    `evaluators.figures` are what was found, `evaluators.sandbox` keeps a process in bounds: they
    grade nothing.)
    """
    found = {
        module_of(path)
        for path in OURS
        if path.is_relative_to(ROOT / "quantkit")
        and any(
            f"{name}.".startswith("evaluators.")
            for name in imports(path) - {"evaluators.figures", "evaluators.sandbox"}
        )
    }
    judges = {"stages.validate", "evidence.meter", "evidence.compare", "llamacpp.tokens"}
    judges |= {"evidence.in_use", "verifying.again", "verifying.figures"}
    judges |= {"verifying.again_in_use", "verifying.figures_in_use"}
    # Starts them; says what they compute on; opens the texts that they will read.
    looks = {"llamacpp.place", "evidence.devices", "planning.texts"}
    assert found == {f"quantkit.{name}" for name in judges | looks}


def test_evaluators_know_nothing_of_quantkit() -> None:
    for path in OURS:
        if path.is_relative_to(ROOT / "evaluators"):
            ours = {name for name in imports(path) if f"{name}.".startswith("quantkit.")}
            assert not ours, short(path)


HEAVY = ("torch", "transformers", "llama_cpp", "numba", "datasets", "gradio", "safetensors")
HEAVY += ("jinja2", "vl_convert")
LIGHT = (
    "quantkit",
    "quantkit.cli",
    "quantkit.config",
    "quantkit.run.folder",
    "quantkit.server.runs.store",
)


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
    command = ("quantkit/cli.py", "quantkit/run/terminal.py")
    entries = ("quantkit/llamacpp/converter/entry.py", "quantkit/llamacpp/converter/install.py")
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


# Started by its path, with nothing else to be read: what keeps a process in bounds is one file.
_WHOLE = {"evaluators/sandbox.py": 1100}


def test_files_are_short() -> None:
    """450 lines is the aim, 600 the end."""
    for path in EVERYTHING:
        n = len(path.read_text("utf-8").splitlines())
        most = _WHOLE.get(short(path), 450 if path in OURS else 600)
        assert n <= most, f"{short(path)}: {n} lines"


def test_the_sandbox_is_one_file_of_the_standard_library() -> None:
    """So `evaluators` has it without quantkit, and it can be started by its path alone."""
    path = ROOT / "evaluators" / "sandbox.py"
    names = {name.split(".")[0] for name in imports(path)}
    assert names <= sys.stdlib_module_names


def test_every_module_says_what_it_is_for() -> None:
    for path in EVERYTHING:
        assert ast.get_docstring(tree(path)) or not path.read_text("utf-8").strip(), short(path)


_NOUNS = ("What", "Whether", "How", "Of", "Raises")
_ARTICLES = ("The", "A", "An")  # a property is a noun, and its docstring may be one


def test_docstrings_are_imperative() -> None:
    """Public functions say what they do: "Return the bytes of ...", not "The bytes of ..."."""
    found = []
    for path in OURS:
        for node in walk(tree(path)):
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not node.name.startswith("_"):
                said = ast.get_docstring(node) or ""
                decorators = map(ast.unparse, node.decorator_list)
                is_property = any(name.endswith("property") for name in decorators)
                words = _NOUNS if is_property else (*_NOUNS, *_ARTICLES)
                if said.startswith(tuple(f"{word} " for word in words)):
                    found.append(f"{short(path)}:{node.lineno}: {said.splitlines()[0]}")
    assert not found, "\n".join(found)


_VAGUE = re.compile(r"(^|_)(utils?|helpers?|misc|common)(_|$)")


def test_names_say_something() -> None:
    assert not [short(path) for path in EVERYTHING if _VAGUE.search(path.stem)]


def test_no_paths_of_one_machine() -> None:
    for path in EVERYTHING:
        found = set(re.findall(r"/(?:home|root|work|Users)/\w+", path.read_text("utf-8")))
        assert found <= {"/home/user", "/home/me", "/home/alice"}, (short(path), found)


NINE = ["fetch", "convert", "calibrate", "quantize", "search", "tune", "stitch", "validate"]
NINE += ["publish"]


def test_one_spelling_of_the_nine_stages() -> None:
    """In the run folder, in the modules, and in their own names; each says what it does."""
    assert list(NAMES) == NINE == [stage.name for stage in STAGES]
    folder = ROOT / "quantkit" / "stages"
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == set(NINE)
    for stage in STAGES:
        assert type(stage).__module__ == f"quantkit.stages.{stage.name}"
        assert stage.about and set(stage.fields) <= {f.name for f in dataclasses.fields(RunConfig)}


def test_artifacts_have_names() -> None:
    """No module but one types the folder of a stage, or its number."""
    pattern = re.compile(r"\b[1-9]-(" + "|".join(NINE) + r")\b|stage_dir\([\"\']")
    for path in OURS:
        if path.name not in ("artifacts.py", "folder.py"):
            assert not pattern.search(path.read_text("utf-8")), short(path)


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them by name alone, and stops at the second of one name."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, n in names.items() if n > 1]
