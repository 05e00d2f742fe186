"""The command line, `hf-cachegen`: a context becomes an artifact, an artifact answers questions.

An ARTIFACT is a folder, a repository on the Hub ("user/name") or a URL. Results go to stdout, progress and errors to
stderr; with --json stdout is one JSON object. Commands import torch and transformers only when they need them, so that
`inspect`, `verify` and `--help` answer at once.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

import hf_cachegen
from hf_cachegen.cli_convert import convert
from hf_cachegen.cli_errors import EXIT_CODES, PROGRAM, ErrorGroup
from hf_cachegen.cli_models import (
    begin,
    load_for,
    load_model,
    no_padding,
    required_profile,
    token_counts,
    token_ids,
    with_question,
)
from hf_cachegen.cli_options import (
    artifact_argument,
    decoding_profile_option,
    dtype_option,
    encoder_options,
    encoder_settings,
    encoding_profile_option,
    key_option,
    model_options,
    output_options,
    read_text,
    sampling_arguments,
    sampling_options,
    trust_options,
)
from hf_cachegen.cli_output import bars, print_json, step
from hf_cachegen.cli_prefix_cache import prefix_cache_commands
from hf_cachegen.cli_profile import learn
from hf_cachegen.cli_profile_places import pull_profile, push_profile
from hf_cachegen.cli_stores import cache_commands, check, ls, pull, push, seal, sign
from hf_cachegen.cli_stream import stream
from hf_cachegen.cli_views import describe, plot, size_text, tables
from hf_cachegen.container import MANIFEST_FILE, Reader
from hf_cachegen.errors import ArtifactExistsError, MissingExtraError, WrongModelError
from hf_cachegen.geometry import Geometry
from hf_cachegen.stores import Access, LocalStore, open_store

WITHOUT_PROFILE = (
    "(coded without a profile: there is none of this model. With one, caches of the reference model took a seventh of "
    "the bytes at equal divergence, see docs/rate_distortion.md and 'hf-cachegen profile --help')"
)
EPILOG = "\b\nExit codes:\n" + "\n".join(f"{code:>3}  {meaning}" for code, meaning in EXIT_CODES.items())


@click.group(PROGRAM, cls=ErrorGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(hf_cachegen.__version__, prog_name=PROGRAM)
def main() -> None:
    """KV caches of Transformers models as small files."""


@main.command(short_help="Write the compressed cache of a text.")
@click.argument("text", type=click.File("r", encoding="utf-8"))
@click.option("--model", required=True, help="Folder or Hub id of a causal language model.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write the artifact into.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@model_options
@dtype_option
@encoding_profile_option
@encoder_options
@output_options
@click.pass_context
def encode(
    context: click.Context, /, text: Any, model: str, out: Path, overwrite: bool, revision: str | None,
    device: str | None, dtype: str, profile: str, as_json: bool, debug: bool, **options: Any,
) -> None:  # fmt: skip
    """Prefill TEXT (a file, or - for stdin) with a model and write the compressed cache."""
    document = read_text(text)
    if not document.strip():
        raise click.UsageError(f"{text.name} has no text", context)
    if not overwrite and (out / MANIFEST_FILE).is_file():
        raise ArtifactExistsError(f"there is an artifact in {out}: choose another folder, or give --overwrite")
    # Found before the model is loaded: what is wrong with them shall not take minutes to be said.
    config, found_profile = encoder_settings(
        options, lambda name: context.get_parameter_source(name) is not ParameterSource.DEFAULT, profile, model
    )
    with step("loading the model", as_json):
        loaded, tokenizer = load_model(model, revision=revision, dtype=dtype, device=device)
    import torch

    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.layout import require_length

    input_ids = torch.tensor([token_ids(tokenizer, document, start=True)], device=loaded.device)
    require_length(loaded, input_ids.shape[1])
    positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if positions and input_ids.shape[1] > positions and not as_json:
        note = f"the text has {input_ids.shape[1]:,} tokens, the model was made for {positions:,}: expect poor answers"
        click.echo(f"hf-cachegen: note: {note}", err=True)
    start = time.perf_counter()
    # What nobody named must be of the model's weights, which are at hand only now.
    chosen = found_profile if found_profile is None or profile != "auto" else profile
    cache = CacheGenCache.from_context(
        loaded, input_ids, config, chosen, tokenizer=tokenizer, progress=bars(as_json)
    )
    prefilled = time.perf_counter()
    cache.save_pretrained(out, overwrite=overwrite, progress=bars(as_json))
    encoded = time.perf_counter()
    found = describe(Reader(LocalStore(out)))
    seconds = {"prefill": prefilled - start, "encode": encoded - prefilled}
    if as_json:
        print_json({"artifact": str(out), **found, "seconds": seconds})
        return
    sizes = f"{size_text(found['exact_bytes'])} -> {size_text(found['bytes'])}"
    times = f"prefill {seconds['prefill']:.1f} s, encode {seconds['encode']:.1f} s"
    click.echo(f"{out}: {found['tokens']:,} tokens, {sizes} ({times})")
    for row in found["levels"]:
        size, bits = size_text(row["bytes"]), row["bits_per_element"]
        click.echo(f"  level {row['level']}: {size}, {row['ratio']:.1f}x, {bits:.2f} bits per element")
    if found["profile"] is None and profile == "auto" and options["transform"] == "auto" and not config.lossless:
        click.echo(WITHOUT_PROFILE)


@main.command(short_help="Answer a question from a compressed cache.")
@artifact_argument
@click.option("--model", required=True, help="The model that the artifact was made with.")
@click.option("--prompt", required=True, help="The question, appended to the cached context; - reads stdin.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="At most.")
@click.option("--level", type=click.IntRange(min=1), help="Level to load, 1 the coarsest.  [default: the finest]")
@sampling_options
@decoding_profile_option
@trust_options
@model_options
@output_options
def generate(
    artifact: str, model: str, prompt: str, max_new_tokens: int, level: int | None, profile: str,
    public_key: str | None, key: str | None, revision: str | None, device: str | None, as_json: bool, debug: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Answer a question about the context of ARTIFACT, token by token on stdout."""
    arguments = sampling_arguments(options)
    loaded, tokenizer, required, question = begin(
        artifact, Access(public_key=public_key, key=key), model, profile, prompt, revision=revision, device=device,
        as_json=as_json,
    )  # fmt: skip
    import torch
    from transformers import TextStreamer

    from hf_cachegen.cache import CacheGenCache
    from hf_cachegen.generation import generate as generate_from_cache

    start = time.perf_counter()
    cache = CacheGenCache.from_pretrained(
        artifact, loaded, level, profile=required, tokenizer=tokenizer, progress=bars(as_json), public_key=public_key,
        key=key,
    )  # fmt: skip
    ready = time.perf_counter()
    prompt_ids = with_question(cache.input_ids, token_ids(tokenizer, question, start=False), loaded.device)
    if options["seed"] is not None:
        torch.manual_seed(options["seed"])
    if not as_json and options["num_beams"] == 1:
        arguments["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    arguments |= no_padding(tokenizer, prompt_ids)
    output = generate_from_cache(loaded, prompt_ids, cache=cache, max_new_tokens=max_new_tokens, **arguments)
    answer = output[0, prompt_ids.shape[1] :]
    answer_text = tokenizer.decode(answer, skip_special_tokens=True)
    if as_json:
        seconds = {"load": ready - start, "generate": time.perf_counter() - ready}
        print_json({"text": answer_text, **token_counts(cache, prompt_ids, answer), "seconds": seconds})
    elif "streamer" not in arguments:
        click.echo(answer_text)


@main.command(short_help="Show what an artifact holds.")
@artifact_argument
@click.option("--plot", "target", type=click.Path(path_type=Path), help="Draw bits and errors by layer, too.")
@key_option
@output_options
def inspect(artifact: str, target: Path | None, key: str | None, as_json: bool, debug: bool) -> None:
    """Show what ARTIFACT holds: geometry, levels, sizes, bits and errors by layer, fingerprint."""
    found = describe(Reader(open_store(artifact, Access(key=key))))
    if target is not None:
        if target.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise click.BadParameter(f"expected a .png, .pdf or .svg file, got {target}", param_hint="'--plot'")
        plot(found, target)
    if as_json:
        print_json({"artifact": str(artifact), **found, "plot": None if target is None else str(target)})
    else:
        Console().print(tables(found, str(artifact)))


@main.command(short_help="Check every byte of an artifact.")
@artifact_argument
@click.option("--model", help="Check the fingerprint against this model and its tokenizer, too.")
@decoding_profile_option
@trust_options
@model_options
@output_options
def verify(
    artifact: str, model: str | None, profile: str, public_key: str | None, key: str | None, revision: str | None,
    device: str | None, as_json: bool, debug: bool,
) -> None:  # fmt: skip
    """Check every byte of ARTIFACT against its checksums; with --model, that it belongs to that model.

    With --model or --profile PLACE, also that the profile which it needs is there.
    """
    access = Access(public_key=public_key, key=key)
    reader = Reader(open_store(artifact, access))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=None)
        checked = reader.verify(progress=lambda done, total: progress.update(task, completed=done, total=total))
    required = None
    if model is None and profile not in ("auto", "none"):
        required = required_profile(artifact, profile, "", access)
    if model is not None:
        loaded, tokenizer, required = load_for(
            artifact, access, model, profile, revision=revision, device=device, as_json=as_json
        )
        from hf_cachegen.fingerprint import Fingerprint
        from hf_cachegen.layout import require_geometry

        if reader.manifest.fingerprint is None:
            raise WrongModelError(f"{artifact} has no fingerprint: nothing says which model it was made with")
        Fingerprint.from_dict(reader.manifest.fingerprint).check(loaded, tokenizer)
        require_geometry(loaded.config, Geometry.from_dict(reader.manifest.geometry))
    digest = None if required is None else required.digest
    if as_json:
        print_json({"artifact": str(artifact), "sound": True, "bytes": checked, "model": model, "profile": digest})
    else:
        belongs = "" if model is None else f", made with {model}"
        needs = "" if digest is None else f", with profile {digest}"
        click.echo(f"{artifact}: sound, {checked:,} bytes in {len(reader.sizes)} files{belongs}{needs}")


@main.command(short_help="Answer questions from compressed caches, beside the exact one.")
@output_options
def demo(as_json: bool, debug: bool) -> None:
    """Answer questions about a long context from compressed caches, beside the exact one (needs the checkout)."""
    checkout = Path(hf_cachegen.__file__).resolve().parent.parent
    if not (checkout / "eval" / "demo.py").is_file():
        raise MissingExtraError(
            f"the demo is part of the repository, not of the package, and {checkout} has no eval/demo.py: clone the "
            "repository and run 'make demo' there"
        )
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    from eval.demo import run_demo

    click.get_current_context().exit(run_demo(Console(), as_json))


for command in (stream, learn, push_profile, pull_profile, convert, push, pull, ls, sign, seal, check, cache_commands):
    main.add_command(command)
main.add_command(prefix_cache_commands)


if __name__ == "__main__":
    main()
