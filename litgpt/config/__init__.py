"""The architecture of a model, and the names under which checkpoints were published."""

from litgpt.config.checks import find_multiple
from litgpt.config.config import Config, family_of, refuse_quantization
from litgpt.config.published import configs, known_names, listing, name_to_config, prompt_of

__all__ = [
    "Config",
    "configs",
    "family_of",
    "find_multiple",
    "known_names",
    "listing",
    "name_to_config",
    "prompt_of",
    "refuse_quantization",
]
