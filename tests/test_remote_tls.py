"""Ranges over TLS: with a trusted certificate, and without one."""

from __future__ import annotations

import datetime
import ipaddress
import socket
import ssl
import threading
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
from tests.http_server import Request, Server, running

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


def test_an_untrusted_certificate(server: Server) -> None:
    with pytest.raises(StoreError, match="certificate is not valid"):
        store(server).size("data")
    assert not server.requests


def test_a_redirect_from_https_to_http(server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server.always = faults.status(302, Location=f"http://127.0.0.1:{server.server_port}/data")
    with pytest.raises(StoreError, match="less safe"):
        store(server).size("data")


def test_unrequested_bytes_are_not_taken_for_an_answer(
    server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come in one record with the end of the body, are decrypted with it, and wait above the socket."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    found = store(server)
    assert found.size("data") == len(DATA)

    def stray(request: Request, body: bytes, headers: dict[str, str]) -> None:
        evil = f"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 100000-100003/{len(DATA)}\r\n"
        evil += f"ETag: {headers['ETag']}\r\nContent-Length: 4\r\n\r\nevil"
        request.answer(206, body + evil.encode(), {**headers, "Content-Length": str(len(body))})

    server.faults = [stray]
    assert found.read("data", 50_000, 1000) == DATA[50_000:51_000]
    assert found.read("data", 100_000, 4) == DATA[100_000:100_004]


class Tunnel(Request):
    """A proxy that connects clients with the password."""

    def do_CONNECT(self) -> None:
        self.server.requests.append((self.path, self.headers))
        host, _, port = self.path.partition(":")
        with socket.create_connection((host, int(port))) as far:
            self.send_response(200)
            self.end_headers()
            threading.Thread(target=self._relay, args=(far, self.connection), daemon=True).start()
            self._relay(self.connection, far)
        self.close_connection = True

    @staticmethod
    def _relay(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side went away


def test_proxy_credentials_go_to_the_proxy_alone(
    server: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for an open tunnel, too."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with running(Server(Tunnel)) as proxy:
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.setenv(name, "")
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{proxy.server_port}")
        found = store(server)
        for offset in (20_000, 30_000, 40_000):
            assert found.read("data", offset, 10) == DATA[offset : offset + 10]
        assert [headers["Proxy-Authorization"] for _, headers in proxy.requests] == ["Basic dXNlcjpzZWNyZXQ="]
        assert len(server.requests) == 4
        assert not any(headers["Proxy-Authorization"] for _, headers in server.requests)
        del found


def test_a_redirect_past_the_proxy_leaves_its_password_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Proxy(Request):
        def do_GET(self) -> None:
            self.server.requests.append((self.path, self.headers))
            self.answer(302, b"", {"Location": f"{direct.url}/data"})

    with running(Server(Proxy)) as proxy, running(Server()) as direct:
        direct.files["data"] = DATA
        monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{proxy.server_port}")
        found = RemoteStore(open_files("http://far.invalid", patience=PATIENCE))
        assert found.size("data") == len(DATA)
        assert proxy.requests[0][1]["Proxy-Authorization"]
        assert not direct.requests[0][1]["Proxy-Authorization"]
