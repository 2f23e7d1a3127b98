"""What a run shows while it goes: a line on a terminal, curves for TensorBoard. Each is a `watch` of `fit`."""

import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

BAR = 24  # characters
AXES = {
    "loss": "loss/train",
    "validation": "loss/validation",
    "validation_bits_per_byte": "bits_per_byte/validation",
    "validation_accuracy": "accuracy/validation",
    "lr": "optimizer/rate",
    "grad_norm": "optimizer/gradient_norm",
    "tokens_per_s": "speed/tokens_per_s",
    "flops_per_s": "speed/flops_per_s",
    "data_share": "speed/waiting_for_data",
}


class Terminal:
    """Steps, losses, speed and what is left of the time. On a terminal one line that is written anew; elsewhere a line for each
    of the log.

    steps: of the whole run. peak: operations a second that the machine can do, for the share that is reached (model FLOPs
    utilisation), None where nobody measured it.
    """

    def __init__(self, steps: int, peak: float | None = None, out: TextIO | None = None):
        self.steps, self.peak, self.out = steps, peak, out or sys.stderr
        self._last: tuple[float, int] | None = None
        self._validation = ""

    def __call__(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        if "validation" in record:
            self._validation = f" · held out {record['validation']:.3f}"
            if "validation_bits_per_byte" in record:
                self._validation += f" ({record['validation_bits_per_byte']:.3f} bits a byte)"
        if "loss" not in record:
            return
        now, left = time.perf_counter(), ""
        if self._last is not None and step > self._last[1]:
            pace = (now - self._last[0]) / (step - self._last[1])
            left = f" · {duration(pace * (self.steps - step))} left"
        self._last = self._last or (now, step)
        share = ""
        if self.peak and math.isfinite(record.get("flops_per_s", math.nan)):
            share = f" · MFU {record['flops_per_s'] / self.peak:.0%}"
        done = BAR * step // self.steps
        bar = f"[{'=' * done}{' ' * (BAR - done)}] " if self.out.isatty() else ""
        line = (
            f"{bar}{step}/{self.steps} · loss {record['loss']:.3f}{self._validation} · "
            f"{record['tokens_per_s']:,.0f} tok/s{share}{left}"
        )
        self._show(line, last=step == self.steps)

    def _show(self, line: str, last: bool) -> None:
        if not self.out.isatty():
            print(line, file=self.out, flush=True)
            return
        width = os.get_terminal_size(self.out.fileno()).columns or len(line)
        print(f"\r\033[K{line[: width - 1]}", end="\n" if last else "", file=self.out, flush=True)


class TensorBoard:
    """The log's figures as curves. ImportError where tensorboard is missing."""

    def __init__(self, folder: Path, step: int = 0):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ImportError(
                "tensorboard=True needs it: pip install 'fastllm[train]'; or give tensorboard=False"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if name in AXES and math.isfinite(value):
                self._writer.add_scalar(AXES[name], value, record["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def duration(seconds: float) -> str:
    """48 s, 3:20 min, 2:05 h"""
    if seconds < 100:
        return f"{seconds:.0f} s"
    whole, unit = (seconds, "min") if seconds < 6000 else (seconds / 60, "h")
    return f"{int(whole) // 60}:{int(whole) % 60:02d} {unit}"
