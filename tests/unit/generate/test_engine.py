from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from picollm.data.conversations import Message, Part
from picollm.errors import ConfigError
from picollm.generate import engine as engine_module
from picollm.generate.engine import Engine, Reply
from picollm.generate.sampler import Sampling
from picollm.model.gpt import GPT
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.special import ASSISTANT_END, BOS, OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START
from picollm.tokenizer.tokenizer import Tokenizer

MakeModel = Callable[..., GPT]


def random_prompts(tokenizer: Tokenizer, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    first_special = min(tokenizer.special.values())
    return [
        [tokenizer.bos, *(rng.randrange(first_special) for _ in range(rng.randint(0, longest - 1)))]
        for _ in range(count)
    ]


def reference(model: GPT, tokenizer: Tokenizer, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding the slow way: the whole row again for each token, no cache, no calculator."""
    ids = list(prompt)
    stop = {tokenizer.special[ASSISTANT_END], tokenizer.bos}
    while len(ids) - len(prompt) < max_new_tokens and len(ids) <= model.arch.max_position_embeddings:
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


class Scripted(torch.nn.Module):
    """A model that says given tokens, whatever it reads: token i of its script after position `start + i`."""

    def __init__(self, model: GPT, script: Sequence[int], start: int) -> None:
        super().__init__()
        self.arch, self.compute_dtype, self.embed_tokens = model.arch, model.compute_dtype, model.embed_tokens
        self.rotary = model.rotary
        self.script, self.start = list(script), start
        self.seen: dict[int, int] = {}

    def forward(self, ids, *, cache, positions, length, last=None):  # type: ignore[no-untyped-def]
        if last is not None:
            ids, positions = ids[:, last], positions[:, last]
        logits = torch.zeros(ids.size(0), 1, self.arch.vocab_size)
        for row, (token, position) in enumerate(zip(ids[:, -1].tolist(), positions[:, -1].tolist(), strict=True)):
            self.seen[position] = token
            index = position - self.start
            logits[row, 0, self.script[index] if index < len(self.script) else 5] = 1.0
        return logits


def scripted_reply(
    model: GPT, tokenizer: Tokenizer, script: Sequence[str | int], sampling: Sampling | None = None
) -> tuple[Reply, Scripted]:
    """The reply of an engine whose model wants to say `script` (texts are encoded, specials given by name)."""
    ids: list[int] = []
    for piece in script:
        ids += [tokenizer.special[piece]] if piece in tokenizer.special else tokenizer.encode(str(piece))
    puppet = Scripted(model, ids, start=0)
    reply = Engine(puppet, tokenizer, 1).generate([[tokenizer.bos]], sampling or Sampling())[0]
    return reply, puppet


# -- the batch --------------------------------------------------------------------------------------------------------


def test_greedy_equals_decoding_without_cache(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 7, 20)
    replies = Engine(model, tokenizer, num_slots=7).generate(prompts, Sampling(max_new_tokens=12))
    assert [reply.ids for reply in replies] == [reference(model, tokenizer, p, 12) for p in prompts]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_slots_are_reused_and_change_nothing(random_model: MakeModel, tokenizer: Tokenizer, slots: int) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 12, 30)
    rng = random.Random(1)
    settings = [Sampling(max_new_tokens=rng.randint(1, 25)) for _ in prompts]
    replies = Engine(model, tokenizer, slots).generate(prompts, settings)
    expected = [reference(model, tokenizer, p, s.max_new_tokens) for p, s in zip(prompts, settings, strict=True)]
    assert [reply.ids for reply in replies] == expected


def test_sampling_does_not_depend_on_the_batch(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 6, 20)
    settings = [Sampling(temperature=0.8, top_k=20 if i % 2 else None, seed=i, max_new_tokens=15) for i in range(6)]
    together = Engine(model, tokenizer, 6).generate(prompts, settings)
    alone = [Engine(model, tokenizer, 1).generate([p], s)[0] for p, s in zip(prompts, settings, strict=True)]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    assert (
        Engine(model, tokenizer, 2).generate(prompts[:2], Sampling(temperature=0.8, seed=9))[0].ids != together[0].ids
    )


def test_prefill_in_several_groups(
    random_model: MakeModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 8, 30)
    monkeypatch.setattr(engine_module, "PREFILL_TOKENS", 40)
    replies = Engine(model, tokenizer, 8).generate(prompts, Sampling(max_new_tokens=6))
    assert [reply.ids for reply in replies] == [reference(model, tokenizer, p, 6) for p in prompts]


def test_requests_may_come_while_others_are_decoded(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 4, 20)
    engine = Engine(model, tokenizer, 2)
    found: dict[int, list[int]] = {}
    order = {}
    for index, prompt in enumerate(prompts):
        order[engine.submit(prompt, Sampling(max_new_tokens=10))] = index
        for output in engine.step():
            found.setdefault(order[output.request_id], []).append(output.token)
    while engine.busy:
        for output in engine.step():
            found.setdefault(order[output.request_id], []).append(output.token)
    assert [found[i] for i in range(4)] == [reference(model, tokenizer, p, 10) for p in prompts]


def test_cancel_frees_the_slot_and_leaves_the_others(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model()
    prompts = random_prompts(tokenizer, 3, 20, seed=4)
    engine = Engine(model, tokenizer, 2)
    ids = [engine.submit(prompt, Sampling(max_new_tokens=20)) for prompt in prompts]
    engine.step()
    engine.step()
    cancelled = engine.cancel(ids[0])
    assert cancelled is not None and cancelled.ids == reference(model, tokenizer, prompts[0], 2)
    assert engine.cancel(ids[0]) is None
    replies = {}
    while engine.busy:
        replies |= {o.request_id: o.reply.ids for o in engine.step() if o.reply}
    assert replies == {ids[i]: reference(model, tokenizer, prompts[i], 20) for i in (1, 2)}
    waiting = [engine.submit(prompt, Sampling()) for prompt in prompts]
    assert engine.cancel(waiting[2]).ids == []  # type: ignore[union-attr]


def test_training_goes_on_after_generation(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model().requires_grad_(True)
    Engine(model, tokenizer, 1).generate([[tokenizer.bos]], Sampling(max_new_tokens=2))
    ids = torch.zeros(1, 8, dtype=torch.long)
    model.loss(ids, ids).backward()
    assert model.embed_tokens.grad is not None


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [ASSISTANT_END, BOS])
def test_stop_tokens_end_the_reply_and_are_not_text(random_model: MakeModel, tokenizer: Tokenizer, stop: str) -> None:
    reply, _ = scripted_reply(random_model(), tokenizer, ["Hello you.", stop, "more"])
    assert (reply.text, reply.finish_reason) == ("Hello you.", "stop")
    assert reply.ids[-1] == tokenizer.special[stop]
    assert reply.parts == (Part("text", "Hello you."),)


def test_ends_at_the_limit_of_new_tokens(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    reply, _ = scripted_reply(random_model(), tokenizer, ["Hello you and all."], Sampling(max_new_tokens=2))
    assert (len(reply.ids), reply.finish_reason) == (2, "length")


@pytest.mark.parametrize("length", [1, 60, 63, 64])
def test_ends_at_the_end_of_the_context(random_model: MakeModel, tokenizer: Tokenizer, length: int) -> None:
    """The last token needs no place of its own: a prompt as long as the context still gets one."""
    model = random_model(T=64)
    puppet = Scripted(model, [], start=0)
    reply = Engine(puppet, tokenizer, 1).generate([[tokenizer.bos] * length], Sampling(max_new_tokens=500))[0]
    assert (len(reply.ids), reply.finish_reason) == (64 - length + 1, "length")
    assert max(puppet.seen) == 63


def test_prompts_that_cannot_be_decoded(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    engine = Engine(random_model(T=64), tokenizer, 1, capacity=32)
    with pytest.raises(ConfigError) as caught:
        engine.submit([1] * 33, Sampling())
    assert "33" in caught.value.cause and "32" in caught.value.cause
    with pytest.raises(ConfigError):
        engine.submit([], Sampling())
    with pytest.raises(ConfigError):
        Engine(random_model(T=64), tokenizer, 1, capacity=65)
    assert not engine.busy


# -- the calculator ---------------------------------------------------------------------------------------------------


def test_result_is_forced_over_what_the_model_says(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    wrong = [OUTPUT_START, "99", OUTPUT_END]
    script = ["Well ", PYTHON_START, "7+5", PYTHON_END, *wrong, "7 plus 5 is 12.", ASSISTANT_END]
    reply, puppet = scripted_reply(random_model(), tokenizer, script)
    assert reply.text == "Well 7 plus 5 is 12."
    assert reply.parts == (
        Part("text", "Well "),
        Part("python", "7+5"),
        Part("output", "12"),
        Part("text", "7 plus 5 is 12."),
    )
    forced = [tokenizer.special[OUTPUT_START], *tokenizer.encode("12"), tokenizer.special[OUTPUT_END]]
    first = reply.ids.index(tokenizer.special[PYTHON_END]) + 1
    assert reply.ids[first : first + len(forced)] == forced
    # One forward pass per token, and the model reads the forced tokens, not its own.
    assert [puppet.seen[i] for i in range(1, len(reply.ids))] == reply.ids[:-1]


@pytest.mark.parametrize("expression", ["7+", "1/0", "hello", "2**8"])
def test_failed_calculation_forces_nothing(random_model: MakeModel, tokenizer: Tokenizer, expression: str) -> None:
    script = [PYTHON_START, expression, PYTHON_END, OUTPUT_START, "99", OUTPUT_END, "So 99.", ASSISTANT_END]
    reply, _ = scripted_reply(random_model(), tokenizer, script)
    assert reply.parts == (Part("python", expression), Part("output", "99"), Part("text", "So 99."))


def test_rendering_the_parts_gives_the_same_tokens(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    """So a reply in the history looks to the model as what it said."""
    script = [PYTHON_START, "7+5", PYTHON_END, OUTPUT_START, "12", OUTPUT_END, "7 plus 5 is 12.", ASSISTANT_END]
    reply, _ = scripted_reply(random_model(), tokenizer, script)
    user = Message("user", (Part("text", "What is 7 plus 5?"),))
    first = render_prompt(tokenizer, (user,))
    second = render_prompt(tokenizer, (user, Message("assistant", reply.parts), user))
    assert second[: len(first) + len(reply.ids)] == first + reply.ids


# -- text -------------------------------------------------------------------------------------------------------------


def test_streamed_text_is_the_reply(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    pieces: dict[int, str] = {}
    replies = Engine(random_model(), tokenizer, 4).generate(
        random_prompts(tokenizer, 6, 10),
        Sampling(temperature=1.5, max_new_tokens=20),
        lambda index, output: pieces.update({index: pieces.get(index, "") + output.text}),
    )
    assert [reply.text for reply in replies] == [pieces[i] for i in range(6)]


def test_characters_split_over_tokens(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("é€")) > 2
    reply, _ = scripted_reply(random_model(), tokenizer, ["é€", ASSISTANT_END])
    assert reply.text == "é€"
    cut, _ = scripted_reply(random_model(), tokenizer, ["€"], Sampling(max_new_tokens=1))
    assert cut.text == "\ufffd"


def test_require_text_waits_for_something_visible(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    model = random_model()
    silent, _ = scripted_reply(model, tokenizer, [ASSISTANT_END])
    assert silent.text == ""
    reply, _ = scripted_reply(model, tokenizer, [ASSISTANT_END, ASSISTANT_END], Sampling(require_text=True))
    assert reply.text.strip() and reply.finish_reason == "stop"


def test_require_text_ends_a_tool_call_that_does_not(random_model: MakeModel, tokenizer: Tokenizer) -> None:
    script = [PYTHON_START, *["1+"] * 40]
    reply, _ = scripted_reply(random_model(), tokenizer, script, Sampling(require_text=True))
    assert reply.text.strip()
