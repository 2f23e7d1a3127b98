"""Documents to examples to batches: what is read, what comes next, and how much each prediction counts.

    encode = lambda document, index: encode_text(tokenizer, document.text, longest=1024)
    for batch in Batches(documents, encode, tokens=8192):
        logits = model.logits(model.packed_hidden(batch.packed))                          # [T, V]
        loss = ops.cross_entropy(logits, batch.target, token_weight=batch.weight)

Targets are shifted already: target[t] is what the model is to say at the token ids[t], as `ops.cross_entropy` and
`ops.linear_cross_entropy` read it; IGNORE where nothing is to be said. A batch is packed: sequences lie one after another
without padding, positions begin anew in each, and `cu` keeps attention within it, so the loss and every gradient are those of
the sequences alone (Krell et al. 2021, arXiv 2107.02027). Nothing is told from the id of a token: an end of sequence is
trained though a vocabulary may pad by the same id.
"""

import bisect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread, current_thread, main_thread
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..ops import LossSpec
from .chat import ChatTemplate
from .literal import Talk
from .packed import Packed
from .sources import Document, Documents, Mixture, permutation
from .tokenizer import Tokenizer

IGNORE = LossSpec().ignore_index
HOW = ("best_fit", "sequential")
MOST = 1000  # batches in a window, whatever the length of its documents


@dataclass(frozen=True, eq=False)
class Example:
    """One sequence of n tokens: ids int64 [n], target int64 [n] (IGNORE: none), weight float32 [n] of each prediction.

    ends: whether it goes on to the end of its sequence, or was cut before.
    """

    ids: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    ends: bool = True

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def next_tokens(cls, ids: Sequence[int], trained: Sequence[bool] | None = None) -> "Example":
        """Of a whole sequence [n + 1], in which each token says the next one; trained [n + 1]: the tokens that are to be
        said, all where not given. What follows the last of them is left out."""
        whole = np.asarray(ids, dtype=np.int64)
        said = np.ones(len(whole), dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
        stop = int(said[1:].nonzero()[0][-1]) + 1 if said[1:].any() else 0
        target = np.where(said[1 : stop + 1], whole[1 : stop + 1], IGNORE)
        return cls(whole[:stop], target, said[1 : stop + 1].astype(np.float32))

    def part(self, start: int, stop: int) -> "Example":
        """The tokens [start, stop), which still say what came next in the whole."""
        cut = (getattr(self, name)[start:stop] for name in ("ids", "target", "weight"))
        return Example(*cut, ends=self.ends and stop >= len(self))

    def pieces(self, longest: int) -> list["Example"]:
        """Parts of at most so many tokens; no prediction is lost."""
        return [self.part(i, i + longest) for i in range(0, len(self), longest)]


# ---------------------------------------------------------------------------------------------------------------- encode


def encode_text(tokenizer: Tokenizer, text: str, longest: int | None = None) -> list[Example]:
    """A document: bos (where the vocabulary puts one), its tokens, eos; every token after the first is trained. In pieces,
    where it is longer than `longest`."""
    ids = [*_bos(tokenizer), *tokenizer.encode(text, add_special_tokens=False), end_id(tokenizer)]
    example = Example.next_tokens(ids)
    return [example] if longest is None else example.pieces(longest)


def encode_completion(tokenizer: Tokenizer, prompt: str, completion: str, longest: int | None = None) -> list[Example]:
    """bos, prompt, completion, eos; the completion and eos are trained.

    The prompt has the tokens that it has when the model is asked, the completion those that go on behind them; no token spans
    the border, though one of the whole text might. Longer than `longest`, the end is cut and `ends` is false; nothing is
    given where no answer would be left.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    head = [*_bos(tokenizer), *before]
    tail = [*tokenizer.encode_after(before, completion), end_id(tokenizer)]
    if not head:
        raise ValueError("the prompt is empty, so nothing says the first token of the completion; give a text instead")
    return _cut(Example.next_tokens(head + tail, [False] * len(head) + [True] * len(tail)), longest)


def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    longest: int | None = None,
    first: int = 0,
) -> list[Example]:
    """A talk, rendered by its template; every turn of the assistant from message `first` on is trained, with the token that
    ends it.

    A turn is what the template writes beyond the prompt for it, so the model reads what it will read when asked: the prompt of
    `render(messages before, add_generation_prompt=True)`. The tokens are those of the whole talk; but where one of them would
    span a border of a turn, what stands on either side is cut there. Special tokens within a message that is not the assistant's
    are text, as in `LLM.chat`. Where no token of a last turn ends it, eos is put
    behind. ValueError: no turn to train; a template that writes earlier turns in another way once others follow.
    """
    talk = Talk(tokenizer, messages)
    messages = talk.messages
    whole = template.render(messages, add_generation_prompt=False)
    spans = []
    for n, message in enumerate(messages):
        if message.get("role") == "assistant" and n >= first:
            prompt = template.render(messages[:n], add_generation_prompt=True) if n else ""
            turn = template.render(messages[: n + 1], add_generation_prompt=False)
            if not (turn.startswith(prompt) and whole.startswith(turn)):
                raise ValueError(
                    f"the chat template writes message {n} in another way when messages follow it, or has no generation "
                    "prompt; train on the last turn alone, as prompt and completion"
                )
            spans.append((len(prompt), len(turn)))
    if not spans:
        raise ValueError(f"no message from {first} on is the assistant's, so nothing is trained; leave the talk out")
    edges = [0, *(edge for span in spans for edge in span)]
    ids: list[int] = []
    trained: list[bool] = []
    texts = [whole[a:b] for a, b in itertools.pairwise(edges)]  # in turn: what is read, what is said
    for n, text in enumerate(texts):
        part = talk.encode(text, ids)
        said = n % 2 == 1
        last = max((i for i, id in enumerate(part) if id in tokenizer.eos_ids), default=None) if said else None
        if said and last is None and n == len(texts) - 1:
            part = [*part, end_id(tokenizer)]
        ids += part
        trained += [said and (last is None or i <= last) for i in range(len(part))]
    return _cut(Example.next_tokens(ids, trained), longest)


def encode(
    tokenizer: Tokenizer, fields: Mapping[str, Any], template: ChatTemplate | None = None, longest: int | None = None
) -> list[Example]:
    """A record of any of the forms {"messages"}, {"prompt", "completion"} (strings, or lists of messages) and {"text"}.

    ValueError: another form, or messages without a template.
    """
    messages, prompt, completion, text = (fields.get(k) for k in ("messages", "prompt", "completion", "text"))
    talk = messages if isinstance(messages, list) else None
    first = 0
    if isinstance(prompt, list) and isinstance(completion, list):
        talk, first = [*prompt, *completion], len(prompt)
    if talk is not None:
        if template is None:
            raise ValueError("messages need a chat template; give one, ChatTemplate.from_folder(path) for instance")
        return encode_messages(tokenizer, template, talk, longest, first)
    if isinstance(prompt, str) and isinstance(completion, str):
        return encode_completion(tokenizer, prompt, completion, longest)
    if isinstance(text, str):
        return encode_text(tokenizer, text, longest)
    kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in fields.items()) or "nothing"
    raise ValueError(
        f'a record of {kinds}; allowed: "messages" (a list), "prompt" and "completion" (two strings, or two lists of '
        'messages), "text" (a string)'
    )


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.bos_id] if tokenizer.add_bos else []


def end_id(tokenizer: Tokenizer) -> int:
    """What ends every sequence that is trained. ValueError: the vocabulary has no eos."""
    if tokenizer.eos_id is None:
        raise ValueError("the tokenizer has no eos, so no model would learn to end; name one among its roles")
    return tokenizer.eos_id


def _cut(example: Example, longest: int | None) -> list[Example]:
    if longest is None or len(example) <= longest:
        return [example]
    short = example.part(0, longest)
    return [short] if short.weight.any() else []


def padding_id(tokenizer: Tokenizer) -> int:
    """What stands at padding, which no loss and no attention looks at: the vocabulary's pad, unless that ends a sequence."""
    if tokenizer.pad_id is not None and tokenizer.pad_id not in tokenizer.eos_ids:
        return tokenizer.pad_id
    return next(id for id in range(len(tokenizer)) if id not in tokenizer.eos_ids)


# --------------------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Packed sequences of T tokens and what is to be said at each: target int64 [T] (IGNORE: nothing), weight float32 [T]."""

    packed: Packed
    target: Tensor
    weight: Tensor

    def to(self, device: torch.device | str) -> "Batch":
        """The same elsewhere."""
        return Batch(self.packed.to(device), self.target.to(device), self.weight.to(device))


def collate(examples: Sequence[Example], pad_to: int | None = None, pad_id: int = 0) -> Batch:
    """Examples as one batch. pad_to: fill up with a sequence of pad_id that is not trained, to exactly so many tokens (for
    kernels that are compiled for one shape). ValueError: no token, or more than pad_to."""
    examples = [e for e in examples if len(e)]
    total = sum(map(len, examples))
    if not total or (pad_to is not None and total > pad_to):
        allowed = "1 or more" if pad_to is None else f"1 to pad_to={pad_to}"
        raise ValueError(f"collate: {total} tokens in {len(examples)} examples; allowed: {allowed}")
    if pad_to is not None and pad_to > total:
        n = pad_to - total
        empty = Example(np.full(n, pad_id, np.int64), np.full(n, IGNORE, np.int64), np.zeros(n, np.float32))
        examples = [*examples, empty]
    target, weight = (
        torch.from_numpy(np.concatenate([getattr(e, name) for e in examples])) for name in ("target", "weight")
    )
    return Batch(Packed.of_arrays([e.ids for e in examples]), target, weight)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Which sequences share a batch of at most `capacity` tokens, by index: the longest first, each where it leaves the least
    room (best fit decreasing; Ding et al. 2024, arXiv 2404.10830). None is cut. ValueError: one that is longer than that."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"a sequence of {length} tokens, a batch holds {capacity}; cut it by `longest`")
        at = bisect.bisect_left(room, (length, -1))
        left, bin = room.pop(at) if at < len(room) else (capacity, len(bins))
        if bin == len(bins):
            bins.append([])
        bins[bin].append(index)
        bisect.insort(room, (left - length, bin))
    return bins


E = TypeVar("E", bound=Sized)


def examples_of(document: Document, index: int, encode: Callable[[Document, int], list[E]]) -> list[E]:
    """Those of a document that hold anything. ValueError: with its place, where it cannot be encoded."""
    try:
        return [example for example in encode(document, index) if len(example)]
    except ValueError as error:
        place = f"{document.place}: "
        raise ValueError(place + str(error).removeprefix(place)) from error


@dataclass(frozen=True, eq=False)
class _Window(Generic[E]):
    """The groups of documents that were read together: before them `documents` stood there, and `count` had been read."""

    documents: dict[str, Any]
    count: int
    groups: list[list[E]]
    empty: bool


class Groups(Generic[E]):
    """Examples of at most `tokens` tokens together, out of documents, with a state that is exact at any group: what batches of
    every kind are made of. See `Batches`.

    A thread reads a window ahead, so who trains does not wait for it; the documents are its own from then on.
    """

    def __init__(
        self,
        documents: Documents | Mixture,
        encode: Callable[[Document, int], list[E]],
        tokens: int,
        window: int = 512,
        seed: int = 0,
    ):
        if tokens < 1 or window < 1:
            raise ValueError(f"tokens={tokens}, window={window}; allowed: 1 or more each")
        self.documents, self.encode, self.tokens, self.window, self.seed = documents, encode, tokens, window, seed
        self._window, self._taken = _Window[E](documents.state_dict(), 0, [], False), 0
        self._count = 0  # of documents read
        self._next: Future[_Window[E]] | None = None

    def take(self) -> list[E]:
        """The next group. StopIteration after the last one."""
        while self._taken == len(self._window.groups):
            self._turn()
        self._taken += 1
        return self._window.groups[self._taken - 1]

    def read_ahead(self) -> None:
        """Begins to read the next window, where that has not begun; returns at once."""
        if self._next is None:
            self._next = Future()
            Thread(target=self._read_into, args=(self._next, current_thread())).start()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch is: plain JSON."""
        return {"documents": self._window.documents, "count": self._window.count, "taken": self._taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there, given the same options. ValueError: the state of other documents."""
        if self._next is not None:
            self._next.exception()  # waits; what was read is not wanted
            self._next = None
        self.documents.load_state_dict(state["documents"])
        self._count, self._taken = state["count"], 0
        self._window = _Window(state["documents"], state["count"], [], False)
        if state["taken"]:
            self._turn()
            self._taken = state["taken"]

    def _turn(self) -> None:
        """To the next window. StopIteration after the last one."""
        self.read_ahead()
        try:
            window = self._next.result()
        finally:
            self._next = None
        if window.empty:
            raise StopIteration
        self._window, self._taken = window, 0
        self.read_ahead()

    def _read_into(self, future: "Future[_Window[E]]", reader: Thread) -> None:
        try:
            future.set_result(self._read(reader))
        except BaseException as error:  # raised where the window is wanted
            future.set_exception(error)

    def _read(self, reader: Thread) -> _Window[E]:
        start, count, examples = self.documents.state_dict(), self._count, list[E]()
        read, most = 0, MOST * self.tokens
        for _ in range(self.window):
            if read >= most or not (main_thread().is_alive() or (reader.is_alive() and not reader.daemon)):
                break  # the process ends, and waits for its threads
            try:
                document = next(self.documents)
            except StopIteration:
                break
            made = examples_of(document, self._count, self.encode)
            examples += made
            read += sum(map(len, made))
            self._count += 1
        return _Window(start, count, self._group(examples, count), self._count == count)

    def _group(self, examples: list[E], index: int) -> list[list[E]]:
        """The examples of a window that begins with document `index`."""
        bins = pack([len(e) for e in examples], self.tokens)
        order = permutation(len(bins), "batches", self.seed, index)  # or the longest would always come first
        return [[examples[i] for i in sorted(bins[b])] for b in order]


class Batches(Groups[Example]):
    """Batches of at most `tokens` tokens out of documents: an iterator with a state, exact at any batch.

    encode(document, index): its examples; index counts the documents, through all epochs, for what is drawn at random.
    how: "best_fit" cuts no example (see `pack`); "sequential" keeps the order and fills every batch, cutting where one is full:
    the rest goes on in the next as a sequence of its own. window: how many documents are packed together, fewer where they would
    make more than MOST batches. ValueError: with the place of a document that cannot be encoded.
    """

    def __init__(
        self,
        documents: Documents | Mixture,
        encode: Callable[[Document, int], list[Example]],
        tokens: int,
        how: str = "best_fit",
        window: int = 512,
        seed: int = 0,
    ):
        if how not in HOW:
            raise ValueError(f"how={how!r}; allowed: {', '.join(HOW)}")
        super().__init__(documents, encode, tokens, window, seed)
        self.how = how

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        return collate(self.take())

    def _group(self, examples: list[Example], index: int) -> list[list[Example]]:
        return _fill_in_order(examples, self.tokens) if self.how == "sequential" else super()._group(examples, index)


def _fill_in_order(examples: Iterable[Example], tokens: int) -> list[list[Example]]:
    made, room = list[list[Example]](), 0
    for example in examples:
        begin = 0
        while begin < len(example):
            if not room:
                made.append([])
                room = tokens
            part = example.part(begin, begin + room)
            made[-1].append(part)
            begin, room = begin + len(part), room - len(part)
    return made
