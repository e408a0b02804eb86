"""Write the merged model and verify that it matches the trained adapter."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from fintune import paths
from fintune.data.prompt import (
    Tokenizer,
    add_chat_template,
    as_typed,
    encode,
    end_token,
    has_own_template,
    has_special_token,
    pad_left,
)
from fintune.data.tables import read_rows
from fintune.errors import UserError
from fintune.export.gguf.check import check_gguf, check_tokens, transformers_answers
from fintune.export.gguf.convert import export_gguf
from fintune.export.gguf.llama_cpp import Completion, llama_cpp_loss
from fintune.export.gguf.ollama import write_modelfile
from fintune.generation.tuned import generation_config
from fintune.hardware import DTYPES, free_memory
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import AdapterInfo, load_adapter
from fintune.model.base import load_base, load_plain
from fintune.model.batch import TokenRow
from fintune.model.likelihood import answer_logits, likelihood
from fintune.params import Base, MergeExport

log = logging.getLogger("fintune")

TEST = paths.rows(paths.FORMATTED, "test")
GGUF_PROMPTS, GGUF_TOKENS = 8, 32  # answered by llama.cpp on the CPU
GGUF_MIN_EQUAL = {"f16": 0.97, "q8_0": 0.93}  # minimum share of equal choices
PADDING_DIFFERENCE = 0.25  # of the logits' norm; wrong padding gave 0.4 and 0.9, rounding far less
LOGIT_ROWS = 8  # few, since their logits are in memory: rows x tokens x vocabulary


def export(
    folder: Path, trained: AdapterInfo, params: MergeExport, decoding: Mapping[str, float]
) -> dict[str, Any]:
    """Write the merged model to `folder` and compare it with the adapter on test rows.

    Args:
        decoding: how the model answers, as evaluation.json has it.

    Returns:
        `base_loss` and `adapter_loss` of the base without and with its adapter, both as trained (in 4 bits
        if it was), `merged_loss` of the folder as loaded by transformers, and `merged_loss_in_4_bits`
        with its weights quantized to NF4, `max_logit_difference` between
        adapter and folder, the number of `rows`, and `gguf` if GGUF files were asked for: of each kind how
        its answers agree, or why there is none.

    Raises:
        UserError: the two losses differ by more than `max_loss_difference`.
    """
    tokenizer = trained.load_tokenizer()
    add_chat_template(tokenizer, trained.instruction)
    pad_left(tokenizer)
    rows = read_rows(TEST, ["prompt", "completion"])[: params.check_rows]
    tokens = [encode(tokenizer, row["prompt"], row["completion"]) for row in rows]
    measured, before = measure_adapter(trained, tokenizer, tokens)
    dtype = DTYPES[params.dtype]
    nf4_compute_dtype = trained.nf4_compute_dtype if params.weights == "trained_on" else None
    merge_into_folder(trained.base, tokenizer, paths.ADAPTER, folder, dtype, nf4_compute_dtype)
    generation_config(tokenizer, decoding).save_pretrained(folder)
    plain = load_plain(folder)
    merged_loss = likelihood(plain, tokens, "merged").loss
    after = answer_logits(plain, tokens[:LOGIT_ROWS])
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    apart = abs(merged_loss - measured["adapter_loss"])
    if not apart <= params.max_loss_difference:  # also rejects nan
        raise UserError(
            f"merge_export: the merged model's loss is {merged_loss:.4f} and the adapter's "
            f"{measured['adapter_loss']:.4f}, further apart than merge_export.max_loss_difference: "
            f"{params.max_loss_difference}; nothing was exported"
        )
    # other programs read `</s>` within a text as the token
    shown = [not has_special_token(tokenizer, row["prompt"], row["completion"]) for row in rows]
    prompts = list(dict.fromkeys(row["prompt"] for row in compress(rows, shown)))[:GGUF_PROMPTS]
    if prompts:
        check_use(folder, plain, prompts)
    files = {}
    if params.gguf:
        texts = {
            as_typed(tokenizer, row["prompt"], row["completion"]): [*prompt, *completion]
            for row, (prompt, completion) in compress(zip(rows, tokens, strict=True), shown)
        }
        expected = transformers_answers(plain, tokenizer, prompts, GGUF_TOKENS)
        scored = [(prompt, answer[:GGUF_TOKENS]) for prompt, answer in tokens[:GGUF_PROMPTS]]
        asked = [as_typed(tokenizer, prompt) for prompt in prompts]
        same = {"folder_loss": likelihood(plain, scored, "merged").loss}
        files = {
            kind: same
            | write_gguf(folder, params.registered_model, kind, texts, asked, expected, scored)
            for kind in params.gguf
        }
    del plain
    free_memory()
    in_4_bits = load_base(Base(model=str(folder), revision=None), tokenizer, "nf4", trained.dtype)
    written = [said["file"] for said in files.values() if "file" in said]
    if written:
        write_modelfile(folder / written[0], trained, decoding, end_token(tokenizer))
    return {
        "max_logit_difference": difference,
        "merged_loss": merged_loss,
        "merged_loss_in_4_bits": likelihood(in_4_bits, tokens, "merged, in 4 bits").loss,
        **measured,
        "rows": len(rows),
        **({"gguf": files} if files else {}),
    }


@torch.no_grad()
def check_use(folder: Path, model: Any, prompts: Sequence[str]) -> None:
    """Check a folder as its users call it: a padded batch, answered with its own generation config.

    Raises:
        UserError: padding changes what follows a prompt, or the folder cannot generate.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    begins = not has_own_template(tokenizer)  # else the prompt has its own beginning
    options = {"padding": True, "return_tensors": "pt", "add_special_tokens": begins}
    batch = dict(tokenizer(list(prompts), **options).to(model.device))
    batch.pop("token_type_ids", None)

    def first_logits(**inputs: Any) -> torch.Tensor:
        done = model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits: torch.Tensor = done.logits[0].float()
        return logits

    try:
        together = first_logits(**batch)
        model.generate(**batch, max_new_tokens=2)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"merge_export: the exported folder cannot generate: {error}") from error
    for prompt, found in zip(prompts, together, strict=True):
        ids = torch.tensor([encode(tokenizer, prompt, "")[0]], device=model.device)
        alone = first_logits(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        apart = float((found - alone).norm() / alone.norm())
        if not apart <= PADDING_DIFFERENCE:
            raise UserError(
                f"merge_export: padding changes the logits after {prompt!r} by {apart:.1%}; "
                "nothing was exported"
            )


def write_gguf(
    folder: Path,
    name: str,
    kind: str,
    texts: Mapping[str, Sequence[int]],
    prompts: Sequence[str],
    expected: Sequence[Completion],
    scored: Sequence[TokenRow],
) -> dict[str, Any]:
    """Write a GGUF file, and check its tokens and answers; without it the folder is still whole.

    Args:
        texts: the tokens of each text.
        expected: the folder's answers to the prompts.
        scored: rows whose loss is measured.

    Returns:
        The name of the `file`, its `bytes`, the agreement and the `loss`; or the `error` for which there is
        no file.
    """
    file = folder / f"{name}-{kind}.gguf"
    try:
        export_gguf(folder, folder, name, [kind])
        check_tokens(file, texts)
        same = check_gguf(file, expected, prompts, GGUF_TOKENS, GGUF_MIN_EQUAL[kind])
        loss = llama_cpp_loss(file, scored)
    except UserError as error:
        file.unlink(missing_ok=True)
        log.warning("warning: no %s: %s", file.name, error)
        return {"error": str(error)}
    return {"file": file.name, "bytes": file.stat().st_size, **asdict(same), "loss": loss}


def measure_adapter(
    trained: AdapterInfo, tokenizer: Tokenizer, tokens: list[TokenRow]
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Measure the losses of the adapter and of its base alone, and the adapter's logits."""
    base = load_base(trained.base, tokenizer, trained.train["quantization"], trained.dtype)
    model = load_adapter(base, paths.ADAPTER)
    adapter_loss = likelihood(model, tokens, "adapter").loss
    logits = answer_logits(model, tokens[:LOGIT_ROWS])
    with model.disable_adapter():
        base_loss = likelihood(model, tokens, "base").loss
    del model, base
    free_memory()
    return {"adapter_loss": adapter_loss, "base_loss": base_loss}, logits
