"""`fastllm info`: complete, derived, and right about why something is not used."""

import json

import pytest
import torch

from fastllm import _C, info
from fastllm.ops import _cuda
from fastllm.ops._op import OPS


def test_every_op_on_every_device_with_a_reason():
    table = {row["op"]: row for row in info.operations()}
    assert table.keys() == {name for name in OPS if not name.endswith("_backward")}
    for name, row in table.items():
        for device in ("cpu", "cuda"):
            assert row[device]["kernel"] == OPS[name].kernel(device).name and row[device]["reason"]
            assert (row[device]["backward"] == "through the reference") == (OPS[name].backward is None)
    text = info.text(info.collect())
    assert all(name in text for name in table)


def test_collect_is_json_and_names_the_machine():
    found = json.loads(json.dumps(info.collect()))
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["isa"] == _C.isa()
    assert found["machine"]["cores"] <= found["machine"]["processors"] and found["machine"]["memory_bytes"] > 0
    assert found["cuda_library"]["reason"] and found["triton"]["reason"]


def test_text_says_how_to_lower_the_isa(monkeypatch):
    monkeypatch.delenv("FASTLLM_ISA", raising=False)
    found = info.collect()
    found["machine"]["isa"] = "avx512"
    assert "avx512 (FASTLLM_ISA=avx2 or generic lowers it)" in info.text(found)
    found["machine"]["openmp"] = None
    assert "kernels run on one thread" in info.text(found)


def test_a_tier_that_was_asked_for_is_not_called_the_best(monkeypatch):
    monkeypatch.setenv("FASTLLM_ISA", _C.isa())
    assert OPS["rms_norm"]._choose("cpu").reason.startswith(f"FASTLLM_ISA={_C.isa()}, ")
    monkeypatch.delenv("FASTLLM_ISA")
    assert OPS["rms_norm"]._choose("cpu").reason.startswith("best tier of this processor, ")


def test_cache_sizes():
    l2, l3 = info.cache_sizes()
    assert 1 << 17 <= l2 <= l3


@pytest.mark.parametrize(
    ("count", "driver", "reason"),
    [
        (None, None, "not built: this copy of fastllm was compiled without nvcc"),
        (2, None, "CUDA 13.0, 2 GPU(s)"),
        (3, None, "it holds code for 80;90+PTX, and GPU 1 is sm_75: build with FASTLLM_CUDA_ARCHS=75"),
        (0, None, "no GPU"),
        (-35, None, "no NVIDIA driver"),
        (
            -35,
            "470.57.02",
            "driver 470.57.02 is too old for CUDA 13",
        ),
        (-100, None, "no CUDA-capable device is detected"),
        (RuntimeError("undefined symbol"), None, "broken: undefined symbol"),
    ],
)
def test_why_the_cuda_library_is_not_used(monkeypatch, tmp_path, count, driver, reason):
    class Core:
        def load_cuda(self, path):
            if isinstance(count, Exception):
                raise count
            return count

        def cuda_runtime_version(self):
            return 13000

        def cuda_architectures(self):
            return "80;90+PTX"

        def cuda_capability(self, device):
            return 75 if count == 3 and device == 1 else 90

        def cuda_error(self, code):
            return "no CUDA-capable device is detected"

    if count is not None:
        (tmp_path / "_cuda.so").touch()
    monkeypatch.setattr(_cuda, "__file__", str(tmp_path / "ops/_cuda.py"))
    monkeypatch.setattr(_cuda, "_C", Core())
    monkeypatch.setattr(_cuda, "driver", lambda: driver)
    used, why = _cuda.library.__wrapped__()
    assert why.startswith(reason) and used == (count == 2)


@pytest.mark.parametrize(
    ("archs", "runs", "runs_not"),
    [
        ("80;90+PTX", (80, 86, 89, 90, 100, 103, 120), (70, 75)),
        ("90", (90,), (75, 80, 89, 100)),
        ("90a+PTX", (90,), (80, 100)),
        ("100f;86", (100, 103, 86, 89), (80, 90, 110, 120)),
    ],
)
def test_which_gpus_the_cuda_library_is_for(archs, runs, runs_not):
    assert all(_cuda.serves(archs, capability) for capability in runs)
    assert not any(_cuda.serves(archs, capability) for capability in runs_not)


def test_the_drivers_version(tmp_path):
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57.02  Tue\nGCC version: 12\n"
    )
    assert _cuda.driver(str(tmp_path / "version")) == "470.57.02" and _cuda.driver(str(tmp_path / "none")) is None
