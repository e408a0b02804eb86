"""Fine-tuning on a tiny base: results, updated weights, and equivalence of the fast paths."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fintune.data.prompt import SPECIAL_TOKENS, end_token_id
from fintune.errors import UserError
from fintune.model.adapter import add_adapter, load_adapter, save_adapter
from fintune.model.attention import packed_attention
from fintune.model.base import load_base
from fintune.model.batch import pack, pad
from fintune.model.likelihood import likelihood
from fintune.params import Base
from fintune.training.train import TrainingResult, total_steps
from fintune.training.trainer import AnswerTrainer, split_into_micro_batches
from support.training import PARAMS, TEXTS, adapted, trainable, tune


def fit(
    base: Base, tokenizer: Any, rows: Sequence[Any], scratch: Path, **changes: Any
) -> tuple[TrainingResult, list[float]]:
    """Train; return the result and the loss of each step."""
    logged: dict[int, float] = {}

    def note(step: int, values: dict[str, float]) -> None:
        logged.update({step: values["loss"]} if "loss" in values else {})

    params = PARAMS.model_copy(update=changes)
    result = tune(base, tokenizer, rows, params, scratch, on_log=note)
    return result, [logged[step] for step in sorted(logged)]


@pytest.fixture(scope="module")
def losses(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """Train as it comes; return the loss of each step."""
    return fit(base, tokenizer, rows, tmp_path_factory.mktemp("plain"))[1]


@pytest.mark.parametrize("padded", [True, False])
def test_what_is_predicted_is_the_answer_and_the_end_token(
    rows: list[Any], tokenizer: Any, padded: bool
) -> None:
    part = (pad if padded else pack)(rows, torch.device("cpu"))
    flat = part.ids.flatten()
    assert torch.equal(part.targets, flat[part.predicting + 1])
    assert tokenizer.decode(part.targets) == "".join(completion for _, completion in TEXTS)
    ends = (part.targets == end_token_id(tokenizer)).sum()
    assert ends == len(rows)
    before = [tokenizer.decode(i) for i in flat[part.predicting]]
    assert before.count("<response>") == len(rows)
    if padded:
        assert part.mask is not None
        assert part.mask.sum() == sum(len(p) + len(c) for p, c in rows)
    else:
        assert part.packed is not None
        starts = part.packed.cu_seqlens[:-1].long()
        assert part.positions[0, starts].sum() == 0
        assert tokenizer.decode(flat[starts[1] : starts[2]]) == "<s>" + "".join(TEXTS[1])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_every_adapter_weight_and_both_token_rows_move_and_no_base_weight(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, quantization: str
) -> None:
    """Except the end token's embedding: no token of its document follows it, so it has no gradient."""
    params = PARAMS.model_copy(update={"quantization": quantization})
    model = adapted(base, tokenizer, params)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    result, _ = fit(base, tokenizer, rows, tmp_path, quantization=quantization)
    after = dict(result.model.named_parameters())
    assert set(before) == set(after)
    token_rows = [name for name in after if "trainable_tokens" in name]
    assert len(token_rows) == 2  # embedding and head
    for name, weight in after.items():
        if "lora_" in name or name in token_rows:
            assert weight.dtype == torch.float32, name
            # on a 4-bit base TRL rounds new adapter weights to bfloat16 once, before the first step
            start = before[name].bfloat16().float() if quantization == "nf4" else before[name]
            moved = (weight != start).float().mean(dim=-1) > 0.5
            expected = [True, "embed" not in name] if name in token_rows else [True] * len(moved)
            assert moved.tolist() == expected, name
        else:
            assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "padded"},
        {"kernels": "plain"},
        {"kernels": "plain", "checkpointing": "full"},
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"tokens_per_pass": 1},
        {"tokens_per_pass": 90},
        {"tokens_per_pass": 90, "attention": "padded"},
    ],
    ids=str,
)
def test_execution_does_not_change_what_is_learned(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    losses: list[float],
    tmp_path: Path,
    changes: dict[str, Any],
) -> None:
    result, other = fit(base, tokenizer, rows, tmp_path, **changes)
    assert other == pytest.approx(losses, rel=1e-5)
    assert result.metrics["steps"] == 4


def test_full_checkpointing_of_plain_layers_computes_each_one_again(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = adapted(base, tokenizer, PARAMS).get_base_model().get_decoder().layers
    kind = type(layers[0].mlp)
    forward, calls = kind.forward, [0]

    def counted(self: Any, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        result: torch.Tensor = forward(self, *arguments)
        return result

    monkeypatch.setattr(kind, "forward", counted)
    found = {}
    for checkpointing in ("none", "full"):
        calls[0] = 0
        scratch = tmp_path / checkpointing
        fit(base, tokenizer, rows, scratch, kernels="plain", checkpointing=checkpointing)
        found[checkpointing] = calls[0]
    assert found["full"] - found["none"] == 4 * len(layers)  # one recompute in each of four steps


@pytest.mark.parametrize("kernels", ["fused", "plain"])
def test_out_of_memory_halves_the_passes_and_changes_nothing(
    base: Base,
    tokenizer: Any,
    rows: list[Any],
    tmp_path: Path,
    kernels: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Memory for 60 tokens per micro-batch, and one failure in the middle of a step."""
    _, expected = fit(base, tokenizer, rows, tmp_path / "enough", kernels=kernels)
    sizes: list[int] = []
    name = f"_{kernels}_loss"
    loss = getattr(AnswerTrainer, name)

    def scarce(self: Any, part: Any) -> torch.Tensor:
        sizes.append(part.ids.numel())
        found: torch.Tensor = loss(self, part)
        if part.ids.numel() > 60 or len(sizes) == 4:
            (found * 3).backward()  # gradients that must be discarded
            raise torch.OutOfMemoryError
        return found

    monkeypatch.setattr(AnswerTrainer, name, scarce)
    result, losses = fit(base, tokenizer, rows, tmp_path / "scarce", kernels=kernels)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert max(sizes) > 60 >= sizes[-1]
    assert result.metrics["steps"] == 4
    assert "the result is the same" in caplog.text


def test_a_row_that_does_not_fit_is_named(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(self: Any, part: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(AnswerTrainer, "_fused_loss", none_left)
    with pytest.raises(UserError, match=r"not enough memory for a single row \(\d+ tokens\)"):
        fit(base, tokenizer, rows, tmp_path)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("limit", [1, 7, 20, 1000])
def test_passes_hold_every_row_once_within_the_limit(limit: int, padded: bool) -> None:
    lengths = [3, 9, 1, 7, 7, 2, 12, 5]
    passes = split_into_micro_batches(lengths, limit, padded)
    assert sorted(i for rows in passes for i in rows) == list(range(8))
    for members in passes:
        sizes = [lengths[i] for i in members]
        tokens = max(sizes) * len(sizes) if padded else sum(sizes)
        assert tokens <= max(limit, 12)
        assert tokens <= limit or len(members) == 1 or not padded
    assert len(passes) == {1: 8, 1000: 1}.get(limit, len(passes))


def test_the_loss_is_the_mean_over_all_answer_tokens_of_a_step(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    """A step over all rows has the loss that `likelihood` measures."""
    result, losses = fit(
        base, tokenizer, rows, tmp_path, learning_rate=1e-12, max_steps=None, rows_per_step=24
    )
    assert result.metrics["steps"] == len(losses) == 1
    assert losses[0] == pytest.approx(likelihood(result.model, rows, "all").loss, rel=1e-5)


def test_training_lowers_the_loss_and_keeps_the_best(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    result, losses = fit(base, tokenizer, rows, tmp_path, max_steps=12, epochs=9.0)
    assert losses[-1] < losses[0] - 0.5
    validated = {p["step"]: p["validation_loss"] for p in result.curve if p["validation_loss"]}
    assert result.metrics["validation_loss"] == min(validated.values())
    assert likelihood(result.model, rows[:4], "again").loss == pytest.approx(
        result.metrics["validation_loss"], rel=1e-5
    )


def test_the_best_checkpoint_is_not_the_last_one(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path
) -> None:
    """The learning rate is so high that the validation loss rises, and an early checkpoint is restored."""
    result, _ = fit(
        base, tokenizer, rows, tmp_path, learning_rate=3.0, max_steps=8, epochs=9.0,
        schedule="constant", early_stopping_patience=2, validate_every_steps=1,
    )  # fmt: skip
    assert result.metrics["best_step"] < result.metrics["steps"] < 8
    kept = likelihood(result.model, rows[:4], "kept").loss
    assert kept == pytest.approx(result.metrics["validation_loss"], rel=1e-5)


def test_steps_follow_from_epochs_rows_and_the_limit() -> None:
    params = PARAMS.model_copy(update={"epochs": 1.5, "max_steps": None, "rows_per_step": 4})
    assert total_steps(params, 10) == 5  # three steps per epoch, the last with two rows
    assert total_steps(params.model_copy(update={"max_steps": 2}), 10) == 2
    assert total_steps(params.model_copy(update={"max_steps": 50}), 10) == 5


@pytest.mark.parametrize("name", ["query", "embed_tokens", "lm_head", "self_attn", "norm"])
def test_what_is_no_linear_layer_is_refused(base: Base, tokenizer: Any, name: str) -> None:
    model = load_base(base, tokenizer, "none", torch.float32)
    lora = PARAMS.lora.model_copy(update={"target_modules": ["q_proj", name]})
    with pytest.raises(UserError, match=rf"{name}: no linear layer.*q_proj.*all-linear"):
        add_adapter(model, tokenizer, lora, 0)


def test_the_new_rows_are_the_mean_and_the_old_ones_untouched(base: Base, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(base.model, dtype=torch.float32)
    model = load_base(base, tokenizer, "none", torch.float32)
    for kind in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(plain, kind)().weight, getattr(model, kind)().weight
        assert new.shape[0] == len(tokenizer) == old.shape[0] + len(SPECIAL_TOKENS)
        assert torch.equal(new[: old.shape[0]], old)
        assert torch.allclose(new[old.shape[0] :], old.mean(dim=0), atol=1e-6)


@pytest.fixture(scope="module")
def trained(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Train an adapter without quantization and return its folder."""
    folder = tmp_path_factory.mktemp("trained")
    result, _ = fit(base, tokenizer, rows, folder / "scratch", max_steps=10, epochs=9.0)
    save_adapter(result.model, folder / "adapter")
    return folder / "adapter"


def test_the_saved_adapter_is_small_and_comes_back(
    base: Base, tokenizer: Any, rows: list[Any], trained: Path
) -> None:
    with safe_open(trained / "adapter_model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    others = {key: shape for key, shape in shapes.items() if "lora_" not in key}
    assert sorted(others.values()) == [[2, 64], [2, 64]]
    assert len(shapes) - len(others) == 2 * 7 * 2
    model = load_adapter(load_base(base, tokenizer, "none", torch.float32), trained)
    with model.disable_adapter():
        untrained = likelihood(model, rows, "off").loss
    assert likelihood(model, rows, "on").loss < untrained - 0.5


def test_names_are_written_in_the_order_of_the_alphabet(trained: Path) -> None:
    """A set's order differs between processes and would change the folder's md5."""
    config = json.loads((trained / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 7
    assert config["target_modules"] == sorted(config["target_modules"])


def test_an_adapter_of_another_shape_is_refused(
    tokenizer: Any, trained: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig, MistralForCausalLM

    config = AutoConfig.from_pretrained(Path(__file__).parents[2] / "assets/demo-base")
    config.hidden_size, config.num_hidden_layers = 32, 1
    MistralForCausalLM(config).save_pretrained(tmp_path)
    other = load_base(Base(model=str(tmp_path), revision=None), tokenizer, "none", torch.float32)
    with pytest.raises(UserError, match="does not fit its base"):
        load_adapter(other, trained)
    with pytest.raises(UserError, match="no adapter there"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("window", [None, 3])
def test_packed_attention_is_attention_document_by_document(window: int | None) -> None:
    """Against the definition, in float64."""
    torch.manual_seed(0)
    lengths, heads, groups, size = [5, 1, 4], 4, 2, 8
    query = torch.randn(1, heads, 10, size, dtype=torch.float64)
    key, value = (torch.randn(1, groups, 10, size, dtype=torch.float64) for _ in range(2))
    bounds = torch.tensor([0, 5, 6, 10], dtype=torch.int32)
    output, _ = packed_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3,
        cu_seq_lens_q=bounds, max_length_q=5, sliding_window=window,
    )  # fmt: skip
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    place = torch.arange(10)
    seen = (document[:, None] == document) & (place[:, None] >= place)
    if window:
        seen &= place[:, None] - place < window
    scores = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    expected = (weights @ value.repeat_interleave(2, dim=1)).transpose(1, 2)
    assert torch.allclose(output, expected, atol=1e-12)


SCORES = [0.2, 0.9, 0.5]  # of the answers, at each validation
LOSSES = [2.0, 1.5, 1.0]


@pytest.mark.parametrize(("keep", "kept"), [("best_answers", 2), ("best_loss", 3), ("last", 3)])
def test_the_step_that_is_asked_for_is_kept(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, keep: str, kept: int
) -> None:
    """Planted figures: the answers are best at the second step, the loss at the last."""
    params = PARAMS.model_copy(update={"keep": keep, "max_steps": 3, "validate_every_steps": 1})
    weights: list[torch.Tensor] = []
    logged: dict[int, dict[str, float]] = {}

    def validate(model: Any, step: int) -> dict[str, float]:
        place = len(weights)
        assert step == place + 1
        weights.append(trainable(model))
        answers = {"answers": SCORES[place]} if keep == "best_answers" else {}
        return {"loss": LOSSES[place], **answers}

    def note(step: int, values: dict[str, float]) -> None:
        logged.setdefault(step, {}).update(values)

    result = tune(base, tokenizer, rows, params, tmp_path, validate, note)
    assert torch.equal(trainable(result.model), weights[kept - 1])
    assert result.metrics["best_step"] == kept
    assert result.metrics["validation_loss"] == LOSSES[kept - 1]
    if keep == "best_answers":
        assert result.metrics["validation_answers"] == 0.9
        assert [point["validation_answers"] for point in result.curve] == SCORES
        assert logged[2]["validation_answers"] == 0.9


@pytest.mark.parametrize(("patience", "steps"), [(None, 6), (1, 4)])
def test_only_validations_with_answers_decide(
    base: Base, tokenizer: Any, rows: list[Any], tmp_path: Path, patience: int | None, steps: int
) -> None:
    """Planted figures: of the answers at steps 2, 4 and 6, those at 2 are the best."""
    params = PARAMS.model_copy(
        update={"keep": "best_answers", "max_steps": 6, "validate_every_steps": 1}
        | {"early_stopping_patience": patience}
    )

    def validate(model: Any, step: int) -> dict[str, float]:
        return {"loss": 1 / step} | ({"answers": 1 / step} if step % 2 == 0 else {})

    found = tune(base, tokenizer, rows, params, tmp_path, validate)
    assert found.metrics["best_step"] == 2 and found.metrics["validation_answers"] == 0.5
    assert found.metrics["steps"] == steps
    assert [point["validation_answers"] for point in found.curve[:3]] == [None, 0.5, None]
