"""The fields of one architecture, where they are read from and how they are written."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from litgpt import names
from litgpt.config.checks import canonical_rope, complete
from litgpt.config.litgpt_files import from_litgpt, to_litgpt
from litgpt.config.published import BY_ANY_NAME, name_to_config
from litgpt.errors import MissingFile, UserError, did_you_mean
from litgpt.families import FAMILIES, Family
from litgpt.files import is_file, read_json, read_yaml
from litgpt.weights import Rule, same

OWN_TYPE = "litgpt"  # the `model_type` of a checkpoint that no family can express
QUANTIZATIONS = ("fp8", "mxfp4")  # the `quant_method`s whose weights `litgpt.dequantize` reads


@dataclass
class Config:
    """The fields of one architecture. `None` means what the comment or the field before it says, and is replaced by that value."""

    name: str = ""
    """What to call the model; nothing depends on it."""
    hf_config: dict[str, Any] = field(default_factory=dict)
    """Where it was published, as `org` and `name`."""
    family: str | None = None
    """The `model_type` of the family that writes its checkpoints. None: the first that can express it, if any."""
    block_size: int = 4096
    """The longest context, in tokens."""
    n_layer: int = 16
    n_embd: int = 4096
    vocab_size: int = 50254
    """How many tokens the tokenizer has."""
    padding_multiple: int = 512
    padded_vocab_size: int | None = None
    """How many rows embedding and head have. None: `vocab_size` rounded up to a multiple of `padding_multiple`."""
    tie_embeddings: bool = False
    """Whether the head is the embedding's matrix."""
    lm_head_bias: bool = False

    # Norms and the residual stream
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    norm_affine: bool = True
    """Whether a LayerNorm has weights at all."""
    norm_bias: bool = True
    """Whether a LayerNorm has a bias; an RMSNorm never has."""
    norm_add_unit_offset: bool = False
    """Whether an RMSNorm multiplies by 1 + weight."""
    norm_1: bool = True
    """Whether attention's input is normalised."""
    norm_2: bool = True
    """Whether the MLP's input is normalised."""
    shared_attention_norm: bool = False
    """Whether a parallel MLP reads what attention's norm returns, instead of having its own norm."""
    post_attention_norm: bool = False
    """Whether attention's output is normalised before it is added."""
    post_mlp_norm: bool = False
    """Whether the MLP's output is normalised before it is added."""
    parallel_residual: bool = True
    """Whether attention and MLP read the same input, instead of the MLP what attention adds."""
    residual_scale: float = 1.0
    """What attention and MLP add is multiplied by this."""
    scale_embeddings: bool | float = False
    """Embeddings are multiplied by this; true: by the root of `n_embd`, rounded to their type."""
    logit_scale: float = 1.0
    final_logit_softcapping: float | None = None
    """Logits z become c tanh(z / c)."""

    # Attention
    n_head: int = 32
    head_size: int | None = None
    """None: `n_embd` divided by `n_head`."""
    n_query_groups: int | None = None
    """How many key and value heads there are, each shared by several query heads. None: as many as query heads."""
    bias: bool = True
    """Whether linear layers have a bias, where the next three do not say otherwise."""
    attn_bias: bool | None = None
    """Of queries, keys and values."""
    attn_proj_bias: bool | None = None
    """Of attention's output."""
    mlp_bias: bool | None = None
    norm_qk: bool = False
    """Whether queries and keys are normalised before they are turned."""
    norm_qk_type: str = "default"
    """"default": one norm for all heads; "olmo2": across all heads; "per_head": a LayerNorm with weights of each head's own."""
    attention_scores_scalar: int | float | None = None
    """Scores are divided by the root of this. None: of `head_size`."""
    attention_scale: float | None = None
    """Scores are multiplied by this instead."""
    attention_logit_softcapping: float | None = None
    """Scores s become c tanh(s / c)."""
    attention_sinks: bool = False
    """Whether every head has a learned score that competes with all keys and stands for none."""
    attention_gate: bool = False
    """Whether attention's output is multiplied by the sigmoid of a projection of its input."""
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to this size."""
    sliding_window_size: int | None = None
    """How many tokens a token sees, itself included. None: all before it."""
    sliding_window_indices: list[int] | None = None
    """For each layer 1 if it has the window, else 0. None: all have it."""
    latent_attention: dict[str, Any] | None = None
    """The sizes of DeepSeek's attention, whose keys and values are made from a shared latent."""

    # Positions
    rope_base: int | float = 10000
    rotary_percentage: float = 0.25
    """The rotated share of each head."""
    rope_condense_ratio: int | float = 1
    """Positions are divided by this."""
    rope_adjustments: dict[str, Any] | None = None
    """How frequencies are stretched: `factor` alone is linear; `dynamic`, or keys of Llama 3, YaRN or LongRoPE, name those ways."""
    rope_interleave: bool = False
    """Whether neighbouring features are turned together, instead of those half a head apart."""
    rope_local_base_freq: int | float | None = None
    """A second base, whose frequencies are never stretched."""
    rope_indices: list[int | None] | None = None
    """For each layer 0 for `rope_base`, 1 for `rope_local_base_freq`, null for no turning. None: 1 if there is a local base, else 0."""
    learned_positions: bool = False
    """Whether an embedding of the position is added to the token's."""

    # MLPs and experts
    intermediate_size: int | None = None
    """The width inside the MLP. None: four times `n_embd`."""
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    n_expert: int = 0
    n_expert_per_token: int = 0
    expert_indices: list[int] | None = None
    """For each layer 1 if its MLP has experts, else 0. None: all but the first `first_k_dense_replace`."""
    first_k_dense_replace: int | None = None
    moe_intermediate_size: int | None = None
    """The width inside an expert. None: `intermediate_size`."""
    expert_scores: str = "softmax"
    """What makes scores of the router's outputs: "softmax" over all experts, or "sigmoid" with a correction that only chooses."""
    norm_topk_prob: bool = False
    """Whether the scores of the chosen experts are made to sum to 1."""
    routed_scaling_factor: float = 1.0
    """What the chosen experts' scores are multiplied by."""
    n_expert_groups: int | None = None
    """How many groups of experts compete first. None: there are no groups."""
    n_topk_groups: int | None = None
    n_topk_scores_per_group: int | None = None
    """How many of a group's best scores are summed to rank it."""
    router_bias: bool = False
    expert_bias: bool = False
    swiglu_limit: float | None = None
    """Where experts clamp what they multiply, as gpt-oss does. None: they do not."""
    n_shared_expert: int | None = None
    """How many experts' width `shared_intermediate_size` has, where that is not given."""
    shared_intermediate_size: int | None = None
    """The width of an MLP beside the experts that sees every token."""
    shared_expert_gate: bool = False

    # What layers are made of
    mixers: list[str] | None = None
    """For each layer what mixes tokens. None: attention everywhere."""
    short_conv: dict[str, Any] | None = None
    """The sizes of LFM2's gated short convolution."""
    gated_delta: dict[str, Any] | None = None
    """The sizes of Qwen3-Next's gated delta rule."""

    def __post_init__(self) -> None:
        complete(self, DEFAULTS)
        self.wanted_family = self.family  # as it was given; `replace` gives the one that was found
        self.family = _expressing_family(self)

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> "Config":
        """Return the config of a published checkpoint.

        Args:
            name: LitGPT's name for it, its name on the hub, or `org/name`.
            **overrides: Fields that differ.

        Raises:
            UserError: The name is not known.
        """
        if name not in BY_ANY_NAME:
            hint = "Known names are shown by `litgpt download list`."
            raise UserError(f"{name!r} is not a known model name.{did_you_mean(name, BY_ANY_NAME)} {hint}")
        return cls(**_accepted(cls, deepcopy(name_to_config[BY_ANY_NAME[name]]) | overrides))

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Config":
        """Return the config in a `model_config.yaml`, LitGPT's or ours.

        Args:
            path: The file.
            **overrides: Fields that differ.

        Raises:
            MissingFile: It is not there.
            UserError: It is damaged, or asks for something that is not supported.
        """
        path = Path(path)
        if not is_file(path):
            raise MissingFile(f"There is no config file {str(path)!r}.")
        mapping = read_yaml(path)
        if not mapping:
            raise UserError(f"{path} is empty. Copy the file from the checkpoint again.")
        values = _accepted(cls, from_litgpt(mapping) | overrides, str(path))
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_checkpoint(cls, path: str | Path, **overrides: Any) -> "Config":
        """Return the config of a checkpoint directory.

        `config.json` describes it, but where LitGPT's weights lie beside no others, `model_config.yaml` does.

        Args:
            path: The directory.
            **overrides: Fields that differ.

        Raises:
            MissingFile: It holds neither file.
            UserError: The file is damaged, or the architecture is not supported.
        """
        path = Path(path)
        theirs, litgpts = path / names.CONFIG, path / names.LIT_CONFIG
        if is_file(litgpts) and (not is_file(theirs) or _holds_only_litgpts_weights(path)):
            return cls.from_file(litgpts, **overrides)
        if not is_file(theirs):
            raise MissingFile(f"{path} is not a checkpoint directory: it holds neither {names.CONFIG} nor {names.LIT_CONFIG}.")
        mapping, identity = read_json(theirs), _identity(path)
        try:
            return cls.from_hf(mapping, **identity | overrides)
        except UserError as error:
            head, found, says = str(error).partition(names.CONFIG)
            raise UserError(f"{theirs}{says}" if found and not head else f"{theirs}: {error}") from None

    @classmethod
    def from_hf(cls, mapping: Mapping[str, Any], **overrides: Any) -> "Config":
        """Return the config that a `config.json` stands for.

        Args:
            mapping: What the file holds, as transformers 4 or 5 or we wrote it.
            **overrides: Fields that differ, such as the name.

        Raises:
            UserError: The architecture or quantization is not supported.
        """
        if mapping.get("model_type") == OWN_TYPE:
            return cls(**{name: deepcopy(mapping[name]) for name in DEFAULTS if name in mapping} | _accepted(cls, overrides))
        family = _family_of_type(mapping)
        refuse_quantization(mapping.get("quantization_config"))
        values = _accepted(cls, dict(family=family.model_type) | family.read(mapping) | overrides)
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(family.in_their_words(str(error), mapping)) from None

    def to_hf(self, source: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return a `config.json` that transformers 4 and 5 read.

        Args:
            source: The `config.json` to start from; what it says beyond our fields is kept.

        Raises:
            UserError: No family of checkpoints can express this config.
        """
        if self.family is None:
            field_name = min((_inexpressible(self, family) for family in FAMILIES.values()), key=len)[0]
            raise UserError(
                f"No architecture of Hugging Face's can express this config, whose `{field_name}` is {getattr(self, field_name)!r}, "
                "so it can be saved but not exported."
            )
        family = FAMILIES[self.family]
        return family.write(_folded(self), source, lambda written: _meaning(family, written))

    def check_family(self) -> None:
        """Raise a `UserError` if the `family` that was given cannot express this config, so that another one or none takes its place."""
        if self.wanted_family in (None, self.family):
            return
        family = FAMILIES[self.wanted_family]
        wrong = _inexpressible(self, family)
        name = next((name for name in wrong if getattr(self, name) != family.base.get(name, getattr(self, name))), wrong[0])
        raise UserError(
            f"`family` is {family.model_type!r}, which cannot express that `{name}` is {getattr(self, name)!r}. "
            "Change that field, or leave `family` out."
        )

    def to_own(self) -> dict[str, Any]:
        """Return a `config.json` of our own, for a config that no family can express."""
        return {"model_type": OWN_TYPE} | {name: value for name, value in self.to_dict().items() if name in DEFAULTS and name != "family"}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain values."""
        return asdict(self)

    def to_litgpt(self) -> dict[str, Any]:
        """Return the fields that LitGPT's own `Config` takes.

        Raises:
            UserError: LitGPT has no such architecture.
        """
        return to_litgpt(self.to_dict(), DEFAULTS)

    def save(self, path: str | Path) -> None:
        """Write all fields as YAML.

        Args:
            path: The file, or the folder to put `model_config.yaml` into.
        """
        path = Path(path)
        path = path if path.suffix in (".yaml", ".yml") else path / names.LIT_CONFIG
        values = {name: value for name, value in self.to_dict().items() if name in DEFAULTS}
        path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    @property
    def rules(self) -> list[Rule]:
        """The rules that rename its weights; the names stay ours where no family can express it."""
        rules = FAMILIES[self.family].rules if self.family is not None else OWN_RULES
        return [rule for rule in rules if all(getattr(self, name) == value for name, value in rule.only)]

    @property
    def rope_n_elem(self) -> int:
        """How many features of each head are rotated."""
        if self.latent_attention is not None:
            return self.latent_attention["qk_rope_head_dim"]
        return int(self.rotary_percentage * self.head_size)

    @property
    def qkv_sizes(self) -> list[int]:
        """How many rows of the fused projection are queries, keys and values."""
        return [heads * self.head_size for heads in (self.n_head, self.n_query_groups, self.n_query_groups)]

    @property
    def softmax_scale(self) -> float:
        """What attention's scores are multiplied by."""
        if self.attention_scale is not None:
            return self.attention_scale
        return (self.attention_scores_scalar or self.head_size) ** -0.5

    @property
    def turns(self) -> tuple[int | None, ...]:
        """For each layer which angles it turns by: 0 for the global base, 1 for the local one, None for none."""
        if self.rope_n_elem == 0:
            return (None,) * self.n_layer
        return tuple(self.rope_indices or [0] * self.n_layer)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """For each layer how many tokens a token sees, or None if all."""
        indices = self.sliding_window_indices or [0] * self.n_layer
        return tuple(self.sliding_window_size if index else None for index in indices)


def family_of(config: Config) -> Family | None:
    """Return the first family that can express a config, or None."""
    return next((family for family in FAMILIES.values() if not _inexpressible(config, family)), None)


def refuse_quantization(quantization_config: Mapping[str, Any] | None) -> None:
    """Raise a `UserError` if weights are stored in a way that cannot be read.

    Args:
        quantization_config: What `config.json` says about it, or None.
    """
    if quantization_config is None:
        return
    if not isinstance(quantization_config, Mapping):
        raise UserError(f"`quantization_config` is a mapping in config.json, but got {quantization_config!r}.")
    method = quantization_config.get("quant_method", "unknown")
    if method not in QUANTIZATIONS:
        raise UserError(f"The weights are quantized by {method!r}, which cannot be read. Use the model that is not quantized.")


# Reading


def _accepted(cls: type, values: dict[str, Any], where: str = "The config") -> dict[str, Any]:
    """Return fields that the class has, or raise a `UserError` that names the one it does not have."""
    known = [f.name for f in fields(cls)]
    for name in values:
        if name not in known:
            raise UserError(f"{where} has no field {name!r}.{did_you_mean(str(name), known)}")
    return values


def _holds_only_litgpts_weights(path: Path) -> bool:
    theirs = any(next(path.glob(pattern), None) for pattern in ("*.safetensors", "*.bin"))
    return not theirs and any((path / name).is_file() for name in (names.LIT_WEIGHTS, names.LIT_LORA))


def _identity(path: Path) -> dict[str, Any]:
    """Return name and origin of a checkpoint directory: as `model_config.yaml` says, or the place of a download."""
    hub_id = "/".join(path.resolve().parts[-2:])
    if is_file(path / names.LIT_CONFIG):
        try:
            described = read_yaml(path / names.LIT_CONFIG)
        except UserError:
            described = {}  # config.json alone describes the model
        if described.get("name"):
            origin = described.get("hf_config")
            return dict(name=str(described["name"]), hf_config=origin if isinstance(origin, dict) else {})
    if hub_id in BY_ANY_NAME:
        known = name_to_config[BY_ANY_NAME[hub_id]]
        return dict(name=known["name"], hf_config=dict(known["hf_config"]))
    return dict(name=path.resolve().name)


def _family_of_type(mapping: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`."""
    model_type, architectures = mapping.get("model_type"), mapping.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    supported = f"Supported are: {', '.join(FAMILIES)}."
    if model_type is None:
        raise UserError(f"config.json has no `model_type`, so its architecture is not known. {supported}")
    families = [family for family in FAMILIES.values() if model_type in (family.model_type, *family.wrappers)]
    text = mapping.get("text_config")
    text_type = text.get("model_type") if isinstance(text, Mapping) else None
    family = next((family for family in families if text_type in (family.model_type, None) or model_type == family.model_type), None)
    if families and family is None:
        texts = ", ".join(family.model_type for family in families)
        raise UserError(
            f"config.json says the text model of {model_type!r} is a {text_type!r}, which is not supported. Supported are: {texts}."
        )
    if family is None:
        classes = f" ({', '.join(map(str, architectures))})" if architectures else ""
        raise UserError(f"config.json says the `model_type` is {model_type!r}{classes}, which is not supported. {supported}")
    known = {name.lower() for name in family.architectures}  # early files have other capitals
    if model_type == family.model_type and architectures and not known & {str(name).lower() for name in architectures}:
        raise UserError(
            f"config.json says the model is a {', '.join(map(str, architectures))}, which is not supported. "
            f"Of {model_type!r} models, supported are: {', '.join(family.architectures)}."
        )
    return family


# Which family can express a config

NOT_COMPARED = {"name", "hf_config", "family", "vocab_size", "padding_multiple", "bias"}  # none of these changes the model
DEFAULTS = {f.name: f.default for f in fields(Config)} | dict(hf_config={})
OWN_RULES = [
    same(name, name) if rule.kind != "tied" else Rule("tied", (name,), (name,))
    for name, rule in {name: rule for family in FAMILIES.values() for rule in family.weights for name in rule.ours}.items()
]


def _expressing_family(config: Config) -> str | None:
    if config.family is not None and config.family not in list(FAMILIES):  # a list, as it may be anything
        raise UserError(f"`family` is one of {', '.join(FAMILIES)} or null, but got {config.family!r}.")
    if config.family is not None and not _inexpressible(config, FAMILIES[config.family]):
        return config.family
    found = family_of(config)
    return found.model_type if found else None


def _inexpressible(config: Config, family: Family) -> list[str]:
    """Return the fields that a family's `config.json` would not bring back as they are."""
    ours = _folded(config)
    try:
        back = _meaning(family, family.write(ours)) or {}
    except UserError:  # the family has no words for it
        back = {}
    return [name for name in DEFAULTS if name not in NOT_COMPARED and ours[name] != back.get(name)]


def _meaning(family: Family, mapping: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return all fields that a `config.json` of a family stands for, or None if it cannot be read."""
    try:
        back = SimpleNamespace(**DEFAULTS | family.read(mapping))
        complete(back, DEFAULTS)
    except UserError:
        return None
    return vars(back)


def _folded(config: Config) -> dict[str, Any]:
    """Return the fields of a config with its RoPE scaling spelled in the one way that families write."""
    values = {name: getattr(config, name) for name in DEFAULTS}
    rope, ratio = canonical_rope(config.rope_adjustments), config.rope_condense_ratio
    if ratio != 1 and (rope is None or rope.keys() == {"factor"}):
        rope, ratio = dict(factor=float(ratio) * (rope["factor"] if rope else 1)), 1
    return values | dict(rope_adjustments=rope, rope_condense_ratio=ratio)
