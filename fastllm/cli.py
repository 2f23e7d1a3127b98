"""The command line: thin doors to Python functions.

fastllm info | bench
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import __version__

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

    # everything that can be wrong is found before minutes are spent
    old = report.load(compare) if compare else None
    for path in filter(None, (json_path, plot)):
        if not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {path.absolute().parent} does not exist")
    if plot:
        roofline.require()
    if malloc is None:
        malloc = "both" if not quick else "tuned" if "tuned" in runs.malloc_settings("both", device) else "default"

    result = runs.run(
        ops or [],
        device,
        [d.strip() for d in dtype.split(",") if d.strip()],
        shape,
        backward,
        not quick if compiled is None else compiled,
        malloc,
        runs.QUICK if quick else runs.Settings(),
        _progress,
    )
    _progress("")
    print(report.table(result))
    if json_path:
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if plot:
        roofline.draw(result, plot)
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


def main() -> None:
    """A user's error is one line on stderr: status 2 for what was asked (ValueError), 1 for what the machine lacks."""
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if os.environ.get("FASTLLM_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fastllm: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, (ValueError, TypeError)) else 1)


if __name__ == "__main__":
    main()
