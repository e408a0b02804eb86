"""Files in the hub's cache against the hashes that the hub states."""

import hashlib
from pathlib import Path

import pytest

from fintune.errors import UserError
from fintune.hub.client import check_snapshot


def cache(folder: Path, files: dict[str, bytes]) -> Path:
    """Write files as the hub's client keeps them: blobs named by their hash, and links to them."""
    snapshot = folder / "snapshots/commit"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name, data in files.items():
        if name.endswith(".json"):
            digest = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            digest = hashlib.sha256(data).hexdigest()
        (folder / "blobs" / digest).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_a_base_is_found(tmp_path: Path, name: str) -> None:
    data = {"model.safetensors": bytes(range(256)) * 9000, "config.json": b'{"a": 1}'}
    check_snapshot(cache(tmp_path / "whole", data))
    snapshot = cache(tmp_path / "flipped", data)
    blob = (snapshot / name).resolve()
    changed = bytearray(data[name])
    changed[-1] ^= 1
    blob.write_bytes(changed)
    with pytest.raises(UserError, match=f"{name}: .*{blob.name}.*delete that file"):
        check_snapshot(snapshot)
