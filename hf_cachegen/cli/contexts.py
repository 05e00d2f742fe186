"""The commands `encode` and `generate`: from a text to an artifact, and from an artifact to an answer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from hf_cachegen.artifact import MANIFEST_FILE, ContextText, Reader
from hf_cachegen.cli.models import load_for, load_model
from hf_cachegen.cli.options import (
    OUTPUT_PATH,
    answer_options,
    artifact_argument,
    decoding_profile_option,
    dtype_option,
    encoder_options,
    encoder_settings,
    encoding_profile_option,
    model_options,
    output_options,
    overwrite_option,
    read_text,
    require_writable,
    sampling_arguments,
    sampling_options,
    source_model_option,
    state_options,
    text_option,
    trust_options,
)
from hf_cachegen.cli.output import bars, note, print_json, size_text, step
from hf_cachegen.cli.prompts import Asked, note_loss, read_chat, token_counts
from hf_cachegen.cli.views import describe, measured_text
from hf_cachegen.errors import ArtifactExistsError
from hf_cachegen.stores import Access, LocalStore

WITHOUT_PROFILE = (
    "(encoded without a profile: none was found for this model. With a profile, caches of the reference model take a "
    "seventh of the bytes at equal divergence; see docs/rate_distortion.md and 'hf-cachegen profile --help')"
)


@click.command("encode", short_help="Encode the KV cache of a text into an artifact.")
@click.argument("text", type=click.File("r", encoding="utf-8"), required=False)
@click.option("--chat", type=click.File("r", encoding="utf-8"),
              help="JSON file of the messages of a chat, instead of TEXT: a list, or an object with messages and "
              "variables of the chat template, such as tools.")
@text_option
@click.option("--continuation", "continuations", multiple=True, type=click.File("r", encoding="utf-8"),
              help="Text file that is likely to follow the context, for --target-kl; repeatable.")
@source_model_option
@click.option("--out", required=True, type=OUTPUT_PATH, help="Output folder.")
@overwrite_option("Replace an existing artifact.")
@model_options
@dtype_option
@encoding_profile_option
@encoder_options
@state_options
@output_options
@click.pass_context
def encode(
    context: click.Context, /, text: Any, chat: Any, keep_text: bool, continuations: tuple[Any, ...], model: str,
    out: Path, overwrite: bool, revision: str | None, device: str | None, dtype: str, profile: str,
    state_every: int | None, state_budget: int, as_json: bool, debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Prefill TEXT (a file, or - for stdin) or a chat with a model, and write its compressed KV cache."""
    if (text is None) == (chat is None):
        raise click.UsageError("expected either TEXT or --chat", context)
    document = ContextText(read_text(text)) if chat is None else read_chat(chat)
    if document.text is not None and not document.text.strip():
        raise click.UsageError(f"expected a text, but {text.name} is empty", context)
    if not overwrite and (out / MANIFEST_FILE).is_file():
        raise ArtifactExistsError(f"{out} already holds an artifact; choose another folder, or use --overwrite")
    require_writable(out)
    # Before the model is loaded, so that an error in them does not take minutes to appear.
    config, found_profile = encoder_settings(
        options, lambda name: context.get_parameter_source(name) is not ParameterSource.DEFAULT, profile, model
    )
    if continuations and config.target_kl is None:
        raise click.UsageError("--continuation requires --target-kl", context)
    following = [read_text(file) for file in continuations]
    with step("loading the model", as_json):
        loaded, tokenizer = load_model(model, revision=revision, dtype=dtype, device=device)
    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.models.requirements import require_length
    from hf_cachegen.models.text import prompt_ids

    tokens = len(prompt_ids(tokenizer, document, answer=False))
    # from_text checks this too; here, the error comes before the note below, which would contradict it.
    require_length(loaded, tokens)
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if positions and tokens > positions and not as_json:
        note(f"the text has {tokens:,} tokens, the model was trained for {positions:,}: expect poor answers")
    start = time.perf_counter()
    # A profile that was found automatically must match the model's weights, which are known only now.
    chosen = found_profile if found_profile is None or profile != "auto" else profile
    cache = CacheGenCache.from_text(
        loaded, tokenizer, document, config, chosen, state_every=state_every, state_budget=state_budget,
        progress=bars(as_json), keep_text=keep_text,
        continuations=[tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in following],
    )  # fmt: skip
    prefilled = time.perf_counter()
    cache.save_pretrained(out, overwrite=overwrite, progress=bars(as_json))
    encoded = time.perf_counter()
    found = describe(Reader(LocalStore(out)))
    seconds = {"prefill": prefilled - start, "encode": encoded - prefilled}
    if as_json:
        print_json({"artifact": str(out), **found, "seconds": seconds})
        return
    sizes = f"{size_text(found['exact_bytes'])} -> {size_text(found['bytes'])}"
    prefill = "prefill" if config.target_kl is None else "prefill and search"
    times = f"{prefill} {seconds['prefill']:.1f} s, encode {seconds['encode']:.1f} s"
    click.echo(f"{out}: {found['tokens']:,} tokens, {sizes} ({times})")
    for row in found["levels"]:
        size, bits = size_text(row["bytes"]), row["bits_per_element"]
        click.echo(f"  level {row['level']}: {size}, {row['ratio']:.1f}x, {bits:.2f} bits per element")
    if "states" in found:
        states = found["states"]
        positions = ", ".join(f"{position:,}" for position in states["checkpoints"])
        click.echo(f"  states after {positions} tokens: {size_text(states['exact_bytes'])} before coding")
    if (measured := found["target_kl"]) is not None:
        click.echo(measured_text(measured))
    if found["profile"] is None and profile == "auto" and options["transform"] == "auto" and not config.lossless:
        click.echo(WITHOUT_PROFILE)


@click.command("generate", short_help="Answer a question from an artifact.")
@artifact_argument
@answer_options
@click.option("--level", type=click.IntRange(min=1), help="Level to load; 1 is the coarsest.  [default: the finest]")
@sampling_options
@decoding_profile_option
@trust_options
@model_options
@output_options
def generate(
    artifact: str, model: str, prompt: str | None, context_file: Any, chat: Any, max_new_tokens: int,
    level: int | None, profile: str, public_key: str | None, key: str | None, revision: str | None, device: str | None,
    as_json: bool, debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Answer a question about the context of ARTIFACT; print the answer token by token."""
    arguments, asked = sampling_arguments(options), Asked.of(prompt, context_file, chat)
    access = Access(public_key=public_key, key=key)
    loaded, tokenizer, required = load_for(
        artifact, access, model, profile, revision=revision, device=device, as_json=as_json
    )
    import torch
    from transformers import TextStreamer

    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.generation import generate as generate_from_cache
    from hf_cachegen.models.text import one_prompt

    prompt_ids = asked.ids(artifact, access, tokenizer, as_json)
    start = time.perf_counter()
    cache = CacheGenCache.from_pretrained(
        artifact, loaded, level, profile=required, tokenizer=tokenizer, progress=bars(as_json), public_key=public_key,
        key=key,
    )  # fmt: skip
    ready = time.perf_counter()
    inputs = one_prompt(tokenizer, prompt_ids, loaded.device)
    if options["seed"] is not None:
        torch.manual_seed(options["seed"])
    if not as_json and options["num_beams"] == 1:
        arguments["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = generate_from_cache(loaded, **inputs, cache=cache, max_new_tokens=max_new_tokens, **arguments)
    answer = output[0, len(prompt_ids) :]
    answer_text, counts = tokenizer.decode(answer, skip_special_tokens=True), token_counts(cache, inputs, answer)
    if as_json:
        seconds = {"load": ready - start, "generate": time.perf_counter() - ready}
        print_json({"text": answer_text, **counts, "seconds": seconds})
        return
    if "streamer" not in arguments:
        click.echo(answer_text)
    note_loss(counts)
