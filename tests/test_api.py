import math

import pytest
import torch
from speaking import exact_llm, make_checkpoint, make_tokenizer
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from litgpt.adapter_v2 import add_adapter_v2, is_new
from litgpt.api import LLM, Preprocessor, benchmark_dict_to_markdown_table, calculate_number_of_devices
from litgpt.checkpoint import load_model, write_adapter
from litgpt.errors import UserError
from litgpt.lora import LoRA, LoRALinear, add_lora, merge_lora_weights
from litgpt.model import GPT
from litgpt.prompts import Alpaca, load_prompt_style

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Again"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("api") / "model")


@pytest.fixture
def llm(folder):
    return exact_llm(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def their_answer(theirs, folder, prompt, n=20):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    new = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=n, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return new[0, len(ids) :], tokenizer


# Generating


@pytest.mark.parametrize("prompt", ["Hello", MESSAGES], ids=["text", "messages"])
def test_the_answer_is_that_of_transformers_as_text_as_ids_and_streamed(llm, theirs, folder, prompt):
    ids, tokenizer = their_answer(theirs, folder, prompt)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    kwargs = dict(max_new_tokens=20, temperature=0.0)
    assert llm.generate(prompt, **kwargs) == text
    assert torch.equal(llm.generate(prompt, **kwargs, return_as_token_ids=True), ids)
    pieces = list(llm.generate(prompt, **kwargs, stream=True))
    assert "".join(pieces) == text
    assert len(pieces) > 3
    streamed = list(llm.generate(prompt, **kwargs, stream=True, return_as_token_ids=True))
    assert torch.equal(torch.cat(streamed), ids[ids != tokenizer.eos_token_id])
    assert streamed[0].shape == (1,)


def test_an_answer_ends_at_every_end_token_that_the_folder_lists(theirs, tmp_path):
    folder = make_checkpoint(tmp_path / "ends")
    ids, _ = their_answer(theirs, folder, "Hello")
    end = ids[6].item()
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [0, {end}]}}')
    llm = LLM.load(folder, distribute=None)
    llm.distribute(precision="32-true")
    answer = llm.generate("Hello", max_new_tokens=20, temperature=0.0, return_as_token_ids=True).tolist()
    assert answer == ids[: ids.tolist().index(end) + 1].tolist()


def test_a_system_prompt_changes_the_answer(llm, theirs, folder):
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hello"}]
    ids, tokenizer = their_answer(theirs, folder, messages)
    answer = llm.generate("Hello", sys_prompt="Rhyme.", max_new_tokens=20, temperature=0.0)
    assert answer == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_seed_or_torchs_seed_repeats_an_answer(llm):
    assert llm.generate("Hi", seed=3) == llm.generate("Hi", seed=3) != llm.generate("Hi", seed=4)
    torch.manual_seed(5)
    first, second = llm.generate("Hi"), llm.generate("Hi")
    torch.manual_seed(5)
    assert (llm.generate("Hi"), llm.generate("Hi")) == (first, second)
    assert first != second


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(max_new_tokens=0), "`max_new_tokens`.*0"),
        (dict(top_k=0), "`top_k`.*0"),
        (dict(top_p=7), "`top_p` is a probability.*7"),
        (dict(temperature=-1), "`temperature`.*-1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_arguments_are_refused_by_the_call_itself(llm, arguments, said, stream):
    with pytest.raises(UserError, match=said):
        llm.generate("Hello", stream=stream, **arguments)


def test_a_prompt_longer_than_the_context_names_both_numbers(llm):
    with pytest.raises(UserError, match=r"has \d+ tokens.* 256 tokens"):
        llm.generate("llama " * 500)


def test_a_fixed_memory_is_kept_between_calls_and_gives_the_same_answers(llm):
    expected = [llm.generate(prompt, temperature=0.0) for prompt in ("Hello", "What food?")]
    llm.distribute(precision="32-true", fixed_kv_cache_size=128)
    assert not llm.kv_cache_initialized
    assert [llm.generate(prompt, temperature=0.0) for prompt in ("Hello", "What food?")] == expected
    cache = llm._cache
    assert llm.kv_cache_initialized
    first, second = llm.generate("Hello", temperature=0.0, stream=True), llm.generate("What food?", temperature=0.0, stream=True)
    mixed = list(zip(first, second, strict=False))  # two answers at a time do not share it
    assert [expected[i].startswith("".join(pair[i] for pair in mixed)) for i in (0, 1)] == [True, True]
    assert llm.generate("Hello", temperature=0.0) == expected[0]
    assert cache.length == 128
    with pytest.raises(UserError, match="`fixed_kv_cache_size` leaves room for 128"):
        llm.generate("llama " * 100)
    llm.distribute(fixed_kv_cache_size="max_model_supported")
    assert llm.fixed_kv_cache_size == 256


# Loading and distributing


def test_a_model_with_random_weights_generates_and_is_saved(tmp_path):
    make_tokenizer(tmp_path / "tokens")
    torch.manual_seed(0)
    llm = LLM.load("pythia-14m", init="random", tokenizer_dir=tmp_path / "tokens")
    assert llm.checkpoint_dir is None
    assert isinstance(llm.generate("Hello", max_new_tokens=3), str)
    llm.save(tmp_path / "saved")
    again = LLM.load(tmp_path / "saved", distribute=None)
    again.distribute(precision="32-true")
    llm.distribute(precision="32-true")
    assert again.generate("Hello", max_new_tokens=5, temperature=0.0) == llm.generate("Hello", max_new_tokens=5, temperature=0.0)
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(model="pythia-14m", init="random"), "tokenizer_dir"),
        (dict(model="pythia-15m", init="random", tokenizer_dir="FOLDER"), "Did you mean 'pythia-"),
        (dict(model="FOLDER", init="fresh"), "'pretrained' or 'random'"),
        (dict(model="FOLDER", distribute="all"), "'auto' or None"),
        (dict(model="no/such/folder/here"), "no/such/folder/here"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(folder, arguments, said):
    arguments = {name: folder if value == "FOLDER" else value for name, value in arguments.items()}
    with pytest.raises(UserError, match=said):
        LLM.load(**arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(devices=0), "`devices`.*0"),
        (dict(devices=2, accelerator="cpu"), "`devices` 2"),
        (dict(accelerator="gpuu"), "`accelerator`"),
        (dict(precision="fp8"), "`precision`.*'fp8'"),
        (dict(precision=16), "`precision`.*got 16"),
        (dict(quantize="bnb.nf3"), "`quantize` is one of bnb.nf4"),
        (dict(generate_strategy="sequential"), "`generate_strategy`"),
        (dict(fixed_kv_cache_size=100_000), "`fixed_kv_cache_size`.*100000"),
    ],
)
def test_what_cannot_be_distributed_is_one_sentence(llm, arguments, said):
    with pytest.raises(UserError, match=said):
        llm.distribute(**arguments)


def test_a_model_that_is_not_loaded_says_how_to_load_it(folder):
    llm = LLM.load(folder, distribute=None)
    for use in (lambda: llm.generate("Hello"), lambda: llm(torch.tensor([[1]])), lambda: llm.save("x"), lambda: llm.load_state_dict({})):
        with pytest.raises(UserError, match=r"\.distribute\(\)"):
            use()
    assert llm.state_dict() == {}


def test_distribute_keeps_changes_in_memory_and_casts_only_if_asked(llm):
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(2)
    changed = llm.model.lm_head.weight.clone()
    llm.distribute(accelerator="cpu", devices=1)
    assert torch.equal(llm.model.lm_head.weight, changed)
    llm.distribute(precision="bf16-true")
    assert {parameter.dtype for parameter in llm.parameters()} == {torch.bfloat16}
    assert isinstance(llm.generate("Hello", max_new_tokens=3), str)


def test_another_precision_leaves_alone_what_has_to_be_exact(tmp_path):
    config = tiny_config("deepseek_v3")
    llm = LLM(GPT(config), Preprocessor(None), Alpaca(), config, None, tmp_path)
    add_adapter_v2(llm.model)
    before = {name: tensor.clone() for name, tensor in llm.state_dict().items()}
    llm.distribute(accelerator="cpu", precision="bf16-true")
    exact = {name for name in before if is_new(name) or name.endswith(".correction")}
    assert any(name.endswith(".correction") for name in exact) and any(name.endswith("adapter_scale") for name in exact)
    for name, tensor in llm.state_dict().items():
        assert tensor.dtype == (torch.float32 if name in exact else torch.bfloat16), name
        assert name not in exact or torch.equal(tensor, before[name])


# Training


def test_forward_returns_logits_and_the_loss_of_transformers(llm, theirs):
    ids = torch.randint(3, 200, (2, 9))
    targets = ids.clone()
    targets[0, :4] = -100
    expected = theirs(ids, labels=targets)
    logits, loss = llm(ids, targets)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(llm(ids), logits)
    _, custom = llm(ids, targets, loss_fn=lambda predictions, wanted: predictions.sum() + wanted.sum())
    torch.testing.assert_close(custom, logits[:, :-1].sum() + targets[:, 1:].sum())


def test_a_loss_of_no_targets_is_zero(llm):
    _, loss = llm(torch.tensor([[5, 6, 7]]), torch.full((1, 3), -100))
    assert loss.item() == 0.0


def test_the_state_is_the_models_own_also_inside_another_module(llm):
    assert llm.state_dict().keys() == llm.model.state_dict().keys()
    outer = torch.nn.ModuleDict({"llm": llm})
    state = outer.state_dict()
    assert set(state) == {f"llm.{name}" for name in llm.model.state_dict()}
    changed = {name: tensor + 1 for name, tensor in state.items()}
    outer.load_state_dict(dict(changed))
    assert all(torch.equal(tensor, changed[name]) for name, tensor in outer.state_dict().items())
    llm.load_state_dict({name.removeprefix("llm."): tensor for name, tensor in state.items()})
    assert torch.equal(llm.model.lm_head.weight, state["llm.lm_head.weight"])


def test_trainer_setup_loads_fp32_weights_that_train(folder, llm, tmp_path):
    trained = LLM.load(folder, distribute=None)
    trained.trainer_setup()
    assert trained.model.training
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert all(torch.equal(tensor, llm.state_dict()[name]) for name, tensor in trained.state_dict().items())
    _, loss = trained(torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7]]))
    loss.backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    torch.save({"state_dict": torch.nn.ModuleDict({"llm": trained}).state_dict()}, tmp_path / "trainer.ckpt")
    again = LLM.load(folder, distribute=None)
    again.trainer_setup(tmp_path / "trainer.ckpt")
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in again.state_dict().items())
    again.distribute()
    assert not again.model.training
    for file, content in (("other.ckpt", {"state_dict": {"llm.x": torch.ones(1)}}), ("no.ckpt", [1]), ("odd.ckpt", {"state_dict": {3: 4}})):
        torch.save(content, tmp_path / file)
        with pytest.raises(UserError, match=file):
            again.trainer_setup(tmp_path / file)
    with pytest.raises(UserError, match=r"gone\.ckpt"):
        again.trainer_setup(tmp_path / "gone.ckpt")


# Saving and measuring


def test_a_saved_model_loads_in_transformers_with_style_and_tokenizer(llm, tmp_path):
    llm.prompt_style = Alpaca()
    with torch.no_grad():
        llm.model.lm_head.weight.mul_(2)
    llm.save(tmp_path / "saved")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.randint(3, 200, (1, 7))
    torch.testing.assert_close(theirs(ids).logits, llm(ids), rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|im_end|>"
    assert isinstance(load_prompt_style(tmp_path / "saved"), Alpaca)
    again = LLM.load(tmp_path / "saved", distribute=None)
    assert isinstance(again.prompt_style, Alpaca)
    llm.save(tmp_path / "other", prompt_style="llama3")
    assert type(LLM.load(tmp_path / "other", distribute=None).prompt_style).__name__ == "Llama3"
    with pytest.raises(UserError, match="already exists"):
        llm.save(tmp_path / "saved")


def test_another_tokenizer_is_saved_in_place_of_the_models_own(folder, tmp_path):
    make_tokenizer(tmp_path / "tokens", template=None)
    (tmp_path / "tokens" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    llm = LLM.load(folder, tokenizer_dir=tmp_path / "tokens")
    llm.save(tmp_path / "saved")
    assert LLM.load(tmp_path / "saved", distribute=None).tokenizer.eos_token == "<|endoftext|>"


def test_a_benchmark_generates_once_for_each_iteration(llm):
    calls = []
    llm.model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[1]))
    text, results = llm.benchmark(num_iterations=3, prompt="Hello", max_new_tokens=5, temperature=0.0)
    assert text == llm.generate("Hello", max_new_tokens=5, temperature=0.0)
    assert len(calls) == 20
    assert results["Tokens generated"] == [5, 5, 5]
    assert all(len(values) == 3 for values in results.values())
    for total, first, n, speed in zip(*list(results.values())[:4], strict=True):
        assert 0 < first < total
        assert math.isclose(speed, n / total)
    ids, _ = llm.benchmark(prompt="Hello", max_new_tokens=5, temperature=0.0, return_as_token_ids=True, stream=True)
    assert ids.shape == (5,)


def test_the_table_of_a_benchmark_has_litgpts_layout():
    table = benchmark_dict_to_markdown_table({"Seconds total": [0.5, 1.5], "Tokens generated": [7]})
    assert table == (
        "| Metric                              | Mean                        | Std Dev                     |\n"
        "|-------------------------------------|-----------------------------|-----------------------------|\n"
        "| Seconds total                       | 1.00                        | 0.71                        |\n"
        "| Tokens generated                    | 7.00                        | nan                         |\n"
    )


def test_a_preprocessor_encodes_and_decodes(llm):
    preprocessor = Preprocessor(llm.tokenizer, device="cpu")
    ids = preprocessor.encode("Hello 你好")
    assert ids.dim() == 1
    assert preprocessor.decode(ids) == "Hello 你好"


def test_the_number_of_devices_is_counted():
    assert [calculate_number_of_devices(devices) for devices in (1, 3, [0, 2])] == [1, 3, 2]


def test_a_peft_adapter_answers_as_the_model_it_belongs_to(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    model = load_model(base)
    settings = LoRA(r=2, dropout=0.0)
    add_lora(model, settings)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.2)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, settings, str(base))
    llm = LLM.load(tmp_path / "adapter", distribute=None)
    llm.distribute(precision="32-true")
    ids = torch.randint(100, (1, 9))
    merge_lora_weights(model)
    torch.testing.assert_close(llm.model(ids), model(ids), rtol=0, atol=1e-5)
    assert llm.generate("Hello", max_new_tokens=3) is not None
