from __future__ import annotations

from collections.abc import Callable
from typing import Any

from picollm.config.model import Architecture
from picollm.data.conversations import Conversation
from picollm.data.dataset_writer import DatasetWriter
from picollm.export.held_out import held_out_rows
from picollm.files import read_json, write_json
from picollm.model.gpt import GPT
from picollm.run_dir import StageDir
from picollm.tokenizer.tokenizer import Tokenizer

Small = Callable[..., Architecture]


def dataset(stage: StageDir, kind: str, rows: list[Any]) -> None:
    """A dataset with these rows to validate on, which the stage's recipe names."""
    with DatasetWriter(kind, stage.run.base) as writer:
        writer.start(kind)
        for split in ("train", "validation"):
            for row in rows:
                writer.add(split, row)
        writer.publish({"generator": "test"})
    config = read_json(stage.config_path)
    config["recipe"]["data"] = [{"dataset": kind, "sha256": "", "weight": 1.0}]
    write_json(stage.config_path, config)


def test_text_and_conversations(make_stage: Any, small: Small, tokenizer: Tokenizer) -> None:
    stage = make_stage(GPT(small()).requires_grad_(False))
    dataset(stage, "text", ["One day a fox saw a bird.", "The bird sang."] * 30)
    rows, source = held_out_rows(stage, tokenizer, length=100, positions=256)
    assert [len(row) for row in rows] == [100, 100, 56] and source == "validation split of text"
    assert rows[0][0] == tokenizer.bos and tokenizer.decode(rows[0]).startswith("One day a fox saw a bird.The bird")
    talk = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    dataset(stage, "conversations", [Conversation.from_json(talk)] * 60)
    rows, source = held_out_rows(stage, tokenizer, length=100, positions=256)
    assert sum(map(len, rows)) == 256 and source == "validation split of conversations"
    assert tokenizer.special["<|assistant_end|>"] in rows[0]


def test_built_in_texts_where_there_is_no_dataset_or_too_little(
    make_stage: Any, small: Small, tokenizer: Tokenizer
) -> None:
    stage = make_stage(GPT(small()).requires_grad_(False))
    rows, source = held_out_rows(stage, tokenizer, length=64, positions=256)
    assert [len(row) for row in rows] == [64] * 4 and source == "built-in texts"
    dataset(stage, "text", ["Short."])
    assert held_out_rows(stage, tokenizer, length=64, positions=256) == (rows, source)
