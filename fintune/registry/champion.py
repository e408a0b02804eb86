"""The registered champion, for comparison with a new adapter."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import mlflow
from mlflow.tracking import MlflowClient

from fintune.registry.versions import NOT_THERE, adapter_uri
from fintune.stage import read_json

log = logging.getLogger("fintune")


@dataclass(frozen=True)
class Champion:
    """The adapter behind a registered model's `champion` alias, or the reason why there is none to compare.

    `broken`: a champion may exist but could not be fetched. `note`: a caveat for the comparison.
    """

    folder: Path | None = None
    version: str | None = None
    run_id: str | None = None
    reason: str = ""
    broken: bool = False
    note: str = ""


def fetch_champion(
    client: MlflowClient, name: str | None, record_file: Path, adapter: Path, into: Path
) -> Champion:
    """Download the champion's adapter, unless it equals `adapter` or does not fit the same base.

    Args:
        name: the registered model; None for no champion.
        record_file: `models/run.json` of the adapter to compare it with.
        adapter: that adapter's folder.
        into: an empty folder for the download.
    """
    if name is None:
        return Champion(reason="evaluate.champion is null")
    try:
        version = client.get_model_version_by_alias(name, "champion")
    except Exception as error:  # each store raises its own library's errors
        if getattr(error, "error_code", "") in NOT_THERE:
            return Champion(reason=f"{name} has no champion yet")
        return _not_fetched(Champion(), name, error)
    found = Champion(version=str(version.version), run_id=str(version.run_id))
    try:
        folder = mlflow.artifacts.download_artifacts(adapter_uri(version), dst_path=str(into))
        reason = _unlike(Path(folder), adapter)
    except Exception as error:
        return _not_fetched(found, name, error)
    if reason:
        return replace(found, reason=f"version {found.version} {reason}")
    ours = read_json(record_file, "tags")["tags"].get("md5.data/split")
    same_split = version.tags.get("md5.data/split") == ours
    note = "" if same_split else "its rows were split otherwise: it may have seen these test rows"
    return replace(found, folder=Path(folder), note=note)


def _not_fetched(found: Champion, name: str, error: Exception) -> Champion:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    reason = f"the champion of {name} could not be fetched ({type(error).__name__}: {first})"
    log.warning("MLflow: %s", reason)
    return replace(found, reason=reason, broken=True)


def _unlike(champion: Path, adapter: Path) -> str:
    """Return the reason why two adapters cannot be compared on one base, or an empty string."""
    weights = "adapter_model.safetensors"
    if (champion / weights).read_bytes() == (adapter / weights).read_bytes():
        return "is this very adapter"
    settings = [
        json.loads((folder / "training.json").read_text()) for folder in (champion, adapter)
    ]
    theirs, ours = (each["base"] for each in settings)
    if theirs != ours:
        named = [f"{each['model']} at {each['revision']}" for each in (theirs, ours)]
        return f"has another base: {named[0]}, not {named[1]}"
    if settings[0].get("base_fingerprint") != settings[1].get("base_fingerprint"):
        return f"was trained on other weights than {ours['model']} holds now"
    tokens = [
        json.loads((folder / "adapter_config.json").read_text())["trainable_token_indices"]
        for folder in (champion, adapter)
    ]
    return "" if tokens[0] == tokens[1] else "has other tokens"
