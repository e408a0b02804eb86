"""Verify a model's files, signature, data, code, parameters and figures, claim by claim.

    python -m fintune verify models/merged                     # or an adapter, or a folder from the hub
    python -m fintune verify --key signing.pub financial-qa@champion

Each line says that a claim holds, that it fails, or why it could not be checked. If one fails, the exit
status is 1. Nothing is changed. dvc.lock is this folder's, or that of the commit in which it has the model.
"""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fintune import paths
from fintune.errors import UserError
from fintune.integrity import SIGNATURE, against_sums, changed_outputs, hash_files, read_sums
from fintune.lineage import (
    UPSTREAM,
    Lock,
    changed_code,
    find_lock,
    folder_md5,
    locked_params,
    locked_stages,
    output_hashes,
    project_root,
)
from fintune.params import with_usual
from fintune.reports import whole

HOLDS, FAILS, UNCHECKED = "holds", "FAILS", "unchecked"
Line = tuple[str, str]


class Claims(NamedTuple):
    """Claims about a model: of its bill of materials, its run record, or its registered version."""

    by: str
    run_id: str
    tags: dict[str, str]
    params: dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the model and the public key."""
    parser.add_argument(
        "model", metavar="FOLDER|MODEL", help="a folder, NAME@ALIAS or NAME/VERSION"
    )
    parser.add_argument("--key", help="public key, PEM; default: what FINTUNE_PUBLIC_KEY names")


def main(given: argparse.Namespace) -> None:
    """Print a line for each claim, and fail if one does not hold."""
    from fintune.export.signature import public_key
    from fintune.tracking.client import existing_store

    key, version, client = public_key(given.key), None, existing_store(project_root())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.model)
        if not folder.is_dir():
            from fintune.registry.versions import download_version, find_version
            from fintune.tracking.client import connect

            client = client or connect(project_root())
            name = given.model.removeprefix("models:/")
            version = find_version(client, name)
            folder = download_version(client, name, Path(scratch))
        lines = []
        for state, text in _verify(folder, key, client, version):
            lines.append(state)
            print(f"{state:<9}  {text.replace(scratch, given.model)}")
    if failed := lines.count(FAILS):
        raise UserError(f"{given.model}: {failed} of {len(lines)} claims do not hold")


def _verify(folder: Path, key: Any, client: Any, version: Any) -> Iterator[Line]:
    found = hash_files(folder)
    yield from _files(folder, key, found)
    md5 = folder_md5(folder)
    if version:
        from fintune.export.pyfunc import without_model_files

        md5 = folder_md5(folder, without_model_files)
        said = version.tags.get(f"md5.{paths.ADAPTER}")
        yield _same(f"the adapter's md5 {md5} and the version's tag", md5, said)
    lock = find_lock(md5)
    if lock is None:
        ours = folder.resolve() in (paths.ADAPTER.resolve(), paths.MERGED.resolve())
        state = FAILS if ours and locked_stages() else UNCHECKED
        yield (
            state,
            f"data, code, parameters, figures: no {paths.LOCK} here or in git has md5 {md5}",
        )
        return
    yield HOLDS, f"{lock.where} has this model: md5 {md5}"
    claims = _claims(folder, client, version, lock)
    if claims is None:
        yield (
            UNCHECKED,
            "data, code, parameters, figures: no bill of materials, run record or version",
        )
        return
    yield from _data_and_code(claims, lock)
    yield from _run(claims, lock, client)
    yield from _figures(folder, lock, version, client)


def _files(folder: Path, key: Any, found: dict[str, str]) -> Iterator[Line]:
    """Hold files against SHA256SUMS, that against its signature, and both against the bill of materials."""
    from fintune.export.bom import BOM, read_bom
    from fintune.export.signature import check_signature, fingerprint

    sums = read_sums(folder)
    if sums is None:
        yield (
            UNCHECKED,
            "files: the folder has no SHA256SUMS, as an adapter; dvc.lock's md5 follows",
        )
    elif wrong := against_sums(folder, sums, found):
        yield from ((FAILS, each) for each in wrong)
    else:
        yield HOLDS, f"{len(sums)} files are what SHA256SUMS says"
    if not (folder / SIGNATURE).is_file():
        state = FAILS if key and sums is not None else UNCHECKED
        yield state, "signature: there is none" + (", though a key is named" if key else "")
    elif key is None:
        yield (
            UNCHECKED,
            "signature: --key or FINTUNE_PUBLIC_KEY names the public key to check it with",
        )
    else:
        try:
            check_signature(folder, key)
            yield HOLDS, f"SHA256SUMS is signed by the key {fingerprint(key)}"
        except UserError as error:
            yield FAILS, str(error)
    if bom := read_bom(folder):
        parts = bom["metadata"]["component"].get("components", [])
        stated = {each["name"]: each["hashes"][0]["content"] for each in parts}
        wrong = against_sums(folder, stated | {BOM: found[BOM]}, found)
        yield from ((FAILS, f"{BOM}: {each}") for each in wrong)
        if not wrong:
            yield HOLDS, f"{len(stated)} files are what {BOM} says"


def _claims(folder: Path, client: Any, version: Any, lock: Lock) -> Claims | None:
    from fintune.export.bom import BOM, read_bom

    if bom := read_bom(folder):
        said = bom["metadata"]["component"]["properties"]
        named = {each["name"].removeprefix("fintune:"): each["value"] for each in said}
        params = {k.removeprefix("parameter."): v for k, v in named.items() if "parameter." in k}
        return Claims(BOM, named["mlflow.run_id"], named, params)
    if version is None and (record := lock.read(paths.RUN)):
        run = json.loads(record)
        return Claims(str(paths.RUN), run["run_id"], run["tags"], run["params"])
    if version is None and client:
        tag = f"tags.`md5.{paths.ADAPTER}` = '{folder_md5(folder)}'"
        version = next(iter(client.search_model_versions(tag)), None)
    if version is None:
        return None
    params = client.get_run(version.run_id).data.params
    return Claims("the registered version", version.run_id, version.tags, params)


def _data_and_code(claims: Claims, lock: Lock) -> Iterator[Line]:
    upstream = [lock.stages[name] for name in UPSTREAM if name in lock.stages]
    for path, md5 in output_hashes(upstream).items():
        if path in claims.tags:
            yield _same(f"{path.removeprefix('md5.')} in {claims.by}", claims.tags[path], md5)
    if lock.where == str(paths.LOCK):
        outs = [Path(key.removeprefix("md5.")) for key in output_hashes(upstream)]
        yield from ((FAILS, each.said) for each in changed_outputs(outs))
        yield from ((UNCHECKED, f"{out}: not here; `dvc pull`") for out in outs if not out.exists())
    yield _same_params(claims.by, claims.params, lock)
    commit = claims.tags.get("git_commit")
    if not commit:
        yield UNCHECKED, "code: the model was not made in a git repository"
    elif claims.tags.get("git_dirty") == "true":
        yield UNCHECKED, f"code: made of commit {commit} with changes that were in no commit"
    else:
        yield _code(commit, lock)


def _code(commit: str, lock: Lock) -> Line:
    """Hold a commit's code against the md5 of what the stages ran."""
    if (wrong := changed_code(commit, lock.stages)) is None:
        return UNCHECKED, f"code: this clone has no commit {commit}"
    if wrong:
        return FAILS, f"code: {', '.join(wrong)} of commit {commit} is not what {lock.where} has"
    return HOLDS, f"code: the stages of {lock.where} ran that of commit {commit}"


def _same_params(by: str, said: dict[str, str], lock: Lock) -> Line:
    from fintune.tracking.runs import as_texts

    locked: dict[str, Any] = {}
    for name in UPSTREAM:
        locked |= locked_params(lock.stages.get(name, {}))
    usual = as_texts(with_usual(locked))  # of keys that came later, an earlier record says nothing
    expected = as_texts(locked) | {key: usual[key] for key in set(said) & set(usual)}
    names = {*said, *expected}
    apart = sorted(key for key in names if _value(said.get(key)) != _value(expected.get(key)))
    if not apart:
        return HOLDS, f"{len(said)} parameters in {by} are those of {lock.where}"
    first = apart[0]
    return FAILS, (
        f"parameters in {by}: {first} is {said.get(first)}, and {expected.get(first)} in {lock.where}"
        + (f" (and {len(apart) - 1} more)" if len(apart) > 1 else "")
    )


def _value(text: str | None) -> Any:
    """Parse a parameter as MLflow has it: dvc.lock has a number as it was typed, 2 for 2.0."""
    try:
        return json.loads(text or "")
    except ValueError:
        return text


def _run(claims: Claims, lock: Lock, client: Any) -> Iterator[Line]:
    """Hold MLflow's run against dvc.lock."""
    if client is None:
        yield UNCHECKED, "MLflow: no store here; MLFLOW_TRACKING_URI names one"
        return
    ids = [each.experiment_id for each in client.search_experiments()]
    again = f"tags.first_run_id = '{claims.run_id}'"
    known = [run for run in client.search_runs(ids, "") if run.info.run_id == claims.run_id]
    runs = known or list(client.search_runs(ids, again))
    if not runs:
        yield UNCHECKED, f"MLflow: its store has no run {claims.run_id}"
        return
    yield _same_params(f"MLflow's run {runs[0].info.run_id}", runs[0].data.params, lock)
    evaluation = lock.read(paths.EVALUATION)
    if evaluation and "tuned/loss" in runs[0].data.metrics:
        loss = json.loads(evaluation)["tuned"]["loss"]
        logged = f"{runs[0].data.metrics['tuned/loss']:.6g}"  # before rounding, at times
        yield _same("loss in MLflow's run", logged, f"{loss:.6g}")


def _figures(folder: Path, lock: Lock, version: Any, client: Any) -> Iterator[Line]:
    """Hold what card, bill of materials and registry say of its quality against evaluation.json."""
    content = lock.read(paths.EVALUATION)
    outs = (out for stage in lock.stages.values() for out in stage.get("outs", []))
    md5 = next((out["md5"] for out in outs if Path(out["path"]) == paths.EVALUATION), None)
    if content is None or md5 is None:
        yield UNCHECKED, f"figures: {lock.where} has no {paths.EVALUATION} beside it"
        return
    yield _same(f"{paths.EVALUATION}, md5", hashlib.md5(content).hexdigest(), md5)
    evaluation = whole(json.loads(content))
    if (folder / "README.md").is_file():
        from fintune.export.card import metric_lines

        card = (folder / "README.md").read_text(encoding="utf-8")
        lines = []
        for line in metric_lines(evaluation):
            there = f"| {' | '.join(line)} |" in card.splitlines()
            said = f"README.md: no line with {line[0]} {line[2]}, as {paths.EVALUATION} has it"
            lines.append((HOLDS if there else FAILS, said))
        yield from _together("README.md", lines)
    from fintune.export.bom import BOM, metric, read_bom

    if bom := read_bom(folder):
        figures = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
        lines = []
        for each in figures["performanceMetrics"]:
            if each["slice"] == "test":
                side, _, name = each["type"].partition(".")
                expected = metric(each["type"], evaluation[side].get(name), "test") or {}
                lines.append(_same(f"{BOM}: {each['type']}", each["value"], expected.get("value")))
        yield from _together(BOM, lines)
    if version:
        from fintune.registry.versions import registered_figures

        registered = registered_figures(client, version)
        lines = [
            _same(f"registry: {name}", registered[name], f"{value:.6g}")
            for name, value in evaluation["tuned"].items()
            if name in registered
        ]
        yield from _together("registry", lines)


def _together(place: str, lines: list[Line]) -> Iterator[Line]:
    """Yield the figures of a place that are wrong, or one line for all of them."""
    right = HOLDS, f"{place}: {len(lines)} figures are those of {paths.EVALUATION}"
    yield from [line for line in lines if line[0] == FAILS] or [right]


def _same(what: str, said: Any, expected: Any) -> Line:
    if said == expected:
        return HOLDS, f"{what}: {said}"
    return FAILS, f"{what}: {said}, and should be {expected}"
