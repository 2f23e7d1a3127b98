"""Adapters per request: each has the bits that it would have alone, and those of the full forward by lora_linear; what a name
stands for while it is loaded again or unloaded; what the cache knows under which adapter; what is refused."""

import gc
import threading
from dataclasses import replace
from functools import cache

import _lora
import _tiny
import pytest
import torch
from _engine import (
    GREEDY,
    IN_EVERY_WAY,
    KINDS,
    LENGTHS,
    PENALISED,
    PROMPT,
    SAMPLED,
    Made,
    engine,
    forced,
    join_and_leave,
    run_together,
    steps,
)
from _paged import check
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm import LLM, SamplingParams, ops
from fastllm.decode.scheduler import Sequence
from fastllm.models.blocks import Adapters
from fastllm.peft import lora

NAMES = (None, "all", "some", "dora")


@cache
def adapters() -> dict[str, lora.Lora]:
    """On every projection; on some, with several ranks; DoRA with other scales."""
    model, ranks = engine().model, {"q_proj": 16, "v_proj": 3, "up_proj": 5}
    return {
        "all": _lora.draw(model, 1, 4),
        "some": _lora.draw(model, 2, lambda name: ranks.get(name.rsplit(".", 1)[1], 0)),
        "dora": _lora.draw(model, 3, 8, dora=True, use_rslora=True, alpha_pattern={"down_proj": 3, "k_proj": 9}),
    }


def loaded(names=NAMES[1:], **fields):
    e = engine(**fields)
    for name in names:
        e.load_adapter(name, adapters()[name])
    return e


def wants(name, params=GREEDY):
    return replace(params, adapter=name)


@cache
def _lone(kv_dtype):
    return loaded(max_num_seqs=1, prefix_cache=False, kv_dtype=kv_dtype)


@cache
def _alone(prompt, params, index, seed, count, kv_dtype):
    s = Made(list(prompt), params, count, index, seed)
    _lone(kv_dtype).run([s])
    return s.made


def alone(s: Made, name: str | None = "", kv_dtype: torch.dtype = torch.float32) -> list[tuple[int, float]]:
    """What it is given with nobody else. name: of what its adapter was, where it is not its own. kv_dtype: of the cache."""
    params = s.params if name == "" else wants(name, s.params)
    return _alone(tuple(s.prompt), params, s.index, s.seed, 40, kv_dtype)[: min(s.room, s.stop or s.room)]


def mixed(count: int = 16) -> list[Made]:
    kinds = list(KINDS.values())
    prompts = [PROMPT[: LENGTHS[i % 16]] if i % 2 else PROMPT[:40] for i in range(count)]
    params = [wants(NAMES[i * 7 % 4], kinds[i % 3]) for i in range(count)]
    return [Made(prompts[i], params[i], 8 + 3 * (i % 7), seed=i % 4) for i in range(count)]


# -------------------------------------------------------------------------------------------------------- full forward


def logprobs(model, ids: list[int], given: Adapters | None = None) -> list[float]:
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor([ids]), given)[0]
        return ops.target_logprobs(model.logits(hidden[:-1]), torch.tensor(ids[1:])).tolist()


@pytest.mark.parametrize("length", [1, 17, 100, 300])
@pytest.mark.parametrize("name", NAMES[1:])
def test_equal_to_the_full_forward(name, length):
    e = loaded()
    made, oracle = steps(e, PROMPT[:length], wants(name), 20), _lora.adapted(e.model, adapters()[name])
    ids = PROMPT[:length] + [token for token, _ in made]
    expected = logprobs(oracle, ids)
    assert [p for _, p in made] == expected[length - 1 :]
    assert expected != logprobs(e.model, ids)
    assert e.score([ids], name)[0].tolist() == expected
    slots = torch.full((1, len(ids)), e.adapters.find(name).slot)
    assert logprobs(e.model, ids, Adapters(slots, e.adapters.pools)) == expected


@pytest.mark.parametrize(
    ("kind", "quantize"),
    [("F32", None), ("F32", "int8"), ("F32", "int4"), ("Q4_1", None), ("Q8_0", None), ("Q8_0", "int4")],
)
def test_every_form_of_weights(tmp_path, kind, quantize):
    llm = LLM(_tiny.gguf(tmp_path / "tiny.gguf", kind), quantize=quantize, max_num_seqs=7)
    params = [SamplingParams(max_new_tokens=12, seed=i, ignore_eos=True, adapter=NAMES[i % 4]) for i in range(9)]
    prompts = [PROMPT[i : 5 * i + 9] for i in range(9)]
    plain = [llm.generate(p, replace(each, adapter=None))[0] for p, each in zip(prompts, params, strict=True)]
    drawn = {name: replace(each) for name, each in adapters().items()}
    for name, each in drawn.items():
        lora.write(tmp_path / name, each)
        llm.load_adapter(name, tmp_path / name)
    single = [llm.generate(p, each)[0] for p, each in zip(prompts, params, strict=True)]
    for llm.engine.chunk in (512, 7):
        llm.engine.cache.forget()
        together = llm.generate(prompts, params)
        assert [(r.token_ids, r.logprobs) for r in together] == [(r.token_ids, r.logprobs) for r in single]
    for i, (base, ours) in enumerate(zip(plain, single, strict=True)):
        assert (base.logprobs == ours.logprobs) == (params[i].adapter is None)
        if params[i].adapter:
            oracle = _lora.adapted(llm.model, drawn[params[i].adapter])
            ids = [*ours.prompt_token_ids, *ours.token_ids]
            assert logprobs(oracle, ids)[-12:] == ours.logprobs


# ----------------------------------------------------------------------------------------------------------- together


@IN_EVERY_WAY
def test_sixteen_together(fields):
    sequences = mixed()
    run_together(loaded(**fields), sequences, alone)
    assert len({tuple(alone(s)) for s in sequences}) > 8  # they differ


@pytest.mark.parametrize("speculate", [0, 7])
@pytest.mark.parametrize(("threads", "kv_dtype"), [(1, torch.int8), (2, torch.int8), (2, torch.float8_e4m3fn)], ids=str)
def test_with_a_quantised_cache(threads, kv_dtype, speculate):
    """Adapters, drafts that are forced, and keys and values of 8 bits, together: the bits of a lone run with such a cache."""
    e = loaded(kv_dtype=kv_dtype, speculate=speculate, threads=threads, max_num_seqs=5, chunk=64)

    def with_bytes(s: Made) -> list[tuple[int, float]]:
        return alone(s, kv_dtype=kv_dtype)

    if speculate:
        forced(e, truth=lambda s: [token for token, _ in with_bytes(s)])
    sequences = mixed()
    run_together(e, sequences, with_bytes)
    assert any(with_bytes(s) != alone(s) for s in sequences)
    assert (sum(s.timing.accepted for s in sequences) > 20) == bool(speculate)


def test_drafts_of_those_who_have_adapters_and_of_those_who_have_none():
    """Drafts are forced, right and wrong ones: a row that reads one has the adapter of its sequence."""
    e = forced(loaded(speculate=7, max_num_seqs=3), truth=lambda s: [token for token, _ in alone(s)])
    sequences = mixed(8)
    e.run(sequences)
    assert [s.made for s in sequences] == [alone(s) for s in sequences]
    assert sum(s.timing.accepted for s in sequences if s.params.adapter) > 4
    check(e.cache)


def test_those_who_join_late_and_those_who_leave():
    e, sequences = loaded(max_num_seqs=8), mixed(12)
    left = join_and_leave(e, sequences)
    for turn, s in enumerate(sequences):
        assert s.made == alone(s)[: len(s.made)] and (turn in left or len(s.made) == s.room)
    check(e.cache)
    assert not any(a.users for a in e.adapters.named.values())


def test_who_has_none_pays_nothing():
    """The plan without adapters is the one that there was, and its bits are those beside adapters."""
    e = engine(prefix_cache=False)
    before, kernels = steps(e, PROMPT[:40], SAMPLED), e.steps.plans[1].kernels()
    assert not any("lora" in kernel for kernel in kernels)
    plan = e.steps.plans[1]
    for name, given_ in adapters().items():
        e.load_adapter(name, given_)
    assert steps(e, PROMPT[:40], SAMPLED) == before and e.steps.plans[1] is plan and not e.steps.adapted_plans
    beside, none = Made(PROMPT[:40], wants("all", PENALISED)), Made(PROMPT[:40], SAMPLED)
    e.run([beside, none])
    assert none.made == before and beside.made == alone(beside)
    assert "multi_lora" in e.steps.adapted_plans[2].kernels()
    for name in adapters():
        e.unload_adapter(name)
    assert not e.adapters.pools and not e.steps.adapted_plans and steps(e, PROMPT[:40], SAMPLED) == before


def test_completions_of_one_prompt_share_it_with_their_adapter_alone():
    e, prompt = loaded(prefix_cache=False), PROMPT[:40]
    sequences = [Made(prompt, wants(name, SAMPLED), 10, index) for name in ("all", "some") for index in range(2)]
    e.run(sequences)
    assert [s.timing.cached for s in sequences] == [0, 39, 0, 39]
    assert [s.made for s in sequences] == [alone(s) for s in sequences]


# -------------------------------------------------------------------------------------------------------- prefix cache


def test_a_page_is_found_by_its_adapter_alone():
    e = loaded()
    for round_, cached in enumerate((0, 192)):
        for name in NAMES:
            s = Made(PROMPT[:200], wants(name, SAMPLED), 12)
            e.run([s])
            assert s.timing.cached == cached and s.made == alone(s), (round_, name)
    e.load_adapter("all", adapters()["some"])
    for name, cached in (("all", 0), ("all", 192), ("some", 192), (None, 192)):
        s = Made(PROMPT[:200], wants(name, SAMPLED), 12)
        e.run([s])
        assert s.timing.cached == cached and s.made == alone(s, "some" if name == "all" else name)
    check(e.cache)


def test_what_is_unloaded_gives_its_pages_back():
    e = loaded()
    for name in NAMES:
        e.run([Made(PROMPT[:200], wants(name), 12)])
    known = len(e.cache._link_of)
    for count, name in enumerate(NAMES[1:], 1):
        e.unload_adapter(name)
        assert len(e.cache._link_of) == known // 4 * (4 - count)
        check(e.cache)
    again = Made(PROMPT[:200], GREEDY, 12)
    e.run([again])
    assert again.timing.cached == 192


# ------------------------------------------------------------------------------------------------------ load and unload


def test_a_name_that_is_loaded_again_while_it_runs():
    """Those who are in line keep what they came for, also those who wait; those who come later get the new one."""
    e = loaded(("all",), max_num_seqs=2)
    first, waits = Made(PROMPT[:40], wants("all"), 30), [Made(PROMPT[:50], wants("all"), 6) for _ in range(2)]
    e.submit([first, *waits])
    for _ in range(4):
        e.step()
    e.load_adapter("all", adapters()["some"])
    later = Made(PROMPT[:40], wants("all"), 30)
    e.submit([later])
    for s in (first, *waits, later):
        e.wait(lambda s=s: s.ended)
    assert [s.made for s in (first, *waits)] == [alone(s) for s in (first, *waits)]
    assert later.made == alone(later, "some")
    assert [a.name for a in e.adapters._held.values()] == ["all"] and not e.adapters.named["all"].retired
    check(e.cache)


def test_unloading_waits_for_those_who_run():
    e = loaded(("all", "some"))
    runs = Made(PROMPT[:40], wants("all"), 30)
    e.submit([runs])
    e.step(), e.step()
    e.unload_adapter("all")
    with pytest.raises(ValueError, match="adapter='all' is not loaded; loaded are 'some'"):
        e.submit([Made(PROMPT[:3], wants("all"))])
    assert len(e.adapters._held) == 2
    e.wait(lambda: runs.ended)
    assert runs.made == alone(runs) and len(e.adapters._held) == 1
    e.unload_adapter("some")
    assert not e.adapters._held and not e.adapters.pools and not e.steps.adapted_plans


def test_pools_grow_while_one_runs():
    """More slots, a larger rank, magnitudes, other projections: what runs goes on with the same bits."""
    e = loaded(("some",))
    runs, plain = Made(PROMPT[:40], wants("some"), 40), Made(PROMPT[:30], SAMPLED, 40)
    e.submit([runs, plain])
    for turn in range(30):
        e.step()
        if turn in (4, 8, 12, 16):
            names = {4: "all", 8: "dora", 12: "more", 16: "large"}
            given_ = adapters().get(names[turn]) or _lora.draw(e.model, turn, 2 * turn)
            e.load_adapter(names[turn], given_)
            late = Made(PROMPT[:20], wants(names[turn]), 5)
            e.submit([late])
    for s in (runs, plain):
        e.wait(lambda s=s: s.ended)
        assert s.made == alone(s)
    e.wait(lambda: late.ended)
    pools = e.adapters.pools
    assert {p.slots for p in pools.values()} == {8} and pools[0, "qkv"].max_rank == 32 and len(pools) == 8
    for name in ("some", "all", "dora"):
        s = Made(PROMPT[:33], wants(name, SAMPLED), 12)
        e.run([s])
        assert s.made == alone(s)


def test_a_load_that_fails_changes_nothing(monkeypatch):
    for names in ((), ("all",)):
        e = loaded(names)
        with monkeypatch.context() as patch:
            patch.setattr("fastllm.decode.adapters._gain", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                e.load_adapter("some", adapters()["some"])
        assert list(e.adapters.named) == list(names) and bool(e.adapters.pools) == bool(names)
        for name in (*names, None):
            s = Made(PROMPT[:33], wants(name, SAMPLED), 12)
            e.run([s])
            assert s.made == alone(s)
        e.load_adapter("some", adapters()["some"])
        s = Made(PROMPT[:33], wants("some", SAMPLED), 12)
        e.run([s])
        assert s.made == alone(s)


def test_an_unknown_name_puts_nobody_in_line():
    e = loaded(("all",))
    with pytest.raises(
        ValueError, match=r"adapter='none' is not loaded; loaded are 'all'; load_adapter\(name, path\) loads"
    ):
        e.submit([Made(PROMPT[:3], wants("all")), Made(PROMPT[:3], wants("none"))])
    assert not e.scheduler.waiting and not e.adapters.named["all"].users
    with pytest.raises(ValueError, match="adapter='x' is not loaded; none is loaded"):
        engine().unload_adapter("x")


arrivals = st.lists(
    st.fixed_dictionaries(
        {
            "step": st.integers(0, 12),
            "prompt": st.sampled_from([(0, 1), (0, 17), (0, 40), (0, 64), (3, 90)]),
            "kind": st.sampled_from(list(KINDS)),
            "adapter": st.sampled_from(NAMES),
            "room": st.integers(1, 16),
            "cancel": st.none() | st.integers(0, 6),
            "scored": st.booleans(),
        }
    ),
    max_size=8,
)
changes = st.lists(st.tuples(st.integers(0, 14), st.sampled_from(NAMES[1:]), st.sampled_from(NAMES)), max_size=5)


@pytest.fixture(scope="module")
def small():
    """Short of everything, used by all examples one after the other."""
    return loaded(max_num_seqs=3, pages=14, capacity=200)


@settings(max_examples=40, deadline=None)
@given(arrivals, changes, st.sampled_from([1, 7, 64]))
def test_any_schedule(small, arrivals, changes, chunk):
    """changes: at a step, under a name, another adapter is loaded, or none any more."""
    e, small.chunk, now, running, means = small, chunk, 0, [], dict.fromkeys(NAMES)
    for name in NAMES[1:]:
        e.load_adapter(name, adapters()[name])
        means[name] = name
    line = sorted(arrivals, key=lambda a: a["step"])
    while line or not all(s.ended for s, _, _ in running):
        for _, name, other in (c for c in changes if c[0] == now):
            if other is not None:
                e.load_adapter(name, adapters()[other])
            elif name in e.adapters.named:
                e.unload_adapter(name)
            means[name] = other
        while line and line[0]["step"] <= now:
            a = line.pop(0)
            first, count = a["prompt"]
            name, leaves = a["adapter"], None if a["cancel"] is None else now + a["cancel"]
            prompt, params = PROMPT[first : first + count], wants(name, KINDS[a["kind"]])
            s = Made(prompt, params, a["room"])
            if name is not None and means[name] is None:
                with pytest.raises(ValueError, match="is not loaded"):
                    e.submit([s])
                continue
            e.submit([s])
            running.append((s, means[name], leaves))
            if a["scored"]:
                s = Sequence(prompt, params=params, hidden=lambda states: None)
                e.submit([s])
                running.append((s, means[name], leaves))
        e.cancel([s for s, _, leaves in running if leaves == now])
        e.step()
        now += 1
        assert now < 2000
    for s, name, leaves in running:
        assert not s.error
        if isinstance(s, Made):
            whole = alone(s, name)
            assert s.made == whole[: len(s.made)] and (leaves is not None or len(s.made) == len(whole))
    check(e.cache)
    assert {a.name for a in e.adapters._held.values()} == set(e.adapters.named)
    assert len(e.adapters._held) == len(e.adapters.named)


def test_threads_that_load_and_unload():
    """Names come and go while others decode: each is given what its adapter gives, or is refused."""
    e, wrong, refused = loaded(max_num_seqs=4), [], []

    def work(turn: int) -> None:
        for i in range(6):
            s = Made(PROMPT[: 10 + 7 * turn], wants(NAMES[(turn + i) % 4], SAMPLED), 8)
            try:
                e.run([s])
            except ValueError as error:
                refused.append(error)
                continue
            if s.made != alone_[turn, NAMES[(turn + i) % 4]]:
                wrong.append(s)

    def change() -> None:
        for _ in range(10):
            e.load_adapter("all", adapters()["all"])
            e.unload_adapter("dora")
            e.load_adapter("dora", adapters()["dora"])

    alone_ = {(t, n): alone(Made(PROMPT[: 10 + 7 * t], wants(n, SAMPLED), 8)) for t in range(4) for n in NAMES}
    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)] + [threading.Thread(target=change)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not wrong and all("'dora' is not loaded" in str(error) for error in refused)
    check(e.cache)
    assert len(e.adapters._held) == 3


# ------------------------------------------------------------------------------------------------------------------ LLM


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapters")
    llm = LLM(_tiny.gguf(path / "tiny.gguf"))
    for name, each in adapters().items():
        lora.write(path / name, each)
        llm.load_adapter(name, path / name)
    llm.folder = path
    return llm


def test_llm(llm):
    params = SamplingParams(max_new_tokens=10, seed=3, ignore_eos=True)
    prompts = ["the rain", "in the other region", "on"]
    each = [replace(params, adapter=name) for name in ("all", None, "dora")]
    together = llm.generate(prompts, each)
    assert llm.adapters == ["all", "some", "dora"]
    for out, prompt, own in zip(together, prompts, each, strict=True):
        llm.engine.cache.forget()
        assert llm.generate(prompt, own)[0].logprobs == out.logprobs
        assert "".join(llm.stream(prompt, own)) == out.text
        scores = llm.logprobs([[*out.prompt_token_ids, *out.token_ids]], adapter=own.adapter)[0]
        assert scores[-10:] == out.logprobs
    text = "the theory of the rain"
    values = [llm.perplexity(text, adapter=name)[0] for name in NAMES]
    vectors = [llm.embed(text, adapter=name)[0] for name in NAMES]
    assert len(set(values)) == 4 and len({tuple(v.tolist()) for v in vectors}) == 4
    assert values[0] == llm.perplexity(text)[0] and torch.equal(vectors[0], llm.embed(text)[0])


def test_what_llm_refuses(llm, tmp_path):
    for call in (
        lambda: llm.generate("on", SamplingParams(adapter="x")),
        lambda: list(llm.stream("on", SamplingParams(adapter="x"))),
        lambda: llm.perplexity("on the", adapter="x"),
        lambda: llm.embed("on", adapter="x"),
        lambda: llm.unload_adapter("x"),
    ):
        with pytest.raises(
            ValueError, match="adapter='x' is not loaded; loaded are 'all', 'some', 'dora'; load_adapter"
        ):
            call()
    with pytest.raises(ValueError, match="name=''; allowed: a string that is not empty"):
        llm.load_adapter("", llm.folder / "all")
    with pytest.raises(FileNotFoundError, match="is no folder; give a folder that PEFT's save_pretrained wrote"):
        llm.load_adapter("x", tmp_path / "nowhere")


def test_a_stream_that_is_dropped_lets_its_adapter_go(llm):
    stream = llm.stream("on", SamplingParams(max_new_tokens=300, ignore_eos=True, adapter="all"))
    next(stream)
    assert llm.engine.adapters.named["all"].users
    del stream
    gc.collect()
    assert not llm.engine.adapters.named["all"].users
    check(llm.engine.cache)


def test_a_request_of_an_adapter_that_was_unloaded_since(llm):
    llm.load_adapter("brief", llm.folder / "all")
    request = llm.request("on", SamplingParams(adapter="brief", max_new_tokens=3))
    llm.unload_adapter("brief")
    with pytest.raises(ValueError, match="adapter='brief' is not loaded"):
        list(llm.run(request))
