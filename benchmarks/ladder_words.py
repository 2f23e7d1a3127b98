"""What `ladder.py` asks of word vectors: analogies and neighbours, of words that are one token of the vocabulary."""

from fastllm.data.tokenizer import Tokenizer
from fastllm.models.baselines import SkipGram

# Relations of which one token each side may be in a small vocabulary; all pairs of pairs of a row are asked.
RELATIONS = {
    "number": "year years; day days; state states; city cities; game games; player players; member members; book books; "
    "company companies; country countries; language languages; work works; song songs; student students; word words",
    "tense": "is was; are were; has had; have had; go went; make made; take took; become became; play played; use used; "
    "call called; see saw; know knew; give gave; find found; say said; work worked",
    "gender": "he she; his her; him her; man woman; men women; king queen; father mother; son daughter; brother sister",
    "country": "France French; Germany German; England English; Italy Italian; Spain Spanish; Russia Russian; China Chinese; "
    "Japan Japanese; America American; Europe European; Greece Greek; Rome Roman",
    "degree": "large larger; small smaller; high higher; low lower; great greater; good better; old older; early earlier; "
    "late later; long longer; strong stronger",
}
SHOWN = ("year", "city", "France", "he", "two", "music", "war", "government")


def word(tokenizer: Tokenizer, text: str) -> int | None:
    """The one token of a word within a text, or None."""
    ids = tokenizer.encode(f" {text}", add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


def questions(tokenizer: Tokenizer) -> dict[str, list[tuple[int, int, int, int]]]:
    """Of each relation all (a, b, c, d), a : b = c : d, whose words are single tokens."""
    asked = {}
    for kind, row in RELATIONS.items():
        pairs = [[word(tokenizer, w) for w in pair.split()] for pair in row.split(";")]
        known = [pair for pair in pairs if None not in pair]
        asked[kind] = [(*p, *q) for p in known for q in known if not set(p) & set(q)]
    return asked


def neighbours(model: SkipGram, tokenizer: Tokenizer) -> dict[str, list[str]]:
    """The nearest tokens of some words, those that are in the vocabulary."""
    found = {w: word(tokenizer, w) for w in SHOWN}
    near = {w: model.neighbours(id, 6) for w, id in found.items() if id is not None}
    return {w: [tokenizer.decode([id]).strip() for id, _ in each] for w, each in near.items()}
