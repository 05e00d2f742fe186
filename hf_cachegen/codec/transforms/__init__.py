"""The transforms, by name. To add one, add a file here and an entry in BUILT_IN, and its name in
`config.TransformName`.

Code outside the package adds its own with `register`.
"""

from __future__ import annotations

from hf_cachegen.codec.transforms.delta import Delta
from hf_cachegen.codec.transforms.identity import Identity
from hf_cachegen.codec.transforms.klt import Klt
from hf_cachegen.codec.transforms.lossless import Lossless
from hf_cachegen.codec.transforms.protocol import Fitted, Transform
from hf_cachegen.config import CacheGenConfig, add_transform_name, remove_transform_name
from hf_cachegen.errors import ConfigError

__all__ = ["Fitted", "Transform", "register", "transform_of", "unregister"]

BUILT_IN: tuple[type[Transform], ...] = (Identity, Delta, Klt, Lossless)
_BY_NAME = {transform.name: transform for transform in BUILT_IN}


def register(transform: type[Transform]) -> None:
    """Add a transform: `CacheGenConfig(transform=transform.name)` then selects it.

    Raises:
        ConfigError: Another transform has this name.
    """
    if transform.name in _BY_NAME:
        raise ConfigError(f"the name of {transform.__name__} must be new, got {transform.name!r}: choose another name")
    add_transform_name(transform.name)
    _BY_NAME[transform.name] = transform


def unregister(name: str) -> None:
    """Remove a transform that was added by `register`."""
    if _BY_NAME.get(name) not in (None, *BUILT_IN):
        remove_transform_name(name)
        del _BY_NAME[name]


def transform_of(config: CacheGenConfig) -> type[Transform]:
    """Return the transform that a configuration selects.

    Raises:
        ConfigError: The name is not registered, or is still "auto", which `choosing.resolved` replaces.
    """
    found = _BY_NAME.get(Lossless.name if config.lossless else config.transform)
    if found is None:
        raise ConfigError(f"transform must be one of {sorted(_BY_NAME)} here, got {config.transform!r}")
    return found
