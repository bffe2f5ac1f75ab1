"""`LLM.embed` and `LLM.score`, against transformers one text at a time."""

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from speaking import exact_llm, make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.api import LLM
from litgpt.errors import UserError

TEXTS = ["What food do llamas eat?", "Grüße", "a", "Once upon a time there was a llama. " * 5]
MESSAGES = [{"role": "user", "content": "What food?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("reading") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return exact_llm(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


def hidden_and_logprobs(theirs, ids):
    with torch.no_grad():
        output = theirs[0](torch.tensor([ids]), output_hidden_states=True)
    logprobs = output.logits[0].log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:], dtype=torch.long).unsqueeze(1)).squeeze(1)
    return output.hidden_states[-1][0], logprobs


def test_embeddings_are_pooled_hidden_states_of_transformers(llm, theirs):
    means, lasts, units = llm.embed(TEXTS), llm.embed(TEXTS, pooling="last"), llm.embed(TEXTS, normalized=True)
    assert means.shape == (4, 32) and means.dtype == torch.float32
    for i, text in enumerate(TEXTS):
        hidden, _ = hidden_and_logprobs(theirs, theirs[1](text).input_ids)
        torch.testing.assert_close(means[i], hidden.mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(lasts[i], hidden[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(units[i], hidden.mean(0) / hidden.mean(0).norm(), rtol=0, atol=1e-5)
    torch.testing.assert_close(llm.embed(TEXTS[0]), means[:1], rtol=0, atol=1e-6)
    assert llm.embed([]).shape == (0, 32)


def test_a_texts_score_is_the_log_likelihood_of_its_tokens_but_the_first(llm, theirs):
    scores, each = llm.score(TEXTS), llm.score(TEXTS, per_token=True)
    for text, score, summands in zip(TEXTS, scores, each, strict=True):
        _, expected = hidden_and_logprobs(theirs, theirs[1](text).input_ids)
        assert score == pytest.approx(expected.sum().item(), abs=1e-5 * max(len(expected), 1))
        assert summands == pytest.approx(expected.tolist(), abs=1e-5)
    assert scores[2] == 0.0 and each[2] == []


def test_a_continuations_score_counts_its_tokens_alone_and_scores_of_all_first_words_are_a_distribution(llm, theirs):
    pairs = [("What food", " do llamas eat?"), ("What food ", "do llamas eat?"), ("What food do llamas", " eat?")]
    for (given, text), score, each in zip(pairs, llm.score(pairs), llm.score(pairs, per_token=True), strict=True):
        n = len(theirs[1](given.rstrip()).input_ids)
        _, expected = hidden_and_logprobs(theirs, theirs[1](given + text).input_ids)
        assert score == pytest.approx(expected[n - 1 :].sum().item(), abs=1e-4)
        assert len(each) == len(expected) - n + 1
    assert llm.score(pairs)[0] == llm.score(pairs)[1]
    hello = llm.tokenizer.ids("Hello")
    size = llm.config.vocab_size
    with torch.no_grad():
        expected = llm.model(torch.tensor([hello]))[0, -1].log_softmax(-1)
    words = [llm.tokenizer.text(i) for i in range(size)]
    plain = [i for i, word in enumerate(words) if word and word.isalpha() and llm.tokenizer.ids("Hello" + word) == [*hello, i]]
    assert len(plain) > 20
    found = llm.score([("Hello", words[i]) for i in plain])
    assert found == pytest.approx(expected[plain].tolist(), abs=1e-5)
    assert sum(map(math.exp, found)) < 1


def test_what_a_bos_token_foretells_counts(llm, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "with-bos")
    file = tmp_path / "with-bos" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(bos_token="<|endoftext|>", add_bos_token=True)))
    with_bos = LLM.load(tmp_path / "with-bos", distribute=None)
    with_bos.distribute(precision="32-true")
    assert len(with_bos.score(["Hello"], per_token=True)[0]) == len(llm.score(["Hello"], per_token=True)[0]) + 1
    assert with_bos.score(["Hello"]) == pytest.approx(with_bos.score([("", "Hello")]))


def test_the_answer_to_messages_is_scored_in_the_prompt_style(llm, theirs):
    ids = theirs[1].apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    _, expected = hidden_and_logprobs(theirs, ids + theirs[1]("Grass and hay.").input_ids)
    assert llm.score([(MESSAGES, "Grass and hay.")])[0] == pytest.approx(expected[len(ids) - 1 :].sum().item(), abs=1e-4)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda llm: llm.embed(["a", ""]), "Text 1 has no tokens"),
        (lambda llm: llm.embed("a", pooling="max"), "'mean' or 'last'"),
        (lambda llm: llm.embed("llama " * 300), r"Text 0 has \d+ tokens.* 256 tokens"),
        (lambda llm: llm.score(["llama " * 300]), r"Text 0 has \d+ tokens.* 256 tokens"),
        (lambda llm: llm.score(["a", ""]), "Text 1 has no tokens"),
        (lambda llm: llm.score("a text"), "`texts`"),
        (lambda llm: llm.score([("a", "b", "c")]), "`texts`"),
        (lambda llm: llm.score([("a", 1)]), "`texts`"),
        (lambda llm: llm.embed([1]), "`texts`"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(llm, use, said):
    with pytest.raises(UserError, match=said):
        use(llm)


def test_a_model_that_is_not_loaded_says_how_to_load_it(folder):
    llm = LLM.load(folder, distribute=None)
    for use in (lambda: llm.embed("a"), lambda: llm.score(["a"])):
        with pytest.raises(UserError, match=r"\.distribute\(\)"):
            use()


def test_the_example_searches_and_chooses(folder, llm, theirs, capsys):
    spec = importlib.util.spec_from_file_location("embed_and_score", Path(__file__).parents[1] / "examples" / "embed_and_score.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (cosine, text), *_ = example.nearest(llm, TEXTS[3], TEXTS)
    assert text == TEXTS[3] and cosine == pytest.approx(1.0, abs=1e-5)
    prompt, means = theirs[1].apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False), {}
    for answer in ("Grass and hay.", "Mice", "zq xw", "Ü", "llamas"):
        means[answer] = hidden_and_logprobs(theirs, prompt + theirs[1](answer).input_ids)[1][len(prompt) - 1 :].mean().item()
    assert example.choose(llm, MESSAGES[0]["content"], list(means)) == max(means, key=means.get)
    example.main(str(folder))
    assert len(capsys.readouterr().out.splitlines()) == len(example.TEXTS) + 1
