"""Push a merged model or an adapter to the hub, in one commit; private unless told otherwise.

python -m fintune.push OWNER/NAME                     # models/merged
python -m fintune.push OWNER/NAME models/adapter
python -m fintune.push --public OWNER/NAME

HF_TOKEN is a token of type write; HF_ENDPOINT names another hub. The same command again sends what has
changed, or goes on after an interruption.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from fintune.hub import explain_push_error, is_offline
from fintune.params import MergeExport, UserError, read_params
from fintune.stage import log, run

MERGED = Path("models/merged")
ADAPTER = Path("models/adapter")
RUN = Path("models/run.json")
EXPORT = Path("reports/export.json")
EVALUATION = Path("reports/evaluation.json")
MANIFEST = Path("data/raw/manifest.json")
PUSHED = {".safetensors", ".gguf", ".json", ".jinja", ".txt", ".md", ".model"}
CHECKSUMS = "SHA256SUMS"
RUNS_CODE = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py"}
WEIGHTS = (".safetensors", ".gguf", ".safetensors.index.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository, made if it is missing")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=MERGED)
    parser.add_argument("--public", action="store_true", help="for everybody to see")
    arguments = parser.parse_args()
    settings = None
    if arguments.folder.resolve() == ADAPTER.resolve() and EVALUATION.is_file():
        settings = read_params().merge_export  # for its card
    try:
        print(push(arguments.name, arguments.folder, arguments.public, settings))
    except KeyboardInterrupt:
        raise UserError(
            "interrupted; the same command goes on, whole files are not sent again"
        ) from None


def push(name: str, folder: Path, public: bool, settings: MergeExport | None = None) -> str:
    """Make the repository unless it is there, and commit the folder's files to it.

    An adapter that was evaluated gets its card on the way: training wrote the folder before.

    Weights of the repository that the folder does not have are deleted: beside new shards, an older
    model.safetensors would be what transformers loads.

    Returns:
        Where it is and which commit.

    Raises:
        UserError: no token or one that may not write, a repository that is public without `public` or
            private with it, a folder without weights or with files that can run code, no hub.
    """
    _check_name(name)
    files: dict[str, str | bytes] = {p: str(f) for p, f in files_to_push(folder).items()}
    if is_offline():
        raise UserError("HF_HUB_OFFLINE is set; push without it")
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.constants import ENDPOINT

    if not get_token():
        raise UserError(
            f"set HF_TOKEN to a token of type write; {ENDPOINT}/settings/tokens makes one"
        )
    warn_of_local_base(folder)
    if settings and (card := adapter_card(folder, settings)):
        files["README.md"] = card
    api = HfApi()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        info = api.model_info(name, timeout=30)
        _check_visibility(f"{ENDPOINT}/{name}", bool(info.private), public)
        there = {each.rfilename for each in info.siblings or []}
        stale = sorted(each for each in there - set(files) if each.endswith(WEIGHTS))
        commit = api.create_commit(
            name,
            operations=[
                *(CommitOperationAdd(path, file) for path, file in files.items()),
                *(CommitOperationDelete(path) for path in stale),
            ],
            commit_message=commit_message(folder),
        )
    except UserError:
        raise
    except ValueError as error:  # the hub read README.md's header and refuses it
        raise UserError(f"{name}: {error}; mend it and push again") from error
    except Exception as error:  # the hub's client raises its transport's own kinds
        raise UserError(explain_push_error(error, name)) from error
    for path in stale:
        log.info("%s: deleted there, the folder does not have it", path)
    seen_by = "public" if public else "private"
    return f"{ENDPOINT}/{name} ({seen_by})\ncommit {commit.oid}"


def files_to_push(folder: Path) -> dict[str, Path]:
    """The files by their names in the repository; hidden and unfinished ones stay here.

    Raises:
        UserError: no folder, no weights, or a file that runs code where it is loaded.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; `dvc repro` makes models/merged and models/adapter")
    files = {}
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        hidden = any(part.startswith(".") or ".partial" in part for part in path.parts)
        if not file.is_file() or hidden:
            continue
        if file.suffix in RUNS_CODE:
            raise UserError(
                f"{file}: can run code where it is loaded and is not pushed; take it away"
            )
        if file.suffix in PUSHED or file.name == CHECKSUMS:
            files[path.as_posix()] = file
        else:
            log.info("%s: not pushed; it is no part of a model", file)
    if not any(path.endswith(".safetensors") for path in files):
        raise UserError(
            f"{folder}: no safetensors weights there; `dvc pull` or `dvc repro` brings them"
        )
    return files


def adapter_card(adapter: Path, settings: MergeExport) -> bytes | None:
    """The model card, if the reports that lie here are about this adapter."""
    if not all(file.is_file() for file in (RUN, EVALUATION, MANIFEST)):
        return None
    from fintune.card import read_records, write_card  # these import torch
    from fintune.modeling import read_training

    records = read_records(RUN, EVALUATION, MANIFEST)
    if records["evaluation"]["evaluated"]["adapter_run"] != records["run"]["run_id"]:
        log.warning("warning: %s is of another adapter; pushed without a card", EVALUATION)
        return None
    with tempfile.TemporaryDirectory() as scratch:
        write_card(Path(scratch), read_training(adapter), records, None, settings)
        return (Path(scratch) / "README.md").read_bytes()


def warn_of_local_base(folder: Path) -> None:
    """Say so if others could not load this adapter, because its base is a folder here."""
    config = _read(folder / "adapter_config.json")
    base = config.get("base_model_name_or_path")
    trained_on = _read(folder / "training.json").get("base", {})
    pinned = config.get("revision") or trained_on.get("revision")
    if config and (not base or Path(base).exists() or not pinned):
        log.warning(
            "warning: the adapter's base is %s on this disk, no model of the hub: others cannot load the "
            "adapter alone; push models/merged for them",
            base,
        )


def commit_message(folder: Path) -> str:
    """Names the registered version and its run, if the folder is this project's."""
    version = _read(EXPORT)
    ours = folder.resolve() in (MERGED.resolve(), ADAPTER.resolve())
    if not ours or not {"registered_model", "version"} <= set(version):
        return f"Push {folder.name}"
    run_id = f", MLflow run {version['run_id']}" if "run_id" in version else ""
    return f"{version['registered_model']} version {version['version']}{run_id}"


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"{name}: not the name of a repository: {error}") from error
    if "/" not in name:
        raise UserError(f"{name}: not the name of a repository; give OWNER/NAME")


def _check_visibility(page: str, is_private: bool, public: bool) -> None:
    if not is_private and not public:
        raise UserError(
            f"{page} is public; push with --public, or to another name, which will be private"
        )
    if is_private and public:
        raise UserError(
            f"{page} is private; make it public in {page}/settings, with all that was pushed there, "
            "or push without --public"
        )


def _read(path: Path) -> dict[str, Any]:
    """A JSON file, or nothing where it is missing."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


if __name__ == "__main__":
    run(main)
