"""How fast a small model of each class learns from a text, and whether it knows more than how often each token comes.

    python benchmarks/objectives.py PATH [--text FIELD] --arch decoder|encoder|seq2seq [--preset nano] [--steps 200] [--lr 3e-3]

PATH: what `Documents` reads; a split of 4 % is held out. Trains a tokenizer of 4,096 tokens, then the model, and prints loss and
accuracy on what was held out, those of the best unigram there, and predictions and tokens/s: all positions of a step, read and
said, by the time of the step. The same as one line of JSON.
"""

import argparse
import json
import tempfile
import time

from fastllm.data.batch import Batches, encode_text
from fastllm.data.corrupt import MASKED_ROLES, SENTINELS, Words, encode_masked, encode_spans, sentinel_ids
from fastllm.data.pairs import PairBatches
from fastllm.data.sources import Documents
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.initial import initialise
from fastllm.models.presets import PRESETS, build, preset
from fastllm.train.loop import LoopOptions, fit
from fastllm.train.objective import masked_loss, next_token_loss, pair_loss
from fastllm.train.validation import held_out, unigram

LOSSES = {"decoder": next_token_loss, "encoder": masked_loss, "seq2seq": pair_loss}
SPLITS = {"train": 0.96, "validation": 0.04}


class Counted:
    """A source of batches that counts all of their tokens."""

    def __init__(self, batches):
        self.batches, self.tokens = batches, 0
        self.state_dict, self.load_state_dict = batches.state_dict, batches.load_state_dict

    def __next__(self):
        batch = next(self.batches)
        self.tokens += tokens_of(batch)
        return batch


def tokens_of(batch) -> int:
    said = getattr(batch, "said", batch)
    return len(said.target) + (len(batch.source.ids) if said is not batch else 0)


def batches(arch: str, tokenizer: Tokenizer, documents: Documents, tokens: int, longest: int, start_id: int):
    if arch == "decoder":
        return Batches(documents, lambda d, i: encode_text(tokenizer, d.text, longest), tokens)
    if arch == "encoder":
        words = Words.of(tokenizer)
        return Batches(documents, lambda d, i: encode_masked(tokenizer, words, d.text, i, longest), tokens)
    holes = sentinel_ids(tokenizer)
    return PairBatches(documents, lambda d, i: encode_spans(tokenizer, holes, d.text, i, start_id, longest), tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", nargs="+")
    parser.add_argument("--text", default="text")
    parser.add_argument("--arch", choices=LOSSES, required=True)
    parser.add_argument(
        "--preset", default="nano", choices=sorted({name for arch in PRESETS.values() for name in arch})
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    def documents(split: str, **options) -> Documents:
        return Documents(given.path, text=given.text, split=split, fractions=SPLITS, seed=given.seed, **options)

    texts = (document.text for document in documents("train"))
    tokenizer = Tokenizer.train(texts, 4096, {**MASKED_ROLES, "eos": "<|endoftext|>"}, more=SENTINELS)
    config = preset(given.arch, given.preset, tokenizer, given.longest)
    model, loss = initialise(build(config), given.seed), LOSSES[given.arch]
    start_id = getattr(config, "start_id", 0)
    held = list(batches(given.arch, tokenizer, documents("validation"), given.tokens, given.longest, start_id))
    stream = documents("train", shuffle=1000, epochs=None)
    source = Counted(batches(given.arch, tokenizer, stream, given.tokens, given.longest, start_id))
    options = LoopOptions(steps=given.steps, lr=given.lr, warmup=given.steps // 10, log_every=max(1, given.steps // 10))
    with tempfile.TemporaryDirectory() as run:
        start = time.perf_counter()
        fit(
            model, source, loss, run, options, watch=[lambda r: print(f"step {r['step']}: {r['loss']:.3f}", flush=True)]
        )
        seconds = time.perf_counter() - start
    measured = {"held_out": held_out(model, held, loss), "unigram": unigram(held)}
    for name, figures in measured.items():
        print(f"{name}: loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.1%}")
    measured |= {"steps": given.steps, "seconds": round(seconds, 1), "tokens_per_s": round(source.tokens / seconds)}
    measured |= {"parameters": sum(p.numel() for p in model.parameters()), "predictions": sum(int((
        getattr(b, "said", b).weight > 0).sum()) for b in held)}  # fmt: skip
    print(json.dumps({"arch": given.arch, "preset": given.preset, "seed": given.seed} | measured))


if __name__ == "__main__":
    main()
