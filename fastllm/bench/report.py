"""A benchmark's result for people: the table, and the comparison with an older result."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .measure import OURS, TRAIN
from .run import SCHEMA, Result

WIDTH = 120
REGRESSION = 1.10
SHORT = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
MOST_RIVALS = 5


# ------------------------------------------------------------------------------------------------------------- numbers


def seconds(t: float) -> str:
    """Three digits with their unit: 1.21 ms."""
    for scale, unit in ((1, "s"), (1e-3, "ms"), (1e-6, "us")):
        if t >= scale:
            return f"{digits(t / scale)} {unit}"
    return f"{digits(t * 1e9)} ns"


def digits(x: float) -> str:
    return f"{x:.0f}" if x >= 99.95 else f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def rate(x: float | None, unit: str | None) -> str:
    if x is None or unit is None:
        return ""
    return f"{digits(x)} {unit}" if x < 9999.5 else f"{digits(x / 1e3)} {unit.replace('G', 'T', 1)}"


def memory(n: int | None) -> str:
    if n is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= scale:
            return f"{digits(n / scale)} {unit}"
    return f"{n} B"


def fitted(text: str, width: int) -> str:
    return text.ljust(width) if len(text) <= width else text[: width - 1] + "…"


def shortened(text: str, width: int) -> str:
    """Both ends of a label, whose end often tells it from its neighbours."""
    if len(text) <= width:
        return text.ljust(width)
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - head - 1) :]}"


# --------------------------------------------------------------------------------------------------------------- table


def table(result: Result) -> str:
    """The whole report, at most 120 columns wide."""
    lines = [_machine(result), *_ceilings(result), ""]
    rows = result["rows"]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [*_section([row for row in rows if row["op"] == op]), ""]
    return "\n".join([*lines, *_notes(result)])


def _machine(result: Result) -> str:
    m, v = result["machine"], result["versions"]
    name = m["gpus"][0]["name"] if result["device"] == "cuda" and m["gpus"] else f"{m['cpu']}, {m['isa']}"
    return fitted(
        f"{name}, {m['threads']} threads; fastllm {v['fastllm']}, torch {v['torch']}, python {v['python']}", WIDTH
    ).rstrip()


def _ceilings(result: Result) -> Iterable[str]:
    for malloc, found in result["ceilings"].items():
        yield f"ceilings (malloc {malloc}): " + ", ".join(f"{n} {rate(c['rate'], c['unit'])}" for n, c in found.items())


def _section(rows: list[dict[str, Any]]) -> Iterable[str]:
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratios"]))[:MOST_RIVALS]
    head = ["dtype", "pass", "malloc", "time", "rate", "ceiling", "memory", *(f"×{name}"[:9] for name in rivals)]
    body = []
    # both malloc settings of a case stand together, whatever order they ran in
    order = {key: i for i, key in reversed(list(enumerate(map(key_without_malloc, rows))))}
    for row in sorted(rows, key=lambda row: order[key_without_malloc(row)]):
        ours = row["rivals"][OURS]
        body.append([
            SHORT.get(row["dtype"], row["dtype"]),
            "fwd+bwd" if row["direction"] == TRAIN else "fwd",
            row["malloc"],
            seconds(ours["median"]) + ("~" if row["busy"] else " "),
            rate(ours["rate"], row["unit"]),
            "" if row["fraction"] is None else f"{100 * row['fraction']:.0f} %",
            memory(ours["memory_bytes"]),
            *(digits(row["ratios"][name]) if name in row["ratios"] else "-" for name in rivals),
        ])  # fmt: skip
    labels = [row["case"] for row in sorted(rows, key=lambda row: order[key_without_malloc(row)])]
    widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
    label_width = min(max(map(len, labels)), WIDTH - sum(widths) - 2 * len(widths) - 2)
    text = {0, 1, 2}  # left-aligned columns

    def line(label: str, cells: list[str]) -> str:
        cells = [c.ljust(w) if i in text else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join([f"  {shortened(label, label_width)}", *cells]).rstrip()

    kernels = ", ".join(dict.fromkeys(str(row["kernel"]) for row in rows))
    yield f"{rows[0]['op']}: {kernels}"
    yield line("", head)
    for label, cells in zip(labels, body, strict=True):
        yield line(label, cells)


def _notes(result: Result) -> Iterable[str]:
    rows = result["rows"]
    yield "time: our median. ×name: that rival's median over ours, above 1 we are faster. ceiling: share of the"
    yield "bandwidth or peak measured beside it. memory: the most that a call holds beside its inputs."
    yield "malloc tuned: freed memory stays with the process, so that nobody pays page faults for large results."
    discarded, busy = sum(row["discarded"] for row in rows), sum(row["busy"] for row in rows)
    if discarded:
        allowed = result["settings"]["other_cores"]
        yield f"{discarded} rounds were discarded: other processes used more than {allowed} core meanwhile."
    if busy:
        yield f"~ {busy} of {len(rows)} rows: the machine never became quiet; they come from its quietest moments."
    for note in dict.fromkeys(f"{row['op']}: {note}" for row in rows for note in row["notes"]):
        yield fitted(note, WIDTH).rstrip()
    for failure in result["failures"]:
        yield f"FAILED {failure['job']}: {failure['error']}"
    if result["interrupted"]:
        yield "Interrupted: these are the rows that were finished."


# ------------------------------------------------------------------------------------------------------------- compare


def key_without_malloc(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[k] for k in ("op", "case", "dtype", "direction", "device"))


def key(row: dict[str, Any]) -> tuple[str, ...]:
    return (*key_without_malloc(row), row["malloc"])


def load(path: str | Path) -> Result:
    """An older result; ValueError where the file is not one."""
    try:
        result = json.loads(Path(path).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a result of `fastllm bench --json`: {error}") from None
    if not isinstance(result, dict) or "rows" not in result or result.get("schema") != SCHEMA:
        raise ValueError(
            f"{path} is not a result of `fastllm bench --json` of this version (schema {SCHEMA}); measure it again"
        )
    return result


def differences(new: Result, old: Result) -> list[str]:
    """What of the machine differs, so that times cannot be compared."""
    names = ("cpu", "threads", "isa", "system")
    found = [
        f"{n} {old['machine'].get(n)} -> {new['machine'].get(n)}"
        for n in names
        if old["machine"].get(n) != new["machine"].get(n)
    ]
    gpus = [[g["name"] for g in r["machine"].get("gpus", [])] for r in (old, new)]
    return found + ([f"gpu {gpus[0]} -> {gpus[1]}"] if gpus[0] != gpus[1] else [])


def _overlap(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether the quartiles touch, with the same tenth allowed: what decides for rows of a busy machine."""
    return new["rivals"][OURS]["q1"] <= REGRESSION * old["rivals"][OURS]["q3"]


def compare(new: Result, old: Result) -> tuple[str, int]:
    """(text, number of regressions): our time, new over old, row by row. A regression is a median more than a tenth
    slower; where the machine was busy, the quartiles must lie apart as well."""
    before = {key(row): row for row in old["rows"]}
    common = [row for row in new["rows"] if key(row) in before]
    if not common:
        raise ValueError(
            "the older result has no row in common with this one; compare runs of the same ops, dtypes and malloc"
        )
    lines, regressions = [], 0
    if changed := differences(new, old):
        lines.append(f"Warning: another machine or set-up ({'; '.join(changed)}): the ratios say little.")
    lines.append("new/old  time now     before       row")
    for row in common:
        now, then = (r["rivals"][OURS]["median"] for r in (row, before[key(row)]))
        shaky = row["busy"] or before[key(row)]["busy"]
        slower = now / then > REGRESSION and not (shaky and _overlap(row, before[key(row)]))
        regressions += slower
        flag = "  REGRESSION" if slower else ""
        name = " ".join(key(row)) + (" ~" if shaky else "")
        lines.append(f"{now / then:6.2f}   {seconds(now):11}  {seconds(then):11}  {name}{flag}")
    lines.append(f"{regressions} of {len(common)} rows are more than {100 * (REGRESSION - 1):.0f} % slower.")
    if missing := len(before.keys() - {key(row) for row in new["rows"]}):
        lines.append(f"{missing} rows of the older result were not measured now.")
    return "\n".join(lines), regressions
