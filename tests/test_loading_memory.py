"""Loading and converting hold the model once at most, and beside it no more than a layer."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "loading_memory.py"
spec = importlib.util.spec_from_file_location("loading_memory", SCRIPT)
benchmark = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory is anonymous")


@pytest.mark.parametrize(
    "kind, what, source, layout, most",
    [
        ("llama", "load", "float32", "hf", 1.15),
        ("llama", "load", "bfloat16", "hf", 0.3),  # only what is joined is copied
        ("llama", "convert_to_litgpt", "float32", "hf", 1.15),
        ("llama", "convert_from_litgpt", "bfloat16", "litgpt", 0.15),
        ("gpt_neox", "convert_from_litgpt", "bfloat16", "litgpt", 0.35),
        ("qwen3_moe", "convert_from_litgpt", "bfloat16", "hf", 1.0),  # experts are stacked, and taken apart again
    ],
)
def test_the_peak_of_memory_is_the_weights_in_their_new_type_and_little_more(kind, what, source, layout, most, tmp_path):
    (index,) = [
        i
        for i, case in enumerate(benchmark.CASES)
        if (case.what, str(case.dtype).removeprefix("torch."), case.layout) == (what, source, layout)
    ]
    n_bytes, peak, _ = benchmark.measured(kind, "60MB", index, tmp_path)
    assert peak < most * n_bytes
