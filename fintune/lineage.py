"""Lineage of a result: the project's root and commit, and the parameters and hashes in dvc.lock."""

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from fintune import paths

PARENT_RUN = "FINTUNE_PARENT_RUN"  # a search's MLflow run, in the environment of its trials
SHA1 = 40  # digits of a commit
UPSTREAM = ("fetch", "split", "format", "train")  # the stages that an adapter depends on


class Lock(NamedTuple):
    """A dvc.lock that has the model, and the files beside it."""

    where: str
    stages: dict[str, Any]
    read: Callable[[Path], bytes | None]


def project_root() -> Path:
    """Return the root of the user's checkout.

    `dvc exp run --temp` and queued experiments run in a copy below `.dvc/tmp/exps` that is deleted
    afterwards; the MLflow database and checkpoints must outlive it.
    """
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2]
    return here


def git(root: Path, *arguments: str) -> str:
    """Return git's output in `root`, or an empty string if it fails or there is no repository."""
    done = subprocess.run(
        ["git", *arguments], cwd=root, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def lacks_repository(root: Path) -> bool:
    """Return whether DVC refuses to run: there is no git repository, as in a downloaded archive."""
    texts = [(root / file).read_text() for file in paths.DVC_CONFIG if (root / file).is_file()]
    waived = any(re.search(r"^\s*no_scm\s*=\s*true", text, re.M | re.I) for text in texts)
    return not (root / ".git").exists() and not waived


def in_no_commit(root: Path, sources: Sequence[str]) -> list[str]:
    """Return the files and folders among some sources that neither git nor DVC tracks.

    Names of no file are left out. Of a folder, one file that is not tracked is enough.
    """
    return [
        source
        for source in dict.fromkeys(sources)
        if (root / source).exists() and not _is_tracked(root, source)
    ]


def _is_tracked(root: Path, source: str) -> bool:
    path = Path(os.path.relpath(root / source, root))
    if path.parts[0] == os.pardir:
        return False
    for each in (path, *path.parents[:-1]):
        if git(root, "ls-files", "--", f"{each}.dvc"):
            return True
    return bool(git(root, "ls-files", "--", str(path))) and not git(
        root, "ls-files", "--others", "--", str(path)
    )


def locked_stages(root: Path = Path()) -> dict[str, Any]:
    """Read the entries of dvc.lock by stage; empty without that file."""
    lock = root / paths.LOCK
    stages: dict[str, Any] = {}
    if lock.is_file():
        stages = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
    return stages


def finished_stages(root: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read the dvc.lock entries of stages that ran before the current one; empty outside DVC.

    `names` must be earlier stages: the current stage's own entry is from its last run.
    """
    if "DVC_STAGE" not in os.environ:
        return []
    stages = locked_stages(root)
    return [stages[name] for name in names if name in stages]


def locked_params(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the parameter sections that a stage ran with, from its entry in dvc.lock."""
    params: dict[str, Any] = entry.get("params", {}).get("params.yaml", {})
    return params


def output_hashes(entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the md5 of the data and adapter outputs in dvc.lock entries, as tags."""
    return {
        f"md5.{out['path']}": out["md5"]
        for entry in entries
        for out in entry.get("outs", [])
        if Path(out["path"]).is_relative_to(paths.DATA) or Path(out["path"]) == paths.ADAPTER
    }


def adapter_read(entry: dict[str, Any]) -> str | None:
    """Return the md5 of the adapter that a stage read, from its entry in dvc.lock."""
    deps = {Path(dep["path"]): str(dep["md5"]) for dep in entry.get("deps", [])}
    return deps.get(paths.ADAPTER)


def folder_md5(folder: Path, counts: Callable[[str], bool] = lambda name: True) -> str:
    """Compute DVC's hash of a folder: the md5 of the sorted list of its files' hashes and paths.

    Args:
        counts: says of a name within the folder whether the file is one of them.
    """
    listed = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and counts(name):
            listed.append({"md5": file_md5(path), "relpath": name})
    listed.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode()).hexdigest() + ".dir"


def file_md5(path: Path) -> str:
    """Compute the md5 of a file, as DVC does."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def find_lock(md5: str) -> Lock | None:
    """Find a dvc.lock with this output: here, else in git's history."""

    if _has(stages := locked_stages(), md5):
        return Lock(
            str(paths.LOCK), stages, lambda path: path.read_bytes() if path.is_file() else None
        )
    root = Path.cwd()
    for commit in git(
        root, "log", "--all", "--format=%H", f"-S{md5}", "--", str(paths.LOCK)
    ).split():

        def read(path: Path, commit: str = commit) -> bytes | None:
            shown = subprocess.run(
                ["git", "show", f"{commit}:./{path}"], capture_output=True, check=False
            )
            return shown.stdout if shown.returncode == 0 else None

        stages = YAML(typ="safe").load(read(paths.LOCK) or b"stages: {}")["stages"]
        if _has(stages, md5):
            return Lock(f"{paths.LOCK} of commit {commit[:12]}", stages, read)
    return None


def _has(stages: dict[str, Any], md5: str) -> bool:
    outs = (out for stage in stages.values() for out in stage.get("outs", []))
    return any(out["md5"] == md5 for out in outs)


def _stages_at(commit: str) -> dict[str, Any]:
    text = git(Path(), "show", f"{commit}:./{paths.LOCK}")
    stages: dict[str, Any] = YAML(typ="safe").load(text or "stages: {}")["stages"]
    return stages


def commit_with(md5: str) -> str | None:
    """Return the newest commit of a branch or tag whose dvc.lock has this output; None if none has it."""
    refs = ("HEAD", "--branches", "--tags", "--remotes")
    added = git(Path(), "log", *refs, "--format=%H", f"-S{md5}", "--", str(paths.LOCK))
    return next((each for each in added.split() if _has(_stages_at(each), md5)), None)


def experiment_with(md5: str) -> tuple[str, str] | None:
    """Return name and commit of the experiment in this clone whose dvc.lock has this output."""
    listed = git(Path(), "for-each-ref", "--format=%(refname) %(objectname)", "refs/exps/")
    for ref, commit in (line.split() for line in listed.splitlines()):
        _, _, *baseline, name = ref.split("/")
        if len("".join(baseline)) == SHA1 and _has(_stages_at(commit), md5):
            return name, commit
    return None


def unlike_lock(commit: str) -> list[str]:
    """Return the parameter sections and code of a commit that are not what its dvc.lock's stages ran with."""
    stages = _stages_at(commit)
    params = YAML(typ="safe").load(git(Path(), "show", f"{commit}:./params.yaml") or "{}")
    locked = [locked_params(stages.get(name, {})) for name in UPSTREAM]
    sections = {key for each in locked for key in each if params.get(key) != each[key]}
    return [*sorted(sections), *(changed_code(commit, stages) or [])]


def changed_code(commit: str, stages: dict[str, Any]) -> list[str] | None:
    """Return which code of a commit is not what a dvc.lock's stages ran; None if there is no such commit."""
    packed = subprocess.run(
        ["git", "archive", commit, "fintune", "stages"], capture_output=True, check=False
    )
    if packed.returncode:
        return None
    deps = [dep for name in UPSTREAM for dep in stages.get(name, {}).get("deps", [])]
    wrong = set()
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as tar:
            tar.extractall(scratch, filter="data")
        for dep in deps:
            if dep["path"].startswith(("fintune/", "stages/")):
                path = Path(scratch) / dep["path"]
                md5 = folder_md5(path) if path.is_dir() else path.is_file() and file_md5(path)
                wrong |= {dep["path"]} if md5 != dep["md5"] else set()
    return sorted(wrong)
