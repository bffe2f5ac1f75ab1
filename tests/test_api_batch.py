"""`LLM.generate` with several prompts, and with every way to limit and to describe an answer."""

import json
import random

import pytest
import torch
from speaking import exact_llm, make_checkpoint
from transformers import AutoModelForCausalLM

from litgpt.api import LLM
from litgpt.errors import UserError
from litgpt.generate.answers import Options

PROMPTS = ["Hello", "What food do llamas eat? " * 4, "Grüße aus Köln, 你好世界", "a", "Once upon a time", "Hello"]
PROMPTS += [[{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]]
SAMPLED = dict(max_new_tokens=24, temperature=1.3, top_k=40)
SEEDS = [3, 1, 4, 1, 5, 9, 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture(scope="module")
def llm(folder):
    return exact_llm(folder)


@pytest.fixture(scope="module")
def alone(llm):
    return [llm.generate(prompt, seed=seed, **SAMPLED) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]


# Several prompts


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("shuffle", [0, 1, 2])
def test_each_prompt_of_a_list_gets_the_answer_that_it_gets_alone(llm, alone, batch_size, shuffle):
    order = random.Random(shuffle).sample(range(len(PROMPTS)), len(PROMPTS))
    answers = llm.generate([PROMPTS[i] for i in order], seed=[SEEDS[i] for i in order], batch_size=batch_size, **SAMPLED)
    assert answers == [alone[i] for i in order]


def test_one_seed_is_that_of_every_prompt(llm, alone):
    answers = llm.generate(PROMPTS, seed=3, **SAMPLED)
    assert answers[0] == answers[5] == alone[0]
    assert answers == [llm.generate(prompt, seed=3, **SAMPLED) for prompt in PROMPTS]
    torch.manual_seed(1)
    first = llm.generate(PROMPTS, **SAMPLED)
    assert first[0] != first[5]
    torch.manual_seed(1)
    assert llm.generate(PROMPTS, **SAMPLED) == first


def test_lists_hold_text_ids_or_details_as_one_answer_does(llm):
    kwargs = dict(max_new_tokens=12, temperature=0.0)
    ids = llm.generate(PROMPTS, return_as_token_ids=True, **kwargs)
    for prompt, found in zip(PROMPTS, ids, strict=True):
        assert torch.equal(found, llm.generate(prompt, return_as_token_ids=True, **kwargs))
    details = llm.generate(PROMPTS, return_details=True, **kwargs)
    assert [each.text for each in details] == llm.generate(PROMPTS, **kwargs)
    assert llm.generate([], **kwargs) == []


def test_a_memory_of_fixed_size_does_not_limit_how_many_prompts_there_are(llm, folder, alone):
    fixed = LLM.load(folder, distribute=None)
    fixed.distribute(precision="32-true", fixed_kv_cache_size=200)
    assert fixed.generate(PROMPTS, seed=SEEDS, **SAMPLED) == alone
    assert fixed.generate(PROMPTS[0], seed=SEEDS[0], **SAMPLED) == alone[0]
    with pytest.raises(UserError, match="`fixed_kv_cache_size` leaves room for 200"):
        fixed.generate(["Hi", "llama " * 120])


def test_prompts_of_a_model_whose_angles_follow_from_the_length_are_answered_as_alone(tmp_path):
    make_checkpoint(tmp_path / "model")
    llm = LLM.load(tmp_path / "model", distribute=None)
    llm.config.rope_adjustments = dict(dynamic=True, factor=4.0)
    llm.config.block_size = 64
    llm.trainer_setup()
    llm.model.config = llm.config
    assert type(llm.model.rope)(llm.config).depends_on_length
    llm.model.rope = type(llm.model.rope)(llm.config)
    prompts = ["Hi", "a", "Hello"]
    kwargs = dict(temperature=0.0, max_new_tokens=30)
    assert llm.generate(prompts, **kwargs) == [llm.generate(prompt, **kwargs) for prompt in prompts]


# Options


def test_a_stop_text_ends_the_answer_before_it_wherever_tokens_divide_it(llm):
    for seed in range(5):
        whole = llm.generate("Hello", seed=seed, **SAMPLED)
        for size in (1, 2, 3, 7):
            stop = whole[8 : 8 + size]
            cut = whole[: whole.index(stop)]
            kwargs = SAMPLED | dict(seed=seed, stop=stop)
            assert llm.generate("Hello", **kwargs) == cut
            assert "".join(llm.generate("Hello", stream=True, **kwargs)) == cut
            assert llm.generate(["Hello", "a"], **kwargs)[0] == cut
            assert llm.generate("Hello", return_details=True, **kwargs).finish == "stop"
        assert llm.generate("Hello", seed=seed, stop=[whole[12:15], whole[5:7]], **SAMPLED) == whole[: whole.index(whole[5:7])]
        assert llm.generate("Hello", seed=seed, stop="@no such text@", **SAMPLED) == whole


def test_logprobs_are_those_of_transformers_whatever_the_sampling(llm, folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kwargs = dict(seed=2, logprobs=3, repetition_penalty=1.5, **SAMPLED)
    found = llm.generate("Hello", **kwargs)
    prompt = llm._reply("Hello", None, Options()).answer.prompt
    assert found.text == llm.tokenizer.decode(found.tokens)
    assert [each.token for each in found.logprobs] == found.tokens
    with torch.no_grad():
        expected = theirs(torch.tensor([prompt + found.tokens])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for each, place in zip(found.logprobs, expected, strict=True):
        assert each.logprob == pytest.approx(place[each.token].item(), abs=1e-4)
        values, tokens = place.topk(3)
        assert [token for token, _ in each.top] == tokens.tolist()
        assert [value for _, value in each.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert llm.generate("Hello", **kwargs | dict(logprobs=0)).logprobs[0].top == []
    assert llm.generate("Hello", return_details=True, **SAMPLED).logprobs == []


def test_an_answer_that_is_cut_says_so(llm):
    assert llm.generate("Hello", max_new_tokens=2, temperature=0.0, return_details=True).finish == "length"
    ids = llm.generate("Hello", max_new_tokens=20, temperature=0.0, return_as_token_ids=True).tolist()
    details = llm.generate("Hello", max_new_tokens=20, temperature=0.0, return_details=True)
    assert details.tokens == ids[: len(details.tokens)]


def test_min_p_1_and_penalties_change_what_is_drawn_as_defined(llm):
    greedy = llm.generate("Hello", max_new_tokens=20, temperature=0.0, return_details=True)
    assert llm.generate("Hello", max_new_tokens=20, min_p=1.0, seed=5) == greedy.text
    penalized = dict(max_new_tokens=20, temperature=0.0, return_details=True)
    for kwargs in (dict(presence_penalty=1000.0), dict(frequency_penalty=1000.0)):
        tokens = llm.generate("Hello", **kwargs, **penalized).tokens
        assert len(tokens) == len(set(tokens))
    assert llm.generate("Hello", repetition_penalty=3.0, **penalized).tokens != greedy.tokens


SCHEMA = {
    "type": "object",
    "properties": {"food": {"enum": ["grass", "hay"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["food", "n"],
    "additionalProperties": False,
}


def test_an_answer_with_a_schema_is_json_that_obeys_it_and_leaves_its_neighbours_alone(llm):
    kwargs = dict(max_new_tokens=100, temperature=1.5, seed=SEEDS[0])
    for text in [llm.generate("Hello", schema=SCHEMA, **kwargs), *llm.generate(["Hi", "a", "b"], schema=SCHEMA, **kwargs)]:
        found = json.loads(text)
        assert found.keys() == {"food", "n"} and found["food"] in ("grass", "hay") and 0 <= found["n"] <= 99
    assert "".join(llm.generate("Hello", schema=SCHEMA, stream=True, **kwargs)) == llm.generate("Hello", schema=SCHEMA, **kwargs)
    assert llm.generate("Hello", schema=SCHEMA, return_details=True, **kwargs).finish == "stop"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(schema={"type": "llama"}), "JSON schema"),
        (dict(min_p=2.0), "`min_p`.*2.0"),
        (dict(repetition_penalty=0.0), "`repetition_penalty`.*0.0"),
        (dict(repetition_penalty=1e-300), "`repetition_penalty`.*1e-300"),
        (dict(presence_penalty=1e300), r"`presence_penalty` is a number, from -1,000,000 to 1,000,000, but got 1e\+300"),
        (dict(frequency_penalty=10**400), "`frequency_penalty` is a number"),
        (dict(temperature=10**400), "`temperature` must be 0 or more, up to 1,000,000"),
        (dict(logprobs=-1), "`logprobs`.*-1"),
        (dict(stop=["a", ""]), "`stop` has an empty text"),
        (dict(stop=["a", 1]), "`stop` is a text or a list of texts, but has 1"),
        (dict(prompt=[{"role": "user", "content": None}]), "Message 0 needs a text as its `content`, but has None"),
        (dict(stop=3), "`stop` is a text or a list of texts, but is a number"),
        (dict(prompt=None), "`prompt` is a text, .* but got null"),
        (dict(prompt={"role": "user", "content": "a"}), "`prompt` is a text, .* but got a mapping"),
        (dict(prompt=torch.tensor([1, 2])), "`prompt` is a text, .* type Tensor"),
        (dict(sys_prompt=3), "`sys_prompt` must be text, but is a number"),
        (dict(max_new_tokens=2.5), "`max_new_tokens` must be a whole number, but is 2.5"),
        (dict(temperature="hot"), "`temperature` must be a number, but is text"),
        (dict(top_p=None), "`top_p` must be a number, but is null"),
        (dict(top_k=True), "`top_k` must be a whole number, but is True"),
        (dict(seed=1.5), "`seed` must be a whole number, but is 1.5"),
        (dict(logprobs=True), "`logprobs` must be a whole number, but is True"),
        (dict(seed=[1, 2]), "`seed` lists 2 seeds for 1 prompts"),
        (dict(batch_size=0), "`batch_size`.*0"),
        (dict(stream=True, logprobs=1), "`stream`.*`logprobs`"),
        (dict(stream=True, return_details=True), "`stream`.*`return_details`"),
        (dict(prompt=["a", "b"], stream=True), "`stream`.*list of prompts"),
        (dict(prompt=["a", {"role": "user", "content": "b"}]), "A prompt is a text or a list"),
        (dict(prompt=["a", "llama " * 300]), r"has \d+ tokens.* 256 tokens"),
    ],
    ids=str,
)
def test_bad_arguments_are_one_sentence(llm, arguments, said):
    with pytest.raises(UserError, match=said):
        llm.generate(**dict(prompt="Hello") | arguments)


def test_a_benchmark_is_of_one_answer(llm):
    stop = llm.generate("Hello", max_new_tokens=9, seed=1, min_p=0.1)[4:6]
    text, results = llm.benchmark(prompt="Hello", max_new_tokens=9, seed=1, stop=stop, min_p=0.1)
    assert text == llm.generate("Hello", max_new_tokens=9, seed=1, stop=stop, min_p=0.1)
    with pytest.raises(UserError, match="got a list of them"):
        llm.benchmark(prompt=["Hello", "Hi"])
    made, _ = llm.benchmark(prompt="Hello", max_new_tokens=9, seed=1, return_details=True, batch_size=2)
    assert made == llm.generate("Hello", max_new_tokens=9, seed=1, return_details=True)
    assert list(results) == ["Seconds total", "Seconds to first token", "Tokens generated", "Inference speed in tokens/sec"]
