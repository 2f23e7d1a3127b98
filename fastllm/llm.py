"""LLM: a model, its tokenizer and an engine behind five methods.

llm = LLM("smollm2-135m")
out = llm.generate("The capital of France is", SamplingParams(max_new_tokens=20, temperature=0.0))
out[0].text, out[0].token_ids, out[0].logprobs, out[0].finish_reason
"""

import copy
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from . import hub
from .data.bound import Bound
from .data.chat import NO_TEMPLATE, ChatTemplate
from .data.literal import Talk
from .data.tokenizer import Tokenizer
from .decode.embed import read_encoder
from .decode.engine import Engine
from .decode.forks import settle
from .decode.limits import CHUNKS, Limits, decoding_device
from .decode.scheduler import Sequence as Decoding
from .decode.scheduler import Step, Timing
from .models.decoder import Decoder
from .models.layers import pack_weights, packed
from .models.text import check_ids, check_vocab, read_text
from .models.weights import load_decoding, to_device
from .ops import Panels, QWeight
from .peft import lora
from .sampling_params import SamplingParams

if TYPE_CHECKING:
    from .models.encoder import Encoder

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


@dataclass
class Completion:
    """One completion. logprobs: one float per token, under the untruncated distribution at temperature 1; top_logprobs:
    per token the most likely (token, logprob) pairs, when asked for. finish_reason: "stop", "length" or "abort"."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] | None = None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    """The completions of one prompt; the first one's fields are at hand as its own. seed: what the draws came from."""

    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    outputs: list[Completion] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def logprobs(self) -> list[float]:
        return self.outputs[0].logprobs

    @property
    def top_logprobs(self) -> list[list[tuple[int, float]]] | None:
        return self.outputs[0].top_logprobs

    @property
    def finish_reason(self) -> str | None:
        return self.outputs[0].finish_reason


class LLM:
    """A language model on this machine.

    name: an alias ("smollm2-135m"), a .gguf file, an HF folder with safetensors, or a Hub id. Of an encoder ("minilm-l6")
    there is `embed` alone: it has no next token.
    device: "cpu", "cuda", or "auto": the GPU where there is one. dtype: "auto" keeps what a file stores, but that
    weights which are not quantised become bfloat16 on a GPU; "float32" dequantises it. quantize: None, "int8" or "int4"
    (groups of 32). max_model_len: tokens of prompt and completion together, at most the model's own. max_num_seqs:
    completions that run together; more wait in line. kv_bytes: size of the KV cache that they share, and in which known
    beginnings of prompts are kept; None: enough for all, but not above 1 GiB (of a GPU four fifths of what is free),
    unless one sequence of max_model_len needs it. On a CPU it takes memory as it fills. kv_dtype: "auto" keeps keys and
    values as the model computes them, float32 on a CPU, "int8" and "fp8" (E4M3) in some quarter of that, a scale for
    each token and head beside them: nearly the same text, not the same bits. num_threads: None takes torch's number.
    speculate: how many tokens a step may guess from what stands in the text already (prompt lookup): the same output,
    sooner where the text repeats; 0: none, 7 or 15 are good numbers. exact: on a GPU too each request has the bits that it would
    have alone, and a log-probability those that a forward of the whole text gives; slower. A CPU keeps it anyway.

    ValueError for a file or an argument that cannot be used, HubError when a model cannot be fetched, MemoryError when
    it does not fit. Calls from several threads run together, each with the bits that it would have alone. A stream may
    be left, or go on after other calls.
    """

    model: "Decoder | Encoder"
    tokenizer: Tokenizer
    max_model_len: int

    def __init__(
        self,
        name: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int = 16,
        kv_bytes: int | None = None,
        kv_dtype: str = "auto",
        num_threads: int | None = None,
        revision: str | None = None,
        speculate: int = 0,
        exact: bool = False,
    ):
        where = decoding_device(device)
        if dtype not in ("auto", "float32"):
            raise ValueError(f"LLM: dtype={dtype!r}; allowed: 'auto', 'float32'")
        limits = Limits(
            quantize=quantize, max_model_len=max_model_len, max_num_seqs=max_num_seqs, kv_bytes=kv_bytes, kv_dtype=kv_dtype,
            num_threads=num_threads, speculate=speculate, exact=exact,
        )  # fmt: skip
        settle()
        self.path = hub.resolve(name, revision=revision)
        self.encoder = read_encoder(self.path, quantize, device)
        if self.encoder:
            self.model, self.tokenizer = self.encoder.model, self.encoder.tokenizer
            self.max_model_len = self.encoder.longest
            return
        self.tokenizer, self._template = read_text(self.path)
        self.model = load_decoding(self.path, where, quantize, as_float=dtype == "float32")
        self._serve(limits)

    @classmethod
    def of(
        cls,
        model: Decoder,
        tokenizer: Tokenizer,
        template: ChatTemplate | None = None,
        *,
        device: str = "cpu",
        **limits: Any,
    ) -> "LLM":
        """Of a model in memory as it is now: its weights are copied and packed, so training may go on beside it.

        device: where it is to decode, as above; on a GPU in bfloat16. limits: quantize, max_model_len and what follows it, as
        above. TypeError for a model that is no Decoder, or is packed.
        """
        if not isinstance(model, Decoder) or packed(model):
            raise TypeError(f"LLM.of: {type(model).__name__}; allowed: a Decoder whose weights are not packed")
        checked, where = Limits(**limits), decoding_device(device)
        settle()
        self = cls.__new__(cls)
        self.path, self.encoder, self.tokenizer = Path("(a model in memory)"), None, tokenizer
        self._template = template or ValueError(f"this model {NO_TEMPLATE}")
        if where.type == "cpu" or checked.quantize:
            self.model = pack_weights(copy.deepcopy(model).cpu().float(), checked.quantize)
        else:
            self.model = copy.deepcopy(model)
        if where.type == "cuda":
            self.model = to_device(self.model, where, torch.bfloat16)
        self._serve(checked)
        return self

    def _serve(self, limits: Limits) -> None:
        config = self.model.config
        check_vocab(self.tokenizer, config.vocab, self.path)
        self._bound, stream = Bound(self.tokenizer), self.model.norm.weight
        self.model.exact = limits.exact
        kv_dtype = limits.cache_dtype(stream.dtype)
        pages = limits.pages(config, kv_dtype, stream.device)
        self.max_model_len = limits.max_model_len or config.max_position
        self.engine = Engine(
            self.model, self.max_model_len, self.tokenizer.eos_ids, limits.max_num_seqs, pages, limits.num_threads or 0,
            chunk=CHUNKS[stream.device.type], kv_dtype=kv_dtype, speculate=limits.speculate,
        )  # fmt: skip

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads; the memory roofline is bandwidth over this."""
        total, seen = 0, set()
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, (Panels, QWeight)) and module is not self.model.embedding and id(weight) not in seen:
                seen.add(id(weight))
                total += weight.nbytes
        table = None if self.model.config.tied else self.model.embedding.weight
        return total + sum(p.nbytes for p in self.model.parameters() if p is not table)

    # ---------------------------------------------------------------------------------------------------- generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes each prompt: a string, a list of token ids, or a list of either; one SamplingParams or one each.
        All run together, as many as there is room for.

        ValueError for an empty prompt, one that does not fit max_model_len, or an id outside the vocabulary: then
        nothing is run. Where a request fails, as with LogitsError, the others are run to their end; then the first
        error is raised, with the list as its `outputs`.
        """
        prompts = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts, but {len(each)} SamplingParams; give one, or one each")
        requests = [self.request(p, s) for p, s in zip(prompts, each, strict=True)]
        writers = [writer for request in requests for writer in self._writers(request)]
        for writer in writers:
            writer.request.outputs.append(writer.out)
        try:
            self.engine.run(writer.sequence for writer in writers)
        except Exception as error:
            error.outputs = requests
            raise
        return requests

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, piece by piece; together exactly what `generate` returns.

        Streams of several threads run together. One that is closed ends; one that is not read goes on while others do.
        """
        request = self.request(prompt, params)
        if request.params.n != 1:
            raise ValueError(f"stream: n={request.params.n}; a stream is one completion, use generate")
        return (piece for piece in self.run(request) if piece)

    @overload
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = ..., *, stream: Literal[False] = ...
    ) -> RequestOutput: ...
    @overload
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = ..., *, stream: Literal[True]
    ) -> Iterator[str]: ...
    @overload
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = ..., *, stream: bool
    ) -> RequestOutput | Iterator[str]: ...
    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | Iterator[str]:
        """The answer to a list of {"role", "content"} messages, by the model's own chat template."""
        ids = self.chat_ids(messages)
        return self.stream(ids, params) if stream else self.generate(ids, params)[0]

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the rendered template, ready for the answer; special tokens that stand in a message stay text, unless it
        is the assistant's. ValueError where the model has no template."""
        self._check_decoder()
        if isinstance(self._template, ValueError):
            raise self._template
        talk = Talk(self.tokenizer, messages)
        return talk.encode(self._template.render(talk.messages))

    def request(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """A checked request that `run` fills."""
        self._check_decoder()
        ids, params = self._ids(prompt), self._check(SamplingParams() if params is None else params)
        self._check_fits(ids)
        # a seed that is not given is drawn outside torch's generator, whose state is the caller's
        return RequestOutput(ids, params, secrets.randbits(63) if params.seed is None else params.seed)

    def run(self, request: RequestOutput) -> Iterator[str]:
        """Runs a request and yields the text that each token completes, often none. The completions run together and
        are told one after the other: `request.outputs[-1]` is the one at hand. Text that may yet begin a stop string is
        held back."""
        writers = self._writers(request)
        sequences = [writer.sequence for writer in writers]
        try:
            self.engine.submit(sequences)
            for writer in writers:
                request.outputs.append(writer.out)
                yield from writer.told()
        finally:
            self.engine.cancel(sequences)

    def _writers(self, request: RequestOutput) -> list["_Writer"]:
        return [_Writer(self, request, index) for index in range(request.params.n)]

    # ------------------------------------------------------------------------------------------------------ adapters

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Loads a LoRA adapter, a folder in PEFT's format, under a name that `SamplingParams(adapter=name)` and the `adapter`
        of the scores take. Requests with different adapters, or none, run in one batch, each with the bits that it would
        have alone.

        A name that is loaded already then stands for the new adapter; requests that were made with the old one end with it.
        Adapters are held in float32. FileNotFoundError where there is no such folder; ValueError for what cannot be used:
        another base's adapter, pickles, adapters of the embedding, modules that were trained whole.
        """
        self._check_decoder()
        if not isinstance(name, str) or not name:
            raise ValueError(f"load_adapter: name={name!r}; allowed: a string that is not empty")
        self.engine.load_adapter(name, lora.read(path))

    def unload_adapter(self, name: str) -> None:
        """Forgets a name; requests that were made with it run to their end, then its memory and its pages of the KV cache
        are given back. ValueError for one that is not loaded."""
        self._check_decoder()
        self.engine.unload_adapter(name)

    @property
    def adapters(self) -> list[str]:
        """The names that are loaded."""
        self._check_decoder()
        return list(self.engine.adapters.named)

    # ------------------------------------------------------------------------------------------------------- scoring

    def logprobs(
        self, prompts: Prompt | Sequence[Prompt], *, adapter: str | None = None, starts: int | Sequence[int] = 1
    ) -> list[list[float]]:
        """For each text or list of ids, log p of every token after the first given those before it.

        starts: the first token that is scored, one number for all or one each. What comes before is read once by texts that
        have it in common, such as the answers to one question. ValueError: a start below 1 or behind the end.
        """
        requests = self._to_score(prompts)
        each = [starts] * len(requests) if isinstance(starts, int) else list(starts)
        if len(each) != len(requests):
            raise ValueError(f"logprobs: {len(requests)} texts, but {len(each)} starts; give one number, or one each")
        for ids, start in zip(requests, each, strict=True):
            if not 1 <= start <= len(ids):
                raise ValueError(f"logprobs: start {start} of a text of {len(ids)} tokens; allowed: 1 to {len(ids)}")
        return [scores.tolist() for scores in self.engine.score(requests, adapter, each)]

    def perplexity(self, prompts: Prompt | Sequence[Prompt], *, adapter: str | None = None) -> list[float]:
        """exp(-mean log p) of the tokens after the first, for each text or list of ids (of at least two tokens)."""
        requests = self._to_score(prompts)
        for ids in requests:
            if len(ids) < 2:
                raise ValueError(f"perplexity: {len(ids)} token; it takes at least two, the first is only context")
        values = self.logprobs(requests, adapter=adapter)
        return [torch.tensor(v, dtype=torch.float64).mean().neg().exp().item() for v in values]

    def embed(self, prompts: Prompt | Sequence[Prompt], *, adapter: str | None = None) -> torch.Tensor:
        """A vector of length 1 for each prompt, float32 [number of prompts, dim]: the mean of its final hidden states, or
        what an encoder's folder asks for."""
        if self.encoder:
            if adapter is not None:
                raise ValueError(f"embed: adapter={adapter!r}; an encoder takes none, allowed: None")
            settle()
            return self.encoder.embed(_as_list(prompts))
        return self.engine.embed(self._to_score(prompts), adapter)

    # --------------------------------------------------------------------------------------------------- validation

    def _ids(self, prompt: Prompt) -> list[int]:
        prompt = _plain(prompt)
        if isinstance(prompt, str):
            # what is short is not looked at: the vocabulary would be, at the first prompt
            if len(prompt) > self.max_model_len and (least := self._bound.least(prompt)) > self.max_model_len:
                raise self._too_long(f"at least {least}")
            ids = self.tokenizer.encode(prompt)
        elif _is_ids(prompt):
            ids = [int(i) for i in prompt]
        else:
            raise TypeError(
                f"a prompt is a str or a list of token ids (integers), got {type(prompt).__name__} {repr(prompt)[:40]}"
            )
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        check_ids(ids, self.tokenizer, self.model.config.vocab)
        return ids

    def _check_decoder(self) -> None:
        if self.encoder:
            raise ValueError(f"{self.path} is an encoder, which predicts no next token; allowed: embed")

    def _to_score(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        self._check_decoder()
        requests = [self._ids(p) for p in _as_list(prompts)]
        for ids in requests:
            self._check_fits(ids, room=0)
        return requests

    def _check_fits(self, ids: list[int], room: int = 1) -> None:
        if len(ids) + room > self.max_model_len:
            raise self._too_long(f"{len(ids)}", " with at least one to generate" if room else "")

    def _too_long(self, count: str, room: str = "") -> ValueError:
        return ValueError(
            f"the prompt has {count} tokens, the context holds {self.max_model_len}{room}; shorten it, or raise "
            f"max_model_len (the model allows {self.model.config.max_position})"
        )

    def _check(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {type(params).__name__}; give a SamplingParams")
        if params.adapter is not None:
            self.engine.adapters.find(params.adapter)
        vocab = self.model.config.vocab
        for token in params.stop_token_ids:
            if token >= vocab:
                raise ValueError(f"stop_token_ids holds {token}, outside the vocabulary [0, {vocab})")
        return params


class _Writer:
    """Makes text of the tokens of one completion, as the engine gives them out, and says when it ends."""

    def __init__(self, llm: LLM, request: RequestOutput, index: int):
        ids, params = request.prompt_token_ids, request.params
        self.request, self.params, self._engine = request, params, llm.engine
        # "abort" is what stands if the consumer goes away
        self.out = Completion(index, top_logprobs=None if params.logprobs is None else [], finish_reason="abort")
        self.room = min(params.max_new_tokens, llm.max_model_len - len(ids))
        self.sequence = Decoding(ids, self.room, params, index, request.seed, self.take, timing=request.timing)
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else llm.tokenizer.eos_ids)
        self._named = len(llm.tokenizer)  # a vocabulary may be padded: an id from there on has no text
        self._text, self._held, self._pieces = llm.tokenizer.stream(after=ids), "", deque()
        self._free = 0  # characters of what is held in which no stop string may end

    def take(self, step: Step) -> bool:
        out = self.out
        out.token_ids.append(step.token)
        out.logprobs.append(step.logprob)
        if step.top is not None:
            out.top_logprobs.append(step.top)
        ended = step.token in self._ends and len(out.token_ids) > self.params.min_new_tokens
        last = ended or len(out.token_ids) == self.room
        if not ended and step.token < self._named:
            self._held += self._text.push(step.token)
        if last:
            self._held += self._text.flush()
        if len(out.token_ids) <= self.params.min_new_tokens:
            self._free = len(self._held)
        piece, self._held, stopped = _release(self._held, self.params.stop, last, self._free)
        self._free = max(self._free - len(piece), 0)
        out.text += piece
        if stopped or last:
            out.finish_reason = "stop" if stopped or ended else "length"
        self._pieces.append(piece)
        return stopped or last

    def told(self) -> Iterator[str]:
        """The pieces of text as they come. Raises what the sequence failed with."""
        while True:
            self._engine.wait(lambda: self._pieces or self.sequence.ended)
            if not self._pieces:
                break
            yield self._pieces.popleft()
        if self.sequence.error:
            raise self.sequence.error


def _plain(prompts):
    """Tensors and arrays as lists."""
    return prompts.tolist() if hasattr(prompts, "tolist") else prompts


def _is_ids(prompt) -> bool:
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, (str, bytes, bytearray))
        and all(isinstance(i, Integral) and not isinstance(i, bool) for i in prompt)
    )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    prompts = _plain(prompts)
    several = isinstance(prompts, Iterable) and not isinstance(prompts, (str, bytes, bytearray, Mapping))
    return list(prompts) if several and not _is_ids(prompts) else [prompts]


def _release(held: str, stops: Sequence[str], last: bool, free: int) -> tuple[str, str, bool]:
    """(text that is final, text that may still begin a stop string, whether one was found that ends behind `free`)."""
    found = min((i for i in (held.find(s, max(free - len(s) + 1, 0)) for s in stops) if i >= 0), default=-1)
    if found >= 0:
        return held[:found], "", True
    keep = 0
    if not last:
        for stop in stops:
            for n in range(min(len(stop) - 1, len(held)), keep, -1):
                if held.endswith(stop[:n]):
                    keep = n
                    break
    return held[: len(held) - keep], held[len(held) - keep :], False
