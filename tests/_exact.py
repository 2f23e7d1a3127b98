"""The arithmetic contract of a whole model on a GPU, or on the kernels of one in Triton's interpreter."""

import dataclasses

import _tiny
import torch

from fastllm.data.packed import Packed
from fastllm.decode.cache import KVCache, pieces
from fastllm.models.decoder import Decoder
from fastllm.models.initial import initialise


def check_exact_model(dtype: torch.dtype, device: str = "cpu", layers: int = 1, tokens: int = 45) -> None:
    """A text has the same logits in training's forward, dense, packed and with gradients, and in decoding, in pieces, and
    beside another text."""
    config = dataclasses.replace(_tiny.CONFIG, layers=layers)
    model = initialise(Decoder(config), seed=3).to(device, dtype)
    model.exact = True
    generator = torch.Generator().manual_seed(0)
    ids, other = torch.randint(60, (2, tokens), generator=generator).to(device)
    with torch.no_grad():
        whole = model(ids[None])[0]
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
