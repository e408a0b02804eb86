"""Write the merged model and verify that it matches the trained adapter."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fintune import paths
from fintune.data.prompt import Tokenizer, add_chat_template, encode, load_tokenizer
from fintune.data.tables import read_rows
from fintune.errors import UserError
from fintune.export.gguf.check import check_gguf, transformers_answers
from fintune.export.gguf.ollama import write_modelfile
from fintune.export.gguf.write import export_gguf
from fintune.generation.tuned import generation_config
from fintune.hardware import DTYPES, free_memory
from fintune.merging.merge import merge_into_folder
from fintune.model.adapter import AdapterInfo, load_adapter
from fintune.model.base import load_base, load_plain
from fintune.model.batch import TokenRow
from fintune.model.likelihood import answer_logits, likelihood
from fintune.params import MergeExport

TEST = paths.rows(paths.FORMATTED, "test")
GGUF_PROMPTS, GGUF_TOKENS = 8, 32  # answered by llama.cpp on the CPU
GGUF_MIN_EQUAL = {"f16": 0.97, "q8_0": 0.93}  # minimum share of equal choices
LOGIT_ROWS = 8  # few, since their logits are in memory: rows x tokens x vocabulary


def export(
    folder: Path, trained: AdapterInfo, params: MergeExport, decoding: Mapping[str, float]
) -> dict[str, Any]:
    """Write the merged model to `folder` and compare it with the adapter on test rows.

    Args:
        decoding: how the model answers, as evaluation.json has it.

    Returns:
        `base_loss` and `adapter_loss` of the base without and with its adapter, both as trained (in 4 bits
        if it was), `merged_loss` of the folder as loaded by transformers, `max_logit_difference` between
        adapter and folder, the number of `rows`, and `gguf` if GGUF files were written.

    Raises:
        UserError: the two losses differ by more than `max_loss_difference`, or a GGUF file's answers differ.
    """
    tokenizer = load_tokenizer(trained.base)
    add_chat_template(tokenizer, trained.instruction)
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
    files = {
        kind: export_gguf(folder, folder, params.registered_model, [kind])[0]
        for kind in params.gguf
    }
    if files:
        write_modelfile(next(iter(files.values())), trained.instruction, decoding)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))[:GGUF_PROMPTS]
    return {
        "max_logit_difference": difference,
        "merged_loss": merged_loss,
        **measured,
        "rows": len(rows),
        **({"gguf": check_files(files, plain, tokenizer, prompts)} if files else {}),
    }


def check_files(
    files: Mapping[Any, Path], model: Any, tokenizer: Tokenizer, prompts: list[str]
) -> dict[str, Any]:
    """Compare llama.cpp's answers from each GGUF file with those of the merged folder.

    Raises:
        UserError: a file's answers differ too much.
    """
    expected = transformers_answers(model, tokenizer, prompts, GGUF_TOKENS)
    report = {}
    for kind, file in files.items():
        same = check_gguf(file, expected, prompts, GGUF_TOKENS, GGUF_MIN_EQUAL[kind])
        report[kind] = {"bytes": file.stat().st_size, **asdict(same)}
    return report


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
