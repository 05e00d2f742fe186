"""The stock call `model.generate(..., cache=cache)` on a model that a CacheGenCache has prepared."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

from hf_cachegen import attach, detach
from hf_cachegen.cache import CacheGenCache
from hf_cachegen.config import CacheGenConfig
from hf_cachegen.errors import MismatchError, ReadOnlyCacheError, UnsupportedModelError
from hf_cachegen.models.compat import CACHE_ARGUMENT, CACHE_NAMES, cache_of
from tests import tiny_models
from tests.generation_support import ASSISTED, CONTEXT, MODES, batch, fed, prompt, seeded
from tests.tiny_models import attributes, shared

REFERENCE = Path(__file__).parent.parent / "eval/reference/model"
LOSSLESS = CacheGenConfig(lossless=True)
EVERY_MODE = {**MODES, **{name: options for name, options in ASSISTED.items() if "prompt_lookup" in str(options)}}


@pytest.fixture(name="artifact", scope="module")
def _artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock") / "artifact"
    CacheGenCache.from_context(tiny_models.make("llama"), CONTEXT, LOSSLESS).save_pretrained(folder)
    return folder


def made(how: str, model: Any, artifact: Path, **options: Any) -> CacheGenCache:
    if how == "from_context":
        return CacheGenCache.from_context(model, CONTEXT, **options)
    if how == "from_cache":
        stock = cache_of(model(CONTEXT, use_cache=True))
        return CacheGenCache.from_cache(stock, CONTEXT, model, **options)
    if how == "from_pretrained":
        return CacheGenCache.from_pretrained(artifact, model=model, **options)
    return CacheGenCache.stream(artifact, model, **options)


each_way = pytest.mark.parametrize("how", ["from_context", "from_cache", "from_pretrained", "stream"])


@each_way
def test_creating_a_cache_prepares_its_model(how: str, artifact: Path, own_cache: None) -> None:
    model = tiny_models.make("llama")
    before = attributes(model)
    expected = seeded(model.generate, prompt(9), do_sample=False)
    cache = made(how, model, artifact)
    with fed(model) as lengths:
        assert torch.equal(seeded(model.generate, prompt(9), cache=cache, do_sample=False), expected)
    assert lengths[0] == 9, "the context is not computed again"
    assert attributes(detach(model)) == before
    cache = made(how, model, artifact, attach=False)
    assert attributes(model) == before
    with pytest.raises(ReadOnlyCacheError, match=r"hf_cachegen.attach\(model\)"):
        model.generate(prompt(9), **{CACHE_ARGUMENT: cache}, max_new_tokens=2)


@pytest.mark.parametrize("options", EVERY_MODE.values(), ids=EVERY_MODE.keys())
@pytest.mark.parametrize("question", [9, 0, -15], ids=["question", "exact", "shorter"])
def test_every_mode(options: dict[str, Any], question: int) -> None:
    model, ids = shared("llama"), prompt(question)
    cache = CacheGenCache.from_context(model, CONTEXT)
    expected = seeded(tiny_models.make("llama").generate, ids, **options)
    inputs = transformers.BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    for name in CACHE_NAMES:
        assert torch.equal(seeded(model.generate, **inputs, **{name: cache}, **options), expected)


def test_a_batch_of_questions() -> None:
    model, inputs = shared("mistral"), batch(3, 9, 6)
    cache = CacheGenCache.from_context(model, CONTEXT)
    expected = seeded(tiny_models.make("mistral").generate, **inputs, do_sample=False)
    assert torch.equal(seeded(model.generate, **inputs, cache=cache, do_sample=False), expected)


def test_a_location_is_a_cache_of_a_prepared_model(artifact: Path) -> None:
    model = attach(tiny_models.make("llama"))
    expected = seeded(tiny_models.make("llama").generate, prompt(9), do_sample=False)
    for location in (artifact, str(artifact)):
        with fed(model) as lengths:
            assert torch.equal(seeded(model.generate, prompt(9), cache=location, do_sample=False), expected)
        assert lengths[0] == 9


def test_a_cache_of_another_model_is_refused(artifact: Path) -> None:
    cache = CacheGenCache.from_context(shared("llama"), CONTEXT)
    with pytest.raises(MismatchError, match="the cache"):
        attach(tiny_models.make("llama", 1)).generate(prompt(9), cache=cache, max_new_tokens=2)
    with pytest.raises(ReadOnlyCacheError, match=r"hf_cachegen.attach\(model\)"):
        tiny_models.make("llama", 1).generate(prompt(9), **{CACHE_ARGUMENT: cache}, max_new_tokens=2)


STOCK_CACHES = {
    "dynamic": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=80),
}


@pytest.mark.parametrize("make", STOCK_CACHES.values(), ids=STOCK_CACHES.keys())
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_any_other_cache_passes_through(make: Any, name: str) -> None:
    model = attach(tiny_models.make("llama"))
    expected = seeded(tiny_models.make("llama").generate, prompt(9), do_sample=False)
    cache = make(model.config)
    with pytest.warns(FutureWarning) if CACHE_ARGUMENT == "cache" != name else fed(model):
        assert torch.equal(seeded(model.generate, prompt(9), **{name: cache}, do_sample=False), expected)
    assert int(cache.get_seq_length()) > 49, "the stock call has filled it"


def test_an_encoder_decoder_cache_passes_through() -> None:
    model = attach(tiny_models.make("t5"))
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = seeded(tiny_models.make("t5").generate, ids, do_sample=False)
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    assert torch.equal(seeded(model.generate, ids, cache=cache, do_sample=False), expected)
    assert int(cache.get_seq_length()) > 0


def test_a_compiled_model() -> None:
    plain = tiny_models.make("llama")
    model = torch.compile(plain, backend="eager")
    expected = seeded(tiny_models.make("llama").generate, prompt(9), do_sample=False)
    cache = CacheGenCache.from_context(model, CONTEXT)
    with fed(plain) as lengths:
        assert torch.equal(seeded(model.generate, prompt(9), cache=cache, do_sample=False), expected)
        lookup = seeded(model.generate, prompt(9), cache=cache, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, expected)
    assert lengths[0] == 9
    assert torch.equal(seeded(plain.generate, prompt(9), **{CACHE_ARGUMENT: cache.to_dynamic()}), expected)


class Adapted:
    """A wrapper of `generate` that finds its tokens under the name `input_ids`, as PEFT's activated LoRA does."""

    def __init__(self, stock: Any) -> None:
        self.stock, self.seen = stock, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((len(args), sorted(kwargs.keys() & {"inputs", "input_ids"})))
        return self.stock(*args, **kwargs)


@pytest.mark.parametrize("with_cache", [False, True])
def test_arguments_keep_their_names(with_cache: bool) -> None:
    model = tiny_models.make("llama")
    model.generate = own = Adapted(model.generate)
    cache = CacheGenCache.from_context(model, CONTEXT) if with_cache else None
    attach(model)
    options: dict[str, Any] = {"max_new_tokens": 2, "cache": cache}
    model.generate(prompt(9), **options)
    model.generate(input_ids=prompt(9), **options)
    model.generate(inputs=prompt(9), **options)
    assert own.seen == [(1, []), (0, ["input_ids"]), (0, ["inputs"])]


def test_a_saved_default_of_no_cache_is_ignored() -> None:
    """A model trained with gradient checkpointing is saved with use_cache=False."""
    model = tiny_models.make("llama")
    expected = seeded(tiny_models.make("llama").generate, prompt(9), do_sample=False)
    model.config.use_cache = model.generation_config.use_cache = False
    cache = CacheGenCache.from_context(model, CONTEXT)
    with fed(model) as lengths:
        assert torch.equal(seeded(model.generate, prompt(9), cache=cache, do_sample=False), expected)
    assert lengths == [9] + [1] * (len(lengths) - 1)
    for request in ({"use_cache": False}, {"generation_config": transformers.GenerationConfig(use_cache=False)}):
        own = tiny_models.make("llama")
        with pytest.raises(UnsupportedModelError, match="use_cache=False"):
            own.generate(prompt(9), cache=CacheGenCache.from_context(own, CONTEXT), **request)


@each_way
@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
def test_the_cache_may_be_created_in_the_call(how: str, wrap: Any, artifact: Path, own_cache: None) -> None:
    """Python looks up `model.generate` before it computes the argument that prepares the model."""
    expected = seeded(tiny_models.make("llama").generate, prompt(9), do_sample=False)
    model = wrap(tiny_models.make("llama"))
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(prompt(9), cache=made(how, model, artifact), **options), expected)
    detach(model)
    with pytest.raises(ReadOnlyCacheError):
        model.generate(prompt(9), **{CACHE_ARGUMENT: made(how, model, artifact, attach=False)}, **options)


def tokenizer_with_template() -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(REFERENCE)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return tokenizer


@pytest.fixture(name="reference", scope="module")
def _reference() -> tuple[Any, Any]:
    model = transformers.AutoModelForCausalLM.from_pretrained(REFERENCE, dtype="float32").eval()
    return model, tokenizer_with_template()


DOCUMENT = "line brave-lamp: REGISTER_CONTENT is <48213>\nline calm-kettle: REGISTER_CONTENT is <90517>\n"
QUESTION = "Tell me what is the REGISTER_CONTENT in line brave-lamp?\n"


def test_a_rendered_chat(reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    system = [{"role": "system", "content": DOCUMENT}]
    options: dict[str, Any] = {"return_dict": True, "return_tensors": "pt"}
    context = tokenizer.apply_chat_template(system, **options)
    inputs = tokenizer.apply_chat_template([*system, {"role": "user", "content": QUESTION}], **options)
    expected = seeded(model.generate, **inputs, do_sample=False)
    cache = CacheGenCache.from_context(model, context["input_ids"], tokenizer=tokenizer)
    with fed(model) as lengths:
        assert torch.equal(seeded(model.generate, **inputs, cache=cache, do_sample=False), expected)
    assert lengths[0] < inputs["input_ids"].shape[1] - 20


def test_a_text_generation_pipeline(reference: tuple[Any, Any]) -> None:
    model, tokenizer = reference
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    expected = pipe(DOCUMENT + QUESTION, **options)
    cache = CacheGenCache.from_context(model, tokenizer(DOCUMENT, return_tensors="pt").input_ids)
    with fed(model) as lengths:
        assert pipe(DOCUMENT + QUESTION, cache=cache, **options) == expected
    assert "48213" in expected[0]["generated_text"]
    assert lengths[0] < 30, "the document is not computed again"


def test_streamers(reference: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = reference
    inputs = tokenizer(DOCUMENT + QUESTION, return_tensors="pt")
    cache = CacheGenCache.from_context(model, tokenizer(DOCUMENT, return_tensors="pt").input_ids)
    options: dict[str, Any] = {**inputs, "cache": cache, "max_new_tokens": 8, "do_sample": False}
    model.generate(**options, streamer=transformers.TextStreamer(tokenizer, skip_prompt=True))
    assert "48213" in capsys.readouterr().out
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs={**options, "streamer": streamer})
    thread.start()
    assert "48213" in "".join(streamer)
    thread.join()
