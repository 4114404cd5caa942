"""Tokens that a stage was not trained on, for comparing what an exported model says with what ours says."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from picollm.data.datasets import Dataset
from picollm.errors import PicollmError
from picollm.export.strings import PROMPTS
from picollm.run_dir import StageDir
from picollm.tokenizer.chat_format import render
from picollm.tokenizer.tokenizer import Tokenizer

# Enough of a data set to fill the rows, whatever its documents are like.
_DOCUMENTS = 256


def held_out_rows(stage: StageDir, tokenizer: Tokenizer, *, length: int, positions: int) -> tuple[list[list[int]], str]:
    """Rows of at most `length` ids, together `positions` of them, and where they come from.

    The validation split of what the stage learnt from; without it (a run that was copied alone) texts of our own.
    """
    for source in stage.read_config()["recipe"].get("data", []):
        try:
            dataset = Dataset.open(source["dataset"], stage.run.base)
            rows = list(_rows(_validation(dataset, tokenizer), length, positions))
        except PicollmError:
            continue  # not here, or damaged: not what an export is about
        if sum(map(len, rows)) == positions:
            return rows, f"validation split of {dataset.name}"
    own = [[tokenizer.bos, *tokenizer.encode(text)] for text in PROMPTS]
    repeated = own * (positions // sum(map(len, own)) + 1)
    return list(_rows(repeated, length, positions)), "built-in texts"


def _validation(dataset: Dataset, tokenizer: Tokenizer) -> Iterator[list[int]]:
    if dataset.kind == "text":
        documents = dataset.documents("validation")
        for i in range(min(_DOCUMENTS, len(documents))):
            yield [tokenizer.bos, *tokenizer.encode(documents[i])]
    else:
        for conversation in dataset.conversations("validation")[:_DOCUMENTS]:
            yield render(tokenizer, conversation)[0]


def _rows(documents: Iterable[list[int]], length: int, positions: int) -> Iterator[list[int]]:
    """Documents one after the other, cut into rows; the last row is as short as it must be."""
    row: list[int] = []
    left = positions
    for document in documents:
        for token in document:
            row.append(token)
            if len(row) == min(length, left):
                yield row
                left -= len(row)
                row = []
                if not left:
                    return
