"""A tiny chat model that transformers made: random weights, a trained tokenizer, a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

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
