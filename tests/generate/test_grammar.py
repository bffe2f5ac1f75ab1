"""Answers that keep to a grammar, drawn at random: another implementation of JSON Schema, and Python's own `re`, are the judges."""

import json
import re
from random import Random
from time import monotonic

import jsonschema_rs
import pytest
import torch
from answering import answer_all
from generate.hostile import attempt
from tiny import tiny_config
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import normalizers
from vocabularies import KINDS, write

from litgpt.errors import UserError
from litgpt.generate import grammar as grammars
from litgpt.generate.batch import Answer, Batch
from litgpt.generate.grammar import compile_grammar, schema_text
from litgpt.generate.memory import new_cache
from litgpt.generate.sampling import RowState
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer

VOCAB_SIZE = 800  # more than any of the tokenizers has, as padded vocabularies have


def an_object(properties, **more):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False} | more


def nested(depth):
    return {"type": "boolean"} if depth == 0 else an_object({"a": nested(depth - 1), "b": {"type": "array", "maxItems": 0}})


TREE = an_object({"value": {"type": "boolean"}, "more": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}})
BOUNDED = {  # schemas whose answers cannot go on for ever, whatever is drawn
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "nullable": {"type": ["integer", "null"], "minimum": -9, "maximum": 99},
    "integers of a range": {"type": "integer", "minimum": -120, "maximum": 4711},
    "integers beyond a bound": {"type": "integer", "exclusiveMinimum": 7, "exclusiveMaximum": 12},
    "multiples": {"type": "integer", "minimum": 0, "maximum": 10000, "multipleOf": 7},
    "one number": {"const": -1.5},
    "enum of texts": {"enum": ["red", "green", 'bl"ue\n', "größe", "😀", "日本語", ""]},
    "enum of anything": {"enum": [None, True, 3, 2.5, "x", [1, [2]], {"a": {"b": None}}]},
    "const object": {"const": {"b": [1, {"ü": "</s> <s> "}], "a": '\\ " \u2028 e\u0301'}},
    "short texts": {"type": "string", "maxLength": 5},
    "texts of one length": {"type": "string", "minLength": 3, "maxLength": 3},
    "no text": {"type": "string", "maxLength": 0},
    "pattern": {"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{3}$"},
    "pattern of words": {"type": "string", "pattern": "^(über|naïve|日本){1,3}$"},
    "pattern and length": {"type": "string", "pattern": "^a+b*$", "maxLength": 6},
    "date": {"type": "string", "format": "date"},
    "time": {"type": "string", "format": "time", "maxLength": 12},
    "an email address": {"type": "string", "format": "email", "maxLength": 20},
    "uuid": {"type": "string", "format": "uuid"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "ipv6": {"type": "string", "format": "ipv6"},
    "pairs": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    "few items": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 1, "maxItems": 4},
    "no items": {"type": "array", "maxItems": 0},
    "a tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "lists of lists": {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 2}, "maxItems": 2},
    "an empty object": {"type": "object", "additionalProperties": False},
    "an object": an_object({"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}),
    "optional keys": an_object({"a": {"type": "boolean"}, "b": {"type": "null"}, "c": {"const": 1}}, required=["b"]),
    "no key is required": an_object({"a": {"type": "boolean"}, "b": {"type": "null"}}, required=[]),
    "unicode keys": an_object({"größe": {"type": "boolean"}, "日本 語": {"type": "null"}, '😀"\\': {"const": 1}}),
    "an empty key": an_object({"": {"type": "boolean"}}),
    "keys like keywords": an_object({"pattern": {"type": "boolean"}, "$ref": {"type": "null"}, "multipleOf": {"const": 1}}),
    "deep nesting": nested(12),
    "anyOf": {"anyOf": [{"type": "boolean"}, an_object({"x": {"const": "y"}}), {"type": "array", "maxItems": 0}]},
    "anyOf of objects": {"anyOf": [an_object({"kind": {"const": k}, k: {"type": "boolean"}}) for k in "abc"]},
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "allOf of objects": {"allOf": [an_object({"a": {"enum": [1, 2, 3]}}), {"properties": {"a": {"enum": [2, 3, 4]}}}]},
    "oneOf of kinds": {"oneOf": [an_object({"kind": {"const": k}, "v": {"type": t}}) for k, t in (("p", "boolean"), ("q", "null"))]},
    "oneOf of types": {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    "definitions": {"$defs": {"c": {"enum": ["r", "g"]}}, "type": "array", "items": {"$ref": "#/$defs/c"}, "maxItems": 3},
    "old definitions": {"definitions": {"a b/c": {"type": "boolean"}}, "$ref": "#/definitions/a%20b~1c"},
    "references to properties": an_object({"a": {"type": "boolean"}, "b": {"$ref": "#/properties/a"}}),
    "references in references": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}, "$ref": "#/$defs/a"},
    "a draft": {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://x.org/y", "title": "T", "type": "boolean"},
    "an old draft": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "boolean", "default": True, "examples": [1]},
    "notes": {"type": "null", "title": "x" * 9000, "description": "y" * 9000, "deprecated": True, "$comment": "z"},
    "no type": {"minimum": 3, "enum": [1, 5, "x"]},
    "false within": an_object({"a": {"type": "boolean"}, "b": False}, required=["a"]),
}
OPEN = {  # answers that may be as long as they like
    "anything": {},
    "true": True,
    "an object of anything": {"type": "object"},
    "numbers": {"type": "number"},
    "numbers of a range": {"type": "number", "minimum": 0.5, "maximum": 2.25},
    "texts": {"type": "string", "minLength": 2},
    "text with a pattern": {"type": "string", "pattern": "ab|c"},
    "a moment": {"type": "string", "format": "date-time"},
    "further keys": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": True, "required": ["a"]},
    "values by name": {"type": "object", "additionalProperties": {"type": "integer"}},
    "number of properties": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": {"type": "boolean"}},
    "keys by pattern": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "null"}}, "additionalProperties": False},
    "a tree": TREE | {"$defs": {"tree": TREE}},
    "a list": {"type": "array", "items": {"type": "integer"}, "minItems": 2},
    "required but not described": {"type": "object", "required": ["a", "b"]},
}


@pytest.fixture(scope="module", params=[*KINDS, "normalized"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder, "byte_level" if request.param == "normalized" else request.param)
    if request.param == "normalized":  # as Qwen's
        processor = FastTokenizer.from_file(str(folder / "tokenizer.json"))
        processor.normalizer = normalizers.NFC()
        processor.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return Tokenizer(write(tmp_path_factory.mktemp("tokenizer"), "byte_level"))


def walk(tokenizer, grammar, random, most=3000, closes=0.0):
    """Draw tokens uniformly; return the text, and whether it has ended. So often what closes is preferred."""
    made = []
    while not grammar.is_finished and len(made) < most:
        allowed = grammar.allowed().nonzero().flatten().tolist()
        assert allowed and grammar.error is None
        closing = [i for i in allowed if i in tokenizer.eos_ids or tokenizer.text(i) in ('"', "}", "]")]
        token = random.choice(closing if closing and random.random() < closes else allowed)
        if token in tokenizer.eos_ids:
            return tokenizer.decode(made), True
        assert tokenizer.is_text(token)
        made.append(token)
        grammar.accept(token)
    assert grammar.error is None
    return tokenizer.decode(made), grammar.is_finished


def is_valid(schema, text):
    calendar = isinstance(schema, dict) and schema.get("format") in ("date", "time", "date-time")
    assert not calendar or re.fullmatch(r'"(\d{4}-\d\d-\d\d)?[Tt]?(\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d))?"', text)
    judge = jsonschema_rs.validator_for(schema, validate_formats=not calendar)  # llguidance lets all leap days and leap seconds through
    return judge.is_valid(json.loads(text, strict=True))


# What is drawn


@pytest.mark.parametrize("name", BOUNDED)
def test_whatever_is_drawn_ends_and_satisfies_the_schema(name, tokenizer):
    for seed in range(4):
        text, ended = walk(tokenizer, compile_grammar(tokenizer, VOCAB_SIZE, schema=BOUNDED[name]), Random(seed))
        assert ended and is_valid(BOUNDED[name], text), text


@pytest.mark.parametrize("name", OPEN)
def test_answers_of_any_length_satisfy_the_schema_where_they_end(name, tokenizer):
    ends = 0
    for seed in range(8):
        grammar = compile_grammar(tokenizer, VOCAB_SIZE, schema=OPEN[name])
        text, ended = walk(tokenizer, grammar, Random(seed), most=600, closes=0.5)
        assert not ended or is_valid(OPEN[name], text), text
        ends += ended
    assert ends


@pytest.mark.parametrize("pattern", ["[a-z]{3}( über)?", r"a/b\n\d{2}", "(ja|nein|日本){1,2}", "x?", r"\[\"\\\]"])
def test_an_answer_is_a_whole_match_of_a_regular_expression(pattern, tokenizer):
    for seed in range(4):
        text, ended = walk(tokenizer, compile_grammar(tokenizer, VOCAB_SIZE, regex=pattern), Random(seed))
        assert ended and re.fullmatch(pattern, text), text


def test_an_answer_follows_a_lark_grammar(tokenizer):
    lark = 'start: "say " WORD ("," WORD){1,2} end\nend: "." | "!"\nWORD: /[a-z]{1,3}/'
    for seed in range(4):
        text, ended = walk(tokenizer, compile_grammar(tokenizer, VOCAB_SIZE, lark=lark), Random(seed))
        assert ended and re.fullmatch(r"say [a-z]{1,3}(,[a-z]{1,3}){1,2}[.!]", text), text


def test_every_way_to_encode_what_must_follow_is_allowed(tokenizer):
    text = '{"a": "e\u0301 \u212b <s>"}'
    for ids in (tokenizer.offsets(text, inside=True)[0], [i for letter in text for i in tokenizer.offsets(letter, inside=True)[0]]):
        if tokenizer.decode(ids) != text:  # a normalizer, or a special token
            continue
        grammar = compile_grammar(tokenizer, VOCAB_SIZE, schema={"const": {"a": "e\u0301 \u212b <s>"}})
        for token in ids:
            assert grammar.allowed()[token]
            grammar.accept(token)
        assert grammar.is_finished and grammar.error is None


def test_the_text_may_end_only_where_the_grammar_is_satisfied(tokenizer):
    turn = tokenizer.find_token("<|im_end|>")
    grammar = compile_grammar(tokenizer, VOCAB_SIZE, regex="ab*", stop=[[turn], [5, 6]])
    ends = [tokenizer.eos_id, turn]
    assert not grammar.allowed()[ends].any()
    grammar.accept(tokenizer.offsets("a", inside=True)[0][0])
    assert grammar.allowed()[ends].all() and not grammar.is_finished
    others = [i for i in tokenizer.special_ids if i not in ends]
    assert not grammar.allowed()[others].any() and not grammar.allowed()[tokenizer.vocab_size + len(tokenizer.special_ids) :].any()


def test_a_tokenizer_without_an_end_still_ends_where_nothing_may_follow(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, "byte_level", turns=False, eos_token=None))
    assert tokenizer.eos_ids == ()
    text, ended = walk(tokenizer, compile_grammar(tokenizer, VOCAB_SIZE, schema=BOUNDED["an object"]), Random(0))
    assert ended and is_valid(BOUNDED["an object"], text)


def test_white_space_is_bounded(byte_level):
    for seed in range(20):
        text, _ = walk(byte_level, compile_grammar(byte_level, VOCAB_SIZE, schema={"type": "array", "maxItems": 1}), Random(seed), most=60)
        assert not re.search(r"\s{18}|\n\s*\n|\t", re.sub('".*"', "", text))


# What is refused


WRONG = {  # and what the sentence says
    "keyword": ({"not": {"type": "string"}}, r"Unimplemented keys: \[\"not\"\]"),
    "keyword within": ({"properties": {"a": {"uniqueItems": True, "type": "array"}}}, "uniqueItems"),
    "conditions": ({"if": {}, "then": {}}, "if"),
    "an own leniency": ({"uniqueItems": True, "type": "array", "x-guidance": {"lenient": True}}, "uniqueItems"),
    "type": ({"type": "strin"}, "Invalid type: strin"),
    "format": ({"type": "string", "format": "xyz"}, "Unknown format: xyz"),
    "look-around": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "pattern": ({"type": "string", "pattern": "("}, "unclosed group"),
    "range": ({"type": "integer", "minimum": 5, "maximum": 3}, "greater than"),
    "length": ({"type": "string", "maxLength": -1}, "-1"),
    "nothing": ({"enum": []}, "Unsatisfiable"),
    "a loop": ({"$ref": "#"}, "no text satisfies it"),
    "a long loop": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text satisfies it"),
    "no definition": ({"$ref": "#/$defs/a"}, "does not exist"),
    "another file": ({"$ref": "https://example.com/x.json"}, "does not fetch"),
    "overlaps": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "Use `anyOf`"),
    "no number": ({"const": float("nan")}, "float"),
    "false": (False, "allows something, but got False"),
    "a list": ([1], r"a mapping, but got \[1\]"),
    "a text": ("{}", "a mapping, but got"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_schema_that_cannot_be_kept_to_is_refused_in_a_sentence(name, byte_level):
    schema, message = WRONG[name]
    with pytest.raises(UserError, match=message) as raised:
        compile_grammar(byte_level, VOCAB_SIZE, schema=schema)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(regex="("), "regular expression cannot be used: .*unclosed group"),
        (dict(regex="(?=a)b"), "look-ahead"),
        (dict(regex="a" * 2001), "2000 characters, but this one has 2001"),
        (dict(lark="foo"), "grammar cannot be used: .*Expected token"),
        (dict(lark='a: "b"'), "no start rule"),
        (dict(lark="start: b"), 'unknown name: "b"'),
        (dict(lark="start: start"), "no text satisfies it"),
        (dict(lark=""), "no start rule"),
        (dict(lark="start: " + "(" * 5000 + '"a"' + ")" * 5000), "too deeply nested"),
        (dict(lark='start: "a"' + "\n" * 1000), "1000 lines, but this one has 1001"),
    ],
)
def test_a_wrong_expression_or_grammar_is_refused_in_a_sentence(given, message, byte_level):
    with pytest.raises(UserError, match=message) as raised:
        compile_grammar(byte_level, VOCAB_SIZE, **given)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def chain(n, link):
    """Definitions each of which refers to the next one."""
    made = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(n)} | {f"a{n}": {"type": "integer"}}
    return {"$defs": made, "$ref": "#/$defs/a0"}


def within(schema, n, link):
    for _ in range(n):
        schema = link(schema)
    return schema


def either(schema):
    return {"anyOf": [schema, {"type": "string"}]}


HOSTILE = {  # what once ended the process, or took minutes or gigabytes
    "a chain": chain(1200, lambda ref: {"anyOf": [ref]}),
    "a long chain": chain(20000, lambda ref: ref),
    "a chain of arrays": chain(1200, lambda ref: {"type": "array", "items": ref}),
    "a chain of deep definitions": chain(20, lambda ref: within(ref, 59, either)),
    "a chain that is just allowed": chain(990, lambda ref: {"anyOf": [ref]}),
    "names that are not found": {"$defs": {"a": within({}, 100, either)}, "allOf": [{"$ref": f"#x{i}"} for i in range(100)]},
    "nesting": within({}, 200, either),
    "deep nesting": within({}, 5000, either),
    "many ways": within({"type": "integer"}, 60, lambda schema: {"anyOf": [schema, schema]} if len(str(schema)) < 30000 else schema),
    "products": {"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "null"}}} for j in range(2)]} for i in range(9)]},
    "a large enum": {"enum": [f"v{i}" for i in range(6000)]},
    "a large enum of objects": {"enum": [{"a": [i, i]} for i in range(3000)]},
    "a long text": {"enum": ["x" * 60000]},
    "a long key": {"type": "object", "properties": {"x" * 60000: {}}, "required": ["x" * 60000]},
    "many keys": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
    "a long pattern": {"type": "string", "pattern": "^" + "a?" * 30000 + "$"},
    "many patterns": {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "(a|b)?" * 300} for i in range(30)}},
    "key patterns": {"type": "object", "patternProperties": {"a?" * 3000: {}}},
    "repetitions": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "many states": {"type": "string", "pattern": "^(a|b)*a(a|b){24}$"},
    "classes": {"type": "string", "pattern": r"^(\p{L}\w\p{N}?){200}$"},
    "multiples": {"type": "integer", "multipleOf": 1000003},
    "multiples together": {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]},
    "many multiples": {"anyOf": [{"type": "integer", "multipleOf": 997, "minimum": i} for i in range(300)]},
    "fractions": {"type": "number", "multipleOf": 0.00010007},
    "many items": {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "minItems": 10**9}, "minItems": 10**9},
    "a long string": {"type": "string", "minLength": 10**6, "maxLength": 10**9},
    "large numbers": {"type": "integer", "minimum": -(10**400), "maximum": 10**400},
    "surrogates": {"const": "\ud800"},
    "not schemas": {"properties": [1], "anyOf": 3, "$ref": 5, "patternProperties": "x", "multipleOf": "2", "pattern": 1},
}
PATIENCE = 5  # seconds


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_schema_neither_ends_the_process_nor_takes_long(name, byte_level):
    try:
        text = json.dumps(HOSTILE[name])
    except RecursionError:  # a server's parser refuses such a text too
        with pytest.raises(UserError, match="recursion"):
            schema_text(HOSTILE[name])
        return
    found = attempt(byte_level.checkpoint_dir, text)
    assert found["seconds"] < PATIENCE and found.get("slowest", 0) < 1
    assert "\n" not in (found.get("refused") or found.get("error") or "")


def test_what_stands_in_notes_and_values_is_no_keyword():
    values = [{"pattern": "a" * 3000}, {"multipleOf": 1000003}, {"$schema": 1}]
    names = {"pattern": {"type": "null"}, "multipleOf": {"const": 1000003}}
    text = schema_text({"enum": values, "properties": names, "examples": ["x" * 5000], "description": "y" * 5000})
    assert json.loads(text)["enum"] == values


# In a batch


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = GPT(tiny_config("llama", vocab_size=VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE, block_size=1024)).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_random_model_answers_by_every_schema(temperature, tokenizer, model):
    stop = [[i] for i in tokenizer.eos_ids]
    names = {}
    for i, (name, schema) in enumerate(BOUNDED.items()):
        grammar = compile_grammar(tokenizer, VOCAB_SIZE, schema=schema, stop=stop)
        names[Answer([1 + i, 2, 3], RowState(temperature, grammar=grammar, seed=i), 900, stop)] = name
    for answer in answer_all(model, names, rows=16, length=920):
        text = tokenizer.decode(answer.made[: answer.n_shown])
        assert answer.finish == "stop" and is_valid(BOUNDED[names[answer]], text), (names[answer], text)


def test_a_grammar_hurts_no_neighbour_and_no_probability(byte_level, model):
    def answers():
        for i in range(12):
            grammar = compile_grammar(byte_level, VOCAB_SIZE, schema=BOUNDED["an object"]) if i % 2 else None
            yield Answer([i, i + 1], RowState(0.9, seed=i, grammar=grammar), 40, n_logprobs=2, stop=[[byte_level.eos_id]])

    alone = [next(answer_all(model, [answer], rows=1, length=60)) for answer in answers()]
    together = list(answers())
    list(answer_all(model, together, rows=5, length=60))
    assert [answer.made for answer in together] == [answer.made for answer in alone]
    for answer in together:
        whole = answer.prompt + answer.made
        logs = model(torch.tensor([whole]))[0].log_softmax(-1)[len(answer.prompt) - 1 :]
        for i, found in enumerate(answer.logprobs):
            assert found.logprob == pytest.approx(logs[i, answer.made[i]].item(), abs=1e-4)
            assert [token for token, _ in found.top] == logs[i].topk(2).indices.tolist()


class Breaking(grammars.Grammar):
    """A grammar whose parser gives up behind so many tokens: as it takes the last one, or as it is asked what may follow."""

    def __init__(self, tokenizer, n, asked):
        super().__init__(compile_grammar(tokenizer, VOCAB_SIZE, schema={"type": "array", "minItems": 99})._matcher, VOCAB_SIZE)
        self.n, self.asked = n, asked

    def accept(self, token):
        super().accept(token)
        self.n -= 1
        if self.n == 0 and not self.asked:
            super().accept(VOCAB_SIZE - 1)  # no text

    def allowed(self):
        if self.n == 0:
            super().accept(VOCAB_SIZE - 1)
        return super().allowed()


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_that_breaks_ends_its_own_answer_only(temperature, asked, byte_level, model):
    other = Answer([1, 2], RowState(0.0), 30)
    broken = Answer([3, 4], RowState(temperature, grammar=Breaking(byte_level, 3, asked)), 30)
    batch, order = Batch(model, new_cache(model, 2, 60), max_tokens=60), []
    for answer in (other, broken):
        batch.join(answer)
    while batch.running:
        order += [answer for answer, _ in batch.step() if answer.finish is not None]
    assert order == [broken, other] and len(other.made) == 30 and other.finish == "length"
    assert broken.finish == "error" and broken.n_shown == len(broken.made) == 3
    assert broken.error.startswith("The answer cannot go on by its grammar")


def test_a_schema_that_was_used_before_is_not_compiled_again(byte_level):
    schema = {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}}
    times, first = [], []
    for _ in range(2):
        start = monotonic()
        grammar = compile_grammar(byte_level, VOCAB_SIZE, schema=schema)
        times.append(monotonic() - start)
        first.append(grammar.allowed())
        grammar.accept(byte_level.ids("{")[0])
    assert times[1] < times[0] / 3 and first[0].equal(first[1])
