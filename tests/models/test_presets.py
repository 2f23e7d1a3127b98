"""Presets for a vocabulary: the sizes that they claim, and models that can be trained."""

import pytest
import torch
from _training import tokenizer

from fastllm import models
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.encoder import EncoderConfig
from fastllm.models.presets import PRESETS, build, preset
from fastllm.models.seq2seq import Seq2SeqConfig

TABLES = ("embedding.", "positions.", "types.", "words.")  # of words, places and kinds


def without_embeddings(model) -> int:
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if not any(table in name for table in TABLES))


@pytest.mark.parametrize("arch", PRESETS)
@pytest.mark.parametrize(("name", "millions"), [("nano", 1), ("micro", 4), ("mini", 11)])
def test_small_ones(arch, name, millions):
    with torch.device("meta"):
        model = build(preset(arch, name, tokenizer()))
    assert without_embeddings(model) == pytest.approx(millions * 1e6, rel=0.08)
    assert sum(p.numel() for p in model.parameters()) - without_embeddings(model) < 400 * model.config.dim * 3


KNOWN = {"bert-base": 109_514_298, "roberta-base": 124_697_433, "t5-small": 60_506_624, "flan-t5-small": 76_961_152}


@pytest.mark.parametrize(("name", "parameters"), KNOWN.items())
def test_published_ones_have_the_published_size(name, parameters):
    config = next(PRESETS[arch][name] for arch in PRESETS if name in PRESETS[arch])
    with torch.device("meta"):
        assert sum(p.numel() for p in build(config).parameters()) == parameters


@pytest.mark.parametrize("arch", PRESETS)
def test_all_take_a_vocabulary(arch):
    for name in PRESETS[arch]:
        config = preset(arch, name, tokenizer(), longest=48)
        endless = getattr(config, "position", None) == "relative"
        assert (config.vocab, config.max_position) == (len(tokenizer()), 512 if endless else 48)
        if isinstance(config, EncoderConfig):
            assert (config.head, config.pad_id) == ("mlm", tokenizer().pad_id)
        if isinstance(config, Seq2SeqConfig):
            assert (config.start_id, config.eos_id) == (tokenizer().pad_id, tokenizer().eos_id)


def test_what_is_not_there_is_named():
    with pytest.raises(ValueError, match="arch is 'gan'; allowed: decoder, encoder, seq2seq"):
        preset("gan", "nano", tokenizer())
    with pytest.raises(ValueError, match="preset is 't5-small'; of a decoder there are nano, micro, mini, smollm2"):
        preset("decoder", "t5-small", tokenizer())
    with pytest.raises(ValueError, match="preset is 'whisper-base'"):
        preset("seq2seq", "whisper-base", tokenizer())
    with pytest.raises(ValueError, match="no eos"):
        preset("seq2seq", "nano", Tokenizer.train(["a"], 300, {"pad": "[PAD]"}))


@pytest.mark.parametrize("arch", PRESETS)
def test_a_folder_brings_the_config_back(arch, tmp_path):
    model = build(preset(arch, "nano", tokenizer()))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    models.save(model, tmp_path)
    assert models.load(tmp_path).config == model.config
