"""Finetuning SmolLM2-135M here and with transformers, PEFT and TRL, in turn in one process: LoRA, all parameters, instructions.

    python benchmarks/finetune.py [--threads 2 1] [--rounds 7] [--only LoRA] > benchmarks/results/finetune-CPU.md

Both sides see the same tokens and targets, with the same optimizer (torch's fused AdamW) and number type. Times are medians of rounds that
alternate; peak memory is that of a fresh process for each side. Needs the model that `make quickstart` downloads, and the three.
"""

import random
import tempfile
from collections.abc import Callable

import torch
from smollm2 import MODEL, Run, Tasks, ids, measure, theirs
from torch import Tensor, nn

from litgpt import hardware
from litgpt.args import OptimizerArgs
from litgpt.attention import Segments
from litgpt.checkpoint import load_model
from litgpt.data.packing import microbatches_of
from litgpt.generate.memory import compile_blocks
from litgpt.launch import cast_parameters
from litgpt.lora import LoRA, add_lora
from litgpt.optim import make_optimizer

BATCH, LENGTH = 4, 256
N_SAMPLES, MICRO, LONGEST = 16, 4, 1024  # of the rows with real lengths
IGNORED = -100


# Models


def ours(dtype: torch.dtype, lora: bool, compiled: bool = False) -> nn.Module:
    """Return our model, ready to be trained as `finetune_lora` or `finetune_full` does."""
    hardware.keep_freed_memory()
    model = load_model(MODEL)
    if lora:
        add_lora(model, LoRA(r=8, alpha=16, dropout=0.0))
    mixed = "bf16-true" if lora else "bf16-mixed"
    cast_parameters(model, mixed if dtype == torch.bfloat16 else "32-true")
    if compiled:
        compile_blocks(model, dynamic=None)
    return model.train()


def others(dtype: torch.dtype, lora: bool) -> nn.Module:
    """Return theirs, with PEFT's updates or without."""
    from peft import LoraConfig, get_peft_model

    if not lora:
        return theirs(torch.float32).train()
    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    return get_peft_model(theirs(dtype), settings).train()


def stepper(model: nn.Module, dtype: torch.dtype, lora: bool, losses: Callable[[], list[Tensor]]) -> Run:
    """Return what takes one step on the losses, which are means over all targets of the step."""
    optimizer = make_optimizer(OptimizerArgs(lr=1e-4, betas=(0.9, 0.999)), model)
    mixed = dtype == torch.bfloat16 and not lora

    def run() -> None:
        for compute in losses():
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = compute()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


# One microbatch of one length


def fixed_ours(dtype: torch.dtype, lora: bool, compiled: bool = False) -> Run:
    model, idx = ours(dtype, lora, compiled), ids(BATCH, LENGTH + 1)

    def loss() -> Tensor:
        nll, n, _ = model(idx[:, :-1], targets=idx[:, 1:])
        return nll / n

    return stepper(model, dtype, lora, lambda: [loss])


def fixed_theirs(dtype: torch.dtype, lora: bool) -> Run:
    model, idx = others(dtype, lora), ids(BATCH, LENGTH)
    return stepper(model, dtype, lora, lambda: [lambda: model(idx, labels=idx).loss])


# Instructions of their real lengths, of which only the answers are trained on


def instructions() -> list[dict[str, Tensor]]:
    """Return samples whose prompts and answers are as long as those of Alpaca in about: log-normal, 60 and 45 tokens in the median."""
    draw, made = random.Random(0), []
    for _ in range(N_SAMPLES):
        prompt, answer = (int(draw.lognormvariate(mean, 0.7)) + 4 for mean in (4.1, 3.8))
        tokens = ids(min(prompt + answer, LONGEST))
        labels = tokens.clone()
        labels[: min(prompt, len(tokens) - 1)] = IGNORED
        made.append({"input_ids": tokens, "labels": labels})
    return made


def real_ours(dtype: torch.dtype, compiled: bool = False) -> Run:
    model, samples = ours(dtype, lora=True, compiled=compiled), instructions()
    longest = max(len(sample["input_ids"]) for sample in samples)
    batches = microbatches_of(samples, MICRO, packing=True, max_length=longest)
    n_targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)

    def loss(batch) -> Tensor:
        return model(batch.ids, targets=batch.targets, segments=Segments(batch.lengths)).nll / n_targets

    return stepper(model, dtype, True, lambda: [lambda batch=batch: loss(batch) for batch in batches])


def real_theirs(dtype: torch.dtype) -> Run:
    """Batches in the order of the data, padded to their longest sample, as transformers' Trainer makes them."""
    model, samples, batches = others(dtype, lora=True), instructions(), []
    for i in range(0, len(samples), MICRO):
        some = samples[i : i + MICRO]
        tokens, labels = (
            nn.utils.rnn.pad_sequence([sample[key] for sample in some], batch_first=True, padding_value=fill)
            for key, fill in (("input_ids", 0), ("labels", IGNORED))
        )
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(sample["input_ids"])) for sample in some], batch_first=True).long()
        batches.append((tokens, labels, mask))
    n_targets = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels, _ in batches)

    def loss(tokens: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return model(tokens, labels=labels, attention_mask=mask, num_items_in_batch=n_targets).loss

    return stepper(model, dtype, True, lambda: [lambda batch=batch: loss(*batch) for batch in batches])


# The same with TRL: its trainer's batches and its own step on each


def trl_stepper(dtype: torch.dtype, samples: list[dict[str, Tensor]]) -> Run:
    """Return what takes one step of TRL's trainer for supervised finetuning on the samples, padded within each microbatch."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    rows = [
        {"input_ids": sample["input_ids"].tolist(), "completion_mask": (sample["labels"] != IGNORED).int().tolist()} for sample in samples
    ]
    settings = SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written
        use_cpu=True,
        bf16=False,  # the weights have the type already, as on our side
        gradient_checkpointing=False,  # its default is slower and takes less memory: here nobody computes anything twice
        completion_only_loss=True,
        max_length=None,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=len(rows) // MICRO,
        max_grad_norm=0.0,
        report_to="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    trainer = SFTTrainer(others(dtype, lora=True), settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    model = trainer.model.train()
    optimizer = make_optimizer(OptimizerArgs(lr=1e-4, betas=(0.9, 0.999)), model)
    batches = [trainer.data_collator([trainer.train_dataset[j] for j in range(i, i + MICRO)]) for i in range(0, len(rows), MICRO)]
    n_targets = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    trainer.current_gradient_accumulation_steps = len(batches)

    def run() -> None:
        for batch in batches:
            trainer.training_step(model, dict(batch), num_items_in_batch=n_targets)
        optimizer.step()
        optimizer.zero_grad()

    return run


def fixed_trl(dtype: torch.dtype) -> Run:
    return trl_stepper(dtype, [{"input_ids": row, "labels": row} for row in ids(BATCH, LENGTH)])


def tasks() -> Tasks:
    """Every row of the table; its tokens are the real ones."""
    dtype = hardware.compute_dtype()
    kind, real = str(dtype).removeprefix("torch."), sum(len(sample["input_ids"]) for sample in instructions())
    fixed = f"step of {BATCH} x {LENGTH}"
    return {
        f"LoRA, {fixed}, {kind}": (lambda: fixed_ours(dtype, True), lambda: fixed_theirs(dtype, True), BATCH * LENGTH),
        f"LoRA, {fixed}, {kind}, compiled": (lambda: fixed_ours(dtype, True, True), lambda: fixed_theirs(dtype, True), BATCH * LENGTH),
        f"all parameters, {fixed}, {kind} products": (lambda: fixed_ours(dtype, False), lambda: fixed_theirs(dtype, False), BATCH * LENGTH),
        f"all parameters, {fixed}, {kind} products, compiled": (
            lambda: fixed_ours(dtype, False, True),
            lambda: fixed_theirs(dtype, False),
            BATCH * LENGTH,
        ),
        f"LoRA, step of {N_SAMPLES} instructions, {kind}": (lambda: real_ours(dtype), lambda: real_theirs(dtype), real),
        f"LoRA, step of {N_SAMPLES} instructions, {kind}, compiled": (lambda: real_ours(dtype, True), lambda: real_theirs(dtype), real),
        f"LoRA, {fixed}, {kind}, TRL": (lambda: fixed_ours(dtype, True), lambda: fixed_trl(dtype), BATCH * LENGTH),
        f"LoRA, step of {N_SAMPLES} instructions, {kind}, TRL": (
            lambda: real_ours(dtype),
            lambda: trl_stepper(dtype, instructions()),
            real,
        ),
    }


if __name__ == "__main__":
    measure(__file__, __doc__, "Finetuning SmolLM2-135M against transformers, PEFT and TRL", tasks)
