"""The decoder-only transformer (Vaswani et al. 2017) of every family, built from `blocks`: what sets GPT-2, Llama, Gemma or BLOOM
apart are values of `DecoderConfig`.

A layer is attention and an MLP, each behind its norm, each added to the residual stream. Where the ops allow it, all that stands
around the four projections is fused into them: a plain Llama layer is norm -> qkv, attention, out + residual, norm -> gate * up,
down + residual. The same layer serves the dense forward (training, scoring) and the paged one (decoding); they differ in the
attention that is passed in. Both run the same ops on the same rows, so they give the same bits.

What is added to the stream by no projection (learned positions, a result that is normed first) is added by the next norm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..data.packed import Packed
from ..ops import AttentionSpec, RopeScaling
from ..ops.linear import exact_logits, few_logits
from .blocks import (
    ACTIVATIONS,
    GATED,
    Adapted,
    Adapters,
    Embedding,
    LayerNorm,
    PagedBatch,
    Projection,
    Recomputable,
    RMSNorm,
    activated,
    recomputable,
)  # fmt: skip

NORMS, POSITIONS = ("rms", "layer"), ("rope", "learned", "alibi")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes: `vocab` V, `layers` L, `dim` the width, `ffn` F, `heads` H, `kv_heads` Hk, `head_dim` D, `max_position`; and kinds:

    tied: the head is the embedding. window: keys that a query sees, in all layers but `full_layers`.
    norm: "rms" or "layer". unit_norm: RMS norms multiply by 1 + weight. post_norm: what attention and MLP give is normed, too.
    qk_norm: RMS norms of each head of q and k. embed_norm: a norm of the embedding. scaled_embedding: it is times sqrt(dim).
    mlp: "swiglu", "geglu", "geglu_tanh", "gelu" or "gelu_tanh". qkv_bias, out_bias, mlp_bias: of the projections.
    position: "rope", "learned" or "alibi". rope_local_theta: of layers with a window, unscaled, where it is another.
    query_scalar: scores are q . k / sqrt(query_scalar), None stands for D. softcap: see AttentionSpec.
    family: whose names a saved folder takes; the model does not read it.
    """

    vocab: int
    layers: int
    dim: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    max_position: int
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = True
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    norm: str = "rms"
    unit_norm: bool = False
    post_norm: bool = False
    qk_norm: bool = False
    embed_norm: bool = False
    scaled_embedding: bool = False
    mlp: str = "swiglu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    position: str = "rope"
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float | None = None
    query_scalar: float | None = None
    softcap: float | None = None
    family: str = "llama"

    def __post_init__(self) -> None:
        sizes = (
            self.vocab,
            self.layers,
            self.dim,
            self.ffn,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.max_position,
        )
        if min(sizes) < 1:
            raise ValueError(f"DecoderConfig: every size must be at least 1, got {self}")
        if self.heads % self.kv_heads:
            raise ValueError(f"DecoderConfig: heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        for name, allowed in (("norm", NORMS), ("position", POSITIONS), ("mlp", tuple(ACTIVATIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"DecoderConfig: {name}={getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.window is not None and not (type(self.window) is int and self.window >= 1):
            raise ValueError(f"DecoderConfig: window={self.window!r}; allowed: an int of at least 1, or None")
        if self.norm == "layer" and (self.unit_norm or self.post_norm):
            raise ValueError("DecoderConfig: unit_norm and post_norm are built for norm='rms'")
        if self.scaled_embedding and not self.post_norm:
            raise ValueError("DecoderConfig: scaled_embedding is built for post_norm=True")

    @property
    def gated(self) -> bool:
        """Whether the MLP's first projection stacks gate over up."""
        return self.mlp in GATED

    @property
    def stacks(self) -> dict[str, tuple[int, ...]]:
        """Rows of the parts that a projection stacks."""
        kv = self.kv_heads * self.head_dim
        return {"qkv": (self.heads * self.head_dim, kv, kv), "gate_up": (self.ffn, self.ffn)}

    def window_of(self, layer: int) -> int | None:
        return None if layer in self.full_layers else self.window


# What every model of a family shares; sizes come from a preset or a file.
TRAITS: dict[str, dict] = {
    "llama": {},
    "mistral": {"family": "mistral"},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True},
    "gemma3": {
        "family": "gemma3",
        "unit_norm": True,
        "post_norm": True,
        "qk_norm": True,
        "scaled_embedding": True,
        "mlp": "geglu_tanh",
    },
    "gpt2": {
        "family": "gpt2",
        "norm": "layer",
        "mlp": "gelu_tanh",
        "position": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    "bloom": {
        "family": "bloom",
        "norm": "layer",
        "embed_norm": True,
        "mlp": "gelu_tanh",
        "position": "alibi",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
}


def _preset(family: str, *sizes: int, **more) -> DecoderConfig:
    return DecoderConfig(*sizes, **(TRAITS[family] | more))


_LLAMA3_2 = RopeScaling("llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)
# Sizes by name, for training from scratch (see presets.py) and for tests; a file brings its own.
PRESETS = {
    "nano": _preset("llama", 4096, 4, 128, 512, 4, 2, 32, 1024),
    "micro": _preset("llama", 4096, 6, 256, 640, 4, 2, 64, 1024),
    "mini": _preset("llama", 4096, 7, 384, 1024, 6, 2, 64, 1024),
    "smollm2-135m": _preset("llama", 49152, 30, 576, 1536, 9, 3, 64, 8192, rope_theta=1e5),
    "tinyllama-1.1b": _preset("llama", 32000, 22, 2048, 5632, 32, 4, 64, 2048, tied=False),
    "llama-2-7b": _preset("llama", 32000, 32, 4096, 11008, 32, 32, 128, 4096, tied=False),
    "llama-3.2-1b": _preset(
        "llama", 128256, 16, 2048, 8192, 32, 8, 64, 131072, rope_theta=5e5, rope_scaling=_LLAMA3_2
    ),
    "mistral-7b": _preset("mistral", 32000, 32, 4096, 14336, 32, 8, 128, 32768, tied=False, window=4096),
    "qwen2.5-0.5b": _preset("qwen2", 151936, 24, 896, 4864, 14, 2, 64, 32768, rope_theta=1e6, eps=1e-6),
    "qwen3-0.6b": _preset("qwen3", 151936, 28, 1024, 3072, 16, 8, 128, 40960, rope_theta=1e6, eps=1e-6),
    "gemma3-1b": _preset(
        "gemma3", 262144, 26, 1152, 6912, 4, 1, 256, 32768, rope_theta=1e6, rope_local_theta=1e4, eps=1e-6, window=512,
        full_layers=(5, 11, 17, 23), query_scalar=256,
    ),
    "gpt2": _preset("gpt2", 50257, 12, 768, 3072, 12, 12, 64, 1024),
    "bloom-560m": _preset("bloom", 250880, 24, 1024, 4096, 16, 16, 64, 2048),
}  # fmt: skip

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Layer(Recomputable):
    """One transformer layer. It takes the stream x and what is still to be added to it, or None, and gives both again."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.heads = (c.heads, c.kv_heads, c.kv_heads)
        self.attn_norm, self.mlp_norm = stream_norm(c), stream_norm(c)
        self.qkv = Projection(c.dim, sum(self.heads) * c.head_dim, bias=c.qkv_bias)
        self.q_norm, self.k_norm = (_rms(c, c.head_dim, c.eps) if c.qk_norm else None for _ in range(2))
        self.out = Projection(c.heads * c.head_dim, c.dim, bias=c.out_bias)
        self.post_attn_norm, self.post_mlp_norm = (
            _rms(c, c.dim, c.eps, scale=1 / embedding_scale(c)) if c.post_norm else None for _ in range(2)
        )
        fused = c.mlp == "swiglu" and not c.mlp_bias
        first = Projection(c.dim, c.ffn * (1 + c.gated), swiglu=fused, bias=c.mlp_bias)
        self.first = "gate_up" if c.gated else "up"
        self.add_module(self.first, first)
        self.activation = None if fused else ACTIVATIONS[c.mlp]
        self.down = Projection(c.ffn, c.dim, bias=c.mlp_bias)

    @recomputable
    def forward(
        self, x: Tensor, added: Tensor | None, index: int, attend: Attend, adapters: Adapters | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x, added [..., dim]; attend(q [..., H, D], k and v [..., Hk, D], layer index) -> [..., H, D]."""

        def adapted(name: str) -> "Adapted | None":  # quoted: Dynamo cannot make the union
            return None if adapters is None else adapters.of(index, name)

        x, qkv = self._read(self.qkv, self.attn_norm, x, added, adapted("qkv"))
        y = attend(*self._heads(qkv), index).flatten(-2)
        x, added = self._write(self.out, self.post_attn_norm, x, y, adapted("out"))
        first, activation = self.get_submodule(self.first), self.activation
        if activation is None and adapters is None and first.gates_apart(x):
            activation = GATED["swiglu"]
        x, h = self._read(first, self.mlp_norm, x, added, adapted(self.first), gate=activation is None)
        if activation is None:
            return self._write(self.down, self.post_mlp_norm, x, h, adapted("down"))
        return activated(
            self, activation, h, lambda y: self._write(self.down, self.post_mlp_norm, x, y, adapted("down"))
        )

    def _read(
        self,
        projection: Projection,
        norm: nn.Module,
        x: Tensor,
        added: Tensor | None,
        adapted: Adapted | None,
        gate: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """x + added, and the projection of its norm."""
        if added is None:
            return x, projection(x, norm=norm, adapted=adapted, gate=gate)
        h, x = norm(x, added)
        return x, projection(h, adapted=adapted, gate=gate)

    def _write(
        self, projection: Projection, norm: RMSNorm | None, x: Tensor, h: Tensor, adapted: Adapted | None
    ) -> tuple[Tensor, Tensor | None]:
        """The stream with the projection of h added, or to be added once it is normed."""
        if norm is None and x.is_cuda and (adapted is not None or not projection.adds(h)):
            return x, projection(h, adapted=adapted)  # there the next norm adds it on its way, in the place of a kernel
        if norm is None:
            return projection(h, residual=x, adapted=adapted), None
        return x, norm(projection(h, adapted=adapted))

    def _heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """[..., (H + 2 Hk) D] as views q [..., H, D], k and v [..., Hk, D]."""
        whole = qkv.unflatten(-1, (sum(self.heads), -1))
        q, k, v = whole.split(self.heads, -2)
        if self.q_norm is not None:
            # Both norm all heads, and the right ones are taken: those of q or k alone lie apart and would be copied.
            q = self.q_norm(whole).narrow(-2, 0, self.heads[0])
            k = self.k_norm(whole).narrow(-2, *self.heads[:2])
        return q, k, v


def _rms(c: DecoderConfig, dim: int, eps: float, scale: float = 1.0) -> RMSNorm:
    return RMSNorm(dim, eps, offset=float(c.unit_norm), scale=scale)


def embedding_scale(c: DecoderConfig) -> float:
    """What the embedding is to be multiplied by.

    It is not: the whole stream is kept divided by it. The norms that read the stream do not see that, but for their eps, which
    is divided by the square; the norms that write to it divide.
    """
    return c.dim**0.5 if c.scaled_embedding else 1.0


def stream_norm(c: DecoderConfig) -> nn.Module:
    """A norm that reads the residual stream."""
    return LayerNorm(c.dim, c.eps) if c.norm == "layer" else _rms(c, c.dim, c.eps / embedding_scale(c) ** 2)


def alibi_slopes(heads: int) -> Tensor:
    """[H] float32: 2^(-8 i / n) for i = 1 .. n, n the power of two below H; for the others the odd i of twice as many
    (Press et al. 2022, arXiv 2108.12409)."""
    n = 1 << heads.bit_length() - 1
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-4 * i / n) for i in range(1, 2 * (heads - n), 2)]
    return torch.tensor(slopes, dtype=torch.float64).float()


class Decoder(nn.Module):
    """model(ids [B, S]) -> logits [B, S, V]; model.hidden(ids) -> [B, S, dim]; model.packed_hidden(batch) -> [T, dim];
    model.step(...) over a paged cache.

    exact, False unless set: the arithmetic contract on a GPU too, for all of these: a token has the same bits in training and
    in decoding, in any batch, beside any adapters, however its text was cut (as always on a CPU). Logits are float32 then,
    and those of `ops.token_logprobs(exact=True)`."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = c = config
        self.embedding = Embedding(c.vocab, c.dim)
        self.positions = Embedding(c.max_position, c.dim) if c.position == "learned" else None
        self.embed_norm = stream_norm(c) if c.embed_norm else None
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.norm = stream_norm(c)
        self.head = Projection(c.dim, c.vocab)
        if c.tied:
            self.head.weight = self.embedding.weight
        with torch.device("cpu"):  # real also in a skeleton that is built on the meta device
            self._tables()

    def _tables(self) -> None:
        """What follows from the config: float32 whatever the weights are cast to."""
        c, local = self.config, None
        if c.position == "rope":
            table = ops.rope_table(c.max_position, c.head_dim, c.rope_theta, scaling=c.rope_scaling)
            if c.rope_local_theta is not None:
                local = ops.rope_table(c.max_position, c.head_dim, c.rope_local_theta)
        else:  # a turn by no angle, for kv_append
            table = torch.tensor([1.0, 0.0]).repeat(c.max_position, 1)
        alibi = alibi_slopes(c.heads) if c.position == "alibi" else None
        for name, tensor in (("rope", table), ("rope_local", local), ("alibi", alibi)):
            self.register_buffer(name, tensor, persistent=False)

    def _apply(self, fn, recurse=True):
        tables = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, table in tables.items():
            if table is not None and not table.is_meta:
                self._buffers[name] = table.to(self._buffers[name].device)
        return self

    @property
    def exact(self) -> bool:
        return self.head.exact

    @exact.setter
    def exact(self, exact: bool) -> None:
        for module in self.modules():
            if isinstance(module, Projection):
                module.exact = exact

    def spec(self, layer: int) -> AttentionSpec:
        """The attention of a layer."""
        c = self.config
        scale = None if c.query_scalar is None else c.query_scalar**-0.5
        window = c.window_of(layer)
        return AttentionSpec(window=window, scale=scale, softcap=c.softcap, alibi=self.alibi, exact=self.exact)

    def table(self, layer: int) -> Tensor:
        """The angles by which a layer turns."""
        return self.rope if self.rope_local is None or self.config.window_of(layer) is None else self.rope_local

    def hidden(self, ids: Tensor, adapters: Adapters | None = None) -> Tensor:
        """Residual stream after the last layer, before the final norm: ids int64 [B, S] -> [B, S, dim]; with a scaled
        embedding it is kept divided by that scale, which no norm sees. adapters: of the tokens [B, S]."""
        if ids.dim() != 2:
            raise ValueError(f"Decoder: ids have shape {tuple(ids.shape)}; they must be [B, S]")
        self._check_length(ids.shape[1])
        position = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return self._turned(ids, position, ops.attention, adapters)

    def packed_hidden(self, batch: Packed) -> Tensor:
        """The same for sequences one after another: [T, dim]. None sees another; each has the bits that it has alone."""
        self._check_length(batch.longest)
        keys = batch.cu_keys

        def attention(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
            return ops.attention_varlen(q, k, v, batch.cu, keys, spec)

        return self._turned(batch.ids, batch.position, attention)

    def _check_length(self, length: int) -> None:
        if length > self.config.max_position:
            raise ValueError(f"Decoder: {length} tokens, the model has {self.config.max_position} positions")

    def _turned(
        self, ids: Tensor, position: Tensor, attention: Callable[..., Tensor], adapters: Adapters | None = None
    ) -> Tensor:
        """The stream with attention(q, k, v, spec) among the tokens themselves, without a cache."""
        turns = self.config.position == "rope"

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            if turns:
                q, k = ops.rope(q, k, position, self.table(layer))
            return attention(q, k, v, self.spec(layer))

        return self._stream(ids, position, attend, adapters)

    def _stream(self, ids: Tensor, position: Tensor, attend: Attend, adapters: Adapters | None) -> Tensor:
        x, added = self.embedding(ids), None
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.positions is not None:
            added = self.positions(position)
        for index, layer in enumerate(self.layers):
            x, added = layer(x, added, index, attend, adapters)
        if added is not None:
            _, x = self.norm(x, added)  # for the sum
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., dim] -> [..., V], final norm included."""
        if self.exact and isinstance(self.head.weight, Tensor):
            return exact_logits(self.norm(hidden), self.head.weight)
        return self.head(hidden, norm=self.norm)

    def step_logits(self, hidden: Tensor) -> Tensor:
        """The same of a decode step, float32: what its tokens are drawn from. Of up to 16 rows on a GPU they are not rounded to
        the model's dtype before."""
        if isinstance(self.norm, RMSNorm) and self.head.adds(hidden):
            return few_logits(hidden, self.head.weight, self.norm.gain, self.norm.eps)
        return self.logits(hidden).float()

    def forward(self, ids: Tensor, adapters: Adapters | None = None) -> Tensor:
        return self.logits(self.hidden(ids, adapters))

    def step(self, ids: Tensor, batch: PagedBatch) -> Tensor:
        """ids int64 [T] of a paged batch -> hidden [T, dim]; writes their keys and values into the batch's pages."""
        turns = self.config.position == "rope"

        def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
            pages = batch.pages[layer]
            turned = ops.kv_append(k, v, pages, batch.slot, batch.position, self.table(layer), q=q if turns else None)
            return ops.paged_attention(
                turned if turns else q, pages, batch.block_table, batch.context_len, batch.cu_q, self.spec(layer)
            )

        return self._stream(ids, batch.position, attend, batch.adapters)
