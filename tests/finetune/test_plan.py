"""What a dry run says of a run: equal to what the run then does, as far as it can be counted, and near to it where it is measured."""

import importlib.util
import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from lightning.fabric import Fabric
from speaking import make_tokenizer
from tiny import tiny_config
from torch import nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from litgpt import cli, names
from litgpt.args import OptimizerArgs, TrainArgs
from litgpt.checkpoint import load_model, write_checkpoint
from litgpt.data.packing import PackedSamples
from litgpt.errors import UserError
from litgpt.finetune.adapter import ADAPTER
from litgpt.finetune.full import FULL
from litgpt.finetune.loop import mean_inputs
from litgpt.finetune.lora import with_lora
from litgpt.finetune.plan import GAPS, GAPS_STEPS, KEPT, make_plan, measure, memory_of, optimizer_bytes, recomputed_blocks, text
from litgpt.hardware import GB
from litgpt.launch import PRECISIONS, cast_parameters
from litgpt.lora import LoRA, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.optim import make_optimizer
from litgpt.quantize import quantize_model
from litgpt.scripts import memory_plan
from litgpt.scripts.batches import batches_of, batches_of_texts
from litgpt.scripts.download import find_checkpoint
from litgpt.scripts.memory_plan import LiveBytes, blocks_to_recompute, measured_pass, without_numbers
from litgpt.training import Feed, Limits

CONFIG = tiny_config("llama", n_layer=5)
LORA = with_lora(LoRA(r=2, dropout=0.0))
TRAIN = TrainArgs(global_batch_size=8, micro_batch_size=2, epochs=1)


class Samples(list):
    """Samples of lengths that are drawn."""

    def __init__(self, n: int = 37) -> None:
        lengths = torch.randint(2, 60, (n,), generator=torch.Generator().manual_seed(0)).tolist()
        super().__init__({"input_ids": torch.ones(n, dtype=torch.long), "labels": torch.ones(n, dtype=torch.long)} for n in lengths)
        self.lengths = lengths


def plan_of(method=FULL, train=TRAIN, precision="32-true", optimizer=None, **more):
    samples = Samples()
    return make_plan(method, CONFIG, samples, train, optimizer or OptimizerArgs(), precision, Limits.of(train, len(samples), 30), **more)


# Steps


@pytest.mark.parametrize("packing", [False, True, "global"])
@pytest.mark.parametrize("micro_batch_size, max_seq_length", [(1, None), (3, None), (2, 64)])
def test_batches_are_those_of_the_training_script(packing, micro_batch_size, max_seq_length):
    train = replace(TRAIN, packing=packing, micro_batch_size=micro_batch_size, max_seq_length=max_seq_length)
    samples = PackedSamples(Samples(), 64) if packing == "global" else Samples()
    n_steps = -(-len(samples) // train.global_batch_size)
    fed = [microbatches for _, microbatches, _ in Feed(Fabric(accelerator="cpu", devices=1), samples, train, seed=7, last=n_steps)]
    found = batches_of(samples, train, seed=7)
    everything = [batch for microbatches in fed for batch in microbatches]
    assert found.largest == max(batch.ids.numel() for batch in everything)
    assert found.later == max((batch.ids.numel() for microbatches in fed for batch in microbatches[1:]), default=0)
    assert found.rows == 1 if packing else found.rows <= micro_batch_size
    assert (found.lengths is None) == (not packing) and sum(found.lengths or [found.length]) == found.length
    assert found.most == max(map(len, fed)) and found.n_microbatches == pytest.approx(len(everything) / n_steps)
    assert found.n_tokens == pytest.approx(sum(batch.n_tokens for batch in everything) / n_steps)
    assert mean_inputs(samples) == pytest.approx(sum(batch.n_tokens for batch in everything) / len(samples)), "`max_tokens` counts these"
    assert found.padding == pytest.approx(1 - sum(b.n_tokens for b in everything) / sum(b.ids.numel() for b in everything))


def test_devices_share_the_samples_of_a_step():
    alone, shared = (batches_of(Samples(), TRAIN, 0, n) for n in (1, 4))
    assert shared.n_tokens == alone.n_tokens and shared.n_microbatches < alone.n_microbatches


# Memory


def whole_pass(method, n_recomputed: int, accumulates: bool, shape: tuple[int, int] = (3, 64)) -> int:
    """The most bytes of a pass in which every block is computed, and some again."""
    with without_numbers():
        model = GPT(CONFIG).train()
        method.prepare(model, 0)
        model.n_recomputed = n_recomputed
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if accumulates else None
        idx = torch.zeros(shape, dtype=torch.long)
        with LiveBytes() as live:
            model(idx, targets=idx).nll.backward()
        return live.most + (sum(parameter.nbytes for parameter in trained) if accumulates else 0)


@pytest.mark.parametrize("method, accumulates", [(FULL, True), (FULL, False), (LORA, True), (ADAPTER, False)])
def test_blocks_that_are_computed_again_count_as_in_a_pass_that_does_so(method, accumulates, monkeypatch):
    again = partial(checkpoint, context_fn=lambda: (nullcontext(), memory_plan._AsComputed()))  # autograd calls it without the mode
    monkeypatch.setattr("litgpt.model.checkpoint", again)
    with without_numbers():
        model = GPT(CONFIG).train()
        method.prepare(model, 0)
        found = measured_pass(model, 3, 64)
    for n in (0, 2, CONFIG.n_layer):
        assert found.peak(n, accumulates).total == pytest.approx(whole_pass(method, n, accumulates), rel=0.06)


@pytest.mark.parametrize("method", [FULL, LORA])
@pytest.mark.parametrize("shorter", [8, 50])
def test_a_step_is_fullest_in_its_longest_microbatch_or_in_a_later_one_beside_gradients(method, shorter):
    texts, train = [[60], [shorter]], replace(TRAIN, global_batch_size=2, micro_batch_size=1, packing=False)
    batches = batches_of_texts(texts, 61, train)
    assert (batches.largest, batches.later) == (60, shorter)
    found, _ = memory_of(measure(method, CONFIG, "32-true", batches), train, OptimizerArgs(), batches, CONFIG.n_layer)
    first, second = whole_pass(method, 0, False, (1, 60)), whole_pass(method, 0, True, (1, shorter))
    assert found.gradients + found.activations + found.logits == pytest.approx(max(first, second), rel=0.08)
    assert (first > second) == (shorter == 8 or method is LORA)


def test_gaps_grow_with_the_steps_where_products_in_16_bits_leave_some(monkeypatch):
    monkeypatch.setattr("litgpt.finetune.plan.find_device", lambda: torch.device("cpu"))
    gaps = {
        precision: [plan_of(train=replace(TRAIN, epochs=None, max_steps=n), precision=precision).memory for n in (1, 20, 10_000)]
        for precision in ("32-true", "bf16-true")
    }
    assert [memory.gaps for memory in gaps["32-true"]] == [int(KEPT)] * 3
    shares = [(memory.gaps - KEPT) / (memory.activations + memory.logits) for memory in gaps["bf16-true"]]
    assert shares == pytest.approx([GAPS * (1 - math.exp(-n / GAPS_STEPS)) for n in (1, 20, 10_000)], rel=1e-3)


def test_as_few_blocks_are_computed_again_as_a_budget_needs():
    with without_numbers():
        found = measured_pass(GPT(CONFIG).train(), 3, 64)
    sizes = [found.peak(n).total - found.peak(n).gradients for n in range(CONFIG.n_layer + 1)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[1]
    assert [blocks_to_recompute(found, size) for size in sizes] == [sizes.index(size) for size in sizes]
    assert blocks_to_recompute(found, sizes[1] + 1) == 1 and blocks_to_recompute(found, 1e12) == 0
    with pytest.raises(UserError, match=r"leaves a microbatch 1e-06 GB, but it takes 0\.\d+ GB even if all blocks"):
        blocks_to_recompute(found, 1000)


def test_the_smallest_budget_that_the_error_names_is_enough():
    train = replace(TRAIN, activation_checkpointing=1e-6)
    with pytest.raises(UserError) as error:
        recomputed_blocks(FULL, CONFIG, Samples(), train, "32-true", 0)
    named = float(str(error.value).split("it takes ")[1].split(" GB")[0])
    assert recomputed_blocks(FULL, CONFIG, Samples(), replace(train, activation_checkpointing=named), "32-true", 0) > 0
    words = {"none": 0, "full": CONFIG.n_layer, 1.0: 0}
    for wanted, n in words.items():
        assert recomputed_blocks(FULL, CONFIG, Samples(), replace(train, activation_checkpointing=wanted), "32-true", 0) == n


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize(
    "quantize, precision",
    [(None, "32-true"), (None, "bf16-mixed"), ("bnb.nf4", "bf16-true"), ("bnb.nf4-dq", "32-true"), ("bnb.int8-training", "bf16-true")],
)
def test_weights_take_what_those_of_the_real_model_do(model_type, quantize, precision):
    config, method = tiny_config(model_type), replace(LORA, quantize=quantize)
    found = measure(method, config, precision, batches_of(Samples(), TRAIN, 0))
    model = GPT(config)
    assert found.stored == 2 * sum(parameter.numel() for parameter in model.parameters())
    n_own = found.stored // 2
    if quantize is not None:
        quantize_model(model, quantize, PRECISIONS[precision].frozen)
    method.prepare(model, 0)
    cast_parameters(model, precision)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found.weights == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert found.n_trained == trained and found.n_parameters == n_own + trained


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("settings", [{}, {"targets": "all-linear"}, {"targets": "all-linear", "head": True}], ids=str)
def test_the_weights_that_merging_makes_anew_are_counted(model_type, settings):
    config, lora = tiny_config(model_type), LoRA(r=2, dropout=0.0, **settings)
    model = GPT(config)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    add_lora(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.ones_(parameter)
    merge_lora_weights(model)
    changed = [weight for name, weight in model.state_dict().items() if name in before and not torch.equal(weight, before[name])]
    found = measure(with_lora(lora), config, "32-true", batches_of(Samples(), TRAIN, 0), torch.float16)
    assert found.merged == 2 * sum(weight.numel() for weight in changed) > 0


@pytest.mark.parametrize("args", [OptimizerArgs(state=state) for state in ("full", "bf16", "8bit")] + [OptimizerArgs(name="SGD")], ids=str)
def test_an_optimizer_remembers_what_is_planned(args):
    model = nn.Sequential(nn.Linear(512, 64), nn.Linear(256, 32, bias=False)).to(torch.bfloat16 if args.state == "full" else torch.float32)
    planned = optimizer_bytes(args, [(parameter.numel(), parameter.dtype, parameter.ndim) for parameter in model.parameters()])
    optimizer: Optimizer = make_optimizer(args, model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kept = [kept for state in optimizer.state.values() for kept in state.values() if isinstance(kept, torch.Tensor) and kept.ndim]
    assert planned == pytest.approx(sum(tensor.nbytes for tensor in kept), rel=0.001)


def test_a_model_that_is_sharded_takes_less_of_each_device():
    alone, shared = plan_of(n_devices=4), plan_of(n_devices=4, n_local=4, is_sharded=True)
    assert shared.memory.optimizer == alone.memory.optimizer // 4
    assert shared.available == alone.available // 4
    model = GPT(CONFIG)
    whole, *blocks = (sum(parameter.nbytes for parameter in part.parameters()) for part in (model, *model.transformer.h))
    outside = whole - sum(blocks)  # embedding, head and norm are one group, which is whole until its backward pass is done
    assert shared.memory.weights == alone.memory.weights // 4 + outside + 2 * max(blocks)
    assert shared.memory.gradients == alone.memory.gradients // 4 + outside + max(blocks)


def test_what_is_offloaded_is_on_no_device(monkeypatch):
    batches = batches_of(Samples(), TRAIN, 0, 4)
    given = measure(FULL, CONFIG, "32-true", batches), TRAIN, OptimizerArgs(), batches, CONFIG.n_layer, 4
    (shared, _), (offloaded, _) = memory_of(*given), memory_of(*given, offloads=True)
    model = GPT(CONFIG)
    whole, *blocks = (sum(parameter.nbytes for parameter in part.parameters()) for part in (model, *model.transformer.h))
    outside = whole - sum(blocks)
    assert offloaded.weights == outside + 2 * max(blocks) and offloaded.gradients == outside + max(blocks) and offloaded.optimizer == 0
    assert (offloaded.activations, offloaded.logits) == (shared.activations, shared.logits)
    monkeypatch.setattr("litgpt.finetune.plan.find_device", lambda: torch.device("meta"))
    monkeypatch.setattr("litgpt.finetune.plan.device_memory_gb", lambda device: 80.0)
    monkeypatch.setattr("litgpt.finetune.plan.device_name", lambda device: "a GPU")
    monkeypatch.setattr("litgpt.finetune.plan.PROGRAM", 0)
    saved = dict(plan_of(n_devices=4, is_sharded=True).savings)["--cpu_offload true"]
    assert saved == shared.total - offloaded.total > 0
    assert "--cpu_offload true" not in dict(plan_of(n_devices=4, is_sharded=True, offloads=True).savings)


def test_quantized_weights_are_whole_on_every_device():
    method = replace(LORA, quantize="bnb.int8")
    alone, shared = plan_of(method, n_devices=4), plan_of(method, n_devices=4, is_sharded=True)
    model = GPT(CONFIG)
    quantize_model(model, "bnb.int8")
    held = sum(buffer.nbytes for buffer in model.buffers())
    assert held < shared.memory.weights and alone.memory.weights // 4 + held // 2 < shared.memory.weights


def test_a_dry_run_downloads_no_weights_and_the_run_the_rest(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "hub" / "org" / "tiny"
    vocab = make_tokenizer(folder)
    config = tiny_config("llama", vocab_size=vocab, padded_vocab_size=vocab, block_size=256)
    write_checkpoint(tmp_path / "model", GPT(config).state_dict(), config, source=folder)
    shutil.copytree(tmp_path / "model", folder, dirs_exist_ok=True)
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"Say {i}", "output": "yes"} for i in range(9)]))
    monkeypatch.chdir(tmp_path)
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        words = ["--data", "JSON", "--data.json_path", "data.json", "--data.val_split_fraction", "0.2", "--dry_run", "true"]
        assert cli.main(["finetune", "org/tiny", *words]) == 0
        said = capsys.readouterr()
        assert "Plan: " in said.out and "config and tokenizer of org/tiny" in said.err
        assert not server.downloads(names.SAFETENSORS)
        assert load_model(find_checkpoint("org/tiny")).config.n_embd == config.n_embd
        assert len(server.downloads(names.SAFETENSORS)) == 1


# Savings


def test_flags_save_what_is_said_and_the_best_one_is_first(monkeypatch):
    monkeypatch.setattr("litgpt.finetune.plan.program_bytes", lambda: 0)
    monkeypatch.setattr("litgpt.finetune.plan.KEPT", 0)
    found = plan_of(train=replace(TRAIN, packing=False))
    saved = dict(found.savings)
    assert list(saved.values()) == sorted(saved.values(), reverse=True) and min(saved.values()) > 0
    changed = {
        "--train.activation_checkpointing full": plan_of(train=replace(TRAIN, packing=False, activation_checkpointing="full")),
        "--optimizer.state 8bit": plan_of(train=replace(TRAIN, packing=False), optimizer=OptimizerArgs(state="8bit")),
        "litgpt finetune_lora instead": plan_of(LORA, replace(TRAIN, packing=False)),
        "--train.micro_batch_size 1": plan_of(train=replace(TRAIN, packing=False, micro_batch_size=1)),
    }
    assert changed.keys() <= saved.keys()
    for flag, other in changed.items():
        assert saved[flag] == pytest.approx(found.memory.total - other.memory.total, rel=0.35), flag


def test_an_optimizer_that_has_no_form_in_few_bits_is_planned_as_it_is(monkeypatch):
    monkeypatch.setattr("litgpt.finetune.plan.program_bytes", lambda: 0)
    monkeypatch.setattr("litgpt.finetune.plan.KEPT", 0)
    flag = "--optimizer.state 8bit"
    assert flag in dict(plan_of(optimizer=OptimizerArgs("torch.optim.AdamW")).savings), "as recipes of LitGPT name it"
    for optimizer in (OptimizerArgs(init_args={"amsgrad": True}), OptimizerArgs("SGD")):
        assert flag not in dict(plan_of(optimizer=optimizer).savings)


def test_what_is_used_already_is_not_recommended(monkeypatch):
    monkeypatch.setattr("litgpt.finetune.plan.program_bytes", lambda: 0)
    monkeypatch.setattr("litgpt.finetune.plan.KEPT", 0)
    assert "--quantize bnb.nf4" in dict(plan_of(LORA).savings)
    train = replace(TRAIN, micro_batch_size=1, activation_checkpointing="full")
    flags = dict(plan_of(replace(LORA, quantize="bnb.nf4"), train, "bf16-true").savings)
    assert (
        not {"--quantize bnb.nf4", "--train.activation_checkpointing full", "--precision bf16-true", "litgpt finetune_lora instead"}
        & flags.keys()
    )


# What is shown


def test_the_plan_names_everything_and_says_whether_it_fits():
    found = plan_of(LORA)
    said = text(found)
    for word in ("LoRA", "parameters", "steps", "weights", "gradients", "optimizer", "activations", "logits", "program", "it fits"):
        assert word in said
    assert f"{found.n_trained:,} are trained" in said and f"{37} samples" not in said and "samples      37, " in said
    assert "5, without a warm-up" in said
    assert "does not fit" in text(replace(found, available=1000))
    assert "2 blocks computed again" in text(replace(found, n_recomputed=2))
    assert "as time allows" in text(replace(found, limits=Limits(None, None, None, 60.0)))


def test_a_model_larger_than_any_memory_is_planned():
    config = tiny_config("llama", n_embd=2**15, n_head=256, n_query_groups=8, intermediate_size=2**17, padded_vocab_size=2**18)
    found = measure(FULL, config, "32-true", batches_of(Samples(), TRAIN, 0))
    assert found.weights > 100 * GB and found.passes.peak().gradients == found.weights


# What is measured


def benchmark():
    spec = importlib.util.spec_from_file_location("memory_plan_benchmark", Path(__file__).parents[2] / "benchmarks" / "memory_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of a process")
@pytest.mark.parametrize("method, options", [("full", {}), ("lora", {"train.packing": "false", "lora_targets": "all-linear"})])
def test_a_run_takes_what_is_planned_for_it(method, options, tmp_path):
    bench = benchmark()
    bench.MODELS["small"] = dict(n_layer=6, n_embd=512, n_head=8, n_query_groups=4, intermediate_size=1024, padded_vocab_size=4096)
    case = bench.Case(method, "small", "32-true", options | {"train.max_steps": "2", "train.global_batch_size": "8"})
    found = bench.measure(case, tmp_path)
    assert found["planned"] == pytest.approx(found["taken"], rel=0.15)
    assert found["planned"][0] > 0.75 * GB  # what Python and torch take is not most of it
