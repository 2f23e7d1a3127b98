"""Messages to a prompt: the chat templates of the Hub (Jinja), rendered in a sandbox.

    template = ChatTemplate.from_gguf(file)
    talk = Talk(tokenizer, [{"role": "user", "content": "What is gravity?"}])
    ids = talk.encode(template.render(talk.messages))

A template comes with a model file, so it is code of strangers: it runs in Jinja's immutable sandbox and sees nothing
but plain JSON values. Needs jinja2 >= 3.1.6 (earlier ones have known ways out of the sandbox).
"""

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..files import Replacing
from . import HasMetadata

NO_TEMPLATE = (
    'has no chat template; give one, ChatTemplate(open("template.jinja").read()), or prompt the model with plain text'
)


class ChatTemplate:
    """A compiled template.

    source: Jinja text. bos_token, eos_token: what the template may write under these names. ValueError: no template, or
    one that does not parse.
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = ""):
        if not isinstance(source, str) or not source.strip():
            raise ValueError(f"this model {NO_TEMPLATE}")
        self.source = source
        self.bos_token = bos_token or ""
        self.eos_token = eos_token or ""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"the chat template does not parse: {error.message} (line {error.lineno})") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for `messages`, a non-empty list of {"role": str, "content": str}.

        content may be a list of parts ({"type": "text", "text": ...}), or absent beside "tool_calls". tools: JSON
        schemas. variables: what else this template reads, such as enable_thinking. A `Talk` encodes the result, so that
        special tokens that a user typed stay text.

        TypeError / ValueError: messages of another form, or refused by the template, in its own words.
        """
        values = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "documents": None,
            **_plain(variables, "variables"),
            "messages": _check_messages(messages),
            "tools": None if tools is None else _plain(list(tools), "tools"),
            "add_generation_prompt": bool(add_generation_prompt),
        }
        try:
            return self._template.render(values)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
        except (TypeError, LookupError, ArithmeticError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from error

    @classmethod
    def from_gguf(cls, file: HasMetadata) -> "ChatTemplate":
        """From tokenizer.chat_template. ValueError: the file has none."""
        meta = file.metadata
        source = meta.get("tokenizer.chat_template")
        if not source:
            raise ValueError(f"{file.path} {NO_TEMPLATE}")
        tokens = meta.get("tokenizer.ggml.tokens", [])
        ids = [meta.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos")]
        bos, eos = (tokens[id] if id is not None and 0 <= id < len(tokens) else "" for id in ids)
        return cls(source, bos, eos)

    @classmethod
    def from_folder(cls, path: str | os.PathLike) -> "ChatTemplate":
        """From chat_template.jinja, else "chat_template" of tokenizer_config.json. ValueError: the folder has none."""
        folder = Path(path)
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (folder / name).is_file():
                try:
                    config |= json.loads((folder / name).read_text(encoding="utf-8"))
                except (ValueError, TypeError) as error:
                    raise ValueError(f"{folder / name} is not a JSON object: {error}") from error
        source = config.get("chat_template")
        if isinstance(source, list):  # several, each under a name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if (folder / "chat_template.jinja").is_file():
            source = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if not source:
            raise ValueError(f"{folder} {NO_TEMPLATE}")
        tokens = [config.get(f"{role}_token") for role in ("bos", "eos")]
        bos, eos = (token.get("content") if isinstance(token, dict) else token for token in tokens)
        return cls(source, bos or "", eos or "")

    def save(self, folder: str | os.PathLike) -> None:
        """Writes chat_template.jinja, which `from_folder` and transformers read."""
        with Replacing(folder) as files:
            self.write(files)

    def write(self, files: Replacing) -> None:
        """The same among other files."""
        files.write("chat_template.jinja", self.source)


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f'messages is a list of {{"role": ..., "content": ...}}, got {type(messages).__name__}')
    if not messages:
        raise ValueError('messages is empty; give at least one {"role": "user", "content": ...}')
    for n, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(f"message {n} is a {type(message).__name__}, expected a dict with role and content")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {n} has the role {role!r}; expected a name such as system, user or assistant")
        if not (isinstance(content, str | list) or (content is None and message.get("tool_calls"))):
            raise ValueError(f"message {n} ({role}) has content of type {type(content).__name__}; expected a str")
    return _plain(list(messages), "messages")


def _plain(value: Any, where: str) -> Any:
    """A copy out of plain JSON types, so that a template never holds an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{n}]") for n, item in enumerate(value)]
    for kind, convert in ((str, str.__str__), (int, int.__int__), (float, float.__float__)):
        if isinstance(value, kind):  # a subclass, such as an enum: its value, whatever methods it has
            return convert(value)
    raise TypeError(f"{where} is a {type(value).__name__}; templates take str, int, float, bool, None, lists and dicts")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    # Jinja's own escapes <, > and & for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names such as __html__, by which Python would call what a template stored."""

    def __init__(*args, **kwargs):  # no name for self: a template may use it as a keyword
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)  # an attribute of self would be looked up among what the template stored
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}; rename it without the underscore")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what the assistant wrote; here the body is rendered as it is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
