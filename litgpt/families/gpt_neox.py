"""GPT-NeoX: attention and MLP side by side, LayerNorm, biases; Pythia and the first StableLM."""

from litgpt.families.family import Brand, Family, field
from litgpt.families.ropes import rope_fields
from litgpt.families.tables import GELUS, one_of
from litgpt.weights import ignored, interleaved_qkv, same, tied

PYTHIA_410M = dict(n_layer=24, n_head=16, n_embd=1024)
PYTHIA_1_4B = dict(n_layer=24, n_head=16, n_embd=2048)
ALPHA_3B = dict(n_layer=16, n_head=32, n_embd=4096)
ALPHA_7B = dict(n_layer=16, n_head=48, n_embd=6144, padding_multiple=256)
CODE_3B = dict(n_layer=32, n_head=32, n_embd=2560, vocab_size=49152)

GPT_NEOX = Family(
    model_type="gpt_neox",
    architectures=["GPTNeoXForCausalLM"],
    fields=[
        field("vocab_size", ["padded_vocab_size", "vocab_size"], default=50432),
        field("hidden_size", "n_embd", default=6144),
        field("num_hidden_layers", "n_layer", default=44),
        field("num_attention_heads", "n_head", default=64),
        field("intermediate_size", "intermediate_size", default=24576),
        field("max_position_embeddings", "block_size", default=2048),
        field("layer_norm_eps", "norm_eps", default=1e-5),
        field("hidden_act", "gelu_approximate", default="gelu", **one_of(GELUS)),
        field("use_parallel_residual", "parallel_residual", default=True),
        field("attention_bias", ["attn_bias", "attn_proj_bias"], default=True),
        field("tie_word_embeddings", "tie_embeddings", default=False),
        *rope_fields(["rotary_emb_base"], ["rotary_pct"], default_share=0.25),
    ],
    weights=[
        same("gpt_neox.embed_in.weight", "transformer.wte.weight"),
        same("gpt_neox.layers.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"),
        interleaved_qkv("gpt_neox.layers.{}.attention.query_key_value.*", "transformer.h.{}.attn.qkv.*"),
        same("gpt_neox.layers.{}.attention.dense.*", "transformer.h.{}.attn.proj.*"),
        same("gpt_neox.layers.{}.post_attention_layernorm.*", "transformer.h.{}.norm_2.*"),
        same("gpt_neox.layers.{}.mlp.dense_h_to_4h.*", "transformer.h.{}.mlp.fc.*"),
        same("gpt_neox.layers.{}.mlp.dense_4h_to_h.*", "transformer.h.{}.mlp.proj.*"),
        same("gpt_neox.final_layer_norm.*", "transformer.ln_f.*"),
        tied("embed_out.weight", "lm_head.weight"),
        ignored("gpt_neox.layers.{}.attention.rotary_emb.inv_freq"),
        ignored("gpt_neox.layers.{}.attention.bias"),
        ignored("gpt_neox.layers.{}.attention.masked_bias"),
        ignored("gpt_neox.rotary_emb.inv_freq"),
    ],
    prefixes=(("lm_head.", "embed_out."),),  # in memory transformers 5 calls the head so; files keep the older name
    base=dict(norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP", bias=True, norm_eps=1e-5, rotary_percentage=0.25),
    brands=[
        Brand(
            "EleutherAI",
            base=dict(block_size=2048, vocab_size=50254, padding_multiple=128),
            sizes={
                "pythia-14m": dict(n_layer=6, n_head=4, n_embd=128),
                "pythia-31m": dict(n_layer=6, n_head=8, n_embd=256),
                "pythia-70m{,-deduped}": dict(n_layer=6, n_head=8, n_embd=512),
                "pythia-160m{,-deduped}": dict(n_layer=12, n_head=12, n_embd=768),
                "pythia-410m{,-deduped}": PYTHIA_410M,
                "pythia-1b{,-deduped}": dict(n_layer=16, n_head=8, n_embd=2048),
                "pythia-1.4b{,-deduped}": PYTHIA_1_4B,
                "pythia-2.8b{,-deduped}": dict(n_layer=32, n_head=32, n_embd=2560),
                "pythia-6.9b{,-deduped}": dict(n_layer=32, n_head=32, n_embd=4096, padding_multiple=256),
                "pythia-12b{,-deduped}": dict(n_layer=36, n_head=40, n_embd=5120, padding_multiple=512),
            },
        ),
        Brand(
            "stabilityai",
            base=dict(block_size=4096, vocab_size=50254, padding_multiple=512),
            sizes={
                "stablelm-{base,tuned}-alpha-3b": ALPHA_3B,
                "stablelm-{base,tuned}-alpha-7b": ALPHA_7B,
                "stablecode-completion-alpha-3b": CODE_3B | dict(block_size=16384),
                "stablecode-{completion-alpha-3b-4k,instruct-alpha-3b}": CODE_3B,
            },
            prompt={"stablelm-tuned-alpha-{3b,7b}": "stablelm-alpha", "stablecode-instruct-alpha-3b": "stablecode"},
        ),
        Brand(
            "databricks",
            base=dict(block_size=2048, vocab_size=50254, padded_vocab_size=50280),
            sizes={
                "dolly-v2-3b": dict(n_layer=32, n_head=32, n_embd=2560),
                "dolly-v2-7b": dict(n_layer=32, n_head=32, n_embd=4096),
                "dolly-v2-12b": dict(n_layer=36, n_head=40, n_embd=5120),
            },
            prompt="dolly",
        ),
        Brand(
            "togethercomputer",
            base=dict(block_size=2048, vocab_size=50254, padding_multiple=256, rotary_percentage=1.0, parallel_residual=False),
            sizes={
                "RedPajama-INCITE-{Base,Chat,Instruct}-3B-v1": dict(n_layer=32, n_head=32, n_embd=2560),
                "RedPajama-INCITE-7B-{Base,Chat,Instruct}": dict(n_layer=32, n_head=32, n_embd=4096),
                "RedPajama-INCITE-{Base,Chat,Instruct}-7B-v0.1": dict(n_layer=32, n_head=32, n_embd=4096),
            },
            prompt={
                "RedPajama-INCITE-{Chat-3B-v1,7B-Chat,Chat-7B-v0.1}": "togethercomputer-chat",
                "RedPajama-INCITE-{Instruct-3B-v1,7B-Instruct,Instruct-7B-v0.1}": "togethercomputer-instruct",
            },
        ),
    ],
)
