"""Training: texts in, a byte-level BPE tokenizer out. The same texts give the same bytes of `tokenizer.json`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from picollm.errors import ConfigError
from picollm.tokenizer.special import SPECIALS, SPLIT_PATTERNS, Digits
from picollm.tokenizer.tokenizer import Tokenizer

MIN_VOCAB_SIZE = 256 + len(SPECIALS)
PROGRESS_EVERY_S = 0.1
# The trainer's time is quadratic in the length of a word; a line of a million spaces would take it hours.
PIECE_CHARS = 10_000


def capped(texts: Iterable[str], *, max_chars: int, doc_chars: int) -> Iterator[str]:
    """The first `doc_chars` characters of each text until `max_chars` have been given; empty texts are left out."""
    left = max_chars
    for text in texts:
        if piece := text[: min(doc_chars, left)]:
            yield piece
            left -= len(piece)
        if left <= 0:
            return


def train(
    texts: Iterator[str],
    vocab_size: int,
    *,
    digits: Digits = 1,
    on_progress: Callable[[int], None] | None = None,
) -> Tokenizer:
    """Learn merges from texts until the vocabulary is full or no pair of tokens occurs twice.

    The library asks for texts on threads of its own and does not look at signals while it works. So it runs beside
    the caller's thread, which stays free for Ctrl-C and progress; after Ctrl-C the next text is refused.

    Args:
        texts: training text; read once, on another thread. Its exceptions reach the caller.
        vocab_size: tokens wanted in all, the nine specials included; the result may have fewer.
        digits: that may stand in one token.
        on_progress: called about ten times a second, on the caller's thread, with the characters read so far.

    Raises:
        ConfigError: `vocab_size` has no room for 256 bytes and nine specials, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"`tokenizer.vocab_size` is {vocab_size:,}",
            cause=f"256 bytes and {len(SPECIALS)} special tokens need {MIN_VOCAB_SIZE}",
            hint="raise it, for example `--set tokenizer.vocab_size=1024`",
        )
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[digits]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        # A pair seen once says nothing about other text; its place would stay an untrained row of the model.
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )

    stop = threading.Event()
    num_chars = 0
    failure: list[BaseException] = []

    def feed() -> Iterator[str]:
        nonlocal num_chars
        for text in texts:
            if stop.is_set():
                return
            num_chars += len(text)
            yield from (text[start : start + PIECE_CHARS] for start in range(0, len(text), PIECE_CHARS))

    def work() -> None:
        try:
            backend.train_from_iterator(feed(), trainer)
        except BaseException as error:
            failure.append(error)

    worker = threading.Thread(target=work, name="tokenizer-training", daemon=True)
    try:
        worker.start()  # inside, because Ctrl-C may come before it returns
        while worker.is_alive():
            worker.join(PROGRESS_EVERY_S)
            if on_progress:
                on_progress(num_chars)
        if on_progress:
            on_progress(num_chars)  # it may have ended before the first look
    except BaseException:
        stop.set()
        if worker.is_alive():
            worker.join(5.0)  # it ends at the next text; while merging it cannot be told, and dies with the process
        raise
    if failure:
        raise failure[0]
    if num_chars == 0:
        raise ConfigError(
            "there is no text to train a tokenizer on",
            cause="every document is empty",
            hint="look at the dataset with `picollm data show NAME`",
        )
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return Tokenizer(backend.to_str(pretty=True).encode())
