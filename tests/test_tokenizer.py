"""Text to ids and back; transformers is the oracle where it reads the same files."""

import json
import random
import time

import pytest
import torch
from tokenizers import Tokenizer as FastTokenizer
from transformers import PreTrainedTokenizerFast
from vocabularies import BYTES, KINDS, train_byte_level, with_bos, write

from litgpt.errors import MissingFile, UserError
from litgpt.tokenizer import StreamDecoder, Tokenizer

TEXTS = (
    "What do llamas eat?",
    "  two spaces,\ttabs\nand lines\n\n\n  x",
    "naïve café 日本語 😀👩‍👩‍👧‍👦🇩🇪 ﷽ ᚠᛇᚻ",
    "",
    " ",
    "a</s>b<s></s>",
    "unknown \x00 \ufffd end",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, folders):
    return Tokenizer(folders[request.param])


def random_text(draw: random.Random) -> str:
    ranges = ((32, 127), (9, 11), (32, 33), (0xA0, 0x250), (0x4E00, 0x4E40), (0x1F600, 0x1F640), (0x200D, 0x200E), (0x1F3FB, 0x1F400))
    return "".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(40)))


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*map(stream.push, ids), stream.flush()]


# ---- ids and text


@pytest.mark.parametrize("text", [*TEXTS[:4], "unknown \x00 \ufffd end", "a  b "])
def test_decoding_gives_the_text_back(tokenizer, text):
    written = text if tokenizer.model_name.startswith("byte") else text.lstrip(" ")  # the others put one space in front and take it away
    assert tokenizer.decode(tokenizer.encode(written)) == written
    assert tokenizer.decode(tokenizer.encode(f"{written}</s>")) == written


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])
def test_ids_and_text_are_those_of_transformers(folders, kind):
    tokenizer, draw = Tokenizer(folders[kind]), random.Random(3)
    theirs = PreTrainedTokenizerFast.from_pretrained(folders[kind], clean_up_tokenization_spaces=False)
    for text in (*TEXTS, *(random_text(draw) for _ in range(200))):
        ids = tokenizer.ids(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        shuffled = [draw.randrange(len(theirs)) for _ in range(20)]
        assert tokenizer.decode(shuffled) == theirs.decode(shuffled, skip_special_tokens=True)


def test_special_tokens_in_a_text_are_recognised(tokenizer):
    ids = tokenizer.ids("a</s><|im_start|>")
    assert ids[-2:] == [tokenizer.eos_id, tokenizer.token_to_id("<|im_start|>")]
    assert tokenizer.eos_id in tokenizer.special_ids


def test_offsets_cover_the_text_in_order(tokenizer):
    text = "What 日本 😀 do</s> llamas\n eat?"
    ids, spans = tokenizer.offsets(text)
    assert ids == tokenizer.ids(text)
    assert len(spans) == len(ids) and spans[-1][1] == len(text)
    assert [stop for _, stop in spans] == sorted(stop for _, stop in spans)
    assert text[slice(*spans[ids.index(tokenizer.eos_id)])] == "</s>"


def test_text_inside_another_gets_no_space_in_front(tokenizer):
    for text in ("hello", " hello", "llamas eat", "😀"):
        ids, spans = tokenizer.offsets(text, inside=True)
        assert tokenizer.decode([*tokenizer.ids("What"), *ids]) == f"What{text}"
        assert spans[-1][1] == len(text) and spans[0][0] == 0


def test_an_eos_in_the_text_stays(tokenizer):
    for text in ("a</s>", "a</s>b"):
        plain = tokenizer.ids(text)
        assert tokenizer.encode(text, bos=False).tolist() == plain
        assert tokenizer.encode(text, bos=False, eos=True).tolist() == [*plain, tokenizer.eos_id]


def test_there_is_never_a_second_bos(tokenizer):
    once = tokenizer.encode("hello", bos=True).tolist()
    assert once == [tokenizer.bos_id, *tokenizer.ids("hello")]
    assert tokenizer.encode("<s>hello", bos=True).tolist() == tokenizer.ids("<s>hello")


def test_encoding_returns_a_vector_of_ints_that_can_be_cut(tokenizer):
    whole = tokenizer.encode("What do llamas eat?", device=torch.device("cpu"))
    assert whole.dtype == torch.int and whole.ndim == 1
    assert torch.equal(tokenizer.encode("What do llamas eat?", max_length=3), whole[:3])
    assert tokenizer.encode("", bos=False).shape == (0,)


def test_decoding_takes_tensors_and_lists(tokenizer):
    ids = tokenizer.encode("What do", bos=False)
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "What do"
    assert tokenizer.decode(ids[0]) == tokenizer.decode([int(ids[0])])


def test_ids_outside_the_vocabulary_are_left_out(tokenizer):
    assert tokenizer.decode([10**6, *tokenizer.ids("What"), -1]) == "What"


# ---- streaming


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_are_together_the_decoded_text(tokenizer, text):
    ids = tokenizer.ids(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streamed_pieces_are_together_the_decoded_text_whatever_the_tokens(tokenizer):
    draw = random.Random(5)
    n = tokenizer.vocab_size
    few = [
        i for i in map(tokenizer.find_token, (*BYTES[0xE0:0xF5], *BYTES[0x80:0x90], "â", "Ĥ", "¬", "ð", "▁", "▁▁", "a")) if i is not None
    ]
    for trial in range(600):
        size = draw.randrange(60)
        ids = [draw.choice(few) if trial % 2 and draw.random() < 0.8 else draw.randrange(n + 3) for _ in range(size)]
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids), ids


def test_streaming_shows_no_broken_character_and_loses_no_space(tokenizer):
    draw = random.Random(7)
    for _ in range(200):
        text = "x " + random_text(draw)
        pieces = streamed(tokenizer, tokenizer.ids(text))
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_streaming_shows_a_word_as_soon_as_it_is_there(tokenizer):
    ids = tokenizer.ids("What do llamas eat")
    pieces = streamed(tokenizer, ids)
    assert pieces[-1] == "" and sum(map(bool, pieces)) >= len(ids) - 1


def test_decode_stream_takes_ints_and_tensors(tokenizer):
    ids = tokenizer.ids("hello 😀 world")
    for tokens in (ids, [torch.tensor(i) for i in ids], [torch.tensor([i]) for i in ids]):
        assert "".join(tokenizer.decode_stream(iter(tokens))) == "hello 😀 world"


@pytest.mark.parametrize("text", ["llamas eat grass ", "   ", "😀"])
def test_streaming_costs_the_same_for_each_token(folders, text):
    tokenizer = Tokenizer(folders["byte_level"])
    decoded = []
    tokenizer.decode = lambda ids: decoded.append(len(ids)) or Tokenizer.decode(tokenizer, ids)
    ids = tokenizer.ids(text * 400)
    streamed(tokenizer, ids)
    assert max(decoded) <= 40 and sum(decoded) < 40 * len(ids)


def test_streaming_unfinished_characters_forever_costs_the_same_for_each_token(folders):
    tokenizer = Tokenizer(folders["byte_level"])
    decoded = []
    tokenizer.decode = lambda ids: decoded.append(len(ids)) or Tokenizer.decode(tokenizer, ids)
    ids = [tokenizer.token_to_id("ð")] * 2000
    assert "".join(streamed(tokenizer, ids)) == "\ufffd" * 2000
    assert max(decoded[:-1]) <= 40


def test_a_long_text_streams_in_no_time(tokenizer):
    ids = tokenizer.ids("What do llamas eat? 日本 😀 " * 500)
    started = time.process_time()
    streamed(tokenizer, ids)
    assert time.process_time() - started < 5


# ---- where texts begin and end


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", [True, False])
def test_the_config_says_whether_texts_begin_with_bos(tmp_path, kind, answer):
    tokenizer = Tokenizer(write(tmp_path, kind, add_bos_token=answer, tokenizer_class="LlamaTokenizer"))
    assert tokenizer.use_bos is answer
    assert (tokenizer.encode("a")[0].item() == tokenizer.bos_id) is answer


def test_else_the_post_processor_says_it(tmp_path):
    folder = write(tmp_path, "byte_level")
    assert not Tokenizer(folder).use_bos
    with_bos(FastTokenizer.from_file(str(folder / "tokenizer.json"))).save(str(folder / "tokenizer.json"))
    assert Tokenizer(folder).use_bos
    assert Tokenizer(folder).encode("a").tolist() == PreTrainedTokenizerFast.from_pretrained(folder).encode("a")


def test_else_the_class_says_it_and_a_missing_class_is_fine(tmp_path):
    assert Tokenizer(write(tmp_path / "a", "sentencepiece", tokenizer_class="LlamaTokenizer")).use_bos
    assert not Tokenizer(write(tmp_path / "b", "sentencepiece")).use_bos


def test_the_name_of_the_folder_has_no_say(tmp_path):
    folders = [write(tmp_path / name, "byte_level") for name in ("Meta-Llama-3-8B", "SmolLM2-135M-Instruct", "final")]
    assert [Tokenizer(folder).use_bos for folder in folders] == [False] * 3
    assert [Tokenizer(folder).model_name for folder in folders] == ["Meta-Llama-3-8B", "SmolLM2-135M-Instruct", "final"]


def test_all_end_tokens_are_known(tmp_path):
    folder = write(tmp_path, "byte_level", eos_token={"content": "<|im_end|>"})
    assert Tokenizer(folder).eos_ids == (Tokenizer(folder).token_to_id("<|im_end|>"),)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, Tokenizer(folder).eos_id, 10**6]}))
    assert Tokenizer(folder).eos_ids == (Tokenizer(folder).eos_id, 2)


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_models_files_name_the_ends_if_the_tokenizers_do_not(tmp_path, name):
    folder = write(tmp_path, "byte_level", bos_token=None, eos_token=None)
    assert (Tokenizer(folder).bos_id, Tokenizer(folder).eos_id, Tokenizer(folder).eos_ids) == (None, None, ())
    (folder / name).write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 5]}))
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids) == (1, 2, (2, 5))


def test_a_tokenizer_without_ends_says_so_when_they_are_asked_for(tmp_path):
    tokenizer = Tokenizer(write(tmp_path, "byte_level", bos_token=None, eos_token=None))
    with pytest.raises(UserError, match="no BOS token"):
        tokenizer.encode("a", bos=True)
    with pytest.raises(UserError, match="no EOS token"):
        tokenizer.encode("a", eos=True)


def test_a_sentencepiece_model_knows_its_ends_and_added_tokens(tmp_path):
    folder = write(tmp_path, "sentencepiece", bos_token=None, eos_token=None)
    n = Tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<mine>": n}))
    tokenizer = Tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.ids("a<mine>")[-1] == n == tokenizer.token_to_id("<mine>")
    assert tokenizer.decode(tokenizer.ids("a<mine>")) == "a<mine>"


def test_tokens_that_the_config_calls_special_are_special(tmp_path):
    processor = train_byte_level()
    written = json.loads(processor.to_str())
    written["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "additional_special_tokens": ["<s>"]}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.ids("a</s><s>")[1:] == [2, 1]
    assert tokenizer.decode([2, 1]) == ""


def test_an_unknown_token_has_no_id(tokenizer):
    assert tokenizer.find_token("<nowhere>") is None
    with pytest.raises(UserError, match="<nowhere>"):
        tokenizer.token_to_id("<nowhere>")


# ---- files


def test_a_missing_folder_or_tokenizer_is_named(tmp_path):
    with pytest.raises(MissingFile, match="nowhere"):
        Tokenizer(tmp_path / "nowhere")
    with pytest.raises(MissingFile, match="tokenizer.json or a tokenizer.model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b""])
def test_a_damaged_file_is_named(tmp_path, name, content):
    write(tmp_path, "sentencepiece" if name == "tokenizer.model" else "byte_level")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        Tokenizer(tmp_path)


def test_a_json_file_must_hold_an_object(tmp_path):
    (write(tmp_path, "byte_level") / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match="tokenizer_config.json.*object"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"eos_token_id": [2, 5],\n}', '{"bos_token_id": 1\n "eos_token_id": [2, 5]}', '{"eos_token_id": [2, 5,],}']
)
def test_wrong_commas_in_a_generation_config_are_put_right_with_a_warning(tmp_path, text):
    (write(tmp_path, "byte_level") / "generation_config.json").write_text(text)
    with pytest.warns(UserWarning, match="generation_config.json"):
        assert Tokenizer(tmp_path).eos_ids == (2, 5)


def test_limits_that_were_saved_with_a_tokenizer_do_not_count(tmp_path):
    folder = write(tmp_path, "byte_level")
    processor = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    processor.enable_truncation(2)
    processor.enable_padding(length=50)
    processor.save(str(folder / "tokenizer.json"))
    assert len(Tokenizer(folder).ids("What do llamas eat?")) not in (2, 50)
