"""Samples laid end to end: which rows they make, and that every kind of layer computes in a row what it computes of each text alone."""

import pickle
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import EVERY_VARIANT, tiny_config
from torch import nn

from litgpt import attention, training
from litgpt.args import TrainArgs
from litgpt.attention import Segments
from litgpt.data.packing import PackedSamples, end_to_end, microbatches_of, pack, padded, rounded_up
from litgpt.launch import cast_parameters, launch_fabric
from litgpt.loss import IGNORED
from litgpt.model import GPT

sys.path.insert(0, str(Path(__file__).parent))
import workers

# Rows


def log_normal(n: int, seed: int = 0, longest: int = 4096) -> list[int]:
    draw = random.Random(seed)
    return [min(longest, max(1, round(draw.lognormvariate(5.3, 0.8)))) for _ in range(n)]


@pytest.mark.parametrize("capacity", [1, 7, 100, 512, 4096])
def test_every_sample_is_in_one_row_and_no_row_is_too_long(capacity):
    lengths = log_normal(500, longest=capacity if capacity > 100 else 300)
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)
    assert rows == pack(lengths, capacity)


def test_each_goes_into_the_fullest_row_that_it_fits():
    assert pack([2, 5, 4, 3, 6], 10) == [[4, 2], [1, 3, 0]]
    assert pack([7, 8, 2, 3], 10) == [[1, 2], [0, 3]], "not the first row that it fits"
    assert pack([12, 3], 10) == [[0], [1]]
    assert pack([], 10) == []


@pytest.mark.parametrize("capacity", [1024, 2048, 8192])
def test_rows_of_a_hundred_thousand_samples_are_98_percent_full_and_soon_planned(capacity):
    lengths = log_normal(100_000, longest=capacity)
    start = time.thread_time()
    rows = pack(lengths, capacity)
    assert time.thread_time() - start < 5
    assert sum(lengths) / (len(rows) * capacity) >= 0.98


def text(n: int, seed: int = 0, masked: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 31, (n,), generator=torch.Generator().manual_seed(seed))
    return dict(input_ids=ids, labels=torch.cat((torch.full((masked,), IGNORED), ids[masked:])))


def test_targets_are_what_follows_within_each_text():
    first = dict(input_ids=torch.tensor([1, 2, 3]), labels=torch.tensor([-100, 2, 3]))
    single = dict(input_ids=torch.tensor([7]), labels=torch.tensor([7]))
    batch = end_to_end([first, single, dict(input_ids=torch.tensor([4, 5]), labels=torch.tensor([4, 5]))])
    assert batch.ids.tolist() == [[1, 2, 7, 4]]
    assert batch.targets.tolist() == [[2, 3, -100, 5]]
    assert (batch.n_tokens, batch.lengths) == (4, [2, 1, 1])


def test_a_row_takes_no_more_tokens_than_a_padded_microbatch_could():
    samples = [text(n, seed=n) for n in log_normal(40, longest=200)]
    longest = max(len(sample["input_ids"]) for sample in samples)
    for micro in (1, 2, 4):
        packed, unpacked = microbatches_of(samples, micro, packing=True), microbatches_of(samples, micro)
        assert max(batch.ids.numel() for batch in packed) <= micro * longest
        assert sum(batch.n_tokens for batch in packed) == sum(batch.n_tokens for batch in unpacked)
        assert sum(batch.ids.numel() for batch in packed) == sum(batch.n_tokens for batch in packed)
        assert len(packed) < len(unpacked)
    assert max(batch.ids.numel() for batch in microbatches_of(samples, 2, packing=True, max_length=500)) > 2 * longest


def test_samples_that_are_plain_ids_stay_rows_of_a_batch():
    (batch,) = microbatches_of([torch.arange(5), torch.arange(5)], 2, packing=True)
    assert batch.lengths is None and batch.ids.shape == (2, 4)


# The whole data set in rows


class Sized(workers.Sized):
    highest_id, data, prompt_style = 30, ["record"], "a style"

    def example(self, index: int) -> str:
        return self.data[index]


def test_rows_count_as_samples_and_hold_their_texts():
    samples = Sized(text(n, seed=i, masked=n // 2) for i, n in enumerate([4, 9, 6, 3, 30]))
    packed = PackedSamples(samples, 12)
    assert packed.rows == [[4], [1, 3], [2, 0]] and packed.lengths == [30, 12, 10] and len(packed) == 3
    assert packed[1]["lengths"] == [9, 3]
    assert torch.equal(packed[1]["input_ids"], torch.cat((samples[1]["input_ids"], samples[3]["input_ids"])))
    ours, theirs = end_to_end([packed[1], packed[2]]), end_to_end([samples[i] for i in (1, 3, 2, 0)])
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.targets, theirs.targets) and ours.lengths == theirs.lengths
    assert [row["lengths"] for row in packed] == [[30], [9, 3], [6, 4]]
    assert PackedSamples(samples).rows == [[4], [1, 2, 0, 3]], "by default a row is as long as the longest"


def test_rows_of_a_data_set_answer_for_it():
    packed = PackedSamples(Sized([text(4), text(5)]), 10)
    for known in (packed, pickle.loads(pickle.dumps(packed))):
        assert (known.highest_id, known.data, known.prompt_style, known.example(0)) == (30, ["record"], "a style", "record")
        assert not hasattr(known, "nonsense")
    assert PackedSamples([text(4), text(5)], 10).rows == packed.rows, "a data set need not say how long its samples are"


def test_so_many_rows_are_in_a_step_and_in_a_forward_pass():
    samples = Sized(text(n, seed=i) for i, n in enumerate(log_normal(200, longest=100)))
    packed, fabric = PackedSamples(samples, 100), launch_fabric(accelerator="cpu")
    feed = training.Feed(fabric, packed, TrainArgs(global_batch_size=6, micro_batch_size=2, max_seq_length=100, packing="global"), seed=0)
    _, microbatches, agreed = next(iter(feed))
    assert len(microbatches) == 3
    assert agreed.n_tokens == agreed.n_slots > 0.97 * 6 * (100 - 2)  # of each text the last token is only predicted


# What a model computes

LENGTHS = [40, 7, 1, 12, 7]  # beyond and within windows, and the contexts that LongRoPE was trained on


def alone(model: GPT, texts: list[torch.Tensor], targets: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Logits, loss and gradients of texts that the model reads one by one."""
    logits = torch.cat([model(ids.unsqueeze(0))[0] for ids in texts])
    loss = F.cross_entropy(logits, torch.cat(targets), reduction="sum")
    return logits, loss, dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, model.parameters(), allow_unused=True)))


def random_model(config) -> GPT:
    torch.manual_seed(0)
    model = GPT(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    return model


@EVERY_VARIANT
def test_texts_in_one_row_have_the_logits_loss_and_gradients_they_have_alone(model_type, changes):
    config = tiny_config(model_type, **changes)
    model, segments = random_model(config), Segments(LENGTHS)
    texts = [torch.randint(config.vocab_size, (n,)) for n in LENGTHS]
    targets = [torch.where(torch.rand(n) < 0.4, IGNORED, torch.randint(config.vocab_size, (n,))) for n in LENGTHS]
    logits, loss, gradients = alone(model, texts, targets)
    row = torch.cat(texts).unsqueeze(0)
    torch.testing.assert_close(model(row, segments=segments)[0], logits, rtol=1e-5, atol=1e-5)
    nll = model(row, segments=segments, targets=torch.cat(targets).unsqueeze(0)).nll
    torch.testing.assert_close(nll, loss, rtol=1e-5, atol=0)
    nll.backward()
    known = lambda gradient, parameter: torch.zeros_like(parameter) if gradient is None else gradient  # noqa: E731
    pairs = [(known(parameter.grad, parameter), known(gradients[name], parameter)) for name, parameter in model.named_parameters()]
    whole, expected = (torch.cat([gradient.flatten() for gradient in side]) for side in zip(*pairs, strict=True))
    assert (whole - expected).norm() <= 1e-5 * expected.norm()
    assert all((found - expected).norm() <= 1e-5 * max(1.0, expected.norm()) for found, expected in pairs)


@pytest.mark.parametrize("micro", [1, 3])
def test_packed_steps_have_the_loss_and_gradients_of_padded_ones(micro):
    fabric, samples = launch_fabric(accelerator="cpu"), workers.samples(11)
    found = []
    for packing in (False, True):
        model = fabric.setup_module(workers.build())
        batches = microbatches_of(samples, micro, packing)
        n_targets = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
        loss = training.forward_backward(fabric, model, batches, n_targets).item()
        found.append((loss, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (padded_loss, padded_gradients), (packed_loss, packed_gradients) = found
    assert packed_loss == pytest.approx(padded_loss, rel=1e-6)
    assert (packed_gradients - padded_gradients).norm() < 1e-5 * padded_gradients.norm()


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "deepseek_v3", "lfm2", "qwen3_next", "gemma2", "gpt_oss"])
def test_ignored_tokens_behind_the_texts_of_a_row_change_nothing(model_type):
    samples, found = [text(n, seed=n, masked=1) for n in (3, 4, 20)], []
    for rounded in (lambda row: row, lambda row: rounded_up(row, 64)):
        model, row = random_model(tiny_config(model_type)), rounded(end_to_end(samples))
        row_loss = model(row.ids, targets=row.targets, segments=Segments(row.lengths)).nll
        row_loss.backward()
        found.append((row_loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert (row.ids.shape, row.n_tokens, row.lengths) == ((1, 64), 24, [2, 3, 19, 40])
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    assert (found[1][1] - found[0][1]).norm() <= 1e-5 * found[0][1].norm()
    assert rounded_up(row, 64) is row and rounded_up(padded(samples), 64).ids.shape == (3, 19)


@pytest.mark.parametrize(
    ("precision", "balance", "n_slots"), [("32-true", 0, 24), ("bf16-true", 0, 64), ("bf16-mixed", 0, 64), ("bf16-mixed", 1, 24)]
)
def test_rows_have_few_different_lengths_where_each_costs_a_program_of_its_own(precision, balance, n_slots):
    fabric, seen = launch_fabric(accelerator="cpu", precision=precision), []
    model = random_model(tiny_config("mixtral"))
    cast_parameters(model.requires_grad_(precision != "bf16-true"), precision)
    model.lm_head.requires_grad_()
    model.expert_balance = balance
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numel()))
    training.forward_backward(fabric, fabric.setup_module(model), [end_to_end([text(n, seed=n) for n in (3, 4, 20)])], 24)
    assert seen == [n_slots]


def test_control_without_borders_texts_change_each_others_logits():
    model = random_model(tiny_config("llama"))
    row = torch.randint(90, (1, 12))
    apart, joined = model(row, segments=Segments([5, 7]))[0], model(row)[0]
    torch.testing.assert_close(apart[:5], joined[:5], rtol=1e-5, atol=1e-5)
    assert (apart[5:] - joined[5:]).abs().max() > 1e-3


def test_length_dependent_angles_are_those_of_each_text_alone():
    factors = dict(short_factor=[1.5, 2.5], long_factor=[4.0, 7.0], original_max_seq_len=16)
    model = random_model(tiny_config("phi3", rope_adjustments=factors))
    texts = [torch.randint(90, (1, n)) for n in (10, 12)]  # together they are longer than what the model was trained on
    packed = model(torch.cat(texts, 1), segments=Segments([10, 12]))[0]
    torch.testing.assert_close(packed, torch.cat([model(ids)[0] for ids in texts]), rtol=1e-5, atol=1e-5)


def gradient_of(model: GPT, microbatches: list) -> tuple[float, torch.Tensor]:
    fabric = launch_fabric(accelerator="cpu")
    wrapped, n_targets = fabric.setup_module(model), sum(int((batch.targets != IGNORED).sum()) for batch in microbatches)
    loss = training.forward_backward(fabric, wrapped, microbatches, n_targets).item()
    known = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return loss, torch.cat([gradient.flatten() for gradient in known])


def test_padding_does_not_lengthen_a_text_whose_angles_depend_on_its_length():
    factors = dict(short_factor=[1.5, 2.5], long_factor=[4.0, 7.0], original_max_seq_len=16)
    config = tiny_config("phi3", rope_adjustments=factors)
    samples = [text(n, seed=n) for n in (5, 10, 30)]
    (loss, gradients), (expected, alone) = (gradient_of(random_model(config), microbatches_of(samples, size)) for size in (3, 1))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert (gradients - alone).norm() < 1e-5 * alone.norm()
    fabric, train = launch_fabric(accelerator="cpu"), TrainArgs(micro_batch_size=3, packing=False)
    losses = [
        training.validate(fabric, fabric.setup_module(random_model(config)), training.validation_microbatches(fabric, samples, how))
        for how in (train, replace(train, micro_batch_size=1))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_experts_are_balanced_by_the_tokens_of_texts_and_not_by_padding():
    samples, found = [text(n, seed=n) for n in (3, 4, 30)], []
    for batch in (padded(samples), end_to_end(samples)):
        model = random_model(tiny_config("mixtral"))
        model.expert_balance = 10.0
        found.append(gradient_of(model, [batch])[1])
    assert (found[0] - found[1]).norm() < 1e-5 * found[1].norm()


# Back ends


def reference_varlen(q, k, v, borders_q, borders_k, longest_q, longest_k, *, scale=None, window_size=(-1, -1)):
    """What torch documents of its attention over sequences of any lengths: (N, H, D), cumulative borders, tokens seen left and right."""
    assert borders_q.dtype == torch.int32 and longest_q == longest_k == int(borders_q.diff().max())
    assert torch.equal(borders_q, borders_k) and q.shape[1] == k.shape[1]
    found = []
    for start, end in zip(borders_q.tolist(), borders_q.tolist()[1:], strict=False):
        places = torch.arange(end - start)
        distance = places.unsqueeze(1) - places
        left, right = window_size
        seen = (distance >= -right) & (distance <= left if left >= 0 else True)
        parts = (x[start:end].transpose(0, 1) for x in (q, k, v))
        found.append(F.scaled_dot_product_attention(*parts, seen, scale=scale).transpose(0, 1))
    return torch.cat(found)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text", "olmo3", "qwen3"])
def test_one_kernel_for_all_segments_is_given_what_it_needs(model_type, monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    model, segments = random_model(tiny_config(model_type)), Segments(LENGTHS)
    row = torch.randint(90, (1, sum(LENGTHS)))
    expected = model(row, segments=segments)
    calls = []
    monkeypatch.setattr(attention, "runs_varlen", lambda q, v: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **options: calls.append(1) or reference_varlen(*args, **options))
    torch.testing.assert_close(model(row, segments=segments), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == model.config.n_layer


def test_the_kernel_is_left_out_where_it_cannot_compute():
    q = torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16)
    assert not attention.runs_varlen(q, q), "it is for CUDA"


@pytest.mark.parametrize("T", [1, 2, 30, 256, 300])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gradients_of_attention_in_bf16_are_those_in_fp32_rounded(T, groups):
    sizes = [(2, T, 6, 16), (2, T, groups, 16), (2, T, groups, 16)]
    given = [torch.randn(size).bfloat16() for size in sizes]
    weights, found = torch.randn(sizes[0]).bfloat16(), []
    for dtype in (torch.float32, torch.bfloat16):
        qkv = [x.to(dtype, copy=True).requires_grad_() for x in given]
        context = attention.Context({}, {None: attention.causal_mask(T, None, torch.device("cpu"))})
        y = attention.attend(*qkv, None, context, None, scale=0.2)
        found.append((y, *torch.autograd.grad((y * weights).sum(), qkv)))
    for wide, narrow in zip(*found, strict=True):
        assert narrow.dtype == torch.bfloat16 and (narrow.float() - wide).norm() <= 1e-2 * wide.norm() + 1e-6


def test_compiled_blocks_are_not_compiled_anew_for_every_packing():
    model, compiled = random_model(tiny_config("llama")), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    packings = [[5, 9, 3], [4, 4], [12, 2, 2, 2, 6], [1, 30], [8, 7, 6, 5]]
    rows = [torch.randint(90, (1, sum(lengths))) for lengths in packings]
    expected = [model(row, segments=Segments(lengths)) for row, lengths in zip(rows, packings)]
    for block in model.transformer.h:
        block.compile(backend=backend)
    counts = []
    for row, lengths, logits in zip(rows, packings, expected, strict=True):
        torch.testing.assert_close(model(row, segments=Segments(lengths)), logits, rtol=1e-5, atol=1e-5)
        counts.append(len(compiled))
    torch._dynamo.reset()
    assert counts[0] > 0 and counts[1] == counts[-1], counts  # the second one shows which sizes change
    assert padded([text(4)]).lengths is None
