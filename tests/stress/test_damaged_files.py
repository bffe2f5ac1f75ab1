"""Damaged weight files end in one sentence or load as what they say: never a crash, a hang, or more memory than the file is worth.

By hand: LITGPT_DAMAGED_FILES=2000 pytest -m stress tests/stress/test_damaged_files.py -s
"""

import faulthandler
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SEED = 7
PATIENCE = 5  # seconds
SLACK = 200 * 2**20  # bytes of address space that a sound import may still ask for, as threads and arenas do
NUMBERS = (0, 1, 2, 7, 255, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def run(n_cases: int, folder: Path) -> dict[str, Any]:
    """Try so many damaged files in one process of their own, and return what became of them."""
    command = [sys.executable, __file__, str(n_cases), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    last = (folder / "last.txt").read_text() if (folder / "last.txt").exists() else "none"
    assert done.returncode == 0, f"ended with {done.returncode} at the case {last}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict[str, Any], n_cases: int) -> None:
    assert not found["failures"], "\n".join(map(str, found["failures"][:5]))
    assert sum(found["outcomes"].values()) == n_cases
    assert found["slowest"] < PATIENCE
    assert found["most_memory"] <= 2, f"times the file's size, beyond what the sound file needs, in the case {found['most_memory_in']}"
    refused = sum(count for name, count in found["outcomes"].items() if name.endswith("refused"))
    assert refused > n_cases / 4, "the damage is noticed at all"


def test_200_damaged_files_are_refused_or_load(tmp_path):
    check(run(200, tmp_path), 200)


@pytest.mark.stress
def test_many_damaged_files_are_refused_or_load(tmp_path):
    n_cases = int(os.environ.get("LITGPT_DAMAGED_FILES", "2000"))
    found = run(n_cases, tmp_path)
    print(json.dumps(found, indent=2))
    check(found, n_cases)


# The process that reads them


def damaged(whole: bytes, n_header: int, draw: random.Random) -> tuple[str, bytes]:
    """Return a kind of damage and a file that has it, mostly in the first `n_header` bytes."""
    kind = draw.choice(["cut", "bits", "bits", "number", "entry", "entry", "entry", "removed", "inserted", "copied", "data"])
    content = bytearray(whole)
    place = draw.randrange(n_header)
    length = draw.choice([1, 2, 4, 8, 16, 100])
    if kind == "cut":
        del content[draw.choice([place, draw.randrange(len(whole))]) :]
    elif kind == "bits":
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(n_header)] ^= 1 << draw.randrange(8)
    elif kind == "number":
        place = draw.choice([place, draw.randrange(min(64, n_header - 8))])
        size, code = draw.choice([(4, "<I"), (8, "<Q")])
        content[place : place + size] = struct.pack(code, draw.choice(NUMBERS) % 2 ** (8 * size))
    elif kind == "entry":
        content = bytearray(with_entry_changed(whole, n_header, draw))
    elif kind == "removed":
        del content[place : place + length]
    elif kind == "inserted":
        content[place:place] = draw.randbytes(length)
    elif kind == "copied":
        other = draw.randrange(n_header)
        content[place : place + length] = whole[other : other + length]
    else:
        content[draw.randrange(n_header, len(whole))] ^= 1 << draw.randrange(8)
    return kind, bytes(content)


def with_entry_changed(whole: bytes, n_header: int, draw: random.Random) -> bytes:
    """Return a file in which one number is another: of the architecture, of a weight's shape, of where it lies."""
    number = draw.choice([*NUMBERS, draw.randrange(1000)])
    if whole[:4] == b"GGUF":
        names = rb"(?:llama|gemma\d|general)\.[a-z_.]+|(?:blk\.\d\.)?[a-z_]+\.(?:weight|bias)"
        place = draw.choice([match.end() for match in re.finditer(names, whole[:n_header])]) + draw.choice([0, 4, 4, 4, 12, 20, 24])
        size, code = draw.choice([(4, "<I"), (8, "<Q")])
        return whole[:place] + struct.pack(code, number % 2 ** (8 * size)) + whole[place + size :]
    described = whole[8:n_header]
    match = draw.choice(list(re.finditer(rb"\d+", described)))
    described = described[: match.start()] + str(number).encode() + described[match.end() :]
    return struct.pack("<Q", len(described)) + described + whole[n_header:]


def sources(folder: Path) -> dict[str, tuple[bytes, int, Callable[[bytes], None]]]:
    """Return files to damage: their bytes, how long their header is, and what reads them."""
    import gguf
    import torch
    from gguf_files import tiny_checkpoint, write_gguf

    from litgpt.checkpoint import load_model
    from litgpt.scripts.export_gguf import export_gguf
    from litgpt.scripts.gguf import import_gguf

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    write_gguf(folder / "q4.gguf", kind=gguf.GGMLQuantizationType.Q4_1)
    tiny_checkpoint(folder / "qwen", "qwen3")
    for case, dtype in (("llama, stretched as Llama 3", "f32"), ("gemma3, stretched", "q8_0"), ("gemma2", "f16")):
        tiny_checkpoint(folder / "model", case)
        export_gguf(folder / "model", folder / f"{dtype}.gguf", dtype)
        shutil.rmtree(folder / "model")
        shutil.rmtree(folder / "model-tokenizer")

    def imported(content: bytes) -> None:
        (folder / "damaged.gguf").write_bytes(content)
        load_model(import_gguf(folder / "damaged.gguf", folder / "out", "float32"))

    def loaded(content: bytes) -> None:
        (folder / "qwen" / "model.safetensors").write_bytes(content)
        load_model(folder / "qwen")

    found = {}
    for name in ("q4", "f32", "q8_0", "f16"):
        file = folder / f"{name}.gguf"
        begin = min(tensor.data_offset for tensor in gguf.GGUFReader(file).tensors)
        found[f"gguf {name}"] = file.read_bytes(), begin, imported
    content = (folder / "qwen" / "model.safetensors").read_bytes()
    found["safetensors"] = content, 8 + struct.unpack_from("<Q", content)[0], loaded
    return found


def main(n_cases: int, folder: Path) -> dict[str, Any]:
    from litgpt.errors import UserError

    files = sources(folder)
    tracemalloc.start()
    needed = {}
    for name, (whole, _, read) in [*files.items(), *files.items()]:  # the second time everything is imported that is needed
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        read(whole)
        needed[name] = tracemalloc.get_traced_memory()[1] - before
        shutil.rmtree(folder / "out", ignore_errors=True)
    in_use = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (in_use + SLACK, in_use + SLACK))
    outcomes, damages, failures, slowest, most, most_in, begun = Counter(), Counter(), [], 0.0, 0.0, "", time.perf_counter()
    for case in range(n_cases):
        draw = random.Random(SEED * 1_000_003 + case)
        name = draw.choice([*files, "safetensors"])
        whole, n_header, read = files[name]
        kind, content = damaged(whole, n_header, draw)
        damages[kind] += 1
        (Path(sys.argv[2]) / "last.txt").write_text(f"{case}: {name}, {kind}")
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        start = time.perf_counter()
        try:
            read(content)
            outcomes[f"{name} loaded"] += 1
        except UserError as error:
            outcomes[f"{name} refused"] += 1
            if "\n" in str(error) or (folder / "out").exists():
                failures.append(f"case {case} ({name}, {kind}): leaves a folder, or more than a line: {error}")
        except Exception:
            failures.append(f"case {case} ({name}, {kind}): {traceback.format_exc()[-1500:]}")
            outcomes[f"{name} failed"] += 1
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, time.perf_counter() - start)
        more = (tracemalloc.get_traced_memory()[1] - before - needed[name]) / len(whole)
        most, most_in = (more, f"{case}: {name}, {kind}") if more > most else (most, most_in)
        shutil.rmtree(folder / "out", ignore_errors=True)
    return dict(
        cases=n_cases,
        seconds=round(time.perf_counter() - begun, 1),
        outcomes=dict(sorted(outcomes.items())),
        damages=dict(sorted(damages.items())),
        slowest=round(slowest, 2),
        most_memory=round(most, 2),
        most_memory_in=most_in,
        sizes={name: len(whole) for name, (whole, _, _) in files.items()},
        failures=failures,
    )


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    with tempfile.TemporaryDirectory(dir=sys.argv[2]) as scratch:
        print(json.dumps(main(int(sys.argv[1]), Path(scratch))))
