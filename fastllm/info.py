"""What runs where, and why: `fastllm info`."""

import functools
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import _C
from .ops._cuda import driver
from .ops._cuda import library as cuda_library
from .ops._op import OPS

# ------------------------------------------------------------------------------------------------------------- machine


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def cpu_name() -> str:
    names = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> tuple[int, int]:
    """(physical cores, logical processors) that this process may use."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    siblings = {tuple(_lines(topology.format(c))) or (str(c),) for c in usable}
    return len(siblings), len(usable)


@functools.cache
def cache_sizes() -> tuple[int, int]:
    """Bytes of one core's L2 and of the last-level cache; 1 MiB and 32 MiB where the system does not say."""
    sizes = {2: 1 << 20, 3: 32 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_lines(str(index / name)) for name in ("level", "type", "size"))
        if level and kind and size and kind[0] == "Unified" and size[0].endswith("K"):
            sizes[int(level[0])] = int(size[0][:-1]) << 10
    return sizes[2], max(sizes.values())


def triton_state() -> tuple[bool, str]:
    from .ops import _triton

    if _triton.available():
        return True, f"Triton {package('triton')}"
    return False, _triton.unavailable_reason()


def gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append({"name": p.name, "capability": f"{p.major}.{p.minor}", "memory_bytes": p.total_memory})
    return found


def package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    from . import __version__

    return {
        "fastllm": __version__,
        "torch": torch.__version__,
        "triton": package("triton"),
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    physical, logical = cores()
    l2, l3 = cache_sizes()
    return {
        "cpu": cpu_name(),
        "cores": physical,
        "processors": logical,
        "threads": _C.max_threads(),
        "isa": _C.isa(),
        "l2_bytes": l2,
        "l3_bytes": l3,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "openmp": _C.openmp_path() or None,
        "gpus": gpus(),
        "driver": driver(),
    }


# ----------------------------------------------------------------------------------------------------------------- ops


def operations() -> list[dict[str, Any]]:
    """One record an op: its kernel on each device, with the reason, and what runs its backward."""
    table = []
    for name, op in sorted(OPS.items()):
        if name.endswith("_backward"):
            continue
        row: dict[str, Any] = {"op": name}
        for device in ("cpu", "cuda"):
            kernel = op.kernel(device)
            backward = OPS.get(f"{name}_backward")
            if op.backward is None:
                derivative = "through the reference"
            elif backward is None:
                derivative = "its own formula"
            else:
                derivative = backward.kernel(device).name
            row[device] = {"kernel": kernel.name, "reason": kernel.reason, "backward": derivative}
        table.append(row)
    return table


def collect() -> dict[str, Any]:
    used, why = cuda_library()
    triton_used, triton_why = triton_state()
    return {
        "versions": versions(),
        "machine": machine(),
        "cuda_library": {"used": used, "reason": why},
        "triton": {"used": triton_used, "reason": triton_why},
        "ops": operations(),
    }


# ---------------------------------------------------------------------------------------------------------------- text


def columns(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def mebibytes(n: int) -> str:
    return f"{n / 2**30:.0f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB" if n >= 2**20 else f"{n / 1024:.0f} KiB"


def text(info: dict[str, Any]) -> str:
    m, v = info["machine"], info["versions"]
    lower = {"avx512": "FASTLLM_ISA=avx2 or generic lowers it", "avx2": "FASTLLM_ISA=generic lowers it"}
    isa = m["isa"] + (f" ({lower[m['isa']]})" if m["isa"] in lower else "")
    if os.environ.get("FASTLLM_ISA"):
        isa = f"{m['isa']} (asked for by FASTLLM_ISA={os.environ['FASTLLM_ISA']})"
    rows = [
        ["versions", ", ".join(f"{name} {number or 'not installed'}" for name, number in v.items())],
        ["cpu", f"{m['cpu']}, {m['cores']} cores, {mebibytes(m['memory_bytes'])}"],
        ["caches", f"L2 {mebibytes(m['l2_bytes'])} a core, last level {mebibytes(m['l3_bytes'])}"],
        ["isa", isa],
        ["threads", f"{m['threads']} (torch.set_num_threads or OMP_NUM_THREADS changes it)"],
        ["openmp", m["openmp"] or "none found in the process: kernels run on one thread"],
    ]
    for i, gpu in enumerate(m["gpus"]):
        details = (
            f"{gpu['name']}, capability {gpu['capability']}, {mebibytes(gpu['memory_bytes'])}, driver {m['driver']}"
        )
        rows.append([f"gpu {i}", details])
    if not m["gpus"]:
        rows.append(["gpu", f"none used: {info['triton']['reason']}"])
    for key, title in (("cuda_library", "cuda library"), ("triton", "triton")):
        rows.append([title, ("used: " if info[key]["used"] else "not used: ") + info[key]["reason"]])

    table = [["op", "device", "kernel", "backward", "reason"]]
    for op in info["ops"]:
        for i, device in enumerate(("cpu", "cuda")):
            k = op[device]
            table.append(["" if i else op["op"], device, k["kernel"], k["backward"], k["reason"]])
    return "\n".join([*columns(rows), "", *columns(table)])
