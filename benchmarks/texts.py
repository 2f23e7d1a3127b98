"""What the benchmark fetches or makes, once: real text, and model files in the forms that peers read.

    token_stream(path)    the 1,000 OpenWebText openings as token ids of the model in a GGUF file
    gguf_variant(path, kind), gguf_tinyllama(kind), weight_bytes(path)

Files live in fastllm's cache folder under `bench/` and are written atomically.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
from corpora import passages

from fastllm import hub
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.gguf import GGUFFile

TINYLLAMA = dict(block_count=22, embedding_length=2048, feed_forward_length=5632, head_count=32, head_count_kv=4)
TINYLLAMA_VOCAB = 32000


def cache_dir() -> Path:
    """The folder of everything the benchmark fetches or makes."""
    root = hub.cache_dir() / "bench"
    root.mkdir(parents=True, exist_ok=True)
    return root


def token_stream(path: Path) -> list[int]:
    """The passages, joined by blank lines, as token ids of the model in a GGUF file; every contender gets these ids."""
    return Tokenizer.from_gguf(GGUFFile(path)).encode("\n\n".join(islice(passages(), 1000)))


def _write_gguf(target: Path, architecture: str, fill) -> Path:
    """Write a GGUF through `fill(writer)` under a temporary name, then move it into place."""
    from gguf import GGUFWriter

    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        part = Path(folder) / target.name
        writer = GGUFWriter(part, architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, target)
    return target


def _add_tensor(writer, name: str, values: np.ndarray, kind: str) -> None:
    """Add one tensor: matrices in type `kind`, vectors (norms) in F32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    qtype = GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
    writer.add_tensor(name, quantize(values, qtype), raw_dtype=qtype)


def gguf_variant(source: Path, kind: str) -> Path:
    """`source` with every matrix dequantised and stored as `kind` (F32, F16, Q8_0, Q4_0); all metadata kept."""
    from gguf import GGUFReader, GGUFValueType, LlamaFileType
    from gguf.quants import dequantize

    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    target = cache_dir() / f"{source.stem}-{digest}-{kind}.gguf"
    if target.exists():
        return target
    reader = GGUFReader(source)
    kept = {"general.architecture", "general.file_type"}  # the writer sets the first, `fill` the second

    def fill(writer):
        file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
        writer.add_file_type(LlamaFileType[file_type])
        for field in reader.fields.values():
            if field.name.startswith("GGUF.") or field.name in kept:
                continue
            array = field.types[0] == GGUFValueType.ARRAY
            writer.add_key_value(
                field.name, field.contents(), field.types[0], sub_type=field.types[-1] if array else None
            )
        for tensor in reader.tensors:
            _add_tensor(writer, tensor.name, dequantize(tensor.data, tensor.tensor_type), kind)

    return _write_gguf(target, reader.fields["general.architecture"].contents(), fill)


def gguf_tinyllama(kind: str) -> Path:
    """A Llama of TinyLlama 1.1B's shape with seeded normal weights (std 0.02), matrices stored as `kind`."""
    from gguf import LlamaFileType

    target = cache_dir() / f"tinyllama-1.1b-random-{kind}.gguf"
    if target.exists():
        return target
    depth, ffn = TINYLLAMA["embedding_length"], TINYLLAMA["feed_forward_length"]
    kv = depth // TINYLLAMA["head_count"] * TINYLLAMA["head_count_kv"]
    shapes = {"token_embd": (TINYLLAMA_VOCAB, depth), "output_norm": (depth,), "output": (TINYLLAMA_VOCAB, depth)}
    layer = dict(attn_norm=(depth,), attn_q=(depth, depth), attn_k=(kv, depth), attn_v=(kv, depth))
    layer |= dict(attn_output=(depth, depth), ffn_norm=(depth,), ffn_gate=(ffn, depth), ffn_up=(ffn, depth))
    layer |= dict(ffn_down=(depth, ffn))
    for block in range(TINYLLAMA["block_count"]):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in layer.items()}

    def fill(writer):
        writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
        writer.add_context_length(2048)
        for name, value in TINYLLAMA.items():
            getattr(writer, f"add_{name}")(value)
        writer.add_rope_dimension_count(depth // TINYLLAMA["head_count"])
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(TINYLLAMA_VOCAB)
        # The smallest SentencePiece vocabulary that llama.cpp accepts: controls, 256 bytes, then filler words.
        tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        types = [2, 3, 3] + [6] * 256
        filler = TINYLLAMA_VOCAB - len(tokens)
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens + [f"\u2581word{i}" for i in range(filler)])
        writer.add_token_scores([0.0] * len(tokens) + [-float(i) for i in range(filler)])
        writer.add_token_types(types + [1] * filler)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for index, (name, shape) in enumerate(shapes.items()):
            if len(shape) == 1:
                values = np.ones(shape, dtype=np.float32)
            else:
                values = np.random.default_rng(index).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
            _add_tensor(writer, f"{name}.weight", values, kind)

    return _write_gguf(target, "llama", fill)


@cache
def weight_bytes(path: Path) -> tuple[int, int]:
    """(bytes that decoding one token reads, number of weights it reads): an untied input embedding is not read."""
    from gguf import GGUFReader

    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    if "output.weight" in tensors:
        tensors.pop("token_embd.weight")
    return sum(int(t.n_bytes) for t in tensors.values()), sum(int(t.n_elements) for t in tensors.values())
