import math

import pytest
import torch
from speaking import make_checkpoint
from transformers import AutoModelForCausalLM
from vocabularies import KINDS, write

from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.errors import UserError
from litgpt.generate import memory, sampling
from litgpt.generate.decode import complete, decode, stream_text
from litgpt.generate.memory import compile_blocks, new_cache, room
from litgpt.generate.sampling import RowState, draw, probabilities, sample
from litgpt.generate.stopping import StopMatcher
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

VOCAB = 67


def tiny_model(**fields):
    fields = dict(mlp_class_name="LLaMAMLP", norm_class_name="RMSNorm", parallel_residual=False, rotary_percentage=1.0, bias=False) | fields
    size = dict(n_layer=2, n_embd=16, n_head=4, n_query_groups=2, intermediate_size=32, vocab_size=VOCAB, padded_vocab_size=VOCAB)
    model = GPT(Config(name="tiny", block_size=64, **size, **fields)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize("what", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0.0), dict(top_p=0.5), dict(top_k=3), dict(presence_penalty=1.0)])
def test_a_model_that_computes_no_numbers_is_one_sentence_however_it_is_sampled(what, settings):
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.proj.weight[3] = what
    with pytest.raises(UserError, match=r"computes no numbers \(NaN or infinity\): its weights are damaged"):
        list(complete(model, [1, 2, 3], RowState(**settings), 5))


def test_a_row_without_numbers_leaves_the_others_as_they_are():
    logits = torch.randn(3, VOCAB)
    alone = sample(logits[:1], [RowState(top_p=0.9, seed=5)])
    logits[1] = float("nan")
    logits[2] = float("-inf")
    drawn = sample(logits, [RowState(top_p=0.9, seed=5), RowState(top_p=0.9), RowState()])
    assert drawn.tolist() == [alone.item(), sampling.NO_TOKEN, sampling.NO_TOKEN]


def greedy(seed=0):
    return RowState(temperature=0.0, seed=seed)


@torch.no_grad()
def plain_loop(model, prompt, n):
    """The oracle: a full forward pass for each token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def all_tokens(model, prompts, rows, n, chunk=None, **kwargs):
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + n, chunk=chunk)
    shown = [[] for _ in prompts]
    for step in decode(model, prompts, rows, cache, n, **kwargs):
        for row, new in zip(shown, step, strict=True):
            row += new
    return shown


# Sampling


def expected(logits, temperature=1.0, top_k=None, top_p=1.0):
    """The definition, token by token, in Python's numbers: `top_k`, then temperature, then `top_p`."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp(logits[i] / temperature) for i in order]
    kept, mass = [], 0.0
    for i, weight in zip(order, weights, strict=True):
        if mass >= top_p * sum(weights):
            break
        kept.append((i, weight))
        mass += weight
    probs = [0.0] * len(logits)
    for i, weight in kept:
        probs[i] = weight / mass
    return probs


SETTINGS = [
    dict(),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_k=1000),
    dict(top_p=0.6),
    dict(top_p=0.999),
    dict(top_k=20, top_p=0.5, temperature=1.7),
    dict(top_k=3, top_p=1.0, temperature=2.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_the_definition(settings):
    logits = torch.randn(VOCAB) * 2
    probs = probabilities(logits[None], [RowState(**settings)])[0]
    torch.testing.assert_close(probs, torch.tensor(expected(logits.double().tolist(), **settings)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_top_p_is_right_where_it_needs_more_tokens_than_are_looked_at_first(top_p, monkeypatch):
    logits = torch.randn(3, VOCAB) * torch.tensor([[0.1], [4.0], [1.0]])
    rows = [RowState(top_p=top_p), RowState(top_p=top_p), RowState(top_p=top_p, top_k=7)]
    whole = probabilities(logits, rows)
    monkeypatch.setattr(sampling, "PREFIX", 4)
    assert torch.equal(probabilities(logits, rows), whole)


def test_of_equal_logits_the_first_ones_stay():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    kept = probabilities(logits, [RowState(top_k=3)])[0] > 0
    assert kept.tolist() == [False, True, True, True, False, False]


def test_greedy_rows_take_the_likeliest_token():
    logits = torch.randn(4, VOCAB)
    rows = [RowState(temperature=0.0), RowState(top_p=0.0), RowState(top_k=1), RowState(temperature=1e-40)]
    assert torch.equal(sample(logits, rows), logits.argmax(-1))
    assert torch.equal(probabilities(logits, rows).argmax(-1), logits.argmax(-1))


def test_what_a_row_draws_does_not_depend_on_its_neighbours():
    logits = (torch.randn(9, VOCAB) * 2).bfloat16().float()  # many equal values

    def rows():
        settings = [*SETTINGS, dict(temperature=0.0)]
        made = [RowState(**fields, seed=seed) for seed, fields in enumerate(settings)]
        made[1].repetition_penalty = 1.3
        made[1].count_prompt([1, 2, 2], VOCAB, logits.device)
        return made

    together, alone, reversed_rows = rows(), rows(), rows()
    for _ in range(40):
        drawn = sample(logits, together)
        assert torch.equal(drawn, torch.cat([sample(logits[i : i + 1], [row]) for i, row in enumerate(alone)]))
        assert torch.equal(drawn, sample(logits.flip(0), reversed_rows[::-1]).flip(0))


def test_the_frequencies_of_drawn_tokens_are_the_probabilities():
    logits, row, n = torch.randn(1, 8), RowState(top_p=0.9, temperature=1.3, seed=1), 4000
    counts = torch.bincount(torch.cat([sample(logits, [row]) for _ in range(n)]), minlength=8)
    probs = probabilities(logits, [row])[0]
    assert counts[probs == 0].sum() == 0
    seen = probs > 0
    chi_square = ((counts[seen] - n * probs[seen]) ** 2 / (n * probs[seen])).sum()
    assert chi_square < 24.3  # 7 degrees of freedom or fewer: passed by one of 1000 seeds


def test_a_number_from_zero_to_one_draws_by_the_running_sum_and_never_an_impossible_token():
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    numbers = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53]
    assert [draw(probs, [u]).item() for u in numbers] == [1, 1, 3, 3, 4, 4]


def test_penalties_are_those_of_their_definitions():
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    row = RowState(temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.125)
    row.count_prompt([0, 1], 4, logits.device)
    assert sampling.penalized(logits, [row]).tolist() == [[1.0, -4.0, 1.0, 0.5]]
    assert sample(logits, [row]).item() == 0  # of equal ones the first
    assert sampling.penalized(logits, [row]).tolist() == [[1.0 - 0.25 - 0.125, -4.0, 1.0, 0.5]]
    assert sample(logits, [row]).item() == 2
    assert sample(logits, [row]).item() == 0
    assert sampling.penalized(logits, [row]).tolist() == [[1.0 - 0.25 - 0.25, -4.0, 0.5 - 0.25 - 0.125, 0.5]]


def test_a_seed_repeats_a_row_and_torchs_seed_repeats_rows_without_one():
    logits = torch.randn(1, VOCAB).expand(1, -1)

    def draws(row):
        return [sample(logits, [row]).item() for _ in range(20)]

    assert draws(RowState(seed=3)) == draws(RowState(seed=3)) != draws(RowState(seed=4))
    assert draws(RowState(seed=-3)) == draws(RowState(seed=-3)) != draws(RowState(seed=3))
    first, second = draws(RowState()), draws(RowState())
    torch.manual_seed(1234)
    torch.randn(1, VOCAB)
    assert [draws(RowState()), draws(RowState())] == [first, second]
    assert first != second


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_p", 7), ("top_p", -0.1), ("top_p", float("nan")), ("temperature", -1.0), ("temperature", float("nan")), ("top_k", 0)],
)
def test_values_out_of_range_are_named(field, value):
    with pytest.raises(UserError, match=f"`{field}`.*{value}"):
        RowState(**{field: value})


# Stop sequences


def pushed(sequences, elements):
    matcher = StopMatcher(sequences)
    shown = [list(matcher.push([element])) for element in elements]
    return [x for new in shown for x in new], matcher


def test_a_stop_sequence_is_found_after_a_false_start():
    shown, matcher = pushed([[1, 2]], [1, 1, 2, 5])
    assert shown == [1]
    assert matcher.stopped == [1, 2]


def test_what_another_sequence_held_back_is_shown_when_one_stops():
    shown, matcher = pushed([[1, 2, 3, 4], [3, 9]], [1, 2, 3, 9])
    assert shown == [1, 2]
    assert matcher.stopped == [3, 9]


def test_of_sequences_that_end_together_the_longer_one_is_taken_away():
    shown, matcher = pushed([[2], [1, 2]], [7, 1, 2])
    assert shown == [7]
    assert matcher.stopped == [1, 2]


def test_what_is_held_back_at_the_end_is_released():
    shown, matcher = pushed([[1, 2, 3]], [5, 1, 2])
    assert shown == [5]
    assert matcher.flush() == [1, 2]
    assert matcher.stopped is None


def test_a_matcher_agrees_with_a_search_of_the_whole_row():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        numbers = lambda n: torch.randint(3, (n,), generator=generator).tolist()  # noqa: E731
        sequences, elements = [numbers(n) for n in (2, 3, 4)], numbers(12)
        ends = [(end, -len(s)) for s in sequences for end in range(len(s), 13) if elements[end - len(s) : end] == s]
        whole = elements if not ends else elements[: min(ends)[0] + min(ends)[1]]
        for size in (1, 5):  # however the elements come in
            matcher, shown = StopMatcher(sequences), []
            for start in range(0, 12, size):
                shown += matcher.push(elements[start : start + size])
            assert shown + matcher.flush() == whole


# The loop


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("chunk", [None, 3])
def test_greedy_decoding_equals_full_forward_passes(window, chunk):
    fields = {} if window is None else dict(sliding_window_size=window, sliding_window_indices=[1, 0])
    model, prompt = tiny_model(**fields), list(range(1, 12))
    [new] = all_tokens(model, [prompt], [greedy()], 20, chunk=chunk)
    assert new == plain_loop(model, prompt, 20)


@pytest.mark.parametrize("chunk", [None, 4])
def test_rows_of_different_lengths_that_end_at_different_times_are_as_if_alone(chunk):
    model = tiny_model()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    alone = [plain_loop(model, prompt, 15) for prompt in prompts]
    stop = [[alone[0][2]], alone[1][4:6]]
    expected_rows = []
    for row in alone:
        [ended] = all_tokens(model, [prompts[alone.index(row)]], [greedy()], 15, stop=stop)
        expected_rows.append(ended)
        assert ended == row[: len(ended)]
    assert len(set(map(len, expected_rows))) > 2
    assert all_tokens(model, prompts, [greedy() for _ in prompts], 15, chunk=chunk, stop=stop) == expected_rows


def test_a_stop_sequence_is_left_out_or_included():
    model, prompt = tiny_model(), [1, 2, 3]
    whole = plain_loop(model, prompt, 10)
    for n in (1, 2, 3):
        stop = [whole[5 - n : 5]]
        [shown] = all_tokens(model, [prompt], [greedy()], 10, stop=stop)
        [included] = all_tokens(model, [prompt], [greedy()], 10, stop=stop, include_stop=True)
        assert shown == whole[: len(shown)]
        assert included == shown + stop[0]


def test_tokens_held_back_for_a_stop_sequence_are_released_at_the_end():
    model, prompt = tiny_model(), [1, 2, 3]
    whole = plain_loop(model, prompt, 6)
    never = [VOCAB + 1]  # a token that does not exist
    assert all_tokens(model, [prompt], [greedy()], 6, stop=[whole[4:] + never]) == [whole]


def test_a_row_ends_where_its_place_in_the_cache_is_full():
    model = tiny_model()
    shown = [[], []]
    for step in decode(model, [[1, 2, 3], [4]], [greedy(), greedy()], model.new_cache(2, 8), 100):
        for row, new in zip(shown, step, strict=True):
            row += new
    assert shown == [plain_loop(model, [1, 2, 3], 6), plain_loop(model, [4], 8)]


def test_decoding_calls_the_model_once_for_the_prompt_and_once_for_each_further_token():
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    assert len(list(complete(model, [1, 2, 3, 4, 5], greedy(), 7))) == 7
    assert calls == [5] + [1] * 6


def test_compiled_blocks_give_the_same_tokens_from_one_graph_for_all_steps():
    model, prompts = tiny_model(), [[1, 2, 3], list(range(20))]
    expected_tokens = [[t for new in complete(model, prompt, greedy(), 30) for t in new] for prompt in prompts]
    names, graphs = model.state_dict().keys(), []
    compile_blocks(model, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    assert model.state_dict().keys() == names
    assert [[t for new in complete(model, prompt, greedy(), 30) for t in new] for prompt in prompts] == expected_tokens
    assert 1 <= len(graphs) <= model.config.n_layer


def test_the_answer_ends_where_the_context_is_full():
    model = tiny_model()
    assert sum(map(len, complete(model, [1] * 60, greedy(), 50))) == 4
    assert room(60, 50, 64) == 4
    assert room(10, 50, 64) == 50


@pytest.mark.parametrize(("n_prompt", "match"), [(64, "64.*context is 64"), (100, "100.*context is 64"), (0, "no tokens")])
def test_a_prompt_that_leaves_no_room_is_refused(n_prompt, match):
    with pytest.raises(UserError, match=match):
        complete(tiny_model(), [1] * n_prompt, greedy(), 5)
    with pytest.raises(UserError, match="max_new_tokens.*0"):
        complete(tiny_model(), [1], greedy(), 0)


def test_greedy_tokens_are_those_of_transformers(tmp_path):
    folder = make_checkpoint(tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_model(folder, dtype=torch.float32)
    for prompt in ([5, 6, 7], list(range(40, 90))):
        expected_ids = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40, pad_token_id=0, eos_token_id=None)
        assert [token for new in complete(model, prompt, greedy(), 40) for token in new] == expected_ids[0, len(prompt) :].tolist()


# Text


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(make_checkpoint(tmp_path_factory.mktemp("tokenizer") / "model"))


TEXT = "Once upon 你好 a time 🙂🙃 Grüße llama"


def test_a_window_needs_no_more_memory_than_it_looks_at(monkeypatch):
    monkeypatch.setattr(memory, "device_memory_gb", lambda device: 0.01)
    fields = dict(sliding_window_size=8, sliding_window_indices=[1, 1])
    assert new_cache(tiny_model(**fields), 1, 2**20).length == 2**20
    with pytest.raises(UserError, match="1,048,576 tokens"):
        new_cache(tiny_model(), 1, 2**20)
    with pytest.raises(UserError, match="1,048,576 tokens"):
        new_cache(tiny_model(**fields), 2**11, 2**9)


def test_a_full_device_is_said_in_one_sentence(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(GPT, "new_cache", full)
    with pytest.raises(UserError, match="no memory left to remember 32 tokens. Lower `max_new_tokens`"):
        new_cache(tiny_model(), 2, 16)


def test_streamed_text_is_the_decoded_text_and_never_holds_half_a_character(tokenizer):
    pieces = list(stream_text(tokenizer, ([i] for i in tokenizer.ids(TEXT))))
    assert "".join(pieces) == TEXT
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
def test_text_behind_other_tokens_is_what_they_lack_of_the_whole(tmp_path, kind):
    tokenizer = Tokenizer(write(tmp_path, kind))
    ids = tokenizer.ids("Llamas eat grass, 日本 😀 and  hay!")
    starts = [n for n in range(len(ids)) if "\ufffd" not in tokenizer.decode(ids[:n])]
    assert len(starts) > 8
    for n in starts:
        new = "".join(stream_text(tokenizer, ([i] for i in ids[n:]), behind=ids[:n]))
        assert tokenizer.decode(ids[:n]) + new == tokenizer.decode(ids), n


@pytest.mark.parametrize("stop", ["time", "你好", "🙃", "e l", "O", "llama", "no such text"])
def test_text_ends_before_a_stop_string_wherever_tokens_end(tokenizer, stop):
    consumed = []
    tokens = ([consumed.append(i) or i] for i in tokenizer.ids(TEXT))
    assert "".join(stream_text(tokenizer, tokens, ["never", stop])) == TEXT.split(stop)[0]
    rest = tokenizer.decode(consumed)
    assert stop not in TEXT or len(rest) <= TEXT.index(stop) + len(stop) + 8, "nothing is generated behind the stop string"
