"""What speculative decoding (fastllm/decode/speculate.py) gains where text repeats, and what it costs where it does not.

    python benchmarks/speculate.py
    python benchmarks/speculate.py --quantize int8 --speculate 15 --texts 16

Each prompt is decoded with and without in turns, by two engines over the same weights; both outputs must agree to the bit.
Times are from the first token to the last. Ends in one JSON line.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace

from texts import passages

from fastllm import LLM, SamplingParams
from fastllm.decode.engine import Engine
from fastllm.decode.scheduler import Sequence

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_k=50, top_p=0.9, seed=1)
QUESTIONS = (
    "What is gravity?", "Write a short story about a fox.", "Explain how a bicycle works.", "Who was Ada Lovelace?",
    "How do I bake bread?", "Why is the sky blue?", "Describe a sunset by the sea.", "How does a bank earn money?",
    "What should I know before a job interview?", "Tell me about the history of Rome.",
)  # fmt: skip


def tasks(llm: LLM, count: int) -> dict[str, tuple[list[list[int]], SamplingParams]]:
    """Prompts by what is asked for, over real text; each takes other passages."""
    texts = iter([p for p in (" ".join(p.split()) for p in passages()) if len(p) > 1200])

    def asked(task: str, length: int) -> list[list[int]]:
        cut = [next(texts)[:length].rpartition(". ")[0] + "." for _ in range(count)]
        return [llm.chat_ids([{"role": "user", "content": f"{task}\n\n{text}"}]) for text in cut]

    openings = [llm.tokenizer.encode(next(texts)[:200]) for _ in range(2 * count)]
    questions = [llm.chat_ids([{"role": "user", "content": q}]) for q in QUESTIONS[:count]]
    return {
        "edit": (asked('Rewrite this text with "the" replaced by "that":', 900), GREEDY),
        "correct": (asked("Correct the spelling of this text, and change nothing else:", 900), GREEDY),
        "summarise": (asked("Summarise this text:", 1200), GREEDY),
        "question": (questions, GREEDY),
        "question, drawn": (questions, SAMPLED),
        "go on": (openings[:count], GREEDY),
        "go on, drawn": (openings[count:], SAMPLED),
    }


def decode(engine: Engine, prompt: list[int], params: SamplingParams, eos: frozenset[int], room: int):
    """(tokens with log-probabilities, seconds from the first to the last, timing)."""
    made, begun = [], [0.0]

    def receive(step) -> bool:
        if not made:
            begun[0] = time.perf_counter()
        made.append((step.token, step.logprob))
        return step.token in eos

    s = Sequence(prompt, room, params, 0, 1, receive)
    engine.run([s])
    return made, time.perf_counter() - begun[0], s.timing


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
    plain, drafting = (Engine(llm.model, llm.max_model_len, eos, 1, speculate=n) for n in (0, a.speculate))
    for engine in (plain, drafting):  # captures
        decode(engine, [5, 6, 7, 8] * 20, replace(GREEDY, min_new_tokens=200), frozenset(), 200)
    result = {"model": a.model, "quantize": a.quantize, "speculate": a.speculate, "tasks": {}}
    print(f"{'':>16} {'tokens/s':>9} {'with':>6} {'times':>6} {'slowest':>8} {'drafted':>8} {'right':>6} {'a step':>7}")
    for task, (prompts, params) in tasks(llm, a.texts).items():
        if a.only and task not in a.only:
            continue
        seconds, ratios, tokens, drafted, accepted, steps = [0.0, 0.0], [], 0, 0, 0, 0
        for prompt in prompts:
            pairs = []
            for turn in range(a.rounds):
                order = (plain, drafting) if turn % 2 else (drafting, plain)
                found = {id(e): decode(e, prompt, params, eos, a.room) for e in order}
                (made, without, _), (same, with_, timing) = found[id(plain)], found[id(drafting)]
                assert made == same
                pairs.append((without, with_))
            if len(made) < 16:
                continue
            best = [statistics.median(p[i] for p in pairs) for i in (0, 1)]
            seconds = [x + y for x, y in zip(seconds, best, strict=True)]
            ratios.append(best[0] / best[1])
            tokens += len(made) - 1
            drafted, accepted = drafted + timing.drafted, accepted + timing.accepted
            steps += timing.steps
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
