"""Stream a cache from an object store: the first token meets a deadline, finer levels follow while the model writes.

    python examples/stream_from_an_object_store.py
    python examples/stream_from_an_object_store.py --model MODEL --location s3://bucket/harbor --slo 2

Any location that fsspec knows will do (s3://, gs://, az://, ...; install its package). The default lives in this
process's memory, so that the example needs no account.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import fsspec
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cachegen import CacheGenCache, CacheGenConfig

EXAMPLES = Path(__file__).resolve().parent
MODEL = EXAMPLES.parent / "eval" / "reference" / "model"


def publish(cache: CacheGenCache, location: str) -> None:
    """Write the artifact to the location, the manifest last: a reader that finds it finds the other files."""
    filesystem, root = fsspec.core.url_to_fs(location)
    with tempfile.TemporaryDirectory() as folder:
        cache.save_pretrained(Path(folder) / "artifact")
        files = sorted((Path(folder) / "artifact").iterdir(), key=lambda file: file.name == "cachegen.json")
        filesystem.makedirs(root, exist_ok=True)
        for file in files:
            filesystem.put_file(str(file), f"{root}/{file.name}")


def main(arguments: list[str] | None = None) -> None:
    """Publish the cache of a document, stream it back against the clock, answer, and report what came when."""
    parser = argparse.ArgumentParser(description="Stream a compressed KV cache from an object store.")
    parser.add_argument("--model", default=str(MODEL), help="Path or name of a causal language model.")
    parser.add_argument("--document", type=Path, default=EXAMPLES / "documents" / "harbor.txt", help="Text file.")
    parser.add_argument("--ask", default="Tell me what is the REGISTER_CONTENT in line major-saddle?", help="Question.")
    parser.add_argument("--location", default="memory://caches/harbor", help="URL that fsspec can open.")
    parser.add_argument("--slo", type=float, default=10.0, help="Time to the first token, in seconds.")
    options = parser.parse_args(arguments)

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    document = options.document.read_text(encoding="utf-8")

    context = tokenizer(document, return_tensors="pt").input_ids
    encoding = CacheGenConfig(chunk_tokens=256)  # small chunks: more choices on the way
    publish(CacheGenCache.from_context(model, context, encoding, tokenizer=tokenizer), options.location)

    inputs = tokenizer(f"{document}{options.ask}\n", return_tensors="pt").to(model.device)
    question_tokens = inputs.input_ids.shape[1] - context.shape[1]
    cache = CacheGenCache.stream(
        options.location, model, slo=options.slo, prompt_tokens=question_tokens, refine="while_generating"
    )
    stop: dict[str, Any] = {"stop_strings": "\n", "tokenizer": tokenizer}
    output = model.generate(**inputs, cache=cache, max_new_tokens=64, do_sample=False, **stop)
    print(f"> {options.ask}")
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())

    report: Any = cache.report
    print(f"first token after {report.ttft:.2f} s (asked for {report.slo:.2f} s), in time: {report.met}")
    for chunk in report.chunks:
        print(f"tokens {chunk.first} to {chunk.first + chunk.tokens - 1}: {chunk.choice}, {chunk.nbytes} bytes")


if __name__ == "__main__":
    main()
