"""The arithmetic contract of a whole model on a GPU, or on the kernels of one in Triton's interpreter."""

import dataclasses

import _lora
import _tiny
import torch
from torch import Tensor

from fastllm import ops
from fastllm.data.packed import Packed
from fastllm.decode.adapters import AdapterTable
from fastllm.decode.cache import KVCache, pieces
from fastllm.models.blocks import Adapters
from fastllm.models.decoder import Decoder
from fastllm.models.initial import initialise
from fastllm.peft import lora


def exact_model(dtype: torch.dtype, device: str, layers: int) -> Decoder:
    model = initialise(Decoder(dataclasses.replace(_tiny.CONFIG, layers=layers)), seed=3).to(device, dtype)
    model.exact = True
    return model


def draw_ids(device: str, *shape: int) -> Tensor:
    return torch.randint(60, shape, generator=torch.Generator().manual_seed(0)).to(device)


def check_exact_model(dtype: torch.dtype, device: str = "cpu", layers: int = 1, tokens: int = 45) -> None:
    """A text has the same logits in training's forward, dense, packed and with gradients, and in decoding, in pieces, and
    beside another text; what the sampler reports of them is what training's log-probabilities and losses are."""
    model = exact_model(dtype, device, layers)
    ids, other = draw_ids(device, 2, tokens)
    with torch.no_grad():
        whole = model(ids[None])[0]
        assert whole.dtype == torch.float32
        assert torch.equal(model(torch.stack((other, ids)))[1], whole), "a batch"
    assert torch.equal(model(ids[None])[0].detach(), whole), "with gradients"
    with torch.no_grad():
        position, before = torch.arange(tokens, device=device), tokens // 2
        ends = torch.tensor([0, before, before + tokens], dtype=torch.int32, device=device)
        packed = Packed(torch.cat((other[:before], ids)), torch.cat((position[:before], position)), ends, tokens)
        assert torch.equal(model.logits(model.packed_hidden(packed))[before:], whole), "packed"
        cache = KVCache(model.config, 2 * -(-tokens // 16), dtype=dtype, device=device)
        mine, its = cache.take(cache.pages // 2), cache.take(cache.pages // 2)
        for start, stop in ((0, 17), (17, tokens - 1), (tokens - 1, tokens)):
            batch = pieces(cache, [(its, start, stop), (mine, start, stop)]).to(torch.device(device))
            made = model.logits(model.step(torch.cat((other[start:stop], ids[start:stop])), batch))
            assert torch.equal(made[stop - start :], whole[start:stop]), (start, stop)
    for fields in ({}, {"temperature": 0.7, "top_k": 9, "top_p": 0.9}):
        state = ops.SampleState.create(tokens, seed=torch.arange(tokens), device=device, **fields)
        token, logprob, truncated, kept, entropy = ops.sample(whole, state)
        hidden = model.norm(model.packed_hidden(packed))  # with gradients
        target = torch.cat((token[:before], token))
        found = ops.token_logprobs(hidden, model.head.weight, target, exact=True)
        assert torch.equal(found[0][before:], logprob) and torch.equal(found[1][before:], entropy)
        size, heat = torch.cat((kept[:before], kept)), fields.get("temperature", 1.0)
        found = ops.token_logprobs(hidden, model.head.weight, target, size, heat, exact=True)
        assert torch.equal(found[0][before:], truncated)
        spec = ops.LossSpec(reduction="none")
        losses = [ops.linear_cross_entropy(h, model.head.weight, t, spec=spec, exact=True)
                  for h, t in ((hidden, target), (hidden[before:], token))]  # fmt: skip
        assert torch.equal(losses[0][before:], losses[1])
        torch.testing.assert_close(losses[1], -logprob, rtol=1e-5, atol=1e-5)


def check_exact_adapters(dtype: torch.dtype, device: str = "cpu", layers: int = 1, tokens: int = 20) -> None:
    """A text with an adapter has the logits of the model that has it in place, by lora_linear, and one without those of the
    plain model, whatever stands beside them; in decoding too."""
    model = exact_model(dtype, device, layers)
    ranks, table = {"q_proj": 16, "v_proj": 3, "up_proj": 5}, AdapterTable(model)
    adapters = (
        _lora.draw(model, 1, 4),
        _lora.draw(model, 2, lambda name: ranks.get(name.rsplit(".", 1)[1], 0)),
        _lora.draw(model, 3, 70, dora=True),
    )
    for i, adapter in enumerate(adapters):
        table.load(str(i), lora.parts(adapter, model), i)
    ids = draw_ids(device, 4, tokens)
    who = torch.tensor([1, -1, 2, 0], device=device)
    with torch.no_grad():
        wanted = [
            (_lora.adapted(model, adapters[i]) if i >= 0 else model)(text[None])[0]
            for i, text in zip(who.tolist(), ids, strict=True)
        ]
        made = model(ids, Adapters(who[:, None].expand(ids.shape), table.pools))
        for i in range(4):
            assert torch.equal(made[i], wanted[i]), f"row {i}, adapter {who[i]}"
        cache = KVCache(model.config, 4 * -(-tokens // 16), dtype=dtype, device=device)
        pages = [cache.take(cache.pages // 4) for _ in ids]
        for start, stop in ((0, tokens - 1), (tokens - 1, tokens)):
            batch = pieces(cache, [(p, start, stop) for p in pages]).to(torch.device(device))
            batch.adapters = Adapters(who.repeat_interleave(stop - start), table.pools)
            made = model.logits(model.step(ids[:, start:stop].flatten(), batch))
            assert torch.equal(made.unflatten(0, (4, -1)), torch.stack(wanted)[:, start:stop]), (start, stop)
