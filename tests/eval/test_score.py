"""Log-likelihoods of pairs against one forward pass for each."""

import pytest
import torch
from tiny import tiny_config

from litgpt.errors import UserError
from litgpt.eval import score
from litgpt.eval.score import questions, scores, windows
from litgpt.model import GPT


def ids(n, seed):
    return torch.randint(96, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def model():
    model = GPT(tiny_config("llama")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 1.0, 0.2)
    return model


@pytest.fixture
def pairs():
    shared, other = ids(50, 0), ids(40, 1)
    made = [(shared + ids(n, n), ids(k, 100 + n)) for n in (0, 1, 5, 30) for k in (1, 2, 9)]
    made += [(other, ids(k, 200 + k)) for k in range(1, 12)]
    return made + [([3], ids(60, 9)), (ids(200, 3), ids(20, 4)), (other, []), (other, ids(1, 201))]


@torch.inference_mode()
def alone(model, context, continuation):
    whole = (context + continuation)[-model.config.block_size - 1 :]
    if not continuation:
        return 0.0, True
    logits = model(torch.tensor([whole[:-1]]))[0, -len(continuation) :].double()
    targets = torch.tensor(continuation)
    return logits.log_softmax(-1).gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("sizes", [{}, dict(READ=16, SCORED=5, ROWS=3)], ids=["in few calls", "in many calls"])
def test_pairs_score_as_in_a_pass_of_their_own_whatever_is_read_together(model, pairs, sizes, monkeypatch):
    for name, value in sizes.items():
        monkeypatch.setattr(score, name, value)
    expected = [alone(model, *pair) for pair in pairs]
    for batch_size in (1, 2, 7, 100, None):
        found = scores(model, pairs, batch_size)
        assert [each.logprob for each in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        assert [each.is_greedy for each in found] == [greedy for _, greedy in expected]


def test_greedy_continuations_are_known_as_such(model):
    context, made = ids(10, 0), []
    for _ in range(5):
        made.append(model(torch.tensor([context + made]))[0, -1].argmax().item())
    [right, wrong] = scores(model, [(context, made), (context, [*made[:-1], (made[-1] + 1) % 96])])
    assert (right.is_greedy, wrong.is_greedy) == (True, False)


def test_a_context_is_read_once_for_all_its_continuations_and_their_beginning_once_for_all(model, monkeypatch):
    read, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kwargs: (read.append(idx.numel()), forward(idx, **kwargs))[1])
    beginning = ids(60, 0)
    scores(model, [(beginning + ids(4, i), [answer]) for i in range(5) for answer in range(10)], batch_size=5)
    assert sum(read) == 60 + 5 * 4
    read.clear()
    scores(model, [(beginning + ids(4, i), [answer]) for i in range(5) for answer in range(10)], batch_size=1)
    assert sum(read) == 60 + 5 * 4


def test_progress_counts_every_pair(model, pairs):
    told = []
    scores(model, pairs, 3, told.append)
    assert sum(told) == len([1 for _, continuation in pairs if continuation])


def test_questions_hold_each_pair_once(pairs):
    found = [(question.context, answer, i) for question in questions(pairs, 128) for answer, numbers in question.answers for i in numbers]
    assert sorted(i for _, _, i in found) == [i for i, (_, continuation) in enumerate(pairs) if continuation]
    for context, answer, i in found:
        whole = [*context, *answer]
        assert whole == (pairs[i][0] + pairs[i][1])[-129:]
        assert list(answer) == pairs[i][1]


@pytest.mark.parametrize("n, length, stride", [(1, 8, None), (8, 8, None), (9, 8, None), (30, 8, None), (30, 8, 3), (30, 8, 1), (0, 8, 2)])
def test_windows_ask_for_each_token_once_behind_as_much_as_fits(n, length, stride):
    text, asked = list(range(100, 100 + n)), []
    for context, continuation in windows(text, 7, length, stride):
        before = [7, *text[: len(asked)]]
        assert before[-len(context) :] == context
        assert len(context) + len(continuation) == min(length, len(asked) + len(continuation)) + 1
        assert not asked or len(continuation) <= (stride or length)
        asked += continuation
    assert asked == text


def test_windows_are_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = ids(100, 0)
    for length, stride in ((8, 8), (8, 3), (99, 99), (100, 100), (200, 5)):
        theirs = get_rolling_token_windows(text, 7, length, length - stride + 1)
        assert list(windows(text, 7, length, stride)) == [tuple(map(list, make_disjoint_window(pair))) for pair in theirs]


@pytest.mark.parametrize(
    "pair, said", [(([1], [2] * 129), "has 129 tokens"), (([1, 96], [2]), "token id 96"), (([1], [5, 99]), "token id 99")]
)
def test_what_the_model_cannot_read_is_refused(model, pair, said):
    with pytest.raises(UserError, match=said):
        scores(model, [([1], [2]), pair])
