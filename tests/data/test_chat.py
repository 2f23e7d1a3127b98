"""Chat templates: the same text as transformers, clear errors, and a sandbox that holds."""

import datetime
import enum
import json

import pytest
from _assets import asset

from fastllm.data.chat import ChatTemplate
from fastllm.models.gguf import GGUFFile

USER = [{"role": "user", "content": "What is gravity?"}]
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi <b>&</b>"},
    {"role": "assistant", "content": "Hello\n"},
    {"role": "user", "content": "naïve 🎉"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<x> & é", "parameters": {"b": 1, "a": [True]}}}]

TEMPLATES = {
    "chatml": """
{{ bos_token }}
{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\n' + message.content | trim + eos_token + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{% endif %}""",
    "tools": """{%- if tools %}{% for tool in tools %}{{ tool | tojson }}
{{ tool | tojson(indent=2) }}{% endfor %}{%- endif %}
{%- for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ message.content }}{% endfor %}""",
    "namespace": """{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' %}
{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }} {{ undefined_name }} {{ enable_thinking }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}
{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}""",
}


def by_transformers(source: str, messages: list, **kwargs) -> str:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, **kwargs)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [USER, TALK], ids=["user", "talk"])
@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_same_as_transformers(source, messages, prompt):
    given = {"tools": TOOLS, "add_generation_prompt": prompt, "enable_thinking": False}
    got = ChatTemplate(source, "<s>", "</s>").render(messages, **given)
    assert got == by_transformers(source, messages, **given) and got


def test_exact_text():
    source = "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n"
    assert ChatTemplate(source).render(USER) == "What is gravity?\n"  # trim_blocks and lstrip_blocks
    assert ChatTemplate("{{ messages | tojson }}").render([{"role": "user", "content": "<é>"}]) == (
        '[{"role": "user", "content": "<é>"}]'  # no HTML escapes, keys in their order
    )
    year = str(datetime.datetime.now().year)
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(USER) == year


def test_default_is_a_generation_prompt():
    source = "{% if add_generation_prompt %}yes{% else %}no{% endif %}"
    assert ChatTemplate(source).render(USER) == "yes"
    assert ChatTemplate(source).render(USER, add_generation_prompt=False) == "no"


class Role(str, enum.Enum):
    USER = "user"


@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ("hello", TypeError, "messages is a list of .*got str"),
        ({"role": "user", "content": "x"}, TypeError, "got dict"),
        (None, TypeError, "got NoneType"),
        ([], ValueError, "messages is empty"),
        (["hello"], TypeError, "message 0 is a str"),
        ([USER[0], {"content": "x"}], ValueError, "message 1 has the role None"),
        ([{"role": 3, "content": "x"}], ValueError, "message 0 has the role 3"),
        ([{"role": "user"}], ValueError, r"message 0 \(user\) has content of type NoneType"),
        ([{"role": "user", "content": 5}], ValueError, "content of type int"),
        ([{"role": "user", "content": "x", "extra": object()}], TypeError, r"messages\[0\]\['extra'\] is a object"),
    ],
)
def test_bad_messages(messages, error, words):
    with pytest.raises(error, match=words):
        ChatTemplate(TEMPLATES["chatml"]).render(messages)


def test_odd_but_good_messages():
    template = ChatTemplate("{{ messages | tojson }}")
    for message in (
        {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": 1.5}}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": Role.USER, "content": ""},
    ):
        assert json.loads(template.render((message,))) == [message]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('Only user and assistant roles are supported!') }}", "refused.*Only user and assistant"),
        ("{{ messages[0].content.nothing.more }}", "refused.*has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "failed on these messages: TypeError"),
        ("{{ 1 // 0 }}", "failed.*ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed.*RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "refused.*unsafe"),
        ("{{ messages.append(1) }}", "refused.*unsafe"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "refused.*cannot hold '__html__'"),
        ("{{ namespace(_x=1) }}", "refused.*cannot hold '_x'"),
        ("{% for i in range(10**9) %}{% endfor %}", "failed.*Range too big"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "refused.*unsafe"),
    ],
)
def test_template_fails(source, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate(source).render(USER)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "has no chat template; give one"),
        (None, "has no chat template"),
        ("{% for m in messages %}", "does not parse: .*line 1"),
        ("a\n{% nonsense %}", "does not parse: .*'nonsense'.*line 2"),
    ],
)
def test_bad_template(source, words):
    with pytest.raises(ValueError, match=words):
        ChatTemplate(source)


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": "{{ bos_token }}|{{ eos_token }}", "bos_token": "<s>", "eos_token": {"content": "</s>"}},
        {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "<s>|</s>"}]},
    ],
)
def test_from_folder(tmp_path, config):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.from_folder(tmp_path)
    assert template.render(USER) == "<s>|</s>"
    (tmp_path / "chat_template.jinja").write_text("a file wins")
    assert ChatTemplate.from_folder(tmp_path).render(USER) == "a file wins"
    template.save(tmp_path / "new")
    assert ChatTemplate.from_folder(tmp_path / "new").source == template.source


def test_folder_without_template(tmp_path):
    with pytest.raises(ValueError, match="has no chat template; give one"):
        ChatTemplate.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match="tokenizer_config.json is not a JSON object"):
        ChatTemplate.from_folder(tmp_path)


class Stored:
    """What from_gguf reads of a GGUFFile."""

    path = "m.gguf"

    def __init__(self, **metadata):
        self.metadata = {f"tokenizer.{key.replace('__', '.')}": value for key, value in metadata.items()}


def test_from_gguf():
    stored = Stored(chat_template="{{ bos_token }}{{ eos_token }}", ggml__tokens=["<s>", "x"], ggml__bos_token_id=0)
    assert ChatTemplate.from_gguf(stored).render(USER) == "<s>"
    with pytest.raises(ValueError, match="m.gguf has no chat template"):
        ChatTemplate.from_gguf(Stored())


@pytest.mark.parametrize("messages", [USER, TALK], ids=["default system", "own system"])
def test_real_template(messages):
    path = asset()
    with GGUFFile(path) as file:
        template = ChatTemplate.from_gguf(file)
    assert (template.bos_token, template.eos_token) == ("<|im_start|>", "<|im_end|>")
    for prompt in (True, False):
        got = template.render(messages, add_generation_prompt=prompt)
        assert got == by_transformers(template.source, messages, add_generation_prompt=prompt)
    assert ("You are a helpful AI assistant named SmolLM" in got) == (messages is USER)
