"""Sizes as people write them: 20GB, 500M, 1048576."""

from __future__ import annotations

import re

from hf_cachegen.errors import ConfigError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?", re.IGNORECASE)


def parse_size(value: int | str, name: str = "max_bytes") -> int:
    """Return a number of bytes.

    Args:
        value: bytes, or a text such as "20GB" (powers of 1000) or "20GiB" (powers of 1024).
        name: what the size is called in an error.

    Raises:
        ConfigError: it is no size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or (found[3] and not found[2]):
        raise ConfigError(f"{name} must be a number of bytes or a size such as '20GB', got {value!r}")
    unit = _UNITS[found[2].upper()]
    if found[3]:
        unit = 1 << 10 * list(_UNITS).index(found[2].upper())
    return int(float(found[1]) * unit)
