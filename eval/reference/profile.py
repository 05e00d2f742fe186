"""Learn the reference model's profile, from documents that no test uses.

python -m eval.reference.profile --samples 40

Contexts of several lengths and all three tasks, each followed by its questions and right answers.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.command import run_command
from eval.reference import CALIBRATION_SEED, MODEL_PATH, TASKS, sample
from hf_cachegen import Profile, learn_profile

LENGTHS = (400, 800, 1200, 1600)
"""Approximate lengths of the contexts in tokens, taken in turn."""


def learn(samples: int, layers: tuple[int, ...], out: Path) -> tuple[Path, Profile]:
    """Learn and save the reference model's profile.

    Args:
        samples: samples of each task.
        layers: layers of predictors.
        out: folder or file of the profile.

    Returns:
        (its file, the profile).
    """
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    lengths = [LENGTHS[n % len(LENGTHS)] for n in range(samples)]
    mixed = [sample(tokenizer, t, CALIBRATION_SEED + n, length) for n, length in enumerate(lengths) for t in TASKS]
    model.config.name_or_path = "eval/reference/model"  # the profile names the model, not the folder of the checkout
    profile = learn_profile(model, mixed, predict_layers=layers, progress=True)
    return profile.save(out, overwrite=True), profile


@click.command()
@click.option("--samples", default=40, show_default=True, help="Samples of each task.")
@click.option("--predict-layers", "layers", multiple=True, type=int, help="Layer of a predictor, repeatable.")
@click.option("--out", type=click.Path(path_type=Path), default=MODEL_PATH, show_default="the model's folder",
              help="Folder or file of the profile.")  # fmt: skip
def main(samples: int, layers: tuple[int, ...], out: Path) -> None:
    """Learn and save the reference model's profile."""
    path, profile = learn(samples, layers, out)
    print(f"{path}: {path.stat().st_size} bytes, {profile.about['measured']}")


if __name__ == "__main__":
    run_command(main, "eval.reference.profile")
