"""Phi 3 and 4: the Llama block with queries, keys and values in one weight, gate and up in another; positions by LongRoPE."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from litgpt.errors import UserError
from litgpt.families.family import Brand, Family, Field, Joint, field
from litgpt.families.ropes import TRAINED, format_rope, parse_rope, rope_fields, rope_type
from litgpt.families.tables import LLAMA_BASE, LLAMA_FIELDS, with_defaults
from litgpt.weights import ignored, parted, same, tied


def parse_longrope(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return `rope_adjustments`; what was first called `su` and, by mistake, `yarn` is LongRoPE."""
    scaling = mapping.get("rope_scaling") or mapping.get("rope_parameters") or {}
    if not isinstance(scaling, Mapping):
        raise UserError(f"`rope_scaling` is a mapping or null in config.json, but got {scaling!r}.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return dict(rope_adjustments=None)
    if kind not in ["longrope", "su", "yarn"]:  # a list, as `kind` may be anything
        raise UserError(f"`rope_type` is {kind!r} in config.json, but of Phi 3 models only 'default' and 'longrope' are supported.")
    adjustments = parse_rope({**scaling, "rope_type": "longrope"}) or {}
    trained = mapping.get(TRAINED)
    return dict(rope_adjustments=adjustments | dict(original_max_seq_len=4096 if trained is None else trained))


def format_longrope(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a `rope_adjustments`; transformers 4 wants the length outside and nothing else beside the factors."""
    adjustments = fields["rope_adjustments"]
    if adjustments is None:
        return dict(rope_scaling=None, rope_parameters=dict(rope_type="default"))
    if rope_type(adjustments) != "longrope":
        raise UserError(f"A Phi 3 model can stretch positions by LongRoPE only, but `rope_adjustments` is {adjustments!r}.")
    parameters = format_rope(adjustments) or {}
    trained = parameters.setdefault(TRAINED, fields["block_size"])
    outside = {key: value for key, value in parameters.items() if key not in (TRAINED, "rope_type")}
    return {TRAINED: trained, "rope_scaling": {"type": "longrope"} | outside, "rope_parameters": parameters}


def spelled_before(mapping: Mapping[str, Any]) -> bool:
    """Return whether positions are described as before transformers 5, which had several words for LongRoPE."""
    scaling, parameters = mapping.get("rope_scaling"), mapping.get("rope_parameters")
    if isinstance(scaling, Mapping) and scaling:
        return "type" in scaling or scaling.get("rope_type") not in [None, "default", "longrope"]
    return not (isinstance(parameters, Mapping) and parameters.get("rope_type") in ["default", "longrope"])


class Share(Field):
    """The row for the rotated share, which transformers 5 shows twice where it stands both inside and outside of the mapping."""

    def write(self, mapping: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Put our field into their `config.json`, outside only where it has not been inside alone."""
        inside = replace(self, theirs=self.theirs[:1])
        alone = not inside.silent(mapping) and replace(self, theirs=self.theirs[1:]).silent(mapping)
        Field.write(inside if alone else self, mapping, fields)


# The factors as they were published, one for each of 48 pairs

PHI_3_SHORT = [
    *(1.1, 1.1, 1.1, 1.3000000000000003, 1.3500000000000003, 1.3500000000000003, 1.4000000000000004, 1.5500000000000005),
    *[2.000000000000001] * 17,
    *[2.0500000000000007] * 6,
    *(2.1000000000000005, 2.1000000000000005, 2.1500000000000004, 2.25, 2.25, 2.25, 2.25, 2.25, 2.3999999999999995),
    *(2.4499999999999993, 2.499999999999999, 2.6999999999999984, 2.6999999999999984, 2.7499999999999982),
    *(2.799999999999998, 2.8999999999999977, 3.049999999999997),
]
PHI_3_LONG = [
    *(1.0700000524520874, 1.1200000047683716, 1.149999976158142, 1.4199999570846558, 1.5699999332427979, 1.7999999523162842),
    *(2.129999876022339, 2.129999876022339, 3.009999990463257, 5.910000324249268, 6.950000286102295, 9.070000648498535),
    *(9.930000305175781, 10.710000038146973, 11.130000114440918, 14.609999656677246, 15.409998893737793, 19.809999465942383),
    *(37.279998779296875, 38.279998779296875, 38.599998474121094, 40.12000274658203, 46.20000457763672, 50.940006256103516),
    *(53.66000747680664, 54.9373893737793, 56.89738845825195, 57.28738784790039, 59.98738479614258, 60.86738586425781),
    *(60.887386322021484, 61.71739196777344, 62.91739273071289, 62.957393646240234, 63.41739273071289, 63.8173942565918),
    *(63.83739471435547, 63.897396087646484, 63.93739700317383, 64.06739807128906, 64.11434936523438, 64.12435150146484),
    *(64.15435028076172, 64.19435119628906, 64.24435424804688, 64.57435607910156, 64.69000244140625, 64.76000213623047),
]
PHI_3_5_SHORT = [
    *(1.0, 1.0199999809265137, 1.0299999713897705, 1.0299999713897705, 1.0499999523162842, 1.0499999523162842, 1.0499999523162842),
    *(1.0499999523162842, 1.0499999523162842, 1.0699999332427979, 1.0999999046325684, 1.1099998950958252, 1.1599998474121094),
    *(1.1599998474121094, 1.1699998378753662, 1.2899998426437378, 1.339999794960022, 1.679999828338623, 1.7899998426437378),
    *(1.8199998140335083, 1.8499997854232788, 1.8799997568130493, 1.9099997282028198, 1.9399996995925903, 1.9899996519088745),
    *(2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346, 2.0199997425079346),
    *(2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0299997329711914),
    *(2.0299997329711914, 2.0299997329711914, 2.0299997329711914, 2.0799996852874756, 2.0899996757507324, 2.189999580383301),
    *(2.2199995517730713, 2.5899994373321533, 2.729999542236328, 2.749999523162842, 2.8399994373321533),
]
PHI_3_5_LONG = [
    *(1.0800000429153442, 1.1100000143051147, 1.1399999856948853, 1.340000033378601, 1.5899999141693115, 1.600000023841858),
    *(1.6200000047683716, 2.620000123977661, 3.2300000190734863, 3.2300000190734863, 4.789999961853027, 7.400000095367432),
    *(7.700000286102295, 9.09000015258789, 12.199999809265137, 17.670000076293945, 24.46000099182129, 28.57000160217285),
    *(30.420001983642578, 30.840002059936523, 32.590003967285156, 32.93000411987305, 42.320003509521484, 44.96000289916992),
    *(50.340003967285156, 50.45000457763672, 57.55000305175781, 57.93000411987305, 58.21000289916992, 60.1400032043457),
    *(62.61000442504883, 62.62000274658203, 62.71000289916992, 63.1400032043457, 63.1400032043457, 63.77000427246094, 63.93000411987305),
    *(63.96000289916992, 63.970001220703125, 64.02999877929688, 64.06999969482422, 64.08000183105469, 64.12000274658203),
    *(64.41000366210938, 64.4800033569336, 64.51000213623047, 64.52999877929688, 64.83999633789062),
]
PHI_4_LONG = [
    *(1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898, 2.735880826),
    *(3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555, 7.485043894, 8.370679318),
    *(9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418),
    *(28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
]


def longrope(short: list[float], long: list[float]) -> dict[str, Any]:
    """Return the fields of a context of 4096 tokens that was stretched to 131072."""
    adjustments = dict(short_factor=short, long_factor=long, original_max_seq_len=4096)
    return dict(block_size=131072, sliding_window_size=262144, rope_adjustments=adjustments)


MINI = dict(n_layer=32, n_head=32, n_embd=3072, intermediate_size=8192, vocab_size=32000, padded_vocab_size=32064)
PHI_4 = dict(n_layer=40, n_head=40, n_query_groups=10, n_embd=5120, intermediate_size=17920, vocab_size=100352, padded_vocab_size=100352)
PHI_4_MINI = dict(
    n_layer=32,
    n_head=24,
    n_query_groups=8,
    n_embd=3072,
    intermediate_size=8192,
    vocab_size=200019,
    padded_vocab_size=200064,
    rotary_percentage=0.75,
    tie_embeddings=True,
)

PLAIN_FIELDS = [row for row in LLAMA_FIELDS if not {"rope_adjustments", "rope_base"} & set(row.ours)]

PHI_3 = Family(
    model_type="phi3",
    architectures=["Phi3ForCausalLM"],
    fields=[
        *with_defaults(PLAIN_FIELDS, vocab_size=32064, hidden_size=3072, rms_norm_eps=1e-5),
        field("intermediate_size", "intermediate_size", default=8192),
        field("num_key_value_heads", "n_query_groups"),
        field("max_position_embeddings", "block_size", default=4096),
        field("sliding_window", "sliding_window_size"),
        Joint((TRAINED, "rope_scaling", "rope_parameters"), ("rope_adjustments",), parse_longrope, format_longrope, spelled_before),
        rope_fields(["rope_theta"])[1],
        Share(**vars(rope_fields(["rope_theta"], ["partial_rotary_factor"])[2])),
    ],
    weights=[
        same("model.embed_tokens.weight", "transformer.wte.weight"),
        same("model.layers.{}.input_layernorm.*", "transformer.h.{}.norm_1.*"),
        same("model.layers.{}.self_attn.qkv_proj.*", "transformer.h.{}.attn.qkv.*"),
        same("model.layers.{}.self_attn.o_proj.*", "transformer.h.{}.attn.proj.*"),
        same("model.layers.{}.post_attention_layernorm.*", "transformer.h.{}.norm_2.*"),
        parted("model.layers.{}.mlp.gate_up_proj.*", ["transformer.h.{}.mlp.fc_1.*", "transformer.h.{}.mlp.fc_2.*"]),
        same("model.layers.{}.mlp.down_proj.*", "transformer.h.{}.mlp.proj.*"),
        same("model.norm.*", "transformer.ln_f.*"),
        tied("lm_head.weight", "lm_head.weight"),
        ignored("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    ],
    base=LLAMA_BASE | dict(norm_eps=1e-5),
    brands=[
        Brand(
            "microsoft",
            sizes={
                "Phi-3-mini-4k-instruct": MINI | dict(block_size=4096, sliding_window_size=2047),
                "Phi-3-mini-128k-instruct": MINI | longrope(PHI_3_SHORT, PHI_3_LONG),
                "Phi-3.5-mini-instruct": MINI | longrope(PHI_3_5_SHORT, PHI_3_5_LONG),
                "phi-4": PHI_4 | dict(block_size=16384, rope_base=250_000),
                "Phi-4-reasoning{,-plus}": PHI_4 | dict(block_size=32768, rope_base=500_000),
                "Phi-4-mini-{instruct,reasoning}": PHI_4_MINI | longrope([1.0] * 48, PHI_4_LONG),
            },
            prompt={
                "Phi-3-mini-{4k,128k}-instruct": "phi-3",
                "Phi-3.5-mini-instruct": "phi-3",
                "phi-4": "phi-4",
                "Phi-4-reasoning{,-plus}": "phi-4-reasoning",
                "Phi-4-mini-instruct": "phi-4-mini",
                "Phi-4-mini-reasoning": "phi-4-mini-reasoning",
            },
        ),
    ],
)
