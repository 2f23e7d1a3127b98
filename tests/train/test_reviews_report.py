"""benchmarks/reviews.py: its table and plot of seeds that were cut off at other places, and how it goes on."""

import json

import pytest
import reviews

OTHERS = {"sarcasm": 0.5, "mmlu": 0.25, "bits_per_byte": 1.2}


def row(count: int, accuracy: float, mixed: bool = False) -> dict:
    return {"count": count, "mixed": mixed, "accuracy": accuracy, "after": OTHERS}


def seed(*rows: dict) -> dict:
    return {"majority": 0.6, "prompted": {"0": 0.5, "5": 0.55}, "before": OTHERS, "tuned": list(rows)}


def test_rows_that_all_seeds_have_in_one_order(tmp_path):
    first = seed(row(900, 0.9), row(900, 0.88, True), row(100, 0.7))  # the last one was done again
    second = seed(row(100, 0.8), row(900, 0.92), row(900, 0.9, True), row(500, 0.85))
    found = reviews.shared([first, second, {}])
    assert [[(r["count"], r["mixed"]) for r in each["tuned"]] for each in found] == 2 * [
        [(100, False), (900, False), (900, True)]
    ]
    lines = reviews.table(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "majority", "0 shots", "5 shots", "100 examples", "900 examples", "900 examples, mixed",
    ]  # fmt: skip
    assert "| 100 examples | 0.750 ± 0.050 |" in lines[5] and "| 0.890 ± 0.010 |" in lines[7]
    reviews.draw(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert reviews.shared([{}]) == []


def test_it_goes_on_with_the_same_options_alone(tmp_path):
    path, given = tmp_path / "reviews.json", {"keep": True, "out": "x", "seeds": [0], "lr": 2e-5}
    assert reviews.kept(path, given) == {}
    path.write_text(json.dumps({"options": given | {"seeds": [1]}, "seeds": {"1": seed()}}))
    assert reviews.kept(path, given) == {"1": seed()}
    with pytest.raises(SystemExit, match="has other lr; leave --keep out"):
        reviews.kept(path, given | {"lr": 1e-5})
