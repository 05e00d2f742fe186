"""Byte ranges over HTTP, each checked against the request.

General HTTP libraries return any body that a server sends. Here a range must be an uncompressed 206 whose Content-Range
names exactly the requested bytes, with the size and ETag of the file's first response. An interrupted body is continued
from the byte where it broke. A server that ignores ranges sends the whole file with status 200: it is accepted if its
announced length is the file's, and kept on disk to serve ranges from.

The client is the standard library's: it honours proxies from the environment and needs no event loop. Headers that the
user gives (tokens) go to the first host alone, never along a redirect to another one.
"""

from __future__ import annotations

import email.utils
import http.client
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hf_cachegen.artifact import Store
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    CacheGenError,
    ChangedError,
    ConfigError,
    RangeError,
    StoreAccessError,
    StoreError,
    StoreTimeoutError,
)
from hf_cachegen.stores.body import Body, Sink
from hf_cachegen.stores.connections import POOL, HTTPHandler, HTTPSHandler
from hf_cachegen.stores.deadline import Request
from hf_cachegen.stores.retry import Again, Patience, persist
from hf_cachegen.stores.whole import Whole, warn_once

HEAD_BYTES = 14_000
"""Bytes requested when a file is opened: TCP sends this much on a new connection without a further round trip. Most
manifests and all headers fit, and need no request of their own.
"""
WHOLE_HEAD_BYTES = 1 << 20
"""Largest file, in bytes, that is read whole when it is opened on a server that ignores ranges; manifests are smaller.

Of a larger file HEAD_BYTES are read and the connection is closed, because its size is not checked yet. The reader
compares the size with the manifest, whose sizes are within the limits. It then asks for a range: this fetches the rest.
"""
_PIECE_BYTES = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])
"""Statuses of failures that may pass, so that another attempt is made."""


def shown(url: str) -> str:
    """Return a URL for messages: without credentials, and without the query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class HttpFiles(Store):
    """Files behind URLs. Threads may share them.

    Args:
        url_of: returns a file's URL by its name.
        headers: sent to that host, and to no other.
        patience: time limits and number of attempts.
        progress: called with the length in bytes of each piece of a body that arrives. An error that it raises ends
            the request.

    Raises:
        ConfigError: a header cannot be sent.
        ArtifactNotFoundError: when read: there is no such file.
        StoreError: when read: the server cannot be reached, refuses, or fails in every attempt.
    """

    def __init__(
        self,
        url_of: Callable[[str], str],
        headers: Mapping[str, str] | None = None,
        patience: Patience | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.url_of = url_of
        self.patience = patience or Patience()
        self._headers = _checked(headers or {})
        self._opener = _opener(tuple(sorted(urllib.request.getproxies().items())))
        self._seen: dict[str, tuple[int, str]] = {}
        self._progress = progress
        self._ranged = True
        self._whole: dict[str, Whole] = {}
        self._fetching_whole = threading.Lock()

    def size(self, name: str) -> int:
        """Return the file's length in bytes; send one request."""
        return self.open(name)[0]

    def serves_ranges(self) -> bool:
        """Return False once the server answered a range request with a whole file."""
        return self._ranged

    def open(self, name: str, first: int = 0) -> tuple[int, bytes]:
        """Return the file's size in bytes and its first bytes: `first` or HEAD_BYTES, all of a shorter file."""
        length = max(first, HEAD_BYTES)

        def attempt() -> tuple[int, bytes]:
            body = Body(max(length, WHOLE_HEAD_BYTES))  # unused memory costs nothing
            size = self._receive(name, 0, length, body, whole=False)
            return size, body.done()

        self._whole.pop(name, None)  # a file is opened again when its bytes were wrong
        return persist(self.patience, attempt)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Read exactly that range of a file that was opened."""
        if not length:
            return b""
        if self._ranged or name not in self._seen:
            body = Body(length)
            try:
                persist(
                    self.patience, lambda: self._receive(name, offset + body.filled, length - body.filled, body)
                )
                return body.done()
            except _RangeIgnored:
                pass
        return self._from_whole(name, offset, length)

    def _from_whole(self, name: str, offset: int, length: int) -> bytes:
        """Read the range from the whole file, which is fetched first if it is not kept yet."""
        with self._fetching_whole:  # one file at a time: other threads wait for the same file
            whole = self._whole.get(name)
            if whole is None:
                whole = self._whole[name] = persist(self.patience, lambda: self._fetch_whole(name))
        return whole.read(offset, length)

    def _fetch_whole(self, name: str) -> Whole:
        whole = Whole(self._seen[name][0], shown(self.url_of(name)))
        self._receive(name, 0, whole.size, whole)
        return whole

    def mark(self, name: str) -> str:
        """Return the ETag or date of an opened file, which changes with its content; empty where the server has none.
        """
        return self._seen[name][1]

    def _receive(
        self, name: str, offset: int, length: int, sink: Sink, *, whole: bool = True
    ) -> int:
        """Request a range once, receive it into `sink`, and return the file's size.

        Args:
            whole: require all of the range; else the file may end before the range does.

        Raises:
            _RangeIgnored: the server sent the whole file for a part of it.
        """
        url = self.url_of(name)
        location = shown(url)
        request = Request(url, time.monotonic() + self.patience.seconds_for(length))
        request.add_header("Range", f"bytes={offset}-{offset + length - 1}")
        request.add_header("Accept-Encoding", "identity")
        for header, value in self._headers.items():
            request.add_unredirected_header(header, value)
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as response:
                size, expected = self._check(name, location, response, offset, length, whole)
                self._body(response, expected, sink, location)
                return size
        except urllib.error.HTTPError as error:
            with error:
                if not whole and offset == 0 and _is_empty(error):
                    return 0
                raise self._refusal(name, location, error) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, StoreError):
                raise
            raise _broken(location, error) from error
        except ValueError as error:
            if isinstance(error, CacheGenError):
                raise
            raise StoreError(f"{location}: the server's answer cannot be understood: {error!a:.200}") from error

    def _check(
        self, name: str, location: str, response: Any, offset: int, length: int, whole: bool
    ) -> tuple[int, int]:
        """Check the headers of a successful response; return (size of the file, length of the body)."""
        headers = response.headers
        if (coding := headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise RangeError(
                f"{location}: expected uncompressed bytes, got {coding}: turn compression off on the server"
            )
        if response.status == 200 and headers.get("Content-Length") == "0" and not whole:
            return 0, 0
        if response.status == 200:
            return self._check_whole(name, location, headers, (offset, length), whole)
        if response.status != 206:
            raise RangeError(f"{location}: expected bytes {offset}-{offset + length - 1}, got status {response.status}")
        found = headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(found)
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        wanted = offset + length - 1
        if first != offset or last != (wanted if whole else min(wanted, size - 1)) or last >= size:
            raise RangeError(f"{location}: expected bytes {offset}-{wanted}, the server sent {found!r:.60}")
        expected = last - first + 1
        if (announced := headers.get("Content-Length")) is not None and announced.strip() != str(expected):
            raise RangeError(f"{location}: expected {expected} bytes, the server announced {announced!r:.20}")
        self._identify(name, location, size, headers)
        return size, expected

    def _check_whole(
        self, name: str, location: str, headers: Message, asked: tuple[int, int], whole: bool
    ) -> tuple[int, int]:
        """Check a response of status 200, the whole file for a range; return the same as `_check`."""
        announced = (headers.get("Content-Length") or "").strip()
        size, before = int(announced) if re.fullmatch(r"\d{1,18}", announced) else -1, self._seen.get(name)
        expected = "the length of the file" if before is None else f"{before[0]} bytes, the length of the file"
        if size < 0 or (before is None and whole) or (before is not None and size != before[0]):
            raise RangeError(
                f"{location}: the server ignores byte ranges (status 200 instead of 206); expected {expected} as "
                f"Content-Length, got {announced or 'none'!r:.20}; download the files, or use a server that supports "
                "ranges (nginx, an object store, the Hub)"
            )
        self._identify(name, location, size, headers)
        self._ranged = False
        warn_once(location)
        if not whole:
            return size, size if size <= WHOLE_HEAD_BYTES else HEAD_BYTES
        if asked != (0, size):
            raise _RangeIgnored
        return size, size

    def _identify(self, name: str, location: str, size: int, headers: Message) -> None:
        """Raise ChangedError unless the file is the one of its first response."""
        identity = (size, headers.get("ETag") or headers.get("Last-Modified") or "")
        if self._seen.setdefault(name, identity) != identity:
            raise ChangedError(f"{location} changed while it was being read: {self._seen[name]} became {identity}")

    def _body(self, response: Any, expected: int, sink: Sink, location: str) -> None:
        left = expected
        while left:
            count = response.read_into(sink.room(min(left, _PIECE_BYTES)))
            if not count:
                raise Again(StoreError(f"{location}: the connection ended {left} bytes early, in every attempt"))
            sink.took(count)
            left -= count
            if self._progress is not None:
                self._progress(count)

    def _refusal(self, name: str, location: str, error: urllib.error.HTTPError) -> Exception:
        """Return the error that a status of 300 or more stands for."""
        code, headers = error.code, error.headers
        said = headers.get("X-Error-Message") or error.reason or ""
        text = f"{location}: {code} {''.join(c for c in str(said) if c.isprintable())[:200]}".rstrip()
        if code in (401, 403):
            return StoreAccessError(f"{text}; pass a token (or headers) with the right to read it")
        if code in (404, 410):
            return ArtifactNotFoundError(f"there is no {location} ({code})")
        if code == 412:
            return ChangedError(f"{text}; it changed while it was being read")
        if code == 416:
            match = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
            before = self._seen.get(name)
            if match and before and int(match[1]) != before[0]:
                return ChangedError(f"{location} changed while it was being read: {before[0]} bytes became {match[1]}")
            return RangeError(f"{text}; the server refuses a range that the file has")
        if code in _PASSING:
            return Again(StoreError(f"{text}, in every attempt; try again later"), _retry_after(headers))
        return StoreError(text)


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers. Raise ConfigError, without their values, which may be secret, where one cannot be sent."""
    if not isinstance(headers, Mapping):
        raise ConfigError(f"expected headers as a mapping of names to values, got {type(headers).__name__}")
    for name, value in headers.items():
        sendable = isinstance(name, str) and _HEADER_NAME.fullmatch(name) is not None and isinstance(value, str)
        if not sendable or not _HEADER_VALUE.fullmatch(value):
            raise ConfigError(f"the header {name!a:.80} cannot be sent: expected a name and a text of one line")
    return dict(headers)


class _RangeIgnored(Exception):
    """The server sent a whole file, of the right length, for a part of it."""


def _is_empty(error: urllib.error.HTTPError) -> bool:
    """Report whether this refuses a range because the file has no bytes."""
    match = _UNSATISFIED.fullmatch(error.headers.get("Content-Range", ""))
    return error.code == 416 and match is not None and int(match[1]) == 0


@lru_cache(maxsize=4)
def _opener(proxies: tuple[tuple[str, str], ...]) -> urllib.request.OpenerDirector:
    """Return what opens URLs with these proxies. Threads may share it."""
    handlers = urllib.request.ProxyHandler(dict(proxies)), HTTPHandler(POOL), HTTPSHandler(POOL)
    return urllib.request.build_opener(_Redirects(), *handlers)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects between http and https alone, never from https to http; send no tokens to another host."""

    def http_error_302(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage
    ) -> Any:
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except ValueError:  # the new URL is malformed
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            fp.close()
            raise StoreError(
                f"{shown(req.full_url)} redirects to {shown(newurl)}, which is less safe and not followed: use a URL "
                "that needs no such redirect"
            )
        request = super().redirect_request(req, fp, 307 if code == 308 else code, msg, headers, newurl)
        if request is None:
            return None
        request = Request(
            request.full_url, getattr(req, "deadline", 0.0), headers=request.headers,
            origin_req_host=request.origin_req_host, unverifiable=True,
        )  # fmt: skip
        if (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.unredirected_hdrs.update(
                {k: v for k, v in req.unredirected_hdrs.items() if k not in ("Host", "Connection")}
            )
        return request


def _broken(location: str, error: Exception) -> Exception:
    """Return the error that an exception of the connection stands for; many are wrapped in a URLError."""
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return StoreError(f"{location}: the server's certificate is not valid: {cause.verify_message}")
    if isinstance(cause, TimeoutError):
        return Again(StoreTimeoutError(f"{location}: no whole answer in time, in every attempt"))
    return Again(StoreError(f"{location}: {type(cause).__name__}: {cause}, in every attempt"))


def _retry_after(headers: Message) -> float | None:
    """Return the seconds that the server asks to wait, given as a number or a date; None where it gives neither."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
