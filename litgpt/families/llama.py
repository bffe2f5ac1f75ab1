"""Llama, and the many models that share its block: RMSNorm, rotary embeddings, grouped queries, a gated MLP."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, LLAMA_WEIGHTS

SMALL_VOCAB = dict(vocab_size=32000, padded_vocab_size=32000)
BIG_VOCAB = dict(vocab_size=128000, padded_vocab_size=128256)  # of Llama 3: the rest are special tokens

LLAMA_1 = dict(block_size=2048, norm_eps=1e-6) | SMALL_VOCAB
L1_30B = dict(n_layer=60, n_head=52, n_embd=6656, intermediate_size=17920)
LLAMA_2 = dict(block_size=4096, norm_eps=1e-5) | SMALL_VOCAB
L2_7B = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=11008)
L2_13B = dict(n_layer=40, n_head=40, n_embd=5120, intermediate_size=13824)
L2_70B = dict(n_layer=80, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=28672)

LLAMA_3 = dict(block_size=8192, norm_eps=1e-5, n_query_groups=8, rope_base=500_000) | BIG_VOCAB
STRETCHED_8 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=8192)
LONG = dict(block_size=131072, rope_adjustments=STRETCHED_8)
LONG_32 = dict(block_size=131072, rope_adjustments=STRETCHED_8 | dict(factor=32.0))
L3_1B = dict(n_layer=16, n_head=32, n_embd=2048, intermediate_size=8192, tie_embeddings=True) | LONG_32
L3_3B = dict(n_layer=28, n_head=24, n_embd=3072, intermediate_size=8192, tie_embeddings=True) | LONG_32
L3_8B = dict(n_layer=32, n_head=32, n_embd=4096, intermediate_size=14336)
L3_70B = dict(n_layer=80, n_head=64, n_embd=8192, intermediate_size=28672)
L3_405B = dict(n_layer=126, n_head=128, n_embd=16384, intermediate_size=53248)

FALCON_3 = dict(block_size=32768, norm_eps=1e-6, n_query_groups=4, rope_base=1_000_042, vocab_size=131072, padded_vocab_size=131072)
INFILLING = dict(vocab_size=32016, padding_multiple=16, padded_vocab_size=None)  # Code Llama's tokens to fill in the middle
L2_34B = dict(n_layer=48, n_head=64, n_query_groups=8, n_embd=8192, intermediate_size=22016)
SHORT_70B = dict(block_size=4096, rope_base=10000)  # these two were not trained on long files, says meta-llama/codellama issue 188

META = [
    Brand(
        "meta-llama",
        base=LLAMA_2,
        sizes={"Llama-2-7b{,-chat}-hf": L2_7B, "Llama-2-13b{,-chat}-hf": L2_13B, "Llama-2-70b{,-chat}-hf": L2_70B},
        prompt={"Llama-2-{7b,13b,70b}-chat-hf": "llama2"},
    ),
    Brand(
        "meta-llama",
        base=LLAMA_3,
        sizes={
            "Llama-3-8B{,-Instruct}": L3_8B,
            "Llama-3-70B{,-Instruct}": L3_70B,
            "Llama-3.1-8B{,-Instruct}": L3_8B | LONG,
            "Llama-3.1-70B{,-Instruct}": L3_70B | LONG,
            "Llama-3.1-405B{,-Instruct}": L3_405B | LONG,
            "Llama-3.2-1B{,-Instruct}": L3_1B,
            "Llama-3.2-3B{,-Instruct}": L3_3B,
            "Llama-3.3-70B-Instruct": L3_70B | LONG,
        },
        prompt={
            "Llama-3-{8B,70B}-Instruct": "llama3",
            "Llama-3.1-{8B,70B,405B}-Instruct": "llama3",
            "Llama-3.2-{1B,3B}-Instruct": "llama3",
            "Llama-3.3-70B-Instruct": "llama3",
        },
        published_as={
            "Llama-3-{8B,70B}{,-Instruct}": "Meta-Llama-3-{8B,70B}{,-Instruct}",
            "Llama-3.1-{8B,70B,405B}{,-Instruct}": "Meta-Llama-3.1-{8B,70B,405B}{,-Instruct}",
        },
        also={"Llama-3.1-{8B,70B,405B}{,-Instruct}": "meta-llama/Llama-3.1-{8B,70B,405B}{,-Instruct}"},
    ),
    Brand(
        "codellama",
        base=dict(block_size=16384, norm_eps=1e-5, rope_base=1_000_000) | SMALL_VOCAB,
        sizes={
            "CodeLlama-7b{,-Instruct}-hf": L2_7B | INFILLING,
            "CodeLlama-13b{,-Instruct}-hf": L2_13B | INFILLING,
            "CodeLlama-7b-Python-hf": L2_7B,
            "CodeLlama-13b-Python-hf": L2_13B,
            "CodeLlama-34b{,-Python,-Instruct}-hf": L2_34B,
            "CodeLlama-70b-hf": L2_70B | INFILLING,
            "CodeLlama-70b-Python-hf": L2_70B | INFILLING | SHORT_70B,
            "CodeLlama-70b-Instruct-hf": L2_70B | INFILLING | SHORT_70B | dict(vocab_size=32015),
        },
        prompt={"CodeLlama-{7b,13b,34b}-Instruct-hf": "codellama", "CodeLlama-70b-Instruct-hf": "codellama-70b"},
    ),
]

DERIVED = [
    Brand(
        "nvidia",
        base=LLAMA_3,
        sizes={"Llama-3.1-Nemotron-70B-Instruct-HF": L3_70B | LONG},
        prompt="llama3",
    ),
    Brand(
        "deepseek-ai",
        base=LLAMA_3,
        sizes={"R1-Distill-Llama-8B": L3_8B | LONG, "R1-Distill-Llama-70B": L3_70B | LONG},
        prompt="r1",
        published_as={"R1-Distill-Llama-{8B,70B}": "DeepSeek-R1-Distill-Llama-{8B,70B}"},
    ),
    Brand("stabilityai", base=LLAMA_2, sizes={"FreeWilly2": L2_70B, "StableBeluga2": L2_70B}, prompt="freewilly2"),
    Brand(
        "lmsys",
        base=LLAMA_2,
        sizes={
            "vicuna-7b-v1.3": L2_7B | LLAMA_1,
            "vicuna-13b-v1.3": L2_13B | LLAMA_1,
            "vicuna-33b-v1.3": L1_30B | LLAMA_1,
            "vicuna-7b-v1.5": L2_7B,
            "vicuna-13b-v1.5": L2_13B,
            "vicuna-7b-v1.5-16k": L2_7B | dict(block_size=16384, rope_adjustments=dict(factor=4.0)),
            "vicuna-13b-v1.5-16k": L2_13B | dict(block_size=16384, rope_adjustments=dict(factor=4.0)),
            "longchat-7b-16k": L2_7B | LLAMA_1 | dict(block_size=16384, rope_adjustments=dict(factor=8.0)),
            "longchat-13b-16k": L2_13B | LLAMA_1 | dict(block_size=16384, rope_adjustments=dict(factor=8.0)),
        },
        prompt={"vicuna-{7b,13b,33b}-v1.3": "vicuna", "vicuna-{7b,13b}-v1.5{,-16k}": "vicuna", "longchat-{7b,13b}-16k": "longchat"},
    ),
    Brand(
        "NousResearch",
        base=LLAMA_2,
        sizes={
            "Nous-Hermes-13b": L2_13B | LLAMA_1 | dict(padded_vocab_size=32001),
            "Nous-Hermes-llama-2-7b": L2_7B,
            "Nous-Hermes-Llama2-13b": L2_13B | dict(padded_vocab_size=32032),
            "Nous-Hermes-Llama2-70b": L2_70B,
        },
        prompt="nous-research",
    ),
    Brand(
        "garage-bAInd",
        base=LLAMA_2,
        sizes={
            "Platypus-30B": LLAMA_1 | L1_30B,
            "Platypus2-7B": L2_7B,
            "{,Camel-,Stable-}Platypus2-13B": L2_13B,
            "{,Camel-}Platypus2-70B": L2_70B,
            "Platypus2-70B-instruct": L2_70B,
        },
        prompt="platypus",
    ),
    Brand(
        "togethercomputer",
        base=LLAMA_2,
        sizes={"LLaMA-2-7B-32K": L2_7B | dict(block_size=32768, rope_adjustments=dict(factor=8.0))},
    ),
    Brand(
        "Trelis",
        base=LLAMA_2,
        sizes={"Llama-2-7b-chat-hf-function-calling-v2": L2_7B | dict(norm_eps=1e-6)},
        prompt="llama2-function-calling",
    ),
]

OTHERS = [
    Brand(
        "openlm-research",
        base=LLAMA_1,
        sizes={
            "open_llama_3b": dict(n_layer=26, n_head=32, n_embd=3200, intermediate_size=8640),
            "open_llama_7b": L2_7B,
            "open_llama_13b": L2_13B,
        },
    ),
    Brand(
        "TinyLlama",
        base=dict(block_size=2048, norm_eps=1e-5) | SMALL_VOCAB,
        sizes={"tiny-llama-1.1b{,-chat}": dict(n_layer=22, n_head=32, n_query_groups=4, n_embd=2048, intermediate_size=5632)},
        prompt={"tiny-llama-1.1b-chat": "tinyllama"},
        published_as={"tiny-llama-1.1b{,-chat}": "TinyLlama-1.1B-{intermediate-step-1431k-3T,Chat-v1.0}"},
    ),
    Brand(
        "keeeeenw",
        base=dict(block_size=2048, norm_eps=1e-5) | SMALL_VOCAB,
        sizes={"micro-llama-300M": dict(n_layer=12, n_head=16, n_query_groups=4, n_embd=1024, intermediate_size=5632)},
        published_as={"micro-llama-300M": "MicroLlama"},
    ),
    Brand(
        "HuggingFaceTB",
        base=dict(block_size=8192, norm_eps=1e-5, rope_base=100_000, vocab_size=49152, padded_vocab_size=49152, tie_embeddings=True),
        sizes={
            "SmolLM2-135M{,-Instruct}": dict(n_layer=30, n_head=9, n_query_groups=3, n_embd=576, intermediate_size=1536),
            "SmolLM2-360M{,-Instruct}": dict(n_layer=32, n_head=15, n_query_groups=5, n_embd=960, intermediate_size=2560),
            "SmolLM2-1.7B{,-Instruct}": dict(n_layer=24, n_head=32, n_embd=2048, intermediate_size=8192, rope_base=130_000),
        },
        prompt={"SmolLM2-{135M,360M,1.7B}-Instruct": "smollm2"},
    ),
    Brand(
        "tiiuae",
        base=FALCON_3,
        sizes={
            "Falcon3-1B-{Base,Instruct}": dict(n_layer=18, n_head=8, n_embd=2048, intermediate_size=8192, block_size=4096),
            "Falcon3-3B-{Base,Instruct}": dict(n_layer=22, n_head=12, n_embd=3072, intermediate_size=9216),
            "Falcon3-7B-{Base,Instruct}": dict(n_layer=28, n_head=12, n_embd=3072, intermediate_size=23040),
            "Falcon3-10B-{Base,Instruct}": dict(n_layer=40, n_head=12, n_embd=3072, intermediate_size=23040),
        },
        prompt={"Falcon3-{1B,3B,7B,10B}-Instruct": "falcon3"},
    ),
    Brand(
        "BSC-LT",
        base=dict(block_size=8192, vocab_size=256000, padded_vocab_size=256000),
        sizes={
            "salamandra-2b{,-instruct}": dict(n_layer=24, n_head=16, n_embd=2048, intermediate_size=5440, norm_eps=1e-5),
            "salamandra-7b{,-instruct}": L2_7B | dict(n_query_groups=8, norm_eps=1e-6),
        },
        prompt={"salamandra-{2b,7b}-instruct": "salamandra"},
    ),
]

ROWS = [  # Granite has them too
    *LLAMA_FIELDS,
    field("intermediate_size", "intermediate_size", default=11008),
    field("num_key_value_heads", "n_query_groups"),
    field("max_position_embeddings", "block_size", default=2048),
    field("attention_bias", ["attn_bias", "attn_proj_bias"], default=False),
    field("mlp_bias", "mlp_bias", default=False),
]

LLAMA = Family(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    fields=ROWS,
    weights=LLAMA_WEIGHTS,
    base=LLAMA_BASE,
    brands=[*META, *DERIVED, *OTHERS],
)
