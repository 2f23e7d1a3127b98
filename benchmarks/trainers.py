"""The contenders of `train.py`: one optimizer step of the same model on the same batch, ours and transformers', with PEFT's
factors where a shape says so.

What may be asked of one (`workers.py` is the pipe):

    {"do": "load"}              -> {}
    {"do": "step", "count": n}  -> {"seconds": float, "losses": [float, ...], "peak_bytes": int}
    {"do": "ceilings"}          -> {"fma": float} on a CPU, GFLOP/s   (of the "ceiling" alone)

Every contender starts from the weights that transformers draws for seed 0 and sees the same random tokens, so the losses of
the first steps must agree. A step is zero gradients, forward, backward, AdamW. peak_bytes: on a CPU the resident memory
at its highest, over all steps so far, beyond what the imports take; on a GPU torch's allocated memory at its highest.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from workers import serve

SEED, LR = 0, 1e-4


@dataclass(frozen=True)
class Shape:
    """A model and its batch. kind: "gpt2" or "llama"; lora: rank of the factors on every linear of the layers, all else is
    frozen, 0: all is trained; tied: a llama whose head is its embedding."""

    kind: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    batch: int
    length: int
    dtype: str
    lora: int = 0
    tied: bool = False


SHAPES = {
    "gpt2-124m": Shape("gpt2", 12, 768, 12, 12, 3072, 50257, 4, 256, "float32"),
    "llama-1.2b": Shape("llama", 16, 2048, 32, 8, 8192, 128256, 4, 2048, "bfloat16", tied=True),
    "llama-3.6b-lora": Shape("llama", 16, 4096, 32, 8, 14336, 32000, 4, 1024, "bfloat16", lora=16, tied=True),
    "smollm2-135m-lora": Shape("llama", 30, 576, 9, 3, 1536, 49152, 4, 256, "float32", lora=16, tied=True),
    "gpt2-tiny": Shape("gpt2", 2, 64, 4, 4, 256, 1000, 2, 32, "float32"),  # for the benchmark's own test
    "llama-tiny": Shape("llama", 2, 64, 4, 2, 192, 1000, 2, 32, "float32"),
    "llama-tiny-lora": Shape("llama", 2, 64, 4, 2, 192, 1000, 2, 32, "float32", lora=4),
}


def theirs(shape: Shape, device: str = "cpu"):
    """The model as transformers has it, weights drawn for SEED, on the device."""
    import torch
    import transformers

    if shape.kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocab, n_positions=max(1024, shape.length), n_embd=shape.dim, n_layer=shape.layers,
            n_head=shape.heads, n_inner=shape.ffn, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab, hidden_size=shape.dim, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.length,
            tie_word_embeddings=shape.tied,
        )  # fmt: skip
    torch.manual_seed(SEED)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, shape.dtype))
    return model.train()


def tokens(shape: Shape, device: str):
    import torch

    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, shape.vocab, (shape.batch, shape.length), generator=generator).to(device)


class Trainer:
    """A contender: `loss(ids)` is a scalar that can be differentiated, `update()` is the optimizer's step."""

    def __init__(self, shape, threads, device, **_):
        import torch

        torch.set_num_threads(threads)
        self.torch, self.device, self.name, self.shape = torch, device, shape, SHAPES[shape]
        importlib.import_module(
            f"transformers.models.{self.shape.kind}.modeling_{self.shape.kind}"
        )  # draws the weights
        self.base = _resident() if device == "cpu" else 0
        self.build()
        self.ids = tokens(self.shape, device)
        _forget_peak(device)

    def step(self, count: int) -> dict:
        losses, start = [], self._now()
        for _ in range(count):
            loss = self.loss(self.ids)
            loss.backward()
            self.update()
            losses.append(loss.detach())
            del loss  # and what is left of its graph
        seconds = self._now() - start
        peak = _peak() - self.base if self.device == "cpu" else self.torch.cuda.max_memory_allocated()
        return {"seconds": seconds, "losses": [float(x) for x in losses], "peak_bytes": peak}

    def _now(self) -> float:
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()


class Transformers(Trainer):
    """Eager or compiled, with torch's fused AdamW."""

    def __init__(self, compiled=False, **spec):
        self.compiled = compiled
        super().__init__(**spec)

    def build(self):
        self.model = theirs(self.shape, self.device)
        if self.shape.lora:
            from low_rank import with_factors_of_peft

            self.model = with_factors_of_peft(self.model, self.shape.lora)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.torch.optim.AdamW(trained, LR, fused=True)
        self.forward = self.torch.compile(self.model) if self.compiled else self.model

    def loss(self, ids):
        return self.forward(input_ids=ids, labels=ids, use_cache=False).loss

    def update(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


class Ours(Trainer):
    """The same weights as a `Decoder`. Each parameter is updated by `ops.adamw` as soon as the backward has its gradient, which
    is freed at once: no more than a few gradients are ever held. master: of a model in 16 bits, float32 weights beside those
    that are read, and float32 moments; without it they have the model's dtype, as the peers' have."""

    def __init__(self, master=False, **spec):
        self.master = master
        super().__init__(**spec)

    def build(self):
        from fastllm import models
        from fastllm.ops import AdamWSpec, AdamWState

        torch, self.done, self.spec = self.torch, 0, AdamWSpec(lr=LR, weight_decay=0.01)
        with tempfile.TemporaryDirectory() as folder:
            # another process draws them: what it would leave of this one's memory in pieces is no part of a step
            subprocess.run([sys.executable, __file__, self.name, folder, self.device], check=True, stdout=sys.stderr)
            self.model = models.load(folder).to(self.device, getattr(torch, self.shape.dtype)).train()
        if self.shape.lora:
            from low_rank import with_factors

            self.model = with_factors(self.model, self.shape.lora)
        for p in (p for p in self.model.parameters() if p.requires_grad):
            wide = p.detach().float() if self.master else None
            state = AdamWState(
                torch.zeros_like(p if wide is None else wide), torch.zeros_like(p if wide is None else wide), wide
            )
            p.register_post_accumulate_grad_hook(functools.partial(self.update_one, state))

    def loss(self, ids):
        from fastllm import ops

        hidden = self.model.norm(self.model.hidden(ids))
        target = self.torch.full_like(ids, -100)
        target[:, :-1] = ids[:, 1:]  # the last token has no successor
        return ops.linear_cross_entropy(hidden.flatten(0, 1), self.model.head.weight, target.flatten())

    def update_one(self, state, parameter):
        from fastllm import ops

        ops.adamw([parameter], [parameter.grad], [state], self.done + 1, self.spec)
        parameter.grad = None

    def update(self):
        self.done += 1


class Ceiling:
    """Not a contender: fp32 multiply-adds a second of the same threads."""

    def __init__(self, threads, **_):
        from fastllm.bench.harness import fma_peak

        self.measure = {"fma": lambda: fma_peak(threads)}


# ---------------------------------------------------------------- memory of this process


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _resident() -> int:
    return _status("VmRSS:")


def _peak() -> int:
    return _status("VmHWM:")


def _forget_peak(device: str) -> None:
    """From here on the peak counts, without the model that the weights were copied from."""
    import gc

    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()
        return torch.cuda.reset_peak_memory_stats()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def answer(contender, request):
    """Do one request and return its reply."""
    if request["do"] == "step":
        return contender.step(request["count"])
    if request["do"] == "ceilings":
        return {name: float(measure()) for name, measure in contender.measure.items()}
    raise ValueError(f"unknown request {request['do']!r}: step or ceilings")


KINDS = {"ours": Ours, "transformers": Transformers, "ceiling": Ceiling}

if __name__ == "__main__":
    if len(sys.argv) == 4:  # for `Ours`
        shape_, folder_, device_ = sys.argv[1:]
        theirs(SHAPES[shape_], device_).save_pretrained(folder_)
    else:
        serve(KINDS, answer)
