"""The keys of tests with signed artifacts. Without the package `cryptography` these tests are skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)


def pem(key: object, path: Path, password: bytes | None = None) -> Path:
    """Write a private key as a PEM file."""
    secrecy = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, secrecy))  # type: ignore[attr-defined]
    return path
