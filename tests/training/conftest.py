"""Rows that the trainings of these tests learn."""

from typing import Any

import pytest
import torch

from fintune.data.prompt import encode
from fintune.hardware import matmul_flops
from support.training import TEXTS


@pytest.fixture(scope="module")
def rows(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Encode the texts."""
    matmul_flops(torch.float32)  # takes random numbers, once a process
    return [encode(tokenizer, *text) for text in TEXTS]
