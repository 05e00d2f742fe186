"""Train the reference model from scratch, on text that `corpus.py` generates.

    python -m eval.reference.train --out runs/reference --minutes 100

A Llama-shaped model (6 layers, 4 query heads over 2 KV heads of 64, rope) and a byte-level BPE tokenizer whose merges
make every word of the corpus one token. A curriculum teaches retrieval in minutes: copying repeated
random words until induction appears, then "name: number" lines, then the full form, with the number of lines growing
each time the answers come out right. The last quarter of the time lowers the learning rate to zero on the full
mixture.

A checkpoint is written every few minutes; the same command continues from it after an interruption.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.command import run_command
from eval.reference import corpus
from eval.reference.words import ADJECTIVES, JOBS, NAMES, NOUNS, PLACES, TOPIC_FIELDS, VERBS

VOCABULARY = 3840
PHRASES = (": REGISTER_CONTENT is <", ">\n")
"""The template's own words are single tokens: a line is 8 tokens, and its number follows its name closely."""
BATCH_TOKENS = 8192
DECAY_FROM = 0.75
"""Fraction of the time after which the learning rate falls to zero."""
WARMUP_STEPS = 50
MATRIX_LR, EMBEDDING_LR = 3e-3, 3e-3


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: `tokens` a sequence, and each task's share of the batch."""

    tokens: int
    shares: dict[str, float]
    lines: int = 0


STAGES = (
    Stage(128, {"copying": 0.2, "pairs": 0.8}, lines=4),
    Stage(128, {"copying": 0.1, "pairs": 0.9}, lines=8),
    Stage(256, {"pairs": 0.5, "lines": 0.5}, lines=14),
    Stage(512, {"pairs": 0.2, "lines": 0.5, "topics": 0.1, "stories": 0.1, "prose": 0.1}, lines=32),
    Stage(512, {"lines": 0.7, "topics": 0.1, "stories": 0.15, "prose": 0.05}, lines=44),
    Stage(1024, {"lines": 0.7, "topics": 0.1, "stories": 0.15, "prose": 0.05}, lines=90),
    Stage(1536, {"lines": 0.7, "topics": 0.1, "stories": 0.15, "prose": 0.05}, lines=150),
    Stage(2048, {"lines": 0.55, "topics": 0.1, "stories": 0.3, "prose": 0.05}, lines=200),
)
ADVANCE_AT = 0.85
"""Share of right tokens of line answers at which the next stage begins."""


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Byte-level BPE (any text round-trips), numbers in groups of up to three digits, every word of the lists one
    token.
    """
    tokenizer = Tokenizer(models.BPE())
    groups = pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([groups, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(seed)
    words = (*ADJECTIVES, *NOUNS, *NAMES, *PLACES, *JOBS, *VERBS, *TOPIC_FIELDS)
    numbers = [*(f"{n:02}" for n in range(100)), *(f"{n:03}" for n in range(1000))]
    texts = [" ".join(words), "\n".join(words), "\n".join(numbers)] * 400
    texts += [document(task, rng, 512, 8).text for task in ("lines", "topics", "stories", "prose") for _ in range(150)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(PHRASES),
        special_tokens=["<pad>", "<bos>", "<eos>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.03,
        )
    )


def document(task: str, rng: random.Random, tokens: int, lines: int) -> corpus.Document:
    """A document that, questions included, makes about `tokens` tokens; `lines` bounds the record of the line tasks."""
    count = rng.randint(max(2, lines // 2), lines)
    if task == "copying":
        return corpus.copying(rng, tokens // 2 - 4)
    if task == "pairs":
        return corpus.pairs(rng, count, 2 * count)
    if task == "lines":
        return corpus.lines(rng, count, max(3, (tokens - 60 - 8 * count) // 20))
    if task == "topics":
        return corpus.topics(rng, max(1, min(6, tokens // 150)), turns=rng.randint(0, 2))
    if task == "stories":
        people = rng.randint(2, max(2, tokens // 110))
        return corpus.stories(rng, people, max(3, (tokens - 90 * people) // 15))
    return corpus.prose(rng, tokens // 14)


@dataclass
class Batch:
    """input_ids [rows, tokens] int64; weights [rows, tokens] float32, the loss weight of each token as a target."""

    input_ids: torch.Tensor
    weights: torch.Tensor
    watched: torch.Tensor
    """[rows, tokens] bool: tokens of the numbers that the line tasks score, what the curriculum watches."""


def make_batch(stage: Stage, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Batch:
    rows = BATCH_TOKENS // stage.tokens
    ids: list[list[int]] = [[] for _ in range(rows)]
    weights: list[list[float]] = [[] for _ in range(rows)]
    firsts: list[list[bool]] = [[] for _ in range(rows)]
    for row in range(rows):
        task = rng.choices(list(stage.shares), weights=list(stage.shares.values()))[0]
        watched = task in ("lines", "pairs")
        while len(ids[row]) < stage.tokens:
            spans = document(task, rng, stage.tokens, stage.lines).spans()
            per_char = [span.weight for span in spans for _ in span.text]
            encoded = tokenizer.backend_tokenizer.encode("".join(span.text for span in spans))
            per_token = [max(per_char[begin:end]) for begin, end in encoded.offsets]
            ids[row] += encoded.ids
            weights[row] += per_token
            firsts[row] += [watched and w == corpus.SCORED_WEIGHT for w in per_token]
        padding = stage.tokens - len(ids[row])
        for values in (ids[row], weights[row], firsts[row]):
            values += [0] * padding
            del values[stage.tokens :]
    return Batch(torch.tensor(ids), torch.tensor(weights), torch.tensor(firsts, dtype=torch.bool))


def learning_rate(elapsed: float, step: int) -> float:
    """Return the factor on the learning rates: warm-up, constant, linear to zero over the last part of the time."""
    decay = min(1.0, (1.0 - elapsed) / (1.0 - DECAY_FROM))
    return max(0.0, decay) * min(1.0, (step + 1) / WARMUP_STEPS)


class Trainer:
    def __init__(self, out: Path, seed: int, minutes: float):
        self.out, self.minutes = out, minutes
        self.tokenizer = make_tokenizer()
        self.model = make_model(self.tokenizer, seed)
        self.rng = random.Random(seed)
        self.step, self.stage, self.seconds, self.tokens = 0, 0, 0.0, 0
        self.recent: deque[float] = deque(maxlen=25)
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=EMBEDDING_LR, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.base_rates = [MATRIX_LR, EMBEDDING_LR]
        self.body = torch.compile(
            self.model.model, dynamic=False
        )  # fused elementwise work: 1.6 times the steps a second

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "progress": {"step": self.step, "stage": self.stage, "seconds": self.seconds, "tokens": self.tokens},
            "rng": self.rng.getstate(),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.checkpoint)

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["progress"].items():
            setattr(self, name, value)
        version, internal, gauss = state["rng"]
        self.rng.setstate((version, tuple(internal), gauss))

    def train_step(self) -> tuple[float, float]:
        """Train on one batch; return (loss in nats per weighted token, share of scored tokens predicted right)."""
        stage = STAGES[self.stage]
        if self.seconds / 60 / self.minutes > DECAY_FROM - 0.1 and self.stage < len(STAGES) - 1:
            stage = replace(
                STAGES[-2], lines=max(stage.lines, 120)
            )  # the time is nearly up: learn what remains at full form
        elif self.stage > 2 and self.rng.random() < 0.3:  # short sequences cost less and keep what was learnt
            stage = STAGES[self.rng.randrange(2, self.stage)]
        batch = make_batch(stage, self.tokenizer, self.rng)
        factor = learning_rate(self.seconds / 60 / self.minutes, self.step)
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.body(batch.input_ids, use_cache=False).last_hidden_state[:, :-1]
            kept = batch.weights[:, 1:] > 0
            logits = self.model.lm_head(hidden[kept]).float()
        targets, weights = batch.input_ids[:, 1:][kept], batch.weights[:, 1:][kept]
        loss = (cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        watched = batch.watched[:, 1:][kept]
        right = (logits.argmax(-1) == targets)[watched].float().mean().item() if watched.any() else math.nan
        if stage is STAGES[self.stage] and not math.isnan(right):
            self.recent.append(right)
            if len(self.recent) == self.recent.maxlen and sum(self.recent) / len(self.recent) > ADVANCE_AT:
                self.stage = min(self.stage + 1, len(STAGES) - 1)
                self.recent.clear()
        self.step += 1
        self.tokens += batch.input_ids.numel()
        return loss.item(), right

    def run(self) -> None:
        self.resume()
        saved = time.monotonic()
        log = (self.out / "log.jsonl").open("a")
        with tqdm(total=round(self.minutes * 60), initial=round(self.seconds), unit="s", desc="train") as bar:
            while self.seconds < self.minutes * 60:
                begun = time.monotonic()
                loss, right = self.train_step()
                spent = time.monotonic() - begun
                self.seconds += spent
                bar.update(round(self.seconds) - bar.n)
                if self.step % 10 == 0:
                    mean = sum(self.recent) / max(1, len(self.recent))
                    bar.set_postfix(
                        step=self.step,
                        stage=self.stage,
                        loss=f"{loss:.3f}",
                        right=f"{mean:.2f}",
                        rate=f"{BATCH_TOKENS / spent:.0f} tok/s",
                    )
                    log.write(
                        json.dumps(
                            {
                                "step": self.step,
                                "stage": self.stage,
                                "seconds": round(self.seconds),
                                "loss": loss,
                                "right": right,
                                "tokens": self.tokens,
                            }
                        )
                        + "\n"
                    )
                    log.flush()
                if time.monotonic() - saved > 180:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def export(self, directory: Path) -> None:
        """Write weights (bf16 safetensors), tokenizer and training record."""
        self.model.to(torch.bfloat16).save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)
        record = {
            "steps": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 1),
            "stage": self.stage,
        }
        (directory / "training.json").write_text(json.dumps(record, indent=2) + "\n")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of checkpoints and of the model.")
@click.option(
    "--minutes", default=100.0, show_default=True, help="Training time in minutes; the curriculum adapts to it."
)
@click.option("--seed", default=1, show_default=True, help="Random seed.")
def main(out: Path, minutes: float, seed: int) -> None:
    """Train the reference model; an interrupted run continues from its checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(out, seed, minutes)
    trainer.run()
    trainer.export(out / "model")


if __name__ == "__main__":
    run_command(main, "eval.reference.train")
