"""The architecture of a model: `Config`, and the names under which checkpoints were published."""

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from litgpt import names
from litgpt.errors import MissingFile, UserError, did_you_mean
from litgpt.families import FAMILIES, Family
from litgpt.families.tables import format_rope, parse_rope
from litgpt.weights import Rule, same

OWN_TYPE = "litgpt"  # the `model_type` of a checkpoint that no family can express
QUANTIZATIONS: tuple[str, ...] = ()  # the `quant_method`s whose weights `litgpt.translate.dequantized` reads
MIXERS = ("attention",)
NORMS = ("LayerNorm", "RMSNorm")
MLPS = ("GptNeoxMLP", "LLaMAMLP")


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
    norm_class_name: str = "LayerNorm"
    norm_eps: float = 1e-5
    parallel_residual: bool = True
    """Whether attention and MLP read the same input, instead of the MLP what attention adds."""
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
    lm_head_bias: bool = False
    sliding_window_size: int | None = None
    """How many tokens a token sees, itself included. None: all before it."""
    sliding_window_indices: list[int] | None = None
    """For each layer 1 if it has the window, else 0. None: all have it."""
    rope_base: int | float = 10000
    rotary_percentage: float = 0.25
    """The rotated share of each head."""
    rope_condense_ratio: int | float = 1
    """Positions are divided by this."""
    rope_adjustments: dict[str, Any] | None = None
    """How frequencies are stretched: `factor` alone is linear; `dynamic`, or keys of Llama 3 or YaRN, name those ways."""
    intermediate_size: int | None = None
    """The width inside the MLP. None: four times `n_embd`."""
    mlp_class_name: str = "GptNeoxMLP"
    gelu_approximate: str = "none"
    tie_embeddings: bool = False
    """Whether the head is the embedding's matrix."""
    mixers: list[str] | None = None
    """For each layer what mixes tokens. None: attention everywhere."""

    def __post_init__(self) -> None:
        _complete(self)
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
        if name not in _BY_ANY_NAME:
            hint = "Known names are shown by `litgpt download list`."
            raise UserError(f"{name!r} is not a known model name.{did_you_mean(name, _BY_ANY_NAME)} {hint}")
        return cls(**_accepted(cls, deepcopy(name_to_config[_BY_ANY_NAME[name]]) | overrides))

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
        if not path.is_file():
            raise MissingFile(f"There is no config file {str(path)!r}.")
        try:
            mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if not isinstance(mapping, dict) or not mapping:
            raise UserError(f"{path} is empty or holds no fields of a config. Copy the file from the checkpoint again.")
        return cls(**_accepted(cls, _without_litgpts(mapping, path) | overrides, str(path)))

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
        if litgpts.is_file() and (not theirs.is_file() or _holds_only_litgpts_weights(path)):
            return cls.from_file(litgpts, **overrides)
        if not theirs.is_file():
            raise MissingFile(f"{path} is not a checkpoint directory: it holds neither {names.CONFIG} nor {names.LIT_CONFIG}.")
        try:
            mapping = json.loads(theirs.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{theirs} is not valid JSON: {error}. Download it again.") from None
        if not isinstance(mapping, dict):
            raise UserError(f"{theirs} must hold the fields of a config, but does not. Download it again.")
        return cls.from_hf(mapping, **_identity(path) | overrides)

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
        return cls(**_accepted(cls, dict(family=family.model_type) | family.read(mapping) | overrides))

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
        return FAMILIES[self.family].write(_folded(self), source)

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
        rope = self.rope_adjustments or {}
        problem = next(
            (
                name
                for name, wrong in (
                    ("mlp_bias", self.mlp_bias != self.attn_proj_bias),
                    ("attn_bias", bool(self.mlp_bias and not self.attn_bias)),
                    ("rope_adjustments", not rope.keys() <= LITGPTS_ROPE_KEYS),
                    ("mixers", set(self.mixers) != {"attention"}),
                )
                if wrong
            ),
            None,
        )
        if problem:
            raise UserError(f"LitGPT cannot express this config, whose `{problem}` is {getattr(self, problem)!r}.")
        kept = {key: value for key, value in self.to_dict().items() if key in DEFAULTS.keys() - OURS_ALONE}
        return kept | dict(bias=self.mlp_bias, attn_bias=bool(self.attn_bias and not self.mlp_bias))

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
        return FAMILIES[self.family].rules if self.family is not None else OWN_RULES

    @property
    def rope_n_elem(self) -> int:
        """How many features of each head are rotated."""
        return int(self.rotary_percentage * self.head_size)

    @property
    def qkv_sizes(self) -> list[int]:
        """How many rows of the fused projection are queries, keys and values."""
        return [heads * self.head_size for heads in (self.n_head, self.n_query_groups, self.n_query_groups)]

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
    method = quantization_config.get("quant_method", "unknown") if isinstance(quantization_config, Mapping) else quantization_config
    if method not in QUANTIZATIONS:
        raise UserError(f"The weights are quantized by {method!r}, which cannot be read. Use the model that is not quantized.")


def prompt_of(name: str) -> str | None:
    """Return the prompt style that a published checkpoint was tuned with, if any.

    Args:
        name: LitGPT's name for it, its name on the hub, or `org/name`.
    """
    return _PROMPTS.get(_BY_ANY_NAME.get(name, ""))


def known_names() -> list[str]:
    """Return every published checkpoint as `org/name`, in the order of the alphabet."""
    hub_ids = (_hub_id(config["hf_config"]) for config in configs)
    return sorted(hub_ids, key=lambda hub_id: (hub_id.lower(), hub_id))


def find_multiple(n: int, k: int) -> int:
    """Return the smallest multiple of k that is at least n."""
    if k < 1:
        raise UserError(f"`padding_multiple` is at least 1, but got {k}.")
    return -(-n // k) * k


# What was published

_PUBLISHED = [(family, row) for family in FAMILIES.values() for row in family.published()]
configs: list[dict[str, Any]] = [
    dict(name=row.name, hf_config=dict(org=row.org, name=row.hub_name), family=family.model_type) | row.fields for family, row in _PUBLISHED
]
name_to_config: dict[str, dict[str, Any]] = {config["name"]: config for config in configs}
_PROMPTS = {row.name: row.prompt for _, row in _PUBLISHED}


def _hub_id(hf_config: dict[str, str]) -> str:
    return f"{hf_config['org']}/{hf_config['name']}"


_BY_ANY_NAME = (
    {_hub_id(config["hf_config"]): config["name"] for config in configs}
    | {config["hf_config"]["name"]: config["name"] for config in configs}
    | {name: name for name in name_to_config}
)


# Reading

OURS_ALONE = {"family", "attn_proj_bias", "mlp_bias", "tie_embeddings", "mixers"}  # a file that has one of these is ours, not LitGPT's
LITGPTS_ROPE_KEYS = {
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_seq_len",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
}
LITGPTS_DEFAULTS: dict[str, Any] = dict(  # of the fields that we do not have
    norm_qk=False,
    norm_qk_type="default",
    post_attention_norm=False,
    post_mlp_norm=False,
    shared_attention_norm=False,
    norm_1=True,
    norm_2=True,
    attention_scores_scalar=None,
    attention_logit_softcapping=None,
    final_logit_softcapping=None,
    latent_attention=None,
    rope_interleave=False,
    rope_local_base_freq=None,
    rope_indices=None,
    moe_intermediate_size=None,
    n_expert=0,
    n_expert_per_token=0,
    n_shared_expert=None,
    n_expert_groups=None,
    n_topk_groups=None,
    n_topk_scores_per_group=None,
    first_k_dense_replace=None,
    routed_scaling_factor=1.0,
    norm_topk_prob=False,
    scale_embeddings=False,
)


def _without_litgpts(mapping: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the fields of a `model_config.yaml` without those that LitGPT has and we do not, as long as they ask for nothing."""
    for name, default in LITGPTS_DEFAULTS.items():
        if name in mapping and mapping[name] != default and not (mapping[name] is None and not default):
            raise UserError(f"{path} sets `{name}` to {mapping[name]!r}, which is not supported; only {default!r} is.")
    kept = {name: value for name, value in mapping.items() if name not in LITGPTS_DEFAULTS}
    if not OURS_ALONE & kept.keys() and not kept.get("attn_bias"):
        kept.pop("attn_bias", None)  # LitGPT's false means: as `bias` says
    return kept


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
    if (path / names.LIT_CONFIG).is_file():
        try:
            described = yaml.safe_load((path / names.LIT_CONFIG).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            described = None  # config.json alone describes the model
        if isinstance(described, dict) and described.get("name"):
            return dict(name=str(described["name"]), hf_config=described.get("hf_config") or {})
    if hub_id in _BY_ANY_NAME:
        known = name_to_config[_BY_ANY_NAME[hub_id]]
        return dict(name=known["name"], hf_config=dict(known["hf_config"]))
    return dict(name=path.resolve().name)


def _family_of_type(mapping: Mapping[str, Any]) -> Family:
    """Return the family of a `config.json`."""
    model_type, architectures = mapping.get("model_type"), mapping.get("architectures") or []
    architectures = architectures if isinstance(architectures, list) else [architectures]
    supported = f"Supported are: {', '.join(FAMILIES)}."
    if model_type is None:
        raise UserError(f"config.json has no `model_type`, so its architecture is not known. {supported}")
    family = next((family for family in FAMILIES.values() if model_type in (family.model_type, *family.wrappers)), None)
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


# Checking and completing

POSITIVE = (
    *("block_size", "n_layer", "n_embd", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("n_head", "head_size", "n_query_groups", "sliding_window_size", "intermediate_size"),
)
MOST = {"n_layer": 10_000}  # a damaged file must not make us fill the memory
NUMBERS = ("norm_eps", "rope_base", "rotary_percentage", "rope_condense_ratio")
FLAGS = ("parallel_residual", "bias", "attn_bias", "attn_proj_bias", "mlp_bias", "lm_head_bias", "tie_embeddings")
CHOICES = {"norm_class_name": NORMS, "mlp_class_name": MLPS, "gelu_approximate": ("none", "tanh")}


def _complete(config: Any) -> None:
    """Check the fields of a config, and put values in the place of None."""
    _check_types(config)
    config.name = config.name or (config.hf_config or {}).get("name", "")
    if config.head_size is None:
        if config.n_embd % config.n_head:
            raise UserError(
                f"`n_embd` is a multiple of `n_head`, unless `head_size` is given, but got {config.n_embd} and {config.n_head}."
            )
        config.head_size = config.n_embd // config.n_head
    if config.padded_vocab_size is None:
        config.padded_vocab_size = find_multiple(config.vocab_size, config.padding_multiple)
    config.vocab_size = min(config.vocab_size, config.padded_vocab_size)
    config.n_query_groups = config.n_query_groups or config.n_head
    if config.n_head % config.n_query_groups:
        raise UserError(f"`n_head` is a multiple of `n_query_groups`, but got {config.n_head} and {config.n_query_groups}.")
    if (n := int(config.rotary_percentage * config.head_size)) % 2:
        raise UserError(
            f"The rotated share of a head has pairs of features, but `head_size` {config.head_size} rotates {n}. Choose an even number."
        )
    if config.intermediate_size is None:
        if config.mlp_class_name == "LLaMAMLP":
            raise UserError("`mlp_class_name` is 'LLaMAMLP', which needs an `intermediate_size`, but that is not given.")
        config.intermediate_size = 4 * config.n_embd
    for name in ("attn_bias", "attn_proj_bias", "mlp_bias"):
        if getattr(config, name) is None:
            setattr(config, name, config.bias)
    _complete_layers(config)
    if config.rope_adjustments is not None:
        config.rope_adjustments = dict(config.rope_adjustments) or None
        _canonical_rope(config.rope_adjustments)  # checks it


def _complete_layers(config: Any) -> None:
    if config.sliding_window_size is None:
        config.sliding_window_indices = None
    else:
        config.sliding_window_indices = _per_layer(config, "sliding_window_indices", 1, (0, 1))
    config.mixers = _per_layer(config, "mixers", "attention", MIXERS)


def _per_layer(config: Any, name: str, default: Any, allowed: tuple) -> list:
    """Return one value for each layer; a list for a deeper model is cut, so that a config can be made shallower."""
    values = getattr(config, name)
    values = [default] * config.n_layer if values is None else list(values)
    if len(values) < config.n_layer:
        raise UserError(f"`{name}` has one value for each layer, but got {len(values)} for {config.n_layer} layers.")
    for value in values:
        if value not in allowed:
            raise UserError(f"`{name}` holds {value!r}, but allowed are: {', '.join(map(repr, allowed))}.")
    return values[: config.n_layer]


def _check_types(config: Any) -> None:
    for name in (*POSITIVE, *NUMBERS, *FLAGS):
        value = getattr(config, name)
        if value is None and DEFAULTS[name] is None:
            continue
        if name in FLAGS:
            right, rule = isinstance(value, bool), "true or false"
        else:
            value = _number(value)
            setattr(config, name, value)
            right = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
            right = right and (value > 0 or name in ("norm_eps", "rotary_percentage"))
            rule = "a positive number"
            if name in POSITIVE:
                most = MOST.get(name, 2**31)
                right, rule = right and isinstance(value, int) and value <= most, f"a positive whole number of at most {most}"
        if not right:
            raise UserError(f"`{name}` is {rule}, but got {value!r}.")
    if config.rotary_percentage > 1:
        raise UserError(f"`rotary_percentage` is a share between 0 and 1, but got {config.rotary_percentage}.")
    for name, allowed in CHOICES.items():
        if (value := getattr(config, name)) not in allowed:
            raise UserError(f"`{name}` is one of {', '.join(allowed)}, but got {value!r}.{did_you_mean(str(value), allowed)}")
    if not isinstance(config.rope_adjustments, dict | None):
        raise UserError(f"`rope_adjustments` is a mapping or null, but got {config.rope_adjustments!r}.")


def _number(value: Any) -> Any:
    """Return the number that a text spells (YAML reads `1e-5` as text), and a whole one without a fraction as such."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Which family can express a config

NOT_COMPARED = {"name", "hf_config", "family", "vocab_size", "padding_multiple", "bias"}  # none of these changes the model
DEFAULTS = {f.name: f.default for f in fields(Config)} | dict(hf_config={})
OWN_RULES = [
    same(name, name) if rule.kind != "tied" else Rule("tied", (name,), (name,))
    for name, rule in {name: rule for family in FAMILIES.values() for rule in family.weights for name in rule.ours}.items()
]


def _expressing_family(config: Config) -> str | None:
    if config.family is not None and config.family not in FAMILIES:
        raise UserError(f"`family` is one of {', '.join(FAMILIES)} or null, but got {config.family!r}.")
    if config.family is not None and not _inexpressible(config, FAMILIES[config.family]):
        return config.family
    found = family_of(config)
    return found.model_type if found else None


def _inexpressible(config: Config, family: Family) -> list[str]:
    """Return the fields that a family's `config.json` would not bring back as they are."""
    ours = _folded(config)
    try:
        back = SimpleNamespace(**DEFAULTS | family.read(family.write(ours)))
        _complete(back)
    except UserError:
        back = SimpleNamespace()
    return [name for name in DEFAULTS if name not in NOT_COMPARED and ours[name] != getattr(back, name, None)]


def _folded(config: Config) -> dict[str, Any]:
    """Return the fields of a config with its RoPE scaling spelled in the one way that families write."""
    values = {name: getattr(config, name) for name in DEFAULTS}
    rope, ratio = _canonical_rope(config.rope_adjustments), config.rope_condense_ratio
    if ratio != 1 and (rope is None or rope.keys() == {"factor"}):
        rope, ratio = dict(factor=float(ratio) * (rope["factor"] if rope else 1)), 1
    return values | dict(rope_adjustments=rope, rope_condense_ratio=ratio)


def _canonical_rope(adjustments: dict[str, Any] | None) -> dict[str, Any] | None:
    if not adjustments:
        return None
    known = LITGPTS_ROPE_KEYS | {"rope_type", "dynamic", "attention_factor", "truncate"}
    for key, value in adjustments.items():
        if key not in known:
            raise UserError(f"`rope_adjustments` has no key {key!r}.{did_you_mean(str(key), known)}")
        if key != "rope_type" and not isinstance(value, int | float | None):
            raise UserError(f"`{key}` in `rope_adjustments` is a number, but got {value!r}.")
    try:
        return parse_rope(format_rope(adjustments))
    except UserError:
        raise UserError(f"`rope_adjustments` lacks a value that its kind of scaling needs: {adjustments!r}.") from None
