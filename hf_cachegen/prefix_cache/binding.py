"""What ties a prefix cache to one state of one model: the family of its blocks, and how fast it computes and loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hf_cachegen.errors import CorruptError, ManifestError, UnsupportedModelError, WrongWeightsError
from hf_cachegen.models import probe
from hf_cachegen.models.compat import unwrapped
from hf_cachegen.models.continuation import Continuation, continuation_of
from hf_cachegen.models.fingerprint import Fingerprint
from hf_cachegen.models.identity import identify
from hf_cachegen.models.kinds import holds_states, is_plain, layer_contents
from hf_cachegen.models.requirements import masks_windows, require_model
from hf_cachegen.prefix_cache.block import Block
from hf_cachegen.prefix_cache.coding import Coding
from hf_cachegen.prefix_cache.keys import PROBE, Family, family_of
from hf_cachegen.prefix_cache.policy import LoadSpeed
from hf_cachegen.profiles.finding import for_encoding
from hf_cachegen.streaming.prefill_speed import PrefillSpeed, speed_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_cachegen.prefix_cache.storage import Storage


@dataclass(frozen=True)
class Binding:
    """A family, and what is known about it in this process.

    Attributes:
        family: what its blocks belong to.
        coding: how they are encoded.
        prefill: how fast the model computes.
        continuation: how it continues from recurrent states; None for a model without them.
        load: how fast blocks are loaded.
        decode: how fast they are decoded.
    """

    family: Family
    coding: Coding
    prefill: PrefillSpeed
    continuation: Continuation | None
    load: LoadSpeed = field(default_factory=LoadSpeed)
    decode: LoadSpeed = field(default_factory=LoadSpeed)


def bind(prefix_cache: Storage, model: PreTrainedModel) -> Binding:
    """Return the binding of a model as it is now; another adapter or an edited weight gives another one.

    Raises:
        UnsupportedModelError: the model keeps no cache that can be reused.
        ProfileError: the profile cannot be read. WrongModelError: it is another model's.
        LevelError: the config has no such level.
    """
    require_model(model)
    states = holds_states(model.config)
    contents = layer_contents(model.config)
    unfit = {
        "index keys": any(content.indexed for content in contents),
        "states and a window in one layer": any(content.states and content.window for content in contents),
        "layers that share the keys of others": not states and not is_plain(model.config),
        "windows that its mask does not hide": not masks_windows(model),
    }
    if wrong := [name for name, found in unfit.items() if found]:
        raise UnsupportedModelError(
            f"a prefix cache stores keys, values and states, and {type(unwrapped(model)).__name__} has "
            f"{' and '.join(wrong)}: use CacheGenCache.from_context, which keeps them"
        )
    continuation = continuation_of(model) if states else None
    rules = prefix_cache.rules
    profile = None if rules.config.lossless else for_encoding(rules.profile, model)
    fingerprint = Fingerprint.of(model, []).to_dict()
    digest = None if profile is None else profile.digest
    own = _own_probe(model)
    family = family_of(fingerprint, rules.config.to_dict(), rules.level, digest, rules.block_tokens, own)
    coding = Coding(rules.config, rules.level, profile)
    found: Binding = prefix_cache.binding(family.text, lambda: Binding(family, coding, speed_of(model), continuation))
    return found


def _own_probe(model: PreTrainedModel) -> str:
    """Take the probe of the first token ids of the vocabulary, once for each state of a model object."""
    identity = identify(model)
    if not identity.taken:
        ids = [number % model.config.get_text_config(decoder=True).vocab_size for number in range(probe.PROBE_TOKENS)]
        identity.taken.append(probe.record(*probe.run(model, ids)))
    return identity.taken[0]


def require_member(block: Block, depth: int, own: Family) -> None:
    """Raise an error for a block of another model or codec, or whose model computed something else.

    The key of a first block proves its family and its number. That of a later one proves the parent and the tokens.

    Args:
        block: as its file was parsed.
        depth: number of blocks before it.
        own: family of the model, with a probe.

    Raises:
        CorruptError: the block claims another number, or another family than the first block of its chain.
        ManifestError: the probe of the block is none.
        WrongWeightsError: the probes differ, though the weights are the same.
    """
    if block.depth != depth or block.family.salt != own.salt:
        same = "the same" if block.family.salt == own.salt else "another"
        raise CorruptError(
            f"expected block {depth} of its chain, of the family of the first, found block {block.depth} of {same} "
            "family"
        )
    recorded, taken = block.family.fields.get(PROBE), own.fields[PROBE]
    if recorded is None or recorded == taken:
        return
    if not isinstance(recorded, str):
        raise ManifestError(f"expected a probe as text in a block, found {recorded!r:.40}")
    found, allowed = probe.apart(recorded, taken), probe.tolerance_of(str(own.fields["fingerprint"]["dtype"]))
    if not found <= allowed:
        raise WrongWeightsError(
            f"the model of a block had the same weights, but its keys and values for the first {probe.PROBE_TOKENS} "
            f"token ids differ by {found:.2g} (relative; rounding allows {allowed:.2g}): it had other forward hooks, "
            "attributes or code"
        )
