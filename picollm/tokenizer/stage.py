"""The tokenizer of a run: trained on the training split of its dataset, in the command's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from typing import Any

from picollm.config.schema import RunConfig
from picollm.data import datasets
from picollm.data.conversations import Conversation
from picollm.errors import ConfigError
from picollm.run_dir import RunDir, StageDir, sha256_file, sha256_json
from picollm.tokenizer.train import capped, train


def train_stage(
    run: RunDir, config: RunConfig, *, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Train the run's tokenizer unless it is there already, and return the stage's record.

    Only the training split is read, up to `tokenizer.max_chars`. A run on the toy world also reads the toy world's
    conversations, so that what fine-tuning says has tokens too. A tokenizer that is damaged, or was made from other
    text, is moved to `old/` and made again; nothing is deleted.

    Args:
        on_progress: called with characters read and an upper bound of what will be read; equal at the end.

    Raises:
        ConfigError: the dataset holds no text to train on, or is one of conversations.
        MissingArtifact: the dataset does not exist.
        IntegrityError: a shard of it is not as recorded.
    """
    sources = [datasets.ensure(config.data.dataset, base=run.base)]
    if sources[0].kind != "text":
        raise ConfigError(
            f"dataset `{sources[0].name}` holds {sources[0].kind}, not text",
            cause="`data.dataset` is what pretraining and the tokenizer read",
            hint="name a dataset of text with `--set data.dataset=NAME`; `picollm data list` shows the kinds",
        )
    if sources[0].name == datasets.TOY_WORLD:
        sources.append(datasets.ensure(datasets.TOY_WORLD_CHAT, base=run.base))
    wanted = config.tokenizer
    recipe = {
        "data": {source.name: source.sha256 for source in sources},
        "vocab_size": wanted.vocab_size,
        "max_chars": wanted.max_chars,
        "doc_chars": wanted.doc_chars,
    }
    inputs = {"recipe": sha256_json(recipe)}

    stage = StageDir(run.tokenizer)
    record = stage.record()
    if record is not None:
        if stage.is_done(inputs) and _is_intact(stage, record):
            return record
        run.move_to_old([stage.name])

    expected = min(wanted.max_chars, sum(source.chars("train") for source in sources))
    counts = {"documents": 0, "chars": 0}

    def texts() -> Iterator[str]:
        every = _alternate(*(_training_texts(source) for source in sources))
        for text in capped(every, max_chars=wanted.max_chars, doc_chars=wanted.doc_chars):
            counts["documents"] += 1
            counts["chars"] += len(text)
            yield text

    if expected == 0:
        raise _no_text(sources[0].name)
    tokenizer = train(
        texts(),
        wanted.vocab_size,
        on_progress=on_progress and (lambda done: on_progress(done, max(done, expected))),
    )
    if on_progress:
        on_progress(counts["chars"], counts["chars"])
    files = tokenizer.save(stage.path)
    result = {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, **counts}
    return stage.write_record(inputs, files, result)


def _is_intact(stage: StageDir, record: dict[str, Any]) -> bool:
    return all(sha256_file(stage.path / name) == entry["sha256"] for name, entry in record["outputs"].items())


def _training_texts(dataset: datasets.Dataset) -> Iterable[str]:
    if dataset.kind == "text":
        return iter(dataset.documents("train"))
    return map(_said, dataset.conversations("train"))


def _said(conversation: Conversation) -> str:
    return "\n".join(part.text for message in conversation.messages for part in message.parts)


def _alternate(*streams: Iterable[str]) -> Iterator[str]:
    """One text of each stream in turn, so that a cap on characters cannot shut out the later ones."""
    return (text for text in chain.from_iterable(zip_longest(*streams)) if text is not None)


def _no_text(name: str) -> ConfigError:
    return ConfigError(
        f"dataset `{name}` has no text to train a tokenizer on",
        cause="its training split has no characters",
        hint=f"look at it with `picollm data show {name}`, or choose another with `--set data.dataset=NAME`",
    )
