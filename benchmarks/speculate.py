"""What speculative decoding (fastllm/decode/speculate.py) gains where text repeats, and what it costs where it does not.

    python benchmarks/speculate.py
    python benchmarks/speculate.py --quantize int8 --speculate 15 --texts 16

Every prompt is decoded without and with it in turns, by two engines over the same weights; both outputs must agree to the
bit. Times are from the first token to the last, the best of the rounds. "noise" is drawn at temperature 2: no guess is ever
right. "three beside": three "go on, drawn" in one batch with one "correct", which may not slow them. "slowest" is the
worst prompt of a task. Ends in one JSON line.
"""

import argparse
import json
import time
from itertools import chain

from corpora import passages

from fastllm import LLM, SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence, Step

GREEDY = SamplingParams(temperature=0.0)
DRAWN = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)
NOISE = SamplingParams(temperature=2.0, seed=1)
QUESTIONS = (
    "What is gravity?", "Write a short story about a fox.", "Explain how a bicycle works.", "Who was Ada Lovelace?",
    "How do I bake bread?", "Why is the sky blue?", "Describe a sunset by the sea.", "How does a bank earn money?",
    "What should I know before a job interview?", "Tell me about the history of Rome.",
)  # fmt: skip
Request = tuple[list[int], SamplingParams]


def tasks(llm: LLM, count: int) -> dict[str, list[list[Request]]]:
    """Batches of requests by what is asked for, over real text; no two take the same passage."""
    texts = iter([p for p in (" ".join(p.split()) for p in passages()) if len(p) > 500])

    def asked(task: str, length: int) -> list[list[int]]:
        cut = (text[:length].rpartition(". ")[0] + "." for text in texts)
        cut = [next(text for text in cut if len(text) > 400) for _ in range(count)]
        return [llm.chat_ids([{"role": "user", "content": f"{task}\n\n{text}"}]) for text in cut]

    def alone(prompts: list[list[int]], params: SamplingParams) -> list[list[Request]]:
        return [[(prompt, params)] for prompt in prompts]

    openings = [llm.tokenizer.encode(next(texts)[:200]) for _ in range(count + 2)]
    questions = [llm.chat_ids([{"role": "user", "content": q}]) for q in QUESTIONS[:count]]
    correct = alone(asked("Correct the spelling of this text, and change nothing else:", 1200), GREEDY)
    drawn = alone(openings, DRAWN)
    return {
        "edit": alone(asked('Rewrite this text with "the" replaced by "that":', 1200), GREEDY),
        "correct": correct,
        "summarise": alone(asked("Summarise this text:", 1200), GREEDY),
        "question": alone(questions, GREEDY),
        "question, drawn": alone(questions, DRAWN),
        "go on": alone(openings[:count], GREEDY),
        "go on, drawn": drawn[:count],
        "noise": alone(openings[:count], NOISE),
        "three beside": [[*chain(*drawn[i : i + 3]), *correct[i]] for i in range(count)],
    }


class Told:
    """What a request was given, and when."""

    def __init__(self, request: Request, room: int, eos: frozenset[int]):
        self.made, self.times = [], []

        def receive(step: Step) -> bool:
            self.made.append((step.token, step.logprob))
            self.times.append(time.perf_counter())
            return step.token in eos

        self.sequence = Sequence(request[0], room, request[1], 0, 1, receive)


def decode(engine: Engine, batch: list[Request], room: int) -> tuple[list[Told], list[float]]:
    """The requests of a batch, and of each the seconds from when the last was read to its last token."""
    told = [Told(request, room, engine.eos_ids) for request in batch]
    engine.run([t.sequence for t in told])
    begun = max(t.times[0] for t in told)
    return told, [t.times[-1] - begun for t in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quantize")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--speculate", type=int, default=7)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--room", type=int, default=256, help="tokens to generate at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="tasks")
    a = parser.parse_args()
    llm = LLM(a.model, quantize=a.quantize, dtype=a.dtype, max_num_seqs=1)
    eos = llm.tokenizer.eos_ids
    engines = [Engine(llm.model, llm.max_model_len, eos, 4, speculate=n) for n in (0, a.speculate)]
    for engine in engines:  # captures
        for together in (1, 3, 4):
            engine.eos_ids = frozenset()
            decode(engine, [([5, 6, 7, 8] * 20, GREEDY)] * together, 200)
            engine.eos_ids = eos
    result = {"model": a.model, "quantize": a.quantize, "dtype": a.dtype, "speculate": a.speculate, "tasks": {}}
    print(f"{'':>16} {'tokens/s':>9} {'with':>6} {'times':>6} {'slowest':>8} {'drafted':>8} {'right':>6} {'a step':>7}")
    for task, batches in tasks(llm, a.texts).items():
        if a.only and task not in a.only:
            continue
        seconds, ratios, counts = [0.0, 0.0], [], [0, 0, 0, 0]
        for batch in batches:
            found = [[], []]
            for turn in range(a.rounds):
                told = [[], []]
                for which in ((0, 1), (1, 0))[turn % 2]:
                    told[which], each = decode(engines[which], batch, a.room)
                    found[which].append(each)
                assert [t.made for t in told[0]] == [t.made for t in told[1]]
            for i, t in enumerate(told[1][: 3 if len(batch) > 1 else 1]):  # of "three beside" the three
                if len(t.made) > 16:
                    without, with_ = (min(each[i] for each in f) for f in found)
                    seconds = [seconds[0] + without, seconds[1] + with_]
                    ratios.append(without / with_)
                    timing = t.sequence.timing
                    more = len(t.made) - 1, timing.drafted, timing.accepted, timing.steps
                    counts = [x + y for x, y in zip(counts, more, strict=True)]
        tokens, drafted, accepted, steps = counts
        row = {
            "without": tokens / seconds[0], "with": tokens / seconds[1], "times": seconds[0] / seconds[1],
            "slowest": min(ratios), "tokens": tokens, "drafted": drafted, "accepted": accepted, "steps": steps,
        }  # fmt: skip
        result["tasks"][task] = row
        print(
            f"{task:>16} {row['without']:9.0f} {row['with']:6.0f} {row['times']:6.2f} {row['slowest']:8.2f} {drafted:8} "
            f"{accepted / max(drafted, 1):6.0%} {tokens / max(steps, 1):7.2f}",
            flush=True,
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
