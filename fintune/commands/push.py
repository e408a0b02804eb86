"""Push a merged model or an adapter to the hub in one commit; private by default.

    python -m fintune push OWNER/NAME                     # models/merged
    python -m fintune push OWNER/NAME models/adapter
    python -m fintune push --public OWNER/NAME

HF_TOKEN needs write access; HF_ENDPOINT names another hub. Run the same command again to push changes
or to resume after an interruption.
"""

import argparse
from pathlib import Path

from fintune import paths
from fintune.errors import UserError
from fintune.params import read_params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for the repository, the folder and the visibility."""
    parser.add_argument("name", metavar="OWNER/NAME", help="the repository, made if it is missing")
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=paths.MERGED)
    parser.add_argument("--public", action="store_true", help="for everybody to see")


def main(given: argparse.Namespace) -> None:
    """Push, and print the address and the commit."""
    from fintune.export.push import push

    settings = None
    if given.folder.resolve() == paths.ADAPTER.resolve() and paths.EVALUATION.is_file():
        settings = read_params().merge_export  # for the adapter's card
    try:
        print(push(given.name, given.folder, given.public, settings))
    except KeyboardInterrupt:
        raise UserError(
            "interrupted; the same command goes on, whole files are not sent again"
        ) from None
