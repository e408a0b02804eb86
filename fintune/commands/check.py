"""Check parameters, base model, device and disk space before running the pipeline.

    python -m fintune check

Nothing is changed or downloaded.
"""

import argparse
import json
from pathlib import Path

from fintune.hub.models import check_base
from fintune.params import read_params


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: everything is in params.yaml."""


def main(given: argparse.Namespace) -> None:
    """Run the checks and print a summary."""
    params = read_params()
    size = check_base(params.base)
    from fintune.hardware import (  # imports torch, which takes seconds
        GIB,
        check_disk,
        describe_device,
    )

    # the base in the hub's cache, if any; the merged model in the workspace and DVC's cache
    check_disk(2 * size + (0 if params.base.is_folder else size), Path.cwd())
    summary = {
        "parameters": "valid",
        "base": f"{params.base.model}, {size / GIB:.2f} GiB",
        "device": describe_device(),
    }
    print(json.dumps(summary, indent=2))
