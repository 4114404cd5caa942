"""Layers of values -> one RunConfig, and where each value came from.

Low to high: schema default < preset < user TOML < `PICOLLM_<SECTION>__<KEY>` < `--config` < `--set`.
"""

from __future__ import annotations

import json
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from picollm.config.keys import NAMED_TABLES, flatten, nest, split_named
from picollm.config.presets import PRESETS
from picollm.config.schema import RUNTIME_KEYS, RunConfig
from picollm.errors import ConfigError, IntegrityError, did_you_mean, nearest, printable

ENV_PREFIX = "PICOLLM_"
# Variables of picollm that are not config keys.
ENV_OTHER = frozenset({"PICOLLM_BASE_DIR", "PICOLLM_RUN"})
LIST_KEYS = "picollm speedrun --preset demo --dry-run"


@dataclass(frozen=True)
class Resolved:
    """A run's config with the source of every value that some layer set (`{"train.steps": "--set", …}`)."""

    preset: str
    config: RunConfig
    sources: dict[str, str]


@dataclass(frozen=True)
class _Layer:
    source: str
    values: dict[str, Any]


def resolve(
    *,
    preset: str | None,
    config_path: Path | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] = os.environ,
) -> Resolved:
    """Resolve the config of a new run.

    Args:
        preset: a name in PRESETS; None starts from the schema's defaults and is called `custom`.
        config_path: `--config run.toml`.
        sets: `--set` arguments, `section.key=value`; later ones win.
        environ: where `PICOLLM_<SECTION>__<KEY>` and `XDG_CONFIG_HOME` are looked up.

    Raises:
        ConfigError: unknown preset, section or key (with the nearest name), a value of the wrong type or out of
            range (with its source and what is allowed), TOML that does not parse, a missing `--config` file.
    """
    layers = []
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(
                f"unknown preset `{preset}`",
                cause=f"presets are {', '.join(f'`{name}`' for name in PRESETS)}",
                hint=did_you_mean(preset, list(PRESETS), "--preset ", otherwise="choose one of them"),
            )
        layers.append(_Layer(f"preset {preset}", PRESETS[preset].values))
    user = user_config_path(environ)
    if user.is_file():
        layers.append(_toml_layer(user, f"user config {user}"))
    layers += _environ_layers(environ)
    layers += _call_layers(config_path, sets)
    return _build(preset or "custom", {}, {}, layers)


def resolve_existing(stored: dict[str, Any], *, config_path: Path | None = None, sets: Sequence[str] = ()) -> Resolved:
    """Lay this call's values over an existing run's config; environment and user TOML stay out of it.

    Args:
        stored: what `RunDir.read_config()` returns: `{"preset", "sources", "config", …}`.
        config_path: `--config run.toml` of this call.
        sets: `--set` arguments of this call.

    Raises:
        ConfigError: as in `resolve`.
        IntegrityError: the stored config does not fit the schema.
    """
    try:
        base = RunConfig.model_validate_json(json.dumps(stored["config"])).model_dump(mode="json")
        preset, sources = str(stored["preset"]), dict(stored["sources"])
    except (ValidationError, KeyError, TypeError, ValueError) as error:
        detail = _dotted(error.errors()[0]["loc"]) if isinstance(error, ValidationError) else str(error)
        raise IntegrityError(
            "the run's `config.json` does not hold a valid config",
            cause=f"`{detail}` is not what this picollm writes",
            hint="undo the edit, or start a new run with `--run NAME`",
        ) from error
    return _build(preset, base, sources, _call_layers(config_path, sets))


def changed_recipe_keys(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """`(dotted key, old value, new value)` of every difference that changes what is trained or measured.

    Keys in RUNTIME_KEYS (how it is executed) are left out.
    """
    before, after = dict(flatten(old.model_dump(mode="json"))), dict(flatten(new.model_dump(mode="json")))
    return [(key, before[key], after[key]) for key in before if before[key] != after[key] and key not in RUNTIME_KEYS]


def user_config_path(environ: Mapping[str, str] = os.environ) -> Path:
    """The operator's own defaults: `${XDG_CONFIG_HOME or ~/.config}/picollm/config.toml`."""
    path = Path(environ.get("XDG_CONFIG_HOME") or "~/.config", "picollm", "config.toml")
    try:
        return path.expanduser()
    except RuntimeError:
        return path  # a user without a home directory has no such file, and needs none


def known_keys() -> dict[str, Any]:
    """Every dotted key of the schema, with its type annotation."""
    keys: dict[str, Any] = {}
    for name, field in RunConfig.model_fields.items():
        if _is_section(field.annotation):
            keys |= {f"{name}.{key}": inner.annotation for key, inner in field.annotation.model_fields.items()}
        else:
            keys[name] = field.annotation
    return keys


# -- layers -----------------------------------------------------------------------------------------------------------


def _call_layers(config_path: Path | None, sets: Sequence[str]) -> list[_Layer]:
    layers = []
    if config_path is not None:
        if not config_path.is_file():
            raise ConfigError(
                f"there is no config file `{config_path}`",
                cause="`--config` names a file that does not exist",
                hint="give the path of a TOML file with sections such as `[train]`",
            )
        layers.append(_toml_layer(config_path, printable(f"config file {config_path}")))
    for argument in sets:
        key, equals, text = argument.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"`--set {argument}` is not `section.key=value`",
                cause="it needs a key, a `=` and a value",
                hint="write it as `--set train.steps=600`",
            )
        layers.append(_text_layer(key.strip(), text.strip(), "--set"))
    return layers


def _toml_layer(path: Path, source: str) -> _Layer:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`{path}` is not valid TOML",
            cause=f"{path}: {error}",  # tomllib names line and column
            hint='strings need quotes (`dataset = "toy-world"`); sections are `[train]`',
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read `{path}`", cause=error.strerror, hint="check its permissions") from error
    for name in [name for name, value in values.items() if value == {}]:
        _check_section(name, source)
        del values[name]
    for key, _ in flatten(values):
        _check_key(key, source)
    return _Layer(source, values)


def _environ_layers(environ: Mapping[str, str]) -> list[_Layer]:
    """`PICOLLM_TRAIN__STEPS=600` and, for keys outside a section, `PICOLLM_SEED=7`."""
    layers = []
    for name in sorted(environ):
        if not name.startswith(ENV_PREFIX) or name in ENV_OTHER:
            continue
        key = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
        if "." in key or key in known_keys():
            layers.append(_text_layer(key, environ[name].strip(), f"env {name}"))
    return layers


def _text_layer(key: str, text: str, source: str) -> _Layer:
    """One value from text: a TOML value, else a plain string; `none` gives a key back to the plan."""
    table, name = split_named(key)
    _check_key(table, source)
    annotation = known_keys()[table]
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if len(parsed) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    if annotation is str and not isinstance(value, str):
        value = text  # a dataset may be called 2024
    elif value == "none" and type(None) in typing.get_args(annotation):
        value = None
    return _Layer(source, nest({table: value if name is None else {name: value}}))


def _build(preset: str, base: dict[str, Any], sources: dict[str, str], layers: list[_Layer]) -> Resolved:
    merged, sources = dict(flatten(base)), dict(sources)
    for layer in layers:
        values = dict(flatten(layer.values))
        # Steps win over a ratio, so a ratio asked for above a preset's steps would do nothing.
        if "train.ratio" in values and "train.steps" not in values and merged.get("train.steps") is not None:
            values["train.steps"] = None
        for key in NAMED_TABLES & values.keys():
            # Key by key, as sections are; an empty table leaves nothing of those below.
            if values[key] and isinstance(values[key], Mapping):
                values[key] = {**(merged.get(key) or {}), **values[key]}
        merged |= values
        sources |= dict.fromkeys(values, layer.source)
    try:
        # Strict JSON: "5" or true is no number, while lists may become tuples and tables sections.
        config = RunConfig.model_validate_json(json.dumps(nest(merged), default=str), strict=True)
    except ValidationError as error:
        raise _translate(error, sources) from error
    return Resolved(preset, config, sources)


# -- errors -----------------------------------------------------------------------------------------------------------


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _check_section(name: str, source: str) -> None:
    sections = [key for key, field in RunConfig.model_fields.items() if _is_section(field.annotation)]
    if name not in sections:
        raise ConfigError(
            f"unknown section `{name}`",
            cause=f"set by {_tick(source)}; sections are {', '.join(f'`{section}`' for section in sections)}",
            hint=did_you_mean(name, sections, otherwise=f"`{LIST_KEYS}` prints every key"),
        )


def _check_key(key: str, source: str) -> None:
    known = known_keys()
    if key in known:
        return
    section, _, leaf = key.partition(".")
    if not leaf and any(name.startswith(f"{section}.") for name in known):
        raise ConfigError(
            f"`{section}` is a section and has no value of its own",
            cause=f"set by {_tick(source)}; its keys are {', '.join(_keys_of(section))}",
            hint=f"set one of its keys, such as `{next(k for k in known if k.startswith(section + '.'))}`",
        )
    if leaf:
        _check_section(section, source)
    # The right word in the wrong section, then a mistyped word in the right one, then anything.
    close = (
        next((name for name in known if name.endswith(f".{leaf or section}")), None)
        or nearest(key, [name for name in known if name.startswith(f"{section}.")])
        or nearest(key, list(known))
    )
    raise ConfigError(
        f"unknown key `{key}`",
        cause=f"set by {_tick(source)}" + (f"; keys of `{section}` are {', '.join(_keys_of(section))}" if leaf else ""),
        hint=f"did you mean `{close}`?" if close else f"`{LIST_KEYS}` prints every key",
    )


def _keys_of(section: str) -> list[str]:
    return [f"`{name.partition('.')[2]}`" for name in known_keys() if name.startswith(f"{section}.")]


def _tick(source: str) -> str:
    return f"`{source}`" if source == "--set" else source


def _dotted(loc: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in loc)


_TYPE_NAMES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "`true` or `false`",
    "string_type": "a string",
    "tuple_type": "a list",
    "dict_type": "a table of datasets and weights, such as `{{ peps = 3, rfcs = 1 }}`",
    "string_pattern_mismatch": "text of the form {pattern}",
}
_BOUNDS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "greater than"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "less than"),
}


def _translate(error: ValidationError, sources: Mapping[str, str]) -> ConfigError:
    """The first complaint of pydantic in our words: key, value, source, what is allowed."""
    detail = error.errors(include_url=False)[0]
    key, kind, context = _dotted(detail["loc"]), detail["type"], detail.get("ctx", {})
    source = next(
        (name for prefix, name in sources.items() if key == prefix or key.startswith(f"{prefix}.")), "default"
    )
    if kind == "extra_forbidden":
        from picollm.config.sft import SftSource

        return ConfigError(
            f"unknown key `{key}`",
            cause=f"set by {_tick(source)}",
            hint=did_you_mean(
                str(detail["loc"][-1]), list(SftSource.model_fields), otherwise="keys are `dataset` and `weight`"
            ),
        )
    if kind == "missing":
        return ConfigError(
            f"`{key}` is missing", cause=f"the entry is set by {_tick(source)}", hint=f"add `{detail['loc'][-1]}`"
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        allowed = f"{words} {context[name]:g}" if isinstance(context[name], float) else f"{words} {context[name]}"
    elif kind == "literal_error":
        allowed = f"one of {context['expected']}"
    else:
        allowed = _TYPE_NAMES[kind].format_map(context) if kind in _TYPE_NAMES else detail["msg"]
    if source == "--set":
        default = dict(flatten(RunConfig().model_dump(mode="json"))).get(key)
        hint = f"the default is `{default}`" if default is not None else "leave it out and the plan derives it"
    else:
        hint = f"correct it there, or override it with `--set {key}=VALUE`"
    return ConfigError(
        f"`{key}` cannot be {json.dumps(detail['input'], default=str)}",
        cause=f"set by {_tick(source)}; it must be {allowed}",
        hint=hint,
    )
