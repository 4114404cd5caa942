"""What doctor looks at: the list of checks, and those about a run. Each answers for itself and never for the others.

A check reads facts through an `Inspection`, which finds each fact once and only when a check asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from picollm.data.registry import REGISTRY
from picollm.errors import ConfigError, PicollmError, did_you_mean
from picollm.units import duration, size
from picollm_cli import machine_checks as machine
from picollm_cli.inspection import Check, Inspection

LONG_RUN_S = 24 * 3600


def check_dataset(at: Inspection) -> Check:
    from picollm.data.registry import TOY_WORLD_CHAT

    kinds = {name: "text" for name, _ in at.config.data.sources}
    kinds |= {part.dataset: "conversations" for part in at.config.sft.mix} or {TOY_WORLD_CHAT: "conversations"}
    parts = []
    for name, kind in kinds.items():
        try:
            dataset = at.dataset(name)
        except PicollmError as error:
            return Check("dataset", "block", f"{error.message}: {error.cause}", error.hint)
        if dataset is None:
            parts.append(f"`{name}` is {'downloaded' if name in REGISTRY else 'generated'} when needed")
        elif dataset.kind != kind:
            return Check(
                "dataset", "block", f"`{name}` holds {dataset.kind}, {kind} is needed", "see `picollm data list`"
            )
        else:
            parts.append(f"`{name}`: {dataset.rows('train'):,} rows of {kind}, {dataset.chars('train'):,} characters")
    return Check("dataset", "ok", "; ".join(parts))


def check_tokenizer(at: Inspection) -> Check:
    vocab = f"{at.config.tokenizer.vocab_size:,} tokens"
    if at.run is None or not (at.run.tokenizer / "tokenizer.json").is_file():
        return Check("tokenizer", "info", f"is trained by the run ({vocab})")
    from picollm.tokenizer.tokenizer import Tokenizer

    try:
        tokenizer = Tokenizer.load(at.run.tokenizer)
    except PicollmError as error:
        return Check("tokenizer", "block", f"{error.message}: {error.cause}", error.hint)
    return Check("tokenizer", "ok", f"{tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]} as recorded")


def check_plan_memory(at: Inspection) -> Check:
    plan = at.plan
    room, where = at.machine.memory_bytes, "memory"
    if plan.device == "cuda":
        room, where = min(gpu.memory_bytes for gpu in at.machine.gpus), "GPU memory"
    params = f"{plan.params.total / 1e6:.1f} M parameters"
    detail = f"{at.subject} ({params}) needs {size(plan.memory_bytes)} of {size(room)} {where}"
    if plan.memory_bytes > room:
        fix = "choose a smaller preset such as `--preset demo`, a smaller `model.depth` or a shorter row"
        return Check("plan.memory", "block", detail, fix)
    return Check("plan.memory", "ok", detail)


def check_plan_time(at: Inspection) -> Check:
    plan = at.plan
    longest = max(plan.stages, key=lambda stage: stage.time_s)
    whole, part = duration(round(plan.time_s)), duration(round(longest.time_s))
    detail = f"about {whole} for {at.subject}, {part} of it `{longest.name}`"
    if plan.money_usd is not None:
        from picollm.gpu_specs import PRICES_AS_OF

        detail += f"; about ${plan.money_usd:,.2f} at typical prices of {PRICES_AS_OF}"
    if plan.time_s > LONG_RUN_S:
        return Check(
            "plan.time", "warn", detail, "fewer steps (`--set train.steps=…`), a smaller preset or a faster machine"
        )
    return Check("plan.time", "ok", detail)


# -- all of them ------------------------------------------------------------------------------------------------------

# id -> (function, what it asks)
CHECKS: dict[str, tuple[Callable[[Inspection], Check], str]] = {
    "python": (machine.check_python, "is this Python new enough?"),
    "packages": (machine.check_packages, "is every required package installed, in range and loadable?"),
    "package.conflict": (machine.check_package_conflict, "does another distribution own the name `picollm`?"),
    "torch": (machine.check_torch, "does torch load, which build is it?"),
    "device": (machine.check_device, "CPU or GPU, and can torch use it?"),
    "dtype": (machine.check_dtype, "which compute type will training use, and why?"),
    "attention": (machine.check_attention, "which attention kernel will run, and why?"),
    "cores": (machine.check_cores, "how many cores and threads?"),
    "memory": (machine.check_memory, "how much memory is available now?"),
    "disk.room": (machine.check_disk_room, "is there room for datasets and checkpoints?"),
    "disk.writable": (machine.check_disk_writable, "can a file be written to the base directory?"),
    "base_dir": (machine.check_base_dir, "where do datasets and runs live?"),
    "dataset": (check_dataset, "are the run's datasets there and complete?"),
    "tokenizer": (check_tokenizer, "is the run's tokenizer there and intact?"),
    "plan.memory": (check_plan_memory, "does the run fit into memory?"),
    "plan.time": (check_plan_time, "how long will the run take here?"),
}


def select(ids: Sequence[str]) -> list[str]:
    """The checks to run, in the order of CHECKS; all of them when none is named.

    Raises:
        ConfigError: there is no such check; the nearest is named.
    """
    for name in ids:
        if name not in CHECKS:
            raise ConfigError(
                f"there is no check `{name}`",
                cause=f"checks are {', '.join(f'`{known}`' for known in CHECKS)}",
                hint=did_you_mean(
                    name, list(CHECKS), "picollm doctor ", otherwise="list them with `picollm doctor --list`"
                ),
            )
    return [name for name in CHECKS if not ids or name in ids]


def run_check(name: str, at: Inspection) -> Check:
    """One check. What keeps it from answering becomes its answer, so that one fault never hides the other findings."""
    try:
        return CHECKS[name][0](at)
    except PicollmError as error:
        cause = f": {error.cause}" if error.cause else ""
        return Check(name, "warn", f"not known, because {error.message}{cause}", error.hint)
    except ImportError as error:
        return Check(name, "warn", f"not known, because a package does not load: {error}", "see the check `packages`")
    except OSError as error:
        where = f" `{error.filename}`" if error.filename else ""
        return Check(name, "warn", f"not known, because of{where}: {error.strerror or error}", "see `disk.writable`")
