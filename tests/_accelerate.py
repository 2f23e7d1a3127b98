"""Small random models of the families that `accelerate` knows, batches, a step, and what two steps must share."""

import torch
import transformers
from _families import build as decoder
from torch import nn

DECODERS = (
    "smollm", "llama with biases", "llama dynamic", "mistral", "qwen2", "qwen2 sliding", "qwen3", "gemma3", "gpt2",
    "gpt2, exact gelu",
)  # fmt: skip
OTHERS = ("bert", "bert with relu", "t5", "t5 gated")
VOCAB, LENGTH = 131, 24


def build(name: str, implementation: str = "sdpa", **changes):
    if name in DECODERS:
        if name.startswith("gpt2"):
            changes = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | changes
        model = decoder(name, attn_implementation=implementation, **changes)
    else:
        torch.manual_seed(0)
        model = _bert(name, implementation, changes) if name.startswith("bert") else _t5(name, implementation, changes)
        for weight in model.parameters():
            if weight.dim() == 1:
                nn.init.normal_(weight, 0.5, 0.2)
    return model.requires_grad_(True).eval()


def _bert(name, implementation, changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
    }
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": implementation}
    act = {"hidden_act": "relu"} if "relu" in name else {}
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes | none | act | changes))


def _t5(name, implementation, changes):
    sizes = {"vocab_size": VOCAB, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4, "num_layers": 2}
    rest = {"dropout_rate": 0.0, "decoder_start_token_id": 0, "attn_implementation": implementation}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if "gated" in name else {}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | rest | gated | changes))


def batch(side: str | None = None, rows: int = 3):
    """Token ids, labels and an attention mask padded on a side."""
    ids = torch.randint(3, VOCAB, (rows, LENGTH))
    mask = torch.ones_like(ids)
    for row, short in enumerate((5, 0, 11)):
        if side == "left":
            mask[row, :short] = 0
        elif side == "right" and short:
            mask[row, -short:] = 0
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < 0.2), -100)
    return (
        {"input_ids": ids, "attention_mask": mask, "labels": labels} if side else {"input_ids": ids, "labels": labels}
    )


def step(model, inputs):
    """(logits, loss, gradients) of a call."""
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return outputs.logits.detach(), outputs.loss.detach(), gradients


def assert_same(found, wanted, inputs):
    """Logits of real tokens within 1e-4, the loss, and each gradient within 1e-4 of its largest element."""
    (logits, loss, gradients), (own_logits, own_loss, own_gradients) = found, wanted
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    real = torch.ones_like(real) if logits.shape[:2] != real.shape else real
    torch.testing.assert_close(logits[real], own_logits[real], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, own_loss, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == own_gradients.keys()
    for name, own in own_gradients.items():
        assert (gradients[name] - own).abs().max() <= 1e-4 * own.abs().max().clamp_min(1e-6), name
