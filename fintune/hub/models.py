"""Base models of the hub at a pinned revision, or in a folder."""

import hashlib
from pathlib import Path

from fintune.errors import UserError
from fintune.hub.client import explain_error, is_offline
from fintune.params import Base

STRETCHES, STRETCH_BYTES = 256, 65_536  # of a weights file, for its fingerprint


def check_model(model: str, revision: str) -> int:
    """Ask the hub for a base model's files before anything is spent on it.

    Returns:
        The size of its safetensors weights in bytes.

    Raises:
        UserError: gated, missing, unreachable, without safetensors weights, or not in the cache
            while offline.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        if is_offline():
            # only what transformers loads; a cache without a repository's other files is good enough
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
    """Where a base's configuration and weights lie here; what the cache lacks is fetched first.

    Raises:
        UserError: as `check_model`.
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


def weights_fingerprint(base: Base) -> str:
    """A hash that tells one base's weights from another's of the same shape, in milliseconds.

    Of each safetensors file it takes the size and 256 stretches of 64 KiB, spread evenly over it;
    another training changes all weights, so these differ, too.
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
    """Whether transformers would load this file; some repositories hold a second copy of the weights."""
    return filename.startswith("model") and filename.endswith(".safetensors")


def check_base(base: Base) -> int:
    """Make sure that the base can be loaded.

    Returns:
        The size of its weights in bytes.

    Raises:
        UserError: a folder without config, tokenizer or safetensors weights; a hub model that is
            gated, missing or unreachable.
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
