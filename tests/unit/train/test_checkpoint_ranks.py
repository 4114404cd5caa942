"""Two real ranks save together, and agree on a verdict that only one of them could reach."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

from picollm.run_dir import StageDir

RANK = """
import json, sys
from pathlib import Path
import torch
from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.errors import PicollmError
from picollm.model.gpt import GPT
from picollm.optim.optimizer import MuonAdamW
from picollm.run_dir import StageDir
from picollm.train import checkpoint, checkpoint_files, distributed

torch.set_num_threads(1)
distributed.start()
ranks = distributed.ranks()
stage, arch, rates, schedule = (json.loads(text) for text in sys.argv[1:])
stage = StageDir(Path(stage))
model = GPT(Architecture.model_validate(arch))
model.init_weights(0)
optimizer = MuonAdamW(model, Rates(**rates), Schedule(**schedule), 10, dtype=torch.float32, ranks=ranks)
saver = checkpoint.Saver(stage, ranks.rank, ranks.world, keep_last=3, asynchronous=True)
for step in (1, 2):
    saver.save(step, model, optimizer, {"data": {"row": step}})
saver.wait()
saved = [one.step for one in saver.finished()]
print(json.dumps([saver.attempt, saved]))
for step in (2, 1):
    distributed.gather_texts("saved or resumed")
    if ranks.rank == 0:  # the second of the sorted files is the one that rank 1 hashes
        path = checkpoint_files.checkpoint_dir(stage, step)
        file = path / list(checkpoint_files.read_sums(path))[1]
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    distributed.gather_texts("damaged")
    try:
        meta, warnings = checkpoint.resume(stage, model, optimizer)
        print(json.dumps([meta["data"]["row"], warnings]))
    except PicollmError as error:
        print(json.dumps([type(error).__name__, [error.message]]))
distributed.stop()
"""


def test_all_ranks_reach_the_same_verdict(stage: StageDir, recipe_of_small: list[dict[str, Any]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    arguments = [json.dumps(value) for value in (str(stage.path), *recipe_of_small)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *arguments],
            env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    first, second = (
        [json.loads(line) for line in process.communicate(timeout=100)[0].splitlines()] for process in processes
    )
    assert first[0][0] == second[0][0]  # the attempt they agreed on
    assert (first[0][1], second[0][1]) == ([1, 2], [])
    assert first[1:] == second[1:]
    (row, [warning]), (error, [message]) = first[1:]
    assert row == 1 and "step 2 is damaged" in warning
    assert error == "IntegrityError" and "no checkpoint" in message
    assert stage.finished_steps() == [1]
