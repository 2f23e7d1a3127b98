"""How good a model is: perplexity and bits per byte, multiple choice by log-likelihood, and measures of generated text.

    from fastllm.evaluate import choice, perplexity, text

    test = Documents("corpus.jsonl", split="test")
    print(perplexity.perplexity(LLM("smollm2-135m"), test).bits_per_byte)

Validation selects, the test is read once. Whatever is chosen by looking at figures (a checkpoint, a rate, a wording, the
number of shots) is chosen on `Documents(..., split="validation")`; the figure that is reported comes from split="test", of the
one model that was chosen. The split of a document is a hash of its text, so the two never mix. A `Documents` gives its documents
once: the functions here read it to its end, and refuse one that has none left.

A score depends on no neighbour: every figure is the same, bit for bit, in batches of 1, 16 or 128, on a CPU.
"""
