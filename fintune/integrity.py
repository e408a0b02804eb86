"""Held hashes: the files of a folder against SHA256SUMS, and of outputs against dvc.lock.

DVC checks out what its cache holds without hashing it, so that a flipped bit reaches a stage without a word.
"""

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ruamel.yaml import YAML

from fintune import paths
from fintune.errors import UserError
from fintune.lineage import file_md5, folder_md5, locked_stages

log = logging.getLogger("fintune")
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sig"
RUNS_CODE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py"}
LOADED = {
    ".safetensors",
    ".gguf",
    ".json",
    ".jinja",
    ".txt",
    ".md",
    ".model",
}  # as model folders have


class Changed(NamedTuple):
    """An output that is not what its stage wrote, as dvc.lock has it."""

    out: Path
    stage: str
    said: str  # the file, what was found and what was expected
    broken: list[Path]  # files of DVC's cache that do not hold what their names say


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's files by name, without hidden ones, SHA256SUMS and its signature."""
    files = {
        name: path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and (name := path.relative_to(folder).as_posix()) not in (SUMS, SIGNATURE)
    }
    return dict(zip(files, sha256_of(files.values()), strict=True))


def sha256_of(files: Iterable[Path]) -> list[str]:
    """Compute the SHA-256 of each file, several at a time: hashing leaves Python's lock."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(sha256, files))


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, hashes: dict[str, str]) -> None:
    """Write `SHA256SUMS`, for `sha256sum --check SHA256SUMS`."""
    lines = [f"{digest}  {name}\n" for name, digest in sorted(hashes.items())]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_sums(folder: Path) -> dict[str, str] | None:
    """Read a folder's SHA256SUMS; None if it has none.

    Raises:
        UserError: a line is not a hash and a name.
    """
    file = folder / SUMS
    if not file.is_file():
        return None
    sums = {}
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines()):
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if not found:
            raise UserError(f"{file} line {number + 1}: not a SHA-256 and the name of a file")
        sums[found[2]] = found[1]
    return sums


def against_sums(folder: Path, sums: dict[str, str], found: dict[str, str]) -> list[str]:
    """Describe what a folder's files, with the hashes found, have against its SHA256SUMS."""
    wrong = [f"{folder / name}: missing" for name in sorted(sums) if name not in found]
    for name, digest in found.items():
        if name in sums and sums[name] != digest:
            wrong.append(
                f"{folder / name}: its SHA-256 is {digest[:16]}…, and {SUMS} has {sums[name][:16]}…"
            )
        elif name not in sums and Path(name).suffix in LOADED | RUNS_CODE:
            wrong.append(f"{folder / name}: not in {SUMS}, and would be loaded")
    return wrong


def check_sums(folder: Path) -> None:
    """Check the files of a folder that has a SHA256SUMS.

    Raises:
        UserError: a file is missing, was changed or was added.
    """
    sums = read_sums(folder)
    if sums is not None and (wrong := against_sums(folder, sums, hash_files(folder))):
        raise UserError(
            f"{wrong[0]}; take the folder from where it came again (`dvc repro merge_export` makes "
            "models/merged), or, if you made this change, write the file's line anew with sha256sum"
        )


def changed_outputs(wanted: Collection[Path]) -> Iterator[Changed]:
    """Find the outputs in dvc.lock that hold some files, are here, and are not what their stages wrote."""
    for stage, entry in locked_stages().items():
        for locked in entry.get("outs", []):
            out = Path(locked["path"])
            if not out.exists() or not any(each.is_relative_to(out) for each in wanted):
                continue
            found = folder_md5(out) if out.is_dir() else file_md5(out)
            if found != locked["md5"]:
                yield _describe(out, stage, found, locked["md5"])


def _describe(out: Path, stage: str, found: str, expected: str) -> Changed:
    """Find which files of an output differ, and whether DVC's cache is broken, too."""
    try:
        from dvc.repo import Repo  # only here: it takes a second to import

        cache = Repo().cache.local
        kept = Path(cache.oid_to_path(expected))
        listed = [{"md5": expected, "relpath": ""}]
        if expected.endswith(".dir"):
            listed = json.loads(kept.read_bytes())
        files = {each["relpath"]: each["md5"] for each in listed}
        stored = {name: Path(cache.oid_to_path(md5)) for name, md5 in files.items()}
    except Exception:  # no DVC project here, an output that DVC does not cache, a broken listing
        return Changed(out, stage, _said(out, found, expected, stage), [])
    said, broken = [], []
    for name, md5 in files.items():
        path = out / name if name else out
        has = file_md5(path) if path.is_file() else "none, it is missing"
        if has != md5:
            said.append(_said(path, has, md5, stage))
        if stored[name].is_file() and file_md5(stored[name]) != md5:
            broken.append(stored[name])
    return Changed(out, stage, (said or [_said(out, found, expected, stage)])[0], broken)


def _said(path: Path, found: str, expected: str, stage: str) -> str:
    return f"{path}: its md5 is {found}, and {paths.LOCK} has {expected}, as the stage {stage} wrote it"


def check_outputs(wanted: Collection[Path], strict: bool) -> None:
    """Hold files that stages wrote against dvc.lock.

    Args:
        strict: a change by hand is an error, too; else it is a warning, and only a broken cache is an error.

    Raises:
        UserError: a file is not what its stage wrote.
    """
    for each in changed_outputs(wanted):
        if each.broken:
            remove = " ".join(os.path.relpath(path) for path in (each.out, *each.broken))
            raise UserError(
                f"{each.said}; DVC's cache is damaged: remove it (`rm -rf {remove}`), then `dvc pull "
                f"{each.out}` fetches it from a remote, or `dvc repro {each.stage}` makes it again"
            )
        way_out = (
            f"`rm -rf {each.out}` and `dvc checkout {each.out}` bring that back (of a report, `git checkout "
            f"{each.out}`), `dvc repro {each.stage}` makes it again, `dvc commit {each.stage}` keeps this one"
        )
        if strict:
            raise UserError(f"{each.said}; {way_out}")
        log.warning("note: %s", each.said)


def check_inputs(stage: str) -> None:
    """Hold what a stage reads of earlier stages' outputs against what they wrote, as dvc.lock has it.

    Under DVC, which writes dvc.lock after each stage, a difference is damage, as nothing else has changed it.
    A stage that is run by hand may follow another that was: there, only a broken cache is an error.

    Raises:
        UserError: an input is not what its stage wrote.
    """
    if not paths.PIPELINE.is_file():
        return
    pipeline = YAML(typ="safe").load(paths.PIPELINE.read_text(encoding="utf-8"))
    deps = [Path(dep) for dep in pipeline["stages"].get(stage, {}).get("deps", [])]
    check_outputs(deps, strict="DVC_STAGE" in os.environ)
