r"""Time decoding under several profiles of one model, in one run, with and without prediction.

    python -m benchmarks.decode_profiles --model smollm2 --text second_half.txt --profile joint --profile chained \
        --layers 0,2,5

One context of the text is encoded with each profile, without a prediction and with each of --layers that the profile
has. Times are processor seconds of one thread to decode a level to bfloat16, the least of several rounds in which the
variants take turns; ratios are to the first profile without a prediction.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import CacheGenConfig, Profile, decode_kv, encode_kv
from hf_cachegen.models.first_layers import known_of
from hf_cachegen.profiles.learning import prefill


def variants(model: Any, context: torch.Tensor, profiles: tuple[str, ...], layers: list[int]) -> dict[str, Any]:
    """Return, by name, the encoded context and what its loader knows."""
    keys, values, _ = prefill(model, context)
    found = {}
    for place in profiles:
        profile = Profile.from_pretrained(place)
        able = {predictor.layer for predictor in profile.predictors}
        for layer in (None, *(layer for layer in layers if layer in able)):
            known = None if layer is None else known_of(model, context, profile, layer)
            config = CacheGenConfig(transform="klt", predict_layers=layer, measure=False)
            name = place if layer is None else f"{place}, m = {layer}"
            found[name] = encode_kv(keys, values, config, profile, known=known), known
    return found


def seconds(encoded: Any, known: Any, level: int) -> float:
    """Return the processor seconds of decoding once."""
    begun = time.process_time()
    decode_kv(encoded, level, known=known)
    return time.process_time() - begun


@click.command()
@click.option("--model", "path", required=True, help="Folder or Hub id of the model.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), required=True, help="Text of the context.")
@click.option("--profile", "profiles", multiple=True, required=True, help="Profiles; the first is the unit.")
@click.option("--layers", default="0", show_default=True, help="Values of predict_layers, separated by commas.")
@click.option("--tokens", default=2048, show_default=True, help="Tokens of the context.")
@click.option("--rounds", default=6, show_default=True, help="Rounds.")
def main(path: str, text: Path, profiles: tuple[str, ...], layers: str, tokens: int, rounds: int) -> None:
    """Print a table of seconds and ratios."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = AutoTokenizer.from_pretrained(path)(text.read_text("utf-8"), return_tensors="pt").input_ids[:, :tokens]
    cases = variants(model, ids, profiles, [int(layer) for layer in layers.split(",") if layer])
    print("| level | " + " | ".join(cases) + " |\n|---" + "|---" * len(cases) + "|")
    for level in (1, 2, 3):
        taken = [[seconds(*case, level) for case in cases.values()] for _ in range(rounds)]
        least = [min(column) for column in zip(*taken, strict=True)]
        cells = [f"{least[0]:.2f} s", *(f"{one / least[0]:.2f}" for one in least[1:])]
        print(f"| {level} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
