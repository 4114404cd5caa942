"""Which attention kernel a run uses, and why: pure functions of the device, without torch.

The plan asks before anything is made, with what is known of the machine; the worker and doctor ask again with what
torch really has (`picollm.model.attention.attention_device`), and that answer counts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from picollm.config.model import Architecture
from picollm.errors import ConfigError

BACKENDS = ("matmul", "sdpa", "cudnn", "flash", "varlen", "fa3", "flex")
# Longest rows at which SDPA is no faster than scores in memory on a CPU, forward and backward (bench/choices.py). With
# a window scores in memory win at every length, because whole blocks of keys are skipped.
MATMUL_ATTENTION_MAX_T = {"bfloat16": 2048, "float32": 512}
HALF_TYPES = ("bfloat16", "float16")
# Of the head sizes, those that every supported version takes forward and backward.
MAX_HEAD_SIZE = {"cudnn": 128, "flash": 256, "varlen": 256, "fa3": 256}
# As in cuDNN's headers. From here on its attention is torch's first choice on Hopper and Blackwell.
CUDNN_FAST_ATTENTION = 91501
CUDNN_FIX = "install torch 2.11 or newer, which brings a new cuDNN, and take any other out of `LD_LIBRARY_PATH`"


@dataclass(frozen=True)
class AttentionDevice:
    """What decides about kernels.

    Attributes:
        type: `cpu`, `cuda` or `mps`.
        capability: of an NVIDIA GPU, such as (9, 0).
        cudnn: version as in its headers, 91501 for 9.15.1; None where there is none.
        rocm: an AMD GPU behind torch's `cuda`.
        installed: of `flash`, `varlen`, `fa3` and `flex`, what this torch and its neighbours bring for such a device.
    """

    type: str
    capability: tuple[int, int] | None = None
    cudnn: int | None = None
    rocm: bool = False
    installed: frozenset[str] = frozenset()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> AttentionDevice:
        capability = tuple(value["capability"]) if value["capability"] else None
        return cls(**value | {"capability": capability, "installed": frozenset(value["installed"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"installed": sorted(self.installed)}

    @property
    def nvidia(self) -> bool:
        return self.type == "cuda" and not self.rocm

    def __str__(self) -> str:
        if self.nvidia and self.capability:
            return f"a GPU of compute capability {self.capability[0]}.{self.capability[1]}"
        return {"cpu": "a CPU", "mps": "an Apple GPU", "cuda": "an AMD GPU" if self.rocm else "a GPU"}[self.type]


@dataclass(frozen=True)
class AttentionChoice:
    """A backend for layers that see everything, one for layers with a window (None where there are none), and why.

    `slow` is set where something installed on this machine keeps it from the kernel that it should have: what, and
    the remedy.
    """

    full: str
    window: str | None
    reason: str
    slow: tuple[str, str] | None = None

    def __str__(self) -> str:
        return self.full if self.window in (None, self.full) else f"{self.full}, windows {self.window}"


def choose_attention(
    device: AttentionDevice,
    dtype: str,
    row: int,
    *,
    windows: bool = False,
    requested: str = "auto",
    head_size: int | None = None,
    documents: bool = False,
) -> AttentionChoice:
    """The kernels of a run, by the measurements in GPU.md 4 and bench/choices.py.

    Args:
        dtype: compute type, as in recipes.
        row: tokens in a row, T.
        windows: some layers have a window.
        requested: `model.attention`.
        head_size: D; None for one that every kernel takes.
        documents: the documents of a row must not see each other.

    Raises:
        ConfigError: the requested backend cannot work on this device, in this type, with this head size or a window.
    """
    if requested != "auto":
        return _forced(requested, device, dtype, head_size, windows, documents)
    if device.type == "cpu":
        return _on_cpu(dtype, row, windows)
    full, windowed, reason = _order(device, dtype)
    if documents:
        full = windowed = ("fa3", "varlen", "sdpa")
        reason = "FA3 is the fastest on Hopper"
    able = [name for name in full if not obstacle(name, device, dtype, head_size)]
    slow = None
    if "cudnn" in full and (device.cudnn or 0) < CUDNN_FAST_ATTENTION:
        able = [name for name in able if name != "cudnn"]
        if able[0] != "fa3":
            slow = (f"{_cudnn_text(device)}, its attention is fast from 9.15.1 on", CUDNN_FIX)
    chosen = able[0]
    if chosen != full[0]:
        reason = f"the first of {', '.join(full)} that is good in {dtype} on {device} as it is"
    if documents:
        reason += ", of those that keep the documents of a row apart (`data.packing=documents`)"
    if not windows:
        return AttentionChoice(chosen, None, reason, slow)
    window = next(name for name in windowed if not obstacle(name, device, dtype, head_size, windows=True))
    reason += f"; for windows the first that works of {', '.join(windowed)}" if len(windowed) > 1 else ""
    if chosen == "cudnn" and window in ("varlen", "sdpa"):
        reason += f", and {window} is hardly faster there than full attention (`model.window_pattern=L`)"
    return AttentionChoice(chosen, window, reason, slow)


def attention_for(
    arch: Architecture, dtype: str, device: AttentionDevice, requested: str = "auto", *, documents: bool = False
) -> AttentionChoice:
    """`choose_attention` for a model's shapes."""
    return choose_attention(
        device,
        dtype,
        arch.max_position_embeddings,
        windows=arch.sliding_window is not None,
        requested=requested,
        head_size=arch.head_dim,
        documents=documents,
    )


def _on_cpu(dtype: str, row: int, windows: bool) -> AttentionChoice:
    limit = MATMUL_ATTENTION_MAX_T.get(dtype, 0)
    if row <= limit:
        reason = f"on a CPU SDPA is no faster in {dtype} up to {limit} tokens a row"
        return AttentionChoice("matmul", "matmul" if windows else None, reason)
    reason = f"on a CPU the better one in {dtype} above {limit} tokens a row"
    if windows:
        reason += "; matmul skips the keys outside a window"
    return AttentionChoice("sdpa", "matmul" if windows else None, reason)


def _order(device: AttentionDevice, dtype: str) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Backends by speed for full attention and for windows (`sdpa`, which always works, is the last), and why."""
    major = device.capability[0] if device.capability else 0
    if device.type == "mps":
        return ("sdpa",), ("sdpa",), "SDPA is what Apple GPUs have"
    if device.rocm:
        return ("sdpa",), ("flex", "sdpa"), "SDPA is AOTriton's kernel on AMD GPUs"
    if dtype not in HALF_TYPES:
        return ("sdpa",), ("flex", "sdpa"), f"in {dtype} SDPA's memory-efficient kernel is the only fused one"
    if major < 8:
        return ("sdpa",), ("sdpa",), f"on {device} SDPA's memory-efficient kernel is the only fused one"
    if major == 9:
        reason = "cuDNN's kernel is the fastest on Hopper"
        return ("cudnn", "fa3", "flash", "sdpa"), ("fa3", "flex", "varlen", "sdpa"), reason
    if major == 10:
        reason = "cuDNN's kernel is the fastest on data-center Blackwell"
        return ("cudnn", "flash", "sdpa"), ("flex", "varlen", "sdpa"), reason
    if device.capability == (8, 0):
        return ("flash", "sdpa"), ("varlen", "flex", "sdpa"), "flash is faster than cuDNN on the A100"
    if major == 12:
        return ("flash", "sdpa"), ("flex", "varlen", "sdpa"), "flash is faster than cuDNN on this Blackwell"
    return ("sdpa",), ("varlen", "flex", "sdpa"), f"on {device} torch's own order of kernels is right"


def _cudnn_text(device: AttentionDevice) -> str:
    version = device.cudnn
    return f"cuDNN is {version // 10000}.{version // 100 % 100}.{version % 100}" if version else "torch finds no cuDNN"


# -- forced backends --------------------------------------------------------------------------------------------------


def _forced(
    name: str, device: AttentionDevice, dtype: str, head_size: int | None, windows: bool, documents: bool
) -> AttentionChoice:
    def against(backend: str) -> str | None:
        return obstacle(backend, device, dtype, head_size, windows=windows, documents=documents)

    if cause := against(name):
        able = [other for other in BACKENDS if not against(other)]
        raise ConfigError(
            f"`model.attention={name}` cannot work here",
            cause=cause,
            hint=f"leave it `auto`, or choose one that can: {', '.join(able)}",
        )
    return AttentionChoice(name, name if windows else None, "`model.attention` asks for it")


MISSING = {
    "flash": "this torch was built without flash attention",
    "varlen": "`varlen_attn` with windows came with torch 2.11",
    "fa3": "the FA3 wheel (module `flash_attn_interface`) and torch 2.11 are not both installed",
    "flex": "flex is compiled by Triton, which is not installed",
}


def obstacle(
    name: str,
    device: AttentionDevice,
    dtype: str,
    head_size: int | None = None,
    *,
    windows: bool = False,
    documents: bool = False,
) -> str | None:
    """Why a backend cannot train on a device, or None where it can."""
    if name in ("matmul", "sdpa"):
        return None
    if documents and name in ("cudnn", "flash", "flex"):
        return f"{name} does not keep the documents of a row apart, as `data.packing=documents` asks"
    if name == "flex":
        if device.type != "cuda":
            return f"flex has no backward pass on {device}"
        return None if "flex" in device.installed else MISSING["flex"]
    if windows and name in ("cudnn", "flash"):
        return f"the architecture has windows, and torch offers none with {name}"
    if not device.nvidia:
        return f"{name} needs an NVIDIA GPU, and this is {device}"
    if device.capability is not None and device.capability < (8, 0):
        return f"{name} needs compute capability 8.0, and this is {device}"
    if name == "fa3" and device.capability != (9, 0):
        return f"FA3 is for Hopper (compute capability 9.0) only, and this is {device}"
    if dtype not in HALF_TYPES:
        return f"{name} computes in {' or '.join(HALF_TYPES)}, not in {dtype}"
    if head_size is not None and (head_size % 8 or head_size > MAX_HEAD_SIZE[name]):
        return f"{name} takes head sizes that are multiples of 8 up to {MAX_HEAD_SIZE[name]}, and this is {head_size}"
    if name == "cudnn":
        return None if device.cudnn is not None else "torch finds no cuDNN"
    return None if name in device.installed else MISSING[name]


# -- what really ran --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What a profile of one call saw: the family and the kernel's own name."""

    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.family} (`{self.name[:60]}`)"


# A word that occurs in the kernel's name -> its family; the first that fits, since cuDNN's and FA3's say "flash" too.
FAMILIES = (
    ("cudnn", "cudnn"),
    ("sm90<flash", "fa3"),
    ("fwdsm90", "fa3"),
    ("bwdsm90", "fa3"),
    ("flex_attention", "flex"),
    ("triton_", "flex"),
    ("flash", "flash"),
    ("fmha_cutlass", "efficient"),
    ("attn_fwd", "aotriton"),
)
# Backend -> families that are its own. SDPA may run any but the last resort.
EXPECTED = {
    "cudnn": ("cudnn",),
    "flash": ("flash", "fa3"),
    "varlen": ("flash", "fa3"),
    "fa3": ("fa3",),
    "flex": ("flex",),
    "sdpa": ("cudnn", "flash", "fa3", "efficient", "aotriton"),
}


def kernel_family(name: str) -> str:
    """`cudnn`, `fa3`, `flex`, `flash`, `efficient` or `aotriton`; `math` for everything that is not fused attention."""
    lower = name.lower()
    return next((family for word, family in FAMILIES if word in lower), "math")


def mismatch(backend: str, kernel: Kernel) -> tuple[str, str] | None:
    """What is wrong when another kernel ran than the backend stands for, and the remedy; None where all is well."""
    if kernel.family in EXPECTED.get(backend, (kernel.family,)):
        return None
    what = f"{backend} attention was chosen, but {kernel} ran"
    if backend == "cudnn":
        return f"{what}, about half as fast", CUDNN_FIX
    if backend == "fa3":
        return what, "install the FA3 wheel again, built for this torch"
    return what, "report it, and choose another with `--set model.attention=…`"
