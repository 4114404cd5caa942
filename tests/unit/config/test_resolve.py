"""Layers, their sources, and what a mistake in each of them says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from picollm.config.keys import flatten
from picollm.config.presets import PRESETS
from picollm.config.resolve import (
    changed_recipe_keys,
    known_keys,
    resolve,
    resolve_existing,
    user_config_path,
)
from picollm.config.schema import RUNTIME_KEYS, RunConfig
from picollm.errors import ConfigError, IntegrityError

DEMO_STEPS = PRESETS["demo"].values["train"]["steps"]


def write_user(text: str) -> Path:
    path = user_config_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def said(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    return f"{caught.value.message} | {caught.value.cause} | {caught.value.hint}"


# -- precedence -------------------------------------------------------------------------------------------------------


def test_each_layer_beats_the_one_below(tmp_path, monkeypatch):
    def steps(**call):
        found = resolve(**{"preset": "demo", **call})
        return found.config.train.steps, found.sources.get("train.steps")

    assert steps(preset=None) == (None, None)
    assert steps() == (DEMO_STEPS, "preset demo")
    user = write_user("[train]\nsteps = 2\n")
    assert steps() == (2, f"user config {user}")
    monkeypatch.setenv("PICOLLM_TRAIN__STEPS", "3")
    assert steps() == (3, "env PICOLLM_TRAIN__STEPS")
    config = write_toml(tmp_path, "[train]\nsteps = 4\n")
    assert steps(config_path=config) == (4, f"config file {config}")
    assert steps(config_path=config, sets=["train.steps=5"]) == (5, "--set")
    assert steps(config_path=config, sets=["train.steps=5", "train.steps=6"]) == (6, "--set")


def test_layers_merge_key_by_key(tmp_path):
    config = write_toml(tmp_path, "seed = 7\n[train]\nthreads = 1\n")
    found = resolve(preset="demo", config_path=config, sets=["model.depth=2"])
    assert (found.config.seed, found.config.train.threads, found.config.train.steps) == (7, 1, DEMO_STEPS)
    assert found.config.model.depth == 2 and found.config.model.hidden_size == 128
    assert found.sources["train.threads"] == f"config file {config}"


def test_no_preset_is_the_schema():
    found = resolve(preset=None)
    assert (found.preset, found.config, found.sources) == ("custom", RunConfig(), {})


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_the_schema(name):
    found = resolve(preset=name)
    assert found.preset == name
    assert set(found.sources.values()) == {f"preset {name}"}
    assert PRESETS[name].description


def test_user_config_follows_xdg_and_home(tmp_path, monkeypatch):
    assert user_config_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/picollm/config.toml")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_config_path({}) == tmp_path / ".config/picollm/config.toml"


def test_variables_that_are_not_config_are_left_alone(monkeypatch):
    monkeypatch.setenv("PICOLLM_RUN", "x")
    monkeypatch.setenv("PICOLLM_SEED", "9")
    assert "PICOLLM_BASE_DIR" in os.environ
    found = resolve(preset="demo")
    assert found.config.seed == 9 and found.sources["seed"] == "env PICOLLM_SEED"


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("train.steps=600", "train.steps", 600),
        ("train.steps = 600 ", "train.steps", 600),
        ("train.matrix_lr=1e-3", "train.matrix_lr", 1e-3),
        ("train.matrix_lr=1", "train.matrix_lr", 1.0),
        ("train.weight_decay=false", "train.weight_decay", False),
        ("train.dtype=float32", "train.dtype", "float32"),
        ('data.dataset="my text"', "data.dataset", "my text"),
        ("data.dataset=peps", "data.dataset", "peps"),
        ("data.dataset=2024", "data.dataset", "2024"),
        ("data.dataset=2024-01-01", "data.dataset", "2024-01-01"),
        ("train.steps=none", "train.steps", None),
    ],
)
def test_set_values(argument, key, value):
    assert dict(flatten(resolve(preset="demo", sets=[argument]).config.model_dump()))[key] == value


def test_mix_as_tables_and_as_a_value(tmp_path):
    config = write_toml(
        tmp_path, '[[sft.mix]]\ndataset = "a"\n[[sft.mix]]\ndataset = "b"\nweight = 2\n[sft]\n'.replace("[sft]\n", "")
    )
    mix = resolve(preset="demo", config_path=config).config.sft.mix
    assert [(part.dataset, part.weight) for part in mix] == [("a", 1.0), ("b", 2.0)]
    found = resolve(preset="demo", config_path=config, sets=['sft.mix=[{dataset="c"}]'])
    assert [part.dataset for part in found.config.sft.mix] == ["c"]
    assert found.sources["sft.mix"] == "--set"


def test_a_ratio_above_the_presets_steps_takes_effect():
    assert resolve(preset="demo", sets=["train.ratio=8"]).config.train.steps is None
    both = resolve(preset="demo", sets=["train.steps=5"]).config
    assert both.train.steps == 5


def test_ratio_and_steps_of_one_layer_keep_the_steps(tmp_path):
    config = write_toml(tmp_path, "[train]\nratio = 8\nsteps = 5\n")
    assert resolve(preset="demo", config_path=config).config.train.steps == 5


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("train.step=5", ["unknown key `train.step`", "`--set`", "did you mean `train.steps`?"]),
        ("model.steps=5", ["unknown key `model.steps`", "did you mean `train.steps`?"]),
        ("steps=5", ["unknown key `steps`", "did you mean `train.steps`?"]),
        ("trian.steps=5", ["unknown section `trian`", "did you mean `train`?"]),
        ("model.depth.x=3", ["unknown key `model.depth.x`", "did you mean `model.depth`?"]),
        ("foo=1", ["unknown key `foo`", "prints every key"]),
        ("train=5", ["`train` is a section", "`train.steps`"]),
        ("train.steps", ["`--set train.steps` is not `section.key=value`", "--set train.steps=600"]),
        ("train.steps=0", ["`train.steps` cannot be 0", "at least 1", "the plan derives it"]),
        ("train.steps=many", ['`train.steps` cannot be "many"', "a whole number"]),
        ("train.steps=true", ["`train.steps` cannot be true", "a whole number"]),
        ('train.steps="5"', ['`train.steps` cannot be "5"', "a whole number"]),
        ("train.steps=", ['`train.steps` cannot be ""', "a whole number"]),
        ("train.matrix_lr=0", ["`train.matrix_lr` cannot be 0", "greater than 0", "the default is `0.02`"]),
        ("train.matrix_lr=nan", ["`train.matrix_lr` cannot be NaN", "a finite number"]),
        ("train.dtype=fp8", ['`train.dtype` cannot be "fp8"', "'auto', 'float32', 'bfloat16', 'float16' or 'float64'"]),
        ("model.attention=foo", ['`model.attention` cannot be "foo"', "'auto', 'matmul', 'sdpa'", "default is `auto`"]),
        ("train.weight_decay=1", ["`train.weight_decay` cannot be 1", "`true` or `false`"]),
        ("train.keep_last=none", ['`train.keep_last` cannot be "none"', "a whole number", "the default is `2`"]),
        ("tokenizer.vocab_size=70000", ["`tokenizer.vocab_size` cannot be 70000", "at most 65536"]),
        ("model.window_pattern=SXL", ['`model.window_pattern` cannot be "SXL"', "of the form ^[SL]+$"]),
        ("sft.mix=3", ["`sft.mix` cannot be 3", "a list"]),
        ('sft.mix=[{dataset="a", wieght=1}]', ["unknown key `sft.mix.0.wieght`", "`--set`", "did you mean `weight`?"]),
        ("sft.mix=[{weight=1.0}]", ["`sft.mix.0.dataset` is missing", "`--set`"]),
        ('sft.mix=[{dataset="a", weight=0}]', ["`sft.mix.0.weight` cannot be 0", "`--set`", "greater than 0"]),
    ],
)
def test_set_mistakes(argument, words):
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo", sets=[argument])
    assert all(word in said(caught) for word in words), said(caught)


def test_mistakes_name_their_layer(tmp_path, monkeypatch):
    config = write_toml(tmp_path, "[train]\nsteps = -1\n")
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo", config_path=config)
    assert f"config file {config}" in said(caught) and "--set train.steps=" in said(caught)

    user = write_user("[modle]\ndepth = 3\n")
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo")
    assert f"user config {user}" in said(caught) and "did you mean `model`?" in said(caught)
    user.unlink()

    monkeypatch.setenv("PICOLLM_TRAIN__STEP", "3")
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo")
    assert "env PICOLLM_TRAIN__STEP" in said(caught) and "did you mean `train.steps`?" in said(caught)


@pytest.mark.parametrize("text", ["[foo]\n", "[train.foo]\n", "train = 3\n", "[train]\nfoo.bar = 1\n"])
def test_toml_that_does_not_fit_the_schema(tmp_path, text):
    with pytest.raises(ConfigError):
        resolve(preset="demo", config_path=write_toml(tmp_path, text))


def test_empty_section_is_fine(tmp_path):
    found = resolve(preset="demo", config_path=write_toml(tmp_path, "[train]\n"))
    assert found == resolve(preset="demo")


def test_toml_syntax_error_names_file_and_line(tmp_path):
    config = write_toml(tmp_path, "[train]\nsteps = \n")
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo", config_path=config)
    assert str(config) in said(caught) and "line 2" in said(caught)


def test_config_that_is_not_utf8(tmp_path):
    config = tmp_path / "run.toml"
    config.write_bytes(b"seed = \xff\n")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve(preset="demo", config_path=config)


def test_missing_config_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo", config_path=tmp_path / "no.toml")
    assert "no.toml" in said(caught) and caught.value.exit_code == 2


def test_unknown_preset():
    with pytest.raises(ConfigError) as caught:
        resolve(preset="dmeo")
    assert "unknown preset `dmeo`" in said(caught) and "--preset demo" in said(caught)


# -- existing runs ----------------------------------------------------------------------------------------------------


def stored(found) -> dict:
    """As it comes back from `config.json`."""
    config = found.config.model_dump(mode="json")
    return json.loads(json.dumps({"schema": 1, "preset": found.preset, "sources": found.sources, "config": config}))


def test_existing_run_keeps_its_values(monkeypatch):
    old = resolve(preset="demo", sets=["train.steps=9", 'sft.mix=[{dataset="a"}]'])
    write_user("[train]\nsteps = 2\n")
    monkeypatch.setenv("PICOLLM_TRAIN__STEPS", "3")
    assert resolve_existing(stored(old)) == old


def test_existing_run_takes_this_calls_values(tmp_path):
    old = resolve(preset="demo")
    config = write_toml(tmp_path, "[train]\nsteps = 4\nthreads = 1\n")
    new = resolve_existing(stored(old), config_path=config, sets=["seed=1"])
    assert changed_recipe_keys(old.config, new.config) == [("seed", 42, 1), ("train.steps", DEMO_STEPS, 4)]
    assert new.sources["train.steps"] == f"config file {config}" and new.sources["sft.steps"] == "preset demo"
    assert new.config.train.threads == 1


@pytest.mark.parametrize("config", [{"train": {"stepz": 1}}, {"train": {"steps": 0}}, [], None])
def test_edited_config_of_a_run(config):
    with pytest.raises(IntegrityError, match="does not hold a valid config"):
        resolve_existing({"schema": 1, "preset": "demo", "sources": {}, "config": config})


def test_runtime_keys_exist_and_are_not_recipe():
    assert set(known_keys()) >= RUNTIME_KEYS
    old = resolve(preset="demo").config
    for key, value in (("train.threads", 1), ("model.attention", "sdpa"), ("train.compile", "true")):
        assert changed_recipe_keys(old, resolve(preset="demo", sets=[f"{key}={value}"]).config) == []


def test_a_mixture_is_a_table_of_names(tmp_path: Path) -> None:
    """Names may hold dots; layers add to the table by name, and an empty one empties it."""
    config = tmp_path / "mix.toml"
    config.write_text('[data.mix]\npeps = 3\n"v1.5" = 1.5\n')

    def mix(*sets: str) -> list[tuple[str, float]]:
        return resolve(preset="demo", config_path=config, sets=sets, environ={}).config.data.sources

    assert mix() == [("peps", 3.0), ("v1.5", 1.5)]
    assert mix("data.mix.rfcs=2", "data.mix.peps=1") == [("peps", 1.0), ("rfcs", 2.0), ("v1.5", 1.5)]
    assert mix("data.mix={}", "data.mix.rfcs=2") == [("rfcs", 2.0)]
    assert mix("data.mix={}") == [("toy-world", 1.0)]
    found = resolve(preset="demo", environ={"PICOLLM_DATA__MIX__PEPS": "2"})
    assert (found.config.data.mix, found.sources["data.mix"]) == ({"peps": 2.0}, "env PICOLLM_DATA__MIX__PEPS")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("data.mix.peps=0", "greater than 0"),
        ("data.mix.peps=much", "a number"),
        ("data.mix=5", "a table of datasets and weights"),
        ("data.mx.peps=1", "unknown key `data.mx.peps`"),
        ("data.packing=document", "one of 'best_fit', 'concat' or 'documents'"),
    ],
)
def test_a_mixture_that_cannot_be(setting: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(preset="demo", sets=[setting], environ={})
    assert said in f"{caught.value.message} {caught.value.cause}"


def test_another_mixture_is_another_recipe_and_another_cache_is_not() -> None:
    def made(*sets: str) -> RunConfig:
        return resolve(preset="demo", sets=sets, environ={}).config

    changed = changed_recipe_keys(made("data.mix.a=1"), made("data.mix.a=2", "data.cache_gib=0"))
    assert changed == [("data.mix", {"a": 1.0}, {"a": 2.0})]
