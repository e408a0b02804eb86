"""Hub data sets at a pinned revision."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from fintune.errors import UserError, brief
from fintune.hub.client import (
    card_metadata,
    check_snapshot,
    explain_error,
    is_offline,
    stated_license,
)
from fintune.params import COMMIT


def read_dataset(
    name: str,
    revision: str | None,
    config: str | None,
    split: str,
    check_sizes: Callable[[Iterable[Path], int], None],
) -> tuple[Any, dict[str, Any]]:
    """Download one split of a hub data set, or read it from the local cache.

    Args:
        config: which of its configurations; None if it has only one.
        check_sizes: raises an error for files, or a number of bytes, that are too large.

    Returns:
        The rows, as a `datasets.Dataset`, and their origin: `revision`, the commit hash, and the `license` in
        the card.

    Raises:
        UserError: no revision is set, or the hub refuses, is unreachable or fails midway; interrupted
            downloads resume. The data set is too large.
    """
    commit = _commit(name, revision, check_sizes)
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
    check_snapshot(Path(folder))
    try:
        _check_own_files(_texts(card_metadata(Path(folder)).get("configs")), name)
        dataset = _load(folder, config, split, check_sizes)
    except UserError:
        raise
    except Exception as error:  # what its parsers of cards and files raise is not listed anywhere
        cause = error.__cause__ or error  # a generation error's own message is generic
        hint = "; name one in fetch.config" if "Config name is missing" in str(cause) else ""
        raise UserError(
            f"fetch: {name} at {commit}, split {split!r}: {brief(cause, 600)}{hint}"
        ) from error
    return dataset, {"revision": commit, "license": stated_license(Path(folder))}


def _commit(
    name: str, revision: str | None, check_sizes: Callable[[Iterable[Path], int], None]
) -> str:
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
        info = HfApi().dataset_info(name, revision=revision, timeout=30, files_metadata=True)
    except Exception as error:
        raise UserError(explain_error(error, "datasets", name, revision)) from error
    if revision is None:
        raise UserError(
            f"fetch.revision: a hub data set can change; pin what {name} is today with\n"
            f"  revision: {info.sha}"
        )
    check_sizes((), sum(file.size or 0 for file in info.siblings or ()))
    return str(info.sha)


def _texts(said: Any) -> Iterator[str]:
    """Yield all texts in a part of a card."""
    if isinstance(said, dict):
        said = [*said.values()]
    if isinstance(said, list):
        for each in said:
            yield from _texts(each)
    elif isinstance(said, str):
        yield said


def _check_own_files(texts: Iterable[str], name: str) -> None:
    """Check that a data set's card names its own files alone; others would be read from anywhere.

    Raises:
        UserError: it names an address, or a path that leads out of its folder.
    """
    for text in texts:
        path = PurePosixPath(text)
        if "::" in text or "://" in text or path.is_absolute() or {"..", "~"} & {*path.parts}:
            raise UserError(
                f"fetch: the card of {name} names {brief(text)} as its data, which is no file of its own; "
                "nothing is read"
            )


def _load(
    folder: str, config: str | None, split: str, check_sizes: Callable[[Iterable[Path], int], None]
) -> Any:
    """Load a data set's folder; in CSV files, only an empty cell is a missing value, not N/A or None."""
    import datasets

    builder = datasets.load_dataset_builder(folder, config)
    repository = os.path.realpath(Path(folder).parents[1])  # a snapshot's files are links into it
    files = [*itertools.chain(*(builder.config.data_files or {}).values())]
    for file in files:
        if not Path(os.path.realpath(file)).is_relative_to(repository):
            raise UserError(f"fetch: {file} leads out of the data set's folder; it is not read")
    check_sizes(map(Path, files), 0)
    if hasattr(builder.config, "keep_default_na"):
        try:
            texts = {"keep_default_na": False, "na_values": [""]}
            return datasets.load_dataset(folder, config, split=split, **texts)
        except datasets.exceptions.DatasetGenerationError:
            pass  # N/A in a column of numbers, perhaps one that nobody asked for
    return datasets.load_dataset(folder, config, split=split)
