"""A benchmark result made by hand, for the tests of what reads one."""

from fastllm.bench.run import SCHEMA


def row(op="rms_norm", case="2048x2048", median=1e-3, moved=40_000_000, flops=8_000_000, ceiling=80.0, **changes):
    times = {"q1": median, "q3": median, "fast": median, "samples": 21, "memory_bytes": 16_800_000}
    bound = "memory" if moved / 80 > flops / 480 else "compute"
    work = moved if bound == "memory" else flops
    rival = lambda factor: {"median": median * factor, **times, "rate": work / median / factor / 1e9}  # noqa: E731
    return {
        "op": op, "case": case, "dtype": "float32", "direction": "forward", "device": "cpu", "kernel": "C++ (avx512)",
        "bytes": moved, "flops": flops, "bound": bound, "unit": "GB/s" if bound == "memory" else "GFLOP/s",
        "arithmetic": "fp32 FMA", "ceiling_name": "memory read" if bound == "memory" else "fp32 FMA",
        "ceiling": ceiling, "fraction": work / median / 1e9 / ceiling, "cache": "cold, 2 copies", "malloc": "tuned",
        "rivals": {"fastllm": rival(1), "torch": rival(4), "compile": rival(1.5)},
        "ratios": {"torch": 4.0, "compile": 1.5}, "discarded": 0, "busy": False, "notes": [], **changes,
    }  # fmt: skip


def result(*rows):
    peaks = {"memory read": {"rate": 80.0, "unit": "GB/s"}, "fp32 FMA": {"rate": 480.0, "unit": "GFLOP/s"}}
    machine = {"cpu": "A CPU", "cores": 2, "threads": 2, "isa": "avx512", "system": "Linux x86_64", "gpus": []}
    return {
        "schema": SCHEMA, "command": "fastllm bench", "versions": {"fastllm": "0.1", "torch": "2.13", "python": "3.11"},
        "machine": machine, "device": "cpu", "settings": {"other_cores": 0.1}, "ceilings": {"tuned": peaks},
        "rows": list(rows), "failures": [], "interrupted": False,
    }  # fmt: skip
