"""The serving benchmark: the load is what it says, latencies count from when a request was due, figures are right, and whole
runs of a tiny model, ours and llama.cpp's."""

import json
import math
from itertools import chain, pairwise
from statistics import mean, variance

import _tiny
import pytest
import serve_load
import servers
from serve_load import Mix, Request, Row, at_rate, covered, largest_rate, schedule

from fastllm import LLM, SamplingParams

SMALL = Mix(prompt=(4, 16), answer=(2, 8), shared=0.5, prefix=16, prefixes=2)
TEXT = [3 + (i * i + 7 * i) % 97 for i in range(2000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("served") / "tiny.gguf")


# ------------------------------------------------------------------------------------------------------------- the load


def test_a_seed_makes_the_load():
    made = schedule(TEXT, 40, 7, SMALL)
    assert made == schedule(TEXT, 40, 7, SMALL) != schedule(TEXT, 40, 8, SMALL)
    assert made[:9] == schedule(TEXT, 9, 7, SMALL)


def test_arrivals_are_poisson():
    at = [request.at for request in schedule(list(range(200_000)), 20_000, 1, Mix((1, 8), (1, 8), 0.0))]
    gaps = [b - a for a, b in pairwise([0.0, *at])]
    assert min(gaps) >= 0 and mean(gaps) == pytest.approx(1, abs=0.03) and variance(gaps) == pytest.approx(1, abs=0.08)
    assert mean(gap > 1 for gap in gaps) == pytest.approx(math.exp(-1), abs=0.015)
    counts = [0] * int(at[-1])
    for time in at:
        if time < len(counts):
            counts[int(time)] += 1
    assert variance(counts) / mean(counts) == pytest.approx(1, abs=0.05)
    neighbours = mean((a - 1) * (b - 1) for a, b in pairwise(gaps))
    assert neighbours == pytest.approx(0, abs=0.03)


def test_lengths_are_even_in_the_logarithm():
    made = schedule(list(range(200_000)), 4000, 2, Mix((4, 64), (2, 32), 0.0))
    for lengths, low, high in (([len(r.prompt) for r in made], 4, 64), ([r.new for r in made], 2, 32)):
        assert (min(lengths), max(lengths)) == (low, high)
        middle = math.sqrt(low * (high + 1))
        assert mean(length <= middle for length in lengths) == pytest.approx(0.5, abs=0.06)


def test_some_prompts_share_a_prefix_and_no_two_share_more():
    stream = list(range(2000))
    made = schedule(stream, 40, 3, SMALL)
    prefixes = [stream[:16], stream[16:32]]
    sharing = [r for r in made if r.prompt[:16] in prefixes]
    assert {tuple(r.prompt[:16]) for r in sharing} == set(map(tuple, prefixes)) and 10 <= len(sharing) <= 30
    own = [r.prompt[16:] if r in sharing else r.prompt for r in made]
    assert [*chain(*own)] == stream[32 : 32 + sum(map(len, own))]


def test_a_rate_scales_the_arrivals_alone():
    made = schedule(TEXT, 10, 7, SMALL)
    twice, together = at_rate(made, 2.0), at_rate(made, math.inf)
    assert [r.at for r in twice] == [r.at / 2 for r in made] and {r.at for r in together} == {0.0}
    assert (
        [(r.prompt, r.new) for r in twice] == [(r.prompt, r.new) for r in together] == [(r.prompt, r.new) for r in made]
    )


def test_the_warm_up_has_every_number_of_rows():
    made = serve_load.warm_up(schedule(TEXT, 3, 7, SMALL), 4, 200)
    assert [r.new for r in made] == [4, 8, 12, 16] and {r.at for r in made} == {0.0}
    assert all(len(r.prompt) + r.new <= SMALL.longest for r in serve_load.warm_up(made, 64, SMALL.longest))


def test_too_little_text_is_an_error():
    with pytest.raises(ValueError, match="need more text than the 50 tokens"):
        schedule(TEXT[:50], 40, 7, SMALL)


# --------------------------------------------------------------------------------------------------------- the figures


def row(requests, times, handed=None, rate=1.0) -> Row:
    made = Row("fastllm", rate)
    tokens = [[1] * len(each) for each in times]
    handed = handed or [request.at for request in requests]
    made.add(requests, {"times": times, "handed": handed, "tokens": tokens, "client_s": 0.5, "steps_s": 3.0})
    return made


def test_latency_counts_from_when_a_request_was_due():
    """Not from when a client that was kept waiting had sent it."""
    late = row([Request(1.0, [5], 3)], [[4.0, 4.5, 6.0]], handed=[3.5])
    assert (late.ttft, late.whole, late.late) == ([3.0], [5.0], [2.5])
    assert late.per_token == [1.0] and late.gap == [0.5, 1.5]


def test_figures():
    requests = [Request(float(i), [5], 2) for i in range(101)]
    times = [[i + i / 100, i + i / 100 + 0.25] for i in range(101)]
    figures = row(requests, times).figures()
    assert figures["ttft_p50"] == pytest.approx(0.5) and figures["ttft_p99"] == pytest.approx(0.99)
    assert figures["per_token_p50"] == figures["per_token_p99"] == pytest.approx(0.25)
    assert figures["whole_p99"] == pytest.approx(1.24)
    assert figures["seconds"] == pytest.approx(101.25) and figures["tokens"] == 202
    assert figures["tokens_per_s"] == pytest.approx(202 / 101.25)
    assert figures["requests_per_s"] == pytest.approx(101 / 101.25)
    assert figures["client_cores"] == pytest.approx(0.5 / 101.25)


def test_rounds_are_one_sample():
    both = row([Request(0.0, [5], 2)], [[1.0, 3.0]])
    both.add([Request(2.0, [5], 1)], {"times": [[2.5]], "handed": [2.0], "tokens": [[7]], "client_s": 0, "steps_s": 0})
    assert both.ttft == [1.0, 0.5] and both.per_token == [2.0] and both.span == 3.5 and both.first == [1, 7]


def test_time_with_a_request_at_hand():
    assert covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4
    assert row([Request(0.0, [5], 1), Request(9.0, [5], 1)], [[1.0], [12.0]]).figures()["outside"] == 1 - 3 / 4


def test_the_largest_rate_that_keeps_the_service_level():
    def at(rate, ttft, per_token):
        return {"name": "fastllm", "rate": rate, "ttft_p99": ttft, "per_token_p99": per_token}

    rows = [at(1, 0.1, 0.01), at(2, 0.9, 0.1), at(4, 0.9, 0.11), at("inf", 1.1, 0.01)]
    assert largest_rate(rows, "fastllm", 1.0, 0.1) == 2
    assert largest_rate(rows, "fastllm", 2.0, 0.1) == math.inf
    assert largest_rate(rows, "fastllm", 0.01, 0.1) is largest_rate(rows, "llama.cpp", 1.0, 0.1) is None


def test_other_tokens_are_a_failure():
    failures = []
    right, wrong = row([Request(0.0, [5], 1)], [[1.0]]), row([Request(0.0, [5], 1)], [[1.0]])
    wrong.name, wrong.first = "llama.cpp", [2]
    records = serve_load.compared([right, wrong], failures)
    assert [record["same_first"] for record in records] == [None, 0]
    assert failures == ["llama.cpp at 1 a second: 0% of the first tokens are those of fastllm, at least 75% should be"]


# ----------------------------------------------------------------------------------------------------------- whole runs


def load(count=8, rate=200.0) -> list[dict]:
    return [vars(request) for request in at_rate(schedule(TEXT, count, 5, SMALL), rate)]


def serve(contender, requests):
    reply = contender.serve(requests)
    for request, handed, times in zip(requests, reply["handed"], reply["times"], strict=True):
        assert request["at"] <= handed < times[0] and times == sorted(times) and len(times) == request["new"]
    return reply


@pytest.fixture(scope="module")
def alone(model):
    """The tokens that each request has by itself."""
    llm = LLM(model, max_num_seqs=1)
    params = [SamplingParams(max_new_tokens=r["new"], temperature=0.0, ignore_eos=True) for r in load()]
    return [llm.generate([r["prompt"]], p)[0].token_ids for r, p in zip(load(), params, strict=True)]


def test_ours_serves_a_load(model, alone):
    contender = servers.Ours(model, threads=1, slots=4, context=SMALL.longest)
    for _ in range(2):  # the second run begins with an empty cache too
        reply = serve(contender, load())
        assert reply["tokens"] == alone and reply["steps_s"] > 0 and reply["client_s"] > 0


def test_an_arrival_is_waited_for(model):
    contender = servers.Ours(model, threads=1, slots=4, context=SMALL.longest)
    requests = [r | {"at": i * 0.2} for i, r in enumerate(load(3))]
    assert max(reply[-1] for reply in serve(contender, requests)["times"]) >= 0.4


def test_llama_cpp_serves_a_load(model, alone):
    pytest.importorskip("llama_cpp")
    contender = servers.LlamaCpp(model, threads=1, slots=2, context=SMALL.longest)
    for _ in range(2):
        assert serve(contender, load())["tokens"] == alone
    known = [slot.ids for slot in contender.slots]
    contender._seat(0, [*known[1][:12], 5])
    assert contender.slots[1].place == 0 and contender.slots[1].ids == known[1][:12]  # the slot that knows it
    for slot, used in zip(contender.slots, (2.0, 1.0), strict=True):
        slot.place, slot.used = None, used
    contender._seat(1, [0] * 9)
    assert (
        contender.slots[1].place == 1 and not contender.slots[1].ids
    )  # nobody knows it: the one that was free longest


def test_a_slot_leaves_the_last_token_to_be_read():
    slot = servers.Slot(0, ids=[5, 6, 7])
    assert [slot.alike(p) for p in ([5, 6, 7], [5, 6, 7, 8], [5, 9], [9, 6], [5])] == [2, 3, 1, 0, 0]


def test_an_answer_of_another_length_is_an_error():
    run = servers.Run([{"at": 0.0, "prompt": [5], "new": 2}])
    run.times[0], run.tokens[0] = [1.0], [7]
    with pytest.raises(RuntimeError, match="2 tokens were asked for, 1 came at 1 times"):
        run.reply()


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    monkeypatch.setattr(serve_load.texts, "token_stream", lambda path: TEXT)

    def run(*arguments):
        small = "--prompt 4,16 --answer 2,8 --prefix 16 --requests 6 --slots 4 --threads 1 --quiet 99 --patience 0"
        status = serve_load.main(
            ["--model", str(model), *small.split(), "--json", str(tmp_path / "out.json"), *arguments]
        )
        return status, json.loads((tmp_path / "out.json").read_text())

    return run


def test_the_command(command, tmp_path, capsys):
    status, result = command("--contenders", "fastllm", "--rates", "100,inf", "--plot", str(tmp_path / "plot.png"))
    assert status == 0 and result["ok"] and [r["rate"] for r in result["rows"]] == [100, "inf"]
    assert all(r["tokens"] == result["rows"][0]["tokens"] and r["requests"] == 6 for r in result["rows"])
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert "TTFT p99" in capsys.readouterr().out

    status, result = command("--contenders", "fastllm", "--rates", "50", "--keep")
    assert [r["rate"] for r in result["rows"]] == [50, 100, "inf"]
    with pytest.raises(SystemExit, match="measured with other seed"):
        command("--keep", "--seed", "3")


def test_a_missing_contender_fails(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no llama_cpp here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    status, result = command("--contenders", "llama.cpp", "--rates", "inf")
    assert status == 1 and not result["ok"] and not result["rows"]
    assert "FAIL llama.cpp is missing: ImportError: no llama_cpp here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--contenders vllm", "unknown vllm; choose from fastllm, llama.cpp, transformers"),
        ("--rates 0", "allowed: numbers above 0, or inf"),
        ("--prompt 9,3", "allowed: two integers, shortest,longest"),
        ("--slots 0", "--slots: 0; allowed: at least 1"),
        ("--shared 2", "allowed: in \\[0, 1\\]"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        serve_load.parse(arguments.split())
    assert message.replace("\\", "") in capsys.readouterr().err
