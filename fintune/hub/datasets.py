"""Hub data sets at a pinned revision."""

from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.hub.client import explain_error, is_offline, stated_license
from fintune.params import COMMIT


def read_dataset(
    name: str, revision: str | None, split: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Download one split of a hub data set, or read it from the local cache.

    Returns:
        The rows, and their origin: `revision`, the commit hash, and the `license` in the card.

    Raises:
        UserError: no revision is set, or the hub refuses, is unreachable or fails midway; interrupted
            downloads resume.
    """
    commit = _commit(name, revision)
    import datasets
    from huggingface_hub import snapshot_download

    try:
        # load_dataset(name, revision=...) would, on any hub error, silently use whatever
        # revision was built last; a snapshot is this commit or an error.
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=commit,
            local_files_only=is_offline(),
            ignore_patterns=["*.py"],
        )
    except Exception as error:
        raise UserError(explain_error(error, "datasets", name, commit)) from error
    try:
        dataset = datasets.load_dataset(folder, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error  # a generation error's own message is generic
        raise UserError(f"fetch: {name} at {commit}, split {split!r}: {cause}") from error
    rows: list[dict[str, Any]] = dataset.to_list()
    return rows, {"revision": commit, "license": stated_license(Path(folder))}


def _commit(name: str, revision: str | None) -> str:
    """Resolve `revision` to a commit hash, once; branches and tags can move."""
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
        raise UserError(explain_error(error, "datasets", name, revision)) from error
    if revision is None:
        raise UserError(
            f"fetch.revision: a hub data set can change; pin what {name} is today with\n"
            f"  revision: {commit}"
        )
    return str(commit)
