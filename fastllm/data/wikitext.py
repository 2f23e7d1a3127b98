"""Articles out of a MediaWiki dump (the XML of dumps.wikimedia.org), as plain text.

The markup is read by rules, not by MediaWiki's own parser: templates, tables, references, files and categories go, links and
emphasis leave their words. What a template would have written is lost.
"""

import html
import re
from collections.abc import Iterator
from typing import IO
from xml.etree import ElementTree

_GONE = re.compile(
    r"<!--.*?-->|<(ref|gallery|math|source|syntaxhighlight|timeline|imagemap|score|code|pre)\b[^>]*?"
    r"(?:/>|(?<!/)>.*?</\1\s*>)|__[A-Z]+__",
    re.DOTALL | re.IGNORECASE,
)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\{\{[^{}]*\}\}\}")
_TABLE = re.compile(r"\{\|(?:(?!\{\||\|\}).)*\|\}", re.DOTALL)
_LINK = re.compile(r"\[\[([^\[\]|]*)((?:\|[^\[\]|]*)*)\]\]")
_EXTERNAL = re.compile(r"\[(?:https?:)?//[^\s\]]+\s*([^\]]*)\]")
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_HOLLOW = re.compile(r" ?\(\s*\)")  # brackets around what a template would have written
_HEADING = re.compile(r"^(=+)\s*(.*?)\s*\1\s*$", re.MULTILINE)
_NAMESPACE = re.compile(r":?\s*(?:file|image|category|wikipedia|template|portal|[a-z]{2,3}|simple)\s*:", re.IGNORECASE)
_APPARATUS = {
    "see also",
    "references",
    "external links",
    "further reading",
    "notes",
    "bibliography",
    "footnotes",
    "sources",
}


def plain_text(markup: str) -> str:
    """The words of an article: paragraphs, list items and headings, a line each, without the sections of references."""
    text = _GONE.sub("", markup)
    for pattern, replacement in ((_TEMPLATE, ""), (_TABLE, ""), (_LINK, _label)):  # the innermost first
        before = None
        while before != text:
            before, text = text, pattern.sub(replacement, text)
    text = _TAG.sub("", _EXTERNAL.sub(r"\1", text)).replace("'''", "").replace("''", "")
    text = html.unescape(html.unescape(text)).replace("\xa0", " ")
    text = _HOLLOW.sub("", re.sub(r"\((?:\s*[,;])+\s*", "(", text))
    parts = _HEADING.split(text)  # lead, then (marks, title, body) of each section
    kept = [parts[0]]
    for title, body in zip(parts[2::3], parts[3::3], strict=True):
        if title.lower() not in _APPARATUS and body.strip(" *#:;\n"):
            kept += [f"\n{title}\n", body]
    lines = (line.lstrip("*#:; ").rstrip() for line in "".join(kept).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _label(link: re.Match) -> str:
    target, labels = link[1], link[2]
    if _NAMESPACE.match(target) and not target.startswith(":"):
        return ""
    return labels.rsplit("|", 1)[-1] if labels else target


def articles(stream: IO[bytes]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """(number of the page, {"title", "text"}), or None for what is no article: a redirect, a page of another namespace.

    ElementTree.ParseError: what is read is no XML.
    """
    number, root, values = 0, None, {}
    for event, element in ElementTree.iterparse(stream, ("start", "end")):
        root = element if root is None else root
        if event == "start":
            continue
        name = element.tag.rpartition("}")[2]
        if name in ("title", "ns", "text", "redirect"):
            values[name] = element.text or ""
        elif name == "page":
            number += 1
            article = values.get("ns") == "0" and "redirect" not in values
            yield number, {"title": values["title"], "text": plain_text(values.get("text", ""))} if article else None
            values = {}
            root.clear()  # or every page that was read stays in memory
