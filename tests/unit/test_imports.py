"""Who may import whom (DESIGN 2), read from the source. Ruff bans single names; this looks at rooms and at chains."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPINE = frozenset({"config", "errors", "events", "files", "hardware", "locks", "run_dir", "units"})
# Room of picollm -> what else of picollm it may import, beside itself. Modules at the top are rooms of their own.
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "config": frozenset({"errors"}),
    "files": frozenset({"errors"}),
    "units": frozenset(),
    "locks": frozenset({"errors", "files"}),
    "run_dir": frozenset({"errors", "files", "__init__"}),
    "events": frozenset({"files"}),
    "attention_choice": frozenset({"config", "errors"}),
    "cgroups": frozenset(),
    "hardware": frozenset({"cgroups"}),
    "gpu_specs": frozenset(),
    "scaling": frozenset({"config", "errors"}),
    "rates": frozenset({"config", "errors", "scaling"}),
    "memory": frozenset({"attention_choice", "config", "scaling"}),
    "estimate": frozenset({"config", "data.registry", "gpu_specs", "hardware", "memory", "scaling"}),
    "recipes": frozenset({"config", "errors", "hardware", "rates", "scaling"}),
    "runtimes": frozenset({"attention_choice", "config", "errors", "hardware", "memory", "rates", "units"}),
    "plan": frozenset(
        {"attention_choice", "config", "estimate", "export.features", "hardware", "memory", "rates", "recipes"}
        | {"runtimes", "scaling"}
    ),
    "torch_facts": frozenset({"errors", "files", "hardware", "run_dir", "__init__"}),
    "manifest": frozenset({"errors", "files", "run_dir", "__init__"}),
    "report": frozenset(
        {"config", "errors", "events", "files", "run_dir", "scaling", "train.checkpoint_files", "units"}
    ),
    "data": frozenset({"errors", "files", "hardware", "locks", "run_dir", "units", "__init__"}),
    "tokenizer": frozenset({"config", "data", "errors", "files", "locks", "run_dir"}),
    "model": frozenset({"attention_choice", "config", "errors"}),
    "optim": frozenset({"config"}),
    "bench": frozenset(
        {"attention_choice", "config", "data.prefetch", "errors", "memory", "model", "scaling", "train"}
    ),
    "train": SPINE | {"attention_choice", "data", "gpu_specs", "memory", "model", "optim", "scaling", "worker"},
    "worker": frozenset({"errors", "events", "locks", "run_dir", "train.distributed"}),
    "generate": frozenset({"data.conversations", "errors", "model", "run_dir", "tokenizer", "train.checkpoint"}),
    "evaluate": frozenset({"data", "errors", "generate", "model", "tokenizer"}),
    "export": frozenset(
        {"config", "data", "errors", "files", "generate", "hardware", "model", "run_dir", "scaling", "tokenizer"}
        | {"train.checkpoint_files", "train.checkpoint_tensors", "units", "__init__"}
    ),
    "stages": SPINE
    | {"attention_choice", "bench", "data", "evaluate", "generate", "model", "optim", "plan", "tokenizer", "train"}
    | {"worker"},
    "__init__": frozenset(),
}
# What may load torch just by being imported; mirrors the exceptions in picollm/ruff.toml.
TORCH_ROOMS = ("model", "optim", "generate", "evaluate")
TORCH_MODULES = frozenset(
    [
        f"picollm.train.{name}"
        for name in "loop loss_scale step checkpoint checkpoint_saver checkpoint_tensors distributed metrics".split()
    ]
    + [f"picollm.bench.{name}" for name in ("gpu_probe", "kernels", "profiling", "steps", "timing", "training")]
    + [f"picollm.stages.{name}" for name in ("training", "pretrain", "sft", "eval")]
    + [
        f"picollm.export.{name}"
        for name in "folding gguf gguf_export llamacpp_checks logits parity shards transformers transformers_check "
        "transformers_tensors remote_code.modeling_picollm".split()
    ]
)
# What the desk may not load before it knows what is wanted; jaxtyping comes with the model's files.
HEAVY = frozenset(
    "torch jaxtyping safetensors numpy pyarrow tokenizers matplotlib pydantic psutil filelock prompt_toolkit "
    "huggingface_hub".split()
)


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages by its dotted name; a package is called `name.__init__`."""
    files = [path for package in ("picollm", "picollm_cli") for path in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def imports(module: str, *, at_import: bool) -> frozenset[str]:
    """Dotted names that a module imports, `from a import b` as `a.b` where that is a module of ours.

    Args:
        at_import: only what importing the module loads, not what functions and type checkers do.
    """
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if ".remote_code." in module and node.level:
                return  # it is copied beside an exported model, where there is no picollm
            assert node.level == 0 and node.module, f"{module}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                ours = inner in modules() or f"{inner}.__init__" in modules()
                whole = f"{node.module}.__init__"
                found.add(inner if ours else whole if whole in modules() else node.module)
        elif at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node)):
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(modules()[module].read_text()))
    return frozenset(found)


def loaded(module: str) -> set[str]:
    """Everything that importing a module of ours loads, through however many of our modules."""
    seen, waiting = set(), [module]
    while waiting:
        for name in imports(waiting.pop(), at_import=True) - seen:
            seen.add(name)
            if name in modules():
                waiting.append(name)
    return seen


def room_of(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("picollm.")])
def test_rooms_import_only_what_the_design_allows(module: str) -> None:
    room = room_of(module)
    used = {name for name in imports(module, at_import=False) if name.startswith("picollm.")}
    others = {name.removeprefix("picollm.") for name in used if room_of(name) != room}
    allowed = ALLOWED[room]
    assert {name for name in others if not ({name, name.split(".")[0]} & allowed)} == set()


def test_every_room_of_the_table_exists() -> None:
    assert {room_of(name) for name in modules() if name.startswith("picollm.")} == set(ALLOWED)


def test_the_library_does_not_know_the_desk() -> None:
    for module in modules():
        if module.startswith("picollm."):
            tops = {name.split(".")[0] for name in imports(module, at_import=False)}
            assert not tops & {"picollm_cli", "rich", "typer"}, module


@pytest.mark.parametrize("module", list(modules()))
def test_torch_is_loaded_by_its_rooms_only(module: str) -> None:
    if module not in TORCH_MODULES and not (module.startswith("picollm.") and room_of(module) in TORCH_ROOMS):
        assert "torch" not in {name.split(".")[0] for name in loaded(module)}


@pytest.mark.parametrize("module", [name for name in modules() if name.startswith("picollm_cli.")])
def test_the_desk_starts_light(module: str) -> None:
    assert {name.split(".")[0] for name in loaded(module)} & HEAVY == set()


@pytest.mark.parametrize("module", [name for name in modules() if name.endswith("__init__")])
def test_packages_pull_in_nothing(module: str) -> None:
    if module == "picollm.__init__":
        assert imports(module, at_import=False) == set()
    else:
        assert modules()[module].read_text() == ""
