"""Pin: a manifest's description of the profile that decoding needs, and the test whether a file is that profile."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from hf_cachegen.artifact.manifest import Limits
from hf_cachegen.errors import ManifestError

if TYPE_CHECKING:
    from hf_cachegen.codec.profile import Profile

_DIGEST = re.compile(r"[0-9a-f]{32}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Pin:
    """The description of the profile that an artifact needs. Older artifacts have only `digest`, and perhaps `model`.

    Attributes:
        digest: XXH3-128 of the file, in hex.
        sha256: SHA-256 of the file, in hex.
        nbytes: Length of the file.
        model: Name of the model that it was learnt from.
        place: The repository that held it (hf://..., at a commit).
    """

    digest: str
    sha256: str | None = None
    nbytes: int | None = None
    model: str = ""
    place: str | None = None

    def __str__(self) -> str:
        return f"profile {self.digest} of model {self.model or 'unknown'!r:.200}"

    @classmethod
    def from_codec(cls, codec: Mapping[str, Any]) -> Pin:
        """Read the `codec` of an untrusted manifest. Raises ManifestError."""
        named = codec.get("profile")
        if not isinstance(named, dict):
            raise ManifestError("codec.profile must be an object with the digest of a profile")
        digest, sha256, nbytes, location = (named.get(name) for name in ("digest", "sha256", "bytes", "place"))
        if not (isinstance(digest, str) and _DIGEST.fullmatch(digest)):
            raise ManifestError(f"codec.profile.digest must be 32 hex digits, got {digest!r:.80}")
        if sha256 is not None and not (isinstance(sha256, str) and _SHA256.fullmatch(sha256)):
            raise ManifestError(f"codec.profile.sha256 must be 64 hex digits, got {sha256!r:.80}")
        if nbytes is not None and (type(nbytes) is not int or nbytes < 0):
            raise ManifestError(f"codec.profile.bytes must be an integer of at least 0, got {nbytes!r:.80}")
        # With any other URL an untrusted artifact could choose the hosts that a reader contacts.
        if location is not None and not (isinstance(location, str) and location.startswith("hf://")):
            raise ManifestError(f"codec.profile.place must be a repository on the Hub, hf://..., got {location!r:.80}")
        return cls(digest, sha256, nbytes, str(named.get("model") or ""), location)

    @classmethod
    def of(cls, profile: Profile) -> Pin:
        """Return the description of this profile."""
        return cls(*profile.hashes, profile.model, profile.place)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that `from_codec` reads."""
        named = {"digest": self.digest, "model": self.model, "sha256": self.sha256, "bytes": self.nbytes}
        return {**named, **({"place": self.place} if self.place else {})}

    def fits(self, data: bytes) -> bool:
        """Return whether these bytes are the profile."""
        return (
            self.nbytes in (None, len(data))
            and xxhash.xxh3_128_hexdigest(data) == self.digest
            and self.sha256 in (None, hashlib.sha256(data).hexdigest())
        )

    def in_file(self, path: Path, limits: Limits) -> bytes | None:
        """Return the bytes of a local file if they are the profile; None if the file is missing or another one."""
        try:
            size = path.stat().st_size
            if not path.is_file() or size > limits.max_profile_bytes or self.nbytes not in (None, size):
                return None
            data = path.read_bytes()
        except (OSError, ValueError):  # a path that cannot be one
            return None
        return data if self.fits(data) else None
