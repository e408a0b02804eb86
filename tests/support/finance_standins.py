"""Run the finance tasks on models that know what to say, for test_finance.py; prints JSON.

It needs a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported.
"""

import json
import sys
from contextlib import nullcontext
from typing import Any

import lm_eval.models.huggingface
import torch
from lm_eval.api.model import LM

from fintune.data.prompt import load_tokenizer
from fintune.evaluation.harness import data_sets, load_tasks, run_harness
from fintune.model.adapter import add_adapter
from fintune.model.base import load_base
from fintune.params import Base, Harness, Lora


class Knowing(LM):
    """A model that says what `replies` has for the key in the prompt."""

    def __init__(self, replies: dict[str, str]) -> None:
        super().__init__()
        self.replies = replies
        self.prompts: list[str] = []

    def reply(self, prompt: str) -> str:
        self.prompts.append(prompt)
        (reply,) = [reply for key, reply in self.replies.items() if key in prompt]
        return reply

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        said = [self.reply(each.args[0]) == each.args[1].strip() for each in requests]
        return [(0.0 if right else -1.0, right) for right in said]

    def generate_until(self, requests: list[Any]) -> list[str]:
        return [self.reply(each.args[0]) for each in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def tiny(folder: str) -> tuple[Any, Any]:
    base = Base(model=folder, revision=None)
    tokenizer = load_tokenizer(base, "new")
    lora = Lora(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj"])
    model = add_adapter(load_base(base, tokenizer, "none", torch.float32), tokenizer, lora, 0)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return model.eval(), tokenizer


def main() -> None:
    asked = json.load(sys.stdin)
    params = Harness(tasks=asked["tasks"], include_path=asked["include_path"], limit=None)
    model, tokenizer = tiny(asked["base"])
    sides = {"base": model.disable_adapter, "tuned": nullcontext}
    found: dict[str, Any] = {"tiny": run_harness(model, tokenizer, params, sides, 4, 0)}
    lm_eval.models.huggingface.HFLM = lambda pretrained, **_: pretrained
    for name, replies in asked["models"].items():
        knowing = Knowing(replies)
        found[name] = run_harness(knowing, None, params, {"tuned": nullcontext}, 4, 0)
        found["prompts"] = sorted(set(knowing.prompts))
    found["data"] = data_sets(load_tasks(params))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
