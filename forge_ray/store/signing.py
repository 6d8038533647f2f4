"""Keys, signatures, envelopes. Ed25519, or P-256 where OpenSSF's model-signing must read the signature.

An envelope is DSSE (github.com/secure-systems-lab/dsse, protocol.md); what it carries is an in-toto Statement v1
(github.com/in-toto/attestation, spec/v1). A key's id is a hash of its public half, so the id can be checked too.
The private key stays a file of its owner, named by `FORGE_SIGNER`; the store holds public halves alone.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import socket
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import FileEntry, canonical_json
from forge_ray.store.home import expanded, user

IN_TOTO = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
BUNDLE_FILE = "model.sig"  # the name that OpenSSF's model-signing gives a bundle by default
MODEL_SIGNATURE = "https://model_signing/signature/v1.0"
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIGNER = "FORGE_SIGNER"  # path of the private key, PEM
PASSPHRASE = "FORGE_SIGNER_PASSPHRASE"
Algorithm = Literal["ed25519", "p256"]
# `cryptography` is imported where it is used: most verbs never sign, and `forge --help` answers at once
PrivateKey = Any
PublicKey = Any
ACTING: ContextVar[PrivateKey | None] = ContextVar("acting", default=None)


def generate(algorithm: Algorithm = "ed25519") -> PrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    return ed25519.Ed25519PrivateKey.generate() if algorithm == "ed25519" else ec.generate_private_key(ec.SECP256R1())


def public_pem(key: PublicKey) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return str(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def key_id(key: PublicKey) -> str:
    """`sk_` and 16 hex digits of the sha256 over the public key's DER form."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return "sk_" + hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()[:16]


def write_private(path: Path, key: PrivateKey, passphrase: str = "") -> None:
    """PKCS#8 PEM, readable by its owner alone; an existing file is never overwritten."""
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    guard = BestAvailableEncryption(passphrase.encode()) if passphrase else NoEncryption()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists; a private key is never overwritten", hint="give another --out") from None
    with os.fdopen(handle, "wb") as stream:
        stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, guard))


def load_public(text: str | bytes) -> PublicKey:
    """From PEM; raises `ConfigError` for anything but an Ed25519 or P-256 public key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(text.encode() if isinstance(text, str) else text)
    except ValueError:
        raise ConfigError("this is no public key in PEM form", hint="`forge signers create` writes NAME.pub") from None
    if not (
        isinstance(key, ed25519.Ed25519PublicKey)
        or (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1))
    ):
        raise ConfigError("a signer's key is Ed25519 or P-256", hint="`forge signers create` makes one")
    return key


def load_private(path: Path) -> PrivateKey:
    """Refuses a file that others than its owner can read."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if not path.is_file():
        raise NotFound(f"{SIGNER}={str(path)!r} is no file", hint="`forge signers create` makes a key; unset it to not sign")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise PolicyError(f"{path} can be read by others than its owner", hint=f"chmod 600 {path}")
    try:
        key = load_pem_private_key(path.read_bytes(), os.environ.get(PASSPHRASE, "").encode() or None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is no private key that can be opened: {error}", hint=f"is {PASSPHRASE} right?") from None
    load_public(public_pem(key.public_key()))
    return key


@lru_cache(maxsize=8)
def _private(path: str, changed: int) -> PrivateKey:
    return load_private(Path(path))


@contextlib.contextmanager
def acting(key: PrivateKey) -> Iterator[None]:
    """Inside, `private_key()` is this one, whatever `FORGE_SIGNER` says."""
    token = ACTING.set(key)
    try:
        yield
    finally:
        ACTING.reset(token)


def private_key() -> PrivateKey | None:
    """The key of whoever runs this process; None where `FORGE_SIGNER` names none."""
    if key := ACTING.get():
        return key
    path = os.environ.get(SIGNER, "")
    if not path:
        return None
    file = expanded(path)
    return _private(str(file), file.stat().st_mtime_ns if file.is_file() else 0)


def who() -> str:
    """user@host of this process, as the system knows it: a claim, where a key is the proof."""
    return f"{user()}@{socket.gethostname()}"


def sign(data: bytes, key: PrivateKey) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    return bytes(key.sign(data, ec.ECDSA(hashes.SHA256())))


def is_signed(data: bytes, signature: bytes, key: PublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        return False
    return True


def pae(payload_type: str, payload: bytes) -> bytes:
    """What a DSSE signature is over: the pre-authentication encoding."""
    return b"DSSEv1 %d %s %d %s" % (len(payload_type), payload_type.encode(), len(payload), payload)


def envelope(payload: bytes, payload_type: str, key: PrivateKey) -> dict[str, Any]:
    """A DSSE envelope with one signature."""
    signature = sign(pae(payload_type, payload), key)
    return {
        "payloadType": payload_type,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def opened(envelope: Mapping[str, Any], keys: Iterable[PublicKey]) -> bytes:
    """The payload, if one of `keys` signed it; raises `PolicyError` otherwise."""
    try:
        payload, payload_type = base64.b64decode(envelope["payload"], validate=True), str(envelope["payloadType"])
        signatures = [(str(s.get("keyid", "")), base64.b64decode(s["sig"], validate=True)) for s in envelope["signatures"]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise PolicyError("this is no DSSE envelope", hint="was the file changed, or cut off?") from None
    signed, trusted = pae(payload_type, payload), list(keys)
    if any(is_signed(signed, signature, key) for _, signature in signatures for key in trusted):
        return payload
    named = ", ".join(name for name, _ in signatures) or "nobody"
    raise PolicyError(
        f"no trusted key signed this: it names {named}, trusted are {', '.join(map(key_id, trusted)) or 'none'}",
        hint="was it changed afterwards? `forge signers list` shows the keys that this store trusts",
    )


def statement(subjects: Mapping[str, str], predicate_type: str, predicate: Any) -> dict[str, Any]:
    """An in-toto Statement v1; `subjects`: name → sha256 in hex."""
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in subjects.items()],
        "predicateType": predicate_type,
        "predicate": predicate,
    }


def signed_statement(subjects: Mapping[str, str], predicate_type: str, predicate: Any, key: PrivateKey) -> dict[str, Any]:
    return envelope(canonical_json(statement(subjects, predicate_type, predicate)), IN_TOTO, key)


def model_bundle(name: str, files: Iterable[FileEntry], key: PrivateKey) -> bytes:
    """A `model.sig` as OpenSSF's model-signing 1.x writes it with a key: a Sigstore bundle around a DSSE envelope around a
    statement of predicate `https://model_signing/signature/v1.0`. Its verifier takes P-256 keys, not Ed25519."""
    from forge_ray.store.files import MANIFEST

    ignored = [MANIFEST, BUNDLE_FILE]
    resources = [
        {"name": entry.path, "algorithm": "sha256", "digest": entry.sha256}
        for entry in sorted(files, key=lambda entry: entry.path)
        if entry.path not in ignored
    ]
    root = hashlib.sha256(b"".join(bytes.fromhex(resource["digest"]) for resource in resources)).hexdigest()
    predicate = {
        "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": ignored},
        "resources": resources,
    }
    public = public_pem(key.public_key())
    bundle = {
        "mediaType": BUNDLE,
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(public.encode()).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": signed_statement({name: root}, MODEL_SIGNATURE, predicate, key),
    }
    return json.dumps(bundle, indent=1).encode()


def check_bundle(bundle: Mapping[str, Any], files: Iterable[FileEntry], keys: Iterable[PublicKey]) -> None:
    """Raise `PolicyError` unless the bundle is signed by one of `keys` and names exactly these files."""
    try:
        inner = bundle["dsseEnvelope"]
        stated = json.loads(opened(inner, keys))
        if stated["predicateType"] != MODEL_SIGNATURE:
            raise KeyError("predicateType")
        ignored = set(stated["predicate"]["serialization"].get("ignore_paths", ()))
        signed = {resource["name"]: resource["digest"] for resource in stated["predicate"]["resources"]}
    except (LookupError, TypeError, ValueError):
        raise PolicyError("this is no model signature of OpenSSF's kind", hint="was the file changed, or cut off?") from None
    present = {entry.path: entry.sha256 for entry in files if entry.path not in ignored}
    if different := sorted(name for name in signed.keys() | present.keys() if signed.get(name) != present.get(name)):
        raise PolicyError(
            f"{different[0]} is not what was signed ({len(different)} of {len(signed)} files differ)",
            hint="fetch the folder again, or ask who signed it",
        )
