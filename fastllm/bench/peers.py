"""The libraries that ops are timed against where they are installed; an absent one is a note in the row.

A peer takes the inputs of a suite's `run`, under the same names, and gives the same outputs. What it must keep ready (a
module, a cache in its own layout, a plan) is made once for each copy of the inputs, outside the clock. A case that a
library cannot do raises `Unsupported` with the reason.
"""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..ops import AttentionSpec
from ..ops.kv_cache import PAGE

Call = Callable[..., Any]

CAUSAL = AttentionSpec()


class Unsupported(Exception):
    """What a peer cannot do, in a few words."""


@dataclass(frozen=True)
class Peer:
    """library: the name to import. package: the name to install. call(ready, **inputs): what is timed; ready is what
    `prepare(**inputs)` returned. devices: where its kernels run."""

    library: str
    package: str
    call: Call
    prepare: Call = lambda **_: None
    devices: tuple[str, ...] = ("cuda",)

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.library) is not None


@dataclass
class Prepared:
    """A peer as a function of the inputs alone."""

    peer: Peer
    _ready: dict[int, Any] = field(default_factory=dict)

    def __call__(self, **inputs):
        at = next(t.data_ptr() for t in inputs.values() if torch.is_tensor(t))
        if at not in self._ready:
            self._ready[at] = self.peer.prepare(**inputs)
        return self.peer.call(self._ready[at], **inputs)


def peers_of(op: str, device: str) -> Iterator[tuple[str, Call | str]]:
    """(name, a function of the inputs), or (name, why it is not measured), of all peers of an op on a device."""
    for name, peer in PEERS.get(op, {}).items():
        if device not in peer.devices:
            continue
        yield name, Prepared(peer) if peer.installed else f"absent: `pip install {peer.package}`"


def only(condition: bool, what: str) -> None:
    if not condition:
        raise Unsupported(f"it does not do {what}")


# ------------------------------------------------------------------------------------------------------ memory-bound ops


def liger(call: Call, prepare: Call = lambda **_: None) -> Peer:
    return Peer("liger_kernel", "liger-kernel", call, prepare)


def liger_rms_norm(_, x, weight, eps=1e-6, residual=None):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    only(residual is None, "a residual")
    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)


def flashinfer_rms_norm(_, x, weight, eps=1e-6, residual=None):
    from flashinfer.norm import rmsnorm

    only(residual is None, "a residual out of place")
    only(not (x.requires_grad and torch.is_grad_enabled()), "a backward")
    return rmsnorm(x.flatten(0, -2), weight, eps).view_as(x)


def liger_layer_norm(_, x, weight, bias=None, eps=1e-5, residual=None):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    only(residual is None and bias is not None, "a residual, or a norm without bias")
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def liger_swiglu(_, gate, up):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def liger_geglu(_, gate, up, approximate="none"):
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    only(approximate == "tanh", "the exact gelu")
    return LigerGELUMulFunction.apply(gate, up)


def liger_softmax(_, x, temperature=1.0):
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    only(temperature == 1, "a temperature")
    return LigerSoftmaxFunction.apply(x)


def cosines_and_sines(q, k, position, table, interleaved=False):
    """[B, S, R] each, both halves of a head alike, at the tokens' positions."""
    only(q.dim() == 4 and not interleaved, "packed tokens or interleaved pairs")
    cosine, sine = table[position.expand(q.shape[:2])].to(q.dtype).chunk(2, -1)
    return torch.cat((cosine, cosine), -1), torch.cat((sine, sine), -1)


def liger_rope(ready, q, k, position, table, interleaved=False):
    from liger_kernel.ops.rope import LigerRopeFunction

    # it turns contiguous tensors in place
    q, k = LigerRopeFunction.apply(q.clone().transpose(1, 2), k.clone().transpose(1, 2), *ready)
    return q.transpose(1, 2), k.transpose(1, 2)


# --------------------------------------------------------------------------------------------------------------- losses


def plain_loss(token_weight, spec) -> dict[str, Any]:
    """The fields of a LossSpec under the names that Liger gives them."""
    only(token_weight is None, "weights of single tokens")
    if spec is None:
        return {}
    return {
        "ignore_index": spec.ignore_index, "lse_square_scale": spec.z_loss, "label_smoothing": spec.label_smoothing,
        "reduction": spec.reduction, "softcap": spec.softcap,
    }  # fmt: skip


def liger_cross_entropy(_, logits, target, token_weight=None, spec=None):
    from liger_kernel.transformers.functional import liger_cross_entropy

    # its forward overwrites the logits with their gradient: the copy keeps the caller's
    return liger_cross_entropy(logits.clone(), target, **plain_loss(token_weight, spec))


def liger_linear_cross_entropy(
    _, x, target, weight=None, frozen=None, bias=None, token_weight=None, spec=None, exact=False
):  # fmt: skip
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    weight = frozen.detach() if weight is None else weight
    return liger_fused_linear_cross_entropy(x, weight, target, bias, **plain_loss(token_weight, spec))


def cut_cross_entropy(
    _, x, target, weight=None, frozen=None, bias=None, token_weight=None, spec=None, exact=False
):  # fmt: skip
    from cut_cross_entropy import linear_cross_entropy

    given = plain_loss(token_weight, spec)
    only(bias is None and not given.get("label_smoothing") and not given.get("lse_square_scale"), "bias or smoothing")
    kept = {name: given[name] for name in ("ignore_index", "softcap", "reduction") if name in given}
    return linear_cross_entropy(x, frozen.detach() if weight is None else weight, target, **kept)


# ------------------------------------------------------------------------------------------------------------ attention


def flash_attention(_, q, k, v, spec=CAUSAL, cu_q=None, cu_k=None, bias=None, sinks=None):
    from flash_attn import flash_attn_func

    only(cu_q is None and bias is None and sinks is None, "packed rows here, a bias or sinks")
    only(spec.dropout is None, "our dropout's mask")
    only(q.dtype != torch.float32, "float32")
    window = (-1, -1) if spec.window is None else (spec.window - 1, 0 if spec.causal else spec.window - 1)
    return flash_attn_func(
        q, k, v, softmax_scale=spec.scale, causal=spec.causal, window_size=window, softcap=spec.softcap or 0.0,
        alibi_slopes=spec.alibi,
    )  # fmt: skip


def torch_attention(backend: str | None = None, devices: tuple[str, ...] = ("cuda",)) -> Peer:
    """scaled_dot_product_attention, by the kernel that torch takes or by the one that is named."""

    def call(_, q, k, v, spec=CAUSAL, cu_q=None, cu_k=None, bias=None, sinks=None):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        only(
            cu_q is None and bias is None and sinks is None and spec.alibi is None, "packed rows here, a bias or sinks"
        )
        only(spec.window is None and spec.softcap is None and spec.dropout is None, "a window, a cap or our dropout")
        only(not spec.causal or q.shape[1] == k.shape[1], "queries that end where the keys do")
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(getattr(SDPBackend, backend)) if backend else contextlib.nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=spec.causal, scale=spec.scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out.transpose(1, 2)

    return Peer("torch", "torch", call, devices=devices)


def dense_cache(q, k_pages, v_pages, block_table, context_len, cu_q, spec=CAUSAL, sinks=None, scales=None):
    """The cache of equally long sequences as torch's attention takes it: [B, Hk, keys, D]."""
    only(
        sinks is None and spec.alibi is None and scales is None and spec.window is None,
        "sinks, slopes or a window here",
    )
    only(spec.softcap is None and not spec.exact, "a cap or our order of additions")
    only(len(q) == len(context_len) and len({*context_len.tolist()}) == 1, "several queries, or unequal lengths")
    keys = int(context_len[0])
    used = block_table[:, : -(-keys // PAGE)].long()
    return tuple(t[used].transpose(1, 2).flatten(2, 3)[:, :, :keys].contiguous() for t in (k_pages.mT, v_pages))


def torch_decode(ready, q, k_pages, v_pages, block_table, context_len, cu_q, spec=CAUSAL, **_):
    out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], *ready, scale=spec.scale, enable_gqa=True)
    return out[:, :, 0]


def planned_decode(q, k_pages, v_pages, block_table, context_len, cu_q, spec=CAUSAL, sinks=None, scales=None):
    """FlashInfer's wrapper, planned for these lengths, and the pages in its layout [P, 2, 16, Hk, D]."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    only(sinks is None and spec.alibi is None and scales is None, "sinks, slopes or a scale for each key")
    only(len(q) == len(context_len), "several queries of one sequence here")
    lengths = context_len.tolist()
    counts = [-(-n // PAGE) for n in lengths]
    used = torch.cat([block_table[b, :count] for b, count in enumerate(counts)])
    ends = torch.tensor([0, *counts], device=q.device).cumsum(0).int()
    last = torch.tensor([n - (c - 1) * PAGE for n, c in zip(lengths, counts, strict=True)], device=q.device).int()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(128 << 20, dtype=torch.uint8, device=q.device), "NHD")
    wrapper.plan(
        ends, used, last, q.shape[1], k_pages.shape[1], q.shape[2], PAGE, q_data_type=q.dtype, kv_data_type=q.dtype,
        window_left=-1 if spec.window is None else spec.window - 1, logits_soft_cap=spec.softcap or 0.0,
        sm_scale=spec.scale,
    )  # fmt: skip
    return wrapper, torch.stack((k_pages.permute(0, 3, 1, 2), v_pages.transpose(1, 2)), 1).contiguous()


def flashinfer_decode(ready, q, **_):
    wrapper, pages = ready
    return wrapper.run(q, pages)


# ----------------------------------------------------------------------------------------------------- sampling, linears


def flashinfer_sample(_, logits, state, entropy=True):
    """Temperature, top-k and top-p; neither a seed for each row nor log-probabilities."""
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    only(state.history.shape[1] == 0, "penalties")
    return top_k_top_p_sampling_from_logits(
        logits / state.temperature[:, None].float(), state.top_k, state.top_p.float()
    )


def lora_module(
    x, a, b, weight=None, packed=None, frozen=None, scale=1.0, bias=None, magnitude=None, dropout=None, exact=False
):  # fmt: skip
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    only(magnitude is None and bias is None, "the magnitudes and bias of this case as plain inputs")
    rank, (outputs, inputs) = a.shape[0], (frozen if weight is None else weight).shape
    base = torch.nn.Linear(inputs, outputs, bias=False, device=x.device, dtype=x.dtype)
    base.weight = torch.nn.Parameter((frozen if weight is None else weight).detach(), requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=scale * rank, lora_dropout=dropout.p if dropout else 0.0)
    return Linear(base, "default", config, r=rank, lora_alpha=scale * rank).to(x.device, x.dtype)


def peft_lora(module, x, a, b, **_):
    adapter = {"lora_A.default.weight": a, "lora_B.default.weight": b}
    return torch.func.functional_call(module, adapter, (x,))


PEERS: dict[str, dict[str, Peer]] = {
    "rms_norm": {
        "liger": liger(liger_rms_norm),
        "flashinfer": Peer("flashinfer", "flashinfer-python", flashinfer_rms_norm),
    },
    "layer_norm": {"liger": liger(liger_layer_norm)},
    "swiglu": {"liger": liger(liger_swiglu)},
    "geglu": {"liger": liger(liger_geglu)},
    "softmax": {"liger": liger(liger_softmax)},
    "rope": {"liger": liger(liger_rope, cosines_and_sines)},
    "cross_entropy": {"liger": liger(liger_cross_entropy)},
    "linear_cross_entropy": {
        "liger": liger(liger_linear_cross_entropy),
        "cce": Peer("cut_cross_entropy", "cut-cross-entropy", cut_cross_entropy),
    },
    "attention": {
        "torch sdpa": torch_attention(devices=("cpu", "cuda")),
        "cuDNN": torch_attention("CUDNN_ATTENTION"),
        "FA2 (torch)": torch_attention("FLASH_ATTENTION"),
        "flash-attn": Peer("flash_attn", "flash-attn", flash_attention),
    },
    "paged_attention": {
        "torch sdpa": Peer("torch", "torch", torch_decode, dense_cache),
        "flashinfer": Peer("flashinfer", "flashinfer-python", flashinfer_decode, planned_decode),
    },
    "sample": {"flashinfer": Peer("flashinfer", "flashinfer-python", flashinfer_sample)},
    "lora_linear": {"peft": Peer("peft", "peft", peft_lora, lora_module, devices=("cpu", "cuda"))},
}
