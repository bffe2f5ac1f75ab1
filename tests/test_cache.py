"""The promises of the cache, for every kind of memory alone and for all of them in one model."""

import random

import psutil
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from litgpt.attention import Segments
from litgpt.cache import DeltaState, Latents, Recent, empty_memory
from litgpt.config import Config
from litgpt.model import GPT

LATENT = dict(
    n_query_groups=4, latent_attention=dict(q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=10)
)
CONV = dict(short_conv=dict(kernel_size=3, bias=False))
DELTA = dict(gated_delta=dict(n_key_heads=2, n_value_heads=4, key_head_size=8, value_head_size=6, kernel_size=4))
EVERYTHING = ["attention", "gated_delta", "latent", "short_conv", "attention", "gated_delta"]
KINDS = {
    "full": dict(n_layer=2),
    "sliding": dict(n_layer=2, sliding_window_size=5),
    "latent": dict(n_layer=2) | LATENT,
    "short_conv": dict(mixers=["short_conv"] * 3) | CONV,
    "gated_delta": dict(mixers=["gated_delta"] * 2) | DELTA,
    "everything": dict(mixers=EVERYTHING, sliding_window_size=5, sliding_window_indices=[1, 0, 0, 0, 0, 0]) | LATENT | CONV | DELTA,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str) -> GPT:
    """A model whose logits depend on all tokens before."""
    fields = dict(n_layer=len(KINDS[kind].get("mixers", [])), n_head=4, n_query_groups=2, n_embd=32, intermediate_size=48, block_size=256)
    fields |= dict(vocab_size=97, padded_vocab_size=97, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", parallel_residual=False)
    model = GPT(Config(**dict(name="tiny", bias=False, rotary_percentage=1.0) | fields | KINDS[kind])).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("A_log"):
            parameter.data.uniform_(-4, 0)  # remember for long
    return model


def ids(*shape: int) -> Tensor:
    return torch.randint(97, shape)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(b.detach().abs().max())) if b.numel() else 0.0)


@every_kind
@pytest.mark.parametrize("rewind", [0, 3])
@torch.inference_mode()
def test_decoding_token_by_token_equals_the_full_forward(kind, rewind):
    model, idx = tiny(kind), ids(3, 40)
    cache = model.new_cache(3, 40, chunk=1, rewind=rewind)
    steps = [model(idx[:, t : t + 1], cache=cache) for t in range(40)]
    same(torch.cat(steps, 1), model(idx))


@every_kind
@pytest.mark.parametrize("trial", range(8))
@torch.inference_mode()
def test_rows_of_different_lengths_in_uneven_chunks_equal_the_full_forward(kind, trial):
    model, draw = tiny(kind), random.Random(trial)
    n_rows, packed, rewind, chunk = draw.randint(1, 4), trial % 2 == 0, [0, 2, 6, 11][trial // 2], [11, 90][trial % 4 // 2]
    length = 3 * chunk
    idx, cache = ids(n_rows, length), model.new_cache(5, length + 7, chunk=chunk, rewind=rewind)
    places = draw.sample(range(5), n_rows)
    full, seen = model(idx), [0] * n_rows
    while min(seen) < length:
        counts = [min(draw.randint(0, chunk), length - n) for n in seen]
        if max(counts) == 0:
            continue
        pieces = [row[n : n + count] for row, n, count in zip(idx, seen, counts)]
        fed = torch.cat(pieces)[None] if packed else pad_sequence(pieces, batch_first=True)
        logits = model(fed, cache=cache.span(counts, places, packed=packed))
        got = logits[0].split(counts) if packed else [row[:count] for row, count in zip(logits, counts)]
        for i, count in enumerate(counts):
            same(got[i], full[i, seen[i] : seen[i] + count])
            seen[i] += count
    assert [cache.lengths[place] for place in places] == seen


@every_kind
@torch.inference_mode()
def test_padding_without_a_cache_changes_nothing(kind):
    model, idx = tiny(kind), ids(3, 20)
    positions = torch.stack((torch.arange(20), torch.arange(20) - 7, torch.arange(20))).clamp(min=-1)
    positions[2, 15:] = -1
    logits = model(idx, positions)
    same(logits[0], model(idx[:1])[0])
    same(logits[1, 7:], model(idx[1:2, 7:])[0])
    same(logits[2, :15], model(idx[2:, :15])[0])
    assert logits.isfinite().all()


@every_kind
@pytest.mark.parametrize("with_lengths", [True, False])
def test_packed_segments_equal_the_sequences_apart_and_so_do_their_gradients(kind, with_lengths):
    lengths = [1, 17, 4, 90, 6]
    model, idx, targets = tiny(kind), ids(1, sum(lengths)), ids(1, sum(lengths))
    segments = Segments(lengths) if with_lengths else Segments(lengths).without_lengths()
    same(model(idx, segments=segments), torch.cat([model(part) for part in idx.split(lengths, 1)], 1))
    model(idx, segments=segments, targets=targets).nll.backward()
    packed = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for part, answers in zip(idx.split(lengths, 1), targets.split(lengths, 1)):
        model(part, targets=answers).nll.backward()
    for ours, parameter in zip(packed, model.parameters()):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


@every_kind
@pytest.mark.parametrize("packed", [False, True])
@torch.inference_mode()
def test_guesses_are_taken_back_by_truncating(kind, packed):
    model, draw, idx, rewind = tiny(kind), random.Random(0), ids(3, 60), 4
    cache, full = model.new_cache(3, 80, chunk=12, rewind=rewind), model(idx)
    model(idx[:, :12], cache=cache)
    for _ in range(25):
        starts = list(cache.lengths)
        good = [min(draw.randint(0, 5), 59 - n) for n in starts]
        bad = [draw.randint(0, rewind) for _ in starts]
        pieces = [torch.cat((row[n : n + g], ids(b))) for row, n, g, b in zip(idx, starts, good, bad)]
        counts = [len(piece) for piece in pieces]
        if max(counts) == 0:
            continue
        fed = torch.cat(pieces)[None] if packed else pad_sequence(pieces, batch_first=True)
        logits = model(fed, cache=cache.span(counts, packed=packed))
        got = logits[0].split(counts) if packed else logits
        for row, (n, g) in enumerate(zip(starts, good)):
            same(got[row][:g], full[row, n : n + g])
            assert cache.truncate(row, n + g) == n + g
    assert min(cache.lengths) == 59
    same(model(idx[:, 59:], cache=cache), full[:, 59:])


@every_kind
@torch.inference_mode()
def test_truncating_in_several_goes_stops_at_the_floor(kind):
    model, idx = tiny(kind), ids(1, 30)
    cache, full = model.new_cache(1, 30, rewind=6), model(idx)
    model(idx[:, :25], cache=cache)
    assert [cache.truncate(0, n) for n in (23, 20, 19)] == [23, 20, 19]
    same(model(idx[:, 19:21], cache=cache), full[:, 19:21])
    assert cache.truncate(0, 19) == 19
    known = cache.truncate(0, 18)
    assert known == (18 if cache.rewinds_freely else 0)
    same(model(idx[:, known:], cache=cache), full[:, known:])


@every_kind
@pytest.mark.parametrize("rewind", [0, 4])
@torch.inference_mode()
def test_snapshots_and_copies_equal_a_fresh_prefill(kind, rewind):
    model, idx = tiny(kind), ids(1, 30)
    cache, full = model.new_cache(4, 40, chunk=10, rewind=rewind), model(idx)
    for at in (0, 10):
        model(idx[:, at : at + 10], cache=cache.span([10], [1]))
    cache.truncate(1, 20 - rewind)
    saved = cache.snapshot(1)
    cache.copy(1, 2)
    model(ids(1, 9), cache=cache.span([9], [1]))
    model(ids(1, 10), cache=cache.span([10], [3]))  # a row that held something else
    for row in (0, 1, 3):
        cache.restore(row, saved)
    known = 20 - rewind
    tail = model(idx[:, known : known + 10].repeat(4, 1), cache=cache)
    same(tail, full[:, known : known + 10].repeat(4, 1, 1))


@every_kind
@torch.inference_mode()
def test_a_row_that_is_used_again_remembers_nothing(kind):
    model, idx = tiny(kind), ids(1, 12)
    cache = model.new_cache(2, 40, rewind=3)
    model(ids(2, 30), cache=cache)
    assert cache.truncate(1, 0) == 0
    same(model(idx, cache=cache.span([12], [1])), model(idx))


@every_kind
@torch.inference_mode()
def test_a_row_that_gets_no_token_stays_as_it_was(kind):
    model = tiny(kind)
    cache = model.new_cache(2, 40, rewind=3)
    model(ids(2, 20), cache=cache)
    before = cache.snapshot(0)
    model(ids(2, 5), cache=cache.span([0, 5]))
    for ours, saved in zip(cache.snapshot(0).parts, before.parts):
        for part, expected in zip(ours, saved):
            torch.testing.assert_close(part, expected)


@every_kind
@torch.inference_mode()
def test_calls_of_a_fixed_form_equal_plain_ones(kind):
    model, idx = tiny(kind), ids(3, 40)
    cache, full = model.new_cache(3, 64, chunk=8, rewind=2), model(idx)
    cache.bucket = 32  # what compiled decoding sets
    model(idx[:, :8], cache=cache)
    for t in range(8, 40):
        same(model(idx[:, t : t + 1], cache=cache)[:, 0], full[:, t])


class NeverWaits(TorchDispatchMode):
    """Refuses operations whose result a program could not go on without."""

    waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in self.waits, function
        return function(*args, **(kwargs or {}))


@every_kind
@torch.inference_mode()
def test_decoding_never_waits_for_the_device(kind):
    model = tiny(kind)
    cache = model.new_cache(2, 40, rewind=2)
    with NeverWaits():
        model(ids(2, 10), cache=cache.span([10, 4]))
        model(ids(1, 5), cache=cache.span([2, 3], packed=True))
        model(ids(2, 1), cache=cache)


def test_what_a_token_costs_does_not_grow_in_recurrent_layers():
    states = [tiny("everything").new_cache(2, length, rewind=3).states for length in (50, 5000)]
    for short, long in zip(*states):
        if isinstance(short, Recent):
            assert [part.shape for part in short.parts(0, 40)] == [part.shape for part in long.parts(0, 4000)]
    assert {type(state) for state in states[0]} >= {Latents, Recent, DeltaState}


def test_memory_on_a_cpu_is_taken_as_it_is_used():
    def resident():
        return psutil.Process().memory_info().rss

    before = resident()
    memory = empty_memory((2**14, 2**14), torch.bfloat16, torch.device("cpu"))  # half a GB
    assert resident() - before < 2**24
    assert memory[:: 2**12].count_nonzero() == 0 and memory.shape == (2**14, 2**14)
    memory[:256] = 1
    assert 2**22 < resident() - before < 2**27
    assert memory[255:257, 0].tolist() == [1, 0]
    del memory
    assert resident() - before < 2**24
