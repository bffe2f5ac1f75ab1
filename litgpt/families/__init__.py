"""Every family of checkpoints, by its `model_type`. Where several could write a config, the first one does."""

from litgpt.families.cohere import COHERE
from litgpt.families.deepseek_v3 import DEEPSEEK_V3
from litgpt.families.falcon import FALCON
from litgpt.families.family import Brand, Family, Field, field
from litgpt.families.gemma import GEMMA
from litgpt.families.gemma2 import GEMMA_2
from litgpt.families.gemma3_text import GEMMA_3
from litgpt.families.glm4 import GLM4
from litgpt.families.gpt2 import GPT2
from litgpt.families.gpt_neox import GPT_NEOX
from litgpt.families.gpt_oss import GPT_OSS
from litgpt.families.granite import GRANITE
from litgpt.families.lfm2 import LFM_2
from litgpt.families.llama import LLAMA
from litgpt.families.ministral3 import MINISTRAL_3
from litgpt.families.mistral import MISTRAL
from litgpt.families.mixtral import MIXTRAL
from litgpt.families.olmo import OLMO
from litgpt.families.olmo2 import OLMO2
from litgpt.families.olmo3 import OLMO3
from litgpt.families.olmoe import OLMOE
from litgpt.families.phi import PHI
from litgpt.families.phi3 import PHI_3
from litgpt.families.qwen2 import QWEN_2
from litgpt.families.qwen2_moe import QWEN_2_MOE
from litgpt.families.qwen3 import QWEN_3
from litgpt.families.qwen3_moe import QWEN_3_MOE
from litgpt.families.qwen3_next import QWEN_3_NEXT
from litgpt.families.smollm3 import SMOLLM3
from litgpt.families.stablelm import STABLELM
from litgpt.families.starcoder2 import STARCODER2

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        GPT_NEOX,
        GEMMA,
        GEMMA_2,
        GEMMA_3,
        GRANITE,
        PHI,
        PHI_3,
        QWEN_2,
        QWEN_3,
        FALCON,
        STABLELM,
        COHERE,
        GLM4,
        OLMO,
        OLMO2,
        SMOLLM3,
        STARCODER2,
        GPT2,
        MINISTRAL_3,
        LFM_2,
        DEEPSEEK_V3,
        GPT_OSS,
        QWEN_3_NEXT,
        MIXTRAL,
        QWEN_2_MOE,
        QWEN_3_MOE,
        OLMOE,
        OLMO3,
    )
}

__all__ = ["FAMILIES", "Brand", "Family", "Field", "field"]
