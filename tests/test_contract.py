"""Check dvc.yaml against the code by reading both, without running either."""

import ast
import configparser
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fintune import paths
from fintune.params import Params, left_out, read_params
from fintune.training.checkpoints import CODE
from tools.smollm2 import OUT as MADE_BASE

ROOT = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OUTPUTS = ("data", "models", "reports")
README = ROOT / "README.md"
LOCK = ROOT / "requirements.lock"


ORDER = (
    *(
        "errors",
        "params",
        "paths",
        "metrics",
        "reports",
        "progress",
        "lineage",
        "integrity",
        "hardware",
        "stage",
    ),
    *("processes", "hub", "data", "model", "tracking", "registry", "merging", "training"),
    *("generation", "evaluation", "export", "forecast", "usage", "commands", "__main__"),
)
SHOWN_ELSEWHERE = {
    "fintune/errors.py",
    "fintune/params.py",
    "fintune/paths.py",
}  # a change in these shows elsewhere
LONG = {"fintune/params.py", "fintune/model/fused/kernels.py"}
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("fintune", "stages")
    for path in (ROOT / folder).rglob("*.py")
)


@cache
def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def file_of(name: str) -> str | None:
    """Return the file of a dotted name, if it is one of our modules."""
    file = f"{name.replace('.', '/')}.py"
    return file if file in MODULES else None


@cache
def imported_names(path: str) -> dict[str, tuple[str, str]]:
    """Map each name that a file imports from our modules to a file and a name in it (empty for a module)."""
    found = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if file := file_of(alias.name):
                    found[alias.asname or alias.name] = (file, "")
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: a relative import"
            for alias in node.names:
                if file := file_of(f"{node.module}.{alias.name}"):
                    found[alias.asname or alias.name] = (file, "")
                elif file := file_of(node.module):
                    found[alias.asname or alias.name] = (file, alias.name)
    return found


def imports(path: str) -> set[str]:
    return {file for file, _ in imported_names(path).values()}


def unit(path: str) -> str:
    """Return the package or root file that a file belongs to, as dvc.yaml names it."""
    parts = Path(path).parts
    return "/".join(parts[:2]) if parts[0] == "fintune" else path


def rank(path: str) -> int:
    return ORDER.index(Path(unit(path)).stem)


def closure(path: str) -> set[str]:
    """Return the file and all our files that it imports, directly or transitively."""
    seen: set[str] = set()
    open_files = [path]
    while open_files:
        file = open_files.pop()
        if file not in seen:
            seen.add(file)
            open_files += imports(file)
    return seen


@cache
def definitions(path: str) -> dict[str, ast.stmt]:
    """Map names to a file's functions, classes and constants."""
    found: dict[str, ast.stmt] = {}
    for node in parse(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {
                n.id: node for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)
            }
    return found


def paths_used(script: str) -> set[str]:
    """Return the paths that a stage's main reaches, through all that it calls."""
    seen: set[tuple[str, str]] = set()
    waiting, used = [(script, "main")], set()
    while waiting:
        file, name = waiting.pop()
        if (file, name) in seen or name not in definitions(file):
            continue
        seen.add((file, name))
        for node in ast.walk(definitions(file)[name]):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "paths":
                used.add(str(getattr(paths, node.attr)))
            elif isinstance(node, ast.Name):
                waiting.append(imported_names(file).get(node.id, (file, node.id)))
    return used


def names_of(entries: list[Any]) -> set[str]:
    """Return the paths of dvc.yaml entries, which are names or one-key mappings of a name to its options."""
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def outs(stage: str) -> set[str]:
    return names_of([e for key in ("outs", "metrics", "plots") for e in STAGES[stage].get(key, [])])


def data_deps(stage: str) -> set[str]:
    return {d for d in STAGES[stage]["deps"] if not d.startswith(("fintune/", "stages/"))}


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def is_read_params(node: ast.AST | None) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "read_params"
    )


def whole_file_names(function: ast.FunctionDef) -> set[str]:
    """Return the names that hold the whole parameter file within a function."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Params"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_read_params(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names


def sections_read(path: str, parts: set[str]) -> set[str]:
    """Return the attributes read from the whole parameter file.

    Args:
        parts: dotted keys within sections; where only such a part of a section is read, it is returned.
    """
    found = set()
    for function in functions(parse(path)):
        whole = whole_file_names(function)
        inner = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
        within = {id(node.value): node.attr for node in inner}
        for node in inner:
            if is_read_params(node.value) or ast.unparse(node.value) in whole:
                part = f"{node.attr}.{within.get(id(node))}"
                found.add(part if part in parts else node.attr)
    return found


def is_related(one: str, other: str) -> bool:
    """Return whether two paths are equal or one is below the other."""
    a, b = Path(one), Path(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def test_stages_and_scripts_match() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert set(STAGES) == scripts
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m stages.{name}"


def test_imports_go_one_way() -> None:
    for path in MODULES:
        if path.startswith("fintune/") and Path(path).name != "__init__.py":
            upward = {f for f in imports(path) if unit(f) != unit(path) and rank(f) >= rank(path)}
            assert not upward, f"{path} imports {', '.join(sorted(upward))}"


def test_no_import_comes_back_to_where_it_started() -> None:
    for path in MODULES:
        later = {file for each in imports(path) for file in closure(each)}
        assert path not in later, path


def test_everything_has_a_place_in_the_order() -> None:
    there = {Path(unit(path)).stem for path in MODULES if path.startswith("fintune/")}
    assert there - {"__init__"} == set(ORDER)


def test_package_faces_are_empty() -> None:
    """Importing one module of a package must not import the rest: the format stage does without torch."""
    for path in (ROOT / "fintune").rglob("__init__.py"):
        assert path.read_bytes() == b"", path
    folders = {path.parent for path in (ROOT / "fintune").rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


@pytest.mark.parametrize("path", MODULES)
def test_no_module_is_long(path: str) -> None:
    limit = 90 if path.startswith("stages/") else 300
    assert path in LONG or len((ROOT / path).read_text().splitlines()) <= limit


@pytest.mark.parametrize("path", MODULES)
def test_files_are_named_in_one_place(path: str) -> None:
    """Other modules import the paths between stages from paths.py; messages may contain them."""
    if path == "fintune/paths.py":
        return
    file = re.compile(
        r"((data|models|reports|assets|\.checkpoints|\.dvc|mlartifacts)(/[\w./-]*)?"
        r"|dvc\.(yaml|lock)|(mlflow|search)\.db)"
    )
    words = {"data", "models", "reports", "assets", ".dvc"}  # also packages, kinds and columns
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = file.fullmatch(node.value) and node.value not in words
            assert not named, f"line {node.lineno}: {node.value}"
        if isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            begins = str(node.values[0].value)
            assert not file.fullmatch(begins) or begins in words, f"line {node.lineno}: {begins}"


def reached(stage: str) -> set[str]:
    """Return what a stage's imports reach: packages, root files, and parts of a package that it names."""
    named = [Path(d) for d in STAGES[stage]["deps"] if d.count("/") > 1]
    found = set()
    for file in closure(f"stages/{stage}.py"):
        parts = [str(d) for d in named if Path(file).is_relative_to(d)]
        found.add(parts[0] if parts else unit(file))
    return found - SHOWN_ELSEWHERE


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_the_packages_reached(stage: str) -> None:
    declared = [d for d in STAGES[stage]["deps"] if d.startswith(("fintune/", "stages/"))]
    assert sorted(declared) == sorted(reached(stage))


def reruns(file: str) -> set[str]:
    """Return the stages that run again when this file changes."""
    return {s for s in STAGES if any(Path(file).is_relative_to(d) for d in STAGES[s]["deps"])}


def test_a_change_reruns_what_it_can_change() -> None:
    assert reruns("fintune/commands/push.py") == set()
    assert reruns("fintune/export/push.py") == {"merge_export"}
    assert reruns("fintune/training/memory.py") == {"train"}
    assert reruns("fintune/evaluation/page.html.jinja") == {"evaluate"}
    assert reruns("fintune/data/formatting.py") == set(STAGES)


def test_a_checkpoint_knows_the_code_that_trains() -> None:
    """The fingerprint covers the code that decides what is learned; the stage depends on it, too."""
    code = {f"fintune/{name}" for name in CODE}
    assert code <= {d for d in STAGES["train"]["deps"] if d.startswith("fintune/")}
    beside = {
        "hub",
        "tracking",
        "hardware.py",
        "integrity.py",
        "lineage.py",
        "processes.py",
        "progress.py",
        "reports.py",
        "stage.py",
    }  # they fetch, log, check and talk
    # these choose the step to keep
    beside |= {f"evaluation/{name}.py" for name in ("correctness", "scores", "texts", "validation")}
    beside |= {"evaluation/statements", "generation"}
    assert reached("train") - code == {f"fintune/{name}" for name in beside} | {"stages/train.py"}


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_read(stage: str) -> None:
    declared = set(STAGES[stage]["params"])
    assert declared == sections_read(f"stages/{stage}.py", declared)
    assert {name.partition(".")[0] for name in declared} <= set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_whole_parameter_file_stays_in_the_stage(stage: str) -> None:
    """Other code could read sections of it that `params` does not list."""
    tree = parse(f"stages/{stage}.py")
    own = {function.name for function in functions(tree)}
    for function in functions(tree):
        whole = whole_file_names(function)
        allowed = {id(n.value) for n in ast.walk(function) if isinstance(n, ast.Attribute)}
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in own:
                allowed |= {id(argument) for argument in node.args}
        loads = [
            node
            for node in ast.walk(function)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in whole
        ]
        assert all(id(node) in allowed for node in loads), function.name
        allowed |= {id(n.value) for n in ast.walk(function) if isinstance(n, ast.Assign)}
        calls = [node for node in ast.walk(function) if is_read_params(node)]
        assert all(id(node) in allowed for node in calls), function.name


def test_no_shared_module_reads_the_parameter_file_but_as_a_program() -> None:
    for path in MODULES:
        if path.startswith("stages/") or path == "fintune/params.py":
            continue
        for function in functions(parse(path)):
            if not (path.startswith("fintune/commands/") and function.name == "main"):
                reads = any(is_read_params(node) for node in ast.walk(function))
                assert not reads and not whole_file_names(function), f"{path}: {function.name}"


def test_every_section_is_read_by_a_stage() -> None:
    read = {s for stage in STAGES.values() for s in stage["params"] if "." not in s}
    assert read == set(Params.model_fields)


LOGGED_AGAIN = {"reports/evaluation.html", "reports/predictions.parquet"}  # if MLflow lost them


@pytest.mark.parametrize("stage", STAGES)
def test_data_paths_are_declared(stage: str) -> None:
    """Each path that the stage uses is a dependency or an output, and vice versa."""
    shipped_base = {"assets/demo-base"}  # read through base.model
    declared = (data_deps(stage) | outs(stage)) - shipped_base
    used = {p for p in paths_used(f"stages/{stage}.py") if Path(p).parts[0] in (*OUTPUTS, "assets")}
    used -= LOGGED_AGAIN if stage == "merge_export" else set()
    assert [path for path in used if not any(is_related(path, d) for d in declared)] == []
    assert [path for path in declared if not any(is_related(path, u) for u in used)] == []


def test_stages_are_joined_by_outputs() -> None:
    """Each dependency in an output folder is written by an earlier stage."""
    written = {"data/source"}
    for stage in STAGES:
        for dep in data_deps(stage):
            if Path(dep).parts[0] in OUTPUTS:
                assert any(Path(dep).is_relative_to(out) for out in written), f"{stage}: {dep}"
        written |= outs(stage)


@pytest.mark.parametrize("stage", STAGES)
def test_outputs_lie_in_the_output_folders(stage: str) -> None:
    for out in outs(stage):
        assert Path(out).parts[0] in OUTPUTS and len(Path(out).parts) > 1, out


@pytest.mark.parametrize("stage", STAGES)
def test_every_plain_output_is_cached(stage: str) -> None:
    """DVC does not cache the run of a stage with an uncached output, and would run it each time."""
    assert all(isinstance(out, str) for out in STAGES[stage]["outs"])


def test_no_stage_imports_another() -> None:
    for path in MODULES:
        assert not any(file.startswith("stages/") for file in imports(path)), path


def test_shipped_params_are_the_demo_recipe() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "recipes/demo.yaml").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read beside the shipped base and the one that `python -m tools.smollm2` makes."""
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    (tmp_path / MADE_BASE).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    params = read_params(recipe)
    assert bool(left_out(params)) == (recipe.stem == "own-data")


def test_dvc_sends_nothing_and_hydra_is_off() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert config.getboolean("core", "analytics") is False
    assert config.getboolean("core", "check_update") is False
    assert config.getboolean("hydra", "enabled", fallback=False) is False
    assert [name for name in config.sections() if name.startswith(("remote", "'remote"))] == []


def test_what_runs_leave_behind_is_ignored() -> None:
    git = (ROOT / ".gitignore").read_text().split()
    assert {".venv", "__pycache__/", "/mlflow.db", "/mlartifacts/", "/.checkpoints/"} <= set(git)
    assert "/dvc_plots/" in git  # output of `dvc plots show`
    dvc = (ROOT / ".dvcignore").read_text().split()
    assert {"__pycache__", ".venv", ".checkpoints", "mlartifacts"} <= set(dvc)


@pytest.mark.skipif(not LOCK.is_file(), reason="requirements.lock is not there")
def test_lock_holds_exact_versions_only() -> None:
    text = LOCK.read_text()
    assert "://" not in text and "@" not in text
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    pinned = r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[^\s;]+( ?;.+)?"
    assert [line for line in lines if not re.fullmatch(pinned, line)] == []
    assert "torch==2.13.0" in lines


@pytest.mark.skipif(not README.is_file(), reason="README.md is not there")
def test_readme_table_names_the_stages() -> None:
    lines = README.read_text().splitlines()
    (header,) = [i for i, line in enumerate(lines) if re.match(r"\|\s*stage\s*\|", line, re.I)]
    named = []
    for line in lines[header + 2 :]:
        if not line.startswith("|"):
            break
        named.append(re.sub(r"[`*\[\]]|\(.*?\)", "", line.split("|")[1]).strip())
    assert named == list(STAGES)
