"""Show the last run: quality, cost, output paths and the registered version, and how that is used.

python -m fintune results
python -m fintune results financial-qa@champion      # of another version, its use
"""

import argparse

from fintune import paths
from fintune.errors import UserError
from fintune.integrity import check_outputs
from fintune.lineage import project_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the version."""
    parser.add_argument(
        "version",
        nargs="?",
        help="NAME@ALIAS or NAME/VERSION whose use is shown; default: that of the last run",
    )


def main(given: argparse.Namespace) -> None:
    """Print a summary of the last `dvc repro`, and what traces say of the version."""
    check_outputs((paths.EVALUATION, paths.EXPORT, paths.TRAIN_METRICS), strict=False)
    from fintune.export.summary import summarise
    from fintune.registry.versions import find_version
    from fintune.tracking.client import existing_store
    from fintune.usage.drift import use_of
    from fintune.usage.exchanges import send_waiting
    from fintune.usage.identity import FOLDERS, identify

    root = project_root()
    client = existing_store(root)
    if paths.EVALUATION.is_file() or given.version is None:
        print(summarise(client))
    if client is None:
        if given.version is not None:
            raise UserError(f"{given.version}: no MLflow store here; MLFLOW_TRACKING_URI names one")
        return
    name = given.version or identify(client, str(paths.MERGED))[0]
    if name not in FOLDERS:
        send_waiting(client, root)
        if used := use_of(client, find_version(client, name)):
            print(f"\n{used}")
        elif given.version:
            print(f"\nUse of {name}: no traces since it was registered")
