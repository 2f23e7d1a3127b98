"""A conversation with a chat model, whose history stays within the context.

talk = Conversation(LLM("smollm2-135m"), SamplingParams(temperature=0.7), system="You are brief.")
for piece in talk.ask("What is gravity?"): ...
talk.messages, talk.dropped
"""

import json
import os
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from .files import write_file
from .llm import LLM
from .sampling_params import SamplingParams

Message = dict[str, str]


class Conversation:
    """messages: {"role", "content"} each, the system's first where there is one. dropped: how many of the oldest the last
    question made room for; they are gone.

    Questions and answers go together: what does not fit any more is dropped by pairs, and never the system's message.
    """

    def __init__(self, llm: LLM, params: SamplingParams | None = None, system: str | None = None):
        self.llm, self.params = llm, SamplingParams() if params is None else params
        if self.params.n != 1:
            raise ValueError(f"Conversation: n={self.params.n}; one answer at a time, allowed: 1")
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = []
        self.dropped = 0
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages, self.dropped = list(self._system), 0

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. Where it is left or interrupted, what was said so far stays in the history.

        ValueError for an empty question, or one that does not fit the context even alone: then the history is as before.
        """
        if not text.strip():
            raise ValueError("the message is empty; give at least one character")
        kept, ids = self._fitted([*self.messages, {"role": "user", "content": text}])
        request = self.llm.request(ids, self.params)
        self.dropped = len(self.messages) + 1 - len(kept)
        self.messages = [*kept, {"role": "assistant", "content": ""}]
        return self._answer(self.llm.run(request), self.messages[-1])

    def _answer(self, pieces: Iterator[str], message: Message) -> Iterator[str]:
        for piece in pieces:
            message["content"] += piece
            if piece:
                yield piece

    def _fitted(self, messages: list[Message]) -> tuple[list[Message], list[int]]:
        """The messages without the oldest pairs, as many as must go, and their ids. The room for an answer is no more than half
        of the context, where a history would have none beside max_new_tokens."""
        first, longest = len(self._system), self.llm.max_model_len
        room = longest - min(self.params.max_new_tokens, longest // 2)
        pairs = (len(messages) - first) // 2

        def without(count: int) -> tuple[list[Message], list[int]]:
            kept = messages[:first] + messages[first + 2 * count :]
            return kept, self.llm.chat_ids(kept)

        whole = without(0)
        if len(whole[1]) <= room or not pairs:
            return whole
        # a last question may leave less room for its answer
        return without(bisect_left(range(pairs), True, 1, key=lambda count: len(without(count)[1]) <= room))

    def save(self, path: str | os.PathLike) -> None:
        """Writes the messages as JSON; the file appears whole or not at all."""
        write_file(path, json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n")

    def load(self, path: str | os.PathLike) -> None:
        """Takes up messages that `save` wrote. ValueError for a file that holds none."""
        try:
            messages = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}; give a file that /save wrote") from error
        fits = isinstance(messages, list) and all(
            isinstance(m, dict) and m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in messages
        )
        start = 1 if fits and messages and messages[0]["role"] == "system" else 0
        turns = [m["role"] for m in messages[start:]] if fits else []
        if not fits or turns != ["user", "assistant"] * (len(turns) // 2):
            raise ValueError(
                f"{path} is no conversation: wanted a list of {{role, content}}, after the system's message by turns of "
                "user and assistant, the last one the assistant's"
            )
        self._system, self.messages, self.dropped = messages[:start], messages, 0
