"""The table, the comparison and the roofline, on a result made by hand."""

import copy
import json
import sys
from pathlib import Path

import pytest
from _bench import result, row

from fastllm.bench import report, roofline


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1.21 ms", 1.21e-3),
        ("12.1 ms", 1.21e-2),
        ("121 ms", 0.121),
        ("1.00 s", 1.0),
        ("25.0 us", 2.5e-5),
        ("180 ns", 1.8e-7),
    ],
)
def test_seconds(text, value):
    assert report.seconds(value) == text


def test_rates():
    assert report.rate(73.6, "GB/s") == "73.6 GB/s" and report.rate(757_000, "GFLOP/s") == "757 TFLOP/s"
    assert report.rate(None, "GB/s") == "" and report.memory(16_785_408) == "16.8 MB"
    assert report.memory(2308) == "2.31 kB" and report.memory(0) == "0 B" and report.memory(None) == ""


def test_a_label_keeps_both_ends():
    assert report.shortened("2048x2048 to 2048 r 16 p 0.1", 20) == "2048x2048 … 16 p 0.1"
    assert report.shortened("short", 7) == "short  " and report.shortened("seven!!", 7) == "seven!!"


def test_table_fits_120_columns():
    long = row(case="a label that goes on and on, " * 8, malloc="default")
    many = row(op="attention", ratios={f"a rival with a name {i}": 1234.5 for i in range(9)}, busy=True, discarded=3)
    many["notes"] = ["torch does not run here: " + "x" * 300]
    text = report.table(result(row(), long, many, row(unit=None, fraction=None, bound=None)))
    assert max(map(len, text.splitlines())) <= 120
    assert (
        "rms_norm: C++ (avx512)" in text
        and "×torch" in text
        and "4.00" in text
        and "50 %" in text
        and "1.00 ms~" in text
    )
    assert "3 rounds were discarded" in text and "1 of 4 rows" in text


def test_both_malloc_settings_of_a_case_stand_together():
    rows = [row(case=c, malloc=m) for m in ("default", "tuned") for c in ("first", "second")]
    lines = [line.split() for line in report.table(result(*rows)).splitlines()]
    order = [(w[0], w[3]) for w in lines if w and w[0] in ("first", "second")]
    assert order == [("first", "default"), ("first", "tuned"), ("second", "default"), ("second", "tuned")]


def test_failures_and_interruption_are_told():
    broken = result(row())
    broken["failures"], broken["interrupted"] = (
        [{"job": "rope x", "error": "RuntimeError: no", "malloc": "tuned"}],
        True,
    )
    text = report.table(broken)
    assert "FAILED rope x: RuntimeError: no" in text and "Interrupted" in text


# -------------------------------------------------------------------------------------------------------------- compare


def test_compare_flags_what_is_more_than_a_tenth_slower():
    old = result(row(case="a"), row(case="b"), row(case="c"), row(case="gone"))
    new = result(
        row(case="a", median=1.09e-3), row(case="b", median=1.2e-3), row(case="c", median=0.5e-3), row(case="new")
    )
    text, regressions = report.compare(new, old)
    assert regressions == 1 and text.count("REGRESSION") == 1
    flagged = next(line for line in text.splitlines() if "REGRESSION" in line)
    assert flagged.split()[0] == "1.20" and " b " in flagged
    assert (
        "1 of 3 rows are more than 10 % slower." in text and "1 rows of the older result were not measured now." in text
    )
    assert "Warning" not in text


def test_compare_of_busy_rows_asks_for_separate_quartiles():
    def spread(q1, q3, **changes):
        made = row(busy=True, **changes)
        made["rivals"]["fastllm"].update(q1=q1, q3=q3)
        return result(made)

    old = spread(0.8e-3, 1.5e-3)
    assert report.compare(spread(1.6e-3, 3e-3, median=2e-3), old)[1] == 0
    assert report.compare(spread(1.7e-3, 3e-3, median=2e-3), old)[1] == 1


def test_compare_warns_on_another_machine():
    old = result(row())
    new = copy.deepcopy(old)
    new["machine"].update(threads=64, isa="avx2")
    text, regressions = report.compare(new, old)
    assert (
        text.startswith("Warning: another machine or set-up (threads 2 -> 64; isa avx512 -> avx2)") and not regressions
    )


def test_compare_needs_something_in_common():
    with pytest.raises(ValueError, match="no row in common"):
        report.compare(result(row(malloc="default")), result(row()))


def test_load(tmp_path):
    path = tmp_path / "old.json"
    for content, message in (
        ("{", "is not a result"),
        ("[1]", "of this version"),
        ('{"schema": 0, "rows": []}', "schema 1"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            report.load(path)
    path.write_text(json.dumps(result(row())))
    assert report.load(path) == result(row())
    with pytest.raises(FileNotFoundError):
        report.load(tmp_path / "nothing.json")


# ------------------------------------------------------------------------------------------------------------- roofline


def test_points_are_one_an_op():
    rows = [
        row(case="small", moved=10**6),
        row(case="large", malloc="default"),
        row(case="large"),
        row(case="larger, another dtype", moved=10**9, dtype="bfloat16"),
        row(case="larger, another pass", moved=10**9, direction="forward+backward"),
        row(op="embedding", flops=0),
        row(op="linear", flops=10**11, ceiling=480.0),
    ]
    chosen, absent = roofline.points(result(*rows))
    assert [(r["op"], r["case"], r["malloc"]) for r in chosen] == [
        ("rms_norm", "large", "tuned"),
        ("linear", "2048x2048", "tuned"),
    ]
    assert absent == ["embedding"]


def test_roofs_are_the_best_seen():
    memory, arithmetic = roofline.roofs(result(row(), row(ceiling=90.0)), [row()])
    assert memory == ("memory read", 90.0) and arithmetic == [("fp32 FMA", 480.0, "GFLOP/s")]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_draw(tmp_path, ending):
    pytest.importorskip("matplotlib", reason="the roofline needs the bench extra")
    rows = [
        row(),
        row(op="linear", flops=10**11, median=0.3, ceiling=480.0),
        row(op="twin"),
        row(op="embedding", flops=0),
    ]
    rows[1]["rivals"].pop("torch")
    path = tmp_path / f"roof.{ending}"
    roofline.draw(result(*rows), path)
    if ending == "svg":
        text = path.read_text()
        assert all(
            word in text for word in ("rms_norm", "×4.0", "memory read 80.0 GB/s", "fp32 FMA 480 GFLOP/s", "embedding")
        )
    else:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000


def test_draw_refuses_an_empty_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the roofline needs the bench extra")
    with pytest.raises(ValueError, match="nothing to draw"):
        roofline.draw(result(row(flops=0)), tmp_path / "roof.png")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'fastllm\[bench\]'"):
        roofline.require(Path("roof.png"), [])
