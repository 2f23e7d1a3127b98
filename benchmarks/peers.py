"""The contenders of `decode.py`: fastllm and its peers, each loaded once in a worker process of its own.

    python benchmarks/peers.py '{"kind": "llama.cpp", "path": "model.gguf", "threads": 2}'

What may be asked of one (`workers.py` is the pipe):

    {"do": "load"}                                        -> {"bytes_per_token": int | null}
    {"do": "prefill", "prompts": [ids, ...]}              -> {"seconds": float, "tokens": int}
    {"do": "decode", "prompts": [ids, ...], "new": 64}    -> {"seconds": float, "tokens": int, "ids": [ids, ...]}
    {"do": "nll", "windows": [ids, ...]}                  -> {"nll": [mean over positions 1..n-1 of a window, ...]}
    {"do": "ceilings"}                                    -> {"read", "fma", "dot": float}   (of the "ceiling" alone)

Decoding is greedy, batch 1, never stops at EOS; the prompt's own pass is not in its seconds, the choice of each token
is.
"""

from __future__ import annotations

import ctypes
import math
import sys
import time

import numpy as np
from workers import serve

# ---------------------------------------------------------------- contenders


class Ours:
    """fastllm through its public API; `quantize` and `dtype` choose the weight form.

    Its seconds are those of the calls, detokenisation included; of a decode's, only the prompt's pass is taken off.
    """

    def __init__(self, path, threads, quantize=None, dtype="auto", **_):
        from fastllm import LLM, SamplingParams

        self.params = SamplingParams
        self.llm = LLM(path, quantize=quantize, dtype=dtype, num_threads=threads)
        self.bytes_per_token = int(self.llm.bytes_per_token)

    def _generate(self, prompt, new):
        """One request: (seconds of the whole call, its output)."""
        self.llm.engine.cache.forget()  # the prompt is to be read, not to be found
        start = time.perf_counter()
        out = self.llm.generate([prompt], self.params(max_new_tokens=new, temperature=0.0, ignore_eos=True))[0]
        seconds = time.perf_counter() - start
        if out.timing.prompt_tokens != len(prompt) or len(out.token_ids) != new:
            raise RuntimeError(f"asked for {len(prompt)} + {new} tokens, got {len(out.token_ids)}, {out.timing}")
        return seconds, out

    def prefill(self, prompts):
        return sum(self._generate(prompt, 1)[0] for prompt in prompts)

    def decode(self, prompts, new):
        done = [self._generate(prompt, new + 1) for prompt in prompts]  # the prompt's pass gives the first token
        return sum(seconds - out.timing.prefill_s for seconds, out in done), [out.token_ids for _, out in done]

    def nll(self, windows):
        return [math.log(value) for value in self.llm.perplexity(windows)]


class Transformers:
    """transformers in fp32 on the dequantised weights: eager with a DynamicCache, or StaticCache + torch.compile."""

    def __init__(self, path, threads, compiled=False, **_):
        import torch

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = llama_from_gguf(path)
        self.bytes_per_token = None
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.static = {} if compiled else None

    def _cache(self, length):
        """An empty cache for `length` tokens; a static one is kept for each length, so that nothing recompiles."""
        from transformers import DynamicCache, StaticCache

        if self.static is None:
            return DynamicCache(config=self.model.config)
        if length not in self.static:
            self.static[length] = StaticCache(config=self.model.config, max_cache_len=length)
        self.static[length].reset()
        return self.static[length]

    def _next(self, run, ids, start, cache):
        """Run `ids` at positions start.. and choose the most likely next token."""
        torch = self.torch
        position = torch.arange(start, start + len(ids)).unsqueeze(0)
        logits = run(
            input_ids=torch.tensor([ids]),
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return int(logits[0, -1].argmax())

    def prefill(self, prompts):
        seconds = 0.0
        for prompt in prompts:
            cache = self._cache(len(prompt))
            start = time.perf_counter()
            self._next(self.forward, prompt, 0, cache)
            seconds += time.perf_counter() - start
        return seconds

    def decode(self, prompts, new):
        seconds, texts = 0.0, []
        for prompt in prompts:
            cache = self._cache(len(prompt) + new)
            ids = [self._next(self.model, prompt, 0, cache)]
            start = time.perf_counter()
            for step in range(new):
                ids.append(self._next(self.forward, ids[-1:], len(prompt) + step, cache))
            seconds += time.perf_counter() - start
            texts.append(ids)
        return seconds, texts

    def nll(self, windows):
        from torch.nn.functional import cross_entropy

        result = []
        for window in windows:
            ids = self.torch.tensor([window])
            logits = self.model(input_ids=ids, use_cache=False).logits
            result.append(float(cross_entropy(logits[0, :-1], ids[0, 1:])))
        return result


def llama_from_gguf(path):
    """A transformers Llama in fp32 with the weights of a GGUF file."""
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(path)

    def meta(key, default=None):
        field = reader.fields.get(f"llama.{key}")
        return default if field is None else field.contents()

    tensors = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    heads = meta("attention.head_count")
    config = LlamaConfig(
        vocab_size=int(tensors["token_embd"].shape[1]),
        hidden_size=meta("embedding_length"),
        intermediate_size=meta("feed_forward_length"),
        num_hidden_layers=meta("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=meta("attention.head_count_kv", heads),
        max_position_embeddings=meta("context_length"),
        rms_norm_eps=meta("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": meta("rope.freq_base", 10000.0)},
        tie_word_embeddings="output" not in tensors,
    )
    model = LlamaForCausalLM(config).eval()
    weights = dict(model.named_parameters())
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layer_names = dict(attn_norm="input_layernorm", ffn_norm="post_attention_layernorm")
    layer_names |= {f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"} | dict(attn_output="self_attn.o_proj")
    layer_names |= {f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.startswith("blk."):
                _, block, part = name.split(".")
                theirs = f"model.layers.{block}.{layer_names[part]}"
            else:
                part, theirs = name, names[name]
            value = dequantize(tensor.data, tensor.tensor_type)
            if part in ("attn_q", "attn_k"):  # GGUF interleaves the two rope halves of each head's rows
                n = heads if part == "attn_q" else config.num_key_value_heads
                value = value.reshape(n, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            weights.pop(f"{theirs}.weight").copy_(torch.from_numpy(np.ascontiguousarray(value)))
    if weights:
        raise ValueError(f"{path} has no tensor for {sorted(weights)}")
    return model


class LlamaCpp:
    """llama.cpp through the low-level interface of llama-cpp-python."""

    def __init__(self, path, threads, context=1024, slots=1, batch=None, **_):
        import llama_cpp

        self.lib = lib = llama_cpp
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the file")
        params = lib.llama_context_default_params()
        batch = batch or context
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context * slots, batch, 512, slots
        params.n_threads = params.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.batch = lib.llama_batch_init(batch, 0, 1)
        self.bytes_per_token = None
        print(lib.llama_print_system_info().decode(), file=sys.stderr)

    def _put(self, token, position, slot=0, logits=True):
        """Adds a token to the batch and returns its place there."""
        batch, i = self.batch, self.batch.n_tokens
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, slot
        batch.n_tokens = i + 1
        return i

    def _decode(self):
        status = self.lib.llama_decode(self.context, self.batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def _run(self, ids, start=0, every=False):
        """Put `ids` at positions start..; logits of the last token, or of every token, as an array."""
        self.batch.n_tokens = 0
        for i, token in enumerate(ids):
            self._put(token, start + i, logits=every or i == len(ids) - 1)
        self._decode()
        rows = len(ids) if every else 1
        pointer = self.lib.llama_get_logits(self.context)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        return np.frombuffer((ctypes.c_float * (rows * self.vocab)).from_address(address), np.float32).reshape(rows, -1)

    def _clear(self):
        self.lib.llama_memory_clear(self.memory, True)

    def prefill(self, prompts):
        seconds = 0.0
        for prompt in prompts:
            self._clear()
            start = time.perf_counter()
            int(self._run(prompt)[0].argmax())
            seconds += time.perf_counter() - start
        return seconds

    def decode(self, prompts, new):
        seconds, texts = 0.0, []
        for prompt in prompts:
            self._clear()
            ids = [int(self._run(prompt)[0].argmax())]
            start = time.perf_counter()
            for step in range(new):
                ids.append(int(self._run(ids[-1:], len(prompt) + step)[0].argmax()))
            seconds += time.perf_counter() - start
            texts.append(ids)
        return seconds, texts

    def nll(self, windows):
        result = []
        for window in windows:
            self._clear()
            logits = self._run(window, every=True)[:-1].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            norm = np.log(np.exp(logits).sum(axis=1))
            result.append(float((norm - logits[np.arange(len(window) - 1), window[1:]]).mean()))
        return result


class Ceiling:
    """Not a contender: what the same threads reach at best, in GB/s, GFLOP/s and GOP/s."""

    def __init__(self, path, threads, **_):
        from fastllm.bench.harness import dot_peak, fma_peak, read_bandwidth

        self.bytes_per_token = None
        # memory for as long as a decode sample lasts: its best pass is what the neighbours left for a millisecond
        self.measure = {"read": lambda: read_bandwidth(seconds=1.0), "fma": fma_peak, "dot": dot_peak}


KINDS = {"ours": Ours, "transformers": Transformers, "llama.cpp": LlamaCpp, "ceiling": Ceiling}


# ---------------------------------------------------------------- what may be asked


def answer(contender, request):
    """Do one request and return its reply."""
    if request["do"] == "prefill":
        return {"seconds": contender.prefill(request["prompts"]), "tokens": sum(map(len, request["prompts"]))}
    if request["do"] == "decode":
        seconds, ids = contender.decode(request["prompts"], request["new"])
        return {"seconds": seconds, "tokens": request["new"] * len(ids), "ids": ids}
    if request["do"] == "nll":
        return {"nll": contender.nll(request["windows"])}
    if request["do"] == "ceilings":
        return {name: float(measure()) for name, measure in contender.measure.items()}
    raise ValueError(f"unknown request {request['do']!r}: prefill, decode, nll or ceilings")


if __name__ == "__main__":
    serve(KINDS, answer)
