"""A tiny chat model that transformers made: random weights, a trained tokenizer, a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from litgpt import LLM

TEXTS = ["What food do llamas eat? Grass and hay.", "Grüße aus Köln, 你好世界 🙂🙃!", "Once upon a time there was a llama."]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(folder: Path, template: str | None = TEMPLATE) -> int:
    """Write a byte-level BPE tokenizer whose answers end with <|im_end|>; return how many tokens it has."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": None, "eos_token": "<|im_end|>", "add_bos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | ({} if template is None else {"chat_template": template})))
    return tokenizer.get_vocab_size()


def make_checkpoint(folder: Path, context: int = 256, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    """Write the folder of a model with random weights, as transformers does, and return it."""
    torch.manual_seed(seed)
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    vocab_size = make_tokenizer(folder, template)
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=context, bos_token_id=None, eos_token_id=None, **size)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return folder


def exact_llm(folder: Path) -> LLM:
    """Return the model of a folder in fp32, in which a batch gives what its prompts give alone."""
    llm = LLM.load(folder, distribute=None)
    llm.distribute(precision="32-true")
    return llm


def said(*turns: str | dict | None) -> list[dict]:
    """Return messages: texts alternate between user and assistant, dicts are messages already, and None lets the user begin again."""
    messages, asks = [], True
    for turn in turns:
        if isinstance(turn, str):
            messages.append({"role": "user" if asks else "assistant", "content": turn})
            asks = not asks
        elif turn is None:
            asks = True
        else:
            messages.append(turn)
    return messages


def system(content: str) -> dict:
    """Return a system message."""
    return {"role": "system", "content": content}


def calling(content: str | None, *calls: tuple[str, dict | str]) -> dict:
    """Return an assistant's message that calls functions."""
    made = [
        {"type": "function", "id": f"call0000{i}", "function": {"name": name, "arguments": given}} for i, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


def result(content: str, name: str = "weather") -> dict:
    """Return what a function gave back."""
    return {"role": "tool", "name": name, "tool_call_id": "call00000", "content": content}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'Tells the "weather" <now> & später.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Where, e.g. Köln"},
                    "days": {"type": "integer", "enum": [1, 2], "default": 1},
                    "units": {"type": ["string", "null"]},
                    "spots": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    },
    {
        "type": "function",
        "function": {"name": "clock", "description": "Tells the time.", "parameters": {"type": "object", "properties": {}}},
    },
]
ASKED, TEXT_CALL = calling("", ("weather", {"city": "Köln", "days": 2, "spots": [{"x": 1.5}], "units": None})), '{"city": "Köln"}'
CONVERSATIONS = {  # messages, and the functions that may be called
    "one question": (said("What do llamas eat?"), None),
    "a system text": (said(system("Be brief."), "Hi"), None),
    "two questions": (said("Hi", "Hello!", "And hay?"), None),
    "a system text and three questions": (said(system("Be brief."), "a", "b", "c", "d", "e"), None),
    "an answer last": (said("Hi", "Hello!"), None),
    "a system text, an answer last": (said(system("Be\nbrief."), "one", "two", "three", "four"), None),
    "all writing systems": (said(system("日本語で"), "naïve café 😀 👩‍👩‍👧‍👦", "مرحبا 🇩🇪", "n\u0303 \u00a0 \u2028 x"), None),
    "an empty system text": (said(system(""), "Hi", "Hello!"), None),
    "an empty question": (said("", "What?", ""), None),
    "an empty answer": (said("Hi", "", "Again", ""), None),
    "white space": (said(system("  a\n"), "\n b\t", " c \n\n", "  "), None),
    "markup in texts": (said("{{ messages }} {% for %} <s>", "<|im_end|> </s> <tool_call>", "[INST] </think> <&>'\""), None),
    "thoughts in answers": (said("Hi", "<think>\nhm\n</think>\n\nyes", "So?", "<think>\nwell\n</think>\n\nno"), None),
    "a thought beside an answer": (
        said("Hi", {"role": "assistant", "content": "yes", "reasoning_content": "hm", "thinking": "hm"}, None, "So?"),
        None,
    ),
    "functions": (said("Weather?"), TOOLS),
    "functions and a system text": (said(system("Be brief."), "Weather?", "Where?"), TOOLS),
    "a call": (said("Weather?", ASKED), TOOLS),
    "a call and its result": (said("Weather?", ASKED, result("sunny"), None), TOOLS),
    "a call as text": (said("Weather?", calling("Let me see.", ("weather", TEXT_CALL)), result('{"sky": "clear"}')), TOOLS),
    "two calls": (
        said(system("S"), "Weather?", calling("", ("weather", {"city": "Köln"}), ("clock", {})), result("sunny"), result("9", "clock")),
        TOOLS,
    ),
    "a call, its result, an answer": (
        said("Weather?", ASKED, result("sunny"), {"role": "assistant", "content": "It is sunny."}, None, "Thanks"),
        TOOLS,
    ),
    "parts": (said({"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}, None), None),
    "nobody answers": (said("Hi", None, "Hi?"), None),
    "the assistant begins": (said({"role": "assistant", "content": "Hello!"}, "Hi"), None),
    "another role": (said({"role": "developer", "content": "Be kind."}, "Hi"), None),
}
