"""Tiny checkpoints that transformers reads too, and tasks of lm-eval whose data lie beside them. Nothing needs a network."""

import json
from pathlib import Path

import vocabularies
import yaml
from oracle import their_model
from tiny import facts, tiny_config
from tokenizers import Tokenizer as FastTokenizer

TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [
    ("What do llamas eat?", [" grass", " grass, hay and leaves!", " the lazy dog"], 1),
    ("What does the quick brown fox do?", [" It jumps.", " It jumps over the lazy dog.", " It sleeps", " eats"], 0),
    ("def main(argument):\n   ", [" for i in range(10):", " return None"], 1),
    ("naïve café ", ["über", "日本語", "😀 emoji"], 2),
    ("", ["The quick", "Below is an instruction"], 0),
    ("Below is an instruction that describes a task. Write a response. " * 8, [" yes", " no", " Answer: hello world"], 1),
]
LONG = "The quick brown fox jumps over the lazy dog. What do llamas eat? Llamas eat grass, hay and leaves! " * 8
TEXTS = ["Llamas eat grass, hay and leaves!", LONG, "def main(argument):\n    print('hello', i)", "日本語 und über"]


def make_checkpoint(folder: Path, family: str = "llama", bos: str = "added", variant: str = "") -> Path:
    """Write a tiny random checkpoint as transformers saves it.

    Args:
        folder: The folder.
        family: Its `model_type`.
        bos: Whether the tokenizer has "none", has one that is only "named", or has one that is "added" to texts.
        variant: Which of the family's variants it is.
    """
    changes = facts(family).VARIANTS[variant] if variant else {}
    config = tiny_config(family, vocab_size=640, padded_vocab_size=640, **changes)
    their_model(config).save_pretrained(folder)
    settings = {"none": {"bos_token": None}, "named": {}, "added": {"chat_template": TEMPLATE}}[bos]
    vocabularies.write(folder, "byte_level", tokenizer_class="PreTrainedTokenizerFast", **settings)
    if bos == "added":
        file = str(folder / "tokenizer.json")
        vocabularies.with_bos(FastTokenizer.from_file(file)).save(file)
    return folder


def make_tasks(folder: Path) -> Path:
    """Write tasks of every kind, and their data."""
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    texts = [{"text": text} for text in TEXTS]
    for name, records in (("questions", rows), ("solved", rows[:3]), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    asked = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl"), "train": str(folder / "solved.jsonl")}},
        "test_split": "test",
        "fewshot_split": "train",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    choice = asked | {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean"}, {"metric": "acc_norm", "aggregation": "mean"}],
    }
    read = asked | {"dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}}, "doc_to_text": ""}
    perplexities = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    exact = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    answers = {"until": ["\n", "."], "max_gen_toks": 12}
    all_tasks = {
        "choose": choice,
        "choose_again": choice | {"num_fewshot": 1},
        "read_on": {key: read[key] for key in read if key != "fewshot_split"}
        | {"output_type": "loglikelihood_rolling", "doc_to_target": "{{text}}", "metric_list": perplexities},
        "write": asked
        | {"output_type": "generate_until", "doc_to_target": "{{choices[answer]}}", "generation_kwargs": answers, "metric_list": exact},
    }
    for name, task in all_tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task))
    both = {"group": "both", "task": ["choose", "choose_again"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "both.yaml").write_text(yaml.safe_dump(both))
    return folder
