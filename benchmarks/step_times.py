"""When a Trainer's steps ended; training_speed.py's clock for other trainers than this project's.

Imports no library but torch and transformers: unsloth_steps.py needs it after Unsloth has patched them.
"""

import time
from typing import Any

import torch
from transformers import TrainerCallback


class Times(TrainerCallback):
    """When the training began and when each logged step ended, the device included."""

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
