"""What stock llama.cpp makes of a GGUF file, beside what our own model says."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from picollm.data.conversations import Message, Part
from picollm.export import parity
from picollm.export.folding import Checkpoint
from picollm.export.gguf_types import Quant
from picollm.export.heap import trim
from picollm.export.held_out import held_out_rows
from picollm.export.llamacpp import INSTALL, version
from picollm.export.llamacpp_ask import Answer, Question, Trouble, ask
from picollm.export.logits import Native
from picollm.export.parity import Check, not_run
from picollm.export.strings import STRINGS
from picollm.hardware import detect
from picollm.tokenizer.chat_format import render_prompt
from picollm.tokenizer.special import ASSISTANT_END
from picollm.tokenizer.tokenizer import Tokenizer

POSITIONS = 256
# Numbers that the server sends as text, some 70,000 a second: with a large vocabulary only every few positions are
# compared in full, the others by their most likely token.
FULL_ENTRIES = 1 << 19
REPLY_TOKENS = 48
# llama.cpp's threads wait for each other by spinning, several times a layer: one that shares its core with another
# program holds all of them up (ten times slower on two busy cores), and the server itself needs a core now and then.
SHARE_OF_THREADS = 2
# float32 sums in another order may swap two tokens that are as likely.
TIE = 2 * parity.MAX_LOGIT_ERROR
# The rounding of float32 grows with the logits: larger ones than this may be off by as much more.
USUAL_LOGIT = 32.0
# Probabilities below this are zero in the server's float32.
LEAST_LOG_PROB = -80.0

CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "Who are you?"),),
    (("user", "What is 7 plus 5?"),),
    (("system", "Answer briefly."), ("user", "Hello!")),
    (("user", "How many r are in strawberry?"), ("assistant", "There are 3."), ("user", "And in cherry?\n\n  Say it.")),
)
OPENINGS = ("Once upon a time", "The", "def f(x):\n", "One day")

_ROWS = (
    ("llama.cpp loads it", "yes"),
    ("token ids", "0 differ"),
    ("log-probabilities, largest difference", "as our model"),
    ("KL, nats per token", "as our model"),
    ("argmax agreement", "as our model"),
    ("chat prompt", "0 differ"),
    ("greedy replies", "as our model"),
    ("end of turn", "all replies"),
)


def checks(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, quant: Quant) -> list[Check]:
    """The rows of the table that need the runtime; all of them `not run` without one."""
    found = version()
    if found is None:
        return _not_run(f"llama.cpp is not installed; {INSTALL} and export again with `--force`")
    question, source = _question(path, checkpoint, tokenizer)
    trim()
    answer = ask(question)
    if isinstance(answer, Trouble):
        if answer.killed and not quant.is_float and _has_amx():
            return _not_run("broken AMX: this CPU promises instructions that end llama.cpp's process")
        if answer.unusable:
            return _not_run(answer.text)
        return [Check("llama.cpp loads it", answer.text, "yes", False, f"xllamacpp {found}")]
    # One row more of our model for each reply: greedy is its most likely token each time.
    native = Native(checkpoint, [*question.rows, *_padded(answer)])
    trim()
    return [
        Check("llama.cpp loads it", "yes", "yes", True, f"xllamacpp {found}"),
        _tokens(answer, tokenizer),
        *_probabilities(answer, native, quant, source),
        *_prompts(answer, question),
        *_replies(answer, native, len(question.rows), checkpoint, tokenizer, quant),
    ]


def _not_run(why: str) -> list[Check]:
    return [not_run(name, bound, why) for name, bound in _ROWS]


def _has_amx() -> bool:
    return any(flag.startswith("amx") for flag in detect().cpu_flags)


def _question(path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer) -> tuple[Question, str]:
    """What llama.cpp is asked, and where the held-out text comes from."""
    arch = checkpoint.arch
    # Room for the token after a row's last position, which the server generates, and for the longest conversation.
    context = min(arch.max_position_embeddings, POSITIONS + REPLY_TOKENS)
    rows, source = held_out_rows(checkpoint.stage, tokenizer, length=min(context - 1, POSITIONS), positions=POSITIONS)
    if checkpoint.stage.name == "pretrain":
        conversations, prompts = [], [[tokenizer.bos, *tokenizer.encode(text)] for text in OPENINGS]
    else:
        conversations = [[{"role": role, "content": text} for role, text in turns] for turns in CONVERSATIONS]
        prompts = [render_prompt(tokenizer, _messages(turns)) for turns in CONVERSATIONS]
    question = Question(
        path=str(path),
        context=context,
        threads=max(1, torch.get_num_threads() // SHARE_OF_THREADS),
        vocab_size=arch.vocab_size,
        rows=rows,
        step=-(-POSITIONS * arch.vocab_size // FULL_ENTRIES),
        conversations=conversations,
        prompts=prompts,
        reply_tokens=REPLY_TOKENS,
    )
    return question, source


def _messages(turns: Sequence[tuple[str, str]]) -> tuple[Message, ...]:
    return tuple(Message(role, (Part("text", text),)) for role, text in turns)  # type: ignore[arg-type]


def _padded(answer: Answer) -> list[list[int]]:
    """Prompts with their replies, all as long as the longest: what comes after a position does not change it."""
    rows = [[*prompt, *reply] for prompt, reply, _ in answer.replies]
    longest = max(map(len, rows), default=0)
    return [row + [0] * (longest - len(row)) for row in rows]


def _tokens(answer: Answer, tokenizer: Tokenizer) -> Check:
    different = [text for text, ids in zip(STRINGS, answer.strings, strict=True) if ids != tokenizer.encode(text)]
    shown = f"first: {different[0]!r}" if different else f"{len(STRINGS)} strings"
    return Check("token ids", f"{len(different)} differ", "0 differ", not different, shown)


def _probabilities(answer: Answer, native: Native, quant: Quant, source: str) -> list[Check]:
    exact = quant.name == "F32"
    best = [(row, at, int(found.argmax())) for (row, at), found in zip(answer.full, answer.log_probs, strict=True)]
    chosen = [*best, *answer.best]
    leads, largest_logit = native.leads(chosen)
    bound = parity.MAX_LOGIT_ERROR * max(1.0, largest_logit / USUAL_LOGIT)
    largest = kl = 0.0
    for logits, found in zip(native.logits(answer.full), answer.log_probs, strict=True):
        ours = logits.double().log_softmax(-1)
        # What is too unlikely for the server's float32 is compared no closer than that.
        theirs = torch.from_numpy(found).clamp(min=LEAST_LOG_PROB)
        error = (ours.clamp(min=LEAST_LOG_PROB) - theirs).abs().max()
        largest = max(largest, float("inf") if error.isnan() else float(error))
        kl += float((ours.exp() * (ours - theirs.log_softmax(-1))).sum()) / len(answer.full)
    agreed = int((leads <= (TIE if exact else 0.0)).sum())
    where = f"{len(answer.full)} positions, {source}"
    return [
        _bounded("log-probabilities, largest difference", largest, bound if exact else None, where),
        _bounded("KL, nats per token", kl, quant.max_kl, where),
        Check(
            "argmax agreement",
            round(agreed / len(chosen), 4),
            "100%" if exact else "reported",
            agreed == len(chosen) if exact else True,
            f"{len(chosen)} positions, {source}",
        ),
    ]


def _prompts(answer: Answer, question: Question) -> list[Check]:
    if not question.conversations:
        return []
    different = sum(made != wanted for made, wanted in zip(answer.rendered, question.prompts, strict=True))
    number = f"{len(question.conversations)} conversations"
    return [Check("chat prompt", f"{different} differ", "0 differ", not different, number)]


def _bounded(name: str, value: float, bound: float | None, note: str) -> Check:
    passed = bound is None or value <= bound  # a NaN is no pass
    return Check(name, float(f"{value:.3g}"), "reported" if bound is None else f"<= {bound:g}", passed, note)


def _replies(
    answer: Answer, native: Native, first: int, checkpoint: Checkpoint, tokenizer: Tokenizer, quant: Quant
) -> list[Check]:
    """Greedy replies, and that they end where ours end.

    Args:
        first: number of the first prompt with its reply among the rows of `native`.
    """
    count = len(answer.replies)
    if not count:
        why = f"the context of {checkpoint.arch.max_position_embeddings} tokens has no room for a conversation"
        return [not_run(name, bound, why) for name, bound in _ROWS[-2:]]
    exact = quant.name == "F32"
    choices = [
        (row, at, token)
        for row, (prompt, reply, _) in enumerate(answer.replies, start=first)
        for at, token in enumerate(reply, start=len(prompt) - 1)
    ]
    leads, _ = native.leads(choices)
    same = sum(
        bool((part <= (TIE if exact else 0.0)).all())
        for part in leads.split([len(reply) for _, reply, _ in answer.replies])
    )
    ends = {tokenizer.bos}
    if checkpoint.stage.name != "pretrain":
        ends.add(tokenizer.special[ASSISTANT_END])
    well_ended = sum(
        not ends & set(reply[:-1]) and stopped == (bool(reply) and reply[-1] in ends)
        for _, reply, stopped in answer.replies
    )
    stopped = sum(stopped for _, _, stopped in answer.replies)
    return [
        Check(
            "greedy replies", f"{same} of {count} are ours", f"{count} of {count}" if exact else "reported",
            same == count if exact else True, f"up to {REPLY_TOKENS} tokens, without the calculator",
        ),
        Check(
            "end of turn", f"{well_ended} of {count}", f"{count} of {count}", well_ended == count,
            f"{stopped} replies ended by themselves",
        ),
    ]  # fmt: skip
