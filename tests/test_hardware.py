"""What the machine is said to have."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from litgpt import hardware
from litgpt.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))
import workers


@pytest.fixture
def fresh():
    hardware.compute_dtype.cache_clear()
    yield
    hardware.compute_dtype.cache_clear()


@pytest.mark.parametrize(
    ("claims", "native", "expected"), [(True, True, torch.bfloat16), (True, False, torch.float32), (False, True, torch.float32)]
)
def test_a_cpu_computes_in_bf16_only_if_it_says_so_and_proves_it(fresh, monkeypatch, claims, native, expected):
    monkeypatch.setattr(hardware, "_cpu_claims_bf16", lambda: claims)
    monkeypatch.setattr(hardware, "_bf16_is_native", lambda: native)
    assert hardware.compute_dtype("cpu") == expected


def test_the_claim_is_what_torch_sees(monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "x86_64")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert not hardware._cpu_claims_bf16()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert hardware._cpu_claims_bf16()
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert not hardware._cpu_claims_bf16(), "these functions are private: torch may drop them"


def test_the_claim_on_arm_is_the_kernels(monkeypatch):
    monkeypatch.setattr(hardware.platform, "machine", lambda: "aarch64")
    for features, expected in (("fp asimd bf16 i8mm", True), ("fp asimd", False)):
        monkeypatch.setattr(hardware, "_cpu_fact", lambda key, features=features: features)
        assert hardware._cpu_claims_bf16() == (expected or sys.platform == "darwin")


def test_the_dtype_of_a_precision_is_that_of_its_products(fresh):
    wanted = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-true": torch.float16}
    assert {name: hardware.products_dtype(name) for name in wanted} == wanted
    assert hardware.products_dtype(None) == hardware.compute_dtype()
    with pytest.raises(UserError, match="Did you mean 'bf16-true'"):
        hardware.products_dtype("bf16true")


@pytest.mark.parametrize(("devices", "expected"), [(1, 1), ("2", 2), ("auto", 1), (-1, 1), ("-1", 1)])
def test_devices_are_a_number_or_all(devices, expected):
    assert hardware.parse_devices(devices, "cpu") == expected


@pytest.mark.parametrize("devices", [0, -2, "0", "two", 1.5, True, ""])
def test_wrong_devices_are_one_sentence(devices):
    with pytest.raises(UserError, match="`devices` is a positive number"):
        hardware.parse_devices(devices)


def test_a_device_that_is_not_here_is_refused():
    assert hardware.find_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="Did you mean 'cuda'"):
        hardware.find_device("cud")
    if not torch.accelerator.is_available():
        assert hardware.find_device() == torch.device("cpu")
        with pytest.raises(UserError, match="'cuda' is not on this machine"):
            hardware.find_device("cuda")


def test_the_machine_has_a_name_instructions_and_memory():
    assert hardware.device_name(torch.device("cpu")) and isinstance(hardware.instruction_sets(), str)
    assert 0.1 < hardware.device_memory_gb(torch.device("cpu")) < 1e5


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A10G", torch.bfloat16, 70e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("Tesla V100-SXM2-32GB", torch.float16, 125e12),
        ("Tesla V100-PCIE-16GB", torch.float16, 112e12),
        ("Tesla V100-SXM2-32GB", torch.bfloat16, "measured"),  # which it emulates
        ("NVIDIA A100-SXM4-80GB", torch.float32, "measured"),  # other units do these
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", torch.bfloat16, "measured"),
        ("NVIDIA Z9000", torch.bfloat16, "measured"),
    ],
)
def test_the_peak_of_a_known_gpu_is_its_makers(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(hardware, "device_name", lambda device: name)
    monkeypatch.setattr(hardware, "_measured_flops", lambda *_: "measured")
    assert hardware.peak_flops.__wrapped__(dtype, torch.device("cuda")) == expected


def test_the_peak_of_this_processor_is_what_it_does():
    cpu = torch.device("cpu")
    hardware.peak_flops.cache_clear()
    start = time.perf_counter()
    peak = hardware.peak_flops(torch.float32, cpu)
    seconds = time.perf_counter() - start
    assert 1e8 < peak < 1e15 and 5 * 2 * 1024**3 / peak <= seconds, "the best of five products was no faster than all of them"
    a, b = torch.ones(300, 300), torch.ones(300, 300)
    best = min(hardware._seconds(a, b) for _ in range(20))
    assert 2 * 300**3 / best < 4 * peak, "a small product is not much faster than the peak"
    assert hardware._measured_flops(torch.float4_e2m1fn_x2, cpu) is None, "a type without products has no peak"


def test_the_peak_of_memory_grows_with_what_is_held():
    (grown,) = workers.run_ranks("memory_of", n_bytes=400_000_000)
    assert 0.39 < grown < 0.45


FAULTS = """
import resource, torch
from litgpt import hardware
from litgpt.launch import launch_fabric

def new_pages(prepare=lambda: None):
    prepare()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**18) for _ in range(128)]  # 128 MiB
    del tensors
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 2**20

new_pages()
print(new_pages(), new_pages(launch_fabric), new_pages(), new_pages(hardware.give_back_memory))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc can be told to keep memory")
@pytest.mark.parametrize("name, is_kept", [("GLIBC_TUNABLES", True), ("MALLOC_MMAP_THRESHOLD_", False)])
def test_training_keeps_freed_memory_unless_the_environment_says_otherwise(name, is_kept):
    size = "65536" if name.startswith("MALLOC_") else "glibc.malloc.mmap_threshold=65536"  # so small, lest glibc keep some by itself
    done = subprocess.run([sys.executable, "-c", FAULTS], env=os.environ | {name: size}, capture_output=True, text=True, check=True)
    before, _, then, given_back = map(float, done.stdout.split()[-4:])
    assert before > 100 and given_back > 100 and (then < 10 if is_kept else then > 100)


def test_training_fits_if_weights_gradients_and_averages_do(monkeypatch):
    monkeypatch.setattr(hardware, "device_memory_gb", lambda device: 10.0)
    cpu = torch.device("cpu")
    assert hardware.training_fits(490_000_000, 0, cpu) and not hardware.training_fits(510_000_000, 0, cpu)  # 16 bytes each, of 8 GB
    assert hardware.training_fits(1_000_000, 3_900_000_000, cpu, frozen_bytes=2)
    assert not hardware.training_fits(490_000_000, 0, cpu, n_sharing=2)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/a/b", {"a/memory.max": "1000", "a/b/memory.max": "max"}, 1000),
        ("0::/a/b", {"a/memory.max": "1000", "a/b/memory.max": "700"}, 700),
        ("0::/", {"memory.max": "max"}, float("inf")),
        ("0::/../host", {"memory.max": "500"}, 500),  # inside of a container
        ("9:name=systemd:/\n4:memory:/docker/x\n0::/", {"memory/docker/x/memory.limit_in_bytes": "900"}, 900),
        ("4:cpu,memory:/host/x", {"memory/memory.limit_in_bytes": "800"}, 800),
        ("4:memoryless:/", {"memory/memory.limit_in_bytes": "800"}, float("inf")),
        ("", {"memory.max": "500"}, float("inf")),
    ],
)
def test_a_container_limits_the_memory(tmp_path, lines, files, expected):
    groups = tmp_path / "cgroup"
    groups.write_text(lines)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text + "\n")
    assert hardware.group_limit(groups, tmp_path / "fs") == expected


def test_without_control_groups_the_memory_is_the_machines(tmp_path, monkeypatch):
    assert hardware.group_limit(tmp_path / "none", tmp_path) == float("inf")
    monkeypatch.setattr(hardware, "group_limit", lambda: 3e9)
    assert hardware.device_memory_gb(torch.device("cpu")) == min(
        3.0, hardware.os.sysconf("SC_PAGE_SIZE") * hardware.os.sysconf("SC_PHYS_PAGES") / 1e9
    )
