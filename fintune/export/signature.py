"""The signature of an exported folder: ECDSA over its SHA256SUMS, as `openssl dgst` makes and checks it.

    FINTUNE_SIGNING_KEY         path of the private key, in PEM
    FINTUNE_SIGNING_PASSPHRASE  its passphrase, if it has one
    FINTUNE_PUBLIC_KEY          path of the public key, in PEM, against which folders are checked

They are environment, not parameters, as a key's place differs by machine. The signature is deterministic
(RFC 6979): the same model and key give the same bytes, so that DVC's hash of the folder stays.
"""

import logging
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from fintune.errors import UserError
from fintune.integrity import SIGNATURE, SUMS, check_sums, write_sums
from fintune.lineage import project_root

log = logging.getLogger("fintune")
PRIVATE, PASSPHRASE, PUBLIC = (
    f"FINTUNE_{name}" for name in ("SIGNING_KEY", "SIGNING_PASSPHRASE", "PUBLIC_KEY")
)
MAKE = "`openssl ecparam -name prime256v1 -genkey -noout -out KEY` makes one"


def signing_key() -> ec.EllipticCurvePrivateKey | None:
    """Read the private key that the environment names; None if it names none.

    Raises:
        UserError: it is no key of this kind, or the passphrase is wrong.
    """
    if not (named := os.environ.get(PRIVATE)):
        return None
    said = os.environ.get(PASSPHRASE)
    try:
        key = load_pem_private_key(_read(PRIVATE, named), said.encode() if said else None)
    except (
        ValueError,
        TypeError,
        UnsupportedAlgorithm,
    ) as error:  # the error never shows the passphrase
        raise UserError(
            f"{PRIVATE}: {named}: {error}; it must be a private key on an elliptic curve, in PEM, and "
            f"{PASSPHRASE} its passphrase, if it has one; {MAKE}"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(f"{PRIVATE}: {named}: no key on an elliptic curve; {MAKE}")
    return key


def public_key(named: str | None = None) -> ec.EllipticCurvePublicKey | None:
    """Read a public key, by default the one that the environment names; None if it names none.

    Raises:
        UserError: it is no key of this kind.
    """
    source = "--key" if named else PUBLIC
    if not (named := named or os.environ.get(PUBLIC)):
        return None
    try:
        key = load_pem_public_key(_read(source, named))
    except (ValueError, UnsupportedAlgorithm):
        key = None  # type: ignore[assignment]
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UserError(
            f"{source}: {named}: no public key on an elliptic curve in PEM; `openssl ec -in KEY -pubout` "
            "prints a private key's"
        )
    return key


def _read(source: str, named: str) -> bytes:
    path = project_root() / Path(named).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: {named}: no such file")
    return path.read_bytes()


def seal(
    folder: Path, hashes_of_files: dict[str, str], key: ec.EllipticCurvePrivateKey | None
) -> None:
    """Write a folder's SHA256SUMS, and its signature if there is a key."""
    write_sums(folder, hashes_of_files)
    if key:
        method = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)
        signature = key.sign((folder / SUMS).read_bytes(), method)
        (folder / SIGNATURE).write_bytes(signature)


def check_signature(folder: Path, key: ec.EllipticCurvePublicKey) -> None:
    """Check the signature of a folder's SHA256SUMS; its files are `check_sums`'s.

    Raises:
        UserError: another key made it, or SHA256SUMS was changed since.
    """
    sums = folder / SUMS
    try:
        signed = sums.read_bytes() if sums.is_file() else b""
        key.verify((folder / SIGNATURE).read_bytes(), signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise UserError(
            f"{folder / SIGNATURE}: not a signature of {SUMS} by the key {fingerprint(key)}: another key "
            f"made it, or {SUMS} was changed since; do not use this folder before you know which"
        ) from None


def check_folder(folder: Path) -> None:
    """Check a model's folder before it is used: its files against SHA256SUMS, and its signature, if any.

    Raises:
        UserError: a file or the signature is not what it should be.
    """
    key = public_key()
    if (folder / SIGNATURE).is_file():
        if key:
            check_signature(folder, key)
        else:
            log.warning(
                "note: %s is signed; %s=FILE names the public key to check that", folder, PUBLIC
            )
    elif key:
        log.warning("warning: %s is not signed, though %s names a key", folder, PUBLIC)
    check_sums(folder)


def fingerprint(key: ec.EllipticCurvePublicKey) -> str:
    """Return the first half of the SHA-256 of a public key's DER form."""
    digest = hashes.Hash(hashes.SHA256())
    digest.update(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    return digest.finalize().hex()[:32]
