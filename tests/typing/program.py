"""A user's program over every public name, for the type checker alone: tests/test_typing.py runs mypy --strict on it.

`assert_type` says what a caller gets; a line with `type: ignore[...]` must be an error of that kind, and no other."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastllm
from fastllm import LLM, SamplingParams, hub, models, ops
from fastllm.conversation import Conversation
from fastllm.data.batch import Batch, Batches, encode
from fastllm.data.curate import Rules, curate
from fastllm.data.lint import Finding, lint
from fastllm.data.pairs import PairBatch, PairBatches, encode_pair
from fastllm.data.sources import Document, Documents, Mixture, mixing_rates
from fastllm.data.tokenizer import Tokenizer
from fastllm.decode.beam import BeamParams, Hypothesis, generate
from fastllm.decode.embed import TextEncoder
from fastllm.evaluate import choice, tasks
from fastllm.evaluate.perplexity import Perplexity, perplexity, pseudo_perplexity
from fastllm.evaluate.scorer import Scorer
from fastllm.evaluate.text import bleu, f1
from fastllm.llm import Completion, RequestOutput
from fastllm.models.decoder import Decoder
from fastllm.models.encoder import Encoder
from fastllm.models.seq2seq import Seq2Seq
from fastllm.train.loop import LoopOptions, Report, fit
from fastllm.train.objective import next_token_loss


def generation() -> None:
    assert_type(fastllm.__version__, str)
    llm = LLM("smollm2-135m", quantize="int8", max_num_seqs=4, kv_bytes=1 << 28)
    params = SamplingParams(max_tokens=8, temperature=0.5, stop="\n", seed=1)
    assert_type(params.max_tokens, int)
    assert_type(llm.generate(["a", "b"], params), list[RequestOutput])
    out = llm.generate([[1, 2], [3]], [params, params])[0]
    assert_type(out.outputs, list[Completion])
    assert_type(
        (out.text, out.token_ids, out.logprobs, out.finish_reason), tuple[str, list[int], list[float], str | None]
    )
    assert_type(out.top_logprobs, list[list[tuple[int, float]]] | None)
    assert_type(llm.stream("a", params), Iterator[str])
    assert_type(llm.chat([{"role": "user", "content": "Hi"}]), RequestOutput)
    assert_type(llm.chat([{"role": "user", "content": "Hi"}], stream=True), Iterator[str])
    assert_type(llm.chat_ids([{"role": "user", "content": "Hi"}]), list[int])
    assert_type(llm.logprobs("a"), list[list[float]])
    assert_type(llm.perplexity(["a", "b"]), list[float])
    assert_type(llm.embed(["a"]), Tensor)
    assert_type((llm.bytes_per_token, llm.max_model_len), tuple[int, int])
    assert_type(llm.tokenizer, Tokenizer)
    assert_type(llm.tokenizer.encode("a"), list[int])
    assert_type(llm.tokenizer.decode([1]), str)
    assert_type(llm.tokenizer.eos_id, int | None)
    assert_type(llm.model, Decoder | Encoder)
    talk = Conversation(llm, params, system="Be brief.")
    assert_type(talk.ask("Hi"), Iterator[str])
    talk.save("talk.json")

    LLM("smollm2-135m", bits=4)  # type: ignore[call-arg]
    llm.generate(5)  # type: ignore[arg-type]
    SamplingParams(temperature="hot")  # type: ignore[arg-type]
    SamplingParams(maximum=5)  # type: ignore[call-arg]
    params.top_k = 5  # type: ignore[misc]
    ops.rms_nrom(llm)  # type: ignore[attr-defined]


def files() -> None:
    assert_type(hub.resolve("smollm2-135m", revision=None, progress=False, verify=True), Path)
    assert_type(hub.cache_dir(), Path)
    assert_type(hub.ALIASES["smollm2-135m"].members[0].size, int)
    model = models.load(Path("folder"))
    assert_type(model, nn.Module)
    models.save(model, "copy", torch.bfloat16, more={"note": 1})
    try:
        hub.resolve("org/name")
    except hub.HubError as error:
        print(error)


def data(tokenizer: Tokenizer) -> None:
    train = Documents("a.jsonl", split="train", shuffle=100, epochs=None)
    assert_type(next(train), Document)
    both = Mixture(
        {"a": train, "b": Documents(["b.txt"], unit="line")}, mixing_rates({"a": 1, "b": 2}, temperature=2.0)
    )
    batches = Batches(both, lambda document, index: encode(tokenizer, document.fields, longest=64), tokens=1024)
    assert_type(next(batches), Batch)
    pairs = PairBatches(both, lambda document, index: encode_pair(tokenizer, document.fields, start_id=0), tokens=1024)
    assert_type(next(pairs), PairBatch)
    assert_type(curate(train, None, Rules(languages=("en",))).table(), str)
    assert_type(lint(tokenizer, [], vocab=10), list[Finding])
    assert_type(Tokenizer.train(["a"], 300).extended(["<x>"]), Tokenizer)


def evaluation(llm: LLM, model: Decoder, encoder: Encoder) -> None:
    test = Documents("a.jsonl", split="test")
    assert_type(perplexity(llm, test, window=512, stride=256).bits_per_byte, float)
    assert_type(perplexity(Scorer(model, llm.tokenizer), ["a"]), Perplexity)
    assert_type(pseudo_perplexity(encoder, llm.tokenizer, [{"text": "a"}]), Perplexity)
    scored = choice.score(llm, [{"prompt": "a", "choices": ["b", "c"], "answer": 1}], batch=128)
    assert_type(scored[0].best("byte"), int)
    assert_type(choice.summarise(scored), dict[str, float])
    assert_type((f1(["a"], ["b"]), bleu(["a"], ["b"])), tuple[float, tuple[float, str]])
    assert_type(tasks.run(llm, "generate", test, tasks.Options(limit=9)).table(), str)


def encoders(model: Seq2Seq, ids: Tensor) -> None:
    assert_type(generate(model, ids, params=BeamParams(beams=4, early_stopping="never")), list[list[Hypothesis]])
    assert_type(TextEncoder.load("minilm-l6").embed(["a"], truncate=True), Tensor)


def norms(x: Tensor, w: Tensor, residual: Tensor, maybe: Tensor | None) -> None:
    assert_type(ops.rms_norm(x, w), Tensor)
    assert_type(ops.rms_norm(x, w, 1e-6, residual=residual), tuple[Tensor, Tensor])
    assert_type(ops.rms_norm(x, w, residual=maybe), Tensor | tuple[Tensor, Tensor])
    assert_type(ops.layer_norm(x, w, None, 1e-6), Tensor)
    assert_type(ops.layer_norm(x, w, residual=residual), tuple[Tensor, Tensor])
    assert_type(ops.layer_norm(x, w, None, 1e-6, maybe), Tensor | tuple[Tensor, Tensor])
    ops.rms_norm(x)  # type: ignore[call-overload]


def elementwise(x: Tensor, ids: Tensor) -> None:
    assert_type(ops.gelu(x, "tanh"), Tensor)
    assert_type(ops.swiglu(x, x), Tensor)
    assert_type(ops.geglu(x, x, approximate="tanh"), Tensor)
    assert_type(ops.dropout(x, ops.Dropout(0.1, seed=1)), Tensor)
    assert_type(ops.embedding(ids, x), Tensor)
    assert_type(ops.softmax(x, temperature=0.5), Tensor)
    scaling = ops.RopeScaling("linear", factor=2.0)
    assert_type(ops.rope(x, x, ids, ops.rope_table(128, 64, scaling=scaling)), tuple[Tensor, Tensor])
    ops.dropout(x, 0.1)  # type: ignore[arg-type]


def linears(x: Tensor, w: Tensor, ids: Tensor) -> None:
    panels, quantised = ops.Panels.pack(w), ops.QWeight.quantize(w, 4, group=64)
    assert_type((panels.shape, quantised.nbytes), tuple[tuple[int, int], int])
    assert_type(ops.linear(x, w, norm=w, residual=x), Tensor)
    assert_type(ops.linear(x, panels, exact=True), Tensor)
    assert_type(ops.quant_linear(x, quantised, swiglu=True), Tensor)
    assert_type(ops.lora_linear(x, quantised, w, w, ops.LoraSpec(2.0, ops.Dropout(0.1, 1))), Tensor)
    pool = ops.AdapterPool(8, 8, slots=2, max_rank=4)
    assert_type(pool.add(w, w, 1.0), int)
    assert_type(ops.multi_lora(x, panels, pool, ids), Tensor)
    ops.quant_linear(x, w)  # type: ignore[arg-type]


def attention(q: Tensor, ids: Tensor, table: Tensor) -> None:
    spec = ops.AttentionSpec(causal=True, window=128, exact=True)
    assert_type(ops.attention(q, q, q, spec), Tensor)
    assert_type(ops.attention_varlen(q, q, q, ids, ids, spec), Tensor)
    cache = ops.KVPages.empty(4 * ops.PAGE, 1, 64)
    assert_type(ops.kv_append(q, q, cache, ids, ids, table), None)
    assert_type(ops.kv_append(q, q, cache, ids, ids, table, q), Tensor)
    assert_type(ops.paged_attention(q, cache, ids, ids, ids, spec), Tensor)
    ops.AttentionSpec(windows=128)  # type: ignore[call-arg]


def sampling(logits: Tensor, ids: Tensor) -> None:
    state = ops.SampleState.create(4, history=16, temperature=0.7, top_k=ids)
    state.set(0, SamplingParams(seed=1), prompt=[1, 2])
    state.temperature.fill_(0.5)
    try:
        token, *_ = ops.sample(logits, state, entropy=False)
        assert_type(token, Tensor)
        assert_type(ops.advance(token, state, position=ids), None)
    except ops.LogitsError as error:
        assert_type(error.rows, list[int])
    assert_type(ops.top_logprobs(logits, 5), tuple[Tensor, Tensor])
    assert_type(ops.target_logprobs(logits, ids), Tensor)


def training(x: Tensor, w: Tensor, target: Tensor) -> None:
    spec = ops.LossSpec(label_smoothing=0.1, reduction="sum")
    assert_type(ops.cross_entropy(x, target, None, spec), Tensor)
    assert_type(ops.linear_cross_entropy(x, w, target, spec=spec), Tensor)
    assert_type(ops.token_logprobs(x, w, target), tuple[Tensor, Tensor])
    assert_type(ops.grad_norm([x, w]), Tensor)
    ops.adamw(w, w, ops.AdamWState.new(w), 1, ops.AdamWSpec(lr=1e-4), grad_scale=ops.grad_norm(w))


def a_loop(model: Decoder, other: Encoder, batches: Batches) -> None:
    assert_type(fit(model, batches, next_token_loss, "run", LoopOptions(steps=2)), Report)
    fit(other, batches, next_token_loss, "run", LoopOptions(steps=2))  # type: ignore[arg-type]
