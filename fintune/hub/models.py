"""Base models from the hub at a pinned revision, or from a folder."""

import hashlib
import json
from pathlib import Path
from typing import Any

from fintune.errors import UserError
from fintune.hub.client import check_snapshot, explain_error, is_offline
from fintune.params import Base

KNOWN = ("mistral", "llama")  # types that need no check before torch is imported
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # by family
STRETCHES, STRETCH_BYTES = 256, 65_536  # samples of each weights file


def check_model(model: str, revision: str) -> int:
    """Check that a hub model is accessible and has safetensors weights, without downloading them.

    Returns:
        The size of its safetensors weights in bytes.

    Raises:
        UserError: the model is gated, missing, unreachable, without safetensors weights, or, offline,
            not in the cache.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        if is_offline():
            # only what transformers loads; the cache may lack the repository's other files
            folder = snapshot_download(
                model,
                revision=revision,
                local_files_only=True,
                allow_patterns=["config.json", "tokenizer*", "model*.safetensors"],
            )
            sizes = [file.stat().st_size for file in Path(folder).glob("model*.safetensors")]
            if not sizes:
                raise UserError(
                    f"{model}: its weights at {revision} are not in the local cache, and "
                    "HF_HUB_OFFLINE is set; run once without it"
                )
            return sum(sizes)
        info = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=30)
        HfApi().auth_check(model)
    except UserError:
        raise
    except Exception as error:
        raise UserError(explain_error(error, "models", model, revision)) from error
    sizes = [file.size or 0 for file in info.siblings or [] if is_weights(file.rfilename)]
    if not sizes:
        raise UserError(
            f"{model}: no safetensors weights at {revision}; other formats can run code and are not loaded"
        )
    return sum(sizes)


def local_folder(base: Base) -> Path:
    """Return the local folder of a base's configuration and weights, downloading what the cache lacks.

    Raises:
        UserError: the model is gated, missing or unreachable, or, offline, not in the cache.
    """
    if base.is_folder:
        return Path(base.model)
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            base.model,
            revision=base.revision,
            local_files_only=is_offline(),
            allow_patterns=["*.json", "model*.safetensors", "README.md"],
        )
    except Exception as error:
        raise UserError(explain_error(error, "models", base.model, base.revision)) from error
    return Path(folder)


def checked_folder(base: Base) -> Path:
    """Return a base's local folder, of a hub model after its files were held against the hub's hashes.

    Raises:
        UserError: as `local_folder` and `check_snapshot`.
    """
    folder = local_folder(base)
    if not base.is_folder:
        check_snapshot(folder)
    return folder


def weights_fingerprint(base: Base) -> str:
    """Hash a base's weights in milliseconds, to distinguish bases of the same shape.

    The hash covers each safetensors file's name, size and 256 evenly spread stretches of 64 KiB;
    training changes all weights, so it changes these.
    """
    digest = hashlib.sha256()
    files = sorted(file for file in local_folder(base).iterdir() if is_weights(file.name))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for place in sorted({size * part // STRETCHES for part in range(STRETCHES)}):
                file.seek(place)
                digest.update(file.read(STRETCH_BYTES))
    return digest.hexdigest()


def is_weights(filename: str) -> bool:
    """Return whether transformers would load this file; some repositories hold the weights twice."""
    return filename.startswith("model") and filename.endswith(".safetensors")


def check_base(base: Base) -> int:
    """Check that the base can be loaded.

    Returns:
        The size of its weights in bytes.

    Raises:
        UserError: a folder lacks config.json or safetensors weights; a hub model fails `check_model`.
    """
    if not base.is_folder:
        return check_model(base.model, base.revision or "")
    folder = Path(base.model)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"base.model: {folder} has no config.json; it is no Hugging Face model folder"
        )
    weights = list(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"base.model: {folder} has no safetensors weights; other formats can run code and are not loaded"
        )
    return sum(file.stat().st_size for file in weights)


def read_config_file(base: Base) -> dict[str, Any]:
    """Read a base's config.json, which needs no torch; a multimodal base's part for text.

    Raises:
        UserError: it is missing, unreachable or damaged.
    """
    try:
        file = Path(base.model) / "config.json"
        if not base.is_folder:
            from huggingface_hub import hf_hub_download

            file = Path(
                hf_hub_download(
                    base.model, "config.json", revision=base.revision, local_files_only=is_offline()
                )
            )
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"base.model: {base.model}: its config.json is damaged: {error}") from error
    except Exception as error:
        raise UserError(explain_error(error, "models", base.model, base.revision)) from error
    text = found.get("text_config")
    return found | text if isinstance(text, dict) else found


def check_positions(config: dict[str, Any], max_tokens: int) -> None:
    """Check that the longest row is within a base's positions.

    Raises:
        UserError: format.max_tokens is more than that.
    """
    for name in POSITIONS:
        most = config.get(name)
        if isinstance(most, int) and 0 < most < max_tokens:
            raise UserError(
                f"format.max_tokens: rows of {max_tokens:,} tokens are longer than the {most:,} that the "
                f"base can read ({name} in its config.json); lower it"
            )
