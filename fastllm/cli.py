"""The command line: thin doors to Python functions.

fastllm info | bench | pull | generate | chat | eval | pretrain | sft
"""

import dataclasses
import io
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__, output

DEVICE = "auto (the GPU, if there is one), cpu or cuda."
EXACT = "On a GPU, too, the same bits in any batch; slower."
KV_DTYPE = "Of the KV cache: auto (float32), or int8 or fp8, a quarter of it."
app = typer.Typer(
    name="fastllm",
    help="Fast, exact kernels and a small runtime for language models, on a GPU and on a plain CPU.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False) -> None:
    """Versions, devices, and which kernel runs each op on each device, with the reason."""
    from .info import collect, text

    found = collect()
    print(json.dumps(found, indent=2) if as_json else text(found))


@app.command()
def bench(
    ops: Annotated[
        list[str] | None, typer.Argument(metavar="[OP]...", help="Which ops; all when none is named.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Comma-separated: float32, bfloat16, float16.")] = "float32,bfloat16",
    shape: Annotated[str, typer.Option(help="Only cases whose label contains this.")] = "",
    backward: Annotated[bool, typer.Option(help="Time forward + backward too.")] = True,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Time torch.compile too.  [default: unless --quick]")
    ] = None,
    malloc: Annotated[
        str | None,
        typer.Option(help="default, tuned or both.  [default: both; tuned with --quick]", show_default=False),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few samples: a look, not a measurement.")] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write the result there.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PATH.png", help="Draw the roofline there.")] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="OLD.json", help="Compare with an older --json; exit 1 where 10 % slower.")
    ] = None,
) -> None:
    """Time every op against PyTorch, eager and compiled, and against the machine's ceilings.

    A table on stdout; rounds are interleaved and samples taken while other processes work are repeated.
    """
    from .bench import report, roofline
    from .bench import run as runs
    from .bench.select import select
    from .files import check_file, write_file

    # everything that can be wrong is found before minutes are spent
    old = report.load(compare) if compare else None
    for path in filter(None, (json_path, plot)):
        check_file(path)
    dtypes = [d.strip() for d in dtype.split(",") if d.strip()] or [dtype]
    if plot:
        roofline.require(plot, select(ops or [], device, dtypes, shape))
    if malloc is None:
        malloc = "both" if not quick else "tuned" if "tuned" in runs.malloc_settings("both", device) else "default"

    result = runs.run(
        ops or [],
        device,
        dtypes,
        shape,
        backward,
        not quick if compiled is None else compiled,
        malloc,
        runs.QUICK if quick else None,
        _progress,
    )
    _progress("")
    try:
        if json_path:  # first: what reads the table may have left
            write_file(json_path, json.dumps(result, indent=1) + "\n")
    finally:
        print(report.table(result))
    if plot and roofline.points(result)[0]:
        roofline.draw(result, plot)
    elif plot:  # all that it could show failed, or was interrupted
        print(f"fastllm: --plot {plot} is not drawn: nothing that it could show was measured", file=sys.stderr)
    regressions = 0
    if old:
        text, regressions = report.compare(result, old)
        print("\n" + text)
    if regressions or result["failures"] or result["interrupted"]:
        raise typer.Exit(130 if result["interrupted"] else 1)


def _progress(line: str) -> None:
    """One line on a terminal, overwritten; lines elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{line[:110]}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------- models


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="An alias, such as smollm2-135m, or a Hub id.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash the cached files of an alias again.")] = False,
) -> None:
    """Fetch a model, unless it is here, and print its path."""
    from . import hub

    print(hub.resolve(name, revision=revision, verify=verify))


# Options of `generate` that an encoder-decoder has, too.
OF_ENCODER_DECODER = {"prompt", "file", "model", "quantize", "max_new_tokens", "beams", "n", "as_json", "stats"}


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or none reads standard input.")] = None,
    file: Annotated[Path | None, typer.Option("-f", "--file", help="Read the prompt from this file.")] = None,
    model: Annotated[str, typer.Option(help="Alias, .gguf file, folder of safetensors, or Hub id.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="auto keeps what the file stores; float32 dequantises it.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4.  [default: as stored]")] = None,
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPE)] = "auto",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter: a folder in PEFT's format.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="How many to generate at most.")] = 128,
    min_new_tokens: Annotated[int, typer.Option(help="No end of sequence before so many.")] = 0,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token.  [default: 0; 1 where an option of drawing is given]"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the fewest tokens of this probability.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw from tokens this likely against the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a draw repeatable.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="How many completions.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against tokens that occurred.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of a token once generated.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, for each time it was generated.")] = 0.0,
    beams: Annotated[int, typer.Option(help="Of an encoder-decoder: beam search, 1 to 10.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion; repeatable.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of sequence.")] = False,
    logprobs: Annotated[int | None, typer.Option(help="Alternatives for each token, with --json.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and completion.")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: as torch has it]")] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    speculate: Annotated[
        int,
        typer.Option(help="Guess up to so many tokens a step from the text itself: the same output, perhaps sooner."),
    ] = 0,
    exact: Annotated[bool, typer.Option("--exact", help=EXACT)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of text.")] = False,
    stats: Annotated[bool, typer.Option("--stats/--no-stats", help="Measure, and say how fast it was.")] = True,
) -> None:
    """Complete a prompt, or answer a source by an encoder-decoder: text on stdout as it comes, then one line on stderr that says
    how fast it was."""
    from .sampling_params import SamplingParams

    text = output.prompt_text(prompt, file)
    if logprobs is not None and not as_json:
        raise ValueError(f"--logprobs {logprobs}: they are part of --json; add it")
    drawing = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed, "n": n}
    drawing = {name: value for name, value in drawing.items() if value is not None}
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature if temperature is not None else 1.0 if drawing else 0.0,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=stop or (),
        ignore_eos=ignore_eos,
        logprobs=logprobs,
        adapter=adapter and str(adapter),
        **drawing,
    )
    request, interrupted = None, False
    try:
        from . import hub, models
        from .bench.ceiling import memory_bandwidth
        from .llm import LLM

        path = hub.resolve(model)
        if models.kind_of(path) == "Seq2Seq":
            return _answer(context, path, text)
        if beams != 1:
            raise ValueError(f"--beams {beams}: {path} is no encoder-decoder; leave it out")
        llm = LLM(
            path, device=device, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, max_model_len=max_model_len,
            num_threads=threads, speculate=speculate, exact=exact,
        )  # fmt: skip
        if adapter:
            llm.load_adapter(str(adapter), adapter)
        request = llm.request(llm.chat_ids([{"role": "user", "content": text}]) if chat else text, params)
        if as_json:
            for _ in llm.run(request):
                pass
        else:
            output.print_text(llm, request)
    except KeyboardInterrupt:
        if request is None:
            raise typer.Exit(130) from None
        interrupted = True
    if not as_json:
        print()
    report = output.statistics(llm, request, memory_bandwidth if stats and not interrupted else None)
    if as_json:
        print(json.dumps(output.as_json(request, model, dtype, quantize) | report))
    elif stats:
        print(output.statistics_line(report), file=sys.stderr)
    if interrupted:
        raise typer.Exit(130)


def _answer(context: typer.Context, path: Path, source: str) -> None:
    """`generate` by an encoder-decoder."""
    from .decode.beam import BeamParams

    given = context.params
    for option in context.command.params:
        if context.get_parameter_source(option.name).name == "COMMANDLINE" and option.name not in OF_ENCODER_DECODER:
            raise ValueError(
                f"{option.opts[-1]}: {path} is an encoder-decoder, which gives the likeliest answers (--beams, --n), in float32 "
                "on the CPU; leave it out"
            )
    params = BeamParams(max_new_tokens=given["max_new_tokens"], beams=given["beams"], n=given["n"] or 1)
    found, line = output.answer(path, source, params, given["quantize"])
    if given["as_json"]:
        print(json.dumps({"model": given["model"]} | found))
        return
    output.print_answers(found)
    if given["stats"]:
        print(line, file=sys.stderr)


@app.command()
def chat(
    model: Annotated[str, typer.Option(help="Alias, .gguf file, folder of safetensors, or Hub id.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="auto keeps what the file stores; float32 dequantises it.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4.  [default: as stored]")] = None,
    kv_dtype: Annotated[str, typer.Option(help=KV_DTYPE)] = "auto",
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter: a folder in PEFT's format.")] = None,
    system: Annotated[str | None, typer.Option(help="The system's message: how the model is to answer.")] = None,
    load: Annotated[Path | None, typer.Option(help="Go on with a conversation that /save wrote.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.7,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: from all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability.")] = 0.9,
    min_p: Annotated[float, typer.Option(help="Draw from tokens this likely against the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: against tokens that occurred.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of the history that the model sees.")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: as torch has it]")] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    speculate: Annotated[
        int,
        typer.Option(help="Guess up to so many tokens a step from the text itself: the same output, perhaps sooner."),
    ] = 0,
    exact: Annotated[bool, typer.Option("--exact", help=EXACT)] = False,
) -> None:
    """Talk to a chat model: a line is a message; /help says more. Messages come from standard input, too."""
    from .sampling_params import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, seed=seed, adapter=adapter and str(adapter),
    )  # fmt: skip
    from .conversation import Conversation
    from .llm import LLM
    from .terminal import chat as talk_on_terminal

    llm = LLM(
        model, device=device, dtype=dtype, quantize=quantize, kv_dtype=kv_dtype, max_model_len=max_model_len,
        max_num_seqs=1, num_threads=threads, speculate=speculate, exact=exact,
    )  # fmt: skip
    if adapter:
        llm.load_adapter(str(adapter), adapter)
    talk = Conversation(llm, params, system)
    if load is not None:
        talk.load(load)
    talk_on_terminal(talk)


@app.command("eval")
def evaluate(
    data: Annotated[list[Path], typer.Option(help="Files, folders or globs of records; repeatable.")],
    task: Annotated[str, typer.Option(help="perplexity, choice, classify or generate.")],
    model: Annotated[str, typer.Option(help="Alias, .gguf file, folder of safetensors, or Hub id.")] = "smollm2-135m",
    dtype: Annotated[str, typer.Option(help="auto keeps what the file stores; float32 dequantises it.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8 or int4.  [default: as stored]")] = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA adapter: a folder in PEFT's format.")] = None,
    split: Annotated[
        str | None, typer.Option(help="train, validation or test: records of this split alone.  [default: all]")
    ] = None,
    text: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    unit: Annotated[str, typer.Option(help="What of a text file is a text: file, paragraph or line.")] = "file",
    limit: Annotated[int | None, typer.Option(help="Only so many records, from the beginning.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Perplexity: tokens seen at once.  [default: all that fit]")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Perplexity: from window to window.  [default: half]")] = None,
    shots: Annotated[int, typer.Option(help="Classify: solved examples in front of each record.")] = 0,
    pool: Annotated[Path | None, typer.Option(help="Classify: where the examples come from.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Classify: the question, with {text} and {options}; \\n is a new line.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of examples.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's message to a chat model.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Generate: tokens of a text at most.")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="Generate: text that ends one; repeatable.")] = None,
    beams: Annotated[int, typer.Option(help="Generate: of an encoder-decoder, 1 to 10.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens of prompt and completion.")] = None,
    threads: Annotated[int | None, typer.Option(help="[default: as torch has it]")] = None,
    device: Annotated[str, typer.Option(help=DEVICE)] = "auto",
    exact: Annotated[bool, typer.Option("--exact", help=EXACT)] = False,
    json_path: Annotated[Path | None, typer.Option("--json", metavar="PATH", help="Write all of it there.")] = None,
) -> None:
    """Measure a model on records: perplexity {"text"}, choice {"prompt", "choices", "answer"}, classify the same with one list of
    choices or {"text", "label"}, generate {"prompt", "completion"}, of an encoder-decoder {"source", "target"} too.

    A table on stdout. Choose by --split validation; read --split test once, for the model that was chosen.
    """
    from .data.sources import Documents
    from .evaluate import tasks
    from .files import check_file, write_file

    # everything that can be wrong is found before a model is loaded
    if task not in tasks.TASKS:
        raise ValueError(f"--task {task}; allowed: {', '.join(tasks.TASKS)}")
    if json_path:
        check_file(json_path)
    if shots and not pool:
        raise ValueError(f"--shots {shots}: give the file that the examples come from, with --pool")
    if pool and not shots and task == "classify":
        raise ValueError(f"--pool {pool} without --shots: say how many examples to draw from it")
    records = Documents(data, split=split, text=text, unit=unit)
    options = tasks.Options(
        limit=limit, window=window, stride=stride, shots=shots, seed=seed, max_new_tokens=max_new_tokens, chat=chat,
        pool=Documents(pool, text=text) if pool else (), stop=[s.replace("\\n", "\n") for s in stop or ()], beams=beams,
        prompt=tasks.PROMPT if prompt is None else prompt.replace("\\n", "\n"), adapter=adapter and str(adapter),
    )  # fmt: skip
    limits = {"device": device, "dtype": dtype, "max_model_len": max_model_len, "num_threads": threads}
    limits |= {"exact": True} if exact else {}
    llm = tasks.load(model, quantize=quantize, adapter=options.adapter, **limits)
    report = tasks.run(llm, task, records, options, watch=lambda count: _progress(f"{count} records"))
    _progress("")
    print(report.table())
    if json_path:
        origin = {"model": model, "dtype": dtype, "quantize": quantize, "data": list(map(str, data)), "split": split}
        asked = {k: v for k, v in vars(options).items() if k != "pool"}
        write_file(json_path, json.dumps(origin | {"options": asked} | dataclasses.asdict(report)) + "\n")


# ----------------------------------------------------------------------------------------------------------- training

PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=PASSED_ON, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Train a model from nothing, on text; `fastllm pretrain --help` lists its options."""
    from . import train

    _stage("pretrain", train.PretrainOptions, train.pretrain, context.args)


@app.command(context_settings=PASSED_ON, add_help_option=False)
def sft(context: typer.Context) -> None:
    """Fine-tune a model on completions or talks; `fastllm sft --help` lists its options."""
    from . import train

    _stage("sft", train.SftOptions, train.sft, context.args)


def _stage(name: str, kind: type, stage: Callable, arguments: list[str]) -> None:
    from .train.command import keep_freed_memory, parse
    from .train.parallel import start
    from .train.progress import Terminal, duration

    options, resume = parse(name, kind, arguments)
    keep_freed_memory()
    processes = start()
    peak = processes.first(lambda: _peak(options)) * processes.count
    report = stage(options, resume=resume, watch=[Terminal(options.steps, peak)])
    if processes.rank:
        return
    words = {"done": "done", "no better": "no better for a while", "no more data": "the data ended"}
    print(f"{words.get(report.reason, report.reason)} after {report.steps} steps, {duration(report.seconds)}")
    for split in ("validation", "test"):
        if figures := getattr(report, split):
            known = {f"{key} of unigrams": value for key, value in report.unigram[split].items()}
            print(f"{split:<11}" + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in (figures | known).items()))
    print(f"model      {report.model}")
    if report.reason == "interrupted":
        print(f"go on with: fastllm {name} --resume --out {options.out}", file=sys.stderr)
        raise typer.Exit(130)


def _peak(options: Any) -> float:
    """Operations a second that the device can do."""
    from .bench.ceiling import ceilings

    device, dtype = options.where
    return ceilings(device.type, dtype)[1].best() * 1e9


def main() -> None:
    """A user's error is one line on stderr: status 2 for what was asked (ValueError), 1 for what the machine lacks."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started this, as services are started
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("FASTLLM_TRACEBACK"):
            raise
        message = re.sub(r"^\[Errno -?\d+\] ", "", " ".join(str(error).split())) or type(error).__name__
        print(f"fastllm: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, TypeError)) else 1)


if __name__ == "__main__":
    main()
