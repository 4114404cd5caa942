"""Bits per byte of a trained nanochat model on a picollm dataset, by picollm's own protocol.

    cd CHECKOUT && NANOCHAT_BASE_DIR=… PYTHONPATH=PICOLLM PYTHON PICOLLM/bench/bpb_of_peer.py \
        --tag TAG --documents VALIDATION.jsonl --T 512 --max-tokens 131072

Documents are cut into pieces of T tokens, each behind a bos, and every byte counts once: what
`picollm.evaluate.bits_per_byte` does. nanochat's own figure is over packed rows whose long documents are cropped, so
that the two are not the same measure. The documents are one JSON object with `text` per line. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import torch


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--documents", required=True)
    parser.add_argument("--T", type=int, required=True)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    sys.path.insert(0, str(Path.cwd()))
    from nanochat.checkpoint_manager import load_model

    model, tokenizer, meta = load_model("base", torch.device("cpu"), phase="eval", model_tag=args.tag)
    bos = tokenizer.get_bos_token_id()
    rows: list[list[int]] = []
    num_bytes, left = 0, args.max_tokens
    with open(args.documents) as file:
        for line in file:
            ids = tokenizer.encode(json.loads(line)["text"])
            ids = ids if left is None else ids[:left]
            num_bytes += sum(len(tokenizer.enc.decode_single_token_bytes(i)) for i in ids)
            rows += [[bos, *ids[start : start + args.T]] for start in range(0, len(ids), args.T)]
            if left is not None and (left := left - len(ids)) == 0:
                break
    nats = 0.0
    rows.sort(key=len)
    for start in range(0, len(rows), args.batch):
        part = rows[start : start + args.batch]
        width = max(map(len, part)) - 1
        ids = torch.tensor([row[:-1] + [bos] * (width + 1 - len(row)) for row in part])
        targets = torch.tensor([row[1:] + [-1] * (width + 1 - len(row)) for row in part])
        nats += float(model(ids, targets, loss_reduction="none").double().sum())
    tokens = sum(len(row) - 1 for row in rows)
    print(
        json.dumps({"bpb": nats / math.log(2) / num_bytes, "bytes": num_bytes, "tokens": tokens, "step": meta["step"]})
    )


if __name__ == "__main__":
    main()
