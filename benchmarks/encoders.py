"""Encoders and encoder-decoders on a CPU beside transformers, the same weights: MiniLM on texts of many lengths, and Whisper.

    python benchmarks/encoders.py
    python benchmarks/encoders.py --models minilm-l6 --texts 256 --repeats 9

MiniLM: random ids, lengths from 8 to 256 tokens, evenly in the logarithm. transformers pads batches of 32, in the order that
the texts come in and sorted by length. Whisper: the encoder over 30 s of features, and greedy steps over its memory.
Contenders take turns, figures are medians, ratios are within one run. Left out: tokenizer and mel spectrogram, which are
libraries' on both sides; a GPU.
"""

import argparse
import inspect
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import transformers as hf

from fastllm import models
from fastllm.models.layers import pack_weights

BATCH, STEPS = 32, 20


def interleaved(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def report(what: str, seconds: dict[str, float], amount: float, unit: str) -> None:
    """A row a contender, its speed also as a multiple of the last one's."""
    last = list(seconds.values())[-1]
    for name, value in seconds.items():
        print(f"{what:<24} {name:<24} {amount / value:>10.1f} {unit:<10} {last / value:>6.2f}")


def pair(name: str, make: type) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(ours, packed; transformers' of the same weights)"""
    ours = models.load(name)
    with tempfile.TemporaryDirectory() as folder:
        models.save(ours, folder)
        return pack_weights(ours), make.from_pretrained(folder).eval()


def minilm(count: int, repeats: int) -> None:
    """Hidden states pooled to vectors."""
    ours, theirs = pair("minilm-l6", hf.BertModel)
    lengths = (8 * 32 ** torch.rand(count)).int().tolist()
    texts = [torch.randint(1000, 30000, (n,)).tolist() for n in lengths]

    def padded(order: list[list[int]]) -> torch.Tensor:
        out = []
        for start in range(0, count, BATCH):
            part = order[start : start + BATCH]
            ids = torch.zeros(len(part), max(map(len, part)), dtype=torch.int64)
            for row, text in zip(ids, part, strict=True):
                row[: len(text)] = torch.tensor(text)
            mask = (ids != 0).long()
            hidden = theirs(ids, attention_mask=mask).last_hidden_state
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            out.append(torch.nn.functional.normalize(pooled, dim=-1))
        return torch.cat(out)

    def packed(model=ours) -> torch.Tensor:
        parts = [texts[start : start + BATCH] for start in range(0, count, BATCH)]
        return torch.cat([model.embed(model.pack_lists(part)) for part in parts])

    int8 = pack_weights(models.load("minilm-l6"), "int8")
    exact = padded(texts)
    print(f"MiniLM: max |delta| of a vector {(packed() - exact).abs().max():.1e}")
    print(f"MiniLM, int8: smallest cosine {(packed(int8) * exact).sum(-1).min():.5f}")
    contenders = {
        "fastllm, packed": packed,
        "fastllm, packed, int8": lambda: packed(int8),
        "transformers, padded": lambda: padded(texts),
        "transformers, sorted": lambda: padded(sorted(texts, key=len)),
    }
    report("MiniLM, embed", interleaved(contenders, repeats), sum(lengths), "tokens/s")


def whisper(repeats: int) -> None:
    """Random features: neither side knows silence from speech."""
    ours, theirs = pair("whisper-base", hf.WhisperForConditionalGeneration)
    features, prompt = torch.randn(1, 80, 3000), torch.tensor([[50258, 50259, 50359, 50363]])
    memory, encoded = ours.encode(features), theirs.model.encoder(features)
    delta = (
        ours.logits(ours.decode(prompt, memory)) - theirs(encoder_outputs=encoded, decoder_input_ids=prompt).logits
    ).abs()
    print(f"Whisper: max |delta| of a logit {delta.max():.1e}")
    contenders = {"fastllm": lambda: ours.encode(features), "transformers": lambda: theirs.model.encoder(features)}
    report("Whisper, encode 30 s", interleaved(contenders, repeats), 30, "s audio/s")

    cache = ours.start(memory, 1, len(prompt[0]) + STEPS * (repeats + 2))
    ours.step(prompt, cache)
    kept = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    keyword = next(
        k for k in ("cache", "past_key_values") if k in inspect.signature(theirs.model.decoder.forward).parameters
    )

    def their_step(ids: torch.Tensor) -> torch.Tensor:
        return theirs(encoder_outputs=encoded, decoder_input_ids=ids, **{keyword: kept}).logits

    their_step(prompt)
    token = torch.tensor([[400]])
    contenders = {
        "fastllm": lambda: [ours.step(token, cache) for _ in range(STEPS)],
        "transformers": lambda: [their_step(token) for _ in range(STEPS)],
    }
    report("Whisper, greedy steps", interleaved(contenders, repeats), STEPS, "tokens/s")


def main() -> None:
    """The table, on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm-l6,whisper-base")
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for name in options.models.split(","):
            if name == "minilm-l6":
                minilm(options.texts, options.repeats)
            elif name == "whisper-base":
                whisper(options.repeats)
            else:
                parser.error(f"--models: {name!r}; allowed: minilm-l6, whisper-base")


if __name__ == "__main__":
    main()
