"""Render every row as prompt and completion, fit it to the token limit and count its tokens."""

import json
import os
import subprocess
import sys
from typing import Any

from fintune import paths
from fintune.data.formatting import format_rows
from fintune.data.parts import are_many, kept_parts
from fintune.data.prompt import describe_layout, load_tokenizer
from fintune.data.tables import SPLITS, list_dropped
from fintune.data.tokens import tokens_told
from fintune.errors import UserError
from fintune.hub.models import KNOWN, check_base, check_positions, read_config_file
from fintune.params import read_params
from fintune.stage import log, run, write_json


def main() -> None:
    leave_torch_out()
    params = read_params()
    check_base(params.base)  # fail fast: in train, a refusal by the hub would cost minutes
    config = read_config_file(params.base)
    check_positions(config, params.format.max_tokens)
    check_type(config)
    tokenizer = load_tokenizer(params.base, "new", params.format.template)
    log.info("%s", describe_layout(tokenizer))
    report, lost = {}, []
    inputs = [paths.rows(paths.SPLIT, split) for split in SPLITS]
    texts = [tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    with kept_parts(
        "format", are_many(inputs), inputs, [params.format.model_dump(), *texts]
    ) as kept:
        for split, source in zip(SPLITS, inputs, strict=True):
            target = paths.rows(paths.FORMATTED, split)
            report[split], dropped = format_rows(
                tokenizer, source, target, params.format, split, kept
            )
            lost += [(split, *each) for each in dropped]
            log.info("%s: %s", split, tokens_told(report[split]))
        list_dropped(paths.FORMATTED, ("split", "row", "reason", "text"), lost)
        write_json(paths.FORMAT_METRICS, report)


def check_type(config: dict[str, Any]) -> None:
    """Refuse a base that cannot be trained or exported, in another process, since that imports torch.

    Raises:
        UserError: `fintune check` refuses it.
    """
    if config.get("model_type") in KNOWN:
        return
    command = [sys.executable, "-m", "fintune", "check", "--only", "base", "--json"]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        said = json.loads(found.stdout)["findings"] if found.stdout else []
        problems = [each["said"] for each in said if each["status"] == "problem"]
        raise UserError("\n".join(problems) or found.stderr.strip())


def leave_torch_out() -> None:
    """Keep transformers from importing torch: that takes seconds, and tokenizers do not need it."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # torch is left out on purpose


if __name__ == "__main__":
    run(main)
