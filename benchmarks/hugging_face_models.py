"""The contenders of `hugging_face.py`: SmolLM2-135M as transformers runs it, plain or with our kernels, eager or compiled.

What may be asked of one (`workers.py` is the pipe):

    {"do": "load"}                   -> {}
    {"do": "generate", "new": n}     -> {"seconds": float, "tokens": [int, ...]}   64 tokens after 128 of real text, greedy
    {"do": "step", "count": n}       -> {"seconds": float, "losses": [float, ...], "peak_bytes": int}

Eager generates by `model.generate`. Compiled it is a loop over one StaticCache: the prompt runs as it is, a step is
`torch.compile(model)`. A training step is forward, backward, AdamW (torch's, fused) on 4 x 256 tokens of real text.
"""

import time

from trainers import _forget_peak, _peak, _resident
from workers import serve

PROMPT, ROWS, LENGTH, LR = 128, 4, 256, 1e-5


class Contender:
    """One model in one of the four ways."""

    def __init__(self, path, threads, accelerated, compiled, train, options, **_):
        import torch
        from peers import llama_from_gguf
        from texts import token_stream

        from fastllm.integrations.transformers import accelerate

        torch.set_num_threads(threads)
        self.torch, self.compiled, self.base = torch, compiled, _resident()
        self.model = llama_from_gguf(path)
        self.model.generation_config.pad_token_id = 0
        ids = token_stream(path)[: ROWS * LENGTH]
        self.prompt, self.batch = torch.tensor([ids[:PROMPT]]), torch.tensor(ids).view(ROWS, LENGTH)
        if accelerated:
            accelerate(self.model, quiet=True, **options)
        self.run, self.cache = self.model, None
        if compiled:
            self.run = torch.compile(self.model, dynamic=False)
        if train:
            self.model.train()
            self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, fused=True)
        _forget_peak("cpu")

    def generate(self, new):
        with self.torch.no_grad():
            start = time.perf_counter()
            tokens = self._loop(new) if self.compiled else self._generate(new)
            return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def _generate(self, new):
        out = self.model.generate(self.prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return out[0, PROMPT:].tolist()

    def _loop(self, new):
        from transformers import StaticCache

        if self.cache is None:
            self.cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + new)
        self.cache.reset()
        position = self.torch.arange(PROMPT + new)[None]
        tokens, run, ids = [], self.model, self.prompt
        for i in range(new):
            at = position[:, :PROMPT] if i == 0 else position[:, PROMPT + i - 1 : PROMPT + i]
            logits = run(ids, position_ids=at, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
            ids, run = logits[:, -1].argmax(-1, keepdim=True), self.run
            tokens.append(int(ids))
        return tokens

    def step(self, count):
        losses, start = [], time.perf_counter()
        for _ in range(count):
            loss = self.run(input_ids=self.batch, labels=self.batch, use_cache=False).loss
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return {"seconds": time.perf_counter() - start, "losses": losses, "peak_bytes": _peak() - self.base}


def answer(contender, request):
    if request["do"] == "generate":
        return contender.generate(request["new"])
    return contender.step(request["count"])


if __name__ == "__main__":
    serve({"transformers": Contender}, answer)
