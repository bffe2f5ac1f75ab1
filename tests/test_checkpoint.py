import json
import resource
import signal
from dataclasses import replace

import pytest
import torch
from oracle import pair
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt.checkpoint import load_model, write_checkpoint, write_config
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES
from litgpt.files import atomic_folder
from litgpt.lora import LoRA, LoRALinear, add_lora
from litgpt.model import GPT
from litgpt.weight_files import stored_dtype, write_shards

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@EVERY_FAMILY
@pytest.mark.parametrize("layout", ["single", "shards", "bin"])
@torch.no_grad()
def test_folders_of_transformers_are_read_and_written_back_equal(family, layout, tmp_path):
    config = tiny_config(family)
    _, theirs = pair(config)
    source, written = tmp_path / "theirs", tmp_path / "ours"
    theirs.save_pretrained(source, max_shard_size="20KB" if layout == "shards" else "5GB")
    if layout == "bin":
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        (source / "model.safetensors").unlink()
    model = load_model(source)
    idx = torch.randint(config.vocab_size, (1, 9))
    torch.testing.assert_close(model(idx), theirs(idx).logits, rtol=0, atol=2e-5)
    write_checkpoint(written, model.state_dict(), model.config, source=source)
    again = AutoModelForCausalLM.from_pretrained(written)
    same(again.state_dict(), theirs.state_dict())
    same(load_model(written).state_dict(), model.state_dict())


def lit_folder(path, model, wrap=lambda weights: weights):
    path.mkdir(parents=True)
    torch.save(wrap(model.state_dict()), path / "lit_model.pth")
    model.config.save(path / "model_config.yaml")
    return path


@EVERY_FAMILY
def test_litgpts_folders_are_read_plain_wrapped_compiled_and_of_the_older_layout(family, tmp_path):
    model = GPT(tiny_config(family))
    expected = model.state_dict()
    config = model.config

    def older(weights):
        renamed = {}
        for name, tensor in weights.items():
            if ".attn.qkv." in name:
                blocks = [part.unflatten(0, (config.n_query_groups, -1, config.head_size)) for part in tensor.split(config.qkv_sizes)]
                tensor = torch.cat(blocks, 1).flatten(0, 2)
            renamed[name.replace(".attn.qkv.", ".attn.attn.")] = tensor
        return renamed

    wraps = [
        dict,
        lambda weights: {"model": dict(weights)},
        lambda weights: {"_orig_mod." + name: t for name, t in weights.items()},
        older,
    ]
    for i, wrap in enumerate(wraps):
        same(load_model(lit_folder(tmp_path / str(i), model, wrap)).state_dict(), expected)


def test_litgpts_head_is_tied_only_if_it_equals_the_embedding(tmp_path):
    config = tiny_config(FAMILIES["llama"])
    model = GPT(config)
    assert not load_model(lit_folder(tmp_path / "untied", model)).config.tie_embeddings
    with torch.no_grad():
        model.lm_head.weight.copy_(model.transformer.wte.weight)
    tied = load_model(lit_folder(tmp_path / "tied", model))
    assert tied.lm_head.weight is tied.transformer.wte.weight


@torch.no_grad()
def test_a_head_that_differs_from_the_embedding_is_not_tied_whatever_the_config_says(tmp_path, capsys):
    _, theirs = pair(tiny_config("llama", tie_embeddings=False))
    theirs.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | dict(tie_word_embeddings=True)))
    model, idx = load_model(tmp_path), torch.arange(9).unsqueeze(0)
    assert not model.config.tie_embeddings and "so they are kept apart" in capsys.readouterr().err
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(idx).logits
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_litgpts_lora_files_are_merged_beside_their_base(tmp_path):
    base = lit_folder(tmp_path / "base", GPT(tiny_config(FAMILIES["llama"])))
    model = load_model(base)
    settings = LoRA(r=2, alpha=4, dropout=0.0, key=True, mlp=True)
    add_lora(model, settings)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    torch.save({"model": {n: t for n, t in model.state_dict().items() if "lora_" in n}}, tuned / "lit_model.pth.lora")
    options = dict(checkpoint_dir=str(base), lora_r=2, lora_alpha=4, lora_dropout=0.0, lora_key=True, lora_mlp=True)
    (tuned / "hyperparameters.yaml").write_text(json.dumps(options))
    idx = torch.randint(10, (1, 7))
    torch.testing.assert_close(load_model(tuned)(idx), model.eval()(idx), rtol=0, atol=1e-5)


def test_large_models_are_written_in_shards_with_an_index(tmp_path):
    tensors = {f"w{i}": torch.randn(10, 10) for i in range(7)}
    write_shards(tmp_path, iter(tensors.items()), max_bytes=1000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) == 4 and files[0] == "model-00001-of-00004.safetensors"
    assert index["metadata"]["total_size"] == 2800
    same({name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}, tensors)
    assert not list(tmp_path.glob("shard-*"))


def test_a_config_that_no_family_expresses_is_kept_under_our_own_names(tmp_path):
    config = replace(tiny_config(FAMILIES["llama"]), norm_class_name="LayerNorm")
    assert config.family is None
    model = GPT(config)
    write_checkpoint(tmp_path / "own", model.state_dict(), config)
    assert json.loads((tmp_path / "own" / "config.json").read_text())["model_type"] == "litgpt"
    same(load_model(tmp_path / "own").state_dict(), model.state_dict())


def hf_folder(path):
    _, theirs = pair(tiny_config(FAMILIES["llama"]))
    theirs.save_pretrained(path)
    return path


def test_damaged_folders_are_refused_in_one_sentence(tmp_path):
    for case in ("missing", "cut", "shapes", "lacks", "config"):
        folder = hf_folder(tmp_path / case)
        file = folder / "model.safetensors"
        weights = load_file(file)
        if case == "missing":
            file.unlink()
        elif case == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif case == "shapes":
            save_file(weights | {"model.norm.weight": torch.ones(3)}, file)
        elif case == "lacks":
            weights.pop("model.norm.weight")
            save_file(weights, file)
        else:
            (folder / "config.json").write_text("{")
        with pytest.raises(UserError) as caught:
            load_model(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
        assert isinstance(caught.value, MissingFile) == (case == "missing")


def test_a_step_whose_weights_lie_in_slices_is_read_whole(tmp_path):
    """As two ranks with FSDP2 write it: rows shared out, the optimizer's memory beside them."""
    model = GPT(tiny_config(FAMILIES["llama"]))
    (tmp_path / "run_state").mkdir()
    (tmp_path / "run_state" / "state.json").write_text("{}")
    write_config(tmp_path, model.config, None, torch.float32)
    for rank in (0, 1):
        parts, places = {}, {}
        for name, tensor in model.state_dict().items():
            half = (len(tensor) + 1) // 2
            parts[name] = (tensor[:half] if rank == 0 else tensor[half:]).contiguous()
            parts[f"optimizer/{name}/exp_avg"] = parts[name].clone()
            for key in (name, f"optimizer/{name}/exp_avg"):
                places[key] = {"saved_offsets": [half * rank] + [0] * (tensor.ndim - 1)}
        metadata = {"DCP_SHARDING_INFO": json.dumps(places)}
        save_file(parts, tmp_path / "run_state" / f"shard-{rank:05d}.safetensors", metadata=metadata)
    same(load_model(tmp_path).state_dict(), model.state_dict())


class Runs:
    def __reduce__(self):
        return print, ("this must never run",)


def test_pickles_that_would_run_code_are_refused(tmp_path, capsys):
    folder = lit_folder(tmp_path / "evil", GPT(tiny_config(FAMILIES["llama"])))
    torch.save({"model": Runs()}, folder / "lit_model.pth")
    with pytest.raises(UserError, match="could run any code"):
        load_model(folder)
    assert "never" not in capsys.readouterr().out


def test_a_pickle_cut_anywhere_is_refused(tmp_path):
    folder = lit_folder(tmp_path / "cut", GPT(tiny_config(FAMILIES["llama"])))
    whole = (folder / "lit_model.pth").read_bytes()
    for share in (0, 0.01, 0.5, 0.999):
        (folder / "lit_model.pth").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match="damaged"):
            load_model(folder)


def test_the_stored_dtype_is_that_of_most_weights(tmp_path):
    save_file({"a": torch.zeros(100, dtype=torch.bfloat16), "b": torch.zeros(10)}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.bfloat16


def test_nothing_is_left_of_a_folder_that_could_not_be_finished(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "new") as partial:
        (partial / "file").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept_until_its_replacement_is_complete(tmp_path):
    target = tmp_path / "kept"
    with atomic_folder(target) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(UserError, match="already exists"), atomic_folder(target):
        pass
    with pytest.raises(RuntimeError), atomic_folder(target, overwrite=True):
        raise RuntimeError
    assert (target / "file").read_text() == "old"
    with atomic_folder(target, overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "new" and list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="the disk is full"), atomic_folder(tmp_path / "full") as partial:
        (partial / "file").symlink_to("/dev/full")  # every write to it finds no space
        (partial / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_the_size_that_the_system_allows_are_one_sentence_and_leave_nothing(tmp_path):
    """The nearest to a full disk that a test may bring about: writing past the limit fails in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="could not be written"), atomic_folder(tmp_path / "full") as partial:
            write_shards(partial, iter([("w", torch.zeros(100_000))]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert list(tmp_path.iterdir()) == []
