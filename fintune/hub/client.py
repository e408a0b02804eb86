"""Plain-language errors for the Hugging Face hub; they never contain a token.

The hub's libraries read `HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME` and `HF_HUB_OFFLINE` themselves.
"""

import functools
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fintune.errors import UserError, chain

HASH = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")


def is_offline() -> bool:
    """Return whether the user disabled the hub, leaving only the local cache."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def stated_license(folder: Path) -> str | None:
    """Return the licence in the card of a model or data set, or None."""
    said = card_metadata(folder).get("license")
    return str(said) if said else None


def card_metadata(folder: Path) -> dict[str, Any]:
    """Return what the head of a model's or data set's card says; nothing where there is no card."""
    from huggingface_hub import metadata_load

    card = folder / "README.md"
    return (metadata_load(card) if card.is_file() else None) or {}


@functools.cache
def check_snapshot(folder: Path) -> None:
    """Check the files of a snapshot in the hub's cache against the hashes that the hub states.

    The cache names a file's blob by that hash: SHA-256 for large files, git's SHA-1 for others. Files that
    are no links into it, as where links are not supported, cannot be checked.

    Raises:
        UserError: a file's bytes are others, as after a flipped bit or a change by hand.
    """
    blobs = [(file, file.resolve()) for file in folder.rglob("*") if file.is_symlink()]
    named = [(file, blob) for file, blob in blobs if HASH.fullmatch(blob.name) and blob.is_file()]
    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        for (file, blob), found in zip(named, pool.map(_hash, [b for _, b in named]), strict=True):
            if found != blob.name:
                raise UserError(
                    f"{file.name}: {blob} does not hold what the hub states: its hash is {found[:16]}…, not "
                    f"{blob.name[:16]}…; delete that file, and run this again to download it anew"
                )


def _hash(blob: Path) -> str:
    large = len(blob.name) == 64
    digest = hashlib.sha256() if large else hashlib.sha1(usedforsecurity=False)
    if not large:
        digest.update(f"blob {blob.stat().st_size}\0".encode())
    with blob.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def explain_model_error(error: Exception, model: str, revision: str | None) -> str:
    """Explain an error from loading a base model from the hub, with its fix."""
    return explain_error(error, "models", model, revision)


def explain_error(error: BaseException, kind: str, name: str, revision: str | None) -> str:
    """Explain a hub library's error, with its fix; never show a token."""
    from huggingface_hub import errors, get_token
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{'datasets/' if kind == 'datasets' else ''}{name}"
    for each in chain(error):
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
            return f"{name}: the hub responded {status}: {_access(page, bool(get_token()), status)}"
    first = str(error).strip().splitlines() or [""]
    return (
        f"{name}: {type(error).__name__} while reading from {ENDPOINT}: {first[0][:300]}\n"
        "  run it again to go on where it broke off; HF_ENDPOINT names another server, "
        "HF_HUB_OFFLINE=1 uses the local cache alone"
    )


def _access(page: str, has_token: bool, status: int | None) -> str:
    if not has_token:
        return f"accept its terms at {page}, then set HF_TOKEN to a token of that account"
    if status == 401:
        return f"HF_TOKEN is not valid (any more); make a new one, and accept the terms at {page}"
    return f"HF_TOKEN's account has no access yet; accept the terms at {page} and wait for approval"
