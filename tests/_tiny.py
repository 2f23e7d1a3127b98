"""Tiny models of random weights: as a GGUF, as a folder of safetensors, or packed in memory.

The tokenizer is byte-level BPE over printable ASCII, a newline and the bytes of é, with a few merges and 3 special tokens.
"""

import json
from pathlib import Path

import numpy as np
import torch

from fastllm import models
from fastllm.data.chat import ChatTemplate
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.blocks import Embedding, Projection
from fastllm.models.decoder import Decoder, DecoderConfig
from fastllm.models.gguf import GGUFFile
from fastllm.models.initial import initialise
from fastllm.models.presets import build, preset
from fastllm.ops import Panels
from fastllm.train.pretrain import SPECIAL

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHARACTERS = [END, START, STOP, *map(chr, range(33, 127)), "Ġ", "Ċ", "Ã", "©"]
MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "o n", "Ã ©"]
TOKENS = CHARACTERS + [m.replace(" ", "") for m in MERGES]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = {"layers": 2, "dim": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "max_position": 1024}
CONFIG = DecoderConfig(vocab=len(TOKENS), **SIZES, rope_theta=10000.0, eps=1e-5, tied=False)
LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def weights(config: DecoderConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors under the names of a GGUF, so scaled that text looks random and distributions are uneven."""
    c, random = config, np.random.default_rng(seed)
    rows = [c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim, c.dim, c.ffn, c.ffn, c.dim]
    columns = [c.dim, c.dim, c.dim, c.heads * c.head_dim, c.dim, c.dim, c.ffn]
    shapes = {"token_embd": (c.vocab, c.dim), "output": (c.vocab, c.dim), "output_norm": (c.dim,)}
    for i in range(c.layers):
        shapes |= {f"blk.{i}.{name}": (n, k) for name, n, k in zip(LAYER, rows, columns, strict=True)}
        shapes |= {f"blk.{i}.{name}": (c.dim,) for name in ("attn_norm", "ffn_norm")}
    made = {name: random.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return {
        name: 1 + values / 10
        if values.ndim == 1
        else values * (3 if name == "output" else 1.5) / shapes[name][1] ** 0.5
        for name, values in made.items()
    }


def gguf(path: Path, kind: str = "F32", config: DecoderConfig = CONFIG, tokenizer: bool = True, **changed) -> Path:
    """A GGUF whose matrices are stored as `kind`. changed: tensors in place of the random ones, with _ for dots."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants

    writer, c = GGUFWriter(str(path), "llama"), config
    writer.add_block_count(c.layers)
    writer.add_context_length(c.max_position)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_rope_freq_base(c.rope_theta)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(TOKENS) - 3))
        writer.add_token_merges(MERGES)
        writer.add_eos_token_id(2)
        writer.add_chat_template(TEMPLATE)
    for name, values in (weights(config) | changed).items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(f"{name}.weight", values)
        else:
            stored = GGMLQuantizationType[kind]
            writer.add_tensor(f"{name}.weight", quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def folder(path: Path, config: DecoderConfig = CONFIG) -> Path:
    """An HF folder with other random weights; its tokenizer and template are the GGUF's."""
    from safetensors.torch import save_file

    with GGUFFile(gguf(path.with_suffix(".gguf"), config=config)) as file:
        Tokenizer.from_gguf(file).save(path)
        ChatTemplate.from_gguf(file).save(path)
    c = config
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": c.vocab,
        "num_hidden_layers": c.layers,
        "hidden_size": c.dim,
        "intermediate_size": c.ffn,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position,
        "rope_theta": c.rope_theta,
        "rms_norm_eps": c.eps,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(hf))
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    top = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    tensors = {}
    for name, values in weights(config, seed=1).items():
        _, index, part = name.split(".") if name.startswith("blk.") else ("", "", name)
        ours = top.get(name) or f"model.layers.{index}.{names[part]}"
        tensors[f"{ours}.weight"] = torch.from_numpy(values)
    save_file(tensors, path / "model.safetensors")
    return path


def decoder(config: DecoderConfig = CONFIG) -> Decoder:
    """A model in memory, float32 panels."""
    model = Decoder(config).requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, (Projection, Embedding)) and isinstance(module.weight, torch.nn.Parameter):
            torch.nn.init.normal_(module.weight, std=1.5 * module.weight.shape[1] ** -0.5)
            module.pack(Panels.pack(module.weight, getattr(module, "swiglu", False)))
    return model


def text2text(folder: Path, texts: list[str]) -> Path:
    """A folder with a T5 and a tokenizer of these texts; its greedy answers differ from source to source."""
    tokenizer = Tokenizer.train(texts, 400, **SPECIAL["seq2seq"])
    model = initialise(build(preset("seq2seq", "nano", tokenizer)), 3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
        model.embedding.weight[tokenizer.eos_id].mul_(2)
    tokenizer.save(folder)
    models.save(model, folder)
    return folder
