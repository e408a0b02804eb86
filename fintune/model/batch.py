"""Batches of token rows, packed end to end or padded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from fintune.model.attention import PackedSequences

TokenRow = tuple[list[int], list[int]]  # prompt ids, completion ids
CHUNK = 1024  # answer tokens whose logits are in memory at once
STORED = pa.schema(dict.fromkeys(("prompt", "completion"), pa.list_(pa.int32())))


class TokenRows(Sequence[TokenRow]):
    """Token rows in a memory-mapped Arrow stream with the columns `STORED`; those in use are in memory."""

    def __init__(self, path: Path) -> None:
        table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        self._columns = table["prompt"], table["completion"]
        sizes = (pc.list_value_length(column) for column in self._columns)
        self.lengths: list[int] = pc.add(*sizes).to_pylist()

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, place: Any) -> Any:
        """Return a row, or a list of those in a slice."""
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        prompt, completion = (column[place].as_py() for column in self._columns)
        return prompt, completion


def batches_by_length(lengths: Sequence[int], tokens: int, rows: int) -> Iterator[list[int]]:
    """Yield indices in batches of at most `rows` rows and `tokens` padded tokens, longest rows first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[batch[0]] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward pass, on the device.

    Packed: `ids` and `positions` are (1, tokens), without a mask. Padded: (rows, longest row), with a mask.
    `predicting` are the indices, in the flattened ids, of the tokens that predict an answer token; `targets`
    are those answer tokens.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor | None
    packed: PackedSequences | None
    predicting: torch.Tensor
    targets: torch.Tensor


def pack(rows: Sequence[TokenRow], device: torch.device) -> MicroBatch:
    """Pack rows end to end, without a device sync."""
    lengths = lengths_of(rows)
    starts = [0, *accumulate(lengths)]
    ids = torch.tensor([token for prompt, completion in rows for token in prompt + completion])
    predicting = _predicting(rows, starts[:-1])
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    return MicroBatch(
        ids=_send(ids.view(1, -1), device),
        positions=_send(torch.cat([torch.arange(n) for n in lengths]).view(1, -1), device),
        mask=None,
        packed=PackedSequences(_send(cu_seqlens, device), max(lengths)),
        predicting=_send(predicting, device),
        targets=_send(ids[predicting + 1], device),
    )


def pad(rows: Sequence[TokenRow], device: torch.device) -> MicroBatch:
    """Pad rows at their ends to the longest one, without a device sync."""
    lengths = lengths_of(rows)
    width = max(lengths)
    padded = [p + c + [0] * (width - n) for (p, c), n in zip(rows, lengths, strict=True)]
    ids = torch.tensor(padded)
    predicting = _predicting(rows, [i * width for i in range(len(rows))])
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return MicroBatch(
        ids=_send(ids, device),
        positions=_send(torch.arange(width).repeat(len(rows), 1), device),
        mask=_send(mask, device),
        packed=None,
        predicting=_send(predicting, device),
        targets=_send(ids.flatten()[predicting + 1], device),
    )


def lengths_of(rows: Sequence[TokenRow]) -> list[int]:
    """Return each row's tokens."""
    if isinstance(rows, TokenRows):
        return rows.lengths
    return [len(prompt) + len(completion) for prompt, completion in rows]


def _predicting(rows: Sequence[TokenRow], starts: Sequence[int]) -> torch.Tensor:
    """Return the indices of the tokens that predict an answer token, given the start of each row."""
    places = [
        torch.arange(start + len(prompt) - 1, start + len(prompt) + len(completion) - 1)
        for (prompt, completion), start in zip(rows, starts, strict=True)
    ]
    return torch.cat(places)


def _send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type != "cuda":
        return values
    return values.pin_memory().to(device, non_blocking=True)
