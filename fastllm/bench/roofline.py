"""The roofline of a result: each op's arithmetic intensity and speed under the two ceilings measured beside it."""

import math
from pathlib import Path
from typing import Any

from .measure import FORWARD, OURS, Job
from .report import rate
from .run import Result

INK, MUTED, ACCENT, GRID, SKY = "#1b1f24", "#6b7280", "#0b62c4", "#e6e8eb", "#f4f5f7"
ROOM, LETTER = 11, 5.7  # points between the middles of two labels; width of a letter


def require(path: Path, jobs: list[Job]) -> None:
    """Raises where the picture of what these jobs find could not be drawn, before anything is measured."""
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    formats = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ValueError(f"--plot {path}: the ending chooses the format; allowed: {', '.join(sorted(formats))}")
    if not any(job.case.flops and job.cost()[0] for job in jobs if job.direction == FORWARD):
        ops = ", ".join(dict.fromkeys(job.suite.op for job in jobs))
        raise ValueError(
            f"--plot {path}: there is nothing to draw: {ops} has no arithmetic; leave it out, or add an op"
        )


def _import_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'fastllm[bench]'") from None


def points(result: Result) -> tuple[list[dict[str, Any]], list[str]]:
    """(one row an op, the ops that have no place in the picture). Of an op's rows: the forward of the case that moves
    most bytes, in its first dtype, with tuned malloc where both were measured."""
    chosen, absent = [], []
    rows = result["rows"]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op and row["direction"] == FORWARD]
        drawable = [row for row in mine if row["flops"] and row["bytes"]]
        if not drawable:
            absent.append(op)
            continue
        first = drawable[0]["dtype"]
        same = [row for row in drawable if row["dtype"] == first]
        chosen.append(max(same, key=lambda row: (row["bytes"], row["malloc"] == "tuned")))
    return chosen, absent


def roofs(result: Result, rows: list[dict[str, Any]]) -> tuple[tuple[str, float], list[tuple[str, float, str]]]:
    """((name, GB/s) of memory, [(name, rate, unit)] of arithmetic): the best seen at the start or beside a row."""
    best: dict[str, tuple[float, str]] = {}
    for found in result["ceilings"].values():
        for name, c in found.items():
            best[name] = max(best.get(name, (0.0, "")), (c["rate"], c["unit"]))
    for row in result["rows"]:
        if row.get("ceiling_name") in best:
            best[row["ceiling_name"]] = max(best[row["ceiling_name"]], (row["ceiling"], row["unit"]))
    bandwidth = next((n, v) for n, (v, unit) in best.items() if unit == "GB/s")
    used = {row["arithmetic"] for row in rows}
    return bandwidth, [(n, v, unit) for n, (v, unit) in best.items() if unit != "GB/s" and n in used]


def draw(result: Result, path: str | Path) -> None:
    """Writes the picture; the file's ending chooses the format."""
    _import_matplotlib()
    import matplotlib

    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 9, "svg.fonttype": "none"}):
        _draw(result, path)


def _draw(result: Result, path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, absent = points(result)
    if not rows:
        raise ValueError("nothing to draw: no op of this result states both bytes and flops of its forward")
    memory, arithmetic = roofs(result, rows)
    figure = Figure(figsize=(10, 6.25), dpi=160)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.125, 0.9, 0.745))
    _frame(axes, rows, memory[1], max(value for _, value, _ in arithmetic))
    _roof(axes, memory, arithmetic)
    _points(axes, rows)

    figure.text(0.075, 0.945, "How near each op comes to what the machine can do", size=14, weight="bold", color=INK)
    figure.text(0.075, 0.9, _subtitle(result, rows), color=MUTED)
    foot = "Forward of each op's largest case; a point on the line uses all of the bandwidth or of the arithmetic."
    if absent:
        foot += f" Without arithmetic, not drawn: {', '.join(absent)}."
    figure.text(0.075, 0.025, foot, color=MUTED, size=8)
    figure.savefig(path)


def _intensity(row: dict[str, Any]) -> float:
    return row["flops"] / row["bytes"]


def _speeds(row: dict[str, Any]) -> dict[str, float]:
    """GFLOP/s of ours and of torch, where it ran."""
    return {name: row["flops"] / r["median"] / 1e9 for name, r in row["rivals"].items() if name in (OURS, "torch")}


def _subtitle(result: Result, rows: list[dict[str, Any]]) -> str:
    m = result["machine"]
    device = f"{m['cpu']}, {m['threads']} threads, {m['isa']}"
    if result["device"] == "cuda" and m["gpus"]:
        device = m["gpus"][0]["name"]
    dtypes = dict.fromkeys(row["dtype"] for row in rows)
    malloc = dict.fromkeys(f"malloc {row['malloc']}" for row in rows)
    return " · ".join([device, f"torch {result['versions']['torch']}", ", ".join(dtypes), ", ".join(malloc)])


def _frame(axes: Any, rows: list[dict[str, Any]], bandwidth: float, top: float) -> None:
    xs = [_intensity(row) for row in rows]
    left, right = min([*xs, 1.0]) / 2.5, max([*xs, 4 * top / bandwidth]) * 4
    bottom = min([bandwidth * left, *(speed for row in rows for speed in _speeds(row).values())]) / 2
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top * 2.4))
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes.set_xlabel("arithmetic intensity: FLOP for each byte that must move", color=INK, labelpad=6)
    axes.set_ylabel("GFLOP/s", color=INK)


def _roof(axes: Any, memory: tuple[str, float], arithmetic: list[tuple[str, float, str]]) -> None:
    """The slope of the bandwidth and a plateau for each kind of arithmetic, named on the lines themselves."""
    name, bandwidth = memory
    (left, right), (_, sky) = axes.get_xlim(), axes.get_ylim()
    top = max(value for _, value, _ in arithmetic)
    ridge = top / bandwidth
    axes.fill_between([left, ridge, right], [bandwidth * left, top, top], [sky] * 3, color=SKY, linewidth=0, zorder=0)
    axes.plot([left, ridge], [bandwidth * left, top], color=INK, linewidth=1.8, solid_capstyle="round")
    start, end = axes.transData.transform([(left, bandwidth * left), (ridge, top)])
    middle = math.sqrt(left * ridge)
    axes.annotate(
        f"{name} {rate(bandwidth, 'GB/s')}", (middle, bandwidth * middle), xytext=(-5, 5), textcoords="offset points",
        ha="center", va="bottom", rotation_mode="anchor", color=INK, weight="bold",
        rotation=math.degrees(math.atan2(end[1] - start[1], end[0] - start[0])),
    )  # fmt: skip
    for name, value, unit in arithmetic:
        width = 1.8 if value == top else 1.1
        axes.plot([value / bandwidth, right], [value] * 2, color=INK, linewidth=width, solid_capstyle="round")
        axes.annotate(
            f"{name} {rate(value, unit)}", (right, value), xytext=(-4, 4), textcoords="offset points",
            ha="right", va="bottom", color=INK, weight="bold",
        )  # fmt: skip


def _points(axes: Any, rows: list[dict[str, Any]]) -> None:
    labels, marks = [], []
    for row in rows:
        x, speed, text = _intensity(row), _speeds(row), row["op"]
        if "torch" in speed:
            axes.plot([x, x], [speed["torch"], speed[OURS]], color=ACCENT, linewidth=1, alpha=0.35, zorder=2)
            axes.plot(x, speed["torch"], "o", mfc="white", mec=MUTED, mew=1.3, ms=7, zorder=3)
            ratio = row["ratios"]["torch"]
            text += f"  ×{ratio:.1f}" if ratio < 9.95 else f"  ×{ratio:.0f}"
        axes.plot(x, speed[OURS], "o", color=ACCENT, mec="white", mew=0.8, ms=8.5, zorder=4)
        labels.append((x, speed[OURS], text))
        marks += [(x, y) for y in speed.values()]
    _label(axes, labels, marks)
    axes.plot([], [], "o", color=ACCENT, ms=8, label="fastllm (×: times as fast as torch)")
    axes.plot([], [], "o", mfc="white", mec=MUTED, mew=1.3, ms=7, label="torch, eager")
    axes.legend(loc="lower right", frameon=False, labelcolor=INK)


def _label(axes: Any, labels: list[tuple[float, float, str]], marks: list[tuple[float, float]]) -> None:
    """Labels to the right of their points, pushed down where they would lie on each other or on a mark."""

    def at(x: float, y: float) -> tuple[float, float]:
        px, py = axes.transData.transform((x, y)) * 72 / axes.figure.dpi
        return px, py

    taken = [(px - 4, px + 4, py) for px, py in (at(*mark) for mark in marks)]  # left, right, middle; in points
    for x, y, text in sorted(labels, key=lambda label: -label[1]):
        px, py = at(x, y)
        begin, end, height = px + 8, px + 8 + LETTER * len(text), py
        while any(begin < e and end > b and abs(height - h) < ROOM for b, e, h in taken):
            height -= 1.0
        taken.append((begin, end, height))
        leader = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4, "relpos": (0, 0.5)}
        axes.annotate(
            text, (x, y), xytext=(8, height - py), textcoords="offset points", va="center", color=INK, zorder=5,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.75},
            arrowprops=leader if height < py - 4 else None,
        )  # fmt: skip
