"""Artifacts on real servers: nginx, and S3 through s3fs. Tests are skipped where these are not installed.

`make` installs s3fs, .ci/run installs nginx.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from hf_cachegen.artifact import PROFILE_FILE, Limits, Reader, chain
from hf_cachegen.artifact.pin import Pin
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ChangedError,
    ProfileError,
    RangeError,
    StoreAccessError,
    StoreError,
)
from hf_cachegen.stores import Access, Patience, RemoteStore, open_store
from hf_cachegen.stores.cached import CachedStore
from hf_cachegen.stores.http import HEAD_BYTES
from hf_cachegen.stores.profiles import fetch_pinned
from hf_cachegen.stores.remote import open_files
from tests.small_artifact import contents, write

IMPATIENT = Patience(attempts=2, timeout=5, backoff=0.01)
LONG = bytes(range(256)) * 1024
CONFIGURATION = """
daemon off; master_process off; pid {folder}/pid; error_log stderr crit;
events {{ worker_connections 64; }}
http {{
    access_log off; root {folder}/root; gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;
    client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
    uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
    server {{
        listen 127.0.0.1:{port};
        location /whole/ {{ max_ranges 0; alias {folder}/root/; }}
        location /locked/ {{ deny all; }}
        rewrite ^/moved/(.*)$ /context/$1 redirect;
    }}
}}
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("the server does not start")


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(URL, folder that it serves)"""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light)")
    folder = tmp_path_factory.mktemp("nginx")
    folder.chmod(0o755)
    root = folder / "root"
    root.mkdir()
    port = free_port()
    user = "user root;\n" if os.getuid() == 0 else ""
    (folder / "nginx.conf").write_text(user + CONFIGURATION.format(folder=folder, port=port))
    process = subprocess.Popen([program, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"])
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}", root
    finally:
        process.terminate()
        process.wait(10)


def remote(url: str) -> RemoteStore:
    return RemoteStore(open_files(url, patience=IMPATIENT))


def test_an_artifact_on_nginx(nginx: tuple[str, Path], tmp_path: Path) -> None:
    url, root = nginx
    write(root / "context")
    access = Access(cache_dir=tmp_path / "cache", patience=IMPATIENT)
    total = sum(map(len, contents(root / "context").values()))
    for location in (f"{url}/context", f"{url}/moved"):
        found = open_store(location, access)
        assert any(isinstance(one, CachedStore) for one in chain(found))
        reader = Reader(found)
        reader.prefetch(reader.manifest.segments)
        assert reader.verify() == total


def test_long_files_on_nginx(nginx: tuple[str, Path]) -> None:
    url, root = nginx
    (root / "data").write_bytes(LONG)
    found = remote(url)
    assert found.size("data") == len(LONG)
    assert found.read("data", 100_000, 50_000) == LONG[100_000:150_000]
    os.truncate(root / "data", HEAD_BYTES)
    with pytest.raises((ChangedError, RangeError)):
        found.read("data", 100_000, 50_000)
    (root / "data").write_bytes(LONG[::-1] + b"x")
    with pytest.raises(ChangedError):
        found.read("data", 100_000, 50_000)


def test_what_nginx_refuses(nginx: tuple[str, Path]) -> None:
    url, root = nginx
    (root / "data").write_bytes(LONG)
    for folder, error in (("nowhere", ArtifactNotFoundError), ("locked", StoreAccessError)):
        with pytest.raises(error):
            remote(f"{url}/{folder}").size("data")
    whole = remote(f"{url}/whole")
    assert whole.size("data") == len(LONG), "nginx ignores ranges there"
    assert whole.read("data", 100_000, 50) == LONG[100_000:100_050]
    (root / "empty").write_bytes(b"")
    assert remote(url).size("empty") == 0


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, object]]:
    """The storage options of an S3 server in memory, with a bucket."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install s3fs)")
    server = pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server]')")
    import s3fs

    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    options = {"key": "test", "secret": "test", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    s3fs.S3FileSystem(**options).mkdir("bucket")
    yield options
    running.stop()


@pytest.mark.filterwarnings("ignore")
def test_an_artifact_on_s3(s3: dict[str, object], tmp_path: Path) -> None:
    import s3fs

    write(tmp_path / "context")
    s3fs.S3FileSystem(**s3).put(str(tmp_path / "context"), "bucket/context", recursive=True)
    access = Access(cache_dir=tmp_path / "cache", storage_options=s3, patience=IMPATIENT)
    total = sum(map(len, contents(tmp_path / "context").values()))
    store = open_store("s3://bucket/context", access)
    reader = Reader(store)
    reader.prefetch(reader.manifest.segments)
    assert reader.verify() == total
    pin = Pin(xxhash.xxh3_128_hexdigest(LONG), hashlib.sha256(LONG).hexdigest(), len(LONG))
    with pytest.raises(ProfileError, match=r"beside the artifact, s3://bucket/context: not there"):
        fetch_pinned(pin, store, access, Limits())
    s3fs.S3FileSystem(**s3).pipe_file(f"bucket/context/{PROFILE_FILE}", LONG)
    assert fetch_pinned(pin, store, access, Limits()) == LONG
    offline = Access(cache_dir=tmp_path / "cache", storage_options=s3, local_files_only=True)
    assert Reader(open_store("s3://bucket/context", offline)).verify() == total


@pytest.mark.filterwarnings("ignore")
def test_changes_and_refusals_on_s3(s3: dict[str, object]) -> None:
    import s3fs

    files = s3fs.S3FileSystem(**s3)
    files.pipe_file("bucket/data", LONG)
    found = RemoteStore(open_files("s3://bucket", storage_options=s3, patience=IMPATIENT))
    assert found.read("data", 1000, 100) == LONG[1000:1100]
    files.pipe_file("bucket/data", LONG[:1050])
    with pytest.raises(ChangedError):
        found.read("data", 1000, 100)
    with pytest.raises(ArtifactNotFoundError):
        found.size("nothing")
    with pytest.raises(ArtifactNotFoundError):
        RemoteStore(open_files("s3://no-such-bucket", storage_options=s3, patience=IMPATIENT)).size("data")
    closed = {**s3, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}
    with pytest.raises(StoreError):
        RemoteStore(open_files("s3://bucket", storage_options=closed, patience=Patience(1, 5))).size("data")
