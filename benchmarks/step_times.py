"""Time a Trainer's steps; training_speed.py's clock for trainers other than this project's.

Imports no library but torch and transformers: unsloth_steps.py needs it after Unsloth has patched them.
"""

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Times(TrainerCallback):
    """Callback that records the start of training and the end of each logged step, after a device sync."""

    def __init__(self) -> None:
        self.ends: dict[int, float] = {}

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        synchronize()
        self.ends[0] = time.perf_counter()

    def on_log(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        synchronize()
        self.ends.setdefault(state.global_step, time.perf_counter())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
