"""What `fastllm generate` reads and prints: a prompt, text as it comes, how fast it was."""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode.beam import BeamParams
    from .llm import LLM, RequestOutput


def prompt_text(prompt: str | None, file: Path | None) -> str:
    """The prompt from where it is; the newline that ends a file is not part of it."""
    if prompt is not None and file is not None:
        raise ValueError(f"a prompt and the file {file}: give one of them")
    text = prompt
    if file is not None or prompt in (None, "-"):
        if file is None and prompt is None and sys.stdin.isatty():
            raise ValueError("no prompt; give it as an argument, in a file with -f, or on standard input")
        name, data = (file, file.read_bytes()) if file else ("standard input", sys.stdin.buffer.read())
        try:
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 text: {error}") from error
    if not text:
        raise ValueError("the prompt is empty; give at least one character")
    return text


def print_text(llm: "LLM", request: "RequestOutput") -> None:
    """Streams the completions to stdout; where there are several, each under a line with its number."""
    begun = 0
    for piece in llm.run(request):
        if request.params.n > 1 and begun < len(request.outputs):
            print("\n" * (begun > 0) + f"--- {begun + 1} of {request.params.n} ---", flush=True)
            begun += 1
        print(piece, end="", flush=True)


def statistics(llm: "LLM", request: "RequestOutput", bandwidth: Callable[..., float] | None) -> dict[str, Any]:
    """Speeds of a request, and the memory's reading speed, where a function measures it; None where there is nothing to tell."""
    timing, read = request.timing, None
    if bandwidth and timing.decoded:
        read = bandwidth(llm.engine.device, llm.engine.threads or None)
    rate = timing.decoded / timing.decode_s if timing.decoded else None
    reached = rate and timing.steps / timing.decode_s * llm.bytes_per_token / 1e9
    return {
        "timing": dataclasses.asdict(timing),
        "prompt_tokens_per_second": timing.prompt_tokens / timing.prefill_s if timing.prefill_s else None,
        "tokens_per_second": rate,
        "bytes_per_token": llm.bytes_per_token,
        "gb_per_s": reached,
        "read_gb_per_s": read,
        "roofline": reached and read and reached / read,
    }


def statistics_line(report: Mapping[str, Any]) -> str:
    """What `statistics` found, for a person."""
    timing, rate = report["timing"], report["tokens_per_second"]
    line = f"prompt: {timing['prompt_tokens']} tokens"
    if report["prompt_tokens_per_second"]:
        line += f", {report['prompt_tokens_per_second']:.0f} tok/s"
    if rate:
        line += f"; decoded: {timing['decoded']} tokens, {rate:.1f} tok/s"
        if timing["drafted"]:
            line += f", {timing['accepted']} of {timing['drafted']} guesses right"
        line += f"; {report['bytes_per_token'] / 1e6:.1f} MB/token, {report['gb_per_s']:.1f} GB/s"
    if report["roofline"]:
        line += f", {report['roofline']:.0%} of the memory roofline ({report['read_gb_per_s']:.1f} GB/s)"
    return line


def as_json(request: "RequestOutput", model: str, dtype: str, quantize: str | None) -> dict[str, Any]:
    """The first completion's fields at hand, and all of them where there are several."""
    each = [{k: v for k, v in vars(c).items() if k != "index"} for c in request.outputs]
    several = {"outputs": each} if request.params.n > 1 else {}
    origin = {"model": model, "dtype": dtype, "quantize": quantize, "seed": request.seed}
    return (each[0] if each else {}) | several | origin


def answer(path: Path, source: str, params: "BeamParams", quantize: str | None) -> tuple[dict[str, Any], str]:
    """The best answers of an encoder-decoder to a source, special tokens such as <extra_id_0> read as such: what --json prints,
    the first one's fields at hand, and a line that says how fast it was."""
    from .decode.text2text import Text2Text

    model = Text2Text.load(path, quantize=quantize)
    began = time.perf_counter()
    (found,) = model.generate(source, params, parse_special=True)
    seconds = time.perf_counter() - began
    each = [vars(one) for one in found]
    several = {"outputs": each} if len(each) > 1 else {}
    count = len(found[0].token_ids)
    line = f"generated: {count} tokens in {seconds:.2f} s, {count / seconds:.1f} tok/s"
    line += f", the best of {params.beams} beams" if params.beams > 1 else ""
    return each[0] | several | {"quantize": quantize, "beams": params.beams, "seconds": seconds}, line


def print_answers(found: Mapping[str, Any]) -> None:
    """The texts that `answer` gave; where there are several, each under a line with its number."""
    texts = [one["text"] for one in found.get("outputs", (found,))]
    for number, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)} ---")
        print(text, flush=True)
