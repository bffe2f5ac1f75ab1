"""Rows that join and leave a batch are what they are alone."""

from random import Random

import pytest
import torch
from answering import answer_all
from tiny import tiny_config

from litgpt.errors import UserError
from litgpt.generate.batch import Answer, Batch, common_length
from litgpt.generate.decode import complete
from litgpt.generate.memory import fitting_length, new_cache
from litgpt.generate.sampling import RowState
from litgpt.model import GPT

KINDS = {  # what layers remember: everything, a window, latents, a state, and mixtures
    "full": ("llama", {}),
    "sliding": ("mistral", dict(sliding_window_size=7)),
    "mixed windows": ("gemma3_text", {}),
    "soft caps": ("gemma2", {}),
    "latent": ("deepseek_v3", {}),
    "convolution": ("lfm2", {}),
    "delta rule": ("qwen3_next", {}),
    "sinks": ("gpt_oss", {}),
}


def tiny_model(kind):
    model_type, changes = KINDS[kind]
    model = GPT(tiny_config(model_type, **changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_answer(random, beginnings, vocab_size=96):
    prompt = random.choice(beginnings)[: random.randrange(1, 60)] + [random.randrange(vocab_size) for _ in range(random.randrange(5))]
    settings = dict(temperature=random.choice([0.0, 0.7, 1.0]), top_k=random.choice([None, 5]), top_p=random.choice([1.0, 0.8]))
    settings |= dict(min_p=random.choice([0.0, 0.05]), frequency_penalty=random.choice([0.0, 0.5]), seed=random.randrange(1000))
    stop = [[random.randrange(vocab_size)], [random.randrange(vocab_size), random.randrange(vocab_size)]]
    return prompt, settings, random.randrange(1, 12), stop


def alone(model, prompt, settings, n, stop):
    return [token for new in complete(model, prompt, RowState(**settings), n, stop) for token in new]


def check_memory(batch):
    """What must hold between any two steps."""
    places = [answer.place for answer in batch.running]
    assert len(set(places)) == len(places)
    assert batch.free.isdisjoint(places) and batch.free | set(places) == set(range(len(batch.cache.lengths)))
    assert batch.kept.keys() <= batch.free
    for place, (_, tokens) in batch.kept.items():
        assert batch.cache.lengths[place] == len(tokens)
    for answer in batch.running:
        assert batch.cache.lengths[answer.place] - answer.n_before <= len(answer.prompt) + len(answer.made)
        assert answer.finish is None


def check_contents(batch):
    """What rows remember is what the model makes of their tokens."""
    rows = [(place, tokens) for place, (_, tokens) in batch.kept.items() if tokens]
    rows += [(answer.place, known) for answer in batch.running if (known := answer.known(batch.cache.lengths[answer.place]))]
    for place, tokens in rows:
        fresh = batch.model.new_cache(1, batch.cache.length, chunk=batch.cache.chunk, rewind=batch.cache.rewind)
        for start in range(0, len(tokens), batch.cache.chunk):
            with torch.inference_mode():
                batch.model(torch.tensor([tokens[start : start + batch.cache.chunk]]), cache=fresh)
        follows = torch.tensor([[7]])
        logits = batch.model(follows, cache=fresh, select="last")
        length, floor = batch.cache.lengths[place], batch.cache.floors[place]
        snapshot = batch.cache.snapshot(place)
        found = batch.model(follows, cache=batch.cache.span([1], [place]), select="last")
        batch.cache.restore(place, snapshot)
        assert (batch.cache.lengths[place], batch.cache.floors[place]) == (length, floor)
        torch.testing.assert_close(found, logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("kind", KINDS)
def test_random_workloads_give_the_tokens_of_each_answer_alone(kind, seed):
    random, model = Random(seed), tiny_model(kind)
    chunk = random.choice([3, 8, 20])
    rewind = chunk if all(mixer in ("attention", "latent") for mixer in model.config.mixers) else 0
    cache = new_cache(model, random.choice([1, 2, 5]), 80, rewind=rewind, chunk=chunk)
    batch = Batch(model, cache, max_tokens=max(chunk, 5), keeps_prefixes=True)
    beginnings = [[random.randrange(96) for _ in range(60)] for _ in range(2)]
    waiting = [random_answer(random, beginnings) for _ in range(7)]
    expected, shown, cancelled = {}, {}, set()
    with torch.inference_mode():
        while waiting or batch.running:
            while waiting and batch.n_free and random.random() < 0.7:
                prompt, settings, n, stop = waiting.pop()
                answer = Answer(prompt, RowState(**settings), n, stop)
                expected[answer], shown[answer] = alone(model, prompt, settings, n, stop), []
                batch.join(answer)
            if batch.running and random.random() < 0.01:
                gone = random.choice(batch.running)
                batch.leave(gone)
                cancelled.add(gone)
            check_memory(batch)
            for answer, new in batch.step():
                shown[answer] += new
            check_memory(batch)
        check_contents(batch)
    assert len(cancelled) < len(expected) == 7
    for answer, tokens in expected.items():
        if answer in cancelled:
            assert shown[answer] == tokens[: len(shown[answer])]
        else:
            assert shown[answer] == tokens == answer.made[: answer.n_shown]
            assert answer.finish in ("stop", "length")


def test_a_prompt_that_begins_like_an_earlier_one_feeds_only_the_rest():
    model, calls = tiny_model("full"), []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[0].numel()))
    batch = Batch(model, new_cache(model, 2, 80), max_tokens=80, keeps_prefixes=True)
    prompt = [i % 96 for i in range(50)]
    first, second = Answer(prompt, RowState(0.0), 1), Answer([*prompt, 1, 2], RowState(0.0), 1)
    for answer in (first, second):
        batch.join(answer)
        batch.step()
    assert (first.n_reused, second.n_reused) == (0, 50)
    assert calls == [50, 2]


def test_a_running_rows_prompt_is_reused_and_an_exact_repetition_feeds_one_token():
    model = tiny_model("latent")
    batch = Batch(model, new_cache(model, 3, 80), max_tokens=80, keeps_prefixes=True)
    prompt = [(7 * i) % 96 for i in range(50)]
    answers = [Answer(prompt, RowState(0.0), 5) for _ in range(3)]
    batch.join(answers[0])
    batch.step()
    for answer in answers[1:]:
        batch.join(answer)
    while batch.running:
        batch.step()
    assert [answer.n_reused for answer in answers] == [0, 49, 49]
    assert answers[0].made == answers[1].made == answers[2].made


def test_what_an_adapter_computed_is_not_reused_for_another():
    model = tiny_model("full")
    batch = Batch(model, new_cache(model, 2, 80), max_tokens=80, keeps_prefixes=True)
    prompt = [i % 96 for i in range(50)]
    for slot, reused in ((1, 0), (0, 0), (1, 49), (0, 49)):
        answer = Answer(prompt, RowState(0.0), 1, slot=slot)
        batch.join(answer)
        batch.step()
        assert answer.n_reused == reused
    batch.forget(1)
    answer = Answer(prompt, RowState(0.0), 1, slot=1)
    batch.join(answer)
    assert answer.n_reused == 0


def test_idle_rows_far_from_each_other_are_moved_together():
    model, widths = tiny_model("full"), []
    model.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[0]))
    batch = Batch(model, new_cache(model, 10, 40), max_tokens=40, keeps_prefixes=True)
    answers = [Answer([i + 1, i + 2], RowState(0.0), 30) for i in range(10)]
    for answer in answers:
        batch.join(answer)
    batch.step()
    for answer in answers[1:9]:
        batch.leave(answer)
    expected = [alone(model, [i + 1, i + 2], dict(temperature=0.0), 30, []) for i in (0, 9)]
    while batch.running:
        batch.step()
        check_memory(batch)
    check_contents(batch)
    assert [answers[0].made, answers[9].made] == expected
    assert max(widths[-5:]) <= 4


@pytest.mark.parametrize("kind", ["full", "sliding", "latent", "delta rule"])
def test_log_probabilities_are_those_of_a_full_forward_pass(kind):
    model, prompt = tiny_model(kind), [3, 1, 4, 1, 5, 9, 2, 6]
    other = Answer([5, 6, 7], RowState(), 9)
    answer = Answer(prompt, RowState(0.5, presence_penalty=1.0, seed=1), 4, n_logprobs=3, scores_prompt=True)
    list(answer_all(model, [other, answer], rows=2, length=40, max_tokens=3))
    whole = prompt + answer.made
    logs = model(torch.tensor([whole]))[0].double().log_softmax(-1)
    assert answer.prompt_logprobs[0] is None and len(answer.prompt_logprobs) == len(prompt) and len(answer.logprobs) == 4
    for i, found in enumerate([*answer.prompt_logprobs, *answer.logprobs][1:]):
        assert found.token == whole[i + 1]
        assert found.logprob == pytest.approx(logs[i, whole[i + 1]].item(), abs=1e-4)
        assert [token for token, _ in found.top] == logs[i].topk(3).indices.tolist()
        assert [logprob for _, logprob in found.top] == pytest.approx(logs[i].topk(3).values.tolist(), abs=1e-4)


def test_an_answer_of_no_tokens_only_scores_its_prompt():
    model = tiny_model("full")
    answer = Answer([1, 2, 3], RowState(), 0, scores_prompt=True)
    assert list(answer_all(model, [answer], rows=1, length=10)) == [answer]
    assert (answer.made, answer.finish, len(answer.prompt_logprobs)) == ([], "length", 3)


def test_a_token_that_the_model_does_not_know_is_refused():
    model = tiny_model("full")
    for prompt in ([1, 96], [-1]):
        with pytest.raises(UserError, match=f"token id {prompt[-1]}, but the model knows 96"):
            list(answer_all(model, [Answer(prompt, RowState(), 3)], rows=1, length=10))


def test_common_length():
    random = Random(0)
    for _ in range(300):
        first, second = ([random.randrange(2) for _ in range(random.randrange(9))] for _ in range(2))
        expected = next((i for i, (a, b) in enumerate(zip(first, second)) if a != b), min(len(first), len(second)))
        assert common_length(first, second) == expected


def test_the_length_that_fits_shrinks_with_the_memory(monkeypatch):
    from litgpt.generate import memory

    model = tiny_model("full")
    assert fitting_length(model, 4, 2**20) == 2**20
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, groups, features, bytes
    taken = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(memory, "device_memory_gb", lambda device: (taken + 4 * 2**15 * per_token / 0.6) / 1e9)
    assert fitting_length(model, 4, 2**20) == 2**14
