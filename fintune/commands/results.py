"""Show the last run: quality, cost, output paths and the registered version.

python -m fintune results
"""

import argparse

from fintune import paths
from fintune.integrity import check_outputs
from fintune.lineage import project_root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: the last run is in this folder."""


def main(given: argparse.Namespace) -> None:
    """Print a summary of the last `dvc repro`."""
    check_outputs((paths.EVALUATION, paths.EXPORT, paths.TRAIN_METRICS), strict=False)
    from fintune.export.summary import summarise
    from fintune.tracking.client import existing_store

    print(summarise(existing_store(project_root())))
