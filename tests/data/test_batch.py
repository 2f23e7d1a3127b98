"""Examples and batches: what is trained, packing that mixes nothing, positions to go on from."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading

import _tiny
import numpy as np
import pytest
import torch
from _assets import asset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import ops
from fastllm.data import batch
from fastllm.data.batch import (
    IGNORE,
    Batches,
    Example,
    collate,
    encode,
    encode_completion,
    encode_messages,
    encode_text,
    pack,
    padding_id,
)
from fastllm.data.chat import ChatTemplate
from fastllm.data.packed import Packed
from fastllm.data.sources import Documents, write_jsonl
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.decoder import Decoder
from fastllm.models.gguf import GGUFFile

TEMPLATE = ChatTemplate(_tiny.TEMPLATE)
TALK = [
    {"role": "user", "content": "the one"},
    {"role": "assistant", "content": "in a"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "then on"},
    {"role": "user", "content": "never read"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    with GGUFFile(_tiny.gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")) as file:
        return Tokenizer.from_gguf(file)


def said(tokenizer, example) -> str:
    """What is trained, in words."""
    assert ((example.target == IGNORE) == (example.weight == 0)).all()
    return tokenizer.decode(example.target[example.weight > 0], skip_special_tokens=False)


def whole(tokenizer, example) -> str:
    last = [t for t in example.target[-1:] if t != IGNORE]
    return tokenizer.decode([*example.ids, *last], skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------------------- encode


def test_text(tokenizer):
    (example,) = encode_text(tokenizer, "the one")
    ids = tokenizer.encode("the one")
    assert example.ids.tolist() == ids and example.target.tolist() == [*ids[1:], tokenizer.eos_id]
    pieces = encode_text(tokenizer, "the one and the other", longest=4)
    (uncut,) = encode_text(tokenizer, "the one and the other")
    assert max(map(len, pieces)) == 4 and [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    for name in ("ids", "target", "weight"):  # nothing that was to be said is lost at a cut
        assert np.concatenate([getattr(p, name) for p in pieces]).tolist() == getattr(uncut, name).tolist()
    assert not len(encode_text(tokenizer, "")[0])


def test_completion(tokenizer):
    (example,) = encode_completion(tokenizer, "the one", " and a")
    assert said(tokenizer, example) == " and a<|im_end|>" and whole(tokenizer, example) == "the one and a<|im_end|>"
    (cut,) = encode_completion(tokenizer, "the", " one in a row", longest=5)
    assert not cut.ends and example.ends and len(cut) == 5 and tokenizer.eos_id not in cut.target
    assert encode_completion(tokenizer, "a long prompt", "x", longest=3) == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_completion(tokenizer, "", "x")


def test_every_turn_is_trained(tokenizer):
    (example,) = encode_messages(tokenizer, TEMPLATE, TALK)
    assert said(tokenizer, example) == "in a<|im_end|>then on<|im_end|>"
    rendered = TEMPLATE.render(TALK, add_generation_prompt=False)
    assert rendered.startswith(whole(tokenizer, example)) and whole(tokenizer, example).endswith("then on<|im_end|>")
    (last,) = encode_messages(tokenizer, TEMPLATE, TALK, first=2)
    assert said(tokenizer, last) == "then on<|im_end|>" and last.ids.tolist() == example.ids.tolist()
    for n in (1, 3):  # what comes before a turn is, token by token, the prompt that is given when the model is asked
        prompt = TEMPLATE.render(TALK[:n], add_generation_prompt=True)
        ids = tokenizer.encode(prompt, add_special_tokens=False, parse_special=True)
        assert example.ids[: len(ids)].tolist() == ids and example.weight[len(ids) - 2 : len(ids)].tolist() == [0, 1]


def test_a_template_without_an_end(tokenizer):
    plain = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    (example,) = encode_messages(tokenizer, plain, TALK[:4])
    assert said(tokenizer, example) == "in a\nthen on\n<|im_end|>"
    forgetful = ChatTemplate("{% for m in messages %}{% if loop.last %}{{ m.role }}: {% endif %}{{ m.content }}\n"
                             "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    with pytest.raises(ValueError, match="writes message 1 in another way when messages follow it"):
        encode_messages(tokenizer, forgetful, TALK)
    with pytest.raises(ValueError, match="no message from 0 on is the assistant's"):
        encode_messages(tokenizer, TEMPLATE, TALK[:1])


def test_the_template_of_a_real_model():
    with GGUFFile(asset()) as file:
        tokenizer, template = Tokenizer.from_gguf(file), ChatTemplate.from_gguf(file)
    (example,) = encode(tokenizer, {"messages": TALK}, template)
    assert said(tokenizer, example) == "in a<|im_end|>then on<|im_end|>"
    assert tokenizer.pad_id == tokenizer.eos_id  # as the file says; it is trained all the same, and nothing pads by it
    assert padding_id(tokenizer) not in tokenizer.eos_ids


FORMS = [
    ({"messages": TALK[:2]}, "in a<|im_end|>"),
    ({"prompt": TALK[:3], "completion": TALK[3:4]}, "then on<|im_end|>"),
    ({"prompt": "the", "completion": " end"}, " end<|im_end|>"),
    ({"text": "the end", "label": 3}, "he end<|im_end|>"),
]


@pytest.mark.parametrize(("fields", "wanted"), FORMS)
def test_forms(tokenizer, fields, wanted):
    (example,) = encode(tokenizer, fields, TEMPLATE)
    assert said(tokenizer, example).endswith(wanted[1:])


def test_unknown_forms(tokenizer):
    with pytest.raises(ValueError, match=r'a record of txt \(str\); allowed: "messages"'):
        encode(tokenizer, {"txt": "x"})
    with pytest.raises(ValueError, match="messages need a chat template"):
        encode(tokenizer, FORMS[0][0])
    with pytest.raises(ValueError, match="the tokenizer has no eos"):
        encode(Tokenizer(tokenizer.backend, {}), {"text": "x"})


# --------------------------------------------------------------------------------------------------------------- packing


@given(st.lists(st.integers(1, 50), max_size=80), st.integers(50, 90))
@settings(max_examples=200, deadline=None)
def test_pack(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    fill = [sum(lengths[i] for i in b) for b in bins]
    assert max(fill, default=0) <= capacity
    assert all(a + b > capacity for a, b in itertools.combinations(fill, 2))  # no two would fit into one


def test_pack_is_full():
    lengths = np.random.default_rng(0).lognormal(5, 1, 512).astype(int).clip(1, 2048).tolist()
    assert sum(lengths) / (len(pack(lengths, 2048)) * 2048) > 0.97
    with pytest.raises(ValueError, match="a sequence of 9 tokens, a batch holds 8; cut it by `longest`"):
        pack([1, 9], 8)


def some(count: int, seed: int = 0) -> list[Example]:
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        ids = draw.integers(3, 90, draw.integers(2, 30))
        made.append(Example.next_tokens(ids, draw.random(len(ids)) < 0.7))
    return [e for e in made if len(e)]


@pytest.fixture(
    scope="module", params=[{}, {"position": "learned", "norm": "layer"}, {"position": "alibi"}, {"window": 5}]
)
def model(request) -> Decoder:
    made = Decoder(dataclasses.replace(_tiny.CONFIG, **request.param))
    torch.manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return made


def loss_of(model, batch, reduction="mean"):
    logits = model.logits(model.packed_hidden(batch.packed))
    return ops.cross_entropy(logits, batch.target, batch.weight, ops.LossSpec(reduction=reduction))


def gradients(model, losses) -> list[torch.Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def test_a_packed_batch_is_its_sequences(model):
    """The same bits of every hidden state, the same loss, the same gradients as one sequence at a time."""
    examples = some(9)
    batch = collate(examples)
    p, cu = batch.packed, batch.packed.cu.tolist()
    hidden = model.packed_hidden(p)
    for example, (a, b) in zip(examples, itertools.pairwise(cu), strict=True):
        alone = model.hidden(torch.from_numpy(example.ids)[None])[0]
        assert torch.equal(alone, hidden[a:b])
    parts = [loss_of(model, collate([e]), "sum") for e in examples]
    total = sum(float(e.weight.sum()) for e in examples)
    torch.testing.assert_close(loss_of(model, batch), sum(parts) / total)
    packed = gradients(model, [loss_of(model, batch, "sum")])
    for got, want in zip(packed, gradients(model, parts), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def reaches(model, packed: Packed, chosen: slice) -> torch.Tensor:
    """Which tokens the loss of the chosen ones has a gradient at: bool [T]."""
    held = []
    hook = model.embedding.register_forward_hook(lambda m, i, out: held.append(out) or out.retain_grad())
    model.logits(model.packed_hidden(packed))[chosen].square().sum().backward()
    hook.remove()
    return held[0].grad.abs().sum(-1) > 0


def test_nothing_crosses_a_border(model):
    packed = collate(some(6)).packed
    cu = packed.cu.tolist()
    for a, b in itertools.pairwise(cu):
        at = reaches(model, packed, slice(a, b))
        assert at[a:b].all() and not at[:a].any() and not at[b:].any()
    one = Packed(packed.ids, packed.position, packed.cu[[0, -1]], len(packed.ids))  # borders forgotten
    assert reaches(model, one, slice(cu[1], cu[2]))[: cu[1]].any()


def test_padding_changes_nothing(model):
    examples = some(5)
    plain, padded = collate(examples), collate(examples, pad_to=256, pad_id=2)
    assert len(padded.packed.ids) == 256 and (padded.packed.ids[-3:] == 2).all()
    rows = len(plain.target)
    assert torch.equal(loss_of(model, plain, "none"), loss_of(model, padded, "none")[:rows])
    torch.testing.assert_close(loss_of(model, plain), loss_of(model, padded))
    with pytest.raises(ValueError, match=r"tokens in 5 examples; allowed: 1 to pad_to=8"):
        collate(examples, pad_to=8)
    with pytest.raises(ValueError, match="0 tokens in 0 examples; allowed: 1 or more"):
        collate([])


# --------------------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def corpus(tmp_path):
    words = ["the", "one", "in", "a", "then", "on", "more"]
    write_jsonl(tmp_path / "f.jsonl", ({"text": " ".join(words[: 1 + i % 7] * (1 + i % 5))} for i in range(60)))
    return tmp_path


def batches(corpus, tokenizer, **options):
    documents = Documents(corpus, shuffle=7, seed=1, epochs=2)
    return Batches(
        documents, lambda d, i: encode_text(tokenizer, d.text, longest=64), **({"tokens": 64, "window": 25} | options)
    )


def flat(made) -> list[tuple]:
    return [(b.packed.ids.tolist(), b.packed.cu.tolist(), b.target.tolist(), b.packed.position.tolist()) for b in made]


@pytest.mark.parametrize("how", ["best_fit", "sequential"])
def test_goes_on_at_any_batch(corpus, tokenizer, how):
    all_of_them = flat(batches(corpus, tokenizer, how=how))
    assert max(len(ids) for ids, *_ in all_of_them) <= 64
    for stop in range(len(all_of_them) + 1):
        first = batches(corpus, tokenizer, how=how)
        assert flat(itertools.islice(first, stop)) == all_of_them[:stop]
        again = batches(corpus, tokenizer, how=how)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert flat(again) == all_of_them[stop:] == flat(first)


def test_nothing_is_lost(corpus, tokenizer):
    wanted = sorted(t for d in Documents(corpus, epochs=2) for t in encode_text(tokenizer, d.text)[0].target.tolist())
    for how in ("best_fit", "sequential"):
        made = list(batches(corpus, tokenizer, how=how))
        assert sorted(t for b in made for t in b.target.tolist()) == wanted
    sizes = [len(b.packed.ids) for b in made]
    assert sizes.count(64) >= len(sizes) - 5  # all but the last of each window


def test_batches_name_what_they_cannot_encode(corpus, tokenizer):
    with pytest.raises(ValueError, match=r"f\.jsonl:1: messages need a chat template"):
        write_jsonl(corpus / "f.jsonl", [{"messages": TALK}])
        next(Batches(Documents(corpus), lambda d, i: encode(tokenizer, d.fields), tokens=64))
    with pytest.raises(ValueError, match="how='best'"):
        batches(corpus, tokenizer, how="best")


def test_a_window_is_read_ahead_of_its_first_batch(corpus, tokenizer):
    """By a thread, before it is asked for; only one."""
    read, second = [], threading.Event()

    def encoded(document, index):
        read.append((index, threading.current_thread()))
        if index == 49:
            second.set()
        return encode_text(tokenizer, document.text, longest=64)

    made = Batches(Documents(corpus, shuffle=7, seed=1, epochs=2), encoded, tokens=64, window=25)
    made.read_ahead()
    made.read_ahead()
    assert not second.wait(0.1)  # nobody has taken from the first one
    state = made.state_dict()
    first = flat([next(made)])
    assert second.wait(60) and [index for index, _ in read] == list(range(50))
    assert all(thread is not threading.main_thread() for _, thread in read)
    made.load_state_dict(state)  # what was read is not wanted
    assert flat([next(made)]) == first and flat(made) == flat(batches(corpus, tokenizer))[1:]


IN_A_THREAD = """
import sys, threading, time
from fastllm.data.batch import Batches, Example
from fastllm.data.sources import Documents

def encode(document, index):
    time.sleep(0.001)
    return [Example.next_tokens([1, 2, 3, 4], [True] * 4)]

def take():
    batches = Batches(Documents(sys.argv[1]), encode, tokens=4, window=20)
    time.sleep(0.2)  # the main thread has ended
    print(sum(1 for _ in batches))

threading.Thread(target=take).start()
"""


def test_a_thread_may_read_on_when_the_main_one_has_ended(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n' * 90)
    done = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD, str(tmp_path / "f.jsonl")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "90\n", done.stderr


def test_an_error_waits_for_its_window(corpus, tokenizer):
    def encoded(document, index):
        if index == 30:
            raise ValueError("no")
        return encode_text(tokenizer, document.text, longest=64)

    taken = []
    with pytest.raises(ValueError, match=r"f\.jsonl:31: no"):
        for made in Batches(Documents(corpus), encoded, tokens=64, window=25):
            taken.append(made)
    before = itertools.islice(Documents(corpus), 25)
    assert sum(len(b.packed.ids) for b in taken) == sum(len(e) for d in before for e in encode_text(tokenizer, d.text))


def test_a_window_of_long_documents_has_fewer(corpus, tokenizer, monkeypatch):
    """And goes on at any batch."""
    monkeypatch.setattr(batch, "MOST", 2)
    first = batches(corpus, tokenizer)
    begun = flat([next(first)])
    assert 0 < sum(map(len, first._window.groups)) < 25
    again = batches(corpus, tokenizer)
    again.load_state_dict(first.state_dict())
    rest = flat(first)
    assert flat(again) == rest
    wanted = sum(len(ids) for ids, *_ in flat(batches(corpus, tokenizer, how="sequential")))
    assert sum(len(ids) for ids, *_ in begun + rest) == wanted
