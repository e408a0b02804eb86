"""What dvc.yaml promises about the code: held by reading both, without running either."""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from fintune.params import Params, read_params

ROOT = Path(__file__).parents[1]
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
OUTPUTS = ("data", "models", "reports")
README = ROOT / "README.md"
LOCK = ROOT / "requirements.lock"


def parse(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), path)


def imports(path: str) -> set[str]:
    """The files of ours that a file imports anywhere in it, functions included."""
    found = set()
    for node in ast.walk(parse(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join([Path(path).parts[0], *filter(None, [node.module])])
            module = package if node.level else node.module or ""
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        files = (f"{name.replace('.', '/')}.py" for name in names)
        found |= {file for file in files if (ROOT / file).is_file()}
    return {file for file in found if file.startswith(("fintune/", "stages/"))}


def closure(path: str) -> set[str]:
    """The file and all of ours that it imports, directly or through others."""
    seen: set[str] = set()
    open_files = [path]
    while open_files:
        file = open_files.pop()
        if file not in seen:
            seen.add(file)
            open_files += imports(file)
    return seen


def templates(modules: set[str]) -> set[str]:
    """The files beside our modules that they name, and read when they are called."""
    beside = [p.relative_to(ROOT).as_posix() for p in (ROOT / "fintune").glob("*.jinja")]
    sources = [(ROOT / module).read_text() for module in modules]
    return {path for path in beside if any(Path(path).name in source for source in sources)}


def names_of(entries: list[Any]) -> set[str]:
    """Paths of dvc.yaml's entries, which are names or one-key mappings of a name to its options."""
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
    """The names that stand for the whole parameter file within a function."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    names = {a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "Params"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AnnAssign) and is_read_params(node.value):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {ast.unparse(target) for target in targets}
    return names


def sections_read(path: str) -> set[str]:
    """The attributes read of the whole parameter file, by function."""
    return {
        node.attr
        for function in functions(parse(path))
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute)
        and (is_read_params(node.value) or ast.unparse(node.value) in whole_file_names(function))
    }


def is_related(one: str, other: str) -> bool:
    """Whether two paths are equal or one lies below the other."""
    a, b = Path(one), Path(other)
    return a.is_relative_to(b) or b.is_relative_to(a)


def test_stages_and_scripts_match() -> None:
    scripts = {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
    assert set(STAGES) == scripts
    for name, stage in STAGES.items():
        assert stage["cmd"] == f"python -m stages.{name}"


@pytest.mark.parametrize("stage", STAGES)
def test_code_deps_are_the_imports(stage: str) -> None:
    script = f"stages/{stage}.py"
    declared = [d for d in STAGES[stage]["deps"] if d.startswith(("fintune/", "stages/"))]
    modules = closure(script)
    assert sorted(declared) == sorted((modules - {"fintune/params.py"}) | templates(modules))


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_the_sections_read(stage: str) -> None:
    assert set(STAGES[stage]["params"]) == sections_read(f"stages/{stage}.py")
    assert set(STAGES[stage]["params"]) <= set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_whole_parameter_file_stays_in_the_stage(stage: str) -> None:
    """Handed to other code, it could be read there without `params` saying so."""
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
    for path in sorted((ROOT / "fintune").glob("*.py")):
        if path.name == "params.py":
            continue
        for function in functions(parse(f"fintune/{path.name}")):
            if function.name != "main":
                reads = any(is_read_params(node) for node in ast.walk(function))
                assert not reads and not whole_file_names(function), f"{path}: {function.name}"


def test_every_section_is_read_by_a_stage() -> None:
    assert {s for stage in STAGES.values() for s in stage["params"]} == set(Params.model_fields)


@pytest.mark.parametrize("stage", STAGES)
def test_data_paths_are_declared(stage: str) -> None:
    """Each path that the script names is a dependency or an output, and the other way round."""
    calls = (node for node in ast.walk(parse(f"stages/{stage}.py")) if isinstance(node, ast.Call))
    used = {
        call.args[0].value
        for call in calls
        if ast.unparse(call.func) == "Path"
        and call.args
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    }
    shipped_base = {"assets/demo-base"}  # read through base.model, where that names it
    declared = (data_deps(stage) | outs(stage)) - shipped_base
    assert [path for path in used if not any(is_related(path, d) for d in declared)] == []
    assert [path for path in declared if not any(is_related(path, u) for u in used)] == []


def test_stages_are_joined_by_outputs() -> None:
    """What a stage reads under an output folder is written by one before it."""
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
    """DVC keeps no run of a stage with one that is not, and so would run it again each time."""
    assert all(isinstance(out, str) for out in STAGES[stage]["outs"])


def test_no_stage_imports_another() -> None:
    for path in [*(ROOT / "stages").glob("*.py"), *(ROOT / "fintune").glob("*.py")]:
        name = path.relative_to(ROOT).as_posix()
        assert not any(file.startswith("stages/") for file in imports(name)), name


@pytest.mark.parametrize("name", ["fintune/params.py", "fintune/records.py"])
def test_the_lowest_modules_import_nothing_of_ours(name: str) -> None:
    assert imports(name) == set()


def test_shipped_params_are_the_demo_recipe() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "recipes/demo.yaml").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    read_params(recipe)


def test_dvc_sends_nothing_and_hydra_is_off() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / ".dvc/config")
    assert config.getboolean("core", "analytics") is False
    assert config.getboolean("core", "check_update") is False
    assert config.getboolean("hydra", "enabled", fallback=False) is False
    assert [name for name in config.sections() if name.startswith(("remote", "'remote"))] == []


def test_what_runs_leave_behind_is_ignored() -> None:
    git = (ROOT / ".gitignore").read_text().split()
    assert {".venv/", "__pycache__/", "/mlflow.db", "/mlartifacts/", "/.checkpoints/"} <= set(git)
    assert "/dvc_plots/" in git  # where `dvc plots show` writes
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
