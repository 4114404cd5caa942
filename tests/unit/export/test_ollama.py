"""Ollama's template says what our chat format says. Ollama is not here: its tags are read as Jinja's, one by one."""

from __future__ import annotations

import jinja2
import pytest

from picollm.export.ollama import CHAT_TEMPLATE, modelfile
from picollm.tokenizer import chat_format
from picollm.tokenizer.special import ASSISTANT_END, BOS

# Go's tag -> Jinja's. A dash trims white space on its side in both.
TAGS = {
    "{{- $system := .System }}": "{%- set ns = namespace(system=System) %}",
    "{{- range .Messages }}": "{%- for message in Messages %}",
    '{{- if eq .Role "user" }}': "{%- if message.role == 'user' %}",
    '{{- else if eq .Role "assistant" }}': "{%- elif message.role == 'assistant' %}",
    "{{ if $system }}": "{% if ns.system %}",
    "{{ $system }}": "{{ ns.system }}",
    '{{- $system = "" }}': "{%- set ns.system = '' %}",
    "{{ .Content }}": "{{ message.content }}",
}
TALKS = (
    [("user", "Hi")],
    [("system", "Be brief."), ("user", " two\n\nlines "), ("assistant", "Yes."), ("user", "Why?")],
    [("user", "{{ .Content }} <|bos|>"), ("assistant", ""), ("user", "?")],
)


def as_jinja(template: str) -> str:
    for go, ours in TAGS.items():
        template = template.replace(go, ours)
    # What is left are the ends: of the system's `if`, of the role's, of the loop.
    for end in ("{% endif %}", "{%- endif %}", "{%- endfor %}"):
        dash = "-" if "-" in end else ""
        template = template.replace(f"{{{{{dash} end }}}}", end, 1)
    assert " end }}" not in template and "$" not in template
    return template


@pytest.mark.parametrize("talk", TALKS)
def test_the_template_is_our_chat_format(talk: list[tuple[str, str]]) -> None:
    environment = jinja2.Environment(keep_trailing_newline=True)
    messages = [{"role": role, "content": text} for role, text in talk]
    ours = environment.from_string(chat_format.CHAT_TEMPLATE).render(
        messages=messages, bos_token="", add_generation_prompt=True
    )
    system = "".join(text for role, text in talk if role == "system")
    assert environment.from_string(as_jinja(CHAT_TEMPLATE)).render(Messages=messages, System=system) == ours


def test_modelfile() -> None:
    lines = modelfile("demo.gguf", is_chat=True, context=128).splitlines()
    assert lines[0] == "FROM ./demo.gguf"
    assert f'PARAMETER stop "{ASSISTANT_END}"' in lines and f'PARAMETER stop "{BOS}"' in lines
    assert "PARAMETER num_ctx 128" in lines
    assert BOS not in modelfile("demo.gguf", is_chat=True, context=128).split("PARAMETER")[0], "Ollama puts it there"
