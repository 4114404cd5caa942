"""Prompts to token streams: a batch of slots that requests enter and leave while others are being decoded.

Live rows always stand at the front of the cache, so a step works on a view of it that is as short (rows and keys) as
the live rows allow. Rows are independent: positions, sampler, stop tokens and calculator belong to the row, and a
request decodes to the same tokens whatever else is in the batch (up to the rounding of a matrix product).

Letters: B live rows, T time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from picollm.data.conversations import Part
from picollm.errors import ConfigError
from picollm.generate.sampler import Sampling, choose
from picollm.generate.tools import calculate
from picollm.model.gpt import GPT
from picollm.model.kv_cache import KVCache
from picollm.tokenizer.special import (
    ASSISTANT_END,
    BOS,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
)
from picollm.tokenizer.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["stop", "length"]

# Tokens of a tool call after which a reply that still owes visible text gives it up.
LONGEST_CALL = 32
# Prompt tokens, padding included, in one forward pass: bounds the memory of a prefill (scores are tokens x length).
PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Reply:
    """What a request decoded to.

    Attributes:
        ids: every decoded token, those forced by the calculator and the stop token included.
        text: visible text, without tool blocks and special tokens.
        finish_reason: `stop` at the end of the turn, `length` at the limit of new tokens or of the context.
        parts: the same in order, with tool blocks as `python` and `output` parts.
    """

    ids: list[int]
    text: str
    finish_reason: FinishReason
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class StepOutput:
    """One request's progress in one step: `text` is what became visible, `reply` is set with the last token."""

    request_id: int
    token: int
    text: str
    reply: Reply | None


@dataclass(slots=True, eq=False)
class _Row:
    """A live request. `position` is where `token`, decoded last, goes in the cache with the next step."""

    request_id: int
    prompt: list[int]
    sampling: Sampling
    decoder: StreamDecoder
    generator: torch.Generator | None
    position: int = 0
    token: int = -1
    ids: list[int] = field(default_factory=list)
    parts: list[tuple[str, list[str]]] = field(default_factory=list)
    kind: Literal["text", "python", "output"] = "text"
    expression: list[int] = field(default_factory=list)
    forced: deque[int] = field(default_factory=deque)
    has_text: bool = False
    blocks: int = 0

    def add(self, text: str) -> None:
        """Append decoded text to the part it belongs to."""
        if text:
            if not self.parts or self.parts[-1][0] != self.kind:
                self.parts.append((self.kind, []))
            self.parts[-1][1].append(text)
            self.has_text = self.has_text or (self.kind == "text" and not text.isspace())

    def reply(self, finish_reason: FinishReason) -> Reply:
        parts = tuple(Part(kind, "".join(pieces)) for kind, pieces in self.parts)
        text = "".join(part.text for part in parts if part.kind == "text")
        return Reply(self.ids, text, finish_reason, parts)


class Engine:
    """Decodes up to `num_slots` requests at a time; the others wait their turn.

    Args:
        model: weights in the type to compute in; it is used, not copied.
        num_slots: rows decoded together.
        capacity: context in tokens, prompt and reply together; the model's T unless told.

    Raises:
        ConfigError: `capacity` is more than the model was trained with.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, num_slots: int, capacity: int | None = None) -> None:
        longest = model.arch.max_position_embeddings
        if capacity is not None and not 1 <= capacity <= longest:
            raise ConfigError(f"a context of {capacity} tokens does not fit the model", cause=f"it has {longest}")
        self.model = model
        self.tokenizer = tokenizer
        self.num_slots = num_slots
        self.capacity = capacity or longest
        self.device = model.embed_tokens.device
        self._cache = KVCache(model.arch, num_slots, self.capacity, dtype=model.compute_dtype, device=self.device)
        self._view = self._cache.view(0, 0)
        # A table made inside inference mode could not be used by a training step later.
        model.rotary(self.capacity)
        special = tokenizer.special
        self._special = frozenset(special.values())
        self._stop = frozenset((special[ASSISTANT_END], special[BOS]))
        self._python_start, self._python_end = special[PYTHON_START], special[PYTHON_END]
        self._output_start, self._output_end = special[OUTPUT_START], special[OUTPUT_END]
        self._banned_in_block = torch.tensor(sorted(self._special - {self._python_end}), device=self.device)
        self._banned_after_block = torch.tensor(sorted(self._special), device=self.device)
        self._banned_before_text = torch.tensor(sorted(self._special - {self._python_start}), device=self.device)
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._next_id = 0

    # -- requests ---------------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """True while a request is waiting or being decoded."""
        return bool(self._rows or self._waiting)

    def submit(self, prompt_ids: Sequence[int], sampling: Sampling) -> int:
        """Queue a prompt; the id names it in the outputs of `step`.

        Raises:
            ConfigError: the prompt is empty, or longer than the context.
        """
        if not prompt_ids:
            raise ConfigError("a prompt needs at least one token", cause="it is empty")
        if len(prompt_ids) > self.capacity:
            raise ConfigError(
                "the prompt does not fit the context",
                cause=f"it has {len(prompt_ids)} tokens, the context {self.capacity}",
                hint="shorten it",
            )
        self._next_id += 1
        decoder = StreamDecoder(self.tokenizer)
        self._waiting.append(_Row(self._next_id, list(prompt_ids), sampling, decoder, sampling.generator()))
        return self._next_id

    def cancel(self, request_id: int) -> Reply | None:
        """Drop a request and free its slot; returns what it decoded so far, None when it is not (or no longer) here."""
        for row in self._waiting:
            if row.request_id == request_id:
                self._waiting.remove(row)
                return row.reply("length")
        for index, row in enumerate(self._rows):
            if row.request_id == request_id:
                row.add(row.decoder.flush())
                self._release([index])
                return row.reply("length")
        return None

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        on_token: Callable[[int, StepOutput], None] | None = None,
    ) -> list[Reply]:
        """Decode all prompts, in their order, on an engine that is otherwise idle.

        Args:
            sampling: for every prompt, or one each (several samples of one prompt need seeds of their own).
            on_token: called with the prompt's index and each output as it comes.
        """
        assert not self.busy, "generate() would lose the outputs of other requests"
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        index_of = {self.submit(p, s): i for i, (p, s) in enumerate(zip(prompts, settings, strict=True))}
        replies: dict[int, Reply] = {}
        try:
            while self.busy:
                for output in self.step():
                    index = index_of[output.request_id]
                    if output.reply is not None:
                        replies[index] = output.reply
                    if on_token is not None:
                        on_token(index, output)
        except BaseException:
            self._rows.clear()
            self._waiting.clear()
            raise
        return [replies[index] for index in range(len(prompts))]

    # -- decoding ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """Decode one token for every live request, then let waiting ones into the free slots.

        A request that enters is prefilled and yields its first token in the same step. At most one output each.
        """
        outputs: list[StepOutput] = []
        if self._rows:
            count = len(self._rows)
            if self._view.batch != count:
                self._view = self._cache.view(0, count)
            ids = torch.tensor([[row.token] for row in self._rows], device=self.device)  # (B, 1)
            positions = torch.tensor([[row.position] for row in self._rows], device=self.device)
            length = max(row.position for row in self._rows) + 1
            logits = self.model(ids, cache=self._view, positions=positions, length=length)[:, -1]
            for row in self._rows:
                row.position += 1
            outputs += self._advance(self._rows, logits)
            self._release([index for index, output in enumerate(outputs) if output.reply is not None])
        if self._waiting and len(self._rows) < self.num_slots:
            outputs += self._admit()
        return outputs

    def _admit(self) -> list[StepOutput]:
        """Prefill waiting requests into the free slots, several in one pass, shortest first to save padding."""
        free = self.num_slots - len(self._rows)
        new = sorted((self._waiting.popleft() for _ in range(min(free, len(self._waiting)))), key=_prompt_length)
        outputs: list[StepOutput] = []
        while new:
            taken = 1
            while taken < len(new) and (taken + 1) * len(new[taken].prompt) <= PREFILL_TOKENS:
                taken += 1
            group, new = new[:taken], new[taken:]
            longest = len(group[-1].prompt)
            # Padding stands right of a prompt, at positions that its row has not reached: invisible to its tokens,
            # and overwritten before the row gets there. Which token pads is of no matter.
            ids = torch.tensor([row.prompt + [0] * (longest - len(row.prompt)) for row in group], device=self.device)
            last = torch.tensor([len(row.prompt) - 1 for row in group], device=self.device)
            positions = torch.arange(longest, device=self.device).expand(len(group), -1)  # (B, T)
            start = len(self._rows)
            view = self._cache.view(start, start + len(group))
            logits = self.model(ids, cache=view, positions=positions, length=longest, last=last)[:, -1]
            for row in group:
                row.position = len(row.prompt)
            self._rows += group
            ended = self._advance(group, logits)
            self._release([start + index for index, output in enumerate(ended) if output.reply is not None])
            outputs += ended
        return outputs

    def _release(self, indices: list[int]) -> None:
        """Free slots; the last live rows move into the holes, so that live rows stay in front."""
        for index in sorted(indices, reverse=True):
            mover = self._rows.pop()
            if index < len(self._rows):
                self._cache.move(len(self._rows), index, mover.position)
                self._rows[index] = mover

    def _advance(self, rows: list[_Row], logits: torch.Tensor) -> list[StepOutput]:
        """Choose the next token of each row and move its state on."""
        for index, row in enumerate(rows):
            if row.sampling.require_text and not row.has_text and not row.forced:
                self._keep_open(row, logits[index])
        tokens = choose(logits, [row.sampling for row in rows], [row.generator for row in rows])
        outputs = []
        for row, chosen in zip(rows, tokens, strict=True):
            token = row.forced.popleft() if row.forced else chosen
            text, stopped = self._take(row, token)
            reason: FinishReason | None = None
            if stopped:
                reason = "stop"
            elif len(row.ids) >= row.sampling.max_new_tokens or row.position >= self.capacity:
                reason = "length"
                text += self._flush(row)
            outputs.append(StepOutput(row.request_id, token, text, row.reply(reason) if reason else None))
        return outputs

    def _take(self, row: _Row, token: int) -> tuple[str, bool]:
        """Add a token to a row. Returns the text that became visible and whether the reply ended."""
        row.token = token
        row.ids.append(token)
        if token not in self._special:
            if row.kind == "python":
                row.expression.append(token)
            piece = row.decoder.push(token)
            row.add(piece)
            return (piece if row.kind == "text" else ""), False
        text = self._flush(row)
        if token == self._python_start:
            row.kind = "python"
            row.expression.clear()
        elif token == self._output_start:
            row.kind = "output"
        elif token == self._python_end and row.kind == "python":
            row.kind = "text"
            row.blocks += 1
            # The chosen tokens of the next steps are replaced, not the steps: the model sees the result as its own.
            if (result := calculate(self.tokenizer.decode(row.expression))) is not None:
                row.forced.extend((self._output_start, *self.tokenizer.encode(result), self._output_end))
        elif token in (self._python_end, self._output_end):
            row.kind = "text"
        return text, token in self._stop

    def _flush(self, row: _Row) -> str:
        """Bytes of an unfinished character become a replacement character; returns it where it is visible."""
        piece = row.decoder.flush()
        row.add(piece)
        return piece if row.kind == "text" else ""

    def _keep_open(self, row: _Row, logits: torch.Tensor) -> None:
        """Rule out, in place, the tokens that would end a reply without visible text or keep it from coming.

        One tool block may come first; one that runs on is closed.
        """
        if row.kind == "text":
            logits[self._banned_after_block if row.blocks else self._banned_before_text] = -torch.inf
            return
        logits[self._banned_in_block] = -torch.inf
        if len(row.expression) >= LONGEST_CALL:
            row.forced.append(self._python_end)


def _prompt_length(row: _Row) -> int:
    return len(row.prompt)
