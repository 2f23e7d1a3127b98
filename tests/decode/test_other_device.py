"""What decoding on a GPU does otherwise than on a CPU, as far as a CPU can do it: rows without numpy, weights without panels."""

import _lora
import _tiny
import pytest
import torch
from _engine import KINDS, PROMPT, Made, engine

from fastllm import SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.limits import decoding_device
from fastllm.decode.rows import Rows
from fastllm.models.arena import lack_of_memory
from fastllm.models.weights import load, load_packed, to_device
from fastllm.ops import Panels, QWeight


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_torch_writes(kind, monkeypatch):
    """Sequences come and go, with drafts: the tokens of rows that numpy writes."""
    texts = [PROMPT[: 30 + 20 * i] * 3 for i in range(5)]
    found = []
    for by_torch in (False, True):
        with monkeypatch.context() as patch:
            if by_torch:
                patch.setattr(torch.Tensor, "numpy", torch.Tensor.detach)
                patch.setattr(Rows, "_row", lambda self, values: torch.tensor(values))
            e = engine(speculate=3, max_num_seqs=3)
            assert isinstance(e.rows._ids, torch.Tensor) == by_torch
            sequences = [Made(text[:200], KINDS[kind], count=12 + i, seed=i) for i, text in enumerate(texts)]
            e.run(sequences)
        found.append([s.made for s in sequences])
    assert found[0] == found[1]


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_leave_their_panels(tmp_path, quantize):
    path = _tiny.gguf(tmp_path / "tiny.gguf")
    packed = load_packed(path, quantize)
    ids = torch.tensor([PROMPT[:20]])
    with torch.inference_mode():
        wanted = packed(ids)
        moved = to_device(packed, "cpu", torch.float32)
        assert not any(isinstance(getattr(m, "weight", None), Panels) for m in moved.modules())
        assert any(isinstance(getattr(m, "weight", None), QWeight) for m in moved.modules()) == bool(quantize)
        assert torch.equal(moved(ids), wanted)
        if not quantize:
            assert torch.equal(moved(ids), load(path)(ids))
            assert to_device(load_packed(path), "cpu", torch.bfloat16).head.weight.dtype == torch.bfloat16


def test_a_quantised_model_computes_in_float32(tmp_path):
    model = to_device(load_packed(_tiny.gguf(tmp_path / "tiny.gguf"), "int8"), "cpu", torch.bfloat16)
    assert model.norm.weight.dtype == torch.float32


def test_which_device():
    assert decoding_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        assert decoding_device("auto").type == "cpu"
        with pytest.raises(ValueError, match="device='cuda', but (torch .* is built without CUDA|no CUDA device)"):
            decoding_device("cuda")
    with pytest.raises(ValueError, match="device='tpu'; allowed: 'auto', 'cpu', 'cuda'"):
        decoding_device("tpu")


def test_a_gpu_s_lack_of_memory_is_told_as_a_cpu_s():
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free."
    )
    told = lack_of_memory(error, "a step of 8 rows", "run fewer")
    assert str(told) == "a step of 8 rows: CUDA out of memory. Tried to allocate 2.00 GiB; run fewer"


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_of_weights_without_panels(tmp_path, dora):
    """As on a GPU, whose pools are of the model's own dtype."""
    path, made = _tiny.gguf(tmp_path / "tiny.gguf"), []
    for place in (lambda model: model, lambda model: to_device(model, "cpu", torch.float32)):
        e = Engine(place(load_packed(path)), 300, frozenset(), max_num_seqs=2)
        e.load_adapter("one", _lora.draw(e.model, seed=3, dora=dora))
        sequences = [Made(PROMPT[:40], SamplingParams(temperature=0.0, adapter=name)) for name in ("one", None)]
        e.run(sequences)
        assert sequences[0].made != sequences[1].made
        made.append([s.made for s in sequences])
    assert made[0] == made[1]
