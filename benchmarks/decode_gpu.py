"""Decoding on a GPU: fastllm beside transformers, a Llama of random weights in bfloat16, sampled tokens.

    python benchmarks/decode.py --device cuda                        # Llama 1.24 G, 1 and 16 requests
    python benchmarks/decode_gpu.py --shapes llama-3-8b --batches 1 --peers transformers,transformers-compile

Requests have a prompt of 128 tokens and take 128 new ones with temperature, top-k and top-p. tokens/s: new tokens of all
requests over the time from the first prompt token to the last drawn one; decode: over the time of the steps alone. What is
captured or compiled, is before. `of bandwidth`: bytes of weights and keys that a step must read, over its time, as a share of
a copy's bandwidth in the same run.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch

from fastllm import SamplingParams
from fastllm.bench.ceiling import copy_ceiling
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence
from fastllm.info import machine, versions
from fastllm.models.decoder import PRESETS, Decoder, DecoderConfig

SHAPES = {
    "llama-1.2b": PRESETS["llama-3.2-1b"],
    "llama-3-8b": DecoderConfig(128256, 32, 4096, 14336, 32, 8, 128, 8192, rope_theta=5e5, tied=False),
    "micro": PRESETS["micro"],
}
GOALS = {("llama-1.2b", 1): 800, ("llama-1.2b", 16): 9000, ("llama-3-8b", 1): 160}
PROMPT, NEW = 128, 128
SAMPLING = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


def prompts(batch: int, vocab: int) -> list[list[int]]:
    return torch.randint(vocab, (batch, PROMPT), generator=torch.Generator().manual_seed(batch)).tolist()


@torch.no_grad()
def draw(config: DecoderConfig, device: str = "cuda") -> Decoder:
    """Random weights, of bfloat16 on a GPU."""
    with torch.device(device):
        model = Decoder(config).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    generator = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.normal_(0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1)
    return model


class Ours:
    def __init__(self, config: DecoderConfig, batches: list[int]):
        self.model = draw(config).requires_grad_(False).eval()
        self.engine = Engine(
            self.model,
            PROMPT + NEW + 1,
            frozenset(),
            max(batches),
            prefix_cache=False,
            chunk=2048,
            kv_dtype=torch.bfloat16,
        )

    def run(self, batch: int) -> tuple[float, float]:
        """(seconds, seconds of the decode steps)"""
        sequences = [
            Sequence(ids, NEW, SamplingParams(**SAMPLING), seed=i)
            for i, ids in enumerate(prompts(batch, self.model.config.vocab))
        ]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        self.engine.run(sequences)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        steps = max(s.timing.steps for s in sequences)
        return seconds, sum(s.timing.decode_s for s in sequences) / len(sequences) / max(steps, 1) * NEW


class Transformers:
    def __init__(self, config: DecoderConfig, batches: list[int], compiled: bool):
        import transformers

        c = config
        theirs = transformers.LlamaConfig(
            vocab_size=c.vocab, hidden_size=c.dim, intermediate_size=c.ffn, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, max_position_embeddings=c.max_position,
            tie_word_embeddings=c.tied, bos_token_id=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        with torch.device("cuda"):
            self.model = transformers.AutoModelForCausalLM.from_config(theirs, dtype=torch.bfloat16).eval()
        self.vocab = c.vocab
        self.more = {"cache_implementation": "static"} if compiled else {}

    def run(self, batch: int) -> tuple[float, float]:
        ids = torch.tensor(prompts(batch, self.vocab), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        with torch.inference_mode():
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=True,
                **SAMPLING, **self.more,
            )  # fmt: skip
        torch.cuda.synchronize()
        return time.perf_counter() - begin, float("nan")


PEERS = {"transformers": False, "transformers-compile": True}


def step_bytes(c: DecoderConfig, batch: int) -> int:
    layer = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.dim * c.ffn
    keys = 2 * c.kv_heads * c.head_dim * (PROMPT + NEW // 2) * batch
    return 2 * (c.layers * (layer + keys) + c.vocab * c.dim)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="llama-1.2b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--batches", default="1,16", help="requests that run together")
    parser.add_argument("--peers", default="ours", help=f"of {', '.join(PEERS)}; `ours` for none")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decode-gpu.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    batches = [int(b) for b in options.batches.split(",")]
    bandwidth, rows = copy_ceiling().best(), []
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth:.0f} GB/s")
    print(f"{'shape':14}{'contender':24}{'requests':>9}{'tokens/s':>10}{'decode':>9}{'of bandwidth':>14}{'goal':>7}")
    for shape in options.shapes.split(","):
        config = SHAPES[shape]
        makers = {"fastllm": lambda c=config: Ours(c, batches)}
        for peer in [] if options.peers == "ours" else options.peers.split(","):
            makers[peer] = lambda c=config, compiled=PEERS[peer]: Transformers(c, batches, compiled)
        for name, make in makers.items():
            contender = make()
            for batch in batches:
                contender.run(batch), contender.run(batch)
                times = [contender.run(batch) for _ in range(options.repeats)]
                whole, steps = (statistics.median(t) for t in zip(*times, strict=True))
                share = step_bytes(config, batch) * NEW / steps / 1e9 / bandwidth
                row = {"shape": shape, "contender": name, "requests": batch, "tokens_per_s": batch * NEW / whole}
                row |= {"decode_per_s": batch * NEW / steps, "of_bandwidth": share, "goal": GOALS.get((shape, batch))}
                rows.append(row)
                print(
                    f"{shape:14}{name:24}{batch:9}{row['tokens_per_s']:10.0f}{row['decode_per_s']:9.0f}{share:14.2f}"
                    f"{row['goal'] or '-':>7}",
                    flush=True,
                )
            del contender
            gc.collect()
            torch.cuda.empty_cache()
    result = {"machine": machine(), "versions": versions(), "copy_gb_per_s": bandwidth, "rows": rows}
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
