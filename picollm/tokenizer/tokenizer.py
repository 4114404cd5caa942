"""A trained tokenizer: text to ids and back, the bytes behind each id, and its four files."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import tokenizers

from picollm.errors import IntegrityError, MissingArtifact
from picollm.files import write_atomic, write_json
from picollm.run_dir import StageDir
from picollm.tokenizer.special import ASSISTANT_END, BOS, SPECIALS, SPLIT_PATTERNS, Digits

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
BYTES_FILE = "token_bytes.json"

# The regex engine gives up (and panics) when it backtracks through some ten million white-space characters, so longer
# runs are cut; only the tokens of such a run change.
MAX_SPACE_RUN = 1_000_000


def byte_alphabet() -> dict[str, int]:
    """Character of `tokenizer.json` -> the byte it stands for (GPT-2's table, Radford et al. 2019).

    Visible Latin-1 characters stand for themselves, the other 68 bytes for U+0100 onwards in their order.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Tokenizer:
    """Byte-level BPE with nine special tokens at the end of the vocabulary.

    Args:
        tokenizer_json: bytes of a `tokenizer.json` as `picollm.tokenizer.train` makes it.

    Raises:
        ValueError: the bytes are not such a file.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self._backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"it does not parse as a tokenizer: {error}") from error
        # Otherwise a user could write `<|assistant_start|>` and speak as the assistant.
        self._backend.encode_special_tokens = True
        self._json = tokenizer_json
        self._digits = _digits_of(tokenizer_json)
        self._bytes = self._bytes_by_id()

    def _bytes_by_id(self) -> list[bytes]:
        size = self._backend.get_vocab_size(with_added_tokens=True)
        tokens = [self._backend.id_to_token(i) for i in range(size)]
        if tuple(tokens[-len(SPECIALS) :]) != SPECIALS:
            raise ValueError("its last tokens are not picollm's nine special tokens")
        alphabet = byte_alphabet()
        try:
            pieces = [bytes(alphabet[character] for character in token) for token in tokens[: -len(SPECIALS)]]
        except (KeyError, TypeError):
            raise ValueError("its tokens are not byte-level") from None
        return pieces + [b""] * len(SPECIALS)

    # -- what it is ---------------------------------------------------------------------------------------------------

    @property
    def json(self) -> bytes:
        """The bytes of `tokenizer.json`: everything needed to make the same tokenizer in another process."""
        return self._json

    @property
    def vocab_size(self) -> int:
        """Tokens in all, the nine specials included."""
        return len(self._bytes)

    @cached_property
    def sha256(self) -> str:
        """Hash of the bytes of `tokenizer.json`: the tokenizer's identity in recipes and checkpoints."""
        return hashlib.sha256(self._json).hexdigest()

    @cached_property
    def special(self) -> dict[str, int]:
        """Text of each special token -> its id."""
        first = self.vocab_size - len(SPECIALS)
        return {text: first + i for i, text in enumerate(SPECIALS)}

    @property
    def bos(self) -> int:
        return self.special[BOS]

    @property
    def digits(self) -> Digits:
        """Digits that may stand in one token; 2 is what GGUF has no word for (`picollm.plan.exports`)."""
        return self._digits

    @cached_property
    def token_bytes(self) -> list[int]:
        """Raw bytes behind each id, 0 for specials; their sum over a text's ids is the text's length in UTF-8."""
        return [len(piece) for piece in self._bytes]

    def id_to_bytes(self, token: int) -> bytes:
        """The raw bytes of one id, which need not be whole characters; empty for specials.

        Raises:
            IndexError: there is no such id.
        """
        if token < 0:
            raise IndexError(f"token id {token} is negative")
        return self._bytes[token]

    # -- text to ids and back -----------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Text that looks like a special token is text: the result never holds a special id.

        Raises:
            ValueError: the text holds a lone surrogate, so it has no UTF-8.
        """
        if len(text) > MAX_SPACE_RUN:
            return list(chain.from_iterable(self._encode_batch(list(cut_space_runs(text)))))
        return self._encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode`, with as many threads as the library takes (`RAYON_NUM_THREADS`)."""
        if any(len(text) > MAX_SPACE_RUN for text in texts):
            return [self.encode(text) for text in texts]
        return self._encode_batch(texts)

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            # The fast variant leaves out offsets, which nobody here reads.
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError as error:
            raise ValueError(f"text cannot be encoded as UTF-8: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids without special tokens; bytes that are no UTF-8 become U+FFFD.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        return b"".join(map(self.id_to_bytes, ids)).decode("utf-8", "replace")

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> list[Path]:
        """Write the four files, each whole or not at all, and return their paths.

        Raises:
            HostError: the folder cannot be written.
        """
        from picollm.tokenizer.chat_format import CHAT_TEMPLATE

        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": ASSISTANT_END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        write_atomic(folder / TOKENIZER_FILE, self._json)
        write_json(folder / CONFIG_FILE, config)
        write_atomic(folder / TEMPLATE_FILE, CHAT_TEMPLATE)
        write_atomic(folder / BYTES_FILE, json.dumps(self.token_bytes, separators=(",", ":")) + "\n")
        return [folder / name for name in (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE, BYTES_FILE)]

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json` from a folder; its hash is compared with the folder's `STAGE.json` where there is one.

        Raises:
            MissingArtifact: there is no tokenizer; the hint carries the command that makes it.
            IntegrityError: the file is torn, changed since it was recorded, or some other tokenizer.
        """
        path = folder / TOKENIZER_FILE
        in_run = folder.name == "tokenizer"
        command = f"picollm tokenizer train --run {folder.parent.name}" if in_run else "picollm tokenizer train"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingArtifact(
                f"no tokenizer in run `{folder.parent.name}`" if in_run else f"no tokenizer in `{folder}`",
                cause=f"`{path}` does not exist",
                hint=f"make it with `{command}`",
            ) from None
        hint = f"make it again from the same text with `{command}`"
        record = StageDir(folder).record()
        if record is not None:
            expected = record["outputs"][TOKENIZER_FILE]["sha256"]
            if (found := hashlib.sha256(data).hexdigest()) != expected:
                raise IntegrityError(
                    f"`{path}` is not the file that was recorded",
                    cause=f"its sha256 is {found[:12]}…, `STAGE.json` says {expected[:12]}…",
                    hint=hint,
                )
        try:
            return cls(data)
        except ValueError as error:
            raise IntegrityError(f"`{path}` is not a tokenizer of picollm", cause=str(error), hint=hint) from error


def _digits_of(tokenizer_json: bytes) -> Digits:
    """Which of picollm's two pipelines a `tokenizer.json` has; text must be cut the same way by every reader of it.

    Raises:
        ValueError: neither.
    """
    data = json.loads(tokenizer_json)
    splits = [data.get("normalizer"), data.get("pre_tokenizer")]
    for digits, pattern in SPLIT_PATTERNS.items():
        if splits == [None, split_pipeline(pattern)]:
            return digits
    raise ValueError("it splits text in a way of its own, not by one of picollm's two regexes")


def split_pipeline(pattern: str) -> dict[str, object]:
    """The `pre_tokenizer` of a `tokenizer.json`: cut by a regex, then bytes as characters."""
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False},
        ],
    }


class StreamDecoder:
    """Turns ids into text as they come; a character split over several ids appears when its last byte does.

    The concatenation of everything returned, `flush` included, equals `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that this id completes, often empty. Bytes that can no longer become a character are U+FFFD."""
        return self._decoder.decode(self._tokenizer.id_to_bytes(token))

    def flush(self) -> str:
        """What is still held back, as U+FFFD, when no more ids will come; the decoder can then be used again."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def cut_space_runs(text: str) -> Iterator[str]:
    """The text in pieces, cut inside white-space runs longer than `MAX_SPACE_RUN`; usually one piece."""
    start = 0
    for run in re.finditer(r"\s+", text):
        for cut in range(run.start() + MAX_SPACE_RUN, run.end(), MAX_SPACE_RUN):
            yield text[start:cut]
            start = cut
    yield text[start:]
