"""The command line: what it prints, how it fails."""

import io
import json
import re
import subprocess
import sys

import _bench
import pytest
from _cli import call

import fastllm
from fastllm import cli
from fastllm.bench import report
from fastllm.bench import run as runs
from fastllm.ops._op import OPS


def test_version_and_help(monkeypatch, capsys):
    assert call(monkeypatch, capsys, "--version") == (0, f"fastllm {fastllm.__version__}\n", "")
    status, out, _ = call(monkeypatch, capsys, "--help")
    assert status == 0 and "info" in out and "bench" in out
    status, out, _ = call(monkeypatch, capsys, "bench", "-h")
    assert status == 0 and "--compare" in out and "--malloc" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from fastllm import cli; sys.argv = ['fastllm', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'transformers', 'matplotlib', 'scipy', 'fastllm.bench'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_info(monkeypatch, capsys):
    status, out, err = call(monkeypatch, capsys, "info")
    assert status == 0 and not err and all(name in out for name in OPS if not name.endswith("_backward"))
    status, out, _ = call(monkeypatch, capsys, "info", "--json")
    assert status == 0 and json.loads(out)["versions"]["fastllm"] == fastllm.__version__


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bench", "rmsnorm"], 2, "fastllm: no op 'rmsnorm' to measure; did you mean rms_norm"),
        (["bench", "--dtype", "fp8"], 2, "fastllm: no dtype 'fp8'"),
        (["bench", "--shape", "no such shape"], 2, "has 'no such shape' in its label"),
        (["bench", "--device", "tpu"], 2, "fastllm: no device 'tpu'"),
        (["bench", "--malloc", "jemalloc"], 2, "fastllm: no malloc setting 'jemalloc'"),
        (["bench", "--compare", "absent.json"], 1, "absent.json"),
        (["bench", "--dtype", ","], 2, "fastllm: no dtype ','; allowed: float32"),
        (["bench", "--json", "no/such/folder/x.json"], 1, "the folder .*no/such/folder does not exist"),
        (["bench", "--json", "."], 1, "is a folder; give the name of a file in it"),
        (["bench", "--plot", "roof.xyz"], 2, r"--plot roof.xyz: the ending chooses the format; allowed: .*png"),
        (["bench", "--plot", "roof"], 2, r"--plot roof: the ending chooses the format"),
        (["bench", "advance", "--plot", "roof.png"], 2, "nothing to draw: advance has no arithmetic"),
        (["eval", "--data", "x", "--task", "choice", "--json", "."], 1, "is a folder; give the name of a file in it"),
        (["bench", "--no-such-flag"], 2, "No such option"),
        (["benchmark"], 2, "No such command 'benchmark'"),
    ],
)
def test_errors_are_one_line_without_traceback(monkeypatch, capsys, tmp_path, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, *arguments)
    assert code == status and not out and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert re.search(message, last), err
    if last.startswith("fastllm:"):
        assert len(err.strip().splitlines()) == 1


def test_a_comparison_file_of_another_kind(monkeypatch, capsys, tmp_path):
    path = tmp_path / "old.json"
    path.write_text("not json")
    status, _, err = call(monkeypatch, capsys, "bench", "--compare", path)
    assert status == 2 and "is not a result of `fastllm bench --json`" in err


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("FASTLLM_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["fastllm", "bench", "rmsnorm"])
    with pytest.raises(ValueError, match="no op 'rmsnorm'"):
        cli.main()


def test_streams_that_are_closed(monkeypatch):
    """As by `<&- >&- 2>&-`: Python has None in their place."""
    monkeypatch.setattr(sys, "argv", ["fastllm", "generate"])
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2  # the prompt is empty


def test_a_terminal_that_has_no_such_signs(monkeypatch, recorded):
    """The table was lost: ×torch is no ASCII."""
    sink = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(sink, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["fastllm", "bench"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code and b"?torch" in sink.getvalue()


@pytest.fixture
def recorded(monkeypatch):
    """A run that measures nothing: its arguments, and a result to change."""
    calls, made = [], _bench.result(_bench.row())

    def fake(*arguments):
        calls.append(arguments)
        return made

    monkeypatch.setattr(runs, "run", fake)
    return calls, made


def test_bench_writes_what_it_is_asked_for(monkeypatch, capsys, tmp_path, recorded):
    calls, result = recorded
    json_path, plot = tmp_path / "new.json", tmp_path / "roof.svg"
    options = ["--dtype", "float32, bfloat16", "--no-backward", "--json", json_path, "--plot", plot]
    status, out, _ = call(monkeypatch, capsys, "bench", "rms_norm", *options)
    assert status == 0 and "rms_norm: C++" in out and json.loads(json_path.read_text()) == result and plot.exists()
    ops, device, dtypes, shape, backward, compiled, malloc, settings, _ = calls[0]
    assert (ops, device, dtypes, shape, backward) == (["rms_norm"], "cpu", ["float32", "bfloat16"], "", False)
    assert compiled and malloc == "both" and settings is None  # what the device has
    call(monkeypatch, capsys, "bench", "--quick")
    assert not calls[1][5] and calls[1][6] in ("tuned", "default") and calls[1][7] == runs.QUICK
    call(monkeypatch, capsys, "bench", "--quick", "--compile", "--malloc", "default")
    assert calls[2][5] and calls[2][6] == "default"


def test_a_result_is_kept_whoever_reads_the_table(monkeypatch, capsys, tmp_path, recorded):
    def gone(result):
        raise BrokenPipeError

    monkeypatch.setattr(report, "table", gone)
    call(monkeypatch, capsys, "bench", "--json", tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text()) == recorded[1]


def test_bench_status(monkeypatch, capsys, tmp_path, recorded):
    _, result = recorded
    old = json.loads(json.dumps(result))
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    status, out, _ = call(monkeypatch, capsys, "bench", "--compare", path)
    assert status == 0 and "0 of 1 rows" in out
    old["rows"][0]["rivals"]["fastllm"]["median"] /= 2
    path.write_text(json.dumps(old))
    status, out, _ = call(monkeypatch, capsys, "bench", "--compare", path)
    assert status == 1 and "REGRESSION" in out
    result["failures"] = [{"job": "rope", "error": "RuntimeError: no", "malloc": "tuned"}]
    assert call(monkeypatch, capsys, "bench")[0] == 1
    result["interrupted"] = True
    assert call(monkeypatch, capsys, "bench")[0] == 130
