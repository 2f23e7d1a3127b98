"""Damaged model files: a clear error or a model, never a crash, a hang, or more memory than the file warrants.

Each example damages one file of a good model in one or a few places, opens it by every door and uses what comes out.
`pytest -m slow` draws many more.
"""

import contextlib
import copy
import json
import resource
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import _tiny
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm import LLM, SamplingParams, models
from fastllm.models.gguf import GGUFFile

if not Path("/proc/self/statm").exists():
    pytest.skip("reads in /proc how much memory is mapped", allow_module_level=True)

CLEAR = (ValueError, FileNotFoundError)  # with a sentence for the user
ROOM = 2 << 30  # bytes of address space that an example may take: a tiny model, and the cache of a long context
EXAMPLES = 15


def fuzz(count: int) -> settings:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    same = count == EXAMPLES  # each time, in the default tier
    return settings(max_examples=count, deadline=None, derandomize=same, suppress_health_check=checks)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """An allocation that the file does not warrant fails here, where on a user's machine it might end other programs."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def use(path: Path) -> None:
    """Only a clear error may come out of any door."""

    def modules() -> None:
        model = models.load(path)
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]))

    def text() -> None:
        llm = LLM(path, max_num_seqs=1, num_threads=1)
        llm.generate("on the", SamplingParams(max_new_tokens=3, temperature=0.0))
        llm.chat([{"role": "user", "content": "in"}], SamplingParams(max_new_tokens=1))

    for door in (modules, text):
        with contextlib.suppress(*CLEAR), warnings.catch_warnings(), little_memory():
            warnings.simplefilter("ignore")
            door()


# --------------------------------------------------------------------------------------------------- damage to bytes

WORDS = [struct.pack("<Q", n) for n in (0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)]


@st.composite
def damaged(draw: Callable, content: bytes, reach: int) -> bytes:
    """A truncation, or a few changed bytes and words among the first `reach` bytes."""
    if draw(st.integers(0, 5)) == 0:
        return content[: draw(st.integers(0, len(content) - 1))]
    made = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(reach, len(content)) - 1))
        piece = draw(st.binary(min_size=1, max_size=2) | st.sampled_from(WORDS))
        made[at : at + len(piece)] = piece
    return bytes(made)


# ---------------------------------------------------------------------------------------------------- damage to JSON

DEEP: Any = None
for _ in range(300):
    DEEP = [DEEP]
ODD = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, 0.0, -1.5, 1e308, float("nan"), float("inf"), "", "x", "\0", "\ud800",
       [], [0], ["x"], {}, {"x": 1}, {"type": "x"}, DEEP]  # fmt: skip


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The way to every value of a document; of a long list or table, to its first few."""
    found = [path] if path else []
    items = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    for key, item in items[:12]:
        found += places(item, (*path, key))
    return found


@st.composite
def altered(draw: Callable, content: bytes) -> bytes:
    """JSON with one to three values that are odd, missing or another's."""
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        everywhere = places(document)
        if not everywhere:
            break
        *parents, key = draw(st.sampled_from(everywhere))
        owner = document
        for parent in parents:
            owner = owner[parent]
        if draw(st.integers(0, 5)) == 0:
            del owner[key]
        else:
            owner[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return json.dumps(document).encode("utf-8", "surrogatepass")


# ------------------------------------------------------------------------------------------------------------- GGUF


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


VALUES = [
    *((4, struct.pack("<I", n)) for n in (0, 1, 2, 3, 7, 2**16, 2**31, 2**32 - 1)),
    *((10, struct.pack("<Q", n)) for n in (0, 2**32, 2**63, 2**64 - 1)),
    *((11, struct.pack("<q", n)) for n in (-1, -(2**63))),
    *((6, struct.pack("<f", n)) for n in (0.0, -1.0, 1e-45, 1e38, float("nan"), float("inf"))),
    *((7, bytes([n])) for n in (0, 1, 2)),
    *((8, string(text)) for text in (b"", b"x", b"llama", b"gpt2", b"\0", b"{{", b"{% for m in messages %}{{ m }}{% endfor %}")),
    *((9, struct.pack("<IQ", 8, len(texts)) + b"".join(map(string, texts))) for texts in ((), (b"a",), (b"a", b"a"))),
    *((9, struct.pack(f"<IQ{len(n)}i", 5, len(n), *n)) for n in ((), (0,), (-1,) * 109, (3,) * 109)),
]  # fmt: skip


@st.composite
def odd_metadata(draw: Callable, path: Path) -> bytes:
    """A GGUF with one to three pairs whose values are odd, missing, or of another type; its tensors stay as they are."""
    content = path.read_bytes()
    with GGUFFile(path) as file:
        pairs, end = {}, 24
        for key, (kind, at) in file.metadata._places.items():
            end = file._skip(key, kind, at)
            pairs[key] = struct.pack("<I", kind) + content[at:end]
        first = min(info.offset for info in file.tensors.values())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(st.sampled_from(sorted(pairs)))
        value = draw(st.none() | st.sampled_from(VALUES))
        if value is None:
            del pairs[key]
        else:
            pairs[key] = struct.pack("<I", value[0]) + value[1]
    header = content[:16] + struct.pack("<Q", len(pairs)) + b"".join(string(k.encode()) + v for k, v in pairs.items())
    header += content[end : end + _infos_size(content[end:first], len(file.tensors))]
    return header + bytes(-len(header) % 32) + content[first:]


def _infos_size(infos: bytes, count: int) -> int:
    at = 0
    for _ in range(count):
        at += 8 + struct.unpack_from("<Q", infos, at)[0]
        at += 4 + 8 * struct.unpack_from("<I", infos, at)[0] + 12
    return at


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return _tiny.gguf(tmp_path_factory.mktemp("gguf") / "good.gguf", "Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A copy to be damaged, one file at a time."""
    return _tiny.folder(tmp_path_factory.mktemp("folder") / "model")


def check_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    use(path)


def check_folder(folder: Path, name: str, content: bytes) -> None:
    good = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        use(folder)
    finally:
        (folder / name).write_bytes(good)


def test_good_files_are_read(stored, folder):
    for path in (stored, folder):
        assert (
            LLM(path).generate("on the", SamplingParams(max_new_tokens=3, ignore_eos=True))[0].finish_reason == "length"
        )


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "attention.head_count"])
def test_sizes_that_the_file_does_not_hold(stored, tmp_path, key):
    content = bytearray(stored.read_bytes())
    name = f"llama.{key}".encode()
    struct.pack_into("<I", content, content.index(name) + len(name) + 4, 2**32 - 1)
    path = tmp_path / "large.gguf"
    path.write_bytes(content)
    for door in (models.load, LLM):
        with pytest.raises(ValueError), little_memory():
            door(path)


JSON = ("config.json", "tokenizer.json", "tokenizer_config.json")
COUNTS = pytest.mark.parametrize(
    "count", [pytest.param(EXAMPLES, id=""), pytest.param(60 * EXAMPLES, id="long", marks=pytest.mark.slow)]
)


@COUNTS
def test_gguf_bytes(stored, tmp_path, count):
    with GGUFFile(stored) as file:
        reach = max(info.offset for info in file.tensors.values())
    content = stored.read_bytes()
    fuzz(count)(given(damaged(content, min(reach, 8192)))(lambda bad: check_gguf(tmp_path, bad)))()


@COUNTS
def test_gguf_metadata(stored, tmp_path, count):
    fuzz(count)(given(odd_metadata(stored))(lambda bad: check_gguf(tmp_path, bad)))()


@COUNTS
@pytest.mark.parametrize("name", JSON)
def test_json_values(folder, name, count):
    content = (folder / name).read_bytes()
    fuzz(count)(given(altered(content))(lambda bad: check_folder(folder, name, bad)))()


@COUNTS
@pytest.mark.parametrize("name", [*JSON, "chat_template.jinja", "model.safetensors"])
def test_bytes_of_a_folder(folder, name, count):
    content = (folder / name).read_bytes()
    fuzz(count)(given(damaged(content, 6000))(lambda bad: check_folder(folder, name, bad)))()
