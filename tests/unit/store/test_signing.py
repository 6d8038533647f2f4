"""Keys, envelopes, OpenSSF's model signatures."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.governance.verify import verify_path
from forge_ray.records import canonical_json
from forge_ray.store import signing
from forge_ray.store.files import hash_dir

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("algorithm", ["ed25519", "p256"])
def test_an_envelope_opens_only_with_its_own_key(algorithm: signing.Algorithm) -> None:
    key, other = signing.generate(algorithm), signing.generate(algorithm)
    sealed = signing.envelope(b"payload", signing.IN_TOTO, key)
    assert signing.opened(sealed, [other.public_key(), key.public_key()]) == b"payload"
    with pytest.raises(PolicyError, match="no trusted key signed this"):
        signing.opened(sealed, [other.public_key()])
    for changed in (sealed | {"payload": "cGF5bG9hZA=="[:-4] + "ZGE="}, sealed | {"payloadType": "text/plain"}):
        with pytest.raises(PolicyError):
            signing.opened(changed, [key.public_key()])
    with pytest.raises(PolicyError, match="no DSSE envelope"):
        signing.opened({"payload": "%"}, [key.public_key()])


def test_the_encoding_is_dsse(tmp_path: Path) -> None:
    """The example of DSSE's protocol.md."""
    assert signing.pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_a_private_key_file_is_readable_by_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = signing.generate()
    path = tmp_path / "a.key"
    signing.write_private(path, key, "secret")
    assert path.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(signing.SIGNER, str(path))
    with pytest.raises(ConfigError, match="no private key that can be opened"):
        signing.private_key()
    monkeypatch.setenv(signing.PASSPHRASE, "secret")
    assert signing.key_id(signing.private_key().public_key()) == signing.key_id(key.public_key())
    with pytest.raises(ConfigError, match="never overwritten"):
        signing.write_private(path, key)
    os.chmod(path, 0o640)
    with pytest.raises(PolicyError, match="read by others"):
        signing.load_private(path)
    monkeypatch.setenv(signing.SIGNER, str(tmp_path / "none.key"))
    with pytest.raises(NotFound, match="is no file"):
        signing.private_key()


def test_other_kinds_of_key_are_refused() -> None:
    from cryptography.hazmat.primitives.asymmetric import ec

    with pytest.raises(ConfigError, match="Ed25519 or P-256"):
        signing.load_public(signing.public_pem(ec.generate_private_key(ec.SECP384R1()).public_key()))
    with pytest.raises(ConfigError, match="no public key"):
        signing.load_public("hello")


def signed_folder(folder: Path, key: signing.PrivateKey) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "inner" / "config.json").write_text("{}")
    (folder / "model.sig").write_bytes(signing.model_bundle("mv_x", hash_dir(folder), key))
    return folder


def test_a_signed_folder_verifies_until_a_file_changes(tmp_path: Path) -> None:
    key = signing.generate("p256")
    folder = signed_folder(tmp_path / "m", key)
    trusted = [key.public_key()]
    assert verify_path(folder, trusted)["files"] == 2
    for change in ("changed", "added", "gone"):
        target = folder / ("new.json" if change == "added" else "inner/config.json")
        before = target.read_bytes() if target.exists() else None
        target.unlink() if change == "gone" else target.write_text("[]")
        with pytest.raises(PolicyError, match="is not what was signed"):
            verify_path(folder, trusted)
        target.unlink(missing_ok=True)
        if before is not None:
            target.write_bytes(before)
    assert verify_path(folder, trusted)
    with pytest.raises(ConfigError, match="keys that you trust"):
        verify_path(folder, [])


def test_openssf_verifies_what_is_signed_here(tmp_path: Path) -> None:
    """Where model-signing is installed: its own verifier, with the public key alone."""
    verifying = pytest.importorskip("model_signing.verifying")
    key = signing.generate("p256")
    folder = signed_folder(tmp_path / "m", key)
    public = tmp_path / "k.pub"
    public.write_text(signing.public_pem(key.public_key()))
    check = verifying.Config().use_elliptic_key_verifier(public_key=public)
    check.verify(folder, folder / "model.sig")
    (folder / "model.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError):
        check.verify(folder, folder / "model.sig")


def test_the_bundle_has_openssfs_shape(tmp_path: Path) -> None:
    folder = signed_folder(tmp_path / "m", signing.generate("p256"))
    bundle = json.loads((folder / "model.sig").read_bytes())
    assert bundle["mediaType"] == "application/vnd.dev.sigstore.bundle.v0.3+json"
    envelope = bundle["dsseEnvelope"]
    import base64

    stated = json.loads(base64.b64decode(envelope["payload"]))
    assert stated["predicateType"] == "https://model_signing/signature/v1.0"
    assert [resource["name"] for resource in stated["predicate"]["resources"]] == ["inner/config.json", "model.safetensors"]
    assert canonical_json(stated) == base64.b64decode(envelope["payload"])
