"""Write a merged Hugging Face folder as a GGUF file, for llama.cpp and programs built on it.

Works tensor by tensor, so memory stays near a few times the largest one. Format and quantization are
those of ggml-org's own package.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from fintune.errors import UserError
from fintune.export.gguf.llama_cpp import INSTALL
from fintune.export.gguf.tensors import (
    Source,
    _bytes,
    _convert,
    _head_dim,
    _read,
    _rope_factors,
    _sources,
    _type,
)
from fintune.export.gguf.tokenizer import Vocabulary, read_vocabulary

log = logging.getLogger("fintune")

KINDS = ("f16", "q8_0")
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
ROPES = ("default", "linear", "llama3")  # can be expressed as a factor per frequency


def export_gguf(folder: Path, out: Path, name: str, kinds: Sequence[str]) -> list[Path]:
    """Write `out`/`name`-KIND.gguf for each kind, completely or not at all.

    Args:
        folder: a plain Hugging Face folder of a Llama or Mistral: config, safetensors in one file or in
            shards with an index, tokenizer, generation config.
        kinds: `f16` (matrices in float16) or `q8_0` (8 bits, with a scale for every 32 weights); vectors stay
            in float32 in both.

    Returns:
        The files, in the order of `kinds`.

    Raises:
        UserError: an unsupported architecture, tokenizer or kind, a weight too large for float16, a broken
            folder, a full disk, or the package gguf is not installed.
    """
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UserError(f"gguf: {', '.join(unknown)}: no such kind; there are {', '.join(KINDS)}")
    _require_gguf()
    config = _read_config(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"gguf: {folder}: no tokenizer can be loaded: {error}") from error
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    sources = _sources(folder, config)
    files = []
    for kind in kinds:
        path = out / f"{name}-{kind}.gguf"
        partial = path.with_name(f".{path.name}.partial")
        try:
            out.mkdir(parents=True, exist_ok=True)
            writer = _writer(partial, kind, name)
            _add_model(writer, config)
            _add_tokenizer(writer, tokenizer, vocabulary, _end_ids(folder, config))
            _add_sampling(writer, folder, config.max_position_embeddings)
            _write(writer, kind, sources, config)
            partial.replace(path)
        except OSError as error:
            raise UserError(
                f"gguf: {path} cannot be written; is the disk full? {error.strerror or error}"
            ) from error
        except SafetensorError as error:
            raise UserError(f"gguf: {folder}: the weights cannot be read: {error}") from error
        finally:
            partial.unlink(missing_ok=True)
        log.info("%s: %.1f MB", path, path.stat().st_size / 1e6)
        files.append(path)
    return files


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"gguf: the package gguf is not installed: {INSTALL}") from error


def _read_config(folder: Path) -> Any:
    """Read the folder's config; reject one that GGUF cannot express."""
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"gguf: {folder}: no model folder: {error}") from error
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"gguf: {folder}: {architecture} cannot be exported; {' and '.join(ARCHITECTURES)} can"
        )
    config = AutoConfig.from_pretrained(folder)
    if config.hidden_act != "silu":
        raise UserError(f"gguf: {folder}: hidden_act is {config.hidden_act}, which GGUF cannot say")
    rope = config.rope_parameters
    if rope["rope_type"] not in ROPES or rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"gguf: {folder}: rope_parameters {rope} cannot be exported; "
            f"{', '.join(ROPES)} on all of a head can"
        )
    return config


def _context(config: Any) -> int:
    """Return the context length within which the model is equivalent: GGUF's llama has no sliding window."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _writer(path: Path, kind: str, name: str) -> Any:
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    files = {"f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    return writer


def _add_model(writer: Any, config: Any) -> None:
    if _context(config) < config.max_position_embeddings:
        log.info(
            "gguf: the context is the sliding window's %s tokens, within which it is the same model",
            f"{_context(config):,}",
        )
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)


def _end_ids(folder: Path, config: Any) -> list[int]:
    """Return the end tokens of an answer that transformers uses with this folder, the trained one first."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    ends = settings.get("eos_token_id", config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    if not 1 <= len(ends) <= 2 or None in ends:
        raise UserError(
            f"gguf: eos_token_id {ends} of {folder}: one or two ends of an answer can be said"
        )
    return ends


def _add_tokenizer(
    writer: Any, tokenizer: Any, vocabulary: Vocabulary, end_ids: Sequence[int]
) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(end_ids[0])
    writer.add_eot_token_id(end_ids[0])
    writer.add_eom_token_id(end_ids[-1])  # the base's own end token also ends an answer
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.adds_space)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_sampling(writer: Any, folder: Path, positions: int) -> None:
    """Add the generation config's decoding, llama.cpp's default for requests without their own.

    The order is that of transformers; by default, llama.cpp applies the temperature last.
    """
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    sampled = settings.get("do_sample", False)

    def value(name: str, unused: float) -> Any:
        given = settings.get(name) if sampled else None
        return unused if given is None else given

    writer.add_sampling_sequence("penalties;temperature;top_k;top_p;min_p")
    writer.add_sampling_temp(value("temperature", 1.0 if sampled else 0.0))
    writer.add_sampling_top_p(value("top_p", 1.0))
    writer.add_sampling_min_p(value("min_p", 0.0))
    writer.add_sampling_top_k(value("top_k", 0))
    writer.add_sampling_penalty_repeat(settings.get("repetition_penalty") or 1.0)
    writer.add_sampling_penalty_last_n(positions)  # all of prompt and answer; -1 is not understood


def _write(writer: Any, kind: str, sources: dict[str, Source], config: Any) -> None:
    """Declare every tensor, then convert and write one after another."""
    types = {}
    shapes = {name: source.shape for name, source in sources.items()}
    factors = _rope_factors(config)
    if factors is not None:
        shapes["rope_freqs.weight"] = list(factors.shape)
    for name, shape in shapes.items():
        types[name] = _type(kind, shape)
        size = _bytes(shape, types[name])
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=types[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, source in sources.items():
            tensor = _read(source, config)
            writer.write_tensor_data(_convert(tensor, types[name], source.name))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.flush()
    finally:
        writer.close()
