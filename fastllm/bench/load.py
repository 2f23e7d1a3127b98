"""How busy the other processes of this machine are: a sample taken while they work is not a measurement."""

import os
import time
from collections.abc import Callable

TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _busy_from_proc() -> float:
    """Seconds that all processors were busy or stolen since boot."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal = (int(v) for v in file.readline().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def _busy_from_psutil() -> float:
    import psutil

    times = psutil.cpu_times()
    return times.user + times.system + getattr(times, "nice", 0.0)


def other_load() -> Callable[[], float] | None:
    """A clock of the CPU seconds used by others than this process, or None where the system does not say."""
    for busy in (_busy_from_proc, _busy_from_psutil):
        try:
            busy()
        except (OSError, ValueError, ImportError):
            continue
        return lambda busy=busy: busy() - time.process_time()
    return None
