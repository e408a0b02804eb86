"""Fingerprint a training run and find its last complete checkpoint."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from fintune.stage import write_text

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


def last_checkpoint(scratch: Path) -> Path | None:
    """Return the newest complete checkpoint; remove newer ones that were only partly written.

    Its state names the best checkpoint by an absolute path, which is mended where the project was moved.
    """
    found = sorted(scratch.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    for folder in reversed(found):
        file = folder / TRAINER_STATE_NAME  # written last
        try:
            state = json.loads(file.read_text())
        except (OSError, ValueError):
            shutil.rmtree(folder)
            continue
        if (best := state["best_model_checkpoint"]) and Path(best).parent != scratch:
            state["best_model_checkpoint"] = str(scratch / Path(best).name)
            write_text(file, json.dumps(state, indent=2, sort_keys=True) + "\n")
        log.info("going on from %s", folder)
        return folder
    return None


def resume(trainer: Trainer, checkpoint: Path) -> bool:
    """Restore the callbacks' state from a checkpoint, and all else if the training had ended with it.

    Returns:
        Whether it had ended; the Trainer would do one more step.
    """
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    saved: dict[str, Any] = state.stateful_callbacks or {}
    for callback in trainer.callback_handler.callbacks:
        vars(callback).update(saved.get(type(callback).__name__, {}).get("attributes", {}))
    if not saved["TrainerControl"]["args"]["should_training_stop"]:
        return False
    trainer.state = state
    if trainer.args.load_best_model_at_end:
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(str(checkpoint))
    return True
