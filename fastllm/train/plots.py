"""The log of a run as a picture."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

INK, MUTED, TRAINED, HELD_OUT, GRID = "#1b1f24", "#6b7280", "#9fb8d8", "#0b62c4", "#e6e8eb"
SMOOTH = 0.05  # of the lines of a log that one point of the curve is the mean of


def require() -> None:
    """ImportError where matplotlib is missing, before anything is trained."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("plot=True needs matplotlib: pip install 'fastllm[train]'; or give plot=False") from None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The whole lines of log.jsonl."""
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def draw_losses(log: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss over steps, each point and their running mean, with the validations; written whole or not at all."""
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _curve(log, "loss")
    held_steps, held = _curve(log, "validation")
    figure = Figure(figsize=(8, 4.5), dpi=140)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.09, 0.12, 0.88, 0.76))
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(steps):
        width = max(1, round(SMOOTH * len(steps)))
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        if width > 1:
            axes.plot(steps, losses, color=TRAINED, linewidth=0.8)
        axes.plot(steps[width - 1 :], smooth, color=INK, linewidth=1.4, label="training")
    if len(held_steps):
        axes.plot(held_steps, held, color=HELD_OUT, marker="o", markersize=4, linewidth=1.4, label="held out")
        best = int(np.argmin(held))
        axes.annotate(
            f"{held[best]:.3f}", (held_steps[best], held[best]), xytext=(0, 8), textcoords="offset points", ha="center",
            color=HELD_OUT, weight="bold",
        )  # fmt: skip
    axes.set_xlabel("step", color=MUTED)
    axes.set_ylabel("nats a prediction", color=MUTED)
    if len(steps) or len(held_steps):
        axes.legend(frameon=False)
    figure.text(0.09, 0.92, title, size=12, weight="bold", color=INK)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part)
    os.replace(part, path)


def _curve(log: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(line["step"], line[name]) for line in log if name in line and math.isfinite(line[name])]
    return np.array([s for s, _ in found]), np.array([v for _, v in found])
