"""Byte ranges over HTTP, each proved to be the range that was asked for.

General HTTP libraries hand out whatever body a server sends. Here a range counts only as a 206 whose Content-Range
names exactly the bytes asked for, uncompressed, of the same size and ETag as the file's first response; a body that
breaks off is continued from the byte where it broke. A server that ignores ranges sends the whole file with status 200:
it is accepted if its announced length is the file's, and kept on disk to serve ranges from.

The standard library's client serves: it honours proxies from the environment and needs no event loop. Headers that the
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
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from hf_cachegen.artifact import Store
from hf_cachegen.errors import (
    ArtifactNotFoundError,
    ChangedError,
    RangeError,
    StoreAccessError,
    StoreError,
    StoreTimeoutError,
)
from hf_cachegen.stores.connections import POOL, HTTPHandler, HTTPSHandler
from hf_cachegen.stores.deadline import Request
from hf_cachegen.stores.retry import Again, Patience, persist
from hf_cachegen.stores.whole import Whole, warn_once

HEAD_BYTES = 14_000
"""Asked for when a file is opened: what TCP sends at once on a new connection, so that it takes no further round trip;
most manifests and all headers fit, and need no request of their own.
"""
WHOLE_HEAD_BYTES = 1 << 20
"""A file of at most this size is taken whole when it is opened, if its server ignores ranges: all manifests are.

Of a larger one HEAD_BYTES are read and the connection is closed, since its size is not proved yet. The reader compares
the size with the manifest, whose sizes are within the limits, and asks for a range: only then the rest is fetched.
"""
_PIECE_BYTES = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,18})")
_PASSING = frozenset([408, 425, 429, 500, 502, 503, 504])
"""Statuses that another attempt may mend."""


def shown(url: str) -> str:
    """The URL as messages show it: without credentials, and without the query, which may be a signature."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class HttpFiles(Store):
    """Files behind URLs. url_of: a file's URL by its name. headers: sent to that host, and to no other.

    progress: called with the length of each piece of a body that arrives. An error that it raises ends the request.

    Threads may share it. Raises ArtifactNotFoundError and StoreError (see hf_cachegen.errors).
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
        self._headers = dict(headers or {})
        self._opener = urllib.request.build_opener(_Redirects(), HTTPHandler(POOL), HTTPSHandler(POOL))
        self._seen: dict[str, tuple[int, str]] = {}
        self._progress = progress
        self._ranged = True
        self._whole: dict[str, Whole] = {}
        self._fetching_whole = threading.Lock()

    def size(self, name: str) -> int:
        """Return the file's length in bytes, by one request."""
        return self.open(name)[0]

    def serves_ranges(self) -> bool:
        """Return False once the server answered a range request with a whole file."""
        return self._ranged

    def open(self, name: str) -> tuple[int, bytes]:
        """The file's size, and its first HEAD_BYTES (all of a shorter file)."""

        def attempt() -> tuple[int, bytes]:
            data = bytearray()
            size = self._receive(name, 0, HEAD_BYTES, data.extend, whole=False)
            return size, bytes(data)

        self._whole.pop(name, None)  # a file is opened again when its bytes were wrong
        return persist(self.patience, attempt)

    def read(self, name: str, offset: int, length: int, xxh3: str | None = None) -> bytes:
        """Exactly that range of a file that was opened."""
        data = bytearray()
        if not length:
            return b""
        if self._ranged or name not in self._seen:
            try:
                persist(
                    self.patience, lambda: self._receive(name, offset + len(data), length - len(data), data.extend)
                )
                return bytes(data)
            except _RangeIgnored:
                pass
        return self._from_whole(name, offset, length)

    def _from_whole(self, name: str, offset: int, length: int) -> bytes:
        """The range, from the whole file, which is fetched first if it is not kept yet."""
        with self._fetching_whole:  # one file at a time: the server may serve no more, and others wait for the same
            whole = self._whole.get(name)
            if whole is None:
                whole = self._whole[name] = persist(self.patience, lambda: self._fetch_whole(name))
        return whole.read(offset, length)

    def _fetch_whole(self, name: str) -> Whole:
        whole = Whole(self._seen[name][0], shown(self.url_of(name)))
        self._receive(name, 0, whole.size, whole.append)
        return whole

    def mark(self, name: str) -> str:
        """What tells that an opened file was changed (its ETag or date); empty where the server says nothing."""
        return self._seen[name][1]

    def _receive(
        self, name: str, offset: int, length: int, append: Callable[[bytes], None], *, whole: bool = True
    ) -> int:
        """One attempt: passes to `append` what comes of the range, and returns the file's size. whole: all of it must
        come; else the file may end before the range does. Raises _RangeIgnored if a whole file came for a part of it.
        """
        url = self.url_of(name)
        place = shown(url)
        request = Request(url, time.monotonic() + self.patience.seconds_for(length))
        request.add_header("Range", f"bytes={offset}-{offset + length - 1}")
        request.add_header("Accept-Encoding", "identity")
        for header, value in self._headers.items():
            request.add_unredirected_header(header, value)
        try:
            with self._opener.open(request, timeout=self.patience.timeout) as response:
                size, expected = self._check(name, place, response, offset, length, whole)
                self._body(response, expected, append, place)
                return size
        except urllib.error.HTTPError as error:
            with error:
                if not whole and offset == 0 and _is_empty(error):
                    return 0
                raise self._refusal(name, place, error) from error
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, StoreError):
                raise
            raise _broken(place, error) from error

    def _check(
        self, name: str, place: str, response: Any, offset: int, length: int, whole: bool
    ) -> tuple[int, int]:
        """(size of the file, bytes that the body must have), from the headers of a good response."""
        headers = response.headers
        if (coding := headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise RangeError(f"{place} came {coding}-compressed though uncompressed was asked for; turn that off there")
        if response.status == 200 and headers.get("Content-Length") == "0" and not whole:
            return 0, 0
        if response.status == 200:
            return self._check_whole(name, place, headers, (offset, length), whole)
        if response.status != 206:
            raise RangeError(f"{place}: asked for bytes {offset}-{offset + length - 1}, got status {response.status}")
        found = headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(found)
        first, last, size = map(int, match.groups()) if match else (-1, -1, -1)
        wanted = offset + length - 1
        if first != offset or last != (wanted if whole else min(wanted, size - 1)) or last >= size:
            raise RangeError(f"{place}: asked for bytes {offset}-{wanted}, the server sent {found!r:.60}")
        expected = last - first + 1
        if (announced := headers.get("Content-Length")) is not None and announced.strip() != str(expected):
            raise RangeError(f"{place}: {announced!r:.20} bytes announced for a range of {expected}")
        self._identify(name, place, size, headers)
        return size, expected

    def _check_whole(
        self, name: str, place: str, headers: Message, asked: tuple[int, int], whole: bool
    ) -> tuple[int, int]:
        """As `_check`, of a 200: the whole file came for a range."""
        announced = (headers.get("Content-Length") or "").strip()
        size, before = int(announced) if re.fullmatch(r"\d{1,18}", announced) else -1, self._seen.get(name)
        expected = "the length of the file" if before is None else f"{before[0]} bytes, the length of the file"
        if size < 0 or (before is None and whole) or (before is not None and size != before[0]):
            raise RangeError(
                f"{place}: the server ignores byte ranges (status 200 instead of 206); expected {expected} as "
                f"Content-Length, got {announced or 'none'!r:.20}; download the files, or serve them with one that "
                "knows ranges (nginx, an object store, the Hub)"
            )
        self._identify(name, place, size, headers)
        self._ranged = False
        warn_once(place)
        if not whole:
            return size, size if size <= WHOLE_HEAD_BYTES else HEAD_BYTES
        if asked != (0, size):
            raise _RangeIgnored
        return size, size

    def _identify(self, name: str, place: str, size: int, headers: Message) -> None:
        """Compares the file with what it was at first. Raises ChangedError."""
        identity = (size, headers.get("ETag") or headers.get("Last-Modified") or "")
        if self._seen.setdefault(name, identity) != identity:
            raise ChangedError(f"{place} changed while it was being read: {self._seen[name]} became {identity}")

    def _body(self, response: Any, expected: int, append: Callable[[bytes], None], place: str) -> None:
        left = expected
        while left:
            piece = response.read1(min(left, _PIECE_BYTES))
            if not piece:
                raise Again(StoreError(f"{place}: the connection ended {left} bytes early, in every attempt"))
            append(piece)
            left -= len(piece)
            if self._progress is not None:
                self._progress(len(piece))

    def _refusal(self, name: str, place: str, error: urllib.error.HTTPError) -> Exception:
        """What a status of 300 or more means."""
        code, headers = error.code, error.headers
        said = headers.get("X-Error-Message") or error.reason or ""
        text = f"{place}: {code} {''.join(c for c in str(said) if c.isprintable())[:200]}".rstrip()
        if code in (401, 403):
            return StoreAccessError(f"{text}; pass a token (or headers) with the right to read it")
        if code in (404, 410):
            return ArtifactNotFoundError(f"there is no {place} ({code})")
        if code == 412:
            return ChangedError(f"{text}; it changed while it was being read")
        if code == 416:
            match = _UNSATISFIED.fullmatch(headers.get("Content-Range", ""))
            before = self._seen.get(name)
            if match and before and int(match[1]) != before[0]:
                return ChangedError(f"{place} changed while it was being read: {before[0]} bytes became {match[1]}")
            return RangeError(f"{text}; the server refuses a range that the file has")
        if code in _PASSING:
            return Again(StoreError(f"{text}, in every attempt; try again later"), _retry_after(headers))
        return StoreError(text)


class _RangeIgnored(Exception):
    """The server sent a whole file, of the right length, for a part of it."""


def _is_empty(error: urllib.error.HTTPError) -> bool:
    """Whether this refuses a range because the file has no bytes."""
    match = _UNSATISFIED.fullmatch(error.headers.get("Content-Range", ""))
    return error.code == 416 and match is not None and int(match[1]) == 0


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects between http and https alone, never down from https, and leaves tokens behind elsewhere."""

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # Python 3.10 does not know it

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            fp.close()
            raise StoreError(f"{shown(req.full_url)} redirects to {shown(newurl)}, which is less safe: not followed")
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


def _broken(place: str, error: Exception) -> Exception:
    """What an exception of the connection means; many are wrapped in an URLError."""
    cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return StoreError(f"{place}: the server's certificate is not valid: {cause.verify_message}")
    if isinstance(cause, TimeoutError):
        return Again(StoreTimeoutError(f"{place}: no whole answer in time, in every attempt"))
    return Again(StoreError(f"{place}: {type(cause).__name__}: {cause}, in every attempt"))


def _retry_after(headers: Message) -> float | None:
    """Seconds that the server asks to wait, given as such or as a date; None where it says nothing of use."""
    value = (headers.get("Retry-After") or "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
