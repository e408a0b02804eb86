"""Fingerprint a training run and find its last complete checkpoint."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger("fintune")
CODE = ("data", "model", "training")  # packages that affect the training result


def fingerprint(inputs: Sequence[Path], settings: dict[str, Any]) -> str:
    """Hash everything that determines a training run: inputs, parameters, code and library versions."""
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
    """Return the newest complete checkpoint; remove newer ones that were only partly written."""
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        try:
            json.loads((folder / "trainer_state.json").read_text())  # written last
        except (OSError, ValueError):
            shutil.rmtree(folder)
        else:
            log.info("going on from %s", folder)
            return str(folder)
    return None
