"""SHA256SUMS of a model's folder and its signature: what is changed, added or signed by another is found."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from fintune.errors import UserError
from fintune.export.push import push
from fintune.export.signature import check_folder, public_key, seal, signing_key
from fintune.integrity import hash_files
from fintune.params import read_params
from fintune.usage.models import load

PHRASE = "correct horse"


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a pair of keys that the environment names, and another one, and go to their folder."""
    for name in ("ours", "theirs"):
        key = ec.generate_private_key(ec.SECP256R1())
        lock = BestAvailableEncryption(PHRASE.encode()) if name == "ours" else NoEncryption()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
        (tmp_path / f"{name}.pem").write_bytes(pem)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (tmp_path / f"{name}.pub").write_bytes(public)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FINTUNE_SIGNING_KEY", "ours.pem")
    monkeypatch.setenv("FINTUNE_SIGNING_PASSPHRASE", PHRASE)
    monkeypatch.setenv("FINTUNE_PUBLIC_KEY", "ours.pub")
    monkeypatch.setenv("HF_TOKEN", "hf_unused")
    return tmp_path


@pytest.fixture
def model(keys: Path) -> Path:
    """Write and sign a folder."""
    folder = keys / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(1000))
    (folder / "config.json").write_text("{}")
    (folder / "deep/more.json").write_text("[]")
    seal(folder, hash_files(folder), signing_key())
    return folder


def change_weights(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[500] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def add_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"new")


def remove_file(folder: Path) -> None:
    (folder / "deep/more.json").unlink()


def sign_again(folder: Path) -> None:
    """Change the weights, and SHA256SUMS with them."""
    change_weights(folder)
    seal(folder, hash_files(folder), None)


def damage_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").write_text("nothing\n")


def remove_sums(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (change_weights, "model.safetensors: its SHA-256 is"),
        (add_weights, "adapter_model.safetensors: not in SHA256SUMS"),
        (remove_file, "deep/more.json: missing"),
        (sign_again, "SHA256SUMS.sig: not a signature of SHA256SUMS by the key"),
        (damage_sums, "not a signature"),
        (remove_sums, "not a signature"),
    ],
    ids=lambda each: each.__name__ if callable(each) else "",
)
def test_a_changed_model_is_not_used(model: Path, harm: Callable[[Path], None], said: str) -> None:
    check_folder(model)
    harm(model)
    uses: list[Callable[[], object]] = [
        lambda: check_folder(model),
        lambda: load(model, lambda: read_params().generation),
        lambda: push("acme/model", model, False),
    ]
    for use in uses:
        with pytest.raises(UserError, match=said):
            use()


def test_another_s_signature_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINTUNE_PUBLIC_KEY", "theirs.pub")
    with pytest.raises(UserError, match="another key"):
        check_folder(model)


def test_a_signature_that_is_missing_or_cannot_be_checked_is_said(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    check_folder(model)
    assert caplog.text == ""
    monkeypatch.delenv("FINTUNE_PUBLIC_KEY")
    check_folder(model)
    assert "FINTUNE_PUBLIC_KEY=FILE names the public key" in caplog.text
    monkeypatch.setenv("FINTUNE_PUBLIC_KEY", "ours.pub")
    (model / "SHA256SUMS.sig").unlink()
    check_folder(model)
    assert f"{model} is not signed" in caplog.text


def test_the_same_key_signs_the_same_bytes_and_openssl_checks_them(model: Path, keys: Path) -> None:
    """DVC hashes the folder: a signature with a random number would be another output at each run."""
    first = (model / "SHA256SUMS.sig").read_bytes()
    seal(model, hash_files(model), signing_key())
    assert (model / "SHA256SUMS.sig").read_bytes() == first
    if openssl := shutil.which("openssl"):
        check = [openssl, "dgst", "-sha256", "-verify", keys / "ours.pub", "-signature"]
        assert subprocess.run([*check, "SHA256SUMS.sig", "SHA256SUMS"], cwd=model).returncode == 0


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("FINTUNE_SIGNING_KEY", "none.pem", "FINTUNE_SIGNING_KEY: none.pem: no such file"),
        ("FINTUNE_SIGNING_KEY", "ours.pub", "must be a private key"),
        ("FINTUNE_SIGNING_PASSPHRASE", "secret guess", "its passphrase"),
        ("FINTUNE_SIGNING_PASSPHRASE", "", "its passphrase"),
        ("FINTUNE_PUBLIC_KEY", "ours.pem", "no public key"),
    ],
)
def test_a_key_that_is_none_is_named_and_no_passphrase_shown(
    keys: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said) as error:
        (public_key if name == "FINTUNE_PUBLIC_KEY" else signing_key)()
    assert PHRASE not in str(error.value) and "secret guess" not in str(error.value)


def test_a_record_of_hashes_needs_no_key(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SIGNING_KEY", "SIGNING_PASSPHRASE", "PUBLIC_KEY"):
        monkeypatch.delenv(f"FINTUNE_{name}")
    (model / "SHA256SUMS.sig").unlink()
    seal(model, hash_files(model), signing_key())
    check_folder(model)
    (model / "config.json").write_text(json.dumps({"auto_map": {}}))
    with pytest.raises(UserError, match=r"config.json: its SHA-256 is"):
        check_folder(model)
