"""The command `generate_adapter`: an answer of a model with what `finetune_adapter` trained beside it."""

from pathlib import Path
from typing import Any

from litgpt import names
from litgpt.generate.base import PROMPT
from litgpt.generate.full import answer, folder_of

FILES = (names.OWN_ADAPTER, names.LIT_ADAPTER)


def main(checkpoint_dir: Path, prompt: str = PROMPT, *, adapter_path: Path = Path("out/finetune/adapter/final"), **shared: Any) -> None:
    """Answer one prompt with a model and what `finetune_adapter` trained beside it.

    Prints the answer alone. `generate` does the same and more, given the adapter's folder as its model.

    Args:
        checkpoint_dir: The model that was finetuned: a folder, a name in `checkpoints/`, or an `ORG/NAME` that is downloaded from the hub.
        prompt: The text to answer. It is put into the prompt style that the adapter was trained with.
        adapter_path: A folder that `finetune_adapter` wrote (`final` or a step), or its `adapter.safetensors`.
    """
    answer(checkpoint_dir, folder_of(adapter_path, "adapter_path", "finetune_adapter", *FILES), prompt, **shared)
