"""Checkpoints: committed whole or not at all, verified, pruned, and readable by name."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path

import pytest
import torch

from picollm.config.model import Architecture
from picollm.config.recipe import Rates, Schedule
from picollm.errors import ConfigError, HostError, IntegrityError, MissingArtifact
from picollm.model.gpt import GPT
from picollm.optim.muon import MuonAdamW
from picollm.run_dir import StageDir, run_named
from picollm.train import checkpoint
from picollm.train import checkpoint_files as files

ARCH = Architecture(
    arch="portable", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, vocab_size=40, max_position_embeddings=8, rope_theta=1e5,
)  # fmt: skip
RATES = Rates(matrix_lr=0.02, embedding_lr=0.05, unembedding_lr=0.004, scalar_lr=0.005, weight_decay=0.1)
SCHEDULE = Schedule(
    warmup_steps=1, warmdown_steps=5, final_lr_fraction=0.05, momentum_start=0.85, momentum_peak=0.95,
    momentum_end=0.9, momentum_ramp_steps=3,
)  # fmt: skip
META = {"tokenizer_sha256": "t" * 64, "recipe_sha256": "r" * 64, "data": {"row": 3}, "loss": 1.5, "cpu_s": 0.0}


def make(arch: Architecture = ARCH) -> tuple[GPT, MuonAdamW]:
    model = GPT(arch)
    model.init_weights(0)
    return model, MuonAdamW(model, RATES, SCHEDULE, 10, dtype=torch.float32)


def advance(model: GPT, optimizer: MuonAdamW, step: int) -> None:
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
    model.loss(ids[:, :-1], ids[:, 1:], scale=1 / 16).backward()
    optimizer.step(step)


@pytest.fixture
def stage(clean_environment: Path) -> StageDir:
    stage = run_named("test").stage("pretrain")
    stage.path.mkdir(parents=True)
    return stage


def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(stage: StageDir) -> None:
    model, optimizer = make()
    for step in range(3):
        advance(model, optimizer, step)
    path, size = checkpoint.save(stage, 3, model, optimizer, META, keep_last=2)
    assert size == sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    twin, twin_optimizer = make()
    meta, warnings = checkpoint.resume(stage, twin, twin_optimizer)
    assert warnings == [] and meta["step"] == 3 and meta["data"] == {"row": 3}
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        advance(m, o, 3)
    for name, p in model.named_parameters():
        assert torch.equal(p, twin.get_parameter(name))


def test_the_same_state_gives_the_same_bytes(stage: StageDir) -> None:
    model, optimizer = make()
    advance(model, optimizer, 0)
    one, _ = checkpoint.save(stage, 1, model, optimizer, META, keep_last=5)
    sums = files.read_sums(one)
    two, _ = checkpoint.save(stage, 1, model, optimizer, META, keep_last=5)
    assert files.read_sums(two) == sums
    assert stage.latest.read_text().strip() == "step_000001"
    check = subprocess.run(["sha256sum", "-c", files.SUMS], cwd=two, capture_output=True, text=True)
    assert check.returncode == 0, check.stderr


def test_old_checkpoints_are_pruned_and_torn_ones_swept(stage: StageDir) -> None:
    model, optimizer = make()
    for step in (1, 2):
        checkpoint.save(stage, step, model, optimizer, META, keep_last=2)
    torn = stage.checkpoints / "step_000003.tmp"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert stage.finished_steps() == [1, 2]
    checkpoint.save(stage, 4, model, optimizer, META, keep_last=2)
    assert stage.finished_steps() == [2, 4]
    assert not torn.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json", checkpoint.STATE_FILE, files.SUMS])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_by_resume(stage: StageDir, name: str, damage: str) -> None:
    model, optimizer = make()
    advance(model, optimizer, 0)
    checkpoint.save(stage, 1, model, optimizer, META, keep_last=2)
    good = {n: p.detach().clone() for n, p in model.named_parameters()}
    advance(model, optimizer, 1)
    newest, _ = checkpoint.save(stage, 2, model, optimizer, META, keep_last=2)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    twin, twin_optimizer = make()
    meta, warnings = checkpoint.resume(stage, twin, twin_optimizer)
    assert meta["step"] == 1
    assert len(warnings) == 1 and "step 2 is damaged" in warnings[0]
    for n, p in twin.named_parameters():
        assert torch.equal(p, good[n])
    if name in ("model.safetensors", "meta.json"):  # a reader of weights alone has no fall-back
        with pytest.raises(IntegrityError):
            checkpoint.load_model(stage)


def test_with_no_intact_checkpoint_left_nothing_is_trained_over_it(stage: StageDir) -> None:
    model, optimizer = make()
    path, _ = checkpoint.save(stage, 1, model, optimizer, META, keep_last=2)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(IntegrityError, match="no checkpoint of stage `pretrain` is intact"):
        checkpoint.resume(stage, *make())
    assert path.is_dir()


def test_another_architecture_is_named(stage: StageDir) -> None:
    checkpoint.save(stage, 1, *make(), META, keep_last=2)
    other = make(ARCH.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(ConfigError) as caught:
        checkpoint.resume(stage, *other)
    assert "'num_hidden_layers': 2" in str(caught.value.cause) and "'num_hidden_layers': 3" in str(caught.value.cause)


def test_hostile_names_in_the_list_of_hashes_are_refused(stage: StageDir) -> None:
    path, _ = checkpoint.save(stage, 1, *make(), META, keep_last=2)
    with open(path / files.SUMS, "a") as file:
        file.write(f"{'0' * 64}  ../../../../etc/passwd\n")
    with pytest.raises(IntegrityError, match="torn or was edited"):
        files.verify(path)


def test_weights_that_do_not_fit_their_meta_are_refused(stage: StageDir) -> None:
    """A hostile checkpoint: all hashes right, shapes wrong."""
    path, _ = checkpoint.save(stage, 1, *make(), META, keep_last=2)
    meta = json.loads((path / "meta.json").read_text())
    meta["model"]["hidden_size"] = 32
    files.write_meta(path, meta)
    names = files.read_sums(path)
    (path / files.SUMS).write_text("".join(f"{files.sha256_file(path / n)}  {n}\n" for n in names))
    with pytest.raises(IntegrityError, match="do not fit its architecture"):
        checkpoint.load_model(stage)


def test_a_full_disk_leaves_the_earlier_checkpoint(stage: StageDir, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = make()
    checkpoint.save(stage, 1, model, optimizer, META, keep_last=1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(HostError, match="cannot write") as caught:
        checkpoint.save(stage, 2, model, optimizer, META, keep_last=1)
    assert "No space left" in str(caught.value.cause)
    assert stage.finished_steps() == [1]
    files.verify(files.checkpoint_dir(stage, 1))


def test_a_model_loads_in_the_type_asked_for(stage: StageDir) -> None:
    model, optimizer = make()
    advance(model, optimizer, 0)
    checkpoint.save(stage, 1, model, optimizer, META, keep_last=2)
    loaded = checkpoint.load_model(stage, dtype="float64")
    assert (loaded.step, loaded.tokenizer_sha256) == (1, "t" * 64)
    assert (1, loaded.sha256) == files.checkpoint_sha256(stage)
    ids = torch.randint(0, 40, (1, 8))
    torch.testing.assert_close(loaded.model(ids), model(ids).detach().double(), atol=1e-5, rtol=1e-4)


def test_a_stage_without_checkpoint_names_the_command(stage: StageDir) -> None:
    with pytest.raises(MissingArtifact) as caught:
        checkpoint.load_model(stage)
    assert caught.value.hint == "make one with `picollm pretrain --run test`"


def test_a_folder_that_only_has_the_name_is_no_checkpoint(stage: StageDir) -> None:
    model, optimizer = make()
    checkpoint.save(stage, 1, model, optimizer, META, keep_last=1)
    junk = stage.checkpoints / "step_999999999"
    junk.mkdir()
    assert files.latest_step(stage) == checkpoint.load_model(stage).step == 1
    assert checkpoint.resume(stage, *make()) == (files.read_meta(files.checkpoint_dir(stage, 1)), [])
    checkpoint.save(stage, 2, model, optimizer, META, keep_last=1)
    assert stage.finished_steps() == [2] and junk.is_dir()
