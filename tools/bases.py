"""Write docs/bases.md: which types of base transformers knows can be trained, and how they are computed.

    python -m tools.bases

Each type's default configuration, cut to a tiny model, is held against the family's own forward as before
a training (fintune/model/conformance.py). Takes about five minutes on a CPU core.
"""

import multiprocessing
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fintune.errors import UserError
from fintune.model.conformance import agreement_of

PAGE = Path("docs/bases.md")
SECONDS = 60  # for one type
HEAD = """# Bases

Before a base is loaded, a tiny model of its configuration is computed in every way that training, measuring
and answering use, and held against transformers' own forward with eager attention, one row at a time: the
loss has to agree within 1e-4 and the gradients within 1 %. What differs is not used: fused kernels fall back
to the family's own layers, packed rows to padded ones, SDPA to eager attention. Where nothing agrees, the
base is refused by its type, by `python -m fintune check` and by the stage `format`.

`train.lora.target_modules: all-linear` takes every linear layer but head and routers, whatever their names.
From training to merged folder and answers, in 16 and in 4 bits, tiny bases of these types are tested: Bloom,
Cohere, Gemma 2 and 3, GPT-2, GPT-NeoX, Granite, Mixtral, Phi, Phi-3, Qwen 2 and 3 and StableLM, beside Llama
and Mistral. A base whose weights have other names in its files than in the model is merged in memory. The
experts of a mixture stay in 16 bits with `quantization: nf4`. GGUF files are written for what llama.cpp's
converter knows, and refused by `fintune check` for others.

This table is written by `python -m tools.bases` with transformers {version}, from each type's default
configuration. A base's own configuration can differ, and is what the check looks at.

| type | rows | attention | remark |
|---|---|---|---|
"""


def main() -> None:
    """Try every type, and write the page."""
    lines, refused = [], []
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = in_own_process(kind)
        print(kind, found, flush=True)
        (refused if found.startswith("refused") else lines).append(f"| {kind} | {found} |")
    text = HEAD.format(version=transformers.__version__) + "\n".join(lines)
    refusals = "\n".join(line.replace("refused: ", "") for line in refused)
    text += f"\n\nRefused with their default configuration:\n\n| type | reason |\n|---|---|\n{refusals}\n"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {len(lines)} types, {len(refused)} refused")


def in_own_process(kind: str) -> str:
    """Describe a type; one that takes too long or too much memory does not stop the others."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(describe(kind)))
    process.start()
    sender.close()
    try:
        return str(receiver.recv()) if receiver.poll(SECONDS) else f"refused: over {SECONDS} s"
    except EOFError:
        return "refused: the process was ended, perhaps for its memory"
    finally:
        process.kill()
        process.join()


def describe(kind: str) -> str:
    """Return a type's cells: rows, attention and a remark, or `refused: ` and the reason."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        config: Any = CONFIG_MAPPING[kind]()
        found = agreement_of(config)
    except UserError as error:
        reason = str(error).split("is not supported: ")[-1].split("; docs/bases.md")[0]
        return "refused: " + reason.replace("|", "/")[:160]
    except Exception as error:
        return f"refused: no default configuration ({type(error).__name__})"
    rows = "packed" if found.packed or found.fused else "padded"
    remark = "fused kernels" if found.fused else found.differences.get("packed rows", "")
    return f"{rows} | {found.padded} | {remark.replace('|', '/')[:110]}"


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    main()
