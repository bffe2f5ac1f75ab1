import pytest
import torch
from oracle import pair
from speaking import make_tokenizer
from tiny import EVERY_FAMILY, tiny_config

from litgpt.errors import UserError
from litgpt.generate.reading import continuation_ids, embeddings, packs, token_logprobs
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

LENGTHS = [3, 17, 1, 9, 17, 40]


def sequences(vocab_size=96):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]


@EVERY_FAMILY
def test_numbers_of_mixed_lengths_are_those_of_transformers_one_by_one(family):
    ours, theirs = pair(tiny_config(family))
    made = embeddings(ours.eval(), sequences()), embeddings(ours, sequences(), "last", normalized=True)
    found = token_logprobs(ours, sequences(), [1] * len(LENGTHS))
    for i, ids in enumerate(sequences()):
        with torch.no_grad():
            output = theirs(torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[-1][0]
        torch.testing.assert_close(made[0][i], hidden.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made[1][i], hidden[-1] / hidden[-1].norm(), rtol=1e-4, atol=1e-5)
        logprobs = output.logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(found[i]), logprobs, rtol=1e-4, atol=1e-5)


def test_the_tokens_that_are_given_are_not_asked_for():
    model = GPT(tiny_config("llama")).eval()
    every = token_logprobs(model, sequences(), [1] * len(LENGTHS))
    given = [1, 5, 1, 9, 16, 40]
    found = token_logprobs(model, sequences(), given)
    for all_of, few, n in zip(every, found, given, strict=True):
        torch.testing.assert_close(torch.tensor(few), torch.tensor(all_of[n - 1 :]))


def test_one_call_takes_similar_lengths():
    assert list(packs([10, 2000, 30, 3000])) == [[3], [1, 2, 0]]
    assert list(packs([])) == []


@pytest.mark.parametrize(
    ("ids", "said"),
    [([[1], []], "Text 1 has no tokens"), ([[1] * 200], "200 tokens, but the context is 128"), ([[1, 99]], "token id 99.* knows 96")],
)
def test_what_cannot_be_read_is_one_sentence(ids, said):
    model = GPT(tiny_config("llama"))
    for read in (lambda: embeddings(model, ids), lambda: token_logprobs(model, ids, [1] * len(ids))):
        with pytest.raises(UserError, match=said):
            read()
    with pytest.raises(UserError, match="'mean' or 'last', but got 'max'"):
        embeddings(model, [[1]], pooling="max")


@pytest.mark.parametrize("given", ["What food do", "What food do  ", "Wha", "Grüße ", " ", ""])
def test_text_and_continuation_have_the_ids_of_the_whole_and_a_space_between_them_belongs_to_the_next_word(given, tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    first, then = continuation_ids(tokenizer, given, "t llamas eat?")
    assert tokenizer.decode(first + then) == given + "t llamas eat?"
    assert then
    if tokenizer.ids(given.rstrip()) == tokenizer.ids(given + "t llamas eat?")[: len(first)]:
        assert first + then == tokenizer.ids(given + "t llamas eat?")
    assert tokenizer.decode(first) == (given.rstrip() or given)
