"""LLM: a model, its tokenizer and an engine behind five methods.

llm = LLM("smollm2-135m")
out = llm.generate("The capital of France is", SamplingParams(max_new_tokens=20, temperature=0.0))
out[0].text, out[0].token_ids, out[0].logprobs, out[0].finish_reason
"""

import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import torch

from . import hub
from .data.chat import ChatTemplate
from .data.tokenizer import Tokenizer
from .decode.cache import SequenceCache
from .decode.engine import Engine, Timing
from .models.gguf import GGUFFile
from .models.weights import load_packed
from .ops import Panels, QWeight
from .sampling_params import SamplingParams

Prompt = str | Sequence[int]


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

    name: an alias ("smollm2-135m"), a .gguf file, an HF folder with safetensors, or a Hub id.
    device: "auto" or "cpu". dtype: "auto" keeps what a file stores; "float32" dequantises it.
    quantize: None, "int8" or "int4" (groups of 32). max_model_len: tokens of prompt and completion together, at most
    the model's own. kv_bytes: refuses a cache larger than this. num_threads: None takes torch's number.

    ValueError for a file or an argument that cannot be used, HubError when a model cannot be fetched, MemoryError when
    it does not fit. Calls from several threads take turns; a stream may be left, or go on after other calls.
    """

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
        num_threads: int | None = None,
        revision: str | None = None,
    ):
        if device not in ("auto", "cpu"):
            raise ValueError(f"LLM: device={device!r}; allowed: 'auto', 'cpu' (decoding on a GPU is not built yet)")
        if dtype not in ("auto", "float32"):
            raise ValueError(f"LLM: dtype={dtype!r}; allowed: 'auto', 'float32'")
        if quantize not in (None, "int8", "int4"):
            raise ValueError(f"LLM: quantize={quantize!r}; allowed: None, 'int8', 'int4'")
        counts = {"max_model_len": max_model_len, "max_num_seqs": max_num_seqs, "num_threads": num_threads}
        for key, value in counts.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"LLM: {key}={value!r}; allowed: an integer of at least 1")
        self.path = hub.resolve(name, revision=revision)
        self.tokenizer, self._template = _read_text_side(self.path)
        self.model = load_packed(self.path, quantize, as_float=dtype == "float32")
        config = self.model.config
        if len(self.tokenizer) > config.vocab:
            raise ValueError(f"{self.path}: the tokenizer has {len(self.tokenizer)} ids, the model {config.vocab}")
        if max_model_len and max_model_len > config.max_position:
            raise ValueError(f"LLM: max_model_len={max_model_len}, but the model has {config.max_position} positions")
        self.max_model_len = max_model_len or config.max_position
        need = SequenceCache.nbytes_for(config, self.max_model_len)
        if kv_bytes is not None and need > kv_bytes:
            raise ValueError(
                f"LLM: {self.max_model_len} tokens need {need} bytes of KV cache, kv_bytes={kv_bytes} allows "
                f"{self.max_model_len * kv_bytes // need} tokens; lower max_model_len or raise kv_bytes"
            )
        self.engine = Engine(self.model, self.max_model_len, self.tokenizer.eos_ids, num_threads or 0)
        self._lock = threading.RLock()

    @property
    def bytes_per_token(self) -> int:
        """Bytes of weights that a decode step reads; the memory roofline is bandwidth over this."""
        total, seen = 0, set()
        for module in self.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, (Panels, QWeight)) and module is not self.model.embedding and id(weight) not in seen:
                seen.add(id(weight))
                total += weight.nbytes
        return total + sum(p.nbytes for p in self.model.parameters())

    # ---------------------------------------------------------------------------------------------------- generation

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Completes each prompt: a string, a list of token ids, or a list of either; one SamplingParams or one each.

        ValueError for an empty prompt, one that does not fit max_model_len, or an id outside the vocabulary: then
        nothing is run.
        """
        prompts = _as_list(prompts)
        each = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each) != len(prompts):
            raise ValueError(f"generate: {len(prompts)} prompts, but {len(each)} SamplingParams; give one, or one each")
        requests = [self.request(p, s) for p, s in zip(prompts, each, strict=True)]
        for request in requests:
            with self._lock:  # held throughout: a call of another thread would make it read its tokens in again
                for _ in self.run(request):
                    pass
        return requests

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[str]:
        """The text of one completion, piece by piece; together exactly what `generate` returns."""
        request = self.request(prompt, params)
        if request.params.n != 1:
            raise ValueError(f"stream: n={request.params.n}; a stream is one completion, use generate")
        return (piece for piece in self.run(request) if piece)

    def chat(
        self, messages: Sequence[Mapping], params: SamplingParams | None = None, *, stream: bool = False
    ) -> RequestOutput | Iterator[str]:
        """The answer to a list of {"role", "content"} messages, by the model's own chat template."""
        ids = self.chat_ids(messages)
        return self.stream(ids, params) if stream else self.generate(ids, params)[0]

    def chat_ids(self, messages: Sequence[Mapping]) -> list[int]:
        """Token ids of the rendered template, ready for the answer. ValueError where the model has no template."""
        if isinstance(self._template, ValueError):
            raise self._template
        return self.tokenizer.encode(self._template.render(messages), add_special_tokens=False, parse_special=True)

    def request(self, prompt: Prompt, params: SamplingParams | None = None) -> RequestOutput:
        """A checked request that `run` fills."""
        ids, params = self._ids(prompt), self._check(SamplingParams() if params is None else params)
        self._check_fits(ids)
        # a seed that is not given is drawn outside torch's generator, whose state is the caller's
        return RequestOutput(ids, params, secrets.randbits(63) if params.seed is None else params.seed)

    def run(self, request: RequestOutput) -> Iterator[str]:
        """Runs a request, one token at each step, and yields the text that it completes, often none. The completions
        come one after the other: `request.outputs[-1]` is the one at work. Text that may yet begin a stop string is
        held back."""
        for index in range(request.params.n):
            request.outputs.append(Completion(index, finish_reason="abort"))  # what stands if the consumer goes away
            yield from self._complete(request, request.outputs[-1])

    def _complete(self, request: RequestOutput, out: Completion) -> Iterator[str]:
        ids, params = request.prompt_token_ids, request.params
        room = min(params.max_new_tokens, self.max_model_len - len(ids))
        ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.tokenizer.eos_ids)
        out.top_logprobs = None if params.logprobs is None else []
        steps = self.engine.generate(ids, params, out.index, request.seed, request.timing)
        text, held = self.tokenizer.stream(), ""
        while out.finish_reason == "abort":
            with self._lock:
                step = next(steps)
            out.token_ids.append(step.token)
            out.logprobs.append(step.logprob)
            if step.top is not None:
                out.top_logprobs.append(step.top)
            ended = step.token in ends and len(out.token_ids) > params.min_new_tokens
            last = ended or len(out.token_ids) == room
            held += "" if ended else text.push(step.token)
            if last:
                held += text.flush()
            piece, held, stopped = _release(held, params.stop, last)
            out.text += piece
            if stopped or last:
                out.finish_reason = "stop" if stopped or ended else "length"
            yield piece

    # ------------------------------------------------------------------------------------------------------- scoring

    def logprobs(self, prompts: Prompt | Sequence[Prompt]) -> list[list[float]]:
        """For each text or list of ids, log p of every token after the first given those before it."""
        requests = self._to_score(prompts)
        with self._lock:
            return [self.engine.score(ids).tolist() for ids in requests]

    def perplexity(self, prompts: Prompt | Sequence[Prompt]) -> list[float]:
        """exp(-mean log p) of the tokens after the first, for each text or list of ids (of at least two tokens)."""
        requests = self._to_score(prompts)
        for ids in requests:
            if len(ids) < 2:
                raise ValueError(f"perplexity: {len(ids)} token; it takes at least two, the first is only context")
        values = self.logprobs(requests)
        return [torch.tensor(v, dtype=torch.float64).mean().neg().exp().item() for v in values]

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> torch.Tensor:
        """Mean-pooled final hidden states of length 1: float32 [number of prompts, dim]."""
        requests = self._to_score(prompts)
        with self._lock:
            return torch.stack([self.engine.embed(ids) for ids in requests])

    # --------------------------------------------------------------------------------------------------- validation

    def _ids(self, prompt: Prompt) -> list[int]:
        prompt = _plain(prompt)
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
        elif _is_ids(prompt):
            ids = [int(i) for i in prompt]
        else:
            raise TypeError(
                f"a prompt is a str or a list of token ids (integers), got {type(prompt).__name__} {repr(prompt)[:40]}"
            )
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        vocab = self.model.config.vocab
        for place, token in enumerate(ids):
            if not 0 <= token < vocab:
                raise ValueError(
                    f"token id {token} at place {place} is outside the vocabulary [0, {vocab}); "
                    "encode the text with this model's tokenizer"
                )
        return ids

    def _to_score(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        requests = [self._ids(p) for p in _as_list(prompts)]
        for ids in requests:
            self._check_fits(ids, room=0)
        return requests

    def _check_fits(self, ids: list[int], room: int = 1) -> None:
        if len(ids) + room > self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, the context holds {self.max_model_len}"
                f"{' with at least one to generate' if room else ''}; shorten it, or raise max_model_len "
                f"(the model allows {self.model.config.max_position})"
            )

    def _check(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise TypeError(f"params is {type(params).__name__}; give a SamplingParams")
        if params.adapter is not None:
            raise ValueError(f"adapter={params.adapter!r} is not loaded; this model has no adapters")
        vocab = self.model.config.vocab
        for token in params.stop_token_ids:
            if token >= vocab:
                raise ValueError(f"stop_token_ids holds {token}, outside the vocabulary [0, {vocab})")
        return params


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


def _release(held: str, stops: Sequence[str], last: bool) -> tuple[str, str, bool]:
    """(text that is final, text that may still begin a stop string, whether one was found)."""
    found = min((i for i in (held.find(s) for s in stops) if i >= 0), default=-1)
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


def _read_text_side(path: Path) -> tuple[Tokenizer, ChatTemplate | ValueError]:
    """The tokenizer and the chat template; a missing template is kept as the error that `chat` will raise."""
    if path.is_dir():
        tokenizer, source, make = Tokenizer.from_folder(path), path, ChatTemplate.from_folder
    else:
        source = GGUFFile(path)
        tokenizer, make = Tokenizer.from_gguf(source), ChatTemplate.from_gguf
    try:
        return tokenizer, make(source)
    except ValueError as error:
        return tokenizer, error
