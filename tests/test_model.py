import pytest
import torch
import torch.nn.functional as F
from oracle import pair
from tiny import EVERY_FAMILY, EVERY_VARIANT, tiny_config

from litgpt.attention import Segments
from litgpt.families import FAMILIES
from litgpt.loss import IGNORED
from litgpt.model import GPT, Linear, RMSNorm

ATOL = dict(rtol=0, atol=2e-5)


def tokens(config, *shape):
    return torch.randint(config.vocab_size, shape)


@EVERY_FAMILY
@torch.no_grad()
def test_logits_hidden_states_and_token_losses_equal_transformers(family):
    config = tiny_config(family)
    ours, theirs = pair(config)
    idx = tokens(config, 2, 23)
    expected = theirs(idx, output_hidden_states=True)
    torch.testing.assert_close(ours(idx), expected.logits, **ATOL)
    torch.testing.assert_close(ours(idx, output="hidden"), expected.hidden_states[-1], **ATOL)
    targets = torch.cat((idx[:, 1:], torch.full((2, 1), IGNORED)), 1)
    nll = F.cross_entropy(expected.logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, -1)
    torch.testing.assert_close(ours(idx, targets=targets, output="token_nll"), nll, **ATOL)
    loss = ours(idx, targets=targets)
    torch.testing.assert_close(loss.nll / loss.n_targets, theirs(idx, labels=idx).loss, **ATOL)
    assert loss.n_targets == 2 * 22


@EVERY_FAMILY
def test_gradients_equal_transformers(family):
    config = tiny_config(family)
    ours, theirs = pair(config)
    idx = tokens(config, 2, 9)
    theirs(idx, labels=idx).loss.backward()
    loss = ours(idx[:, :-1], targets=idx[:, 1:])
    (loss.nll / loss.n_targets).backward()
    theirs.state_dict(keep_vars=True)
    embedding = next(p for p in theirs.parameters() if p.shape == ours.transformer.wte.weight.shape)
    scale = embedding.grad.abs().max()
    torch.testing.assert_close(ours.transformer.wte.weight.grad / scale, embedding.grad / scale, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rms_norm_and_its_gradients_equal_the_formula_in_float64():
    norm = RMSNorm(16, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x, g = torch.randn(3, 5, 16, dtype=torch.float64), torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.enable_grad():
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        got = torch.autograd.grad((norm(ours) * g).sum(), [ours, norm.weight])
        formula = theirs / (theirs.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
        expected = torch.autograd.grad((formula * g).sum(), [theirs, norm.weight])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_a_row_in_bf16_is_as_exact_as_several_rows_and_has_their_gradients(bias):
    layer = Linear(576, 192, bias=bias).bfloat16()
    x = torch.randn(1, 1, 576, dtype=torch.bfloat16)
    weight, shift = layer.weight.double(), layer.bias.double() if bias else 0.0
    exact = x.double() @ weight.T + shift
    with torch.no_grad():
        row, rows = layer(x), layer(x.expand(3, 1, -1))[:1]
    assert row.shape == (1, 1, 192) and row.dtype == torch.bfloat16
    error, usual = ((y.double() - exact).abs().max() for y in (row, rows))
    assert error <= usual + 2**-8 * exact.abs().max()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.flatten().expand(192, -1))


@EVERY_VARIANT
@torch.no_grad()
def test_variants_equal_transformers(model_type, changes):
    config = tiny_config(model_type, **changes)
    ours, theirs = pair(config)
    idx = tokens(config, 2, 40)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, **ATOL)


def mixed_model(**changes):
    """Layers with a full view, a short window and a longer one."""
    config = tiny_config(FAMILIES["mistral"], n_layer=3, sliding_window_size=5, sliding_window_indices=[0, 1, 1], **changes)
    return GPT(config).eval(), config


@torch.no_grad()
def test_cached_rows_of_different_lengths_equal_a_full_pass_whatever_the_chunks():
    model, config = mixed_model()
    draw = torch.Generator().manual_seed(5)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    for case in range(12):
        lengths = [number(8, 24) for _ in range(3)]
        rows = [tokens(config, 1, n) for n in lengths]
        expected = [model(row)[0] for row in rows]
        cache = model.new_cache(3, 24, chunk=11)
        got = [[] for _ in rows]
        while any(length < n for length, n in zip(cache.lengths, lengths)):
            counts = [min(number(0, 12), n - have) for n, have in zip(lengths, cache.lengths)]
            if not any(counts):
                continue
            starts, packed = list(cache.lengths), bool(case % 2)
            pieces = [row[:, start : start + n] for row, start, n in zip(rows, starts, counts)]
            idx = torch.cat(pieces, 1) if packed else torch.cat([F.pad(p, (0, max(counts) - p.size(1))) for p in pieces])
            logits = model(idx, cache=cache.span(counts, packed=packed))
            logits = logits[0].split(counts) if packed else [row[:n] for row, n in zip(logits, counts)]
            for into, piece in zip(got, logits):
                into.append(piece)
        for ours, plain in zip(got, expected):
            torch.testing.assert_close(torch.cat(ours), plain, rtol=0, atol=1e-5)


@EVERY_FAMILY
@torch.no_grad()
def test_decoding_token_by_token_equals_transformers_full_pass(family):
    config = tiny_config(family)
    ours, theirs = pair(config)
    idx = tokens(config, 2, 19)
    cache = ours.new_cache(2, 19, chunk=7)
    logits = [ours(idx[:, :7], cache=cache), *(ours(idx[:, t : t + 1], cache=cache) for t in range(7, 19))]
    torch.testing.assert_close(torch.cat(logits, 1), theirs(idx).logits, **ATOL)


@torch.no_grad()
def test_padding_positions_leave_the_other_tokens_as_they_are():
    model, config = mixed_model()
    idx = tokens(config, 1, 9)
    positions = torch.tensor([[-1, -1, *range(9), -1]])
    padded = F.pad(idx, (2, 1))
    torch.testing.assert_close(model(padded, positions=positions)[:, 2:-1], model(idx), rtol=0, atol=1e-5)
    last = model(padded, positions=positions, select="last")
    torch.testing.assert_close(last, model(idx)[:, -1], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("by_ids", [False, True], ids=["by length", "by id"])
def test_packed_segments_equal_separate_rows(by_ids):
    model, config = mixed_model()
    lengths = [7, 1, 12]
    idx = tokens(config, 1, sum(lengths))
    segments = Segments(lengths).without_lengths() if by_ids else Segments(lengths)
    separate = [model(piece)[0] for piece in idx.split(lengths, 1)]
    torch.testing.assert_close(model(idx, segments=segments)[0], torch.cat(separate), rtol=0, atol=1e-5)
    last = model(idx, segments=segments, select="last")
    torch.testing.assert_close(last, torch.stack([piece[-1] for piece in separate]), rtol=0, atol=1e-5)
    chosen = model(idx, segments=segments, select=torch.tensor([3, 8]))
    torch.testing.assert_close(chosen, torch.cat(separate)[[3, 8]], rtol=0, atol=1e-5)


def test_segments_have_the_gradients_of_separate_rows():
    model, config = mixed_model()
    lengths = [6, 9]
    idx, targets = tokens(config, 1, 15), tokens(config, 1, 15)
    model(idx, segments=Segments(lengths), targets=targets).nll.backward()
    packed = model.transformer.wte.weight.grad.clone()
    model.zero_grad()
    for piece, following in zip(idx.split(lengths, 1), targets.split(lengths, 1)):
        model(piece, targets=following).nll.backward()
    torch.testing.assert_close(packed, model.transformer.wte.weight.grad, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_truncated_rows_continue_as_if_the_rest_had_never_been():
    model, config = mixed_model()
    idx, wrong = tokens(config, 1, 30), tokens(config, 1, 4)
    cache = model.new_cache(1, 40, chunk=8, rewind=4)
    for start in (0, 8, 16):
        model(idx[:, start : start + 8], cache=cache)
    model(wrong, cache=cache)
    assert cache.truncate(0, 24) == 24
    torch.testing.assert_close(model(idx[:, 24:], cache=cache)[0], model(idx)[0, 24:], rtol=0, atol=1e-5)
    assert cache.truncate(0, 3) == 0, "a ring has forgotten what lies so far back"


@torch.no_grad()
def test_snapshots_and_copies_remember_a_row():
    model, config = mixed_model()
    idx = tokens(config, 1, 20)
    cache = model.new_cache(2, 20)
    model(idx[:, :12], cache=cache.span([12], rows=[1]))
    cache.copy(1, 0)
    saved = cache.snapshot(1)
    model(tokens(config, 1, 5), cache=cache.span([5], rows=[1]))
    cache.restore(1, saved)
    logits = model(idx[:, 12:].expand(2, -1), cache=cache)
    torch.testing.assert_close(logits, model(idx)[:, 12:].expand(2, -1, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_selected_tokens_alone_reach_the_head():
    model, config = mixed_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    idx = tokens(config, 2, 10)
    logits = model(idx, select="last")
    assert seen == [2] and logits.shape == (2, config.padded_vocab_size)


def test_a_cache_refuses_positions_and_segments_beside_it_and_too_many_tokens():
    model, config = mixed_model()
    cache, idx = model.new_cache(1, 8), tokens(config, 1, 4)
    for wrong in (dict(positions=torch.arange(4)), dict(segments=Segments([4]))):
        with pytest.raises(ValueError, match="neither"):
            model(idx, cache=cache, **wrong)
    with pytest.raises(ValueError, match="at most 8"):
        model(tokens(config, 1, 9), cache=cache)


def test_unknown_outputs_and_selections_are_refused():
    model, config = mixed_model()
    for wrong in (dict(output="loss"), dict(output="token_nll"), dict(select="first")):
        with pytest.raises(ValueError, match="but got"):
            model(tokens(config, 1, 4), **wrong)


def test_checkpointed_blocks_have_equal_gradients_and_no_other_names():
    model, config = mixed_model()
    idx = tokens(config, 2, 12)
    grads = []
    for model.n_recomputed in (0, 1, config.n_layer):
        model.zero_grad()
        model(idx, targets=idx).nll.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        for again in grads[1:]:
            torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-6)


def test_casting_a_model_leaves_its_rotary_table_in_fp32():
    model, _ = mixed_model()
    model.to(torch.bfloat16)
    table, _ = model.rope._table(torch.device("cpu"), 8, 0)
    assert table.dtype == torch.float32


def test_tied_weights_are_one_parameter():
    model = GPT(tiny_config(FAMILIES["llama"], tie_embeddings=True))
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len([n for n, _ in model.named_parameters() if n in ("lm_head.weight", "transformer.wte.weight")]) == 1


@EVERY_FAMILY
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prompts_equal_transformers(family, side):
    config = tiny_config(family)
    ours, theirs = pair(config)
    lengths = (19, 4, 13)
    mask = torch.stack([torch.arange(19) < n for n in lengths])
    mask = mask.flip(1) if side == "left" else mask
    idx = torch.where(mask, tokens(config, 3, 19), 0)
    positions = mask.cumsum(1) - 1
    expected = theirs(idx, attention_mask=mask.long(), position_ids=positions.clamp(min=0)).logits
    got = ours(idx, positions=torch.where(mask, positions, -1))
    torch.testing.assert_close(got[mask], expected[mask], **ATOL)


def relative_error(logits, exact):
    return ((logits.double() - exact.double()).norm() / exact.double().norm()).item()


@EVERY_FAMILY
@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_transformers_bf16_is(family):
    config = tiny_config(family)
    ours, theirs = pair(config)
    idx = tokens(config, 8, 23)
    exact = theirs(idx).logits
    their_error = relative_error(theirs.bfloat16()(idx).logits, exact)
    our_error = relative_error(ours.bfloat16()(idx), exact)
    assert 0 < our_error <= 2 * their_error
