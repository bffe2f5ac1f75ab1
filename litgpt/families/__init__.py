"""Every family of checkpoints, by its `model_type`. Where several could write a config, the first one does."""

from litgpt.families.family import Brand, Family, Field, field
from litgpt.families.gpt_neox import GPT_NEOX
from litgpt.families.llama import LLAMA
from litgpt.families.mistral import MISTRAL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, GPT_NEOX)}

__all__ = ["FAMILIES", "Brand", "Family", "Field", "field"]
