"""GGUFFile on tiny files written here, on damaged ones, and on the real SmolLM2 if it can be had."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from _assets import asset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastllm.models.gguf import SUPPORTED, GGUFError, GGUFFile, TensorInfo, check_supported, llama_unpermute_rows

gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType
TOKENS = ["<s>", "é", "", "▁the"]


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def write(path: Path, alignment: int | None = None) -> Path:
    """A file with every kind of metadata value and a few stored types."""
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 3)
    writer.add_int32("a.int32", -3)
    writer.add_float32("a.float32", 0.5)
    writer.add_float64("a.float64", 1e300)
    writer.add_uint64("a.uint64", 2**63)
    writer.add_uint8("a.uint8", 255)
    writer.add_int16("a.int16", -300)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve 🎉")
    writer.add_array("a.tokens", TOKENS)
    writer.add_array("a.floats", [0.5, -1.0])
    writer.add_array("a.ints", [1, 2, 3])
    writer.add_tensor("vector", values(5))
    writer.add_tensor("half", values(2, 3).astype(np.float16))
    writer.add_tensor("cube", values(2, 3, 4))
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16"):
        stored = gguf.quants.quantize(values(4, 64), TYPES[name])
        writer.add_tensor(f"w.{name}", stored, raw_dtype=TYPES[name])
    for name in ("Q4_K", "Q6_K", "IQ2_XXS"):
        nbytes = gguf.GGML_QUANT_SIZES[TYPES[name]][1]
        stored = np.random.default_rng(1).integers(0, 60, (2, 2 * nbytes), dtype=np.uint8)
        writer.add_tensor(f"w.{name}", stored, raw_dtype=TYPES[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("alignment", [None, 64])
def test_same_as_the_gguf_package(tmp_path, alignment):
    path = write(tmp_path / "tiny.gguf", alignment)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert dict(file.metadata) == fields and len(file.metadata) == len(fields)
        assert file.metadata["a.tokens"] == TOKENS and file.metadata["a.uint64"] == 2**63
        assert [type(file.metadata[key]) for key in ("a.bool", "a.float32", "a.ints")] == [bool, float, list]
        assert file.architecture == "llama"
        assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
        for tensor in reader.tensors:
            info = file.tensors[tensor.name]
            assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
            assert (info.type, info.nbytes, info.offset) == (
                tensor.tensor_type.name,
                tensor.n_bytes,
                tensor.data_offset,
            )
            rows = file.rows(tensor.name)
            assert rows.dtype == np.uint8 and rows.shape[0] == int(np.prod(info.shape[:-1], dtype=int))
            assert rows.tobytes() == tensor.data.tobytes()
            assert not rows.flags.owndata and not rows.flags.writeable


def test_dequantize_exact(tiny):
    with GGUFFile(tiny) as file:
        assert torch.equal(file.dequantize("vector"), torch.from_numpy(values(5)))
        assert not np.shares_memory(file.dequantize("vector").numpy(), file.rows("vector"))
        assert torch.equal(file.dequantize("cube"), torch.from_numpy(values(2, 3, 4)))
        assert torch.equal(file.dequantize("half"), torch.from_numpy(values(2, 3)).half().float())
        assert torch.equal(file.dequantize("w.BF16"), torch.from_numpy(values(4, 64)).bfloat16().float())
        for name in SUPPORTED:
            if f"w.{name}" not in file.tensors:
                continue
            got = file.dequantize(f"w.{name}")
            assert got.dtype == torch.float32 and got.shape == file.tensors[f"w.{name}"].shape
            got.zero_()  # it is our memory, not the file's
            if name in ("Q4_0", "Q4_1", "Q5_0", "Q8_0"):
                bound = {"Q8_0": 0.02, "Q5_0": 0.13}.get(name, 0.26)
                assert (file.dequantize(f"w.{name}") - torch.from_numpy(values(4, 64))).abs().max() < bound


def test_q4_1_by_the_formula(tiny):
    """A block: f16 scale, f16 minimum, 16 bytes; low nibbles are the first 16 values, high ones the last 16."""
    with GGUFFile(tiny) as file:
        block = file.rows("w.Q4_1")[3, 20:40].tobytes()
        scale, minimum = struct.unpack("<2e", block[:4])
        quants = [byte & 15 for byte in block[4:]] + [byte >> 4 for byte in block[4:]]
        want = torch.tensor([np.float32(scale) * q + np.float32(minimum) for q in quants])
        assert torch.equal(file.dequantize("w.Q4_1")[3, 32:64], want)


def test_unsupported_type(tiny):
    with GGUFFile(tiny) as file:
        info = file.tensors["w.IQ2_XXS"]
        assert info.type == "IQ2_XXS" and info.shape == (2, 512) and file.rows("w.IQ2_XXS").shape == (2, 132)
        for call in (lambda: file.dequantize("w.IQ2_XXS"), lambda: check_supported(file.tensors.values())):
            with pytest.raises(GGUFError, match="'w.IQ2_XXS' is stored as IQ2_XXS.*supported: F32, F16.*Q6_K"):
                call()
        check_supported([info for info in file.tensors.values() if info.type != "IQ2_XXS"])
        with pytest.raises(GGUFError, match="'half' is stored as F16"):
            check_supported([file.tensors["half"]], ["F32"])
        with pytest.raises(KeyError, match="no tensor 'nope'"):
            file.rows("nope")


def test_close(tiny):
    file = GGUFFile(tiny)
    rows = file.rows("vector")
    file.close()
    file.close()
    assert rows.tobytes() == values(5).tobytes()  # a view keeps the mapping
    for call in (lambda: file.rows("vector"), lambda: file.metadata["a.bool"], lambda: file.release("vector")):
        with pytest.raises(GGUFError, match="is closed"):
            call()


def resident_kib(path: Path) -> int:
    """Rss of the mappings of `path` in this process."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(":")[0].split()[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_release_drops_pages(tmp_path):
    path = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for name in ("first", "second"):
        writer.add_tensor(name, np.ones((256, 4096), np.float32))  # 4 MiB
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(path) as file:
        total = sum(int(file.rows(name).sum(dtype=np.int64)) for name in file.tensors)
        assert resident_kib(path) > 8000
        file.release("first")
        assert 3900 < resident_kib(path) < 4400
        assert total == sum(int(file.rows(name).sum(dtype=np.int64)) for name in file.tensors)


HEAD = b"GGUF" + struct.pack("<I", 3)


def header(pairs: bytes = b"", n_pairs: int = 0, tensors: bytes = b"", n_tensors: int = 0, pad: int = 64) -> bytes:
    return HEAD + struct.pack("<QQ", n_tensors, n_pairs) + pairs + tensors + bytes(pad)


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def tensor(dims=(4,), kind=0, offset=0, name=b"t") -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
        (b"PK\x03\x04" + bytes(60), r"not a GGUF file: it starts with b'PK"),
        (b"GGUF" + struct.pack("<I", 1) + bytes(40), "has version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(40), "is big-endian"),
        (header(n_pairs=2**60), "claims 1152921504606846976 pairs"),
        (header(n_tensors=2**63), "claims"),
        (header(text(b"k", 2**62) + bytes(20), 1), "claims 4611686018427387904 bytes"),
        (header(text(b"k") + struct.pack("<I", 99), 1), "'k' has the unknown value type 99"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 4, 2**61), 1), "'k' ends past the end"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 8, 2**61), 1), "'k' claims 2305843009213693952 strings"),
        (header(text(b"k") + struct.pack("<IIQ", 9, 9, 1), 1), "array of type 9"),
        (header(text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 2**40), 1), "a string of 'k'"),
        (header(text(b"\xff") + struct.pack("<II", 4, 1), 1), "not UTF-8"),
        (header((text(b"k") + struct.pack("<II", 4, 1)) * 2, 2), "key 'k' twice"),
        (header(text(b"general.alignment") + struct.pack("<II", 4, 24), 1), "alignment is 24"),
        (header(text(b"general.alignment") + struct.pack("<IQ", 10, 32), 1), "as u32"),
        (header(tensors=tensor(()), n_tensors=1), "0 dimensions"),
        (header(tensors=tensor((1,) * 5), n_tensors=1), "5 dimensions"),
        (header(tensors=tensor(kind=4), n_tensors=1), "type 4, unknown"),
        (header(tensors=tensor((33,), kind=2), n_tensors=1), r"shape \(33,\); Q4_0 rows are multiples of 32"),
        (header(tensors=tensor((0,)), n_tensors=1), r"shape \(0,\)"),
        (header(tensors=tensor((2**40, 2**40)), n_tensors=1), "truncated or corrupt"),
        (header(tensors=tensor(offset=2**63), n_tensors=1), "truncated or corrupt"),
        (header(tensors=tensor(offset=4), n_tensors=1), "alignment 32"),
        (header(tensors=tensor() * 2, n_tensors=2), "tensor 't' twice"),
    ],
)
def test_corrupt(tmp_path, content, words):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=words) as caught:
        GGUFFile(path)
    assert str(caught.value).startswith(str(path))


def test_not_a_file(tmp_path):
    with pytest.raises(GGUFError, match="is a folder"):
        GGUFFile(tmp_path)
    with pytest.raises(FileNotFoundError):
        GGUFFile(tmp_path / "missing.gguf")


def test_no_architecture(tmp_path):
    path = tmp_path / "bare.gguf"
    path.write_bytes(header())
    with GGUFFile(path) as file, pytest.raises(GGUFError, match="architecture"):
        _ = file.architecture


def use_everything(path: Path) -> None:
    """Only a GGUFError may come out of this."""
    try:
        with GGUFFile(path) as file:
            dict(file.metadata)
            assert file.architecture
            for name in file.tensors:
                file.rows(name)
                file.dequantize(name)
                file.release(name)
    except GGUFError:
        pass


FUZZ = settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_fuzz_bytes(tiny, tmp_path, data):
    content = bytearray(tiny.read_bytes())
    # The header is where a flip can mislead; it is about a kilobyte of the three.
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, 1400))
        content[where] = data.draw(st.sampled_from([0, 1, 4, 8, 9, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
    path = tmp_path / "fuzz.gguf"
    path.write_bytes(content)
    use_everything(path)


@FUZZ
@given(data=st.data())
def test_fuzz_truncation(tiny, tmp_path, data):
    with GGUFFile(tiny) as file:
        end = max(info.offset + info.nbytes for info in file.tensors.values())
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(GGUFError):
        GGUFFile(path)


@FUZZ
@given(content=st.binary(max_size=300))
def test_fuzz_random(tmp_path, content):
    path = tmp_path / "random.gguf"
    path.write_bytes(HEAD + content)
    use_everything(path)


@pytest.mark.parametrize(("heads", "dim"), [(1, 2), (3, 8), (9, 64)])
def test_llama_unpermute(heads, dim):
    """Rotating what the file holds in interleaved pairs, and the restored rows in halves, is the same rotation."""
    half = torch.arange(heads * dim * 5.0).view(heads * dim, 5)
    # The converter's permutation, as llama.cpp's convert_hf_to_gguf defines it.
    stored = half.view(heads, 2, dim // 2, 5).transpose(1, 2).reshape(heads * dim, 5)
    index = llama_unpermute_rows(heads * dim, heads)
    assert torch.equal(stored[index], half)
    assert np.array_equal(stored.numpy().view(np.uint8)[index], half.numpy().view(np.uint8))  # as on .rows()

    angle = torch.rand(dim // 2)
    x = torch.randn(5)
    pairs = (stored @ x).view(heads, dim // 2, 2)
    turned = torch.stack(
        [
            pairs[..., 0] * angle.cos() - pairs[..., 1] * angle.sin(),
            pairs[..., 1] * angle.cos() + pairs[..., 0] * angle.sin(),
        ],
        -1,
    )
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    query = (stored[index] @ x).view(1, heads, 1, dim)
    both = torch.cat([angle, angle]).view(1, 1, dim)
    got, _ = modeling.apply_rotary_pos_emb(query, query, both.cos(), both.sin())
    assert torch.allclose(turned.flatten(), got.view(heads, 2, dim // 2).transpose(1, 2).flatten(), rtol=1e-5)


@pytest.mark.parametrize(("rows", "heads"), [(10, 3), (6, 2), (0, 1), (8, 0)])
def test_llama_unpermute_errors(rows, heads):
    with pytest.raises(ValueError, match="do not split"):
        llama_unpermute_rows(rows, heads)


def test_real_file():
    path = asset()
    with GGUFFile(path) as file:
        assert file.architecture == "llama" and file.metadata["llama.block_count"] == 30
        assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
        types = [info.type for info in file.tensors.values()]
        assert {name: types.count(name) for name in set(types)} == {"Q4_1": 210, "F32": 61, "Q8_0": 1}
        assert sum(int(np.prod(info.shape)) for info in file.tensors.values()) == 134_515_008
        check_supported(file.tensors.values())
        assert file.tensors["token_embd.weight"] == TensorInfo(
            "token_embd.weight", (49152, 576), "Q8_0", 49152 * 612, file.tensors["token_embd.weight"].offset
        )
        assert file.rows("blk.0.attn_k.weight").shape == (192, 360)
        assert torch.isfinite(file.dequantize("blk.0.attn_k.weight")).all()
