"""Every error that the package raises on purpose.

    CacheGenError
    ├── ConfigError (ValueError)               an option is out of its range
    ├── TensorError (ValueError)               tensors that cannot be encoded: shape, dtype, NaN
    ├── UnsupportedLayerError (NotImplementedError)   a cache layer kind that this version does not handle
    ├── UnsupportedModelError (NotImplementedError)   a model or call that cannot reuse a cache (encoder-decoder, ...)
    ├── ReadOnlyCacheError (TypeError)         something tried to write into a CacheGenCache
    ├── ProfileError (ValueError)              a profile that is missing, damaged, or of another model
    ├── NativeError (RuntimeError)             a compiled library is damaged or failed
    ├── MissingExtraError (ImportError)        an optional package is not installed
    ├── PrefixCacheError (OSError)             the prefix cache cannot read or write its directory
    ├── StreamCancelledError (RuntimeError)    a stream that its user cancelled before the context was in place
    ├── ArtifactError                          the files of an artifact
    │   ├── ArtifactNotFoundError (FileNotFoundError)
    │   ├── ArtifactExistsError (FileExistsError)
    │   ├── ManifestError (ValueError)         the manifest is damaged, or contradicts itself or its files
    │   ├── UnsupportedFormatError (NotImplementedError)  a later format version, or an unknown required feature
    │   ├── LimitError (ValueError)            a count or size above the caller's limits
    │   ├── TruncatedError (EOFError)          a file or a stream ends too early
    │   ├── CorruptError (ValueError)          bytes that are not what was written (checksum, coder's own check)
    │   ├── SignatureError (ValueError)        not signed, or not what was signed, with the key that was asked for
    │   └── LevelError (ValueError)            a level that the artifact does not have
    ├── StoreError (OSError)                   a place on the network that cannot be reached, or fails
    │   ├── StoreAccessError (PermissionError) the place refuses: no token, a wrong one, no right
    │   ├── StoreTimeoutError (TimeoutError)   no answer, or too slow a one, in every attempt
    │   ├── RangeError                         a server that does not serve byte ranges rightly
    │   ├── ChangedError                       the files changed while they were read
    │   ├── ConflictError                      somebody else pushed to the same place at the same time
    │   └── OfflineError (FileNotFoundError)   only the local cache may be used, and it lacks what is needed
    └── MismatchError                          a sound cache that belongs to something else
        ├── WrongModelError                    another architecture or configuration
        ├── WrongWeightsError                  the same configuration with other weights, or another adapter
        ├── WrongDtypeError                    the model runs in another dtype
        ├── WrongTokenizerError                another tokenizer or chat template
        └── PromptMismatchError                the prompt does not begin with the cached context

A message says what was expected, what was found, where, and what to do.
"""

from __future__ import annotations


class CacheGenError(Exception):
    """Root of all errors of this package."""


class ConfigError(CacheGenError, ValueError):
    """An option is out of its range."""


class TensorError(CacheGenError, ValueError):
    """Tensors that cannot be encoded: their shapes, dtypes or values."""


class UnsupportedLayerError(CacheGenError, NotImplementedError):
    """A cache layer kind that this version does not handle."""


class UnsupportedModelError(CacheGenError, NotImplementedError):
    """A model, or a way of calling it, that cannot reuse a cache."""


class ReadOnlyCacheError(CacheGenError, TypeError):
    """Something tried to write into a CacheGenCache."""


class ProfileError(CacheGenError, ValueError):
    """A profile is missing, damaged, or of another model."""


class NativeError(CacheGenError, RuntimeError):
    """A compiled library is damaged, or reported a failure."""


class MissingExtraError(CacheGenError, ImportError):
    """An optional package is not installed; the message names the extra to install."""


class PrefixCacheError(CacheGenError, OSError):
    """The prefix cache cannot read or write its directory."""


class StreamCancelledError(CacheGenError, RuntimeError):
    """A stream was cancelled by its user before the context was in place."""


class ArtifactError(CacheGenError):
    """Something is wrong with the files of an artifact."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """There is no artifact at this place."""


class ArtifactExistsError(ArtifactError, FileExistsError):
    """There is something at this place already."""


class ManifestError(ArtifactError, ValueError):
    """The manifest is damaged, or contradicts itself or its files."""


class UnsupportedFormatError(ArtifactError, NotImplementedError):
    """A later format version, or a required feature that this version does not know."""


class LimitError(ArtifactError, ValueError):
    """A count or a size is above the limits."""


class TruncatedError(ArtifactError, EOFError):
    """A file or a stream ends too early."""


class CorruptError(ArtifactError, ValueError):
    """Bytes that are not what was written."""


class SignatureError(ArtifactError, ValueError):
    """Not signed with the key that was asked for, or not what was signed."""


class LevelError(ArtifactError, ValueError):
    """A level that the artifact does not have."""


class StoreError(CacheGenError, OSError):
    """A place on the network cannot be reached, or fails in every attempt."""


class StoreAccessError(StoreError, PermissionError):
    """The place refuses: there is no token, a wrong one, or one without the right."""


class StoreTimeoutError(StoreError, TimeoutError):
    """No answer within the time limit, or too slow a one, in every attempt."""


class RangeError(StoreError):
    """The server does not serve byte ranges rightly: it compresses them, or sends other ones, or a wrong length."""


class ChangedError(StoreError):
    """The files changed while they were being read: begin again."""


class ConflictError(StoreError):
    """Somebody else pushed to the same place in the meantime."""


class OfflineError(StoreError, FileNotFoundError):
    """Only the local cache may be used, and it lacks what is needed."""


class MismatchError(CacheGenError):
    """A sound cache that belongs to something else."""


class WrongModelError(MismatchError):
    """The cache was made by another architecture or configuration."""


class WrongWeightsError(MismatchError):
    """The cache was made by the same configuration with other weights, or another adapter."""


class WrongDtypeError(MismatchError):
    """The cache was made by the model in another dtype."""


class WrongTokenizerError(MismatchError):
    """The cache was made with another tokenizer or chat template."""


class PromptMismatchError(MismatchError):
    """The prompt does not begin with the cached context."""
