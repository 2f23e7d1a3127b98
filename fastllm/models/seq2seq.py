"""The encoder-decoder: the original Transformer (Vaswani et al. 2017, arXiv 1706.03762), T5 and Flan-T5 (Raffel et al. 2019,
arXiv 1910.10683), Marian, and Whisper (Radford et al. 2022, arXiv 2212.04356), built from `layers`.

Sources are packed: nothing is computed for their padding. In generation the keys and values of a source are computed once,
and all beams of a source read the same ones. A step over the cache gives the bits of the whole forward.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..data.packed import Packed
from ..ops import AttentionSpec
from .blocks import Embedding
from .layers import NORMS, Attend, Layer, LayerConfig, linear
from .positions import RelativeBias, Sinusoids

LONGEST = 1 << 20  # what a table of sinusoids or distances may hold
POSITIONS = ("sinusoidal", "halves", "learned", "relative")


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and constants; `vocab` V, `dim` the width, `ffn` F, `heads` H, `head_dim` D. See LayerConfig for the layers.

    position: "sinusoidal", "halves" (sinusoids, sines first), "learned", or "relative" (T5's bias in `buckets`). max_position:
    the longest target, and source, if source_position does not say otherwise; relative ones have no end.
    scale: of attention scores, None for 1 / sqrt(D). embed_scale, head_scale: factors of embeddings and of what the head reads.
    bins: the source is `bins` mel bins of audio, [B, bins, frames]; 0: token ids. start_id begins every target.
    """

    vocab: int
    encoder_layers: int
    decoder_layers: int
    dim: int
    ffn: int
    heads: int
    head_dim: int
    max_position: int = 512
    position: str = "sinusoidal"
    norm: str = "layer"
    norm_first: bool = False
    activation: str = "relu"
    bias: bool = True
    eps: float = 1e-5
    scale: float | None = None
    embed_scale: float = 1.0
    head_scale: float = 1.0
    head_bias: bool = False
    tied: bool = True
    buckets: int = 32
    max_distance: int = 128
    bins: int = 0
    source_position: int | None = None
    pad_id: int = 0
    start_id: int = 0
    eos_id: int = 1

    def __post_init__(self) -> None:
        layers = (self.encoder_layers, self.decoder_layers)
        if min(self.vocab, *layers, self.max_position, self.buckets, self.max_distance) < 1 or self.bins < 0:
            raise ValueError(f"Seq2SeqConfig: every size must be at least 1, got {self}")
        if self.position not in POSITIONS:
            raise ValueError(f"Seq2SeqConfig: position={self.position!r}; allowed: {', '.join(map(repr, POSITIONS))}")
        if self.position in ("sinusoidal", "halves") and max(self.max_position, self.source_limit) > LONGEST:
            raise ValueError(f"Seq2SeqConfig: max_position={self.max_position}; allowed: up to {LONGEST}")
        if self.position == "relative" and not 4 <= self.buckets < 2 * self.max_distance <= 2 * LONGEST:
            raise ValueError(
                f"Seq2SeqConfig: {self.buckets} buckets up to a distance of {self.max_distance}; "
                f"allowed: at least 4, fewer than twice the distance, which is at most {LONGEST}"
            )
        _ = self.layer  # checks the rest

    @property
    def layer(self) -> LayerConfig:
        """Of each layer."""
        return LayerConfig(
            self.dim, self.ffn, self.heads, self.head_dim, self.eps,
            self.norm, self.norm_first, self.activation, self.bias,
        )  # fmt: skip

    @property
    def source_limit(self) -> int:
        """Positions of the encoder."""
        return self.source_position or self.max_position


_T5 = dict(
    position="relative", norm="rms", norm_first=True, bias=False, eps=1e-6, scale=1.0,
    pad_id=0, start_id=0, eos_id=1,
)  # fmt: skip
# Sizes by name, for training from scratch (see presets.py) and for tests; a file brings its own.
PRESETS = {
    "nano": Seq2SeqConfig(4096, 3, 3, 128, 256, 4, 32, head_scale=128**-0.5, **_T5),
    "micro": Seq2SeqConfig(4096, 3, 3, 256, 512, 4, 64, head_scale=256**-0.5, **_T5),
    "mini": Seq2SeqConfig(4096, 4, 4, 384, 768, 6, 64, head_scale=384**-0.5, **_T5),
    "transformer-base": Seq2SeqConfig(37000, 6, 6, 512, 2048, 8, 64, embed_scale=512**0.5),
    "transformer-big": Seq2SeqConfig(37000, 6, 6, 1024, 4096, 16, 64, embed_scale=1024**0.5),
    "t5-small": Seq2SeqConfig(32128, 6, 6, 512, 2048, 8, 64, head_scale=512**-0.5, **_T5),
    "flan-t5-small": Seq2SeqConfig(
        32128, 8, 8, 512, 1024, 6, 64, activation="geglu_tanh", tied=False, **_T5
    ),
    "whisper-base": Seq2SeqConfig(
        51865, 6, 6, 512, 2048, 8, 64, 448, "learned", norm_first=True, activation="gelu", bins=80, source_position=1500,
        pad_id=50257, start_id=50258, eos_id=50257,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """What the encoder made of B sources: hidden [T, dim], one after another; cu int32 [B + 1], where each begins."""

    hidden: Tensor
    cu: Tensor

    @property
    def count(self) -> int:
        """B"""
        return self.cu.shape[0] - 1


class DecoderCache:
    """Keys and values while targets grow: of the memory, computed once, and of R rows of up to `capacity` tokens, those of a
    source side by side; counts int32 [B]: how many rows each source has."""

    def __init__(self, model: "Seq2Seq", memory: Memory, beams: int, capacity: int):
        c, like = model.config, memory.hidden
        if c.position != "relative" and capacity > c.max_position:
            raise ValueError(f"{capacity} tokens, the model has {c.max_position} positions; ask for fewer")
        self.cross = [layer.memory(like) for layer in model.decoder.layers]
        self.cu, self.capacity, self.length = memory.cu, capacity, 0
        self.counts = torch.full((memory.count,), beams, dtype=torch.int32, device=like.device)
        shape = (c.decoder_layers, memory.count * beams, capacity, c.heads, c.head_dim)
        self.k, self.v = like.new_empty(shape), like.new_empty(shape)

    @property
    def rows(self) -> int:
        """R"""
        return self.k.shape[1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes in k, v [R, n, H, D] of the tokens at `length`; all keys and values so far, [R, length + n, H, D]."""
        stop = self.length + k.shape[1]
        for cache, new in ((self.k, k), (self.v, v)):
            cache[layer, :, self.length : stop] = new
        return self.k[layer, :, :stop], self.v[layer, :, :stop]

    def reorder(self, rows: Tensor, counts: Tensor | None = None) -> None:
        """Row i goes on from what was row rows[i] (int64), of the same source; counts: where sources gave rows up."""
        if counts is not None:
            self.k, self.v, self.counts = self.k[:, rows], self.v[:, rows], counts
        elif not torch.equal(rows, torch.arange(self.rows, device=rows.device)):
            for cache in (self.k, self.v):
                cache[:, :, : self.length] = cache[:, rows, : self.length]


class Stack(nn.Module):
    """Layers, what stands behind the last one (a norm, where norms come first), and what says where a token stands."""

    def __init__(self, config: Seq2SeqConfig, layers: int, limit: int, decoder: bool):
        super().__init__()
        c = config
        self.spec = {"causal": decoder, "scale": c.scale}
        self.layers = nn.ModuleList(Layer(c.layer, cross=decoder) for _ in range(layers))
        self.norm = NORMS[c.norm](c.dim, c.eps) if c.norm_first else None
        self.positions = self.relative = None
        if c.position == "relative":
            self.relative = RelativeBias(c.heads, c.buckets, c.max_distance, both=not decoder)
        elif c.position == "learned":
            self.positions = Embedding(limit, c.dim)
            nn.init.normal_(self.positions.weight, std=0.02)
        else:
            self.positions = Sinusoids(limit, c.dim, halves=c.position == "halves")

    def attention(self, queries: int, keys: int) -> AttentionSpec:
        """Of self-attention, for the last `queries` of `keys` positions (of packed sequences, at most so many)."""
        return AttentionSpec(bias=self.relative(queries, keys) if self.relative else None, **self.spec)

    def place(self, x: Tensor, position: Tensor) -> Tensor:
        """x [..., dim] with where it stands: position int64, of as many dimensions less the last, or broadcast."""
        return x if self.positions is None else x + self.positions(position)

    def last(self, x: Tensor) -> Tensor:
        """Behind the last layer."""
        return x if self.norm is None else self.norm(x)


class AudioFront(nn.Module):
    """Two convolutions over three frames, the second of which takes every other one: [B, bins, frames] -> [B, S, dim]."""

    def __init__(self, bins: int, dim: int):
        super().__init__()
        self.first, self.second = linear(3 * bins, dim), linear(3 * dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        x = ops.gelu(self.first(_windows(features.transpose(1, 2), 1)))
        return ops.gelu(self.second(_windows(x, 2)))


def _windows(x: Tensor, stride: int) -> Tensor:
    """x [B, S, N] -> each frame with its neighbours, as a row of a convolution's weight has them: [B, S', 3 N]."""
    return nn.functional.pad(x, (0, 0, 1, 1)).unfold(1, 3, stride).flatten(-2)


class Seq2Seq(nn.Module):
    """model(source, decoder_ids, mask) -> logits [B, S', V] of the token after each of decoder_ids [B, S'] int64.

    source: token ids int64 [B, S] with a mask [B, S], true or not 0 where there is a token; or features [B, bins, frames] of
    audio. decoder_ids begin with start_id; what follows a target is not seen by it, so it needs no mask.
    """

    def __init__(self, config: Seq2SeqConfig):
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab, c.dim)
        nn.init.normal_(self.embedding.weight, std=1.0 if c.head_scale != 1.0 else c.dim**-0.5)
        self.front = AudioFront(c.bins, c.dim) if c.bins else None
        self.encoder = Stack(c, c.encoder_layers, c.source_limit, decoder=False)
        self.decoder = Stack(c, c.decoder_layers, c.max_position, decoder=True)
        self.head = linear(c.dim, c.vocab, c.head_bias)
        self.tie()

    def tie(self) -> None:
        """Makes head and embedding one again, after either was put in place."""
        if self.config.tied:
            self.head.weight = self.embedding.weight

    # ------------------------------------------------------------------------------------------------------------- encoder

    def encode(self, source: Tensor, mask: Tensor | None = None) -> Memory:
        """Sources as the decoder reads them."""
        if self.front is not None:
            return self._encode_audio(source, mask)
        batch = Packed.of_padded(source, mask)
        if self.encoder.relative is not None:
            _check_no_gaps(batch)
        return self.encode_packed(batch)

    def encode_lists(self, sources: list[list[int]]) -> Memory:
        """Sources of any lengths."""
        return self.encode_packed(Packed.of_lists(sources, self.decoder.layers[0].mlp_norm.weight.device))

    def encode_packed(self, batch: Packed) -> Memory:
        """Sources one after another."""
        if self.front is not None:
            raise ValueError("this model reads audio: give features [B, bins, frames] to `encode`")
        self._check_length(batch.shape[1] if batch.shape else batch.longest, self.config.source_limit)
        x = self.encoder.place(self._embed(batch.ids), batch.position)
        return self._encode(x, batch.cu, batch.longest)

    def _encode_audio(self, features: Tensor, mask: Tensor | None) -> Memory:
        bins = self.config.bins
        if features.dim() != 3 or features.shape[1] != bins:
            raise ValueError(f"features have shape {tuple(features.shape)}; they must be [B, {bins}, frames]")
        if mask is not None:
            raise ValueError("a mask is not for audio: pad features with silence, which the model was trained on")
        x = self.front(features)
        batch, frames, _ = x.shape
        self._check_length(frames, self.config.source_limit)
        x = self.encoder.place(x, torch.arange(frames, device=x.device))
        cu = torch.arange(batch + 1, dtype=torch.int32, device=x.device) * frames
        return self._encode(x.flatten(0, 1), cu, frames)

    def _encode(self, x: Tensor, cu: Tensor, longest: int) -> Memory:
        spec = self.encoder.attention(longest, longest)
        for layer in self.encoder.layers:
            x = layer(x, lambda q, k, v: ops.attention_varlen(q, k, v, cu, cu, spec))
        return Memory(self.encoder.last(x), cu)

    # ------------------------------------------------------------------------------------------------------------- decoder

    def decode(self, decoder_ids: Tensor, memory: Memory) -> Tensor:
        """Final hidden states [B, S', dim] of targets [B, S'], one a source."""
        self._check_targets(decoder_ids, memory.count)
        length = decoder_ids.shape[1]
        position = torch.arange(length, device=decoder_ids.device)
        starts = torch.arange(memory.count + 1, dtype=torch.int32, device=decoder_ids.device) * length
        return self._decode(decoder_ids, position, starts, length, memory, ops.attention)

    def decode_packed(self, targets: Packed, memory: Memory) -> Tensor:
        """The same of targets one after another, one a source: [T, dim]."""
        if targets.count != memory.count:
            raise ValueError(f"{targets.count} targets for {memory.count} sources; each source needs one")

        keys = targets.cu_keys

        def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
            return ops.attention_varlen(q, k, v, targets.cu, keys, spec)

        return self._decode(targets.ids, targets.position, targets.cu, targets.longest, memory, attention)

    def _decode(
        self,
        ids: Tensor,
        position: Tensor,
        starts: Tensor,
        longest: int,
        memory: Memory,
        attention: Callable[..., Tensor],
    ) -> Tensor:
        """attention(q, k, v, spec) among the tokens of each target; starts int32 [B + 1]: where each begins."""
        self._check_length(longest, self.config.max_position)
        spec = self.decoder.attention(longest, longest)
        x = self.decoder.place(self._embed(ids), position)
        cross = self._cross(memory.cu, starts)
        for layer in self.decoder.layers:
            x = layer(x, lambda q, k, v: attention(q, k, v, spec), cross, memory.hidden)
        return self.decoder.last(x)

    @torch.no_grad()
    def start(self, memory: Memory, beams: int = 1, capacity: int | None = None) -> DecoderCache:
        """An empty cache for `beams` targets a source, each of up to `capacity` tokens."""
        return DecoderCache(self, memory, beams, capacity or self.config.max_position)

    @torch.no_grad()
    def step(self, ids: Tensor, cache: DecoderCache) -> Tensor:
        """Takes in the next tokens ids [R, n] of each row, usually one; logits [R, V] of the token after the last. It has no
        gradient."""
        self._check_targets(ids, cache.rows)
        count, first = ids.shape[1], cache.length
        stop = first + count
        if stop > cache.capacity:
            raise ValueError(f"{stop} tokens, the cache holds {cache.capacity}; start it with more")
        spec = self.decoder.attention(count, stop)
        x = self.decoder.place(self._embed(ids), torch.arange(first, stop, device=ids.device))
        starts = nn.functional.pad(cache.counts.cumsum(0), (1, 0)).int() * count
        cross = self._cross(cache.cu, starts)
        for i, layer in enumerate(self.decoder.layers):
            x = layer(x, lambda q, k, v, i=i: ops.attention(q, *cache.append(i, k, v), spec), cross, cache.cross[i])
        cache.length = stop
        return self.logits(self.decoder.last(x[:, -1]))

    def _cross(self, cu: Tensor, starts: Tensor) -> Attend:
        """Attention of q [..., H, D] to keys and values of a memory; starts int32 [B + 1]: where the queries of each source
        begin."""
        spec = AttentionSpec(causal=False, scale=self.config.scale)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ops.attention_varlen(q.flatten(0, -3), k, v, starts, cu, spec).view(q.shape)

        return attend

    # --------------------------------------------------------------------------------------------------------------- whole

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., V]"""
        return self.head(self.scaled(hidden))

    def scaled(self, hidden: Tensor) -> Tensor:
        """What the head reads."""
        scale = self.config.head_scale
        return hidden if scale == 1.0 else hidden * scale

    def hidden(self, source: Tensor, decoder_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Final hidden states of the decoder: [B, S', dim]."""
        return self.decode(decoder_ids, self.encode(source, mask))

    def forward(self, source: Tensor, decoder_ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.logits(self.hidden(source, decoder_ids, mask))

    def _embed(self, ids: Tensor) -> Tensor:
        x, scale = self.embedding(ids), self.config.embed_scale
        return x if scale == 1.0 else x * scale

    def _check_targets(self, ids: Tensor, rows: int) -> None:
        if ids.dim() != 2 or ids.shape[0] != rows or ids.shape[1] < 1:
            raise ValueError(f"decoder_ids have shape {tuple(ids.shape)}; they must be [{rows}, n], n at least 1")

    def _check_length(self, length: int, limit: int) -> None:
        if self.config.position != "relative" and length > limit:
            raise ValueError(f"{length} tokens, the model has {limit} positions; shorten the sequence")


def _check_no_gaps(batch: Packed) -> None:
    """Relative positions are those of tokens that follow one another."""
    if batch.rows is None or not len(batch.rows):
        return
    filled = batch.cu.diff() > 0
    first, last = batch.cu[:-1][filled].long(), batch.cu[1:][filled].long() - 1
    if (batch.position[last] - batch.position[first] != last - first).any():
        raise ValueError("the mask has gaps within a sequence, which relative positions do not know; close them")
