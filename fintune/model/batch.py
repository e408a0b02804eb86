"""Batches of token rows: packed end to end, or padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

CHUNK = 1024  # answer tokens whose logits are held at once

TokenRow = tuple[list[int], list[int]]  # prompt ids, completion ids


def batches_by_length(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most `rows` rows and `tokens` padded tokens, longest rows first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[batch[0]] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class Pass:
    """Rows that go through the model at once, on the device.

    Packed: ids and positions are (1, tokens), `bounds` say where each row starts, then the end, and
    there is no mask. Padded: (rows, longest) with a mask. `predicting` are the places, in the flattened
    ids, of the tokens whose next one is an answer's, and `targets` those next ones.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    bounds: torch.Tensor | None
    longest: int
    predicting: torch.Tensor
    targets: torch.Tensor


def lay_out(rows: Sequence[TokenRow], padded: bool, device: torch.device) -> Pass:
    """Put rows end to end, or side by side with padding; nothing waits for the device."""
    lengths = [len(prompt) + len(completion) for prompt, completion in rows]
    width = max(lengths)
    starts = [i * width for i in range(len(rows))] if padded else [0, *accumulate(lengths)][:-1]
    flat: list[int] = []
    for prompt, completion in rows:
        flat += prompt
        flat += completion
        flat += [0] * (width - len(prompt) - len(completion)) if padded else []
    ids = torch.tensor(flat)
    sizes = [width] * len(rows) if padded else lengths
    positions = torch.cat([torch.arange(size) for size in sizes])
    places = torch.cat(
        [
            torch.arange(start + len(prompt) - 1, start + length - 1)
            for (prompt, _), start, length in zip(rows, starts, lengths, strict=True)
        ]
    )
    shape = (len(rows), width) if padded else (1, -1)
    mask, bounds = None, None
    if padded:
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    else:
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    def send(values: torch.Tensor) -> torch.Tensor:
        return (
            values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
        )

    return Pass(
        ids=send(ids.view(shape)),
        positions=send(positions.view(shape)),
        mask=None if mask is None else send(mask),
        bounds=None if bounds is None else send(bounds),
        longest=width,
        predicting=send(places),
        targets=send(ids[places + 1]),
    )
