"""The scripts for a GPU, as far as they go without one."""

import importlib
import json

import decode
import decode_gpu
import exact
import launch
import pytest
import tune

from fastllm.bench.cases import suites


@pytest.mark.parametrize("space", tune.spaces(), ids=lambda s: s.name)
def test_a_space_names_a_case_and_constants_that_exist(space):
    assert any(case.label.startswith(space.case) for case in suites()[space.op].gpu)
    for patch in space.variants.values():
        for module, name in patch:
            assert name in vars(importlib.import_module(f"fastllm.ops.{module}"))


def test_a_patch_holds_for_its_block_alone():
    from fastllm.ops import _gated

    before = _gated.BLOCK
    with pytest.raises(ZeroDivisionError), tune.patched({("_gated", "BLOCK"): 7}):
        assert _gated.BLOCK == 7
        raise ZeroDivisionError
    assert before == _gated.BLOCK


def test_decode_takes_the_device_off_its_arguments():
    assert decode.device(["--device", "cuda", "--batches", "1"]) == ("cuda", ["--batches", "1"])
    assert decode.device(["--repeats", "2"]) == ("cpu", ["--repeats", "2"])
    assert decode_gpu.parse(["--batches", "1"]).batches == "1"


def test_bytes_of_a_step():
    c = decode_gpu.SHAPES["llama-1.2b"]
    assert 2.47e9 < decode_gpu.step_bytes(c, 1) < 2.50e9
    assert decode_gpu.step_bytes(c, 16) > decode_gpu.step_bytes(c, 1)


def test_launch_measures_the_smallest_case(monkeypatch, capsys):
    monkeypatch.setattr(launch, "CALLS", 2)
    monkeypatch.setattr("sys.argv", ["launch.py", "rms_norm", "sample"])
    launch.main()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[0] for row in rows] == ["torch.layer_norm", "autograd", "rms_norm", "sample"]
    assert all(float(row.split()[2]) > 0 for row in rows)


def test_exact_costs_nothing_where_it_always_is(tmp_path, capsys):
    options = ["--shape", "micro", "--device", "cpu", "--tokens", "20", "--texts", "2", "--repeats", "1", "--new", "5"]
    assert exact.main([*options, "--json", str(tmp_path / "exact.json")]) == 0
    rows = json.loads((tmp_path / "exact.json").read_text())["rows"]
    forwards, decodes = (
        {name: row for name, row in rows.items() if name.startswith(kind)} for kind in ("forward", "decode")
    )
    assert len(forwards) == 2 and all(row["ratio"] > 0 for row in forwards.values())
    assert set(decodes) == {f"decode {n} {mode}" for n in (1, 16) for mode in ("default", "exact")}
    assert all(row["delta"] == 0 and row["tokens_per_s"] > 0 for row in decodes.values())
    assert len(capsys.readouterr().out.splitlines()) == 6
