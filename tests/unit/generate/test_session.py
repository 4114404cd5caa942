from __future__ import annotations

from collections.abc import Callable

import pytest

from picollm.data.conversations import Message, Part
from picollm.errors import ConfigError
from picollm.generate.engine import Engine
from picollm.generate.sampler import Sampling
from picollm.generate.session import LEAST_REPLY_TOKENS, Session, fit, parts_to_json
from picollm.model.gpt import GPT
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.tokenizer import Tokenizer


def message(role: str, text: str) -> Message:
    return Message(role, (Part("text", text),))  # type: ignore[arg-type]


def turns(count: int) -> list[Message]:
    """`count` answered questions and one more."""
    found = []
    for number in range(count):
        found += [message("user", f"Question {number}?"), message("assistant", f"Answer {number}.")]
    return [*found, message("user", "The last one?")]


@pytest.fixture
def session(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> Session:
    return Session(Engine(random_model(T=128), tokenizer, 1), tokenizer, is_chat=True)


def test_all_turns_where_they_fit(tokenizer: Tokenizer) -> None:
    ids, dropped = fit(tokenizer, turns(2), capacity=500)
    assert (ids, dropped) == (render_prompt(tokenizer, turns(2)), 0)


def test_newest_turns_that_fit(tokenizer: Tokenizer) -> None:
    messages = turns(5)
    newest = render_prompt(tokenizer, messages[-5:])
    capacity = len(newest) + 20
    assert fit(tokenizer, messages, capacity, room=20) == (newest, 3)
    assert fit(tokenizer, messages, capacity - 1, room=20)[1] == 4


def test_system_message_stays(tokenizer: Tokenizer) -> None:
    system = message("system", "Be brief.")
    ids, dropped = fit(tokenizer, [system, *turns(5)], capacity=70)
    assert dropped > 0
    assert ids == render_prompt(tokenizer, [system, *turns(5)[2 * dropped :]])


def test_newest_message_needs_little_room(tokenizer: Tokenizer) -> None:
    ids = render_prompt(tokenizer, turns(0))
    assert fit(tokenizer, turns(0), len(ids) + LEAST_REPLY_TOKENS, room=100) == (ids, 0)
    with pytest.raises(ConfigError) as caught:
        fit(tokenizer, turns(3), len(ids) + LEAST_REPLY_TOKENS - 1)
    assert str(len(ids)) in caught.value.cause


def test_history_is_what_was_said(session: Session, tokenizer: Tokenizer) -> None:
    sampling = Sampling(max_new_tokens=10)
    said = "".join(output.text for output in session.ask("Hello", sampling))
    assert session.last is not None and said == session.last.text and said.strip()
    assert session.history == [message("user", "Hello"), Message("assistant", session.last.parts)]
    list(session.ask("And now?", sampling))
    assert len(session.history) == 4
    assert session.prompt_tokens == len(render_prompt(tokenizer, session.history[:3]))
    session.reset()
    assert session.history == []


def test_interrupting_keeps_what_was_said(session: Session) -> None:
    outputs = session.ask("Hello", Sampling(max_new_tokens=50))
    first = [next(outputs) for _ in range(3)]
    with pytest.raises(KeyboardInterrupt):
        outputs.throw(KeyboardInterrupt)
    assert session.last is not None and session.last.ids == [output.token for output in first]
    assert session.history[-1].parts == session.last.parts
    assert not session.engine.busy
    assert list(session.ask("Again", Sampling(max_new_tokens=3)))


def test_refused_message_leaves_the_history(session: Session) -> None:
    list(session.ask("Hello", Sampling(max_new_tokens=3)))
    before = list(session.history)
    with pytest.raises(ConfigError):
        list(session.ask("word " * 300, Sampling()))
    assert session.history == before and not session.engine.busy


def test_base_model_has_no_turns(random_model: Callable[..., GPT], tokenizer: Tokenizer) -> None:
    engine = Engine(random_model(T=64), tokenizer, 1)
    session = Session(engine, tokenizer, is_chat=False)
    list(session.ask("Once upon", Sampling(max_new_tokens=3)))
    assert session.history == []
    assert session.prompt_tokens == 1 + len(tokenizer.encode("Once upon"))
    with pytest.raises(ConfigError):
        Session(engine, tokenizer, is_chat=False, system="Be brief.")


def test_parts_to_json() -> None:
    assert parts_to_json(()) == []
    assert parts_to_json((Part("text", "a"),)) == [{"type": "text", "text": "a"}]
    assert parts_to_json((Part("python", "1+1"), Part("output", "2"))) == [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
    ]
