"""Check parameters, base model, device and disk space before running the pipeline.

    python -m fintune check

Nothing is changed. Of a base on the hub only its configuration is downloaded, and its tokenizer if GGUF
files or its chat template are wanted. How the base will be computed is held against its family's own
forward on a tiny model.
"""

import argparse
import json
from pathlib import Path

from fintune.data.prompt import load_tokenizer
from fintune.export.gguf.convert import check_convertible
from fintune.export.gguf.llama_cpp import require_packages
from fintune.hub.models import check_base, check_positions, read_config_file
from fintune.lineage import lacks_repository, project_root
from fintune.params import read_params
from fintune.paths import DVC_CONFIG
from fintune.stage import log


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: everything is in params.yaml."""


def main(given: argparse.Namespace) -> None:
    """Run the checks and print a summary."""
    params = read_params()
    size = check_base(params.base)
    config = read_config_file(params.base)
    check_positions(config, params.format.max_tokens)
    template = params.format.template
    if params.merge_export.gguf or template == "base":
        tokenizer = load_tokenizer(params.base, params.train.end_token, template)
    if params.merge_export.gguf:
        require_packages()
        check_convertible(config, tokenizer)
    from fintune.hardware import (  # imports torch, which takes seconds
        GIB,
        check_disk,
        describe_device,
    )
    from fintune.model.base import read_config
    from fintune.model.conformance import agreement_of
    from fintune.training.prepare import plan_before

    # the base in the hub's cache, if any; the merged model in the workspace and DVC's cache
    check_disk(2 * size + (0 if params.base.is_folder else size), Path.cwd())
    if lacking := lacks_repository(project_root()):
        log.warning(
            "warning: %s is not a git repository, without which `dvc repro` refuses to run: clone the "
            "project, or run `git init && git add -A && git commit -m start`; without git, write "
            "`no_scm = true` under [core] in %s",
            *(project_root(), DVC_CONFIG[0]),
        )
    summary = {
        **({"repository": "none; dvc repro refuses to run"} if lacking else {}),
        "parameters": "valid",
        "base": f"{params.base.model}, {size / GIB:.2f} GiB",
        "computed by": str(agreement_of(read_config(params.base))),
        "device": describe_device(),
        "training, at most": str(plan_before(params.base, params.train, params.format.max_tokens)),
    }
    print(json.dumps(summary, indent=2))
