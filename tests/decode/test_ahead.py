"""Steps that are launched before the tokens of the step before are known, as on a GPU: nobody is given anything else."""

import _lora
import pytest
import test_failures
from _engine import GREEDY, KINDS, PENALISED, PROMPT, SAMPLED, Made, alone, come_and_go, engine, mixed
from _paged import check
from test_failures import AtLine, survive

from fastllm import SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence


def ahead(**fields) -> Engine:
    """launches: how often one was under way when the next one was launched."""
    e = engine(**fields)
    e.goes_ahead, e.launches, launch = True, [0, 0], e.steps.launch

    def counted(running, threads):
        e.launches[0] += 1
        e.launches[1] += any(s.tokens and len(s.tokens) < e.seen.get(s, 0) for s in running)
        for s in running:
            e.seen[s] = e.seen.get(s, len(s.tokens)) + 1
        return launch(running, threads)

    e.seen, e.steps.launch = {}, counted
    return e


def test_most_steps_are_launched_ahead():
    e, sequences = ahead(), [Made(PROMPT[i : i + 9], KINDS[kind], 30) for i, kind in enumerate(KINDS)]
    e.run(sequences)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    assert e.launches == [30, 28]  # but for the first, which captures, and the one behind it
    assert [s.timing.steps for s in sequences] == [29] * 3 and [s.timing.decoded for s in sequences] == [29] * 3
    assert not e._ahead and not e._unsure
    check(e.cache)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_every_request_beside_others(prefix_cache):
    e, sequences = ahead(max_num_seqs=6, prefix_cache=prefix_cache), mixed()
    e.run(sequences)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    assert e.launches[1] > 10
    check(e.cache)


def test_they_come_and_go():
    e = ahead(max_num_seqs=5)
    come_and_go(e, mixed(12))
    assert e.launches[1] > 10


def test_some_end_before_their_last_token():
    """What they drew beyond is theirs no more; rows that move do so when it has landed."""
    e, timings = ahead(max_num_seqs=6), []
    for one in (e, engine(max_num_seqs=6)):
        sequences = [Made(PROMPT[i : i + 20], PENALISED, 40, seed=i, stop=5 + 3 * i) for i in range(6)]
        one.run(sequences)
        assert [s.made for s in sequences] == [alone(s) for s in sequences]
        timings.append([(s.timing.steps, s.timing.decoded) for s in sequences])
    assert timings[0] == timings[1] and e.launches[1] > 10
    check(e.cache)


def test_one_whose_receiver_fails_or_cancels():
    e, sequences = ahead(), [Made(PROMPT[i : i + 20], SAMPLED, 30, seed=i) for i in range(3)]

    def fail(step):
        if len(sequences[0].tokens) == 7:
            raise ValueError("no more of it")

    def cancel(step):
        if len(sequences[1].tokens) == 9:
            e.cancel([sequences[1]])

    sequences[0].receive, sequences[1].receive = fail, cancel
    e.submit(sequences)
    e.wait(lambda: all(s.ended for s in sequences))
    assert "no more of it" in str(sequences[0].error) and len(sequences[0].tokens) == 7
    assert len(sequences[1].tokens) == 9 and sequences[2].made == alone(sequences[2])
    check(e.cache)


def test_log_probabilities_of_others_are_this_step_s():
    e = ahead()
    asked = [Made(PROMPT[:20], SamplingParams(temperature=0.0, logprobs=3), 12), Made(PROMPT[:30], GREEDY, 12)]
    e.run(asked)
    assert e.launches[1] == 0 and [s.made for s in asked] == [alone(s) for s in asked]
    assert all(step.top[0] == (step.token, step.logprob) for step in asked[0].steps)


def test_cancelled_between_steps():
    """The others' step that was launched is made again."""
    e, sequences = ahead(), [Made(PROMPT[i : i + 20], SAMPLED, 30, seed=i) for i in range(3)]
    e.submit(sequences)
    e.wait(lambda: len(sequences[0].made) > 5)
    assert e._ahead
    e.cancel(sequences[:1])
    assert sequences[0].ended and not e._ahead
    e.wait(lambda: all(s.ended for s in sequences))
    assert [s.made for s in sequences[1:]] == [alone(s) for s in sequences[1:]]
    check(e.cache)


def test_prompts_that_come_meanwhile():
    e, first = ahead(), Made(PROMPT[:20], SAMPLED, 40)
    e.submit([first])
    late = []
    for n in (6, 12, 18):
        e.wait(lambda n=n: len(first.made) > n)
        assert e._ahead
        late.append(Made(PROMPT[n : n + 50], PENALISED, 30, seed=n))
        e.submit(late[-1:])
    texts = [PROMPT[5:40]]
    scored = e.score(texts)
    e.wait(lambda: all(s.ended for s in (first, *late)))
    assert [s.made for s in (first, *late)] == [alone(s) for s in (first, *late)]
    assert scored[0].equal(engine().score(texts)[0])
    check(e.cache)


def test_adapters_come_and_go_between():
    e, plain = ahead(), Made(PROMPT[:20], SAMPLED, 40)
    e.load_adapter("one", _lora.draw(e.model, seed=3))
    adapted, alike = (Sequence(PROMPT[:30], 25, SamplingParams(temperature=0.0, adapter="one")) for _ in range(2))
    e.submit([plain, adapted])
    e.wait(lambda: len(plain.made) > 8)
    assert e._ahead
    e.load_adapter("two", _lora.draw(e.model, seed=4))
    assert not e._ahead
    e.wait(lambda: len(plain.made) > 12)
    e.unload_adapter("two")
    e.wait(lambda: plain.ended and adapted.ended)
    e.run([alike])
    assert plain.made == alone(plain) and adapted.tokens == alike.tokens and e.launches[1] > 20
    check(e.cache)


def test_a_thread_that_dies_at_any_line_of_a_step():
    e, line, died = ahead(), 1, 0
    e.run([Made(PROMPT[i : i + 20], SAMPLED, 5) for i in range(4)])
    while survive(e, AtLine(line)):
        line, died = line + 11, died + 1
    assert died > 40


def test_an_interrupt_loses_nothing(monkeypatch):
    monkeypatch.setattr(test_failures, "engine", ahead)
    with monkeypatch.context() as context:
        test_failures.test_an_interrupt_loses_nothing(context, 3)
