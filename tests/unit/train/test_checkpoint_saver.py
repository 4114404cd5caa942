"""Saving: whole or not at all, beside the training, by several ranks, and what becomes of a save that fails."""

from __future__ import annotations

import contextlib
import errno
import subprocess
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from picollm.errors import HostError, WorkerError
from picollm.files import sha256_file
from picollm.run_dir import StageDir
from picollm.train import checkpoint, checkpoint_saver
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_parts as parts
from picollm.train import checkpoint_tensors as tensors
from picollm.train.checkpoint import Saver

META = {"tokenizer_sha256": "t" * 64, "data": {"row": 3}}
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def saver(request: pytest.FixtureRequest, stage: StageDir) -> Saver:
    return Saver(stage, 0, 1, keep_last=2, asynchronous=request.param)


def hashes(path: Path) -> dict[str, str]:
    return {file.relative_to(path).as_posix(): sha256_file(file) for file in path.rglob("*") if file.is_file()}


def test_what_is_saved_is_told_once(saver: Saver, make) -> None:
    training = make()
    for step in (1, 2):
        training.advance(step - 1)
        saver.save(step, training.model, training.optimizer, META)
    saver.wait()
    saved = saver.finished()
    assert [(one.step, one.path.name) for one in saved] == [(1, "step_000001"), (2, "step_000002")]
    for one in saved:
        assert one.bytes == sum(file.stat().st_size for file in one.path.rglob("*") if file.is_file())
    assert saver.finished() == []
    assert saver.stage.latest.read_text().strip() == "step_000002"
    check = subprocess.run(["sha256sum", "-c", files.SUMS], cwd=saved[-1].path, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_a_copy_is_saved_while_training_goes_on(stage: StageDir, make, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make()
    training.advance(0)
    wanted = training.everything()
    go, write = threading.Event(), tensors.write_tensors

    def slow(*args: Any) -> str:
        assert go.wait(30)
        return write(*args)

    monkeypatch.setattr(tensors, "write_tensors", slow)
    saver = Saver(stage, 0, 1, keep_last=2, asynchronous=True)
    meta = {**META, "data": {"row": 7}}
    saver.save(1, training.model, training.optimizer, meta)
    training.advance(1)  # the thread has not written a byte
    meta["data"]["row"] = 8
    assert saver.finished() == [] and stage.finished_steps() == []
    with pytest.raises(TimeoutError):  # a rank that fails waits a while for a save that may never end
        saver.wait(0.01)
    go.set()
    saver.wait()
    twin = make()
    assert checkpoint.resume(stage, twin.model, twin.optimizer)[0]["data"] == {"row": 7}
    assert all(torch.equal(wanted[name], found) for name, found in twin.everything().items())


def test_one_save_is_in_flight_and_the_next_waits(stage: StageDir, make, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make()
    write, at_once = tensors.write_tensors, []

    def counted(path: Path, named: dict[str, torch.Tensor]) -> str:
        at_once.append(sorted(folder.name.split(".")[0] for folder in stage.checkpoints.glob("*.tmp")))
        return write(path, named)

    monkeypatch.setattr(tensors, "write_tensors", counted)
    saver = Saver(stage, 0, 1, keep_last=9, asynchronous=True)
    for step in range(1, 5):
        saver.save(step, training.model, training.optimizer, META)
    saver.wait()
    assert [saved.step for saved in saver.finished()] == [1, 2, 3, 4]
    assert at_once == [[f"step_{step:06d}"] for step in range(1, 5) for _ in range(2)]


def test_a_tensor_is_let_go_before_the_next_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's tensors, whose bytes are copies, then take the memory of one."""
    raw, alive = tensors._raw, []
    views: list[weakref.ref[memoryview]] = []

    def noted(tensor: torch.Tensor) -> memoryview:
        alive.append(sum(view() is not None for view in views))
        views.append(weakref.ref(view := raw(tensor)))
        return view

    monkeypatch.setattr(tensors, "_raw", noted)
    tensors.write_tensors(tmp_path / "t.safetensors", {name: torch.ones(3) for name in "abc"})
    assert alive == [0, 0, 0]


def test_our_files_are_those_of_the_library(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    named = {
        name: torch.randn(shape, generator=made).to(dtype)
        for name, shape, dtype in (
            ("b/m", (5, 3), torch.float32), ("a", (), torch.float32), ("ä \"quoted\"", (7,), torch.float64),
            ("large", (1200, 1000), torch.float32), ("half", (3, 1, 2), torch.bfloat16), ("x", (4,), torch.float16),
        )
    }  # fmt: skip
    sha256 = tensors.write_tensors(tmp_path / "ours", named)
    assert sha256 == sha256_file(tmp_path / "ours")
    found = load_file(tmp_path / "ours")
    assert found.keys() == named.keys()
    assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in named.items())
    save_file({name: named[name] for name in ("large", "a", "b/m")}, tmp_path / "theirs")
    tensors.write_tensors(tmp_path / "ours", {name: named[name] for name in ("a", "b/m", "large")})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_same_state_gives_the_same_bytes(stage: StageDir, make) -> None:
    training = make()
    training.advance(0)
    found = []
    for asynchronous in (False, True):
        saver = Saver(stage, 0, 1, keep_last=5, asynchronous=asynchronous)
        saver.save(1, training.model, training.optimizer, META)
        saver.wait()
        found.append(hashes(saver.finished()[0].path))
    assert found[0] == found[1] and len(found[0]) == 5


def test_old_checkpoints_are_pruned_and_torn_ones_swept(stage: StageDir, saver: Saver, make) -> None:
    training = make()
    for step in (1, 2):
        saver.save(step, training.model, training.optimizer, META)
    saver.wait()
    torn = stage.checkpoints / "step_000003.abc.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert stage.finished_steps() == [1, 2]
    saver.save(4, training.model, training.optimizer, META)
    saver.wait()
    assert sorted(path.name for path in stage.checkpoints.iterdir()) == ["step_000002", "step_000004"]


def test_half_of_a_pruned_checkpoint_is_none(stage: StageDir, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while it deletes an old one, by a disk that is slow at it."""
    training = make()
    saver = Saver(stage, 0, 1, keep_last=1, asynchronous=False)
    saver.save(1, training.model, training.optimizer, META)
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda path, **_: (path / "model.safetensors").unlink())
        saver.save(2, training.model, training.optimizer, META)
    assert stage.finished_steps() == [2]
    saver.save(3, training.model, training.optimizer, META)
    assert [path.name for path in stage.checkpoints.iterdir()] == ["step_000003"]


# -- a save that fails ------------------------------------------------------------------------------------------------


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise FULL

    monkeypatch.setattr(tensors, "fsync_path", refuse)


def test_a_full_disk_leaves_the_earlier_checkpoint(saver: Saver, make, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make()
    saver.save(1, training.model, training.optimizer, META)
    saver.wait()
    before = hashes(saver.finished()[0].path)
    full_disk(monkeypatch)
    with pytest.raises(HostError, match="cannot write") as caught:
        saver.save(2, training.model, training.optimizer, META)
        saver.wait()
    assert "No space left" in str(caught.value.cause)
    assert [path.name for path in saver.stage.checkpoints.iterdir()] == ["step_000001"]
    assert hashes(files.checkpoint_dir(saver.stage, 1)) == before
    saver.wait()  # told already


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_periodic_save_is_a_warning_and_the_next_one_counts(
    stage: StageDir, make, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    training, warnings = make(), []
    saver = Saver(stage, 0, 1, keep_last=2, asynchronous=asynchronous, warn=warnings.append)
    with monkeypatch.context() as patch:
        full_disk(patch)
        saver.save(1, training.model, training.optimizer, META)
        while saver._pending is not None:
            saver.finished()
    saver.save(2, training.model, training.optimizer, META)
    saver.wait()
    assert len(warnings) == 1 and "step 1 could not be saved" in warnings[0] and "No space left" in warnings[0]
    assert [saved.step for saved in saver.finished()] == stage.finished_steps() == [2]
    full_disk(monkeypatch)
    saver.save(3, training.model, training.optimizer, META)
    with pytest.raises(HostError):  # nothing comes after it
        saver.wait()
    assert stage.finished_steps() == [2]


def test_a_bug_of_ours_is_never_a_warning(stage: StageDir, make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(parts, "build_index", broken)
    training, warnings = make(), []
    saver = Saver(stage, 0, 1, keep_last=2, asynchronous=True, warn=warnings.append)
    saver.save(1, training.model, training.optimizer, META)
    with pytest.raises(KeyError):
        saver.wait()
    assert warnings == [] and list(stage.checkpoints.iterdir()) == []


def test_without_memory_for_copies_training_waits_instead(
    stage: StageDir, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, warnings = make(), []

    def no_memory(*args: object, **kwargs: object) -> None:
        raise RuntimeError("cannot pin")

    monkeypatch.setattr(checkpoint_saver.torch, "empty", no_memory)
    saver = Saver(stage, 0, 1, keep_last=2, asynchronous=True, warn=warnings.append)
    saver.save(1, training.model, training.optimizer, META)
    assert [saved.step for saved in saver.finished()] == [1]
    assert len(warnings) == 1 and "cannot pin" in warnings[0]


def test_memory_that_ends_half_way_is_given_back(stage: StageDir, make, monkeypatch: pytest.MonkeyPatch) -> None:
    training, make_block = make(), torch.empty
    blocks: list[weakref.ref[torch.UntypedStorage]] = []

    def two_blocks(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(blocks) == 2:
            raise RuntimeError("cannot pin")
        block = make_block(*args, **kwargs)
        blocks.append(weakref.ref(block.untyped_storage()))
        return block

    monkeypatch.setattr(tensors, "BLOCK_BYTES", 64)
    monkeypatch.setattr(tensors.torch, "empty", two_blocks)
    gone: list[bool] = []
    saver = Saver(
        stage, 0, 1, keep_last=2, asynchronous=True, warn=lambda _: gone.extend(block() is None for block in blocks)
    )
    saver.save(1, training.model, training.optimizer, META)
    assert gone == [True, True] and stage.finished_steps() == [1]


def test_buffers_share_blocks_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "BLOCK_BYTES", 1024)
    shapes = [(3, 5), (), (400,), (7,), (0, 4), (100, 1), (2, 2, 2)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float32, torch.float64, torch.float16]
    named = {str(shape): torch.empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)}
    for value, tensor in enumerate(named.values()):
        tensor.fill_(value)
    buffers = tensors.host_buffers(named)
    for name, tensor in named.items():
        buffers[name].copy_(tensor)
    assert all(torch.equal(buffers[name], tensor) for name, tensor in named.items())
    blocks = {buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes() for buffer in buffers.values()}
    assert sorted(blocks.values()) == [64, 1024, 1600]  # one is larger than a block, the last has what is left


# -- several ranks ----------------------------------------------------------------------------------------------------


def together(world: int, action: Callable[[int], Any]) -> list[Any]:
    """Do it on all ranks at once, a thread each."""
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(action, range(world)))


def save_as(stage: StageDir, make, source: dict[str, torch.Tensor], world: int, step: int, attempt: str) -> None:
    """Save one rank's state as `world` ranks that share it would."""

    def rank_saves(rank: int) -> None:
        training = make(rank=rank, world=world)
        for name, parameter in training.model.named_parameters():
            parameter.data.copy_(source[name])
        training.optimizer.load(lambda name, start, end: source[name][start:end])
        saver = Saver(stage, rank, world, keep_last=9, asynchronous=rank % 2 == 0, attempt=attempt, timeout_s=30)
        saver.save(step, training.model, training.optimizer, META)
        saver.wait()
        assert [saved.step for saved in saver.finished()] == ([step] if rank == 0 else [])

    together(world, rank_saves)


def whole(training: Any) -> dict[str, torch.Tensor]:
    """Weights and state of a training of one rank by name."""
    named = dict(training.model.named_parameters())
    named |= {shard.name: shard.tensor for shard in training.optimizer.shards()}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(stage: StageDir, make, world: int) -> None:
    training = make()
    for step in range(2):
        training.advance(step)
    source = whole(training)
    save_as(stage, make, source, world, 2, "first")
    folder = files.checkpoint_dir(stage, 2)
    assert sorted(path.name for path in (folder / "state").iterdir()) == sorted(
        ["index.json", *(parts.part_name(rank, world) for rank in range(world))]
    )
    before = hashes(folder)
    save_as(stage, make, source, world, 2, "second")
    assert hashes(folder) == before  # no trace of the attempt
    for readers in (1, 2, 4):
        for rank in range(readers):
            reader = make(rank=rank, world=readers)
            assert checkpoint.resume(stage, reader.model, reader.optimizer)[1] == []
            for name, parameter in reader.model.named_parameters():
                assert torch.equal(parameter, source[name])
            for shard in reader.optimizer.shards():
                assert torch.equal(shard.tensor, source[shard.name][shard.rows[0] : shard.rows[1]])


def test_a_rank_that_cannot_write_fails_the_save_for_all(
    stage: StageDir, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync_path = tensors.fsync_path

    def full_on_rank_1(path: Path) -> None:
        if path.name == parts.part_name(1, 2):
            raise FULL
        fsync_path(path)

    monkeypatch.setattr(tensors, "fsync_path", full_on_rank_1)

    def rank_saves(rank: int) -> HostError:
        training = make(rank=rank, world=2)
        saver = Saver(stage, rank, 2, keep_last=9, asynchronous=True, attempt="a", timeout_s=30, warn=lambda text: None)
        saver.save(1, training.model, training.optimizer, META)
        with pytest.raises(HostError) as caught:
            saver.wait()
        return caught.value

    first, second = together(2, rank_saves)
    assert "rank 1 could not write its part" in first.message and "No space left" in str(first.cause)
    assert "No space left" in str(second.cause)
    assert stage.finished_steps() == []


def test_a_rank_that_is_silent_is_named(stage: StageDir, make) -> None:
    training = make(rank=0, world=2)
    saver = Saver(stage, 0, 2, keep_last=9, asynchronous=True, attempt="a", timeout_s=0.1)
    saver.save(1, training.model, training.optimizer, META)
    with pytest.raises(WorkerError, match="rank 1 has not written its part") as caught:
        saver.wait()
    assert "a disk that all machines share" in str(caught.value.hint)
    assert list(stage.checkpoints.iterdir()) == []


def test_a_process_of_an_earlier_attempt_cannot_spoil_a_save(stage: StageDir, make) -> None:
    """It still writes while the next attempt saves the same step: into a folder of its own, which is swept."""
    ghost = make(rank=1, world=2)
    ghost.advance = None  # never trained: other bytes than the real rank's
    left = Saver(stage, 1, 2, keep_last=9, asynchronous=True, attempt="old", timeout_s=30)
    left.save(2, ghost.model, ghost.optimizer, META)
    training = make()
    for step in range(2):
        training.advance(step)
    source = whole(training)
    save_as(stage, make, source, 2, 2, "new")
    with contextlib.suppress(HostError):  # its folder was swept, perhaps while it wrote
        left.wait()
    reader = make()
    assert checkpoint.resume(stage, reader.model, reader.optimizer)[1] == []
    assert all(torch.equal(tensor, source[name]) for name, tensor in whole(reader).items())
    assert [path.name for path in stage.checkpoints.iterdir()] == ["step_000002"]


def test_the_part_of_a_slower_rank_is_not_swept(stage: StageDir, make) -> None:
    """A rank may be in the next save already when rank 0 begins it."""
    training = make(rank=1, world=2)
    ahead = Saver(stage, 1, 2, keep_last=9, asynchronous=True, attempt="a", timeout_s=30)
    ahead.save(1, training.model, training.optimizer, META)
    temporary = files.temporary_dir(stage, 1, "a-1")
    deadline = time.monotonic() + 30
    while not (temporary / "state" / f"{parts.part_name(1, 2)}.note").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first = make(rank=0, world=2)
    saver = Saver(stage, 0, 2, keep_last=9, asynchronous=False, attempt="a", timeout_s=30)
    saver.save(1, first.model, first.optimizer, META)
    ahead.wait()
    assert stage.finished_steps() == [1]
