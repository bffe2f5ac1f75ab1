"""Conversations from files: in all usual forms, with tools, and as transformers writes them."""

import json
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser
from speaking import TOOLS, calling, result, said, system
from templates import PUBLISHED, tokenizer_with
from transformers import PreTrainedTokenizerFast

from litgpt.data import DataModule
from litgpt.data.base import SFTDataset
from litgpt.data.chat import Chat
from litgpt.data.records import messages_of, tools_of
from litgpt.errors import MissingFile, UserError
from litgpt.prompts import ChatTemplate, encode_prompt, prompt_styles
from litgpt.tokenizer import Tokenizer, named_tokens

WITH_TOOLS = [name for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2", "lfm2_v2") if name in PUBLISHED]
MARKED = [f"{name}_training" for name in ("qwen2_5", "qwen3", "llama3", "phi3", "gemma") if f"{name}_training" in PUBLISHED]
CALLING = said(
    system("Be brief."),
    "Weather in Köln?",
    calling("", ("weather", {"city": "Köln", "days": 2})),
    result('{"sky": "clear"}'),
    {"role": "assistant", "content": "It is clear."},
    None,
    "And the time?",
)
TURNS = said(system("Be brief."), "Hi", "Hello!", "Who are you?", "A llama.")
PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
QUESTION, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer with a special token for every piece of markup in the templates."""
    return tokenizer_with(tmp_path_factory.mktemp("markup"), (PUBLISHED[name] for name in {*WITH_TOOLS, *MARKED}))


@pytest.fixture(scope="module")
def ours(folder) -> Tokenizer:
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def style_of(name: str, folder: Path) -> ChatTemplate:
    return ChatTemplate(PUBLISHED[name], named_tokens(folder))


def module(path: Path, tokenizer: Tokenizer, style, **options) -> Chat:
    data = Chat(path, prompt_style=style, val_split_fraction=0, **options)
    data.connect(tokenizer)
    data.prepare_data()
    data.setup()
    return data


def jsonl(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# As transformers writes them


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_calls_their_results_and_tools_have_the_ids_of_transformers(tmp_path, folder, ours, theirs, name):
    messages = [*CALLING, {"role": "assistant", "content": "Noon."}]
    data = module(jsonl(tmp_path / "a.jsonl", {"messages": messages, "tools": TOOLS}), ours, style_of(name, folder))
    template = dict(tools=TOOLS, chat_template=PUBLISHED[name], return_dict=False)
    last = data.train_dataset[-1]["input_ids"].tolist()
    assert last == theirs.apply_chat_template(messages, **template)
    prompt = theirs.apply_chat_template(CALLING, add_generation_prompt=True, **template)
    assert encode_prompt(data.train_dataset.style_of(0), ours, data.train_dataset.example(0)[0]) == prompt
    assert last[: len(prompt)] == prompt
    learned = [ours.decode(sample["input_ids"][sample["labels"] != -100]) for sample in data.train_dataset]
    assert all(text in "".join(learned) for text in ("Köln", "It is clear.", "Noon."))
    assert not any(text in "".join(learned) for text in ("sky", "Weather in", "Be brief"))


@pytest.mark.parametrize("name", MARKED)
def test_what_a_template_marks_is_trained_on_as_in_transformers(tmp_path, folder, ours, theirs, name):
    messages = TURNS[1:] if name == "gemma_training" else TURNS
    data = module(jsonl(tmp_path / "a.jsonl", {"messages": messages}), ours, style_of(name, folder))
    how = dict(chat_template=PUBLISHED[name], return_dict=True, return_assistant_tokens_mask=True)
    expected = theirs.apply_chat_template(messages, **how)
    sample = data.train_dataset[-1]
    assert sample["input_ids"].tolist() == expected["input_ids"]
    trained = (sample["labels"] != -100).tolist()
    beyond = {i for i, (one, other) in enumerate(zip(trained, expected["assistant_masks"])) if one != other}
    served = set(range(len(encode_prompt(style_of(name, folder), ours, messages[:-1]))))
    if len(data.train_dataset) == 1:
        served = set()
    for i in beyond - served:  # the line break behind the token that ends an answer, before which a model stops, and what is served
        assert not trained[i] and not ours.decode(expected["input_ids"][i : i + 1]).strip(), i


def test_arguments_are_given_as_a_template_reads_them(tmp_path, folder, ours, theirs):
    """Qwen's wants a mapping, from which a text of JSON would come out quoted twice, and DeepSeek's wants the text."""
    text = calling("", ("weather", '{"city": "Köln"}'))
    mapping = calling("", ("weather", {"city": "Köln"}))
    for name, wanted in (("qwen2_5", mapping), ("deepseekv3", text)):
        expected = theirs.apply_chat_template([QUESTION, wanted], chat_template=PUBLISHED[name], tokenize=False)
        for call in (text, mapping):
            dataset = SFTDataset([{"messages": [QUESTION, call]}], ours, style_of(name, folder))
            assert dataset.style_of(0).render(dataset.messages(0), False)[0] == expected, name


def test_texts_are_given_in_parts_where_a_template_reads_only_those(ours, folder, theirs):
    style, dataset = style_of("smolvlm", folder), SFTDataset([{"messages": TURNS}], ours, style_of("smolvlm", folder))
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in TURNS]
    assert style.render(dataset.messages(0), False)[0] == theirs.apply_chat_template(
        parts, chat_template=PUBLISHED["smolvlm"], tokenize=False
    )
    assert "A llama." in ours.decode(dataset[0]["input_ids"])


# How they may be written


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TURNS},
        {"messages": TURNS[1:], "system": "Be brief."},
        {"messages": [message | {"content": [{"type": "text", "text": message["content"]}]} for message in TURNS]},
        {"messages": json.dumps(TURNS), "tools": "[]"},
        {"messages": [TURNS[0] | {"role": "developer"}, *TURNS[1:]], "tools": None},
        {"conversations": TURNS},
        {"conversations": [{"from": message["role"], "value": message["content"]} for message in TURNS]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]} for message in TURNS[1:]
            ],
            "system": "Be brief.",
            "messages": None,
        },
    ],
)
def test_conversations_have_many_forms(record):
    assert messages_of(record) == TURNS and tools_of(record) == []


def test_sharegpts_calls_are_calls(ours, folder):
    style, tool = style_of("qwen2_5", folder), TOOLS[0]
    openai = {"messages": said("Weather?", calling(None, ("weather", {"city": "Köln"})), result("clear"), None) + [ANSWER], "tools": [tool]}
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Köln"}}'},
        {"from": "observation", "value": "clear"},
        {"from": "gpt", "value": "b"},
    ]
    sharegpt = {"conversations": turns, "tools": json.dumps([tool["function"]])}
    listed = [*turns[:1], turns[1] | {"value": f"[{turns[1]['value']}]"}, *turns[2:]]
    datasets = [SFTDataset([record], ours, style) for record in (openai, sharegpt, sharegpt | {"conversations": listed})]
    assert len({tuple(sample["labels"].tolist()) for dataset in datasets for sample in dataset}) == 1
    assert len({tuple(sample["input_ids"].tolist()) for dataset in datasets for sample in dataset}) == 1


def test_keys_may_have_other_names(tmp_path, tokenizer):
    turns = [{"who": "system", "says": "S"}, {"who": "bot", "says": "Hi"}, {"who": "human", "says": "a"}, {"who": "model", "says": "b"}]
    options = dict(messages_key="dialogue", role_key="who", content_key="says")
    data = module(jsonl(tmp_path / "a.jsonl", {"dialogue": turns}), tokenizer, ChatTemplate(PLAIN), **options)
    assert data.train_dataset.example(0) == (
        [{"role": "system", "content": "S"}, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "a"}],
        "b",
    )
    with pytest.raises(UserError, match="a.jsonl, line 1: `says` of message 2 in `dialogue` must be text, but is 3"):
        module(jsonl(tmp_path / "a.jsonl", {"dialogue": [turns[2], turns[3] | {"says": 3}]}), tokenizer, "chatml", **options)
    with pytest.raises(UserError, match="line 1: It has no `dialog`, but `dialogue`. Did you mean 'dialogue'?"):
        module(jsonl(tmp_path / "a.jsonl", {"dialogue": turns}), tokenizer, "chatml", messages_key="dialog")


def test_an_answer_that_is_a_call_has_no_text(ours, folder):
    dataset = SFTDataset([{"messages": [QUESTION, calling(None, ("weather", {}))], "tools": TOOLS}], ours, style_of("qwen2_5", folder))
    assert dataset.example(0) == ([QUESTION], "") and dataset.n_targets[0] > 5


# What cannot be


@pytest.mark.parametrize("name", prompt_styles)
def test_a_style_that_cannot_tell_of_tools_or_write_calls_names_the_record(tmp_path, tokenizer, name):
    calls = [QUESTION, calling("", ("weather", {}))]
    for record, message in (
        ({"messages": [QUESTION, ANSWER], "tools": TOOLS}, "cannot tell the model of `tools`. Use a checkpoint whose chat template can"),
        ({"messages": calls}, "Message 1 calls a function, which .* cannot write"),
        ({"messages": [QUESTION, {"role": "tool", "content": "x"}, ANSWER]}, "the role 'tool', but there are system, user, assistant"),
    ):
        path = jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER]}, record)
        with pytest.raises(UserError, match=f"^{path}, line 2: .*{message}"):
            module(path, tokenizer, name)


def test_what_a_template_would_leave_out_is_refused(tokenizer):
    silent = PLAIN.replace("[{{ m.role }}]", "{% if m.role in ('user', 'assistant') %}[{{ m.role }}]").replace("</s>", "</s>{% endif %}", 1)
    calls, answer = [QUESTION, calling("", ("weather", {}))], {"role": "tool", "content": "x"}
    for template, messages, tools, message in (
        (PLAIN, [QUESTION, ANSWER], TOOLS, "does not tell the model of `tools`"),
        (PLAIN, calls, [], "does not write calls of functions"),
        (silent, [QUESTION, answer, ANSWER], [], "Message 1 is from 'tool', which the chat template leaves out"),
        (silent, [system("S"), QUESTION, ANSWER], [], "Message 0 is from 'system', which the chat template leaves out"),
        (
            PLAIN,
            [QUESTION, {"role": "asistant", "content": "x"}, ANSWER],
            [],
            "Message 1 has the role 'asistant', but .*Did you mean",
        ),
    ):
        with pytest.raises(UserError, match=f"Sample 0, .*{message}"):
            SFTDataset([{"messages": messages, "tools": tools}], tokenizer, ChatTemplate(template))


def test_a_role_that_only_the_template_knows_is_written(tokenizer):
    template = "{% if false %}critic{% endif %}" + PLAIN
    messages = [QUESTION, {"role": "critic", "content": "x"}, ANSWER]
    assert "[critic]" in tokenizer.decode(SFTDataset([{"messages": messages}], tokenizer, ChatTemplate(template))[0]["input_ids"])


@pytest.mark.parametrize(
    "record, message",
    [
        ({"instruction": "x", "output": "y"}, "It has no `messages` or `conversations`, but `instruction`, `output`"),
        ({}, "It has no `messages` or `conversations`, but no keys"),
        ("text", "A conversation must be a mapping with the key `messages`, but this is 'text'"),
        ({"messages": [QUESTION]}, "no message of the role `assistant`"),
        (
            {"messages": [QUESTION, {"role": "assistant", "content": None}]},
            "`content` of message 2 in `messages` must be text, but is None",
        ),
        ({"messages": [QUESTION, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "a part that is not text"),
        (
            {"messages": [QUESTION, ANSWER | {"tool_calls": [{"name": "f"}]}]},
            "A call of message 2 in `messages` must be a mapping with `fun",
        ),
        ({"messages": [QUESTION, calling("", ("f", "not JSON"))]}, "`arguments` of 'f' in message 2 in `messages` must be a mapping"),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, "The call of message 1 in `conversations` must be JSON"),
        ({"messages": [QUESTION, ANSWER], "tools": {"weather": 1}}, "`tools` must be a list of functions"),
        ({"messages": [QUESTION, ANSWER], "tools": [{"description": "x"}]}, "Function 1 in `tools` must be a mapping with the key `name`"),
        ({"messages": [QUESTION, ANSWER], "tools": "weather"}, "`tools` must be a list of functions, but is 'weather'"),
    ],
)
def test_a_bad_conversation_is_described_with_its_place(tmp_path, ours, folder, record, message):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER]}, record)
    with pytest.raises(UserError) as caught:
        module(path, ours, style_of("qwen2_5", folder))
    assert str(caught.value).startswith(f"{path}, line 2: ") and message in str(caught.value)


def test_an_answer_that_is_not_to_be_trained_on_is_not_trained_on_in_silence(tmp_path, ours, folder):
    path = jsonl(tmp_path / "a.jsonl", {"messages": [QUESTION, ANSWER | {"weight": 0}, QUESTION, ANSWER | {"weight": 1}]})
    with pytest.raises(UserError, match="line 1: An answer has the `weight` 0, but every answer is trained on"):
        module(path, ours, style_of("qwen2_5", folder))
    assert module(path, ours, style_of("qwen2_5", folder), train_on="last").train_dataset.n_targets


def test_files_are_those_of_json(tmp_path, tokenizer):
    with pytest.raises(MissingFile, match="`path` must name a"):
        Chat(tmp_path / "none.json").prepare_data()
    records = [{"messages": [QUESTION, ANSWER]}] * 4
    jsonl(tmp_path / "train.jsonl", *records)
    (tmp_path / "val.json").write_text(json.dumps(records[:1]))
    data = Chat(tmp_path, prompt_style="chatml")
    data.connect(tokenizer)
    data.prepare_data()
    data.setup()
    assert (len(data.train_dataset), len(data.val_dataset)) == (4, 1)
    with pytest.raises(UserError, match="`val_split_fraction` has no meaning"):
        Chat(tmp_path, val_split_fraction=0.1).prepare_data()


def test_it_is_made_from_flags(tmp_path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=DataModule | None)
    given = ["--data=litgpt.data.chat.Chat", f"--data.path={tmp_path}", "--data.role_key=who", "--data.train_on=last"]
    data = parser.instantiate_classes(parser.parse_args([*given, "--data.truncation=left"])).data
    assert isinstance(data, Chat) and (data.path, data.role_key, data.train_on, data.truncation) == (tmp_path, "who", "last", "left")
    assert data.mask_prompt is None
