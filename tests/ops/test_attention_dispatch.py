"""Which calls of attention on a GPU go to cuDNN, to CUDA C++ and to Triton: decisions on shapes and features, taken without
a GPU."""

import pytest
import torch

from fastllm.ops import AttentionSpec, Dropout, _cuda
from fastllm.ops.attention import cudnn, hopper


class Cuda:
    """What the decision reads of a tensor on a GPU."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda"):
        self.shape, self.dtype, self.device = shape, dtype, torch.device(device)


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(cudnn, "_available", lambda index: True)


def refusal(q=None, k=None, cu_q=None, **fields):
    q, k, spec = q or Cuda(2, 512, 16, 128), k or Cuda(2, 512, 4, 128), AttentionSpec(**fields)
    return cudnn.refusal(q, k, cu_q, spec.bias, spec.alibi, spec.sinks, spec.settings(q.shape[3]))


def test_plain_dense_attention_goes_to_cudnn():
    assert refusal() is None
    assert refusal(causal=False) is None
    assert refusal(k=Cuda(2, 700, 4, 128), causal=False) is None
    assert refusal(q=Cuda(2, 512, 16, 64, dtype=torch.float16)) is None


@pytest.mark.parametrize(("call", "reason"), [
    ({"q": Cuda(2, 512, 16, 128, dtype=torch.float32)}, "float32"),
    ({"q": Cuda(2, 512, 16, 128, device="cpu")}, "device cpu"),
    ({"q": Cuda(2, 512, 16, 256)}, "head dim 256"),
    ({"q": Cuda(2, 512, 16, 60)}, "head dim 60"),
    ({"q": Cuda(2, 1, 16, 128)}, "a single query"),
    ({"q": Cuda(0, 512, 16, 128), "k": Cuda(0, 512, 4, 128)}, "nothing to do"),
    ({"k": Cuda(2, 700, 4, 128)}, "Sq != Sk"),
    ({"cu_q": torch.tensor([0, 512])}, "packed"),
    ({"exact": True}, "exact"),
    ({"window": 100}, "window"),
    ({"softcap": 5.0, "dropout": Dropout(0.1, 1)}, "softcap, dropout"),
    ({"bias": torch.zeros(1, 1, 1, 512)}, "bias"),
    ({"alibi": torch.ones(16), "sinks": torch.ones(16)}, "alibi, sinks"),
])  # fmt: skip
def test_the_rest_goes_to_triton(call, reason):
    assert reason in refusal(**call)


def test_deterministic_algorithms_go_to_triton():
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in refusal()
    finally:
        torch.use_deterministic_algorithms(False)


def test_torch_s_own_switch_counts():
    with cudnn.switched_off():
        assert refusal() == "torch.backends.cuda.enable_cudnn_sdp(False)"
    assert refusal() is None


def test_without_cudnn_everything_goes_to_triton(monkeypatch):
    monkeypatch.setattr(cudnn, "_available", lambda index: False)
    assert refusal() == "no cuDNN attention on this GPU"


# ------------------------------------------------------------------------------------------------------ CUDA C++, sm_90a


def hopper_refusal(q=None, k=None, v=None, cu_q=None, **fields):
    q = torch.empty(2, 512, 16, 128, dtype=torch.bfloat16) if q is None else q
    k = torch.empty(2, 512, 4, 128, dtype=torch.bfloat16) if k is None else k
    spec = AttentionSpec(**fields)
    return hopper.refusal(
        q, k, k if v is None else v, cu_q, spec.bias, spec.alibi, spec.sinks, spec.settings(q.shape[3])
    )


def test_hopper_takes_dense_heads_of_64_and_128():
    assert hopper_refusal() is None
    assert hopper_refusal(causal=False, window=100) is None
    assert hopper_refusal(torch.empty(1, 1, 2, 64).half(), torch.empty(1, 700, 1, 64).half()) is None
    qkv = torch.empty(2, 100, 8, 64).bfloat16()
    assert hopper_refusal(qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]) is None


@pytest.mark.parametrize(("call", "reason"), [
    ({"q": torch.empty(2, 512, 16, 128)}, "float32"),
    ({"q": torch.empty(2, 512, 16, 96).half()}, "head dim 96: 64 or 128"),
    ({"q": torch.empty(0, 512, 16, 128).half()}, "nothing to do"),
    ({"cu_q": torch.tensor([0, 512])}, "packed"),
    ({"exact": True, "softcap": 5.0, "dropout": Dropout(0.1, 1)}, "softcap, dropout, exact"),
    ({"bias": torch.zeros(1, 1, 1, 512)}, "bias"),
    ({"alibi": torch.ones(16), "sinks": torch.ones(16)}, "alibi, sinks"),
    ({"scale": -1.0}, "scale -1.0: above 0"),
    ({"v": torch.empty(2, 512, 4, 132).half()[..., :128]}, "v with strides"),
    ({"k": torch.empty(1, 512, 4, 128).half().expand(2, -1, -1, -1)}, "k with strides (0, "),
    ({"q": torch.empty(2 * 512 * 16 * 128 + 1).half()[1:].view(2, 512, 16, 128)}, "q with strides"),
])  # fmt: skip
def test_hopper_leaves_the_rest(call, reason):
    assert reason in hopper_refusal(**call)


def test_hopper_is_one_architecture(monkeypatch):
    """On another GPU it says what it needs."""
    monkeypatch.setattr(hopper, "capability", lambda index: (8, 0))
    q = torch.empty(1, 8, 1, 64, dtype=torch.bfloat16)
    on_gpu = Cuda(*q.shape)
    on_gpu.stride, on_gpu.data_ptr = q.stride, q.data_ptr
    settings = AttentionSpec().settings(64)
    said = hopper.refusal(on_gpu, q, q, None, None, None, None, settings)
    assert said == "compute capability 8.0: 9.0, for WGMMA and TMA"
    monkeypatch.setattr(hopper, "capability", lambda index: (9, 0))
    assert hopper.refusal(on_gpu, q, q, None, None, None, None, settings) is None


def launched(monkeypatch, backward: bool, q: Cuda, k: Cuda, **fields) -> str:
    """Who computes a call, or its gradients."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(hopper, name, lambda *_: ("CUDA C++",))
    for name in ("gpu", "gpu_backward"):
        monkeypatch.setattr(hopper, name, lambda *_: ("others",))
    monkeypatch.setattr(hopper, "unit_stride", lambda x: x)
    monkeypatch.setattr(hopper, "refusal", lambda *_: None)
    q.new_empty = torch.empty
    settings = AttentionSpec(**fields).settings(q.shape[3])
    if not backward:
        return hopper.cuda(q, k, k, *(None,) * 5, *settings)[0]
    return hopper.cuda_backward(q, q, k, k, q, None, *(None,) * 5, False, *settings)[0]


@pytest.mark.parametrize(("dim", "heads", "kv_heads", "keys", "fields", "forward", "backward"), [
    (64, 32, 32, 1024, {}, "others", "others"),
    (64, 32, 32, 2048, {}, "CUDA C++", "CUDA C++"),
    (64, 32, 32, 2048, {"causal": False}, "CUDA C++", "others"),
    (64, 32, 8, 512, {}, "others", "CUDA C++"),
    (128, 32, 8, 4096, {}, "CUDA C++", "CUDA C++"),
    (128, 32, 8, 16384, {}, "CUDA C++", "others"),
    (128, 16, 16, 16384, {"causal": False}, "CUDA C++", "others"),
    (128, 16, 16, 100, {"window": 50}, "CUDA C++", "CUDA C++"),  # cuDNN has no windows
])  # fmt: skip
def test_the_faster_one_runs(monkeypatch, dim, heads, kv_heads, keys, fields, forward, backward):
    q, k = Cuda(2, keys, heads, dim), Cuda(2, keys, kv_heads, dim)
    monkeypatch.delenv(_cuda.VARIABLE, raising=False)
    assert launched(monkeypatch, False, q, k, **fields) == forward
    assert launched(monkeypatch, True, q, k, **fields) == backward
    monkeypatch.setenv(_cuda.VARIABLE, "attention")  # then whatever it can
    assert launched(monkeypatch, False, q, k, **fields) == launched(monkeypatch, True, q, k, **fields) == "CUDA C++"


def test_gradients_in_one_order_are_tritons(monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        assert launched(monkeypatch, True, Cuda(2, 4096, 16, 64), Cuda(2, 4096, 16, 64), window=100) == "others"
    finally:
        torch.use_deterministic_algorithms(False)
