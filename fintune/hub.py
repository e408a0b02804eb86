"""The Hugging Face hub: data sets and base models at a pinned revision, its refusals in plain words.

`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` are the libraries' own and are honoured.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from fintune.params import COMMIT, Base, UserError

STRETCHES, STRETCH_BYTES = 256, 65_536  # of a weights file, for its fingerprint


def is_offline() -> bool:
    """Whether the user switched the hub off, so that only the local cache may answer."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def read_dataset(
    name: str, revision: str | None, split: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Download one split of a hub data set, or take it from the local cache.

    Returns:
        The rows, and where they come from: `revision`, the commit, and the `license` that its card names.

    Raises:
        UserError: no revision, or the hub refused, is unreachable or broke off; nothing is kept of
            a broken download but what the next try can build on.
    """
    commit = _commit(name, revision)
    import datasets
    from huggingface_hub import snapshot_download

    try:
        # load_dataset(name, revision=...) would, on any trouble with the hub, quietly take whatever
        # revision was built last; a snapshot is of this commit or an error.
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            local_files_only=is_offline(),
            ignore_patterns=["*.py"],
        )
    except Exception as error:
        raise UserError(_explain(error, "datasets", name, commit)) from error
    try:
        dataset = datasets.load_dataset(folder, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error  # a generation error itself says only that there was one
        raise UserError(f"fetch: {name} at {commit}, split {split!r}: {cause}") from error
    rows: list[dict[str, Any]] = dataset.to_list()
    return rows, {"revision": commit, "license": stated_license(Path(folder))}


def _commit(name: str, revision: str | None) -> str:
    """The commit that `revision` names now; a branch or tag is resolved once, here."""
    if is_offline():
        if revision and COMMIT.fullmatch(revision):
            return revision
        raise UserError(
            f"fetch.revision: {revision or 'null'} is no commit, and HF_HUB_OFFLINE is set, so the hub "
            "cannot say which one is meant; give the commit's 40 hex digits or go online"
        )
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    except Exception as error:
        raise UserError(_explain(error, "datasets", name, revision)) from error
    if revision is None:
        raise UserError(
            f"fetch.revision: a hub data set can change; pin what {name} is today with\n"
            f"  revision: {commit}"
        )
    return str(commit)


def check_model(model: str, revision: str) -> int:
    """Ask the hub for a base model's files before anything is spent on it.

    Returns:
        The size of its safetensors weights in bytes.

    Raises:
        UserError: gated, missing, unreachable, without safetensors weights, or not in the cache
            while offline.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        if is_offline():
            # only what transformers loads; a cache without a repository's other files is good enough
            folder = snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=["config.json", "tokenizer*", "model*.safetensors"],
            )
            sizes = [file.stat().st_size for file in Path(folder).glob("model*.safetensors")]
            if not sizes:
                raise UserError(
                    f"{model}: its weights at {revision} are not in the local cache, and "
                    "HF_HUB_OFFLINE is set; run once without it"
                )
            return sum(sizes)
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
        HfApi().auth_check(model)
    except UserError:
        raise
    except Exception as error:
        raise UserError(_explain(error, "models", model, revision)) from error
    sizes = [file.size or 0 for file in info.siblings or [] if is_weights(file.rfilename)]
    if not sizes:
        raise UserError(
            f"{model}: no safetensors weights at {revision}; other formats can run code and are not loaded"
        )
    return sum(sizes)


def local_folder(base: Base) -> Path:
    """Where a base's configuration and weights lie here; what the cache lacks is fetched first.

    Raises:
        UserError: as `check_model`.
    """
    if base.is_folder:
        return Path(base.model)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            base.model,
            revision=base.revision,
            local_files_only=is_offline(),
            allow_patterns=["*.json", "model*.safetensors", "README.md"],
        )
    except Exception as error:
        raise UserError(_explain(error, "models", base.model, base.revision)) from error
    return Path(folder)


def stated_license(folder: Path) -> str | None:
    """The licence that the card of a model or data set names, if there is a card that does."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    said = (metadata_load(card) or {}).get("license") if card.is_file() else None
    return str(said) if said else None


def weights_fingerprint(base: Base) -> str:
    """A hash that tells one base's weights from another's of the same shape, in milliseconds.

    Of each safetensors file it takes the size and 256 stretches of 64 KiB, spread evenly over it;
    another training changes all weights, so these differ, too.
    """
    digest = hashlib.sha256()
    files = sorted(file for file in local_folder(base).iterdir() if is_weights(file.name))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in sorted({size * part // STRETCHES for part in range(STRETCHES)}):
                file.seek(place)
                digest.update(file.read(STRETCH_BYTES))
    return digest.hexdigest()


def is_weights(filename: str) -> bool:
    """Whether transformers would load this file; some repositories hold a second copy of the weights."""
    return filename.startswith("model") and filename.endswith(".safetensors")


def explain_model_error(error: Exception, model: str, revision: str | None) -> str:
    """What went wrong while a base model was loaded from the hub, with the way out."""
    return _explain(error, "models", model, revision)


def _explain(error: BaseException, kind: str, name: str, revision: str | None) -> str:
    """A hub library's error as a sentence with the way out; never shows a token."""
    from huggingface_hub import errors, get_token
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{'datasets/' if kind == 'datasets' else ''}{name}"
    for each in _chain(error):
        status = getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(each, errors.GatedRepoError):
            return f"{name} is gated: {_access(page, bool(get_token()), status)}"
        if isinstance(each, errors.RevisionNotFoundError):
            return f"{name} has no revision {revision}; its commits are listed at {page}/commits"
        if isinstance(each, errors.RepositoryNotFoundError):
            return (
                f"{name}: not on the hub at {ENDPOINT}, or private: check the name, and for a private "
                "repository set HF_TOKEN to a token that may read it"
            )
        missing = isinstance(each, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled)
        if missing and is_offline():
            return f"{name} at {revision} is not in the local cache, and HF_HUB_OFFLINE is set"
        if status in (401, 403):
            return f"{name}: the hub answered {status}: {_access(page, bool(get_token()), status)}"
    first = str(error).strip().splitlines() or [""]
    return (
        f"{name}: {type(error).__name__} while reading from {ENDPOINT}: {first[0][:300]}\n"
        "  run it again to go on where it broke off; HF_ENDPOINT names another server, "
        "HF_HUB_OFFLINE=1 uses the local cache alone"
    )


def explain_push_error(error: BaseException, name: str) -> str:
    """Why a model could not be pushed, with the way out; never shows a token."""
    from huggingface_hub.constants import ENDPOINT

    owner = name.split("/")[0]
    tokens = f"{ENDPOINT}/settings/tokens"
    for each in _chain(error):
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
    reason = re.sub(r"\?\S+", "", said)[:300]  # an upload's address may hold a signature
    return (
        f"{name}: {type(error).__name__} while pushing to {ENDPOINT}: {reason}\n"
        "  no commit was made; run it again: files that arrived whole are not sent again"
    )


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, down to the first."""
    chain = [error]
    while (
        cause := chain[-1].__cause__ or chain[-1].__context__
    ) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _access(page: str, has_token: bool, status: int | None) -> str:
    if not has_token:
        return f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
    if status == 401:
        return f"HF_TOKEN is not valid (any more); make a new one, and accept the terms at {page}"
    return f"HF_TOKEN's account has no access yet; accept the terms at {page} and wait for approval"
