"""KV caches of Transformers models as small files, and a `generate()` that reads them back (CacheGen, SIGCOMM 2024).

The public names are imported when they are first used: `import hf_cachegen` imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_cachegen import errors
from hf_cachegen._version import __version__

if TYPE_CHECKING:
    from hf_cachegen.artifact.encoded import EncodedContext, decode_kv, encode_kv
    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.config import CacheGenConfig
    from hf_cachegen.generation import TextAnswer, attach, detach, generate, generate_text
    from hf_cachegen.prefix_cache import PrefixCache
    from hf_cachegen.profiles.files import Profile
    from hf_cachegen.profiles.learning import learn_profile

__all__ = [
    "CacheGenCache",
    "CacheGenConfig",
    "EncodedContext",
    "PrefixCache",
    "Profile",
    "TextAnswer",
    "__version__",
    "attach",
    "decode_kv",
    "detach",
    "encode_kv",
    "errors",
    "generate",
    "generate_text",
    "learn_profile",
]

_HOMES = {
    "CacheGenCache": "hf_cachegen.cache",
    "CacheGenConfig": "hf_cachegen.config",
    "EncodedContext": "hf_cachegen.artifact.encoded",
    "PrefixCache": "hf_cachegen.prefix_cache",
    "Profile": "hf_cachegen.profiles.files",
    "TextAnswer": "hf_cachegen.generation",
    "attach": "hf_cachegen.generation",
    "decode_kv": "hf_cachegen.artifact.encoded",
    "detach": "hf_cachegen.generation",
    "encode_kv": "hf_cachegen.artifact.encoded",
    "generate": "hf_cachegen.generation",
    "generate_text": "hf_cachegen.generation",
    "learn_profile": "hf_cachegen.profiles.learning",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_cachegen' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
