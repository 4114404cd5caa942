"""Chat data as one type, whatever file it came from.

As JSON a conversation is `{"messages": [{"role", "content"}, …]}`. `content` is a string, or for the assistant a list
of parts `{"type": "text" | "python" | "python_output", "text"}`: what it says, what it asks the calculator, what the
calculator answered. An optional system message comes first, then user and assistant strictly alternate, and the
assistant has the last word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

PartKind = Literal["text", "python", "output"]
Role = Literal["system", "user", "assistant"]

_KIND_OF_TYPE: dict[str, PartKind] = {"text": "text", "python": "python", "python_output": "output"}
_TYPE_OF_KIND = {kind: name for name, kind in _KIND_OF_TYPE.items()}


class EmptyMessage(ValueError):
    """A message says nothing: well-formed, but there is nothing to learn from it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a message: plain text, a call of the calculator, or the calculator's answer."""

    kind: PartKind
    text: str


@dataclass(frozen=True, slots=True)
class Message:
    """What one side says in one turn."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """What a reader sees: the text parts, without the calculator's block."""
        return "".join(part.text for part in self.parts if part.kind == "text")

    def to_json(self) -> dict[str, Any]:
        """`{"role", "content"}`; a single text part becomes a string."""
        if len(self.parts) == 1 and self.parts[0].kind == "text":
            return {"role": self.role, "content": self.parts[0].text}
        return {
            "role": self.role,
            "content": [{"type": _TYPE_OF_KIND[part.kind], "text": part.text} for part in self.parts],
        }


@dataclass(frozen=True, slots=True)
class Conversation:
    """A whole dialogue; `from_json` is the door that checks its rules."""

    messages: tuple[Message, ...]

    @classmethod
    def from_json(cls, value: Any) -> Conversation:
        """Parse `{"messages": […]}`. Other keys, of the object or of a message, are ignored.

        Raises:
            EmptyMessage: a message has no visible character in any part.
            ValueError: anything else that is not as the module says; the text names the message, counted from 1.
        """
        if not isinstance(value, dict) or not isinstance(value.get("messages"), list):
            raise ValueError("a conversation is an object with a list `messages`")
        entries = value["messages"]
        if not entries:
            raise ValueError("`messages` is empty")
        messages: list[Message] = []
        has_system = isinstance(entries[0], dict) and entries[0].get("role") == "system"
        for number, entry in enumerate(entries, 1):
            expected: Role = "system"
            if not (has_system and number == 1):
                expected = "user" if (number - has_system) % 2 == 1 else "assistant"
            messages.append(_parse_message(entry, expected, f"message {number}"))
        if messages[-1].role != "assistant":
            raise ValueError(f"the last message is of the {messages[-1].role}, it must be of the assistant")
        return cls(tuple(messages))

    def to_json(self) -> dict[str, Any]:
        """The inverse of `from_json`."""
        return {"messages": [message.to_json() for message in self.messages]}

    @property
    def num_chars(self) -> int:
        """Characters in all parts of all messages, calculator blocks included."""
        return sum(len(part.text) for message in self.messages for part in message.parts)


def _parse_message(entry: Any, expected: Role, where: str) -> Message:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {_type_name(entry)}, not an object")
    role = entry.get("role")
    if role not in ("system", "user", "assistant"):
        found = f"`{role}`" if isinstance(role, str) else _type_name(role)
        raise ValueError(f"{where} has role {found}; roles are `system`, `user` and `assistant`")
    if role == "system" and expected != "system":
        raise ValueError(f"{where} has role `system`, which is allowed only at the start")
    if role != expected:
        raise ValueError(f"{where} has role `{role}` where `{expected}` must follow; user and assistant alternate")
    content = entry.get("content")
    if isinstance(content, str):
        parts: tuple[Part, ...] = (Part("text", content),)
    elif isinstance(content, list) and role == "assistant":
        parts = _parse_parts(content, where)
    else:
        allowed = "a string or a list of parts" if role == "assistant" else "a string"
        raise ValueError(f"the content of {where} ({role}) is {_type_name(content)}; it must be {allowed}")
    if not any(part.text.strip() for part in parts):
        raise EmptyMessage(f"{where} ({role}) is empty")
    return Message(role, parts)


def _parse_parts(content: list[Any], where: str) -> tuple[Part, ...]:
    parts: list[Part] = []
    for number, entry in enumerate(content, 1):
        here = f"part {number} of {where}"
        if not isinstance(entry, dict):
            raise ValueError(f"{here} is {_type_name(entry)}, not an object")
        kind = _KIND_OF_TYPE.get(entry["type"]) if isinstance(entry.get("type"), str) else None
        if kind is None:
            raise ValueError(f"{here} has type {entry.get('type')!r}; types are {', '.join(_KIND_OF_TYPE)}")
        if not isinstance(entry.get("text"), str):
            raise ValueError(f"the text of {here} is {_type_name(entry.get('text'))}, not a string")
        after_call = bool(parts) and parts[-1].kind == "python"
        if after_call and kind != "output":
            raise ValueError(f"{here} follows a `python` part; its `python_output` must come first")
        if kind == "output" and not after_call:
            raise ValueError(f"{here} is a `python_output` without a `python` part before it")
        if kind == "python" and not entry["text"].strip():
            raise ValueError(f"{here} is an empty `python` part")
        parts.append(Part(kind, entry["text"]))
    if parts and parts[-1].kind == "python":
        raise ValueError(f"{where} ends with a `python` part; its `python_output` must follow")
    return tuple(parts)


def _type_name(value: Any) -> str:
    """How JSON calls a value's type, with an article."""
    if value is None:
        return "missing or null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
