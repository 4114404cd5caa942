"""The tokenizer of a run: trained on the training split of its dataset, in the command's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from typing import Any

from picollm.config.schema import RunConfig
from picollm.data.conversations import Conversation
from picollm.data.dataset_record import ShardFile
from picollm.data.datasets import Dataset
from picollm.data.registry import TOY_WORLD, TOY_WORLD_CHAT
from picollm.data.toy_datasets import ensure
from picollm.errors import ConfigError
from picollm.files import sha256_file, sha256_json
from picollm.run_dir import RunDir, StageDir
from picollm.tokenizer.train import capped, train


def train_stage(
    run: RunDir,
    config: RunConfig,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    wait_for: Callable[[Dataset, ShardFile], None] | None = None,
) -> dict[str, Any]:
    """Train the run's tokenizer unless it is there already, and return the stage's record.

    Only the training split is read, up to `tokenizer.max_chars`; of a mixture's datasets in shares of characters by
    their weights. A run on the toy world also reads the toy world's conversations, so that what fine-tuning says has
    tokens too. A tokenizer that is damaged, or was made from other text, is moved to `old/` and made again; nothing is
    deleted. Once pretraining has begun only the same tokenizer can be made again, which mends a damaged one.

    Args:
        on_progress: called with characters read and an upper bound of what will be read; equal at the end.
        wait_for: called before a shard of a downloaded dataset is read; returns when it is there. Shards are read in
            the order of the record, so what is trained on does not depend on when they come.

    Raises:
        ConfigError: the dataset holds no text to train on, or is one of conversations; or pretraining has begun and a
            dataset has changed since.
        MissingArtifact: the dataset does not exist.
        IntegrityError: a shard of it is not as recorded.
    """
    used = run.dataset_hashes()
    weights = dict(config.data.sources)
    sources = [ensure(name, base=run.base, keep=used) for name in weights]
    if wrong := next((source for source in sources if source.kind != "text"), None):
        raise ConfigError(
            f"dataset `{wrong.name}` holds {wrong.kind}, not text",
            cause=f"`data.{'mix' if config.data.mix else 'dataset'}` is what pretraining and the tokenizer read",
            hint="name a dataset of text with `--set data.dataset=NAME`; `picollm data list` shows the kinds",
        )
    if TOY_WORLD in weights:
        sources.append(ensure(TOY_WORLD_CHAT, base=run.base, keep=used))
    wanted = config.tokenizer
    recipe = {
        "data": {source.name: source.sha256 for source in sources},
        "vocab_size": wanted.vocab_size,
        "max_chars": wanted.max_chars,
        "doc_chars": wanted.doc_chars,
    } | ({} if wanted.digits == 1 else {"digits": wanted.digits})  # so a recipe written before there was a choice stays
    if config.data.mix:
        recipe["weights"] = weights
    inputs = {"recipe": sha256_json(recipe), **{_dataset_key(source.name): source.sha256 for source in sources}}

    stage = StageDir(run.tokenizer)
    record = stage.record()
    if record is not None and stage.is_done(inputs) and _is_intact(stage, record):
        return record
    _refuse_if_used(run, _pretrained_on(run) | (record["inputs"] if record else {}), inputs)
    if record is not None:
        run.move_to_old([stage.name])

    expected = min(wanted.max_chars, sum(source.chars("train") for source in sources))
    counts = {"documents": 0, "chars": 0}

    def texts() -> Iterator[str]:
        streams = {source.name: _training_texts(source, wait_for) for source in sources}
        if TOY_WORLD in streams:
            streams[TOY_WORLD] = _alternate(streams[TOY_WORLD], streams.pop(TOY_WORLD_CHAT))
        every = _in_proportion([(streams[name], weight) for name, weight in weights.items()], wanted.doc_chars)
        for text in capped(every, max_chars=wanted.max_chars, doc_chars=wanted.doc_chars):
            counts["documents"] += 1
            counts["chars"] += len(text)
            yield text

    if expected == 0:
        raise _no_text(sources[0].name)
    tokenizer = train(
        texts(),
        wanted.vocab_size,
        digits=wanted.digits,
        on_progress=on_progress and (lambda done: on_progress(done, max(done, expected))),
    )
    if on_progress:
        on_progress(counts["chars"], counts["chars"])
    files = tokenizer.save(stage.path)
    result = {"vocab_size": tokenizer.vocab_size, "digits": tokenizer.digits, "sha256": tokenizer.sha256, **counts}
    return stage.write_record(inputs, files, result)


def _dataset_key(name: str) -> str:
    return f"dataset {name}"


def _pretrained_on(run: RunDir) -> dict[str, str]:
    """The datasets that pretraining was prepared with, in the form of a record's inputs."""
    pretrain = run.stage("pretrain")
    if not pretrain.config_path.is_file():
        return {}
    sources = pretrain.read_config()["recipe"].get("data", [])
    return {_dataset_key(source["dataset"]): source["sha256"] for source in sources}


def _refuse_if_used(run: RunDir, before: dict[str, str], now: dict[str, str]) -> None:
    """Keep the tokenizer of a model that is being trained or done.

    Raises:
        ConfigError: pretraining has begun with what `before` names, and a dataset is another one `now`.
    """
    changed = [key for key in before if key in now and before[key] != now[key]]
    if not changed or not run.stage("pretrain").is_started():
        return
    names = [key.removeprefix(_dataset_key("")) for key in changed if key != "recipe"]
    what = f"dataset `{names[0]}`" if names else "what the tokenizer is made from"
    key = _dataset_key(names[0]) if names else "recipe"
    was, is_now = before[key][:12], now[key][:12]
    raise ConfigError(
        f"{what} has changed since run `{run.name}` was trained on it",
        cause=f"its sha256 was {was}… and is {is_now}… now; another tokenizer would not fit the model",
        hint=f"put the original back, start a new run with `--run NAME`, "
        f"or redo it all with `picollm speedrun --run {run.name} --force tokenizer`",
    )


def _is_intact(stage: StageDir, record: dict[str, Any]) -> bool:
    return all(sha256_file(stage.path / name) == entry["sha256"] for name, entry in record["outputs"].items())


def _training_texts(dataset: Dataset, wait_for: Callable[[Dataset, ShardFile], None] | None) -> Iterable[str]:
    if dataset.kind == "text":
        return dataset.stream("train", wait_for and (lambda file: wait_for(dataset, file)))
    return map(_said, dataset.conversations("train"))


def _said(conversation: Conversation) -> str:
    return "\n".join(part.text for message in conversation.messages for part in message.parts)


def _alternate(*streams: Iterable[str]) -> Iterator[str]:
    """One text of each stream in turn, so that a cap on characters cannot shut out the later ones."""
    return (text for text in chain.from_iterable(zip_longest(*streams)) if text is not None)


def _in_proportion(parts: Sequence[tuple[Iterable[str], float]], doc_chars: int) -> Iterator[str]:
    """Texts of several streams, in shares of characters as their weights say, for as long as each of them lasts.

    Args:
        doc_chars: characters of a text that count.
    """
    streams = [iter(stream) for stream, _ in parts]
    read, left = [0] * len(parts), list(range(len(parts)))
    while left:
        behind = min(left, key=lambda i: read[i] / parts[i][1])
        text = next(streams[behind], None)
        if text is None:
            left.remove(behind)
            continue
        read[behind] += min(len(text), doc_chars)
        yield text


def _no_text(name: str) -> ConfigError:
    return ConfigError(
        f"dataset `{name}` has no text to train a tokenizer on",
        cause="its training split has no characters",
        hint=f"look at it with `picollm data show {name}`, or choose another with `--set data.dataset=NAME`",
    )
