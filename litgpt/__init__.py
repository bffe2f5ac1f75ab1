"""Load, finetune, pretrain, evaluate, export, chat with and serve language models."""

from importlib import import_module

_HOMES = {  # each public name is imported when it is first used
    "LLM": "litgpt.api",
    "GPT": "litgpt.model",
    "Config": "litgpt.config",
    "PromptStyle": "litgpt.prompts",
    "Tokenizer": "litgpt.tokenizer",
    "CheckpointValidationResult": "litgpt.scripts.validate",
    "validate_checkpoint": "litgpt.scripts.validate",
    "estimate_model_memory": "litgpt.scripts.memory_plan",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
