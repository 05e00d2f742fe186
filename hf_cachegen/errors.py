"""The errors that the package raises on purpose.

    CacheGenError
    ├── ConfigError (ValueError)               an option is out of its range
    ├── TensorError (ValueError)               tensors that cannot be encoded: shape, dtype, NaN
    ├── UnsupportedLayerError (NotImplementedError)   a cache layer kind that this version does not support
    ├── UnsupportedModelError (NotImplementedError)   a model or call that cannot reuse a cache (encoder-decoder, ...)
    ├── ReadOnlyCacheError (TypeError)         an attempt to write into a CacheGenCache
    ├── ProfileError (ValueError)              a profile that is missing, damaged, or of another model
    ├── NativeError (RuntimeError)             a compiled library is damaged or failed
    ├── MissingExtraError (ImportError)        an optional package is not installed
    ├── PrefixCacheError (OSError)             the prefix cache cannot read or write its directory
    ├── StreamCancelledError (RuntimeError)    a stream that its user cancelled before the context was loaded
    ├── ArtifactError                          the files of an artifact
    │   ├── ArtifactNotFoundError (FileNotFoundError)
    │   ├── ArtifactExistsError (FileExistsError)
    │   ├── ManifestError (ValueError)         the manifest is damaged, or contradicts itself or its files
    │   ├── UnsupportedFormatError (NotImplementedError)  a later format version, or an unknown required feature
    │   ├── LimitError (ValueError)            a count or size is above the caller's limits
    │   ├── TruncatedError (EOFError)          a file or a stream ends too early
    │   ├── CorruptError (ValueError)          bytes differ from those written (checksum, or a check of the coder)
    │   ├── SignatureError (ValueError)        no signature by the expected key, or one of other bytes
    │   └── LevelError (ValueError)            a level that the artifact does not have
    ├── StoreError (OSError)                   a remote location cannot be reached, or fails
    │   ├── StoreAccessError (PermissionError) the location denies access: a missing or wrong token, or no permission
    │   ├── StoreTimeoutError (TimeoutError)   no answer within the time limit, in every attempt
    │   ├── RangeError                         a server that does not serve byte ranges correctly
    │   ├── ChangedError                       the files changed while they were read
    │   ├── ConflictError                      a concurrent push to the same location
    │   └── OfflineError (FileNotFoundError)   only the local cache may be used, and a file is missing from it
    └── MismatchError                          an intact cache that belongs to something else
        ├── WrongModelError                    another architecture or configuration
        ├── WrongWeightsError                  the same configuration with other weights, or another adapter
        ├── WrongDtypeError                    the model runs in another dtype
        ├── WrongTokenizerError                another tokenizer or chat template
        └── PromptMismatchError                the prompt does not begin with the cached context

A message states what was expected, what was found, where, and what to do.
"""

from __future__ import annotations


class CacheGenError(Exception):
    """Base class of all errors of this package."""


class ConfigError(CacheGenError, ValueError):
    """An option is out of its range."""


class TensorError(CacheGenError, ValueError):
    """Tensors cannot be encoded: their shapes, dtypes or values."""


class UnsupportedLayerError(CacheGenError, NotImplementedError):
    """This version does not support a cache layer kind."""


class UnsupportedModelError(CacheGenError, NotImplementedError):
    """A model, or a way of calling it, cannot reuse a cache."""


class ReadOnlyCacheError(CacheGenError, TypeError):
    """An attempt to write into a CacheGenCache."""


class ProfileError(CacheGenError, ValueError):
    """A profile is missing, damaged, or of another model."""


class NativeError(CacheGenError, RuntimeError):
    """A compiled library is damaged, or reported a failure."""


class MissingExtraError(CacheGenError, ImportError):
    """An optional package is not installed; the message names the extra to install."""


class PrefixCacheError(CacheGenError, OSError):
    """The prefix cache cannot read or write its directory."""


class StreamCancelledError(CacheGenError, RuntimeError):
    """A stream was cancelled by its user before the context was loaded."""


class ArtifactError(CacheGenError):
    """The files of an artifact are missing, damaged or not supported."""


class ArtifactNotFoundError(ArtifactError, FileNotFoundError):
    """The location holds no artifact."""


class ArtifactExistsError(ArtifactError, FileExistsError):
    """The location already holds files of an artifact."""


class ManifestError(ArtifactError, ValueError):
    """The manifest is damaged, or contradicts itself or its files."""


class UnsupportedFormatError(ArtifactError, NotImplementedError):
    """The artifact has a later format version, or requires a feature that this version does not support."""


class LimitError(ArtifactError, ValueError):
    """A count or a size is above the limits."""


class TruncatedError(ArtifactError, EOFError):
    """A file or a stream ends too early."""


class CorruptError(ArtifactError, ValueError):
    """Bytes differ from those that were written."""


class SignatureError(ArtifactError, ValueError):
    """There is no signature by the expected key, or it is of other bytes."""


class LevelError(ArtifactError, ValueError):
    """The artifact does not have this level."""


class StoreError(CacheGenError, OSError):
    """A remote location cannot be reached, or fails in every attempt."""


class StoreAccessError(StoreError, PermissionError):
    """The location denies access: the token is missing or wrong, or does not permit this."""


class StoreTimeoutError(StoreError, TimeoutError):
    """No answer within the time limit, in every attempt."""


class RangeError(StoreError):
    """The server does not serve byte ranges correctly: it compresses them, or sends other bytes or a wrong length."""


class ChangedError(StoreError):
    """The files changed while they were read. Open the artifact again."""


class ConflictError(StoreError):
    """A concurrent push changed the same location."""


class OfflineError(StoreError, FileNotFoundError):
    """Only the local cache may be used, and a file is missing from it."""


class MismatchError(CacheGenError):
    """The cache is intact, but belongs to something else."""


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
