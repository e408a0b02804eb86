"""TRL's trainer with a cheaper step: answer-only loss over micro-batches."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from trl import SFTTrainer

from fintune.errors import UserError
from fintune.model.attention import ATTENTION, using_attention
from fintune.model.batch import MicroBatch, TokenRow, batches_by_length, lengths_of, pack, pad
from fintune.model.fused.graphs import Graphs
from fintune.model.fused.model import FusedModel
from fintune.model.plain import PlainModel
from fintune.processes import add_up, count, of_first, rank
from fintune.training.callbacks import StepTimer
from fintune.training.divergence import FiniteSteps, check_validation
from fintune.training.plan import Plan

log = logging.getLogger("fintune")


# The share of the steps whose forward pass is in FP8. In the others the adapter gets used to the weights that
# it is measured and merged with; without them, 0.005 nats are lost.
COARSE = 0.75


def split_into_micro_batches(lengths: Sequence[int], limit: int, padded: bool) -> list[list[int]]:
    """Split a step's rows into micro-batches of similar size, at most `limit` tokens, padding included.

    A longer row is a micro-batch of its own; no row is truncated.

    Returns:
        Row indices of each micro-batch.
    """
    if padded:
        return list(batches_by_length(lengths, limit, rows=len(lengths)))
    parts = max(1, math.ceil(sum(lengths) / limit))
    while True:
        batches = split_evenly(lengths, parts)
        sizes = [sum(lengths[i] for i in rows) for rows in batches]
        if parts >= len(lengths) or max(sizes) <= max(limit, max(lengths)):
            return [rows for rows in batches if rows]
        parts += 1


def split_evenly(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Split rows into so many parts of similar size in tokens; some are empty if there are few rows.

    Returns:
        Row indices of each part.
    """
    batches: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        least = sizes.index(min(sizes))
        batches[least].append(i)
        sizes[least] += lengths[i]
    return [sorted(rows) for rows in batches]


class AnswerTrainer(SFTTrainer):
    """SFTTrainer with a cheaper step, token-weighted validation and small checkpoints."""

    def __init__(
        self,
        *,
        validate: Callable[[PeftModel, int], dict[str, float]],
        plan: Plan,
        dtype: torch.dtype,
        timer: StepTimer,
        rows: Sequence[TokenRow],
        **kwargs: Any,
    ) -> None:
        numbers = Dataset.from_dict({"row": range(len(rows))})
        super().__init__(
            **kwargs,
            train_dataset=numbers,
            eval_dataset=numbers.take(1),  # never read, but required by the Trainer for validation
            data_collator=lambda chosen: {"step": Step([rows[each["row"]] for each in chosen])},
        )
        self._validate = validate
        self.timer = timer
        self.plan = plan
        self.limit = plan.tokens_per_pass
        self.step_tokens: list[int] = []
        self.largest_micro_batch = 0
        self._finite = FiniteSteps(scaled=self.args.fp16)
        self._loss = torch.zeros(())
        self.model.train()  # not in every step, because it takes milliseconds
        self.fused = None
        if plan.kernels == "fused":
            cache = plan.dequantize == "once"
            self.fused = FusedModel(self.model, dtype, plan.checkpointing, cache, fp8=plan.fp8)
        self.longest = max(lengths_of(rows))
        self.graphs = self._graphs()
        if self.graphs:
            self.model.zero_grad = self._zero_grad

    def training_step(self, model: Any, inputs: dict[str, Any], *_: Any) -> torch.Tensor:
        """Compute the gradients of one optimizer step: the mean over the answer tokens of all its rows.

        Each process computes its share of the rows; the sums are those of one that computes all. If memory
        runs out, the share restarts in micro-batches of half the size, as do all later ones.
        """
        rows: list[TokenRow] = inputs["step"].rows
        answers, lengths = sum(len(completion) for _, completion in rows), lengths_of(rows)
        self.step_tokens.append(sum(lengths))
        self.timer.count(sum(lengths), answers)
        if self.fused:
            late = self.state.global_step >= COARSE * self.state.max_steps
            if late and self.fused.forward_is_in_fp8:
                self.fused.forward_in_16_bits()
                self.graphs = self._graphs()
            (self.graphs or self.fused).sync_parameters()
        while True:
            passes = self._passes(lengths)
            try:
                with _random_numbers_of_each():
                    loss = self._gradients(rows, passes, answers)
                break
            except torch.OutOfMemoryError:
                mine = [lengths[i] for members in passes for i in members]
                smaller = min(self.limit, sum(mine)) // 2
                if self.plan.sharded:  # the others wait in the middle of their passes
                    raise UserError(
                        f"train: not enough memory for {self.limit:,} tokens a pass; set "
                        f"train.tokens_per_pass: {smaller}"
                    ) from None
                if len(passes) == len(mine):
                    raise UserError(
                        f"train: not enough memory for a single row ({max(mine):,} tokens); set "
                        "train.checkpointing: full, or a smaller format.max_tokens"
                    ) from None
                log.warning(
                    "warning: out of memory with %s tokens a pass; going on with %s, the result is the same",
                    f"{self.limit:,}",
                    f"{smaller:,}",
                )
                self.limit, self.graphs = smaller, None
            model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        if count() > 1:
            self._add_up(loss)
        self._loss = loss
        return loss

    def _passes(self, lengths: list[int]) -> list[list[int]]:
        """Split this process's share of a step's rows into micro-batches; return the indices of their rows.

        In all passes of a sharded base every process takes part, also without rows.
        """
        shares = split_evenly(lengths, count()) if count() > 1 else [list(range(len(lengths)))]
        passes = []
        for share in shares:
            of_share = [lengths[i] for i in share]
            split = split_into_micro_batches(of_share, self.limit, self._padded)
            passes.append([[share[k] for k in members] for members in split])
        mine = passes[rank()]
        if self.plan.sharded:
            mine += [[]] * (max(map(len, passes)) - len(mine))
        return mine

    def _add_up(self, loss: torch.Tensor) -> None:
        """Add up loss and gradients over the processes, in one call: an adapter's are few."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # this process had no row
                parameter.grad = torch.zeros_like(parameter)
        add_up([*(p.grad for p in trained if p.grad is not None), loss])

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Return the gradients' norm, before the update; the loss and it must be finite."""
        norm = super()._get_grad_norm(*args, **kwargs)
        self._finite.note(self.state.global_step + 1, self._loss, norm)
        if self.args.use_cpu:
            self._finite.check(self.state, self.args.learning_rate)
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log values, if the steps until now were finite."""
        self._finite.check(self.state, self.args.learning_rate)
        super().log(logs, *args, **kwargs)

    def _graphs(self) -> Graphs | None:
        """Return what captures the passes; not flex attention's masks, or float16's scaled losses."""
        if self.fused and self.plan.graphs and not (self.fused.softcap or self.args.fp16):
            rows = self.args.train_batch_size
            return Graphs(self.fused, self.model.parameters(), rows, self.longest)
        return None

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Leave the gradients to the graphs, if any: a walk through all modules takes milliseconds."""
        if not self.graphs:
            type(self.model).zero_grad(self.model, set_to_none)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients; accelerate looks for them in all modules, and twice."""
        if not self.graphs:
            return super()._clip_grad_norm(model)
        return torch.nn.utils.clip_grad_norm_(self.graphs.parameters, self.args.max_grad_norm)

    @property
    def _padded(self) -> bool:
        return self.plan.attention == "padded"

    def _gradients(
        self, rows: list[TokenRow], passes: list[list[int]], answers: int
    ) -> torch.Tensor:
        total = torch.zeros((), device=self.args.device)
        lay_out = pad if self._padded else pack
        plain_packed = not (self.fused or self._padded)
        if self.graphs:
            self.graphs.begin()
        # in the backward pass as well, where checkpointed layers are computed again
        with using_attention(self.model, ATTENTION) if plain_packed else nullcontext():
            for members in passes:
                part = lay_out([rows[i] for i in members or [0]], self.args.device)
                self.largest_micro_batch = max(self.largest_micro_batch, part.ids.numel())
                if self.graphs:
                    total += self.graphs.loss(part, 1 / answers)
                    continue
                loss = (self._fused_loss if self.fused else self._plain_loss)(part) / answers
                if not members:
                    loss = loss * 0
                self.accelerator.backward(loss)
                total += loss.detach()
        return total

    def _fused_loss(self, part: MicroBatch) -> torch.Tensor:
        assert self.fused is not None
        return self.fused.answer_loss(self.fused.answer_states(part), part.targets)

    def _plain_loss(self, part: MicroBatch) -> torch.Tensor:
        """Compute the summed loss in nats with transformers' and PEFT's own layers."""
        plain = PlainModel(self.model)
        with self.accelerator.autocast():
            return plain.answer_loss(plain.answer_states(part), part.targets)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Validate; the Trainer's own loss averages batches of unequal size."""
        self._finite.check(self.state, self.args.learning_rate)
        with self.timer.pause("validation"):
            measured = self._validate(self.model, self.state.global_step)
        check_validation(measured["loss"], self.state, self.args.learning_rate)
        metrics = {f"eval_{key}": value for key, value in measured.items()}
        self.model.train()
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare only validations that measured what decides."""
        decides = self.args.metric_for_best_model in metrics
        return decides and bool(super()._determine_best_metric(metrics, trial))

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint in the first process; the others wait for it."""
        with self.timer.pause("checkpoint"):
            if rank() == 0:
                super()._save_checkpoint(*args, **kwargs)
            self.state.best_model_checkpoint = of_first(self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save adapter and token rows only, without the whole embedding and pickled arguments."""
        self.model.save_pretrained(output_dir or self.args.output_dir, save_embedding_layers=False)


@contextmanager
def _random_numbers_of_each() -> Iterator[None]:
    """Give each process other random numbers for dropout; afterwards all have the same ones again."""
    if count() == 1:
        yield
        return
    seed = int(torch.randint(2**48, ()))
    with torch.random.fork_rng():
        torch.manual_seed(seed + rank())
        yield


@dataclass(frozen=True)
class Step:
    """The rows of one optimizer step; accelerate does not move it, so the host still knows the lengths."""

    rows: list[TokenRow]


def to_float32(model: torch.nn.Module) -> None:
    """Cast trainable parameters back to float32: in TRL's bfloat16, small updates round to zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
