"""Models to evaluate: a tiny one in every form, and one whose scores can be worked out by hand."""

from fastllm.data.tokenizer import Tokenizer

TEXT = "the cat sat on a mat and then it ran off to the hill in the rain with her hat on "
TEXTS = [
    f"{TEXT[i % 20 :] * (i % 9 == 0)}{TEXT[: 1 + 7 * i % 60]}{i}" for i in range(128)
]  # of 2 to some 140 characters


class Counting:
    """log p of a token is minus the number of tokens before it in what the model sees, so a score tells its context."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int = 100):
        self.tokenizer, self.max_model_len = tokenizer, max_model_len
        self.asked: list[list[int]] = []

    def logprobs(self, prompts, *, adapter=None, starts=1):
        self.asked += prompts
        each = [starts] * len(prompts) if isinstance(starts, int) else starts
        return [[-float(i) for i in range(start, len(ids))] for ids, start in zip(prompts, each, strict=True)]
