"""A multimodal model stays one: its text part is trained or converted, and the other parts are copied."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_multimodal import seeing_model
from tiny import tiny_config
from transformers import Gemma3ForConditionalGeneration, Mistral3Config, Mistral3ForConditionalGeneration

from litgpt import cli, names
from litgpt.checkpoint import load_model, write_adapter, write_checkpoint, write_config
from litgpt.lora import LoRA, LoRALinear, add_lora, merge_lora_weights
from litgpt.model import GPT

PIXTRAL = dict(model_type="pixtral", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8)


def seeing_mistral(**changes):
    text = tiny_config("mistral", **changes).to_hf()
    vision = PIXTRAL | dict(image_size=28, patch_size=14)
    tie = text["tie_word_embeddings"]
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=90, tie_word_embeddings=tie)
    return Mistral3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


KINDS = {"gemma3": (seeing_model, Gemma3ForConditionalGeneration), "mistral3": (seeing_mistral, Mistral3ForConditionalGeneration)}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
SEEN = ("vision_tower.", "multi_modal_projector.")


def source_of(kind, folder, **changes):
    """A multimodal checkpoint that transformers wrote, with a processor's file."""
    KINDS[kind][0](**changes).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size":  28}')
    return folder


def loads_whole(kind, folder):
    """What transformers makes of a folder, of which it misses nothing and uses everything."""
    model, info = KINDS[kind][1].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def stored(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@EVERY_KIND
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_an_export_is_the_whole_model_with_its_own_names_and_the_new_text_part(kind, tied, tmp_path):
    source = source_of(kind, tmp_path / "source", tie_embeddings=tied)
    model = load_model(source)
    with torch.no_grad():
        model.transformer.h[0].mlp.proj.weight.zero_()
    write_checkpoint(tmp_path / "out", model.state_dict(), model.config, source=source)
    before, after = stored(source), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert [name.endswith("layers.0.mlp.down_proj.weight") for name in changed] == [True]
    loads_whole(kind, tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_bytes() == (source / "preprocessor_config.json").read_bytes()
    said, wrote = (json.loads((folder / names.CONFIG).read_text()) for folder in (source, tmp_path / "out"))
    assert (wrote["model_type"], wrote["vision_config"]) == (kind, said["vision_config"])
    assert load_model(tmp_path / "out").config.tie_embeddings is tied


@EVERY_KIND
def test_what_is_left_out_is_named_once_in_one_line(kind, tmp_path, capsys):
    source = source_of(kind, tmp_path)
    n = sum(any(part in name for part in SEEN) for name in stored(source))
    capsys.readouterr()
    load_model(source)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"Skipped {n} weights of other parts: ")
    assert "vision_tower" in lines[0] and "multi_modal_projector" in lines[0]


@EVERY_KIND
def test_a_head_that_becomes_a_weight_of_its_own_is_so_in_the_whole_model(kind, tmp_path):
    source = source_of(kind, tmp_path / "source", tie_embeddings=True)
    model = load_model(source)
    add_lora(model, LoRA(r=2, dropout=0.0, head=True))
    torch.nn.init.normal_(model.lm_head.lora_B)
    merge_lora_weights(model)
    write_checkpoint(tmp_path / "out", model.state_dict(), model.config, source=source)
    theirs, ours = loads_whole(kind, tmp_path / "out"), load_model(tmp_path / "out")
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight) and torch.equal(ours.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)


@EVERY_KIND
def test_without_the_whole_model_its_text_part_is_written_as_a_model(kind, tmp_path):
    source = source_of(kind, tmp_path / "source")
    model = load_model(source)
    text = model.config.family
    save_file(
        {name: tensor for name, tensor in stored(source).items() if not any(part in name for part in SEEN)}, source / names.SAFETENSORS
    )
    for i, origin in enumerate((None, source, tmp_path)):
        out = tmp_path / f"out-{i}"
        write_checkpoint(out, model.state_dict(), model.config, source=origin)
        assert json.loads((out / names.CONFIG).read_text())["model_type"] == text
        assert not any(part in name for name in stored(out) for part in SEEN)


def step_of(run, source, model, updates):
    """A step of a run that began with `source`, as training writes it."""
    (run / names.RUN_STATE).mkdir(parents=True)
    (run / names.RUN_STATE / names.STATE).write_text("{}")
    places = json.dumps({name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in updates.items()})
    file = run / names.RUN_STATE / "shard-00000.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in updates.items()}, file, metadata={"DCP_SHARDING_INFO": places})
    write_config(run, model.config, source, torch.float32)
    (run / names.HYPERPARAMETERS).write_text(json.dumps(dict(checkpoint_dir=str(source), lora_r=2, lora_dropout=0.0)))
    return run


def test_steps_of_runs_are_exported_as_the_model_that_the_run_began_with_while_it_is_there(tmp_path):
    source = source_of("gemma3", tmp_path / "source")
    model = load_model(source)
    tied = dict(model.state_dict())
    tied.pop("lm_head.weight")
    full = step_of(tmp_path / "full", source, model, tied)
    assert cli.main(["convert_from_litgpt", str(full), str(tmp_path / "whole")]) == 0
    loads_whole("gemma3", tmp_path / "whole")
    add_lora(model, LoRA(r=2, dropout=0.0))
    tuned = step_of(tmp_path / "lora", source, model, {n: t for n, t in model.state_dict().items() if "lora_" in n})
    assert cli.main(["merge_lora", str(tuned)]) == 0
    loads_whole("gemma3", tuned)
    source.rename(tmp_path / "moved")
    again = step_of(tmp_path / "again", source, load_model(tmp_path / "moved"), tied)
    assert cli.main(["convert_from_litgpt", str(again), str(tmp_path / "text")]) == 0
    assert json.loads((tmp_path / "text" / names.CONFIG).read_text())["model_type"] == "gemma3_text"


def test_adapters_are_merged_into_the_whole_model_wherever_it_is(tmp_path):
    source = source_of("gemma3", tmp_path / "source")
    model = load_model(source)
    add_lora(model, lora := LoRA(r=2, dropout=0.0))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, lora, str(source))
    source.rename(tmp_path / "moved")
    assert cli.main(["merge_lora", str(tmp_path / "adapter"), "--pretrained_checkpoint_dir", str(tmp_path / "moved")]) == 0
    merged = stored(tmp_path / "moved").keys()
    assert {name for name in stored(tmp_path / "adapter") if "lora_" not in name} == merged
    idx = torch.randint(80, (1, 9))
    torch.testing.assert_close(load_model(tmp_path / "adapter")(idx), model.eval()(idx), rtol=0, atol=1e-4)


def test_a_model_of_another_shape_gets_nothing_of_the_source(tmp_path):
    """As where only the tokenizer is that of a multimodal model."""
    source = source_of("gemma3", tmp_path / "source")
    config = tiny_config("gemma3_text", n_layer=1)
    write_checkpoint(tmp_path / "out", GPT(config).state_dict(), config, source=source)
    assert json.loads((tmp_path / "out" / names.CONFIG).read_text())["model_type"] == "gemma3_text"
