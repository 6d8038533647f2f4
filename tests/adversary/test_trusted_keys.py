"""`forge verify --key`: a key that signed nothing verifies nothing."""

from __future__ import annotations

import pytest

from forge_ray.governance.verify import Checked, requiring
from forge_ray.store import signing

pytestmark = pytest.mark.unit


def test_key_that_signed_nothing_verifies_nothing() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    stranger = Ed25519PrivateKey.generate().public_key()
    unsigned, signed = Checked("mv_1", "models: 2 files"), Checked("mv_1", "models: 2 files", ("olga",))
    assert signing.key_id(stranger) in requiring([unsigned, signed], [stranger])[0].problem
    assert requiring([signed, unsigned], [stranger]) == [signed, unsigned]
    assert requiring([unsigned], []) == [unsigned]  # without --key the store's policy decides
