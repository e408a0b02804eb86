"""Checkpoints of a training: the folder they belong to, and the newest whole one."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("fintune")
CODE = ("data", "model", "training")  # packages that decide what is learned


def fingerprint(inputs: Sequence[Path], settings: dict[str, Any]) -> str:
    """Name a training run by what determines it: inputs, parameters, code and library versions."""
    import peft
    import transformers
    import trl

    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    package = Path(__file__).parents[1]
    code = sorted(path for name in CODE for path in (package / name).rglob("*.py"))
    for path in [*inputs, *code]:
        digest.update(path.read_bytes())
    for module in (torch, transformers, trl, peft):
        digest.update(f"{module.__name__} {module.__version__}".encode())
    return digest.hexdigest()[:16]


def last_checkpoint(scratch: Path) -> str | None:
    """The newest whole checkpoint; what a kill left half written is removed."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # the last file of a save
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            log.info("going on from %s", folder)
            return str(folder)
    return None
