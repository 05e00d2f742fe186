"""The prefix cache gives the tokens of a call without it, in every decoding mode, and computes nothing twice."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_cachegen
from hf_cachegen import CacheGenConfig, PrefixCache
from hf_cachegen.errors import ConfigError, LevelError, UnsupportedModelError
from hf_cachegen.generation import attach, detach, generate
from hf_cachegen.models.sampled_weights import _positions
from tests import tiny_models
from tests.generation_support import ASSISTED, MODES, each_model, fed, seeded
from tests.prefix_cache_support import WIDTH, same_as_stock, small
from tests.tiny_models import make, shared, tokens

llama = pytest.mark.parametrize("name", ["llama"])


@pytest.fixture(name="prefix_cache")
def _prefix_cache(tmp_path: Path, own_cache: None) -> PrefixCache:
    return small(tmp_path / "prefixes")


@pytest.mark.parametrize("mode", MODES)
@each_model
def test_every_mode(name: str, mode: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(40)
    for prompt in (ids, torch.cat([ids, tokens(9, 5)], 1), ids[:, :33], ids):
        same_as_stock(model, prefix_cache, prompt, **MODES[mode])
        prefix_cache.flush()
    stats = prefix_cache.stats()
    assert stats.calls == 4
    assert stats.errors == stats.unsupported == stats.blocks_damaged == 0
    if mode.startswith("static") and name in ("mistral", "gemma3"):
        return  # a static sliding layer overwrites what leaves its window, so there is nothing to store
    assert stats.hits == 3
    assert stats.tokens_reused == 40 + 32 + 39


@pytest.mark.parametrize("mode", ASSISTED)
@each_model
def test_assisted_modes(name: str, mode: str, prefix_cache: PrefixCache) -> None:
    options = dict(ASSISTED[mode])
    if mode.startswith("assisted"):
        options["assistant_model"] = shared("llama", 0 if name != "llama" else 1)
    model, ids = shared(name), tokens(40)
    for prompt in (ids, torch.cat([ids, tokens(9, 5)], 1), ids):
        same_as_stock(model, prefix_cache, prompt, **options)
        prefix_cache.flush()
    assert prefix_cache.stats().hits == 2
    assert prefix_cache.stats().errors == 0


@each_model
def test_a_chat_that_grows_computes_and_stores_only_what_is_new(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(20)
    reused, stored = 0, 0
    for turn in range(4):
        # Given, since an answer may hold the pad token, and the stock call infers the mask from those.
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "min_new_tokens": 12}
        with fed(model) as lengths:
            seeded(generate, model, ids, prefix_cache=prefix_cache, **options)
        assert lengths[0] == ids.shape[1] - reused
        answer = same_as_stock(model, prefix_cache, ids, **options)
        prefix_cache.flush()
        assert prefix_cache.stats().blocks_stored == (answer.shape[1] - 1) // WIDTH, "the answer's keys included"
        assert prefix_cache.stats().blocks_stored > stored
        stored = prefix_cache.stats().blocks_stored
        ids = torch.cat([answer, tokens(5, turn)], 1)
        reused = stored * WIDTH


@llama
def test_an_edited_chat_reuses_up_to_the_edit(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(64)
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    prefix_cache.flush()
    edited = ids.clone()
    edited[0, 35] = (edited[0, 35] - 3 + 1) % 90 + 3
    with fed(model) as lengths:
        seeded(generate, model, edited, prefix_cache=prefix_cache, do_sample=False)
    assert lengths[0] == 64 - 32
    same_as_stock(model, prefix_cache, edited, do_sample=False)


@llama
def test_another_process_begins_where_this_one_ended(name: str, prefix_cache: PrefixCache, tmp_path: Path) -> None:
    model, ids = shared(name), tokens(64)
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    prefix_cache.flush()
    again = small(tmp_path / "prefixes")
    with fed(make("llama")) as lengths:
        pass
    fresh = make("llama")
    with fed(fresh) as lengths:
        seeded(generate, fresh, ids, prefix_cache=again, do_sample=False)
    assert lengths[0] == 1, "an exact hit computes one token"


@llama
def test_other_weights_dtype_and_codec_find_nothing(name: str, prefix_cache: PrefixCache, tmp_path: Path) -> None:
    model, ids = shared(name), tokens(64)
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    prefix_cache.flush()
    others = [make(name, seed=1), make(name).to(torch.bfloat16), make("qwen3")]
    edited = make(name)
    with torch.no_grad():
        edited.model.layers[0].self_attn.k_proj.weight.mul_(1.01)
    for other in [*others, edited]:
        same_as_stock(other, prefix_cache, ids, do_sample=False)
    assert prefix_cache.stats().hits == 0
    lossy = small(tmp_path / "prefixes", config=CacheGenConfig(transform="identity"))
    seeded(generate, model, ids, prefix_cache=lossy, do_sample=False)
    assert lossy.stats().hits == 0


@llama
def test_attached_the_stock_call_does_it(name: str, prefix_cache: PrefixCache, caplog: Any) -> None:
    model, ids = make(name), tokens(40)
    expected = seeded(model.generate, ids, do_sample=False)
    assert attach(model, prefix_cache=prefix_cache) is model
    caplog.set_level(logging.INFO, "hf_cachegen.prefix_cache")
    for _ in range(2):
        assert torch.equal(seeded(model.generate, ids, do_sample=False), expected)
        prefix_cache.flush()
    assert "39 of 40 prompt tokens reused" in caplog.text
    assert prefix_cache.stats().hits == 1
    copied = copy.deepcopy(model)
    assert torch.equal(seeded(copied.generate, ids, do_sample=False), expected)
    assert prefix_cache.stats().hits == 2, "copies of a model share it"
    attach(model)
    seeded(model.generate, ids, do_sample=False)
    assert prefix_cache.stats().hits == 3, "preparing a model again keeps it"
    detach(model)
    seeded(model.generate, ids, do_sample=False)
    assert prefix_cache.stats().calls == 4


@llama
def test_a_given_cache_goes_before(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = attach(make(name), prefix_cache=prefix_cache), tokens(40)
    cache = hf_cachegen.CacheGenCache.from_context(model, ids)
    model.generate(ids, cache=cache, max_new_tokens=2)
    model.generate(ids, use_cache=False, max_new_tokens=2)
    assert prefix_cache.stats().calls == 0
    assert prefix_cache.stats().unsupported == 1


@each_model
def test_rows_of_different_documents(name: str, prefix_cache: PrefixCache) -> None:
    """Each row has its own stored prefix, another length and other pads."""
    model = shared(name)
    texts = [tokens(40, 1)[0], tokens(57, 2)[0], torch.cat([tokens(40, 1)[0], tokens(6, 9)[0]]), tokens(30, 3)[0]]
    for text in texts[:2]:
        same_as_stock(model, prefix_cache, text[None], do_sample=False)
    prefix_cache.flush()
    longest = max(len(text) for text in texts)
    ids = torch.stack([torch.nn.functional.pad(text, (longest - len(text), 0)) for text in texts])
    mask = torch.stack([torch.arange(longest) >= longest - len(text) for text in texts]).long()
    for options in (MODES["greedy"], MODES["beams"], MODES["num_return_sequences"], MODES["static cache"]):
        same_as_stock(model, prefix_cache, ids, attention_mask=mask, **options)
        prefix_cache.flush()
    assert prefix_cache.stats().errors == 0
    with fed(model) as lengths:
        seeded(generate, model, ids, attention_mask=mask, prefix_cache=prefix_cache, do_sample=False)
    assert lengths[:3] == [5, 5, 1], "the rows that were new are stored too; two end within a block"


@llama
def test_rows_that_share_a_prefix_read_it_once(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(40)
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    prefix_cache.flush()
    before = prefix_cache.stats().bytes_read
    seeded(generate, model, ids, prefix_cache=prefix_cache, do_sample=False)
    once = prefix_cache.stats().bytes_read - before
    seeded(generate, model, ids.expand(5, -1), prefix_cache=prefix_cache, do_sample=False)
    assert prefix_cache.stats().bytes_read == before + 2 * once


@llama
def test_masked_tokens_inside_and_after_the_text(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(40)
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    prefix_cache.flush()
    for hidden in ([20], [38, 39], [0, 1, 25], list(range(40))):
        mask = torch.ones_like(ids)
        mask[0, hidden] = 0
        same_as_stock(model, prefix_cache, ids, attention_mask=mask, do_sample=False)
        prefix_cache.flush()
    same_as_stock(model, prefix_cache, ids, do_sample=False)


@llama
def test_the_returned_cache_is_the_callers_own(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = shared(name), tokens(40)
    output = seeded(generate, model, ids, prefix_cache=prefix_cache, do_sample=False, return_dict_in_generate=True)
    for layer in hf_cachegen.models.compat.cache_of(output).layers:
        layer.keys.zero_()
    prefix_cache.flush()
    same_as_stock(model, prefix_cache, ids, do_sample=False)
    assert prefix_cache.stats().hits == 1


@llama
def test_calls_that_cannot_start_from_a_cache_are_the_stock_ones(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = attach(make(name), prefix_cache=prefix_cache), tokens(40)
    embeds = model.get_input_embeddings()(ids)
    assert model.generate(inputs_embeds=embeds, max_new_tokens=3).shape == (1, 3)
    output = model.generate(ids, max_new_tokens=3, output_hidden_states=True, return_dict_in_generate=True)
    assert output.hidden_states[0][0].shape[1] == 40
    assert prefix_cache.stats().unsupported == 2
    with pytest.raises(ValueError):
        model.generate(ids, max_new_tokens=-3)


@llama
def test_training_mode_and_autocast_store_nothing(name: str, prefix_cache: PrefixCache) -> None:
    model, ids = attach(make(name), prefix_cache=prefix_cache), tokens(40)
    with torch.autocast("cpu", torch.bfloat16):
        model.generate(ids, max_new_tokens=2)
    model.train()
    model.generate(ids, max_new_tokens=2)
    prefix_cache.flush()
    assert prefix_cache.stats().unsupported == 2
    assert prefix_cache.stats().blocks == 0


@llama
def test_what_fails_costs_the_reuse_and_never_the_answer(
    name: str, prefix_cache: PrefixCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_cachegen.prefix_cache import advance, call, coding, loading

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    def refuse(*_: Any, **__: Any) -> Any:
        raise hf_cachegen.errors.TensorError("cannot be encoded")

    model, ids = shared(name), tokens(40)
    for where, attribute, replacement in (
        (coding.Coding, "encode", refuse), (call.PrefixCall, "known", fail), (loading.Loader, "rows", fail),
        (advance, "dynamic_cache", fail),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(where, attribute, replacement)
            same_as_stock(model, prefix_cache, ids, do_sample=False)
            prefix_cache.flush()
        same_as_stock(model, prefix_cache, ids, do_sample=False)
        prefix_cache.flush()
    assert prefix_cache.stats().errors >= 3


@pytest.mark.parametrize("name", tiny_models.REFUSED)
def test_models_without_such_a_cache_are_refused(name: str, prefix_cache: PrefixCache) -> None:
    with pytest.raises((UnsupportedModelError, hf_cachegen.errors.UnsupportedLayerError)):
        attach(make(name), prefix_cache=prefix_cache)


@llama
def test_lossy_levels(name: str, own_cache: None, tmp_path: Path) -> None:
    model, ids = shared(name), tokens(40)
    sizes = []
    for level in (1, 2, None):
        cache = small(tmp_path / str(level), config=CacheGenConfig(transform="identity"), level=level)
        for _ in range(2):
            seeded(generate, model, ids, prefix_cache=cache, do_sample=False)
            cache.flush()
        assert cache.stats().hits == 1
        assert cache.stats().errors == cache.stats().blocks_damaged == 0
        sizes.append(cache.stats().nbytes)
    assert sizes == sorted(set(sizes))
    with pytest.raises(LevelError, match="1 to 3"):
        attach(make(name), prefix_cache=small(tmp_path / "4", config=CacheGenConfig(transform="identity"), level=4))


@llama
def test_what_is_slower_than_computing_is_computed(name: str, own_cache: None, tmp_path: Path) -> None:
    model, ids = shared(name), tokens(200)
    cache = small(tmp_path / "prefixes", reuse="auto")
    for _ in range(2):
        same_as_stock(model, cache, ids, do_sample=False)
        cache.flush()
    assert cache.stats().hits == 1, "an unknown prefix is tried"
    from hf_cachegen.prefix_cache.binding import bind

    binding = bind(cache, model)
    for _ in range(20):
        binding.load.add(1, 10.0)
    for tokens_at_once in (32, 64, 128, 256):
        binding.prefill.add(0, tokens_at_once, 1e-4)
    same_as_stock(model, cache, ids, do_sample=False)
    assert cache.stats().declined == 1
    assert cache.stats().hits == 1


@llama
def test_short_contexts_are_not_stored(name: str, own_cache: None, tmp_path: Path) -> None:
    cache = small(tmp_path / "prefixes", min_tokens=60)
    for count, expected in ((40, 0), (60, 8)):
        same_as_stock(shared(name), cache, tokens(count), do_sample=False)
        cache.flush()
        assert cache.stats().blocks == expected


def test_options_are_checked(tmp_path: Path) -> None:
    for options in (
        {"block_tokens": 0}, {"min_tokens": 1.5}, {"reuse": "never"}, {"when_full": "lose"}, {"max_bytes": "many"},
        {"max_bytes": 1000}, {"ttl": 0}, {"queue_bytes": "1 TXB"}, {"shared": "s3://bucket"},
        {"remote": "https://example.org/x"},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            PrefixCache(tmp_path / "prefixes", **options)


def test_it_is_pickled_by_its_options(prefix_cache: PrefixCache) -> None:
    again = pickle.loads(pickle.dumps(prefix_cache))
    assert again.local.directory == prefix_cache.local.directory
    assert again.rules.block_tokens == WIDTH


def _hooked(model: Any) -> None:
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, given, out: out * 1.5)


def _scaled(model: Any) -> None:
    """Edit a weight everywhere but at the values that earlier releases sampled."""
    weight = model.model.layers[0].mlp.up_proj.weight
    hidden = sorted(set(range(weight.numel())) - set(_positions(weight.numel()).tolist()))
    with torch.no_grad():
        weight.view(-1)[hidden] *= 1.5


def _buffer(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 1.5


@pytest.mark.parametrize("change", [_hooked, _scaled, _buffer], ids=lambda change: change.__name__[1:])
def test_a_changed_model_does_not_use_the_blocks_of_before(change: Any, tmp_path: Path) -> None:
    prefix_cache, model, ids = small(tmp_path), make("llama"), tokens(40)
    options = {"do_sample": False}
    same_as_stock(model, prefix_cache, ids, **options)
    prefix_cache.flush()
    same_as_stock(model, prefix_cache, ids, **options)
    assert prefix_cache.stats().hits == 1
    change(model)
    same_as_stock(model, prefix_cache, ids, **options)
    prefix_cache.flush()
    same_as_stock(model, prefix_cache, ids, **options)
    assert prefix_cache.stats().hits == 2, "the changed model has blocks of its own"
    assert prefix_cache.stats().blocks_damaged == (change is _hooked)
