"""What this machine has: devices, memory, and the number type it multiplies fastest in."""

import ctypes
import gc
import os
import platform
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from time import perf_counter

import torch

from litgpt.errors import UserError, did_you_mean

GB = 1e9
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as mallopt(3) numbers them
PRODUCTS = {  # in what each value of `--precision` multiplies
    "32-true": torch.float32,
    "bf16-true": torch.bfloat16,
    "bf16-mixed": torch.bfloat16,
    "16-true": torch.float16,
    "16-mixed": torch.float16,
}
PEAKS = {  # of a GPU's dense products in 16 bits, operations per second, by words of its name; the first line that fits counts
    "GB200": 2500e12,
    "B200": 2250e12,
    "B100": 1750e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 150e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A6000": 155e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "6000 Ada": 364e12,
    "RTX 5090": 210e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100 PCIE": 112e12,  # fp16 only
    "V100": 125e12,
    "T4": 65e12,
    "MI300X": 1307e12,
}
INSTRUCTION_SETS = re.compile(r"(avx|amx|fma|sse4|asimd|sve|bf16|i8mm)\w*|sme2?$")  # what matrix products choose their kernels by


# Devices


def find_device(accelerator: str = "auto") -> torch.device:
    """Return the device to compute on.

    Args:
        accelerator: "auto" takes a GPU where there is one; else "cpu", "gpu", "cuda", "mps" or "xpu".

    Raises:
        UserError: There is no such device here.
    """
    known = ("auto", "cpu", "gpu", "cuda", "mps", "xpu")
    if accelerator not in known:
        raise UserError(f"`accelerator` is one of {', '.join(known)}, but got {accelerator!r}.{did_you_mean(accelerator, known)}")
    here = torch.accelerator.current_accelerator(check_available=True)
    if accelerator == "cpu" or (accelerator == "auto" and here is None):
        return torch.device("cpu")
    if here is None or accelerator not in ("auto", "gpu", here.type):
        raise UserError(f"`accelerator` {accelerator!r} is not on this machine. It has {here.type if here else 'cpu'}: use that, or auto.")
    return torch.device(here.type, torch.accelerator.current_device_index())


def parse_devices(devices: int | str, accelerator: str = "auto") -> int:
    """Return how many devices a `--devices` asks for.

    Args:
        devices: A number, or "auto" or -1 for all GPUs, or one where there is none.
        accelerator: As `find_device` takes it.

    Raises:
        UserError: Neither a positive number nor "auto" nor -1.
    """
    text = str(devices).strip()
    if text in ("auto", "-1"):
        return 1 if find_device(accelerator).type == "cpu" else torch.accelerator.device_count()
    if isinstance(devices, bool) or not text.isdecimal() or int(text) < 1:
        raise UserError(f"`devices` is a positive number, or auto for all there are, but got {devices!r}.")
    return int(text)


def keep_freed_memory() -> None:
    """Let the C library keep what this process frees of the sizes of activations, for the next ones: new memory costs a tenth of a step.

    By default glibc gives memory back as soon as much of it is free, which is after each step. Its own variables (`MALLOC_...`) count
    where they are set.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(AttributeError, OSError, TypeError):  # only glibc can
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 4 * 2**20)  # larger tensors come from the system and go back there: they would leave gaps
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_memory() -> None:
    """Let the C library give the system what this process has freed, which it else keeps for itself, before other memory is asked for."""
    gc.collect()
    with suppress(AttributeError, OSError, TypeError):  # only glibc can
        ctypes.CDLL(None).malloc_trim(0)


def device_name(device: torch.device | None = None) -> str:
    """Return the name that the device's maker gave it; by default of the device that `find_device` chooses."""
    device = device or find_device()
    if device.type != "cpu":
        return torch.get_device_module(device).get_device_name(device) if device.type != "mps" else platform.processor()
    return _cpu_fact("model name") or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Return the CPU's vector and matrix instructions. Results are equal bit for bit only where these are."""
    listed = _cpu_fact("flags") or _cpu_fact("Features") or torch.backends.cpu.get_cpu_capability().lower()
    return " ".join(sorted(name for name in set(listed.split()) if INSTRUCTION_SETS.match(name)))


@cache
def _cpu_fact(key: str) -> str:
    """Return a line of /proc/cpuinfo, or nothing where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{re.escape(key)}\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


# Number types


def products_dtype(precision: str | None) -> torch.dtype:
    """Return the type that matrix products have under a `--precision`; without one, this machine's `compute_dtype`.

    Raises:
        UserError: There is no such precision.
    """
    if precision is None:
        return compute_dtype()
    if precision not in PRODUCTS:
        raise UserError(f"`precision` is one of {', '.join(PRODUCTS)}, but got {precision!r}.{did_you_mean(str(precision), PRODUCTS)}")
    return PRODUCTS[precision]


@cache
def compute_dtype(accelerator: str = "auto") -> torch.dtype:
    """Return the type that matrix products are fast in here: bf16 where the hardware multiplies it natively, else fp32.

    On a CPU without such instructions a bf16 product is emulated, and training 15 times slower than in fp32.

    Args:
        accelerator: As `find_device` takes it.
    """
    device = find_device(accelerator)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "xpu":
        native = torch.xpu.is_bf16_supported()
    else:
        native = device.type == "cpu" and _cpu_claims_bf16() and _bf16_is_native()
    return torch.bfloat16 if native else torch.float32


def _cpu_claims_bf16() -> bool:
    if platform.machine().lower() in ("arm64", "aarch64"):
        return sys.platform == "darwin" or "bf16" in _cpu_fact("Features").split()
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))  # private: may go
    return any(check() for check in checks if check is not None)


def _bf16_is_native(rows: int = 64, width: int = 1024) -> bool:
    """Time a product in both types; emulated, one of bf16 takes nearly four times as long or more. What else runs here must not decide."""
    factors = {
        dtype: (torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    }
    best = dict.fromkeys(factors, float("inf"))
    for _ in range(8):
        for dtype, (x, weight) in factors.items():
            start = perf_counter()
            torch.nn.functional.linear(x, weight)
            best[dtype] = min(best[dtype], perf_counter() - start)
    return best[torch.bfloat16] < 2 * best[torch.float32]


# Speed


@cache
def peak_flops(dtype: torch.dtype, device: torch.device | None = None) -> float | None:
    """Return how many operations a second the device can do in matrix products, as its maker says; where that is not known, as measured.

    A product of (M, K) with (K, N) takes 2 M K N of them.

    Args:
        dtype: What is multiplied.
        device: By default the one that `find_device` chooses.
    """
    device = device or find_device()
    words = set(re.split(r"[\s-]+", device_name(device)))
    named = next((peak for name, peak in PEAKS.items() if set(name.split()) <= words), None)
    differs = "MIG" in words or (dtype == torch.bfloat16 and words & {"V100", "T4"})  # a part of the GPU; products that it emulates
    return named if named and dtype.itemsize == 2 and not differs else _measured_flops(dtype, device)


def _measured_flops(dtype: torch.dtype, device: torch.device, n_tries: int = 5) -> float | None:
    """Time a large product; the best of some, for another program may take the processor away. None if there is no such product here."""
    size = 1024 if device.type == "cpu" else 4096
    try:
        a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        best = min(_seconds(a, b) for _ in range(n_tries))
    except (RuntimeError, TypeError):  # a type that the device does not multiply, or no memory left
        return None
    return 2 * size**3 / best


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = perf_counter()
    a @ b
    if a.device.type != "cpu":
        torch.accelerator.synchronize(a.device)
    return perf_counter() - start


# Memory


def device_memory_gb(device: torch.device) -> float:
    """Return how much memory the device has, in GB (10^9 bytes); of a CPU's, what a container leaves this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GB
    if device.type == "xpu":
        return torch.xpu.get_device_properties(device).total_memory / GB
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else float("inf")
    return min(physical, group_limit()) / GB


def group_limit(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """Return how many bytes this process's control group, as of a container, may take; infinity where nothing limits it.

    Args:
        groups: Says in which groups the process is, a line for each hierarchy (man 7 cgroups).
        mounted: Where the groups' files are.
    """
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not on Linux
        return float("inf")
    limit = float("inf")
    for number, kinds, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if number != "0" and "memory" not in kinds.split(","):
            continue
        top, file = (mounted, "memory.max") if number == "0" else (mounted / "memory", "memory.limit_in_bytes")
        group = Path(path.strip("/"))
        for place in (group, *group.parents):  # inside a container the path may be the host's, and the top is its own group
            limit = min(limit, _number_in(top / place / file))
    return limit


def _number_in(file: Path) -> float:
    """Return the number that a file holds; infinity where it holds another word, such as `max`, or is not there."""
    try:
        text = file.read_text().strip()
    except OSError:
        return float("inf")
    return int(text) if text.isdecimal() else float("inf")


def training_fits(
    n_trained: int, n_frozen: int, device: torch.device, frozen_bytes: int = 4, trained_bytes: int = 4, n_sharing: int = 1
) -> bool:
    """Say whether weights, gradients and AdamW's two averages fit one device, a fifth of it left for activations.

    Args:
        n_trained: Trained parameters.
        n_frozen: Frozen ones.
        device: Where each process computes.
        frozen_bytes: The size of a frozen parameter.
        trained_bytes: The size of a trained one, of its gradient and of its averages.
        n_sharing: How many processes share that memory (those of one machine, on a CPU).
    """
    return (n_frozen * frozen_bytes + 4 * n_trained * trained_bytes) / GB < 0.8 * device_memory_gb(device) / n_sharing


def peak_memory_gb(device: torch.device | None = None) -> float:
    """Return the most memory in use so far, in GB (10^9 bytes): of the GPU, or of this process.

    Args:
        device: By default the one that `find_device` chooses.
    """
    device = device or find_device()
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).max_memory_allocated(device) / GB
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 / GB
    if sys.platform == "win32":
        return float("nan")
    import resource  # no such module on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GB
