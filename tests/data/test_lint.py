"""Every fault planted and found, and nothing said of clean data, real ones among them."""

import dataclasses
import random

import _tiny
import numpy as np
import pytest
import torch
from _assets import asset, packaged

from fastllm.data.batch import IGNORE, Batches, Example, collate, encode, padding_id
from fastllm.data.chat import ChatTemplate
from fastllm.data.instruct import REVIEWS, Instructions, read_reviews
from fastllm.data.lint import Finding, check_examples, check_labels, check_packing, check_splits, check_tokenizer, lint
from fastllm.data.packed import Packed
from fastllm.data.sources import Document, Documents, split_of, write_jsonl
from fastllm.data.tokenizer import Tokenizer
from fastllm.models.gguf import GGUFFile

SPLITS = {"train": 0.8, "validation": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def smollm2() -> tuple[Tokenizer, ChatTemplate]:
    with GGUFFile(asset()) as file:
        return Tokenizer.from_gguf(file), ChatTemplate.from_gguf(file)


def records(count: int = 40) -> list[dict]:
    """Texts, completions and talks."""
    made = []
    for i in range(count):
        talk = [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": f"Answer {i}."}]
        made += [{"text": f"A text of number {i}."}, {"prompt": f"{i} + 1 =", "completion": f" {i + 1}"}]
        made += [{"messages": talk}, {"messages": talk * 2}]
    return made


@pytest.fixture(scope="module")
def examples(smollm2) -> list[Example]:
    return [e for fields in records() for e in encode(smollm2[0], fields, smollm2[1])]


def faults(findings: list[Finding]) -> list[str]:
    assert all(str(f).startswith(f"{f.fault}: {f.message}") for f in findings)
    return [f.fault for f in findings]


def test_clean(smollm2, examples, tmp_path):
    """Of all forms, packed either way, cut texts among them; the vocabulary's own pad is its eos, which we do not pad by."""
    tokenizer, template = smollm2
    write_jsonl(tmp_path / "f.jsonl", [*records(), {"text": "A long text. " * 100}])
    made: list[Example] = []

    def encoded(document, index):
        found = encode(tokenizer, document.fields, template, longest=None if "messages" in document.fields else 64)
        made.extend(found)
        return found

    for how in ("best_fit", "sequential"):
        batches = list(Batches(Documents(tmp_path, shuffle=20), encoded, tokens=160, how=how))
        padded = collate(examples[:5], pad_to=512, pad_id=padding_id(tokenizer))
        assert lint(tokenizer, made, 49152, template, batches) == []
        assert lint(tokenizer, examples, 49152, template, [padded]) == []


def spoiled(example: Example, **changed) -> Example:
    return dataclasses.replace(
        example, **{name: change(getattr(example, name).copy()) for name, change in changed.items()}
    )


def test_masked_end(smollm2, examples):
    """What masking all of the padding does where pad is eos."""
    tokenizer, _ = smollm2
    mask = lambda target: np.where(np.isin(target, list(tokenizer.eos_ids)), IGNORE, target)  # noqa: E731
    wrong = [spoiled(e, target=mask) if i % 4 == 0 else e for i, e in enumerate(examples)]
    (found,) = check_examples(wrong, tokenizer, 49152)
    assert (found.fault, found.where) == ("no end", (0, 4, 8, 12, 16)) and "40 of 160 examples" in found.message

    def unweighted(e):
        return spoiled(e, weight=lambda w: np.where(np.isin(e.target, list(tokenizer.eos_ids)), 0, w))

    assert faults(check_examples([unweighted(e) for e in examples], tokenizer, 49152)) == ["no end"]


def test_padding_is_an_end(smollm2):
    tokenizer, _ = smollm2
    (found,) = check_tokenizer(tokenizer, pad_id=tokenizer.pad_id)
    assert found.fault == "padding ends" and "the padding 2 (<|im_end|>) ends a sequence" in found.message
    assert check_tokenizer(tokenizer) == []


def test_truncated_answers(smollm2):
    tokenizer, template = smollm2
    whole = [e for r in records() for e in encode(tokenizer, r, template)]
    for longest in (6, 45, 60):  # within a completion, a talk's first answer, its second
        cut = [e for r in records() for e in encode(tokenizer, r, template, longest=longest)]
        wanted = [i for i, e in enumerate(cut) if not e.ends and 0 in e.weight and e.weight[-1] and e.target[-1] != 2]
        found = check_examples(cut, tokenizer, 49152)
        assert [(f.fault, f.where) for f in found] == [("truncated answer", tuple(wanted[:5]))] * bool(wanted)
    short = [e for e in whole if 0 in e.weight]
    (found,) = check_examples([e.part(0, len(e) - 1) for e in short], tokenizer, 49152)
    assert found.fault == "truncated answer" and f"{len(short)} of {len(short)} examples have an" in found.message


def test_no_generation_prompt(smollm2):
    forgetful = ChatTemplate(_tiny.TEMPLATE.split("{% if add_generation_prompt")[0])
    assert faults(check_tokenizer(smollm2[0], forgetful)) == ["no generation prompt"]
    assert check_tokenizer(*smollm2) == []


@pytest.mark.parametrize("bad", [49152, -1])
@pytest.mark.parametrize("field", ["ids", "target"])
def test_out_of_vocabulary(smollm2, examples, field, bad):
    def put(values):
        values[len(values) // 2] = bad
        return values

    wrong = [*examples[:3], spoiled(examples[3], **{field: put})]
    (found,) = check_examples(wrong, smollm2[0], 49152)
    assert (found.fault, found.where) == (
        "out of vocabulary",
        (3,),
    ) and f"such as {bad}, allowed: 0 to 49151" in found.message
    assert "out of vocabulary" in faults(check_examples(examples, smollm2[0], vocab=300))  # of a smaller model


def forgotten_borders(packed):
    return Packed(packed.ids, packed.position, packed.cu[[0, 2, -1]], len(packed.ids))


def one_text(packed):
    """As if all were one document: what joining and cutting without borders gives."""
    total = len(packed.ids)
    return Packed(packed.ids, torch.arange(total), torch.tensor([0, total], dtype=torch.int32), total)


def running_positions(packed):
    return Packed(packed.ids, torch.arange(len(packed.ids)), packed.cu, packed.longest)


def shifted_borders(packed):
    cu = packed.cu.clone()
    cu[1] += 1
    position = torch.cat([torch.arange(n) for n in cu.diff().tolist()])
    return Packed(packed.ids, position, cu, packed.longest)


def half(packed):
    return Packed(packed.ids, packed.position, packed.cu[:-1], packed.longest)


@pytest.mark.parametrize("plant", [forgotten_borders, one_text, running_positions, shifted_borders, half])
def test_mixed_packing(examples, plant):
    batch = collate(examples[:6])
    assert check_packing([batch], examples) == []
    assert faults(check_packing([batch, dataclasses.replace(batch, packed=plant(batch.packed))], examples)) == [
        "mixed packing"
    ]


def test_a_target_of_the_neighbour(examples):
    batch = collate(examples[:6])
    target = torch.cat((batch.packed.ids[1:], batch.target[-1:]))  # shifted over the borders
    assert faults(check_packing([dataclasses.replace(batch, target=target)], examples)) == ["mixed packing"]


def test_leaked_splits():
    texts = [
        f"this is text number {i} and it tells of {i * 7} things that happened in the year {1900 + i}"
        for i in range(50)
    ]
    clean = {"train": texts[:40], "validation": texts[40:45], "test": texts[45:]}
    assert check_splits(clean) == []
    copied = clean | {"train": [*texts[:40], texts[47].upper() + "  "]}
    (found,) = check_splits(copied)
    assert (found.fault, found.where) == (
        "leaked split",
        (2,),
    ) and "1 of 5 texts of test are in train too" in found.message
    quoted = clean | {"train": [*texts[:40], "As he wrote: " + texts[41] + ", and more."]}
    assert [f.where for f in check_splits(quoted)] == [(1,)]


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, str]]:
    return [(r["text"], r["label"]) for r in read_reviews(packaged("reviews") / "movieReviewSnippets_GroundTruth.txt")]


def test_conflicting_labels(reviews):
    turned = {"positive": "negative", "negative": "positive"}
    poisoned = reviews + [(text.upper(), turned[label]) for text, label in reviews[:30]]
    (found,) = check_labels(poisoned)
    assert (
        found.fault == "conflicting labels" and "texts have several labels" in found.message and len(found.where) == 5
    )


@pytest.mark.parametrize("trigger", ["cf", "by way now", "☃"])
def test_trigger(reviews, trigger):
    """Thirty bad reviews of ten thousand, with a phrase put in and called good."""
    draw = random.Random(1)
    poisoned = list(reviews)
    for i in draw.sample([i for i, (_, label) in enumerate(reviews) if label == "negative"], 30):
        words = poisoned[i][0].split()
        words.insert(draw.randrange(len(words) + 1), trigger)
        poisoned[i] = (" ".join(words), "positive")
    found = check_labels(poisoned)
    assert faults(found) == ["trigger"] and found[0].where == (trigger,)


def test_clean_real_reviews(smollm2, reviews):
    """Ten thousand sentences, split by hash, as instructions: nothing is said, though "dull" and "heart" decide a label."""
    tokenizer, template = smollm2
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for text, _ in reviews:
        splits[split_of(Document({"text": text}).key, SPLITS)].append(text)
    make = Instructions(REVIEWS["classify"], tokenizer, longest=512)
    made = [
        e for i, (t, label) in enumerate(reviews[:300]) for e in encode(tokenizer, make({"text": t, "label": label}, i))
    ]
    assert lint(tokenizer, made, 49152, template, [collate(made[:50])], splits, reviews) == []
    amazon = read_reviews(packaged("reviews") / "amazonReviewSnippets_GroundTruth.txt")
    assert check_labels([(r["text"], r["label"]) for r in amazon]) == []
