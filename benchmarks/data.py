"""How fast documents become batches, and are curated: to be held against the tokens/s of a training step.

    python benchmarks/data.py PATH [--text FIELD] [--model smollm2-135m] [--tokens 8192] [--longest 1024]

PATH: what `Documents` reads. Prints tokens/s of both kinds of packing and how full the batches are, characters/s of
curation (which needs the extra `train`), and the same as one line of JSON. One thread, but for the tokenizer's own.
"""

import argparse
import json
import time

from fastllm import hub
from fastllm.data.batch import HOW, Batches, encode_text
from fastllm.data.curate import Rules, curate
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.gguf import GGUFFile


def load_tokenizer(name: str) -> Tokenizer:
    path = hub.resolve(name)
    if path.is_dir():
        return Tokenizer.from_folder(path)
    with GGUFFile(path) as file:
        return Tokenizer.from_gguf(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--text", default="text")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--longest", type=int, default=1024)
    given = parser.parse_args()
    tokenizer, measured = load_tokenizer(given.model), {}

    def documents() -> Documents:
        return Documents(given.path, text=given.text, shuffle=100)

    for how in HOW:
        count = batches = 0
        start = time.perf_counter()
        encode = lambda document, index: encode_text(tokenizer, document.text, given.longest)  # noqa: E731
        for batch in Batches(documents(), encode, tokens=given.tokens, how=how):
            count, batches = count + len(batch.packed.ids), batches + 1
        rate, fill = count / (time.perf_counter() - start), count / (batches * given.tokens)
        measured[how] = {"tokens_per_s": round(rate), "fill": round(fill, 4)}
        print(f"{how}: {rate:,.0f} tokens/s, batches {fill:.1%} full")
    start = time.perf_counter()
    report = curate(documents(), None, Rules(languages=("en",)))
    rate = sum(report.characters.values()) / (time.perf_counter() - start)
    measured["curate"] = {"characters_per_s": round(rate), "kept": report.documents["kept"]}
    print(f"curate: {rate:,.0f} characters/s")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
