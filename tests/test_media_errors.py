"""Media that do not fit: each ends in a typed error or in recomputation, never in the tokens of another picture."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import BatchFeature

from hf_cachegen.artifact import MANIFEST_FILE, manifest
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.cli.prompts import Asked
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import (
    ManifestError,
    PromptMismatchError,
    TensorError,
    UnsupportedFormatError,
    UnsupportedModelError,
    WrongWeightsError,
)
from hf_cachegen.generation import generate
from hf_cachegen.models.media import MediaInputs, media_from_list
from hf_cachegen.prefix_cache import PrefixCache
from hf_cachegen.stores import Access
from tests.cli_support import run, run_json
from tests.generation_support import fed
from tests.media_support import FAMILIES, PLACEHOLDER, inputs, make, shared

FAMILY = FAMILIES["qwen2_5_vl"]
CONTEXT = inputs(FAMILY, 5, "a", 6)
QUESTION = inputs(FAMILY, 5, "a", 6, 7)
LOSSLESS = CacheGenConfig(lossless=True)


@pytest.fixture(name="artifact")
def _artifact(tmp_path: Path) -> Path:
    CacheGenCache.from_context(shared("qwen2_5_vl"), CONTEXT).save_pretrained(tmp_path / "context", LOSSLESS)
    return tmp_path / "context"


def generated(model: Any, given: dict[str, Any], **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(**given, do_sample=False, max_new_tokens=6, **options)
    return found


def without(given: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in names}


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    """Change the manifest, and its checksum."""
    path = folder / MANIFEST_FILE
    members = json.loads(path.read_text())
    edit(members)
    members.pop("xxh3")
    lines = ["{"] + [f"{json.dumps(name)}:{json.dumps(value)}," for name, value in sorted(members.items())]
    body = ("\n".join(lines) + "\n").encode()
    path.write_bytes(body + f'"xxh3":"{manifest.digest(body)}"\n}}\n'.encode())
    return folder


def test_a_processors_whole_output_is_a_context() -> None:
    model = shared("qwen2_5_vl")
    found = CacheGenCache.from_context(model, BatchFeature(dict(CONTEXT)))
    (medium,) = found.fingerprint.media
    assert (medium.kind, medium.items, medium.first, medium.end) == ("image", 1, 6, 10)
    text = without(inputs(FAMILY, 9), "mm_token_type_ids")
    assert CacheGenCache.from_context(model, text).fingerprint.media == ()


def test_another_picture_is_an_error_on_request() -> None:
    model = shared("qwen2_5_vl")
    cache = CacheGenCache.from_context(model, CONTEXT)
    other = inputs(FAMILY, 5, "b", 6, 7)
    assert torch.equal(other["input_ids"], QUESTION["input_ids"])
    with pytest.raises(PromptMismatchError, match="does not begin with the whole context"):
        generated(model, other, cache=cache, on_mismatch="error")
    generated(model, QUESTION, cache=cache, on_mismatch="error")


def test_a_prompt_of_other_media_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = shared("qwen2_5_vl")
    cache = CacheGenCache.from_context(model, CONTEXT)
    with caplog.at_level(logging.INFO, "hf_cachegen"):
        generated(model, inputs(FAMILY, 5, "b", 6, 7), cache=cache)
    assert "leaves the context after 6 of 17 tokens; 6 are reused" in caplog.text


SAME: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "dtype": lambda given: {**given, "pixel_values": given["pixel_values"].double()},
    "one value": lambda given: {**given, "pixel_values": given["pixel_values"].index_fill(0, torch.tensor(3), 0.0)},
    "grid": lambda given: {**given, "image_grid_thw": torch.tensor([[1, 2, 8]])},
    "no token types": lambda given: without(given, "mm_token_type_ids"),
    "no media": lambda given: without(given, "mm_token_type_ids", "pixel_values", "image_grid_thw"),
}


@pytest.mark.parametrize("change", SAME)
def test_whatever_determines_keys_is_compared(change: str) -> None:
    model, given = shared("qwen2_5_vl"), SAME[change](QUESTION)
    cache = CacheGenCache.from_context(model, CONTEXT)
    expected = generated(make("qwen2_5_vl"), given)
    with fed(model) as lengths:
        assert torch.equal(generated(model, given, cache=cache), expected)
    assert lengths[0] == 24 - 6, "the tokens before the picture are reused"


def test_a_context_of_text_alone_does_not_serve_a_picture() -> None:
    """Its placeholders were read as ordinary tokens."""
    model = shared("qwen2_5_vl")
    cache = CacheGenCache.from_context(model, CONTEXT["input_ids"])
    with fed(model) as lengths:
        assert torch.equal(generated(model, QUESTION, cache=cache), generated(make("qwen2_5_vl"), QUESTION))
    assert lengths[0] == 24 - 6
    with pytest.raises(PromptMismatchError):
        generated(model, QUESTION, cache=cache, on_mismatch="error")


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two pictures, one place": (
        {**CONTEXT, **{name: torch.cat([CONTEXT[name]] * 2) for name in ("pixel_values", "image_grid_thw")}},
        TensorError, r"2 images do not fit the 4 image tokens .*grids need 8",
    ),
    "a larger picture": (
        {**CONTEXT, "image_grid_thw": torch.tensor([[1, 4, 8]])}, TensorError, "their grids need 8",
    ),
    "no placeholders": ({**inputs(FAMILY, 9), "pixel_values": CONTEXT["pixel_values"],
                         "image_grid_thw": CONTEXT["image_grid_thw"]}, TensorError, "do not fit the 0 image tokens"),
    "token types in a text": (
        {**CONTEXT, "mm_token_type_ids": torch.ones_like(CONTEXT["input_ids"])}, UnsupportedModelError,
        "mm_token_type_ids other than 0 in a text",
    ),
    "token types of another length": (
        {**CONTEXT, "mm_token_type_ids": CONTEXT["mm_token_type_ids"][:, 1:]}, TensorError, "as input_ids, got",
    ),
    "token types without media": (
        without(CONTEXT, "pixel_values", "image_grid_thw"), TensorError, "other than 0 without media",
    ),
    "lists": ({**CONTEXT, "pixel_values": CONTEXT["pixel_values"].tolist()}, TensorError, 'return_tensors="pt"'),
    "pads": ({**CONTEXT, "attention_mask": torch.zeros_like(CONTEXT["input_ids"])}, TensorError, "without pads"),
    "an unknown input": (
        {**CONTEXT, "image_patches": torch.ones(1)}, UnsupportedModelError, r"leave out \['image_patches'\]",
    ),
    "sound": (
        {**without(CONTEXT, "pixel_values", "image_grid_thw"), "input_features": torch.ones(1, 8, 32)},
        UnsupportedModelError, "the tokens of its audios are not known",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_media_that_do_not_fit_are_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CacheGenCache.from_context(shared("qwen2_5_vl"), given)


def test_a_number_of_features_that_the_model_finds_wrong() -> None:
    given = inputs(FAMILIES["llava"], 5, "a", 6)
    given["input_ids"][0, 3] = PLACEHOLDER
    with pytest.raises(TensorError, match="the model cannot put the media into tokens 0 to 17"):
        CacheGenCache.from_context(shared("llava"), given)


def test_a_prompt_whose_media_do_not_fit_is_refused() -> None:
    model = shared("qwen2_5_vl")
    cache = CacheGenCache.from_context(model, CONTEXT)
    second = inputs(FAMILY, 5, "a", 6, "c", 4)
    for names in (("pixel_values", "image_grid_thw"),):
        given = {**second, **{name: QUESTION[name] for name in names}}
        with pytest.raises(TensorError, match="1 images do not fit the 8 image tokens"):
            generated(model, given, cache=cache)
    with pytest.raises(UnsupportedModelError, match="position_ids beside media"):
        generated(model, {**QUESTION, "position_ids": torch.arange(24)[None]}, cache=cache)
    with pytest.raises(UnsupportedModelError, match=r"model inputs \['image_embeds'\]"):
        generated(model, {**QUESTION, "image_embeds": torch.ones(1)}, cache=cache)
    with pytest.raises(UnsupportedModelError, match="mm_token_type_ids other than 0"):
        generated(model, without(QUESTION, "pixel_values", "image_grid_thw"), cache=cache)


def test_pictures_whose_tokens_are_not_known_are_reused_together() -> None:
    """Two pictures of three runs of placeholders, whose sizes may differ."""
    config = shared("llava").config
    ids = torch.tensor([[3, *[PLACEHOLDER] * 4, 5, PLACEHOLDER, 5, *[PLACEHOLDER] * 3, 6]])
    given = {"pixel_values": torch.ones(2, 3, 16, 16), "image_sizes": torch.tensor([[16, 16], [8, 16]])}
    (span,) = MediaInputs(config, ids, given).spans[0]
    assert (span.items, span.first, span.end) == (2, 1, 11)
    with pytest.raises(UnsupportedModelError, match="the 2 images cannot be assigned to rows"):
        _ = MediaInputs(config, torch.cat([ids, ids]), given).spans
    one = {"pixel_values": torch.ones(1, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]])}
    context = MediaInputs(config, ids[:, :6], one).media()
    assert [(medium.items, medium.first, medium.end) for medium in context] == [(1, 1, 5)]


DAMAGED: dict[str, Any] = {
    "no list": "media",
    "no object": [1],
    "kind": [{"kind": "smell", "items": 1, "first": 6, "end": 10, "digest": "0" * 32}],
    "digest": [{"kind": "image", "items": 1, "first": 6, "end": 10, "digest": "xyz"}],
    "number": [{"kind": "image", "items": True, "first": 6, "end": 10, "digest": "0" * 32}],
    "no items": [{"kind": "image", "items": 0, "first": 6, "end": 10, "digest": "0" * 32}],
    "backwards": [{"kind": "image", "items": 1, "first": 10, "end": 6, "digest": "0" * 32}],
    "before the text": [{"kind": "image", "items": 1, "first": -1, "end": 6, "digest": "0" * 32}],
    "too long": [{"kind": "image", "items": 1, "first": 6, "end": 18, "digest": "0" * 32}],
    "order": [{"kind": "image", "items": 1, "first": first, "end": first + 2, "digest": "0" * 32} for first in (6, 7)],
    "missing": None,
}


@pytest.mark.parametrize("media", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_table_of_media_is_refused(media: Any, artifact: Path) -> None:
    rewritten(artifact, lambda members: members["fingerprint"].update(media=media))
    with pytest.raises(ManifestError, match="medi"):
        CacheGenCache.from_pretrained(artifact, model=shared("qwen2_5_vl"))


def test_more_media_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_cachegen.models.media.MAX_MEDIA", 1)
    row = {"kind": "image", "items": 1, "first": 6, "end": 10, "digest": "0" * 32}
    assert media_from_list([row])[0].end == 10
    with pytest.raises(ManifestError, match="at most 1 media"):
        media_from_list([row, row])


def test_a_digest_of_another_picture_costs_its_reuse(artifact: Path) -> None:
    rewritten(artifact, lambda members: members["fingerprint"]["media"][0].update(digest="0" * 32))
    model = make("qwen2_5_vl")
    cache = CacheGenCache.from_pretrained(artifact, model=model)
    with pytest.raises(PromptMismatchError):
        generated(model, QUESTION, cache=cache, on_mismatch="error")


def test_an_earlier_reader_refuses_the_artifact(artifact: Path) -> None:
    data = (artifact / MANIFEST_FILE).read_bytes()
    with pytest.raises(UnsupportedFormatError, match="media"):
        manifest.loads(data, features=manifest.FEATURES - {"media"})
    rewritten(artifact, lambda members: members.update(required=[]))
    with pytest.raises(ManifestError, match=r"has 1 media, which the required features \[\] contradict"):
        CacheGenCache.from_pretrained(artifact, model=shared("qwen2_5_vl"))


def test_no_chunk_of_a_context_with_media_is_recomputed_from_its_tokens(artifact: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"no chunk can be recomputed.* or the context has media"):
        CacheGenCache.stream(artifact, shared("qwen2_5_vl"), level="text")


def test_the_prefix_cache_leaves_prompts_with_media_alone(tmp_path: Path, own_cache: None) -> None:
    model = make("qwen2_5_vl")
    prefix_cache = PrefixCache(tmp_path / "prefixes", block_tokens=4, min_tokens=4)
    for letter in "ab":
        given = inputs(FAMILY, 5, letter, 6, 7)
        expected = generated(make("qwen2_5_vl"), given)
        found = generate(model, **given, prefix_cache=prefix_cache, do_sample=False, max_new_tokens=6)
        assert torch.equal(found, expected)
        prefix_cache.flush()
    assert (prefix_cache.stats().unsupported, prefix_cache.stats().blocks_stored) == (2, 0)


def test_inspect_shows_media(artifact: Path) -> None:
    (row,) = run_json("inspect", artifact)["media"]
    assert (row["kind"], row["items"], row["first"], row["end"]) == ("image", 1, 6, 10)
    assert row["digest"] in run("inspect", artifact).stdout


def test_the_command_line_has_no_pictures_to_pass(artifact: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a context with pictures, video or audio, which this command"):
        Asked("w1", None).ids(str(artifact), Access(), None, as_json=True)


def test_a_probe_is_of_the_text(artifact: Path) -> None:
    model = make("qwen2_5_vl")
    CacheGenCache.from_pretrained(artifact, model=model)
    model.model.language_model.layers[1].register_forward_hook(lambda _, given, output: output + 0.5)
    with pytest.raises(WrongWeightsError, match="look for forward hooks"):
        CacheGenCache.from_pretrained(artifact, model=model)


def test_paligemma_is_refused_with_the_reason() -> None:
    config = hf.PaliGemmaConfig(
        text_config={"model_type": "gemma", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
        vision_config={"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48,
                       "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8,
                       "projection_dim": 32},
        image_token_index=PLACEHOLDER, projection_dim=32,
    )  # fmt: skip
    model = hf.PaliGemmaForConditionalGeneration(config).eval()
    with pytest.raises(UnsupportedModelError, match="attends in both directions over the whole prompt"):
        CacheGenCache.from_context(model, torch.tensor([[3, 4, 5]]))
