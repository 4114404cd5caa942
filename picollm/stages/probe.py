"""What torch can do on this machine, as one JSON object on stdout: `python -m picollm.stages.probe`.

A process of its own, because importing torch takes a second and a broken build can take the interpreter down with it.
It takes no argument and writes no file; `picollm.torch_facts` starts it and keeps the answer.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from picollm.errors import first_line

if TYPE_CHECKING:
    import torch

# Tens of products on a modern core and at least one on a slow one, which is done in a tenth of a second.
MATMUL_SECONDS = 0.03
MATMUL_SIZE = 512
GPU_MATMUL_SIZE = 8192


def main() -> int:
    """Print the facts; exit code 3 with `{"error": …}` when torch cannot be imported."""
    try:
        import torch
    except Exception as error:  # a missing library, a wrong ABI, a half-installed wheel: whatever it is, report it
        print(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))
        return 3
    print(json.dumps(facts(torch)))
    return 0


def facts(torch: Any) -> dict[str, Any]:
    """Everything doctor asks about torch.

    Returns:
        torch: version. build: `cpu`, `cuda 12.8`, `rocm 6.4`. cuda: available, reason (why not), cudnn (91501 is
        9.15.1; None without). devices: name, memory_bytes, capability of each CUDA device. fp32, bf16 and fp16 (None
        on CPUs): works, error, flops_per_s of one matrix product on the device training would use (on the CPU: of one
        thread).
        attention: device (an `AttentionDevice`), kernels (of each backend that runs: family and name of the kernel that
        the profiler saw, None on CPUs), broken (backends that fail, with the error).
        distributed: gloo, nccl. compile: compiler (name or None), triton. cpu_capability: torch's own choice of code.
    """
    cuda = _cuda(torch)
    device = "cuda" if cuda["available"] else "cpu"
    torch.set_num_threads(1)
    dist = torch.distributed
    distributed = {
        "gloo": bool(dist.is_available() and dist.is_gloo_available()),
        "nccl": bool(dist.is_available() and dist.is_nccl_available()),
    }
    return {
        "torch": torch.__version__,
        "build": _build(torch),
        "cuda": cuda,
        "devices": _devices(torch) if cuda["available"] else [],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fp32": _matmul(torch, device, torch.float32),
        "bf16": _matmul(torch, device, torch.bfloat16),
        # CPUs imitate it so slowly that nobody trains with it there, and one product takes seconds.
        "fp16": _matmul(torch, device, torch.float16) if device == "cuda" else None,
        "attention": _attention(torch, device),
        "distributed": distributed,
        "compile": {"compiler": _compiler(), "triton": importlib.util.find_spec("triton") is not None},
    }


def _build(torch: Any) -> str:
    if torch.version.cuda:
        return f"cuda {torch.version.cuda}"
    if getattr(torch.version, "hip", None):
        return f"rocm {torch.version.hip}"
    return "cpu"


def _cuda(torch: Any) -> dict[str, Any]:
    available, reason = torch.cuda.is_available(), None
    if not available:
        try:
            torch.cuda.init()  # says what `is_available` swallows: no driver, driver too old, CPU build
        except Exception as error:
            reason = first_line(error)
    from picollm.model.attention import cudnn_version

    return {"available": available, "reason": reason, "cudnn": cudnn_version() if available else None}


def _devices(torch: Any) -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = [properties.major, properties.minor]
        found.append({"name": properties.name, "memory_bytes": properties.total_memory, "capability": capability})
    return found


def _matmul(torch: Any, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Rate of a square matrix product; on the CPU in CPU time of one thread, so that a busy machine counts less."""
    size = GPU_MATMUL_SIZE if device == "cuda" else MATMUL_SIZE
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    clock = time.perf_counter if device == "cuda" else time.thread_time
    try:
        a = torch.randn(size, size, device=device).to(dtype)
        product = a @ a
        wait()
        # 64 elements against float64 catch a kernel that runs and is wrong; bfloat16 has 8 bits.
        exact = a[:8].double() @ a[:, :8].double()
        scale = float(exact.abs().max())
        if float((product[:8, :8].double() - exact).abs().max()) > 0.02 * scale:
            return {"works": False, "error": "a matrix product is far from its exact value", "flops_per_s": None}
        repeats, started = 0, clock()
        while (elapsed := clock() - started) < MATMUL_SECONDS:
            torch.matmul(a, a, out=product)
            wait()
            repeats += 1
    except Exception as error:
        return {"works": False, "error": first_line(error), "flops_per_s": None}
    return {"works": True, "error": None, "flops_per_s": round(2 * size**3 * repeats / elapsed)}


def _attention(torch: Any, device: str) -> dict[str, Any]:
    """What `choose_attention` has to know, and each backend that `auto` may take here tried forward and backward."""
    from picollm.attention_choice import choose_attention
    from picollm.model.attention import attention_device, profiled_kernel

    here = attention_device(torch.device(device))
    half = "float16" if here.nvidia and here.capability < (8, 0) else "bfloat16"
    dtype = torch.float32 if device == "cpu" else getattr(torch, half)
    shape = (1, 128, 2, 64) if device == "cpu" else (2, 2048, 8, 128)  # (B, T, H, D)
    choice = choose_attention(here, half, shape[1], windows=True, head_size=shape[3])
    kernels, broken = {}, {}
    # Flex is compiled when it is first used, which takes longer than a doctor's patient waits.
    for name in sorted({choice.full, choice.window, "matmul", "sdpa"} - {"flex"}):
        window = shape[1] // 4 if name == choice.window != choice.full else None
        try:
            kernel = profiled_kernel(name, shape, shape[2], dtype, torch.device(device), window)
        except Exception as error:
            broken[name] = first_line(error)
        else:
            kernels[name] = None if kernel is None else {"family": kernel.family, "name": kernel.name}
    return {"device": here.to_json(), "kernels": kernels, "broken": broken}


def _compiler() -> str | None:
    """Name of the C++ compiler that torch.compile would start on the CPU."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return Path(name).name
    return None


if __name__ == "__main__":
    try:
        code = main()
    except Exception as error:  # our bug or torch's: doctor shows the line, the log has the rest
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {first_line(error)}"}))
        code = 3
    sys.exit(code)
