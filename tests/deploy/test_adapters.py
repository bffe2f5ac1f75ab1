"""Several adapters beside one model: PEFT is the oracle, each row by itself."""

import gc
import json
import shutil
from copy import deepcopy
from functools import cache, lru_cache

import pytest
import torch
import yaml
from oracle import pair
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from transformers import AutoModelForCausalLM

from litgpt import names
from litgpt.checkpoint import load_model, write_adapter
from litgpt.deploy.adapters import AdapterExperts, AdapterIndex, AdapterLinear, Adapters
from litgpt.errors import MissingFile, UserError
from litgpt.families import FAMILIES
from litgpt.lora import LoRA, add_lora
from litgpt.model import GPT
from litgpt.quantize import quantize_model

SOME = r".*(q_proj|query_key_value|qkv_proj|q_b_proj|dense|down_proj|c_attn|c_proj|lm_head)"
OTHERS = r".*(v_proj|k_proj|o_proj|gate_up_proj|gate_proj|up_proj|kv_b_proj|query_key_value|c_fc|fc1|embed_out|dense_h_to_4h|in_proj)"
KINDS = {  # adapters of one test: their names, and what makes them different
    "some": dict(r=3, lora_alpha=5, target_modules=SOME, use_rslora=True),
    "all": dict(r=5, lora_alpha=4, target_modules="all-linear"),
    "others": dict(r=2, lora_alpha=7, target_modules=OTHERS, rank_pattern={"v_proj": 1, "down_proj": 4}, alpha_pattern={"v_proj": 3}),
}
ROUTED = [name for name, family in FAMILIES.items() if family.base.get("mlp_class_name") == "LLaMAMoE"]
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@lru_cache(1)
def read_once(folder):
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def theirs_in(folder):
    """transformers' model of a folder; copies are made much faster than it is read."""
    return deepcopy(read_once(folder))


def write_peft(theirs_folder, folder, **settings):
    """An adapter that PEFT wrote, with an update that matters."""
    tuned = get_peft_model(theirs_in(theirs_folder), LoraConfig(**settings))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    tuned.save_pretrained(folder)


def served(config, tmp_path, **kinds):
    """Our model with these adapters loaded, and what PEFT computes with each of them (None: with none)."""
    ours, theirs = pair(config)
    theirs.save_pretrained(tmp_path / "base")
    adapters = Adapters(ours, tmp_path / "base")
    for name, settings in kinds.items():
        write_peft(tmp_path / "base", tmp_path / name, **settings)
        adapters.load(name, tmp_path / name)

    @cache
    def tuned(name):
        plain = theirs_in(tmp_path / "base")
        return (plain if name is None else PeftModel.from_pretrained(plain, str(tmp_path / name))).eval()

    return adapters, lambda name, idx: tuned(name)(idx).logits


def rows_of(adapters, choice):
    return [0 if name is None else adapters.slot(name) for name in choice]


def per_token(slots, T):
    return [slot for slot in slots for _ in range(T)]


CHOICE = ["others", None, "some", "all", "some"]


@torch.no_grad()
@EVERY_FAMILY
def test_every_row_of_a_batch_is_what_peft_computes_with_its_adapter(family, tmp_path):
    config = tiny_config(family)
    adapters, peft = served(config, tmp_path, **KINDS)
    idx = torch.randint(config.vocab_size, (len(CHOICE), 11))
    adapters.index.set(per_token(rows_of(adapters, CHOICE), 11))
    logits = adapters.model(idx)
    for i, name in enumerate(CHOICE):
        torch.testing.assert_close(logits[i : i + 1], peft(name, idx[i : i + 1]), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ROUTED)
def test_experts_have_the_updates_that_peft_gives_their_parameters(model_type, tmp_path):
    config = tiny_config(model_type)
    common = dict(target_modules=["o_proj"], init_lora_weights=True)
    kinds = {
        "both": dict(r=3, lora_alpha=4, target_parameters=EXPERTS, **common),
        "down": dict(r=2, lora_alpha=6, target_parameters=EXPERTS[1:], use_rslora=True, **common),
        "last": dict(r=1, lora_alpha=2, target_parameters=[f"layers.1.{EXPERTS[0]}"], **common),
    }
    adapters, peft = served(config, tmp_path, **kinds)
    choice, idx = ["last", "both", None, "down", "both"], torch.randint(config.vocab_size, (5, 7))
    adapters.index.set(per_token(rows_of(adapters, choice), 7))
    logits = adapters.model(idx)
    for i, name in enumerate(choice):
        torch.testing.assert_close(logits[i : i + 1], peft(name, idx[i : i + 1]), rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "phi3", "deepseek_v3", "qwen3_next"])
def test_rows_with_dora_stand_beside_rows_without(model_type, tmp_path):
    everywhere, somewhere = ("all-linear", SOME) if model_type not in ROUTED else (r".*attn.*proj.*", r".*(k_proj|kv_b_proj|o_proj)")
    dora = dict(r=3, lora_alpha=5, target_modules=everywhere, use_dora=True, use_rslora=True)
    one = dict(r=2, target_modules=somewhere, use_dora=True)
    config = tiny_config(model_type)
    adapters, peft = served(config, tmp_path, dora=dora, plain=KINDS["some"], one=one)
    choice = ["dora", None, "plain", "one", "dora"]
    idx = torch.randint(config.vocab_size, (len(choice), 9))
    adapters.index.set(per_token(rows_of(adapters, choice), 9))
    logits = adapters.model(idx)
    for i, name in enumerate(choice):
        torch.testing.assert_close(logits[i : i + 1], peft(name, idx[i : i + 1]), rtol=0, atol=5e-5)
    adapters.unload("dora")
    adapters.index.set(per_token(rows_of(adapters, [None, "plain", "one"]), 9))
    torch.testing.assert_close(adapters.model(idx[1:4]), logits[1:4], rtol=0, atol=1e-5)
    for name in ("plain", "one"):
        adapters.unload(name)
    assert not any(isinstance(layer, AdapterLinear) for layer in adapters.model.modules())


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["phi3", "qwen2_moe"])
def test_adapters_stand_beside_quantized_weights_too(model_type, tmp_path):
    config = tiny_config(model_type)
    adapters, _ = served(config, tmp_path)
    for name, settings in {"dora": dict(r=2, target_modules=r".*self_attn.*proj", use_dora=True), "some": KINDS["some"]}.items():
        write_peft(tmp_path / "base", tmp_path / name, **settings)
    quantize_model(adapters.model, "bnb.int8")
    beside = Adapters(adapters.model, tmp_path / "base")
    whole, state = GPT(config).eval(), GPT(config).state_dict()
    layers = dict(adapters.model.named_modules())
    for name in state:
        path, leaf = name.rpartition(".")[::2]
        state[name] = getattr(layers[path], leaf).detach()
    whole.load_state_dict(state)
    expected = Adapters(whole, tmp_path / "base")
    idx = torch.randint(config.vocab_size, (3, 7))
    logits = []
    for each in (beside, expected):
        for name in ("dora", "some"):
            each.load(name, tmp_path / name)
        each.index.set(per_token(rows_of(each, ["some", None, "dora"]), 7))
        logits.append(each.model(idx))
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-5)


# With a cache


CACHED = ["llama", "gemma2", "deepseek_v3", "qwen3_next", "lfm2", "gpt_oss"]  # windows, latents, states, experts


@torch.no_grad()
@pytest.mark.parametrize("model_type", CACHED)
def test_rows_that_a_cache_continues_keep_their_adapters_however_the_calls_are_packed(model_type, tmp_path):
    config = tiny_config(model_type)
    adapters, peft = served(config, tmp_path, **KINDS)
    model, choice, rows = adapters.model, ["others", None, "some", "all"], [3, 0, 2, 4]
    slots = rows_of(adapters, choice)
    cache, texts = model.new_cache(5, 40, rewind=4), [torch.empty(0, dtype=torch.long)] * 4
    for counts, packed in [([9, 3, 6, 12], True), ([1] * 4, True), ([1] * 4, False), ([3, 1, 2, 1], False), ([2, 5, 0, 1], True)]:
        new = [torch.randint(config.vocab_size, (n,)) for n in counts]
        texts = [torch.cat(both) for both in zip(texts, new, strict=True)]
        span = cache.span(counts, rows, packed=packed)
        width = max(counts)
        idx = torch.cat(new).unsqueeze(0) if packed else torch.stack([torch.cat((x, x.new_zeros(width - len(x)))) for x in new])
        each = [slot for slot, n in zip(slots, counts) for _ in range(n if packed else width)]
        seen = [i for i, n in enumerate(counts) if n]
        adapters.index.set(each, [slots[i] for i in seen])
        logits = model(idx, cache=span, select=span.last()[seen])
        for i, made in zip(seen, logits, strict=True):
            torch.testing.assert_close(made, peft(choice[i], texts[i].unsqueeze(0))[0, -1], rtol=0, atol=5e-5)


@torch.no_grad()
def test_latents_of_a_batch_in_which_no_row_has_an_adapter_are_read_as_without_any(tmp_path):
    config = tiny_config("deepseek_v3")
    adapters, peft = served(config, tmp_path, all=KINDS["all"])
    adapters.index.clear()
    cache, idx = adapters.model.new_cache(2, 20), torch.randint(config.vocab_size, (2, 9))
    adapters.model(idx[:, :8], cache=cache)
    torch.testing.assert_close(adapters.model(idx[:, 8:], cache=cache)[:, 0], peft(None, idx)[:, -1], rtol=0, atol=2e-5)


# One beside the other


@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_nor_on_what_else_is_loaded(tmp_path):
    config = tiny_config("llama")
    adapters, _ = served(config, tmp_path, **KINDS)
    model, idx = adapters.model, torch.randint(config.vocab_size, (5, 8))
    adapters.index.set(per_token(rows_of(adapters, CHOICE), 8))
    together = model(idx)
    for i, name in enumerate(CHOICE):
        adapters.index.set(rows_of(adapters, [name]) * 8)
        torch.testing.assert_close(model(idx[i : i + 1]), together[i : i + 1], rtol=0, atol=2e-6)
    adapters.unload("all")
    adapters.unload("others")
    adapters.index.set([adapters.slot("some")] * 8)
    torch.testing.assert_close(model(idx[2:3]), together[2:3], rtol=0, atol=2e-6)


@torch.no_grad()
def test_an_adapter_whose_products_overflow_hurts_only_its_own_rows(tmp_path):
    config = tiny_config("llama")
    adapters, peft = served(config, tmp_path, some=KINDS["some"], huge=KINDS["all"])
    updates = {name: update._replace(A=update.A.sign() * 3e38) for name, update in adapters.read(tmp_path / "huge").items()}
    adapters.unload("huge")
    adapters.install("huge", updates)
    idx = torch.randint(config.vocab_size, (3, 6))
    adapters.index.set(per_token(rows_of(adapters, ["some", "huge", None]), 6))
    logits = adapters.model(idx)
    assert not logits[1].isfinite().all()
    torch.testing.assert_close(logits[:1], peft("some", idx[:1]), rtol=0, atol=2e-5)
    torch.testing.assert_close(logits[2:], peft(None, idx[2:]), rtol=0, atol=2e-5)


@torch.no_grad()
def test_adapters_come_and_go_while_others_are_in_use(tmp_path):
    config = tiny_config("qwen2")
    adapters, peft = served(config, tmp_path, **KINDS)
    model, text = adapters.model, torch.randint(config.vocab_size, (1, 12))
    used, cache = adapters.slot("some"), model.new_cache(1, 12)
    changes = [lambda: adapters.unload("all"), lambda: adapters.load("again", tmp_path / "all"), lambda: adapters.unload("others")] * 4
    for i in range(12):
        adapters.index.set([used])
        logits = model(text[:, i : i + 1], cache=cache)
        if i < 3:
            changes[i]()
    torch.testing.assert_close(logits[:, -1], peft("some", text)[:, -1], rtol=0, atol=2e-5)
    assert adapters.names == ["some", "again"]


def tensors_alive():
    gc.collect()
    return sum(x.numel() for x in gc.get_objects() if isinstance(x, torch.Tensor) and x.layout == torch.strided)


@torch.no_grad()
def test_a_hundred_cycles_leave_nothing_behind_and_the_plain_layers_where_they_were(tmp_path):
    config = tiny_config("deepseek_v3")
    adapters, peft = served(config, tmp_path, all=KINDS["all"])
    adapters.unload("all")
    updates, model = adapters.read(tmp_path / "all"), adapters.model
    layers, idx, alive = dict(model.named_modules()), torch.randint(config.vocab_size, (1, 5)), []
    for i in range(100):
        alive.append(tensors_alive() if i in (1, 99) else None)
        adapters.install(f"a{i}", updates)
        adapters.install(f"b{i}", updates)
        adapters.index.set([adapters.slot(f"b{i}")] * 5)
        model(idx)
        adapters.unload(f"a{i}")
        adapters.unload(f"b{i}")
    assert alive[1] == alive[99]
    assert dict(model.named_modules()) == layers
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    torch.testing.assert_close(model(idx), peft(None, idx), rtol=0, atol=2e-5)


def test_a_slot_is_never_given_twice(tmp_path):
    adapters, _ = served(tiny_config("llama"), tmp_path, some=KINDS["some"])
    first = adapters.slot("some")
    adapters.unload("some")
    adapters.load("some", tmp_path / "some")
    assert adapters.slot("some") not in (0, first)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "deepseek_v3"])
def test_the_weights_keep_their_names_and_values_beside_adapters(model_type, tmp_path):
    config = tiny_config(model_type)
    adapters, _ = served(config, tmp_path)
    before = adapters.model.state_dict()
    for name, settings in KINDS.items():
        write_peft(tmp_path / "base", tmp_path / name, **settings)
        adapters.load(name, tmp_path / name)
    assert any(isinstance(layer, AdapterLinear) for layer in adapters.model.modules())
    after = adapters.model.state_dict()
    assert after.keys() == before.keys() and all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert [name for name, _ in adapters.model.named_parameters()] == [name for name, _ in GPT(config).named_parameters()]


@torch.no_grad()
def test_only_layers_that_an_adapter_updates_are_wrapped(tmp_path):
    adapters, _ = served(tiny_config("llama"), tmp_path, one=dict(r=2, target_modules=["layers.1.self_attn.v_proj"]))
    wrapped = [name for name, layer in adapters.model.named_modules() if isinstance(layer, AdapterLinear | AdapterExperts)]
    assert wrapped == ["transformer.h.1.attn.qkv"]


def test_a_call_of_another_size_than_the_index_says_is_a_bug_that_shows(tmp_path):
    adapters, _ = served(tiny_config("llama"), tmp_path, some=KINDS["some"])
    adapters.index.set([adapters.slot("some")] * 4)
    with pytest.raises(AssertionError, match="4 slots are set, but the layer sees 5 tokens"):
        adapters.model(torch.zeros(1, 5, dtype=torch.long))


# What adapters are read


EVERYTHING = LoRA(r=2, alpha=6, dropout=0.0, query=True, key=True, value=True, projection=True, mlp=True, head=True)
SETTINGS = {
    "everything": EVERYTHING,
    "q and v": LoRA(r=3, alpha=4, dropout=0.0),
    "dora of q and v": LoRA(r=3, alpha=4, dropout=0.0, dora=True, rslora=True),
}


def trained(folder, settings):
    """A model of a folder with LoRA layers whose updates matter."""
    model = load_model(folder)
    add_lora(model, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name and name.endswith("B"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif name.endswith("lora_magnitude"):
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt_neox", "deepseek_v3", "qwen3_moe", "gemma"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_is_served_equals_what_is_trained_and_what_is_merged(model_type, settings, tmp_path):
    config = tiny_config(model_type)
    adapters, _ = served(config, tmp_path)
    tuned = trained(tmp_path / "base", settings)
    litgpt = tmp_path / "litgpt"
    litgpt.mkdir()
    torch.save({n: t for n, t in tuned.state_dict().items() if "lora_" in n}, litgpt / names.LIT_LORA)
    options = {f"lora_{name}": value for name, value in vars(settings).items()}
    (litgpt / names.HYPERPARAMETERS).write_text(yaml.safe_dump(dict(checkpoint_dir="nowhere") | options))
    (tmp_path / "run").mkdir()
    write_adapter(tmp_path / "run" / names.ADAPTER, tuned, settings, "nowhere")
    idx = torch.randint(config.vocab_size, (2, 9))
    step = tmp_path / "step-000001"
    (step / names.RUN_STATE).mkdir(parents=True)
    (step / names.RUN_STATE / names.STATE).write_text("{}")
    shard = {name: tensor.contiguous() for name, tensor in tuned.state_dict().items() if "lora_" in name}
    places = json.dumps({name: {"saved_offsets": [0] * tensor.ndim} for name, tensor in shard.items()})
    save_file(shard, step / names.RUN_STATE / "shard-00000.safetensors", metadata={"DCP_SHARDING_INFO": places})
    shutil.copy(litgpt / names.HYPERPARAMETERS, step)
    for folder in (litgpt, step, tmp_path / "run"):
        adapters.load(folder.name, folder)
        adapters.index.set(per_token([adapters.slot(folder.name), 0], 9))
        logits = adapters.model(idx)
        torch.testing.assert_close(logits[:1], tuned(idx[:1]), rtol=0, atol=2e-5)
    merged = load_model(tmp_path / "base", adapter=litgpt)
    torch.testing.assert_close(logits[:1], merged(idx[:1]), rtol=0, atol=2e-5)
    adapters.index.clear()
    torch.testing.assert_close(logits[1:], adapters.model(idx[1:]), rtol=0, atol=1e-5)


OTHER_NAMES = [(family.model_type, *family.prefixes[0]) for family in FAMILIES.values() if family.prefixes]


@torch.no_grad()
@pytest.mark.parametrize("model_type, theirs, usual", OTHER_NAMES)
def test_layers_that_an_adapter_calls_as_another_class_of_model_does_are_found(model_type, theirs, usual, tmp_path):
    config = tiny_config(model_type)
    adapters, peft = served(config, tmp_path, all=KINDS["some"])
    copy, start = shutil.copytree(tmp_path / "all", tmp_path / "copy"), "base_model.model."
    tensors = load_file(copy / names.ADAPTER_WEIGHTS)
    renamed = {name.replace(start + usual, start + theirs): tensor.clone() for name, tensor in tensors.items()}
    save_file(renamed, copy / names.ADAPTER_WEIGHTS)
    adapters.load("copy", copy)
    idx = torch.randint(config.vocab_size, (1, 7))
    adapters.index.set([adapters.slot("copy")] * 7)
    torch.testing.assert_close(adapters.model(idx), peft("all", idx), rtol=0, atol=2e-5)


@torch.no_grad()
def test_updates_of_parts_that_are_not_computed_are_named_and_left_out(tmp_path, capsys):
    config = tiny_config("gemma3_text")
    adapters, peft = served(config, tmp_path, all=KINDS["some"])
    copy = shutil.copytree(tmp_path / "all", tmp_path / "copy")
    eyes = {f"base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    save_file(load_file(copy / names.ADAPTER_WEIGHTS) | eyes, copy / names.ADAPTER_WEIGHTS)
    adapters.load("copy", copy)
    assert "Skipped 1 updates of other parts, first model.vision_tower" in capsys.readouterr().err
    idx = torch.randint(config.vocab_size, (1, 7))
    adapters.index.set([adapters.slot("copy")] * 7)
    torch.testing.assert_close(adapters.model(idx), peft("all", idx), rtol=0, atol=2e-5)


@torch.no_grad()
def test_separate_experts_may_have_updates_of_different_ranks_beside_one_of_the_stack(tmp_path):
    config = tiny_config("qwen3_moe")
    adapters, _ = served(config, tmp_path)
    folder = tmp_path / "adapter"
    folder.mkdir()
    start = "base_model.model.model.layers.1.mlp.experts"
    sizes = {"3.down_proj": (2, 24, 32), "0.up_proj": (1, 32, 24), "0.gate_proj": (3, 32, 24), "1.down_proj": (4, 24, 32)}
    factors = {name: (torch.randn(r, inner), torch.randn(outer, r)) for name, (r, inner, outer) in sizes.items()}
    stack = torch.randn(4 * 2, 24), torch.randn(32, 2 * 4)
    tensors = {f"{start}.{name}.lora_{x}.weight": t for name, both in factors.items() for x, t in zip("AB", both)}
    save_file(tensors | {f"{start}.lora_{x}.weight": t for x, t in zip("AB", stack)}, folder / names.ADAPTER_WEIGHTS)
    described = dict(peft_type="LORA", r=2, lora_alpha=4, target_parameters=["experts.down_proj"])
    (folder / names.ADAPTER_CONFIG).write_text(json.dumps(described))
    adapters.load("x", folder)
    merged = load_model(tmp_path / "base", adapter=folder)
    idx = torch.randint(config.vocab_size, (2, 9))
    adapters.index.set([adapters.slot("x")] * 18)
    torch.testing.assert_close(adapters.model(idx), merged(idx), rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_beside_a_bf16_model_logits_keep_its_type_and_are_as_near_as_those_of_the_merged_one(model_type, tmp_path):
    config = tiny_config(model_type)
    adapters, peft = served(config, tmp_path)
    model = adapters.model.bfloat16()
    for name in ("some", "all"):
        write_peft(tmp_path / "base", tmp_path / name, **KINDS[name])
        adapters.load(name, tmp_path / name)
    idx = torch.randint(config.vocab_size, (8, 15))
    adapters.index.set(per_token(rows_of(adapters, ["all", "some"] * 4), 15))
    logits, exact = model(idx)[1::2], peft("some", idx[1::2])
    merged = load_model(tmp_path / "base", torch.bfloat16, adapter=tmp_path / "some")(idx[1::2])
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - exact).norm(dim=-1).median() < 1.5 * (merged.float() - exact).norm(dim=-1).median()


# What is refused


@pytest.fixture
def loaded(tmp_path):
    return served(tiny_config("llama"), tmp_path, some=KINDS["some"])[0]


@pytest.mark.parametrize("name", ["", "a b", "x" * 97, "ü", "a\n", "some", "a?b"])
def test_names_that_are_none_or_taken_are_refused(loaded, name, tmp_path):
    with pytest.raises(UserError, match="An adapter"):
        loaded.load(name, tmp_path / "some")
    assert loaded.names == ["some"]


def test_no_more_than_fit_are_loaded_and_unknown_ones_are_named(loaded, tmp_path):
    loaded.max_adapters = 2
    loaded.load("Org/name:v1.0-x_y", tmp_path / "some")
    with pytest.raises(UserError, match="At most 2"):
        loaded.load("third", tmp_path / "some")
    for ask in (loaded.slot, loaded.unload):
        with pytest.raises(UserError, match="no adapter 'sone'. Did you mean 'some'"):
            ask("sone")
    loaded.unload("some")
    loaded.load("third", tmp_path / "some")


def broken(folder, what):
    """Make an adapter's folder one that cannot be served, and return what has to be said about it."""
    file, described = folder / names.ADAPTER_WEIGHTS, json.loads((folder / names.ADAPTER_CONFIG).read_text())
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    name = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_A" in name)
    message = "q_proj"
    match what:
        case "not finite":
            tensors[name][0, 0] = float("nan")
            message = "attn.qkv.weight.*not finite"
        case "too wide":
            tensors[name] = torch.cat((tensors[name], tensors[name]), 1)
        case "of a deeper model":
            tensors = {name.replace("layers.1.", "layers.99."): tensor for name, tensor in tensors.items()}
            message = r"layers\.99"
        case "of an unknown layer":
            tensors = {name.replace("q_proj", "xq_proj"): tensor for name, tensor in tensors.items()}
            message = "xq_proj"
        case "of a norm":
            tensors |= {f"base_model.model.model.norm.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
            message = "model.norm"
        case "of the embedding":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.ones(2, 96)
            message = "embed_tokens"
        case "DoRA":
            described["use_dora"] = True
            message = "use_dora"
    save_file(tensors, file)
    (folder / names.ADAPTER_CONFIG).write_text(json.dumps(described))
    return message


BROKEN = ["not finite", "too wide", "of a deeper model", "of an unknown layer", "of a norm", "of the embedding", "DoRA"]


@torch.no_grad()
@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_adapter_is_one_sentence_and_leaves_everything_as_it_was(loaded, what, tmp_path):
    bad = shutil.copytree(tmp_path / "some", tmp_path / "bad")
    message, layers, idx = broken(bad, what), dict(loaded.model.named_modules()), torch.randint(96, (1, 7))
    loaded.index.set([loaded.slot("some")] * 7)
    before = loaded.model(idx)
    with pytest.raises(UserError, match=message) as caught:
        loaded.load("bad", bad)
    assert "\n" not in str(caught.value)
    assert loaded.names == ["some"] and dict(loaded.model.named_modules()) == layers
    assert torch.equal(loaded.model(idx), before)


def test_folders_without_updates_are_refused(loaded, tmp_path):
    with pytest.raises(MissingFile):
        loaded.load("x", tmp_path / "nowhere")
    with pytest.raises(UserError, match="no LoRA updates"):
        loaded.load("x", tmp_path / "base")


def test_an_adapter_that_updates_nothing_wraps_nothing(loaded, tmp_path):
    file = shutil.copytree(tmp_path / "some", tmp_path / "zero") / names.ADAPTER_WEIGHTS
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    loaded.unload("some")
    loaded.load("zero", tmp_path / "zero")
    assert not any(isinstance(layer, AdapterLinear) for layer in loaded.model.modules())


def test_no_slots_are_set_at_the_start():
    index = AdapterIndex()
    assert not index.tokens.used and index.selected is index.tokens
