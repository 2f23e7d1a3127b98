"""The pictures of `ladder.py`."""

from pathlib import Path
from statistics import mean
from typing import Any

from fastllm.bench.roofline import ACCENT, GRID, INK, MUTED

BAR = "kneser-ney"
COLORS = {
    "feed-forward": "#8a6d3b",
    "rnn": "#c2410c",
    "lstm": "#15803d",
    "gru": "#0f766e",
    "lstm-attention": "#7c3aed",
    "transformer": ACCENT,
}


def draw_ladder(rows: list, path: Path) -> None:
    """Left: bits per byte of each rung, a point a seed. Right: on validation, over the tokens seen."""
    figure, (left, right) = _figure(2, (1.0, 1.25))
    drawn = [row for row in rows if row.bits]
    for place, row in enumerate(drawn):
        color = COLORS.get(row.name, MUTED)
        left.plot(row.bits, [place] * len(row.bits), "o", color=color, mec="white", mew=0.8, ms=8)
        left.annotate(
            f"{mean(row.bits):.3f}",
            (max(row.bits), place),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    means = [mean(row.bits) for row in drawn]
    steps = [place + side for place in range(len(drawn)) for side in (-0.5, 0.5)]
    left.plot([m for m in means for _ in range(2)], steps, color=GRID, linewidth=5, zorder=0)
    left.set_yticks(range(len(drawn)), [f"{row.title} ({row.year})" for row in drawn])
    left.invert_yaxis()
    low, high = min(min(r.bits) for r in drawn), max(max(r.bits) for r in drawn)
    left.set_xlim(low - 0.08 * (high - low) - 0.01, high + 0.22 * (high - low) + 0.05)
    left.set_xlabel("held-out bits per byte", color=INK)
    left.set_title("What each step bought", loc="left", weight="bold", color=INK)

    curves = [row for row in drawn if row.curves]
    for row in curves:
        for number, curve in enumerate(row.curves):
            label = row.title if number == 0 else None
            xs, ys = zip(*curve, strict=True)
            right.plot(
                [x / 1e6 for x in xs], ys, "-o", ms=3, color=COLORS[row.name], linewidth=1.3, alpha=0.8, label=label
            )
    for row in drawn:
        if row.name == BAR and curves:
            right.axhline(row.validation[0], color=INK, linestyle=":", linewidth=1.2, label=row.title)
    if curves:
        seen = [bits for row in curves for c in row.curves for _, bits in c[1:] or c]
        seen += [row.validation[0] for row in drawn if row.name == BAR]
        right.set_ylim(min(seen) - 0.05, max(seen) + 0.1)
        right.legend(frameon=False, labelcolor=INK, fontsize=8)
    right.set_xlabel("tokens seen, millions", color=INK)
    right.set_title("Bits per byte on validation", loc="left", weight="bold", color=INK)
    figure.tight_layout()
    figure.savefig(path, format="png")


def draw_gradients(rows: list, path: Path) -> None:
    """How much the vector of a token moves the loss at a later one, over the distance, as a share of that at distance 0."""
    figure, panels = _figure(2, (1.0, 1.0))
    for axes, (stage, title) in zip(
        panels, (("initial", "At the beginning"), ("trained", "After training")), strict=True
    ):
        floor = 1.0
        for row in rows:
            if stage in row.gradients:
                norms = [mean(column) for column in zip(*row.gradients[stage], strict=True)]
                shares = [n / norms[0] for n in norms]
                floor = min(floor, *(s for s in shares if s > 0))
                seen = [s if s > 0 else float("nan") for s in shares]
                axes.plot(range(len(seen)), seen, color=COLORS[row.name], linewidth=1.6, label=row.title)
        axes.set_yscale("log")
        axes.set_ylim(max(floor / 2, 1e-12), 3)
        axes.set_xlabel("distance k, tokens", color=INK)
        axes.set_title(title, loc="left", weight="bold", color=INK)
    panels[0].set_ylabel("‖∂ loss(t) / ∂ e(t−k)‖ over that at k = 0", color=INK)
    panels[1].legend(frameon=False, labelcolor=INK, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, format="png")


def _figure(count: int, widths: tuple[float, ...]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.8), dpi=150)
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, count, width_ratios=widths)
    for axes in panels:
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure, panels
