"""The contenders of `serve_load.py`: each serves a schedule of requests, in a worker process of its own (`workers.py`).

    {"do": "load"}                                                               -> {"bytes_per_token": int | null}
    {"do": "serve", "requests": [{"at": s, "prompt": ids, "new": count}, ...]}   -> what `Run.reply` says

A request comes at `at` seconds after the beginning, whatever became of those before it, and has `new` tokens, greedy,
no end of text. Each run begins with an empty cache. Times are one clock's, in the process that serves.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import peers
from workers import serve

AHEAD = 0.05  # seconds between making a run and its beginning
SIMILAR = 0.1  # llama.cpp's server: the share of a prompt that a slot must know to be chosen for it


class Run:
    """What is written down while a schedule is served."""

    def __init__(self, requests: list[dict]):
        self.requests = requests
        self.handed: list[float | None] = [None] * len(requests)  # when the contender was given each
        self.times: list[list[float]] = [[] for _ in requests]  # of each token
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.begin = time.perf_counter() + AHEAD

    def now(self) -> float:
        return time.perf_counter() - self.begin

    def arrivals(self):
        """The place of each request, when its time has come."""
        for i, request in enumerate(self.requests):
            while (wait := request["at"] - self.now()) > 0:
                time.sleep(wait)
            self.handed[i] = self.now()
            yield i

    def reply(self, **more) -> dict:
        """times, handed: seconds after the beginning. RuntimeError where a request has not what it asked for."""
        for request, times, tokens in zip(self.requests, self.times, self.tokens, strict=True):
            if not request["new"] == len(times) == len(tokens):
                raise RuntimeError(f"{request['new']} tokens were asked for, {len(tokens)} came at {len(times)} times")
        return {"times": self.times, "handed": self.handed, "tokens": self.tokens, **more}


class Steps:
    """Seconds in a model's steps: by the wall, and of CPU time of the thread that runs them."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def timed(self, step):
        def run(*arguments):
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return step(*arguments)
            finally:
                self.wall += time.perf_counter() - wall
                self.cpu += time.thread_time() - cpu

        return run


class Ours:
    """fastllm as a server would use it: a thread for each request, which reads its stream."""

    def __init__(self, path, threads, slots, context, quantize=None, dtype="auto", **_):
        from fastllm import LLM, SamplingParams

        self.llm = LLM(
            path, quantize=quantize, dtype=dtype, num_threads=threads, max_num_seqs=slots, max_model_len=context
        )
        self.params = SamplingParams
        self.bytes_per_token = int(self.llm.bytes_per_token)
        self.step = self.llm.engine.step

    def serve(self, requests):
        self.llm.engine.cache.forget()
        run, steps = Run(requests), Steps()
        self.llm.engine.step = steps.timed(self.step)

        def client(i: int) -> float:
            began, request = time.thread_time(), requests[i]
            params = self.params(max_new_tokens=request["new"], temperature=0.0, ignore_eos=True)
            asked = self.llm.request(request["prompt"], params)
            for _ in self.llm.run(asked):  # what `stream` is made of, with a turn for a token that completes no text
                run.times[i].append(run.now())
            run.tokens[i] = asked.token_ids
            return time.thread_time() - began

        began = time.thread_time()
        with ThreadPoolExecutor(len(requests)) as pool:
            clients = [pool.submit(client, i) for i in run.arrivals()]
            spent = sum(client.result() for client in clients)
        spent += time.thread_time() - began
        return run.reply(steps_s=steps.wall, client_s=spent - steps.cpu)


@dataclass
class Slot:
    """A sequence of llama.cpp's. ids: whose keys and values it holds; place: the request, or None where it is free."""

    number: int
    ids: list[int] = field(default_factory=list)
    place: int | None = None
    prompt: list[int] = field(default_factory=list)
    made: list[int] = field(default_factory=list)
    used: float = 0.0  # when its last request ended

    def alike(self, prompt: list[int]) -> int:
        """How many tokens of a prompt it knows, at most all but the last, which gives the first token."""
        most = min(len(self.ids), len(prompt) - 1)
        return next((i for i in range(most) if self.ids[i] != prompt[i]), most)


class LlamaCpp(peers.LlamaCpp):
    """llama.cpp's batches, filled as its server fills them.

    A request takes the free slot that knows most of its prompt, from a tenth on, or else the one that was free longest,
    and goes on from what the slot knows. A batch is the next token of every slot that decodes, then prompts, as long as
    there is place. Nothing is detokenised, and nothing runs beside this loop: it looks at the clock between two batches.
    """

    def __init__(self, path, threads, slots, context, batch=2048, **_):
        super().__init__(path, threads, context, slots, batch)
        self.most = batch
        self.slots = [Slot(i) for i in range(slots)]

    def serve(self, requests):
        self._clear()
        self.slots = [Slot(i) for i in range(len(self.slots))]
        run, steps, line, arrived = Run(requests), Steps(), deque(), 0
        decode, began = steps.timed(self._compute), time.thread_time()
        while True:
            while arrived < len(requests) and requests[arrived]["at"] <= run.now():
                run.handed[arrived] = run.now()
                line.append(arrived)
                arrived += 1
            while line and any(slot.place is None for slot in self.slots):
                self._seat(line[0], requests[line.popleft()]["prompt"])
            if not (rows := self._fill()):
                if arrived == len(requests):
                    break
                time.sleep(max(0.0, requests[arrived]["at"] - run.now()))
                continue
            decode()
            for slot, row in rows:
                place, token = slot.place, int(self._logits(row).argmax())
                slot.made.append(token)
                run.times[place].append(run.now())
                if len(slot.made) == requests[place]["new"]:
                    run.tokens[place], slot.place, slot.used = slot.made, None, run.now()
        return run.reply(steps_s=steps.wall, client_s=time.thread_time() - began - steps.cpu)

    def _seat(self, place: int, prompt: list[int]) -> None:
        free = [slot for slot in self.slots if slot.place is None]
        slot = max(free, key=lambda slot: slot.alike(prompt))
        if slot.alike(prompt) <= SIMILAR * len(prompt):
            slot = min(free, key=lambda slot: slot.used)
        known = slot.alike(prompt)
        if not self.lib.llama_memory_seq_rm(self.memory, slot.number, known, -1):
            raise RuntimeError(f"llama.cpp cannot drop what slot {slot.number} holds from token {known} on")
        slot.place, slot.prompt, slot.made, slot.ids = place, prompt, [], prompt[:known]

    def _fill(self) -> list[tuple[Slot, int]]:
        """Makes the next batch; the slots that have a token to come from it, and where in the batch."""
        self.batch.n_tokens, rows = 0, []
        busy = [slot for slot in self.slots if slot.place is not None]
        for slot in (slot for slot in busy if slot.made):
            rows.append((slot, self._put(slot.made[-1], len(slot.ids), slot.number)))
            slot.ids.append(slot.made[-1])
        for slot in (slot for slot in busy if not slot.made):
            known = len(slot.ids)
            piece = slot.prompt[known : known + self.most - self.batch.n_tokens]
            for i, token in enumerate(piece, known):
                row = self._put(token, i, slot.number, logits=i == len(slot.prompt) - 1)
            slot.ids += piece
            if piece and len(slot.ids) == len(slot.prompt):
                rows.append((slot, row))
        return rows

    def _compute(self) -> None:
        self._decode()
        self.lib.llama_synchronize(self.context)

    def _logits(self, row: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(self.context, row)
        address = ctypes.cast(pointer, ctypes.c_void_p).value
        return np.frombuffer((ctypes.c_float * self.vocab).from_address(address), np.float32)


class Transformers:
    """transformers' continuous batching, fp32. It writes down the times of tokens itself; what its loop spends outside
    of steps is not to be had from outside, and the threads that would stream text are left out."""

    PAGE, TOKENS = 32, 512  # of a page of the cache; of a step

    def __init__(self, path, threads, slots, context, **_):
        import torch
        from transformers import ContinuousBatchingConfig, GenerationConfig

        torch.set_num_threads(threads)
        self.torch, self.model, self.bytes_per_token = torch, peers.llama_from_gguf(path), None
        self.generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.batching = lambda: ContinuousBatchingConfig(
            page_size=self.PAGE,
            num_blocks=slots * -(-context // self.PAGE),
            max_batch_tokens=self.TOKENS,
            max_requests_per_batch=slots,
            auto_switch_to_flash=False,
        )

    def serve(self, requests):
        with self.torch.inference_mode():  # the manager's thread takes it over
            manager = self.model.init_continuous_batching(self.generation, self.batching())
            manager.start()
        try:
            run, began = Run(requests), time.thread_time()
            for i in run.arrivals():
                request = requests[i]
                manager.add_request(request["prompt"], str(i), request["new"], record_timestamps=True, eos_token_id=-1)
            left = len(requests)
            for output in manager:
                if output.error:
                    raise RuntimeError(f"request {output.request_id}: {output.error}")
                place = int(output.request_id)
                run.tokens[place] = output.generated_tokens
                run.times[place] = [t - run.begin for t in output.timestamps]
                left -= 1
                if not left:
                    break
            return run.reply(steps_s=None, client_s=time.thread_time() - began)
        finally:
            manager.stop()


KINDS = {"ours": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def answer(contender, request):
    """Do one request and return its reply."""
    if request["do"] == "serve":
        return contender.serve(request["requests"])
    raise ValueError(f"unknown request {request['do']!r}: serve")


if __name__ == "__main__":
    serve(KINDS, answer)
