"""Ranges over TLS: with a certificate that is trusted, and without one."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'hf_cachegen[crypto]')")
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from hf_cachegen.errors import StoreError, StoreTimeoutError
from hf_cachegen.stores import Patience, RemoteStore
from hf_cachegen.stores.remote import open_files
from tests import http_server as faults
from tests.http_server import Server, running

DATA = bytes(range(256)) * 1024
PATIENCE = Patience(attempts=2, timeout=0.8, backoff=0.01, min_bytes_per_second=1 << 20)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEM file with a key and a certificate of its own for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.timezone.utc)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()) + made.public_bytes(pem))
    return path


@pytest.fixture
def server(certificate: Path) -> Iterator[Server]:
    made = Server()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    made.socket = context.wrap_socket(made.socket, server_side=True)
    made.files["data"] = DATA
    with running(made) as found:
        yield found


def store(server: Server) -> RemoteStore:
    return RemoteStore(open_files(server.url.replace("http:", "https:"), patience=PATIENCE))


def test_a_trusted_certificate(server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    found = store(server)
    assert found.size("data") == len(DATA)
    assert found.read("data", 100_000, 50_000) == DATA[100_000:150_000]
    server.always = faults.trickle_headers(0.1)
    with pytest.raises(StoreTimeoutError):
        found.read("data", 100_000, 100)


def test_a_certificate_that_nobody_trusts(server: Server) -> None:
    with pytest.raises(StoreError, match="certificate is not valid"):
        store(server).size("data")
    assert not server.requests


def test_from_tls_to_none(server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.always = faults.status(302, Location=f"http://127.0.0.1:{server.server_port}/data")
    with pytest.raises(StoreError, match="less safe"):
        store(server).size("data")
