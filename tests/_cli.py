"""The command line, called in this process."""

import sys

import pytest

from fastllm import cli


def call(monkeypatch, capsys, *arguments):
    """(status, stdout, stderr) of `fastllm arguments`."""
    monkeypatch.setattr(sys, "argv", ["fastllm", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err
