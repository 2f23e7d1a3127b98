"""fastllm generate and fastllm pull: texts, statistics, JSON, and every way to fail."""

import io
import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import _lora
import _tiny
import pytest
from _cli import call
from _scores import TEXTS

from fastllm import LLM, SamplingParams, hub
from fastllm.bench import ceiling
from fastllm.data.corrupt import SENTINELS
from fastllm.decode.beam import BeamParams
from fastllm.decode.text2text import Text2Text
from fastllm.peft import lora

PROMPT = "in the rain"
STATISTICS = (
    r"prompt: \d+ tokens, \d+ tok/s; decoded: \d+ tokens, [\d.]+ tok/s; [\d.]+ MB/token, [\d.]+ GB/s, "
    r"[\d.]+% of the memory roofline \(123.0 GB/s\)\n"
)


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return _tiny.gguf(tmp_path_factory.mktemp("cli") / "tiny.gguf")


@pytest.fixture(scope="session")
def llm(path):
    return LLM(path)


@pytest.fixture
def generate(monkeypatch, capsys, path):
    """generate(arguments...) -> (status, stdout, stderr) on the tiny model, with a known memory."""
    monkeypatch.setattr(ceiling, "read_bandwidth", lambda threads=None: 123.0)
    return lambda *arguments: call(monkeypatch, capsys, "generate", "--model", path, *arguments)


def test_greedy_text_and_statistics(generate, llm):
    expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_new_tokens=30, ignore_eos=True))[0].text
    status, out, err = generate(PROMPT, "--max-new-tokens", 30, "--ignore-eos")
    assert (status, out) == (0, expected + "\n") and re.fullmatch(STATISTICS, err), err
    status, out, err = generate(PROMPT, "--max-new-tokens", 30, "--ignore-eos", "--no-stats")
    assert (status, out, err) == (0, expected + "\n", "")
    status, out, err = generate(PROMPT, "--max-new-tokens", 1, "--ignore-eos")  # nothing decoded: no speed to tell
    assert status == 0 and re.fullmatch(r"prompt: \d+ tokens, \d+ tok/s\n", err)


def test_an_option_of_drawing_draws(generate, llm):
    params = SamplingParams(seed=7, max_new_tokens=20)
    assert generate(PROMPT, "--seed", 7, "--max-new-tokens", 20)[1] == llm.generate(PROMPT, params)[0].text + "\n"
    params = replace(params, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01)
    options = [
        "--temperature",
        0.8,
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--seed",
        7,
        "--max-new-tokens",
        20,
    ]
    assert generate(PROMPT, *options)[1] == llm.generate(PROMPT, params)[0].text + "\n"
    params = replace(params, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.1, min_new_tokens=20)
    options += ["--repetition-penalty", 1.4, "--presence-penalty", 0.5, "--frequency-penalty", 0.1]
    assert generate(PROMPT, *options, "--min-new-tokens", 20)[1] == llm.generate(PROMPT, params)[0].text + "\n"


def test_json(generate, llm):
    options = ["--seed", 3, "--max-new-tokens", 12, "--logprobs", 2, "--stop", "zz", "--stop", "\x00", "--ignore-eos"]
    status, out, err = generate(PROMPT, *options, "--json")
    found = json.loads(out)
    params = SamplingParams(seed=3, max_new_tokens=12, logprobs=2, stop=("zz", "\x00"), ignore_eos=True)
    expected = llm.generate(PROMPT, params)[0]
    assert status == 0 and not err and out.count("\n") == 1
    assert (found["text"], found["token_ids"], found["logprobs"]) == (
        expected.text,
        expected.token_ids,
        expected.logprobs,
    )
    assert found["top_logprobs"] == [[list(pair) for pair in top] for top in expected.top_logprobs]
    assert (found["finish_reason"], found["seed"], found["dtype"], found["quantize"]) == ("length", 3, "auto", None)
    assert found["bytes_per_token"] == llm.bytes_per_token and found["timing"]["decoded"] == 11
    assert found["tokens_per_second"] == pytest.approx(11 / found["timing"]["decode_s"])
    assert found["gb_per_s"] == pytest.approx(found["tokens_per_second"] * llm.bytes_per_token / 1e9)
    assert found["roofline"] == pytest.approx(found["gb_per_s"] / 123) and found["model"].endswith("tiny.gguf")
    assert "outputs" not in found
    again = json.loads(
        generate(PROMPT, "--temperature", 1, "--ignore-eos", "--json", "--no-stats", "--max-new-tokens", 12)[1]
    )
    assert again["roofline"] is None and again["tokens_per_second"] > 0
    options = ["--seed", again["seed"], "--ignore-eos", "--max-new-tokens", 12, "--no-stats"]
    assert generate(PROMPT, *options)[1] == again["text"] + "\n"  # the seed that was drawn makes it again


def test_speculate(generate, llm):
    options = ["--seed", 3, "--max-new-tokens", 60, "--ignore-eos", "--temperature", 0.05]
    plain = json.loads(generate(PROMPT, *options, "--json")[1])
    found = json.loads(generate(PROMPT, *options, "--json", "--speculate", 7)[1])
    assert found["token_ids"] == plain["token_ids"] and found["logprobs"] == plain["logprobs"]
    assert plain["timing"]["drafted"] == 0 <= found["timing"]["accepted"] <= found["timing"]["drafted"]
    status, _, err = generate(PROMPT, "--speculate", 64)
    assert status == 2 and "speculate=64; allowed: an integer in [0, 63]" in err


def test_exact_is_what_a_cpu_is_anyway(generate):
    found = [json.loads(generate(PROMPT, "--json", *more)[1]) for more in ((), ("--exact",))]
    assert found[0]["token_ids"] == found[1]["token_ids"] and found[0]["logprobs"] == found[1]["logprobs"]


def test_several_completions(generate, llm):
    params = SamplingParams(seed=3, n=3, max_new_tokens=12)
    texts = [c.text for c in llm.generate(PROMPT, params)[0].outputs]
    options = ["--n", 3, "--seed", 3, "--max-new-tokens", 12]
    _, out, _ = generate(PROMPT, *options)
    assert out == "\n".join(f"--- {i} of 3 ---\n{text}" for i, text in enumerate(texts, 1)) + "\n"
    found = json.loads(generate(PROMPT, *options, "--json")[1])
    assert [c["text"] for c in found["outputs"]] == texts and found["text"] == texts[0]


def test_an_encoder_decoder(monkeypatch, capsys, tmp_path):
    folder = _tiny.text2text(tmp_path / "t5", TEXTS)
    source = f"{TEXTS[0]} {SENTINELS[0]}"

    def generate(*arguments):
        return call(monkeypatch, capsys, "generate", "--model", folder, source, "--max-new-tokens", 9, *arguments)

    model, beams = Text2Text.load(folder), BeamParams(max_new_tokens=9, beams=3, n=2)
    ((greedy,), (first, second)) = (
        model.generate(source, p, parse_special=True)[0] for p in (BeamParams(max_new_tokens=9), beams)
    )
    status, out, err = generate()
    assert (status, out) == (0, greedy.text + "\n")
    assert re.fullmatch(r"generated: \d tokens in [\d.]+ s, [\d.]+ tok/s\n", err)
    status, out, err = generate("--beams", 3, "--n", 2, "--no-stats")
    assert (status, err) == (0, "")
    assert out == f"--- 1 of 2 ---\n{first.text}\n--- 2 of 2 ---\n{second.text}\n"
    status, out, _ = generate("--beams", 3, "--n", 2, "--json", "--quantize", "int8")
    found = json.loads(out)
    assert status == 0 and found["text"] == found["outputs"][0]["text"] and len(found["outputs"]) == 2
    packed = Text2Text.load(folder, quantize="int8").generate(source, beams, parse_special=True)[0]
    assert [(a["token_ids"], a["score"], a["finish_reason"]) for a in found["outputs"]] == [
        (a.token_ids, a.score, a.finish_reason) for a in packed
    ]
    assert (found["beams"], found["quantize"]) == (3, "int8") and found["seconds"] > 0
    for given, message in (
        (("--temperature", 0.5), r"--temperature: .* is an encoder-decoder, which gives the likeliest answers"),
        (("--chat",), "--chat: .* is an encoder-decoder"),
        (("--device", "cpu"), "--device: .* is an encoder-decoder"),
        (("--n", 2), "n=2; allowed: an integer from 1 to 1, the beams"),
        (("--beams", 11), "beams=11; allowed: an integer from 1 to 10"),
    ):
        status, out, err = generate(*given)
        assert status == 2 and not out and re.search(message, err), err


def test_a_decoder_has_no_beams(generate):
    status, out, err = generate(PROMPT, "--beams", 2)
    assert status == 2 and not out and re.search("--beams 2: .* is no encoder-decoder; leave it out", err)


def test_forms(generate, path):
    for options in (["--quantize", "int8"], ["--quantize", "int4"], ["--dtype", "float32"]):
        arguments = {options[0].lstrip("-"): options[1]}
        expected = LLM(path, **arguments).generate(PROMPT, SamplingParams(temperature=0.0, max_new_tokens=8))[0]
        found = json.loads(generate(PROMPT, *options, "--threads", 1, "--max-new-tokens", 8, "--json")[1])
        assert found["token_ids"] == expected.token_ids and found | arguments == found


def test_chat(generate, llm):
    expected = llm.chat([{"role": "user", "content": PROMPT}], SamplingParams(temperature=0.0, max_new_tokens=9))
    assert generate(PROMPT, "--chat", "--max-new-tokens", 9)[1] == expected.text + "\n"


@pytest.mark.parametrize("content", [PROMPT, PROMPT + "\n", PROMPT + "\r\n"])
@pytest.mark.parametrize("way", ["file", "stdin", "-"])
def test_where_a_prompt_comes_from(generate, monkeypatch, tmp_path, llm, way, content):
    expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_new_tokens=8))[0].text + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    (tmp_path / "prompt.txt").write_bytes(content.encode())
    arguments = {"file": ["-f", tmp_path / "prompt.txt"], "stdin": [], "-": ["-"]}[way]
    assert generate(*arguments, "--max-new-tokens", 8)[:2] == (0, expected)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no prompt; give it as an argument, in a file with -f, or on standard input"),
        ([""], 2, "the prompt is empty; give at least one character"),
        (["-f", "empty.txt"], 2, "the prompt is empty"),
        ([PROMPT, "-f", "prompt.txt"], 2, "a prompt and the file prompt.txt: give one of them"),
        (["-f", "absent.txt"], 1, "No such file or directory: 'absent.txt'"),
        (["-f", "."], 1, "Is a directory: '.'"),
        (["-f", "latin.txt"], 2, "latin.txt is not UTF-8 text"),
        ([PROMPT, "--model", "smolm2"], 2, "unknown model 'smolm2': did you mean 'smollm2-135m'"),
        ([PROMPT, "--model", "absent.gguf"], 1, "no such model file or folder.*absent.gguf"),
        ([PROMPT, "--model", "prompt.txt"], 2, "prompt.txt"),
        ([PROMPT, "--max-model-len", 5], 2, r"the prompt has \d+ tokens, the context holds 5 with at least one"),
        ([PROMPT, "--max-model-len", 5000], 2, "max_model_len=5000, but the model has 1024 positions"),
        ([PROMPT, "--threads", 0], 2, "num_threads=0; allowed: an integer of at least 1"),
        ([PROMPT, "--top-p", 2], 2, r"SamplingParams: top_p=2.0, allowed: a number in \[0, 1\]"),
        ([PROMPT, "--temperature", -1], 2, "SamplingParams: temperature=-1.0, allowed: a finite number ≥ 0"),
        ([PROMPT, "--max-new-tokens", 0], 2, r"SamplingParams: max_new_tokens=0, allowed: an integer in \[1, "),
        ([PROMPT, "--min-new-tokens", 129], 2, "min_new_tokens=129, allowed: at most max_new_tokens=128"),
        ([PROMPT, "--n", 0], 2, "n=0, allowed"),
        ([PROMPT, "--stop", ""], 2, "allowed: a string or a sequence of strings, none empty"),
        ([PROMPT, "--logprobs", 21, "--json"], 2, r"logprobs=21, allowed: an integer in \[0, 20\]"),
        ([PROMPT, "--logprobs", 2], 2, "--logprobs 2: they are part of --json; add it"),
        ([PROMPT, "--dtype", "half"], 2, "dtype='half'; allowed: 'auto', 'float32'"),
        ([PROMPT, "--quantize", "int2"], 2, "quantize='int2'; allowed: None, 'int8', 'int4'"),
        ([PROMPT, "--kv-dtype", "int4"], 2, "kv_dtype='int4'; allowed: 'auto', 'int8', 'fp8'"),
        ([PROMPT, "--top-k", "many"], 2, "--top-k.*integer"),
        ([PROMPT, "--no-such-flag"], 2, "No such option"),
        ([PROMPT, "again"], 2, "unexpected extra argument"),
    ],
)  # fmt: skip
def test_errors(generate, monkeypatch, tmp_path, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", Terminal())
    for name, content in (("empty.txt", b""), ("prompt.txt", b"a"), ("latin.txt", b"\xe9t\xe9")):
        (tmp_path / name).write_bytes(content)
    code, out, err = generate(*arguments)
    last = err.strip().splitlines()[-1]
    assert code == status and not out and "Traceback" not in err and re.search(message, last), err
    if last.startswith("fastllm:"):
        assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_an_interrupt_prints_what_there_is(generate, monkeypatch, llm, as_json):
    run = LLM.run

    def interrupted(self, request):
        for count, piece in enumerate(run(self, request)):
            yield piece
            if count == 4:
                raise KeyboardInterrupt

    expected = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_new_tokens=5, ignore_eos=True))[0]
    monkeypatch.setattr(LLM, "run", interrupted)
    status, out, err = generate(PROMPT, "--ignore-eos", *(["--json"] if as_json else []))
    assert status == 130 and "Traceback" not in err
    if as_json:
        found = json.loads(out)
        assert found["finish_reason"] == "abort" and found["token_ids"] == expected.token_ids
        assert found["roofline"] is None
    else:
        assert out == expected.text + "\n" and err.startswith("prompt: ")


def test_an_interrupt_while_a_model_loads(generate, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "__init__", interrupted)
    assert generate(PROMPT) == (130, "", "")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A command that goes on for a minute unless it is stopped."""
    config = replace(_tiny.CONFIG, max_position=1 << 17, layers=4)
    path = _tiny.gguf(tmp_path_factory.mktemp("endless") / "endless.gguf", config=config)
    options = ["--model", path, "--max-new-tokens", 1 << 20, "--ignore-eos", "--seed", 1]
    return [sys.executable, "-u", "-m", "fastllm.cli", "generate", PROMPT, *map(str, options)]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c(endless):
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        begun = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and len(begun) == 20 and out.endswith(b"\n"), err
    assert re.fullmatch(r"prompt: .* GB/s\n", err.decode()), err


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_goes_away(endless):
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert len(process.stdout.read(20)) == 20
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 1 and err == b""


def test_pull(monkeypatch, capsys, path, tmp_path):
    assert call(monkeypatch, capsys, "pull", path) == (0, f"{path}\n", "")
    asked = []
    monkeypatch.setattr(hub, "resolve", lambda name, **options: asked.append((name, options)) or path)
    status, out, _ = call(monkeypatch, capsys, "pull", "org/name", "--revision", "v1", "--verify")
    assert (status, out, asked) == (0, f"{path}\n", [("org/name", {"revision": "v1", "verify": True})])
    monkeypatch.undo()
    assert call(monkeypatch, capsys, "pull", "smolm2")[0] == 2
    assert call(monkeypatch, capsys, "pull", tmp_path / "absent.gguf")[0] == 1

    def offline(*_, **__):
        raise hub.HubError("could not fetch 'x': no network")

    monkeypatch.setattr(hub, "resolve", offline)
    assert call(monkeypatch, capsys, "pull", "smollm2-135m") == (1, "", "fastllm: could not fetch 'x': no network\n")


def test_help_says_what_is_what(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "generate", "--help")
    assert status == 0 and "0 takes the likeliest token" in out and "--repetition-penalty" in out


def test_an_adapter(generate, path, tmp_path):
    tuned = LLM(path)
    lora.write(tmp_path, _lora.draw(tuned.model, 1))
    tuned.load_adapter("it", tmp_path)
    params = SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True)
    wanted = tuned.generate(PROMPT, replace(params, adapter="it"))[0].text
    options = ("--max-new-tokens", 20, "--ignore-eos", "--no-stats")
    assert wanted != tuned.generate(PROMPT, params)[0].text
    assert generate(PROMPT, "--adapter", tmp_path, *options)[:2] == (0, wanted + "\n")
    status, out, err = generate(PROMPT, "--adapter", tmp_path / "none", *options)
    assert (status, out) == (1, "") and "none is no folder; give a folder that PEFT's save_pretrained wrote" in err
