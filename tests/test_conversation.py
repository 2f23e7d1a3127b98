"""Conversations: the history and how it is cut, files, and the loop on the terminal."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import _tiny
import pytest
from _cli import call

from fastllm import LLM, SamplingParams, terminal
from fastllm.conversation import Conversation

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("talk") / "tiny.gguf")


@pytest.fixture(scope="module")
def llm(path):
    return LLM(path, max_model_len=200)


def test_an_answer_is_what_chat_gives_for_the_whole_history(llm):
    talk = Conversation(llm, GREEDY, system="be brief")
    first = "".join(talk.ask("hello"))
    history = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert first == llm.chat(history, GREEDY).text
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    assert "".join(talk.ask("again")) == llm.chat(history, GREEDY).text
    assert talk.messages[:-1] == history and talk.dropped == 0


def test_the_oldest_pairs_go_and_the_system_stays(llm):
    talk, dropped = Conversation(llm, GREEDY, system="s"), 0
    for i in range(12):
        answer = "".join(talk.ask(f"question {i}"))
        dropped += talk.dropped
        assert talk.messages[0] == {"role": "system", "content": "s"}
        assert [m["role"] for m in talk.messages[1:]] == ["user", "assistant"] * (len(talk.messages) // 2)
        assert talk.messages[-2:] == [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": answer},
        ]
        assert len(llm.chat_ids(talk.messages[:-1])) + GREEDY.max_new_tokens <= llm.max_model_len
    assert dropped and dropped % 2 == 0 and dropped + len(talk.messages) == 1 + 24


@pytest.mark.parametrize("most", [199, 200, 100_000])
def test_a_long_answer_leaves_room_for_the_history(llm, most):
    """Half of the context is kept for it, at most."""
    talk = Conversation(llm, replace(GREEDY, max_new_tokens=most))
    for i in range(4):
        pieces = talk.ask(f"question {i}")
        next(pieces), pieces.close()
    ids = llm.chat_ids(talk.messages[:-1])
    assert len(talk.messages) > 2 and len(ids) <= 100


def test_a_long_history_is_soon_cut(llm, monkeypatch):
    """As if pair after pair were dropped, in fewer steps; also where only the question is left, or nothing goes."""
    asked, chat_ids = [], llm.chat_ids
    monkeypatch.setattr(llm, "chat_ids", lambda messages: (asked.append(1), chat_ids(messages))[1])
    for pairs, question in ((0, "q"), (1, "q"), (2, "q"), (300, "q"), (300, "x" * 120), (300, "x" * 165)):
        talk = Conversation(llm, GREEDY, system="s")
        history = [{"role": r, "content": f"{i} {r}"} for i in range(pairs) for r in ("user", "assistant")]
        talk.messages = talk.messages + history
        asked.clear()
        talk.ask(question).close()
        assert len(asked) <= 12
        kept, room = talk.messages[:-1], llm.max_model_len - GREEDY.max_new_tokens
        assert len(chat_ids(kept)) <= room or len(kept) == 2
        more = [kept[0], *([*history, kept[-1]][-len(kept) - 1 :])]
        assert not talk.dropped or len(chat_ids(more)) > room
        assert talk.dropped + len(kept) == 2 * pairs + 2


def test_a_question_too_long_changes_nothing(llm):
    talk = Conversation(llm, GREEDY)
    "".join(talk.ask("hello"))
    before = list(talk.messages)
    with pytest.raises(ValueError, match="the context holds 200"):
        talk.ask("long " * 200)
    with pytest.raises(ValueError, match="empty"):
        talk.ask(" \n")
    assert talk.messages == before


@pytest.mark.parametrize("system", [None, "s"])
def test_a_first_question_is_asked_however_long(llm, system):
    """It may leave less room than max_new_tokens; one that does not fit is refused."""
    talk = Conversation(llm, replace(GREEDY, max_new_tokens=100), system)
    question = {"role": "user", "content": "x" * 120}
    expected = llm.chat([*talk.messages, question], talk.params)
    assert "".join(talk.ask(question["content"])) == expected.text and len(expected.token_ids) < 100
    talk.reset()
    with pytest.raises(ValueError, match="the context holds 200"):
        talk.ask("x" * 300)


def test_an_answer_that_is_left_keeps_what_was_said(llm):
    talk = Conversation(llm, GREEDY)
    pieces = talk.ask("hello")
    said = next(pieces) + next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": said}
    assert "".join(talk.ask("go on"))  # and the engine is free again


def test_saved_and_taken_up_again(llm, tmp_path):
    talk = Conversation(llm, GREEDY, system="s")
    "".join(talk.ask("hello"))
    talk.save(tmp_path / "talk.json")
    again = Conversation(llm, GREEDY)
    again.load(tmp_path / "talk.json")
    assert again.messages == talk.messages and "".join(again.ask("more")) == "".join(talk.ask("more"))
    again.reset()
    assert again.messages == [{"role": "system", "content": "s"}]
    assert os.listdir(tmp_path) == ["talk.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "{}", "[1]", '[{"role": "user"}]', '[{"role": "user", "content": "x"}]', '[{"role": 1, "content": "x"}]'],
)
def test_what_is_no_conversation(llm, tmp_path, content):
    (tmp_path / "bad.json").write_text(content)
    talk = Conversation(llm, GREEDY)
    with pytest.raises(ValueError, match=r"bad\.json is no"):
        talk.load(tmp_path / "bad.json")


def test_one_answer_at_a_time(llm):
    with pytest.raises(ValueError, match="n=2"):
        Conversation(llm, SamplingParams(n=2))


# -------------------------------------------------------------------------------------------------------- the terminal


def run(talk, lines, capsys):
    """(stdout, stderr) of the loop over these lines; an exception among them is raised."""
    lines = iter(lines)

    def read(_):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    terminal.chat(talk, read)
    return capsys.readouterr()


def test_messages_and_commands(llm, tmp_path, capsys):
    talk, file = Conversation(llm, GREEDY), tmp_path / "t.json"
    lines = ["hello", "", "two\\", "lines", f"/save {file}", "/nothing", "/save", "/reset", f"/load {file}", "/help"]
    out, err = run(talk, [*lines, KeyboardInterrupt(), "/quit", "never"], capsys)
    said = json.loads(file.read_text())
    assert [m["content"] for m in said if m["role"] == "user"] == ["hello", "two\nlines"]
    assert out == "".join(m["content"] + "\n" for m in said if m["role"] == "assistant")
    for part in (
        "4 messages saved",
        "no command /nothing",
        "/save needs",
        "(forgotten)",
        "4 messages from",
        "/quit or",
    ):
        assert part in err
    assert "never" not in str(talk.messages)


def test_names_of_files(llm, tmp_path, monkeypatch, capsys):
    """~ is the home folder, as in a shell; a folder is no file."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    _, err = run(Conversation(llm, GREEDY), ["hello", "/save ~/t.json", "/load ~/t.json", "/save .", "/quit"], capsys)
    assert (tmp_path / "home/t.json").exists() and not (tmp_path / "~").exists()
    assert "2 messages from" in err and "Is a directory" in err


def test_what_was_dropped_is_said(llm, capsys):
    _, err = run(Conversation(llm, GREEDY), ["a question of some length"] * 8, capsys)
    assert re.search(r"\(\d+ earliest messages dropped: the context holds 200 tokens\)", err)


def test_command_line_reads_standard_input(path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    options = ["--model", path, "--temperature", 0, "--max-new-tokens", 5, "--system", "s"]
    status, out, _ = call(monkeypatch, capsys, "chat", *options)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    expected = LLM(path).chat(messages, SamplingParams(temperature=0.0, max_new_tokens=5, top_p=0.9)).text
    assert (status, out) == (0, expected + "\n")


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_control_c_stops_the_answer_and_not_the_program(path):
    """In a real terminal: a long answer is stopped, the next question is answered, Ctrl-D leaves with status 0."""
    leader, follower = pty.openpty()
    options = ["--model", str(path), "--temperature", "0", "--max-new-tokens", "900", "--max-model-len", "1000"]
    command = [sys.executable, "-m", "fastllm.cli", "chat", *options]
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    seen = ""

    def until(pattern: str, seconds: float = 120) -> None:
        nonlocal seen
        end = time.monotonic() + seconds
        while not re.search(pattern, seen):
            assert time.monotonic() < end and child.poll() is None, seen[-2000:]
            if select.select([leader], [], [], 1)[0]:
                seen += os.read(leader, 4096).decode(errors="replace")

    try:
        until(r"> $")
        seen = ""
        os.write(leader, b"hello\n")
        until(r"hello\r\n.{30}")
        child.send_signal(signal.SIGINT)
        until(r"\(stopped\)\r\n> $")
        seen = ""
        os.write(leader, b"/save /dev/null/x\n")
        until(r"fastllm: .*\r\n> $")
        os.write(leader, b"\x04")
        assert child.wait(60) == 0
    finally:
        child.kill()
        os.close(leader)
