"""Functions that a model may call."""

import json
import time
from itertools import pairwise
from random import Random

import pytest
import torch
from deploy.serving import serving
from deploy.test_chat_completions import HI, PATH, ask, events, finishes, refused, streamed, text_of
from speaking import make_checkpoint
from templates import PUBLISHED

from litgpt.deploy.answering import Piece, Scored
from litgpt.deploy.protocol import Function
from litgpt.deploy.tools import CallFormat, CallReader, call_format, forcing_grammar, special_tokens, with_tools
from litgpt.errors import UserError
from litgpt.generate import batch
from litgpt.generate.batch import TokenLogprob
from litgpt.generate.grammar import compile_grammar
from litgpt.prompts import ChatTemplate, prompt_styles
from litgpt.tokenizer import Tokenizer

HEAD = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
TAIL = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CALLS = {  # how models write calls, after their own chat templates
    "between words, as Qwen": (
        '{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
        "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}"
    ),
    "bare, as Llama": (
        '{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}{"name": "{{ c.name }}", "parameters": '
        "{{ c.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    ),
    "in a list behind a special token, as Mistral": (
        "{{ m.content }}{% if m.tool_calls %}<|endoftext|>[{% for c in m.tool_calls %}{{ {'name': c.function.name, 'arguments': "
        "c.function.arguments} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}"
    ),
    "with the name before the JSON": (
        "{{ m.content }}{% for c in m.tool_calls or [] %}[CALL]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
    ),
}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Köln", "Bonn"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
FUNCTIONS = [WEATHER, {"name": "clock"}]
TOOLS = [{"type": "function", "function": function} for function in FUNCTIONS]
MODELS = [Function(**function) for function in FUNCTIONS]
MADE = [("weather", {"city": "Köln", "days": 2}), ("clock", {"zone": 'a "quoted" {zone}'})]


def template(kind: str) -> str:
    return HEAD + CALLS[kind] + TAIL


def written(style: ChatTemplate, calls: list[tuple[str, dict]], content: str = "") -> str:
    """How a template writes an answer with calls."""
    made = [{"type": "function", "id": "call00000", "function": {"name": name, "arguments": given}} for name, given in calls]
    prompt, _ = style.render(HI, True)
    whole, _ = style.render([*HI, {"role": "assistant", "content": content, "tool_calls": made}], False)
    return whole.removeprefix(prompt).removesuffix("<|im_end|>\n")


def read(reader: CallReader, text: str, random: Random) -> tuple[str, list]:
    """What a reader makes of a text that comes in random pieces."""
    cuts = sorted({0, len(text), *(random.randrange(len(text) + 1) for _ in range(random.randrange(12)))})
    shown = ""
    for start, end in pairwise(cuts):
        piece = reader.push(Piece(text[start:end], [Scored(i, TokenLogprob(i, 0.0, [])) for i in range(start, end)]))
        assert [scored.start for scored in piece.tokens] == list(range(len(shown), len(shown) + len(piece.text)))
        shown += piece.text
    rest, calls = reader.finish()
    assert calls or [scored.start for scored in rest.tokens] == list(range(len(shown), len(text)))
    return shown + rest.text, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.fixture(params=CALLS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def told(kind) -> ChatTemplate:
    return with_tools(ChatTemplate(template(kind)), MODELS)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("calls", [MADE[:1], MADE], ids=["one", "two"])
@pytest.mark.parametrize("content", ["", "Let me see [1].\n"], ids=["alone", "behind text"])
def test_calls_are_read_as_the_template_writes_them_in_whatever_pieces(kind, told, calls, content, seed):
    if "bare" in kind:
        calls, content = calls[:1], ""
    reader = CallReader(call_format(told), ["weather", "clock"])
    text, found = read(reader, written(told, calls, content), Random(seed))
    assert (text, found) == (content.rstrip(), calls)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "broken",
    [
        lambda text: text.replace("weather", "whether"),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('{"city"', '["city"'),
        lambda text: text.replace("2", "NaN"),
    ],
    ids=["an unknown function", "cut off", "no object", "no JSON"],
)
def test_what_only_looks_like_a_call_stays_text(told, broken, seed):
    reader = CallReader(call_format(told), ["weather", "clock"])
    text = broken(written(told, MADE[:1]))
    assert read(reader, text, Random(seed)) == (text, [])


@pytest.mark.parametrize("text", ["", " ", "hay", "{", "<tool", "a <tool_ b", '{"x": 1}', "[CAL", "[CALL]", "[" * 4000, "<tool_call>" * 9])
def test_other_text_is_passed_on(told, text):
    assert read(CallReader(call_format(told), ["weather"]), text, Random(0)) == (text, [])


def test_text_is_shown_as_soon_as_it_can_be_no_call():
    reader = CallReader(call_format(with_tools(ChatTemplate(template("between words, as Qwen")), MODELS)), ["weather"])
    assert reader.push(Piece("Hay and <too", [])).text == "Hay and"
    assert reader.push(Piece("th>", [])).text == " <tooth>"


@pytest.mark.parametrize("name", ["a", "name", "arguments", "g", "x.y-z_0"])
def test_any_name_of_a_function_is_found(kind, name):
    style = with_tools(ChatTemplate(template(kind)), [Function(name=name)])
    calls = [(name, {"a": "name"})]
    assert read(CallReader(call_format(style), [name]), written(style, calls), Random(0)) == ("", calls)


def test_only_the_first_call_counts_where_one_is_allowed():
    style = with_tools(ChatTemplate(template("between words, as Qwen")), MODELS)
    reader = CallReader(call_format(style), ["weather", "clock"], is_single=True)
    assert read(reader, written(style, MADE), Random(0)) == ("", MADE[:1])


@pytest.mark.skipif(not PUBLISHED, reason="trl, which has published templates, is not installed")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2"])
def test_calls_of_published_templates_are_read(name):
    style = with_tools(ChatTemplate(PUBLISHED[name], {"bos_token": "", "eos_token": "<|im_end|>"}), MODELS)
    text = written(style, MADE[:1]).removesuffix("<|eot_id|>")
    assert read(CallReader(call_format(style), ["weather"]), text.split("</think>")[-1].lstrip(), Random(0)) == ("", MADE[:1])


def test_a_style_without_a_place_for_functions_is_refused():
    for style in (prompt_styles["alpaca"](), ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")):
        with pytest.raises(UserError, match="Ask without `tools`"):
            with_tools(style, MODELS)
    silent = with_tools(ChatTemplate(HEAD + "{{ m.content }}" + TAIL), MODELS)
    with pytest.raises(UserError, match="is not known"):
        call_format(silent)


# Forced by a grammar


def test_a_forced_call_is_written_as_the_template_writes_it(kind, told, tmp_path):
    tokenizer = Tokenizer(make_checkpoint(tmp_path / "tiny"))
    form = call_format(told)
    lark, whole = forcing_grammar(tokenizer, form, MODELS), written(told, MADE[:1])
    grammar = compile_grammar(tokenizer, tokenizer.vocab_size, lark=lark)
    assert accepted(grammar, tokenizer.ids(whole)) == len(tokenizer.ids(whole))
    for wrong in (whole.replace("weather", "whether"), "hay", whole.replace("Köln", "Rom"), whole.replace("2", "12")):
        grammar = compile_grammar(tokenizer, tokenizer.vocab_size, lark=lark)
        assert accepted(grammar, tokenizer.ids(wrong)) < len(tokenizer.ids(wrong))


def accepted(grammar, ids: list[int]) -> int:
    for n, token in enumerate(ids):
        if not grammar.allowed()[token]:
            return n
        grammar.accept(token)
    return len(ids)


# Through the server


@pytest.fixture(scope="module", params=CALLS)
def able(request, tmp_path_factory):
    """A server of a model whose template knows functions."""
    folder = make_checkpoint(tmp_path_factory.mktemp("able") / "tiny", context=1024, template=template(request.param))
    with serving(folder) as server:
        yield server


def calls_of(message: dict) -> list[tuple[str, dict]]:
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in message.get("tool_calls", [])]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}], ids=["any", "named"])
@pytest.mark.parametrize("seed", range(2))
def test_a_model_can_be_made_to_call(able, choice, seed):
    fields = dict(tools=TOOLS[:1], tool_choice=choice, seed=seed, temperature=0.7)
    whole, chunks = ask(able, **fields), streamed(able, **fields)
    [answer] = whole["choices"]
    [(name, arguments)] = calls_of(answer["message"])
    assert name == "weather" and arguments["city"] in ("Köln", "Bonn") and 1 <= arguments["days"] <= 9
    assert answer["message"]["content"] is None
    assert answer["finish_reason"] == finishes(chunks)[0] == "tool_calls"
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"] if "tool_calls" in choice["delta"]]
    assert [calls_of(delta) for delta in deltas] == [[(name, arguments)]]
    assert deltas[0]["tool_calls"][0]["index"] == 0
    assert text_of(chunks) == ""
    assert len(answer["message"]["tool_calls"][0]["id"]) == 9


def test_calls_that_a_model_makes_by_itself_are_told_from_its_text(able, monkeypatch):
    style = with_tools(able.speaker.style, MODELS)
    content, calls = ("", MADE[:1]) if "<tool_call>" not in style.template else ("Let me see.\n", MADE)
    end = able.speaker.tokenizer.token_to_id("<|im_end|>")
    says(monkeypatch, [*able.speaker.tokenizer.ids(written(style, calls, content)), end])
    answer = ask(able, tools=TOOLS, logprobs=True)["choices"][0]
    assert calls_of(answer["message"]) == calls
    assert (answer["message"]["content"] or "") == content.rstrip()
    assert answer["finish_reason"] == "tool_calls"
    chunks = streamed(able, tools=TOOLS)
    assert text_of(chunks) == content.rstrip()
    assert ask(able, tools=TOOLS, tool_choice="none")["choices"][0]["finish_reason"] == "stop"
    assert "tool_calls" not in ask(able)["choices"][0]["message"]


def says(monkeypatch, ids: list[int]) -> None:
    """Let the model say always the same."""
    position = 0

    def next_token(logits, rows):
        nonlocal position
        position += 1
        return torch.tensor([ids[(position - 1) % len(ids)]] * len(rows))

    monkeypatch.setattr(batch, "sample", next_token)


def test_a_text_answer_with_tools_is_the_same_whole_and_streamed(able):
    whole, chunks = (call(able, tools=TOOLS, seed=3, max_tokens=20, logprobs=True) for call in (ask, streamed))
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    told = [entry for chunk in chunks for choice in chunk["choices"] for entry in (choice["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in told] == [entry["token"] for entry in whole["choices"][0]["logprobs"]["content"]]


def test_calls_and_results_go_back_to_the_model(able):
    message = ask(able, tools=TOOLS[:1], tool_choice="required", seed=1)["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    prompt = able.post("/tokenize", {"messages": [*HI, message, result]}).json()["tokens"]
    text = able.speaker.tokenizer.decode(prompt)
    assert "sunny" in text and "weather" in text
    assert ask(able, [*HI, message, result], tools=TOOLS, max_tokens=3)["choices"]


WRONG = {
    "a function that is not there": ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
    "two of one name": ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
    "a format beside them": ({"tools": TOOLS, "response_format": {"type": "json_object"}}, "response_format"),
    "a bad name": ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    "another kind": ({"tools": [{"type": "code_interpreter"}]}, "tools.0.type"),
    "many": ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
    "a large schema": ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": "b" * 70000}}}]}, "tools"),
    "a wrong schema": (
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}], "tool_choice": "required"},
        None,
    ),
}


@pytest.mark.parametrize("fields, param", WRONG.values(), ids=WRONG)
def test_tools_that_cannot_be_are_refused_by_name(able, fields, param):
    found = refused(able, fields)["param"]
    assert found == param or (param == "tools.0.type" and found.startswith("tools.0"))


def test_tools_are_refused_where_the_template_does_not_know_them(server):
    assert "chat template" in refused(server, {"tools": TOOLS})["message"]
    assert ask(server, tools=TOOLS, tool_choice="none", max_tokens=2)
    assert events(server.post(PATH, {"messages": HI, "stream": True, "tools": [], "max_tokens": 2}).text)


def test_special_tokens_within_calls_are_refused(tmp_path):
    calls = "{% for c in m.tool_calls or [] %}[C]{{ c.function.name }}<|endoftext|>{{ c.function.arguments | tojson }}{% endfor %}"
    style = with_tools(ChatTemplate(HEAD + calls + "{{ m.content }}" + TAIL), MODELS)
    with pytest.raises(UserError, match="is not known"):
        special_tokens(Tokenizer(make_checkpoint(tmp_path / "tiny")), call_format(style))


BARE = CallFormat('{"name": "', '", "parameters": ', "}")
TAGGED = CallFormat('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")


@pytest.mark.parametrize("form, text", [(BARE, '{"name": "clock", "parameters": {}};'), (TAGGED, "<tool_call>")], ids=["bare", "tagged"])
def test_white_space_without_end_takes_no_time_to_read(form, text):
    """A model that is stuck writes nothing else."""
    reader = CallReader(form, ["clock"])
    reader.push(Piece(text + " " * 20_000 + "x", []))
    start = time.monotonic()
    reader.finish()
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_a_call_with_a_number_that_json_does_not_have_is_text(number):
    text = f'{{"name": "clock", "parameters": {{"a": {number}}}}}'
    reader = CallReader(BARE, ["clock"])
    pieces = reader.push(Piece(text, [])), *reader.finish()
    assert (pieces[0].text + pieces[1].text, pieces[2]) == (text, [])
