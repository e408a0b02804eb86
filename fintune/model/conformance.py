"""Hold each way of computing a base against the family's own forward, on a tiny model.

What a family does in a place that a shortcut leaves out, such as a scale after the head or a state that
runs on over the rows of a pack, changes the loss without an error. So loss and gradients of every path
are compared with those of transformers' forward with eager attention, one row at a time, in float32.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from fintune.errors import UserError
from fintune.hardware import has_fp8
from fintune.model.adapter import AdapterInfo, base_of, with_lora
from fintune.model.attention import ATTENTION, using_attention
from fintune.model.batch import MicroBatch, TokenRow, pack, pad
from fintune.model.fused.families import unsupported
from fintune.model.fused.model import FusedModel
from fintune.model.plain import PlainModel
from fintune.model.sizes import ModelSize, lacks_for_fp8
from fintune.model.tiny import VOCABULARY, tiny_model
from fintune.params import Lora

log = logging.getLogger("fintune")

LOSS_DIFFERENCE, GRADIENT_DIFFERENCE = 1e-4, 0.01  # relative
NEW = [VOCABULARY - 2, VOCABULARY - 1]  # tokens whose rows are trained
# tokens of prompt and answer; the longest exceeds a tiny window
ROW_LENGTHS = ((12, 5), (3, 4), (20, 9))


@dataclass(frozen=True)
class Agreement:
    """The paths that agree with a family's own forward.

    `padded` is the attention implementation for padded rows. `differences` says of each path that is not
    used by how much it differs, or how it fails.
    """

    padded: str
    packed: bool
    fused: bool
    differences: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        paths = ["fused kernels"] * self.fused + ["packed rows"] * self.packed
        return ", ".join([*paths, f"padded rows with {self.padded} attention"])


def agreement_of(config: Any) -> Agreement:
    """Return the paths that agree for a base of this configuration.

    Raises:
        UserError: no path agrees, or the family cannot be built or computed.
    """
    key = json.dumps(
        {k: v for k, v in config.to_dict().items() if k not in IRRELEVANT}, default=str
    )
    if key not in _known:
        _known[key] = _compare(config)
    return _known[key]


_known: dict[str, Agreement] = {}  # by configuration
IRRELEVANT = {"vocab_size", "use_cache", "quantization_config", "dtype", "architectures"} | {
    "_name_or_path", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id"
}  # fmt: skip


def fused_differs(model: Any) -> str | None:
    """Return why the fused kernels are not used for a model, or None if they are."""
    config = base_of(model).config
    return unsupported(model) or agreement_of(config).differences.get("fused kernels")


def fp8_differs(model: Any, trained: AdapterInfo) -> str | None:
    """Return why a trained model's products cannot be in FP8, or None if they can."""
    size = ModelSize.of(base_of(model).config, Lora(**trained.train["lora"]))
    kernels = "plain" if fused_differs(model) else "fused"
    able = trained.dtype == torch.bfloat16 and has_fp8()
    return lacks_for_fp8(size, trained.train["quantization"], kernels, able)


def _compare(config: Any) -> Agreement:
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refusal(config, "it is no causal language model")
    try:
        model = _adapted(tiny_model(config, "eager").eval())
        rows = _rows()
        expected = _measure(model, lambda: sum(_own_loss(model, row) for row in rows))
        sees_ahead = _sees_ahead(model)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise refusal(config, f"a small one cannot be computed: {reason}") from error
    if sees_ahead:
        raise refusal(config, "its tokens see those after them")
    differences: dict[str, str] = {}

    def agrees(path: str, loss: Callable[[], Tensor], attention: str) -> bool:
        try:
            with using_attention(model, attention):
                found = _measure(model, loss)
        except Exception as error:
            differences[path] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            return False
        of_loss = abs(found[0] - expected[0]) / abs(expected[0])
        of_gradients = float((found[1] - expected[1]).norm() / expected[1].norm())
        good = of_loss <= LOSS_DIFFERENCE and of_gradients <= GRADIENT_DIFFERENCE
        if not good:
            differences[path] = f"loss {of_loss:.1e}, gradients {of_gradients:.1e} off"
        return good

    plain, cpu = PlainModel(model), torch.device("cpu")

    def loss_of(computed: PlainModel | FusedModel, part: MicroBatch) -> Tensor:
        return computed.answer_loss(computed.answer_states(part), part.targets)

    def padded_loss() -> Tensor:
        return loss_of(plain, pad(rows, cpu))

    def packed_loss() -> Tensor:
        return loss_of(plain, pack(rows, cpu))

    def fused_loss() -> Tensor:
        return loss_of(FusedModel(model, torch.float32), pack(rows, cpu))

    known = ("sdpa", "eager") if model.get_base_model()._supports_sdpa else ("eager",)
    padded = [a for a in known if agrees(f"padded rows, {a}", padded_loss, a)]
    if not padded:
        raise refusal(config, "; ".join(f"{path}: {how}" for path, how in differences.items()))
    packed = agrees("packed rows", packed_loss, ATTENTION)
    fused = unsupported(model) is None and agrees("fused kernels", fused_loss, "eager")
    return Agreement(padded[0], packed, fused, differences)


def refusal(config: Any, reason: str) -> UserError:
    """Return the error that refuses a base of this type."""
    return UserError(
        f"base.model: a base of type {config.model_type} is not supported: {reason}; "
        "docs/bases.md lists the types that are"
    )


def _adapted(model: Any) -> PeftModel:
    """Add an adapter on all linear layers and on two tokens' rows.

    Raises:
        ValueError: the model's logits are others with it, although it is still zero.
    """
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        lora = Lora(r=4, alpha=8, dropout=0.0, target_modules="all-linear")
        tuned = with_lora(model, lora, NEW, 0)
        after = tuned.eval()(input_ids=ids, use_cache=False).logits
        if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
            raise ValueError("a new adapter changes its logits")
        for name, weight in tuned.named_parameters():
            if "lora_B" in name or "token" in name:
                weight.add_(0.05 * torch.randn_like(weight))
    return tuned


def _rows() -> list[TokenRow]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for lengths in ROW_LENGTHS:
        prompt, answer = (
            torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths
        )
        rows.append((prompt, answer))
    return rows


def _own_loss(model: Any, row: TokenRow) -> Tensor:
    prompt, answer = row
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
    predicting = logits[len(prompt) - 1 : -1].float()
    return torch.nn.functional.cross_entropy(predicting, torch.tensor(answer), reduction="sum")


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Return whether a token's logits change with the tokens after it."""
    ids = torch.arange(3, 15)[None]
    other = ids.clone()
    other[0, -1] = 100
    before, after = (model(input_ids=each, use_cache=False).logits[0, :-1] for each in (ids, other))
    return not torch.allclose(before, after, rtol=1e-4, atol=1e-4)


def _measure(model: Any, loss: Callable[[], Any]) -> tuple[float, Tensor]:
    """Return the loss and the gradients of the adapter, flattened."""
    model.zero_grad()
    value = loss()
    value.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.cat(
        [(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in trained]
    )
    model.zero_grad()
    return float(value.detach()), gradients
