"""Push a merged model or an adapter to the hub, in one commit."""

import json
import logging
import re
import tempfile
from pathlib import Path
from typing import Any

from fintune import paths
from fintune.errors import UserError, chain
from fintune.export.signature import check_folder
from fintune.hub.client import is_offline
from fintune.integrity import LOADED, RUNS_CODE, SIGNATURE, SUMS, check_outputs
from fintune.params import MergeExport

log = logging.getLogger("fintune")
NAMES = (SUMS, SIGNATURE, "Modelfile")  # pushed, beside files with the suffixes of a model's
WEIGHTS = (".safetensors", ".gguf", ".safetensors.index.json")


def push(name: str, folder: Path, public: bool, settings: MergeExport | None = None) -> str:
    """Create the repository if necessary and commit the folder's files to it.

    An evaluated adapter gets its card here, because training wrote its folder before the evaluation. Weights
    that only the repository has are deleted: transformers would load an old model.safetensors in
    preference to new shards.

    Returns:
        The repository's address and the commit.

    Raises:
        UserError: no token or one without write access, a repository that is public without `public` or
            private with it, a folder without weights, with files that can run code or that are not what
            its SHA256SUMS, its signature or dvc.lock says, no hub.
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
    check_folder(folder)
    if folder.resolve() == paths.ADAPTER.resolve():  # the merged model has a SHA256SUMS
        check_outputs([paths.ADAPTER, paths.EVALUATION, paths.MANIFEST], strict=True)
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
    except ValueError as error:  # the hub rejects README.md's metadata
        raise UserError(f"{name}: {error}; mend it and push again") from error
    except Exception as error:  # the client also raises its HTTP library's errors
        raise UserError(explain_push_error(error, name)) from error
    for path in stale:
        log.info("%s: deleted there, the folder does not have it", path)
    seen_by = "public" if public else "private"
    return f"{ENDPOINT}/{name} ({seen_by})\ncommit {commit.oid}"


def files_to_push(folder: Path) -> dict[str, Path]:
    """Collect the files to push, by their names in the repository, without hidden and unfinished ones.

    Raises:
        UserError: no folder, no weights, or a file that can run code when loaded.
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
        if file.suffix in LOADED or file.name in NAMES:
            files[path.as_posix()] = file
        else:
            log.info("%s: not pushed; it is no part of a model", file)
    if not any(path.endswith(".safetensors") for path in files):
        raise UserError(
            f"{folder}: no safetensors weights there; `dvc pull` or `dvc repro` brings them"
        )
    return files


def adapter_card(adapter: Path, settings: MergeExport) -> bytes | None:
    """Return the model card, or None if the reports are missing or of another adapter."""
    if not all(file.is_file() for file in (paths.RUN, paths.EVALUATION, paths.MANIFEST)):
        return None
    from fintune.export.card import read_records, write_card  # these import torch
    from fintune.model.adapter import read_training

    records = read_records()
    if records["evaluation"]["evaluated"]["adapter_run"] != records["run"]["run_id"]:
        log.warning("warning: %s is of another adapter; pushed without a card", paths.EVALUATION)
        return None
    with tempfile.TemporaryDirectory() as scratch:
        write_card(Path(scratch), read_training(adapter), records, None, settings)
        return (Path(scratch) / "README.md").read_bytes()


def warn_of_local_base(folder: Path) -> None:
    """Warn if others could not load this adapter because its base is a local folder."""
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
    """Name the registered version and its run if the folder is this project's."""
    version = _read(paths.EXPORT)
    ours = folder.resolve() in (paths.MERGED.resolve(), paths.ADAPTER.resolve())
    if not ours or not {"registered_model", "version"} <= set(version):
        return f"Push {folder.name}"
    run_id = f", MLflow run {version['run_id']}" if "run_id" in version else ""
    number = f" version {version['version']}" if version["version"] else ", not registered"
    return f"{version['registered_model']}{number}{run_id}"


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
    """Read a JSON file; empty if it is missing."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def explain_push_error(error: BaseException, name: str) -> str:
    """Explain why a push failed and what to do; never shows a token."""
    from huggingface_hub.constants import ENDPOINT

    owner = name.split("/")[0]
    tokens = f"{ENDPOINT}/settings/tokens"
    for each in chain(error):
        response = getattr(each, "response", None)
        status = getattr(response, "status_code", None)
        if status == 401:
            return f"{name}: HF_TOKEN is not valid (any more); make a new one, of type write, at {tokens}"
        if status == 403:
            return (
                f"{name}: the hub does not let HF_TOKEN write there: take a token of type write from "
                f"{tokens}, or push to a name of your own if {owner} is somebody else"
            )
    said = ": ".join(" ".join(str(each).split()) for each in (error, error.__cause__) if each)
    reason = re.sub(r"\?\S+", "", said)[:300]  # an upload's URL may contain a signature
    return (
        f"{name}: {type(error).__name__} while pushing to {ENDPOINT}: {reason}\n"
        "  no commit was made; run it again: files that arrived whole are not sent again"
    )
