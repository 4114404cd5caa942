"""Checkpoints read: exact, verified, passed over when damaged, refused when they are of something else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from picollm.errors import ConfigError, IntegrityError, MissingArtifact
from picollm.run_dir import StageDir
from picollm.train import checkpoint
from picollm.train import checkpoint_files as files
from picollm.train import checkpoint_tensors as tensors

META = {"tokenizer_sha256": "t" * 64, "recipe_sha256": "r" * 64, "data": {"row": 3}, "loss": 1.5, "cpu_s": 0.0}
STATE = "state/rank_0-of-1.safetensors"


def save(stage: StageDir, step: int, training: Any, *, keep_last: int = 2) -> Path:
    saver = checkpoint.Saver(stage, 0, 1, keep_last=keep_last, asynchronous=False)
    saver.save(step, training.model, training.optimizer, META)
    [saved] = saver.finished()
    return saved.path


def rehash(path: Path) -> None:
    """What somebody does who wants an edited checkpoint to pass."""
    names = files.read_sums(path)
    (path / files.SUMS).write_text("".join(f"{files.sha256_file(path / name)}  {name}\n" for name in names))


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file of a checkpoint."""
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(stage: StageDir, make) -> None:
    training = make()
    for step in range(3):
        training.advance(step)
    save(stage, 3, training)
    twin = make()
    meta, warnings = checkpoint.resume(stage, twin.model, twin.optimizer)
    assert warnings == [] and meta["step"] == 3 and meta["data"] == {"row": 3}
    training.advance(3)
    twin.advance(3)
    found, wanted = twin.everything(), training.everything()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["model.safetensors", "meta.json", STATE, "state/index.json", files.SUMS])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(stage: StageDir, make, name: str, damage: str) -> None:
    training = make()
    training.advance(0)
    save(stage, 1, training)
    good = training.everything()
    training.advance(1)
    newest = save(stage, 2, training)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    if name in ("model.safetensors", "meta.json"):  # a reader of weights alone has no fall-back
        with pytest.raises(IntegrityError):
            checkpoint.load_model(stage)
    twin = make()
    meta, warnings = checkpoint.resume(stage, twin.model, twin.optimizer)
    assert meta["step"] == 1
    assert len(warnings) == 1 and "step 2 is damaged" in warnings[0]
    found = twin.everything()
    assert all(torch.equal(found[name], good[name]) for name in good)
    assert stage.latest.read_text() == "step_000001\n"
    assert stage.finished_steps() == [1] and (stage.checkpoints / "step_000002.damaged").is_dir()
    assert checkpoint.load_model(stage).step == 1


def test_with_no_intact_checkpoint_left_nothing_is_trained_over_it(stage: StageDir, make) -> None:
    path = save(stage, 1, make())
    (path / "model.safetensors").write_bytes(b"")
    training = make()
    before = training.everything()
    with pytest.raises(IntegrityError, match="no checkpoint of stage `pretrain` is intact"):
        checkpoint.resume(stage, training.model, training.optimizer)
    assert path.is_dir()
    assert all(torch.equal(before[name], now) for name, now in training.everything().items())


def test_another_architecture_is_named_by_what_differs(stage: StageDir, make) -> None:
    training = make()
    save(stage, 1, training)
    other = make(training.model.arch.model_copy(update={"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match="another architecture") as caught:
        checkpoint.resume(stage, other.model, other.optimizer)
    assert caught.value.cause == "`num_hidden_layers` is 2 there and 3 in the recipe"
    assert stage.finished_steps() == [1]


def test_another_tokenizer_is_named_by_both_hashes(stage: StageDir, make) -> None:
    save(stage, 1, make())
    again = make()
    assert checkpoint.resume(stage, again.model, again.optimizer, tokenizer_sha256="t" * 64)[0] is not None
    with pytest.raises(ConfigError, match="another tokenizer") as caught:
        checkpoint.resume(stage, again.model, again.optimizer, tokenizer_sha256="u" * 64)
    assert "tttttttttttt…" in str(caught.value.cause) and "uuuuuuuuuuuu…" in str(caught.value.cause)


def test_a_checkpoint_of_one_rank_of_picollm_0_1_is_read(stage: StageDir, make) -> None:
    """There a tensor had one file, and its fields stood where the list of parts is now."""
    training = make()
    training.advance(0)
    path = save(stage, 1, training)
    edit(
        path / "state/index.json",
        lambda index: {name: {"shape": entry["shape"], **entry["parts"][0]} for name, entry in index.items()},
    )
    rehash(path)
    twin = make()
    assert checkpoint.resume(stage, twin.model, twin.optimizer)[1] == []
    wanted = training.everything()
    assert all(torch.equal(wanted[name], found) for name, found in twin.everything().items())


# -- hostile input: every hash is right ------------------------------------------------------------------------------


def test_hostile_names_in_the_list_of_hashes_are_refused(stage: StageDir, make) -> None:
    path = save(stage, 1, make())
    with open(path / files.SUMS, "a") as file:
        file.write(f"{'0' * 64}  ../../../../etc/passwd\n")
    with pytest.raises(IntegrityError, match="torn or was edited"):
        files.verify(path)


@pytest.mark.parametrize("size", [32, 2**40])
def test_weights_that_do_not_fit_their_meta_are_refused(stage: StageDir, make, size: int) -> None:
    path = save(stage, 1, make())
    edit(path / "meta.json", lambda meta: meta["model"].update(hidden_size=size))
    rehash(path)
    with pytest.raises(IntegrityError, match=r"do not fit its architecture|describes no model"):
        checkpoint.load_model(stage)


NAME = "embed_tokens/m"


def other_file(name: str) -> Callable[[Any], Any]:
    return lambda index: index[NAME]["parts"][0].update(file=name)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (other_file("../../secret.safetensors"), "no file of a training state"),
        (other_file("rank_0-of-1.safetensors\n"), "no file of a training state"),
        (other_file("rank_1-of-2.safetensors"), "hash is not recorded"),
        (lambda index: index[NAME].update(parts=[]), "64 rows and 0 are there"),
        (lambda index: index[NAME]["parts"][0].update(rows=[0, 63]), "64 rows and 63 are there"),
        (lambda index: index[NAME]["parts"][0].update(rows=[1, 64]), "rows 0 to 1"),
        (lambda index: index[NAME]["parts"].append(index[NAME]["parts"][0]), "missing or there twice"),
        (lambda index: index[NAME]["parts"][0].update(rows=[64, 0]), "has no rows"),
        (lambda index: index[NAME]["parts"][0].update(rows=[True, 64]), "has no rows"),
        (lambda index: index[NAME].update(shape=[2**60, 2**60]), "rows and 64 are there"),
        (lambda index: index[NAME].update(shape=[64, 2**60]), "by the index"),
        (lambda index: index[NAME].update(shape=[1] * 100), "has no shape"),
        (lambda index: index[NAME].update(shape=None), "has no shape"),
        (lambda index: index.update({NAME: 3}), "is not an object"),
        (lambda index: index.pop(NAME) and None, "it has no `embed_tokens/m`"),
        (lambda index: index.update({NAME: index["lm_head/m"] | {"shape": [64, 17]}}), "by the index"),
        (lambda index: [index], "is not an object"),
    ],
)
def test_an_index_that_lies_is_refused_before_anything_is_loaded(
    stage: StageDir, make, change: Callable[[Any], Any], cause: str
) -> None:
    path = save(stage, 1, make())
    edit(path / "state/index.json", change)
    rehash(path)
    training = make()
    training.advance(0)
    before = training.everything()
    with pytest.raises(IntegrityError, match="no checkpoint") as caught:
        checkpoint.resume(stage, training.model, training.optimizer)
    assert cause in str(caught.value.__cause__.cause)
    assert all(torch.equal(before[name], now) for name, now in training.everything().items())


def test_a_number_of_thousands_of_digits_is_no_traceback(stage: StageDir, make) -> None:
    path = save(stage, 1, make())
    (path / "state/index.json").write_text('{"x": ' + "9" * 5000 + "}")
    rehash(path)
    training = make()
    with pytest.raises(IntegrityError, match="no checkpoint"):
        checkpoint.resume(stage, training.model, training.optimizer)


def test_state_of_other_shapes_than_the_optimizer_has_is_refused(stage: StageDir, make) -> None:
    """Files and index agree with each other; a copy would broadcast."""
    training = make()
    path = save(stage, 1, training)
    with tensors.open_tensors(path / STATE) as file:
        state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    state["resid_theta/m"] = torch.zeros(1)
    tensors.write_tensors(path / STATE, state)
    edit(
        path / "state/index.json",
        lambda index: index["resid_theta/m"].update(
            shape=[1], parts=[{"file": "rank_0-of-1.safetensors", "rows": [0, 1]}]
        ),
    )
    rehash(path)
    with pytest.raises(IntegrityError, match="no checkpoint") as caught:
        checkpoint.resume(stage, training.model, training.optimizer)
    assert "`resid_theta/m` is (1,) there" in str(caught.value.__cause__.cause)


def test_a_renamed_checkpoint_is_not_taken_for_another_step(stage: StageDir, make) -> None:
    save(stage, 1, make()).rename(stage.checkpoints / "step_000009")
    training = make()
    with pytest.raises(IntegrityError, match="no checkpoint") as caught:
        checkpoint.resume(stage, training.model, training.optimizer)
    assert "says step 1" in str(caught.value.__cause__.cause)


# -- using a model ----------------------------------------------------------------------------------------------------


def test_a_model_loads_in_the_type_asked_for(stage: StageDir, make) -> None:
    training = make()
    training.advance(0)
    save(stage, 1, training)
    loaded = checkpoint.load_model(stage, dtype="float64")
    assert (loaded.step, loaded.tokenizer_sha256) == (1, "t" * 64)
    assert (1, loaded.sha256) == files.checkpoint_sha256(stage)
    ids = torch.randint(0, 40, (1, 8))
    torch.testing.assert_close(loaded.model(ids), training.model(ids).detach().double(), atol=1e-5, rtol=1e-4)


def test_a_model_with_every_feature_loads(stage: StageDir, make) -> None:
    full = make().model.arch.model_copy(
        update={
            "arch": "full", "sliding_window": 4, "window_pattern": "SSSL", "final_logit_softcapping": 15.0,
            "value_embeddings": True, "x0_scalars": True, "smear": True, "backout": True, "hidden_size": 32,
            "head_dim": 16,
        }
    )  # fmt: skip
    training = make(full)
    training.advance(0)
    save(stage, 1, training)
    loaded = checkpoint.load_model(stage)
    assert loaded.arch == full
    found = dict(loaded.model.named_parameters())
    assert all(torch.equal(p, found[name]) for name, p in training.model.named_parameters())
    twin = make(full)
    assert checkpoint.resume(stage, twin.model, twin.optimizer)[1] == []
    wanted = training.everything()
    assert all(torch.equal(wanted[name], now) for name, now in twin.everything().items())


def test_a_stage_without_checkpoint_names_the_command(stage: StageDir) -> None:
    with pytest.raises(MissingArtifact) as caught:
        checkpoint.load_model(stage)
    assert caught.value.hint == "make one with `picollm pretrain --run test`"


def test_a_folder_that_only_has_the_name_is_no_checkpoint(stage: StageDir, make) -> None:
    training = make()
    save(stage, 1, training, keep_last=1)
    junk = stage.checkpoints / "step_999999999"
    junk.mkdir()
    assert files.latest_step(stage) == checkpoint.load_model(stage).step == 1
    meta = files.read_meta(files.checkpoint_dir(stage, 1))
    assert checkpoint.resume(stage, training.model, training.optimizer) == (meta, [])
    save(stage, 2, training, keep_last=1)
    assert stage.finished_steps() == [2] and junk.is_dir()
