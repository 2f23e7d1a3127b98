"""Peers: absent ones are named, present ones are prepared outside the clock and give what ours gives."""

import dataclasses

import pytest
import torch

from fastllm.bench import peers
from fastllm.bench.case import Make, as_tuple
from fastllm.bench.cases import suites
from fastllm.bench.harness import QUICK
from fastllm.bench.measure import FORWARD, TRAIN, Job, measure
from fastllm.bench.peers import PEERS, Peer, Prepared, Unsupported, peers_of

FLEETING = dataclasses.replace(QUICK, samples=1, block_s=0.0, limit_s=0.0)


def test_peers_belong_to_ops():
    assert PEERS.keys() <= suites().keys()


def test_an_absent_library_is_a_note_with_what_to_install(monkeypatch):
    monkeypatch.setitem(PEERS, "softmax", {"other": Peer("no_such_library", "no-such-library", None, devices=("cpu",))})
    assert list(peers_of("softmax", "cpu")) == [("other", "absent: `pip install no-such-library`")]
    suite = suites()["softmax"]
    row = measure(Job(suite, suite.correct[0], torch.float32, FORWARD), FLEETING, compiled=False)
    assert row["notes"] == ["other is absent: `pip install no-such-library`"]


def test_a_peer_of_another_device_is_not_mentioned():
    assert not list(peers_of("rms_norm", "cpu"))
    assert [name for name, _ in peers_of("rms_norm", "cuda")] == ["liger", "flashinfer"]


def test_preparing_happens_once_for_each_copy():
    made = []
    peer = Peer("torch", "torch", lambda ready, x: x + ready, lambda x: made.append(x) or len(made))
    call, a, b = Prepared(peer), torch.zeros(1), torch.zeros(1)
    assert [float(call(x=x)) for x in (a, b, a, b)] == [1, 2, 1, 2] and len(made) == 2


@pytest.mark.parametrize("case", suites()["lora_linear"].correct, ids=lambda case: case.label)
def test_peft_gives_what_ours_gives(case):
    pytest.importorskip("peft")
    suite, inputs = suites()["lora_linear"], case.inputs(Make())
    function = Prepared(PEERS["lora_linear"]["peft"])
    random = inputs.get("dropout") is not None  # its own generator draws another mask
    if 0 in (*inputs["x"].shape[-1:], *inputs["b"].shape[:1]):
        return
    if inputs.get("magnitude") is not None or inputs.get("bias") is not None:
        with pytest.raises(Unsupported):
            function(**inputs)
    elif not random:
        theirs, ours = function(**inputs), as_tuple(suite.run(**inputs))[0]
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)


def test_peft_is_timed_with_gradients_of_the_inputs():
    pytest.importorskip("peft")
    suite = suites()["lora_linear"]
    case = next(c for c in suite.correct if c.label.startswith("13x65"))
    row = measure(Job(suite, case, torch.float32, TRAIN), FLEETING, compiled=False)
    assert row["ratios"]["peft"] > 0 and not [note for note in row["notes"] if "peft" in note]


def test_what_a_peer_cannot_do_is_a_note(monkeypatch):
    def call(_, x, temperature=1.0):
        peers.only(temperature == 2, "any other temperature")

    monkeypatch.setitem(PEERS, "softmax", {"other": Peer("torch", "torch", call, devices=("cpu",))})
    suite = suites()["softmax"]
    row = measure(Job(suite, suite.correct[0], torch.float32, FORWARD), FLEETING, compiled=False)
    assert row["notes"] == ["other does not run here: Unsupported: it does not do any other temperature"]
