import json
import shutil

import pytest
import torch
import vocabularies
from peft import PeftModel
from safetensors.torch import load_file
from speaking import make_checkpoint
from test_multimodal_export import loads_whole, source_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt import cli, names
from litgpt.checkpoint import load_model
from litgpt.config import Config
from litgpt.tokenizer import Tokenizer

TEXTS = ["I say <a> and <b>", "<a><b>\n x<a>", " <b> ", "plain", "<|im_start|>user <a><|im_end|>"]
TOKENS = '["<a>", "<b>"]'
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def folder(tmp_path):
    return make_checkpoint(tmp_path / "model")


def add(folder, out, *flags, tokens=TOKENS):
    return cli.main(["add_tokens", str(folder), "--out_dir", str(out), *(["--tokens", tokens] if tokens else []), *flags])


def stored(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def loads(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("special", [False, True])
def test_transformers_loads_the_result_with_the_same_ids_and_the_mean_of_the_old_rows(folder, tmp_path, special):
    before, n = stored(folder), Tokenizer(folder).vocab_size
    assert add(folder, tmp_path / "out", *(["--special", "true"] if special else [])) == 0
    theirs, tokenizer = loads(tmp_path / "out")
    ours = Tokenizer(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>"]) == [n, n + 1] == [ours.token_to_id("<a>"), ours.token_to_id("<b>")]
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ours.ids(text) == ids and ids.count(n) == text.count("<a>")
        assert ours.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
        assert ("<a>" in ours.decode(ids)) == ("<a>" in text and not special)
    assert theirs.config.vocab_size == n + 2 == Config.from_checkpoint(tmp_path / "out").padded_vocab_size
    for name, tensor in stored(tmp_path / "out").items():
        if name in TABLES:
            assert torch.equal(tensor[:n], before[name])
            torch.testing.assert_close(tensor[n:], before[name].mean(0).expand(2, -1), rtol=0, atol=1e-6)
        else:
            assert torch.equal(tensor, before[name])
    idx = torch.tensor([ours.ids(TEXTS[0])])
    torch.testing.assert_close(load_model(tmp_path / "out")(idx), theirs(idx).logits, rtol=0, atol=2e-5)


def test_rows_without_a_token_are_used_before_the_matrices_grow(folder, tmp_path):
    n = Tokenizer(folder).vocab_size
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.resize_token_embeddings(n + 3, mean_resizing=False)
    padded = tmp_path / "padded"
    theirs.save_pretrained(padded)
    for name in (names.TOKENIZER_JSON, names.TOKENIZER_CONFIG):
        shutil.copy(folder / name, padded / name)
    before = stored(padded)
    assert add(padded, tmp_path / "inside") == 0
    inside = stored(tmp_path / "inside")
    for name in TABLES:
        assert inside[name].shape == before[name].shape and torch.equal(inside[name][n + 2 :], before[name][n + 2 :])
        torch.testing.assert_close(inside[name][n : n + 2], before[name][:n].mean(0).expand(2, -1), rtol=0, atol=1e-6)
    flags = ["--padding_multiple", "64"]
    assert add(padded, tmp_path / "beyond", *flags, tokens=json.dumps([f"<{i}>" for i in range(5)])) == 0
    n_rows = -(-(n + 5) // 64) * 64
    theirs, tokenizer = loads(tmp_path / "beyond")
    assert theirs.config.vocab_size == n_rows and len(tokenizer) == n + 5


@pytest.mark.parametrize("kind", ["byte_level", "prepended", "metaspace"])
def test_every_kind_of_tokenizer_recognises_them_in_texts(kind, tmp_path):
    folder = vocabularies.write(make_checkpoint(tmp_path / "model"), kind, tokenizer_class="PreTrainedTokenizerFast")
    n = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.resize_token_embeddings(n, mean_resizing=False)
    theirs.save_pretrained(folder)
    (tmp_path / "more.txt").write_text("<c>\n\nein Wort\n")
    assert add(folder, tmp_path / "out", "--tokens_file", str(tmp_path / "more.txt")) == 0
    _, tokenizer = loads(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>", "ein Wort"]) == [n, n + 1, n + 2, n + 3]
    ours, old = Tokenizer(tmp_path / "out"), Tokenizer(folder)
    for text in [*TEXTS, "hier ist ein Wort<c>"]:
        assert ours.ids(text) == tokenizer(text, add_special_tokens=False).input_ids
    assert ours.ids("The quick brown fox") == old.ids("The quick brown fox")


def test_the_files_that_list_tokens_list_the_new_ones(folder, tmp_path):
    settings = json.loads((folder / names.TOKENIZER_CONFIG).read_text())
    old = {"0": dict(content="<|endoftext|>", lstrip=False, normalized=False, rstrip=False, single_word=False, special=True)}
    settings |= dict(added_tokens_decoder=old, additional_special_tokens=["<|im_start|>"])
    (folder / names.TOKENIZER_CONFIG).write_text(json.dumps(settings))
    (folder / names.ADDED_TOKENS).write_text('{"<|endoftext|>": 0}')
    n = Tokenizer(folder).vocab_size
    assert add(folder, tmp_path / "out", "--special", "true") == 0
    listed = json.loads((tmp_path / "out" / names.TOKENIZER_CONFIG).read_text())
    assert listed["added_tokens_decoder"][str(n + 1)]["content"] == "<b>" and listed["added_tokens_decoder"]["0"] == old["0"]
    assert listed["additional_special_tokens"] == ["<|im_start|>", "<a>", "<b>"]
    assert json.loads((tmp_path / "out" / names.ADDED_TOKENS).read_text()) == {"<|endoftext|>": 0, "<a>": n, "<b>": n + 1}
    _, tokenizer = loads(tmp_path / "out")
    assert tokenizer.decode([n], skip_special_tokens=True) == ""


def test_a_head_that_is_tied_or_has_a_bias_grows_too(tmp_path):
    from oracle import pair
    from tiny import tiny_config

    for family, changes in (("llama", dict(tie_embeddings=True)), ("phi", {})):
        folder = tmp_path / family
        _, theirs = pair(tiny_config(family, vocab_size=600, padded_vocab_size=600, **changes))
        theirs.save_pretrained(folder)
        vocabularies.write(folder, "byte_level", turns=False, tokenizer_class="PreTrainedTokenizerFast")
        n = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
        out = tmp_path / f"{family}-out"
        assert add(folder, out, tokens=json.dumps([f"<{i}>" for i in range(600 - n + 4)])) == 0
        again, _ = loads(out)
        assert again.config.vocab_size == 604 and again.config.tie_word_embeddings == (family == "llama")
        idx = torch.tensor([[1, 603, 5]])
        torch.testing.assert_close(load_model(out)(idx), again(idx).logits, rtol=0, atol=2e-5)
        if family == "phi":
            torch.testing.assert_close(again.lm_head.bias[-1], theirs.lm_head.bias[:n].mean())


def test_a_multimodal_model_stays_one(tmp_path):
    folder = source_of("gemma3", tmp_path / "source")
    vocabularies.write(folder, "byte_level", tokenizer_class="PreTrainedTokenizerFast")
    n = max(AutoTokenizer.from_pretrained(folder).get_vocab().values()) + 1
    wide = tmp_path / "wide"
    theirs = loads_whole("gemma3", folder)
    theirs.resize_token_embeddings(n, mean_resizing=False)
    theirs.save_pretrained(wide)
    for name in (names.TOKENIZER_JSON, names.TOKENIZER_CONFIG):
        shutil.copy(folder / name, wide / name)
    assert add(wide, tmp_path / "out") == 0
    assert loads_whole("gemma3", tmp_path / "out").get_input_embeddings().weight.shape[0] == n + 2


def test_what_is_trained_with_lora_afterwards_keeps_the_new_rows(folder, tmp_path):
    grown, run = tmp_path / "grown", tmp_path / "run"
    assert add(folder, grown) == 0
    (tmp_path / "data.json").write_text(json.dumps([{"instruction": f"Say <a> {i}", "output": "<b>" * (1 + i % 3)} for i in range(10)]))
    data = ["--data", "JSON", "--data.json_path", str(tmp_path / "data.json"), "--data.val_split_fraction", "0.2"]
    train = ["--train.max_steps", "2", "--train.micro_batch_size", "1", "--train.global_batch_size", "2", "--precision", "32-true"]
    assert cli.main(["finetune_lora", str(grown), *data, *train, "--out_dir", str(run), "--eval.final_validation", "false"]) == 0
    before, after = stored(grown), stored(run / "final")
    assert all(torch.equal(before[name], after[name]) for name in TABLES)
    assert not torch.equal(before["model.layers.0.self_attn.q_proj.weight"], after["model.layers.0.self_attn.q_proj.weight"])
    merged, tokenizer = loads(run / "final")
    assert tokenizer("<a><b>", add_special_tokens=False).input_ids == Tokenizer(grown).ids("<a><b>")
    settings = json.loads((run / "final" / names.ADAPTER / names.ADAPTER_CONFIG).read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    adapted = PeftModel.from_pretrained(base, run / "final" / names.ADAPTER).eval()
    idx = torch.tensor([Tokenizer(grown).ids(TEXTS[0])])
    torch.testing.assert_close(adapted(idx).logits, merged(idx).logits, rtol=0, atol=1e-4)


def test_mistakes_are_one_sentence_and_leave_nothing(folder, tmp_path, capsys):
    spm = vocabularies.write(make_checkpoint(tmp_path / "spm"), "sentencepiece")
    (spm / names.TOKENIZER_JSON).unlink()
    capsys.readouterr()
    for source, tokens, flags, said in (
        (folder, None, [], "no tokens to add"),
        (folder, '["<|im_end|>"]', [], "has the token '<|im_end|>' already"),
        (folder, '["a"]', [], "has the token 'a' already"),
        (folder, '["<a>", "<a>"]', [], "twice"),
        (folder, '[" "]', [], "not blank"),
        (folder, TOKENS, ["--padding_multiple", "0"], "`padding_multiple`"),
        (folder, TOKENS, ["--max_shard_size", "many"], "`max_shard_size`"),
        (folder, None, ["--tokens_file", str(tmp_path / "none.txt")], "none.txt"),
        (spm, TOKENS, [], "has only a tokenizer.model"),
        (tmp_path / "nowhere", TOKENS, [], "nowhere"),
    ):
        assert add(source, tmp_path / "out", *flags, tokens=tokens) == 2, said
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0], (lines, said)
        assert not (tmp_path / "out").exists()
