"""What a family of checkpoints is: one `model_type` of Hugging Face's, described as data and used in both directions."""

from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import cached_property
from typing import Any

from litgpt.errors import UserError
from litgpt.weights import Rule, prefixed, skipped

NOT_CARRIED = ("auto_map", "quantization_config")  # neither remote code nor quantized weights are exported
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_TOKENS = dict.fromkeys(TOKEN_IDS)  # what transformers takes where they are left out may lie beyond the vocabulary
SLIDING, FULL = "sliding_attention", "full_attention"  # what layers are called that see a window, and all


@dataclass(frozen=True)
class Field:
    """One entry of `config.json` and the fields of our `Config` that hold the same."""

    theirs: tuple[str, ...]
    """All spellings that Hugging Face has used, the one that counts most first; a dot steps into a mapping."""
    ours: tuple[str, ...]
    """Our fields; all get the value, and the first one is written."""
    default: Any
    """Hugging Face's value, in its spelling, where the entry is left out."""
    parse: Callable[[Any], Any]
    """Turns their value into ours."""
    format: Callable[[Any], Any]
    """Turns ours into theirs."""
    respell: Callable[[Any], Any]
    """Turns what one of their spellings says into what another says."""

    def read(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return our fields of their `config.json`."""
        spelled = [value for spelling in self.theirs for found, value in [_look_up(mapping, spelling)] if found]
        value = next((value for value in spelled if value is not None), None) if spelled else self.default
        return dict.fromkeys(self.ours, self.parse(value))

    def silent(self, mapping: Mapping[str, Any]) -> bool:
        """Return whether a `config.json` leaves the entry out."""
        return not any(_look_up(mapping, spelling)[0] for spelling in self.theirs)

    def wrong(self, fields: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Return whether the one of our fields that is written has another value there."""
        return fields[self.ours[0]] != others[self.ours[0]]

    def write(self, mapping: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Put our fields into their `config.json` in all spellings; what says the same already stays as it is."""
        value = fields[self.ours[0]]
        present = {spelling: said for spelling in self.theirs for found, said in [_look_up(mapping, spelling)] if found}
        right = {  # null stands for no value alone: a row that is written later may put something beside it
            spelling: said for spelling, said in present.items() if (said is None) <= (value is None) and _says(self.parse, said, value)
        }
        said = next((said for said in right.values() if said is not None), None)
        for spelling in self.theirs:
            if spelling not in right:
                _put(mapping, spelling, self.format(value) if value is None or said is None else self.respell(said))


def field(
    theirs: str | list[str],
    ours: str | list[str],
    default: Any = None,
    parse: Callable[[Any], Any] = lambda value: value,
    format: Callable[[Any], Any] = lambda value: value,
    respell: Callable[[Any], Any] = lambda value: value,
) -> Field:
    """Return a row of a family's table, see `Field`."""
    return Field(*(tuple([names] if isinstance(names, str) else names) for names in (theirs, ours)), default, parse, format, respell)


@dataclass(frozen=True)
class Joint:
    """Entries of `config.json` that say some of our fields only together, such as what each layer is."""

    theirs: tuple[str, ...]
    """The entries."""
    ours: tuple[str, ...]
    """Our fields."""
    parse: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns our fields of their `config.json`."""
    format: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Returns their entries of our fields."""
    anew: Callable[[Mapping[str, Any]], bool] = lambda mapping: False
    """Whether the entries are written even where they say the same already, for we read more spellings than transformers does."""

    def read(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return our fields of their `config.json`."""
        return self.parse(mapping)

    def silent(self, mapping: Mapping[str, Any]) -> bool:
        """Return whether a `config.json` leaves all entries out."""
        return not any(key in mapping for key in self.theirs)

    def wrong(self, fields: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
        """Return whether one of our fields has another value there."""
        return any(fields[name] != others[name] for name in self.ours)

    def write(self, mapping: dict[str, Any], fields: Mapping[str, Any]) -> None:
        """Put our fields into their `config.json`, unless it says the same already."""
        try:
            same = any(key in mapping for key in self.theirs) and all(fields[name] == v for name, v in self.parse(mapping).items())
        except UserError:  # the source says what we cannot read; the config at hand says something else
            same = False
        if not same or self.anew(mapping):
            mapping.update(self.format(fields))


@dataclass(frozen=True)
class Brand:
    """Checkpoints that one organisation published. In all patterns `{a,b}` stands for `a` and `b`, so each means a few exact names."""

    org: str
    """The organisation's name on the Hugging Face Hub."""
    sizes: dict[str, dict[str, Any]]
    """For each pattern of names the `Config` fields of its own."""
    base: dict[str, Any] = dataclass_field(default_factory=dict)
    """The `Config` fields that all have in common."""
    prompt: str | dict[str, str] | None = None
    """The prompt style they were tuned with; where only some were, a style for each pattern of names."""
    published_as: dict[str, str] = dataclass_field(default_factory=dict)
    """A pattern of names on the hub for each pattern of names that differ from those."""
    also: dict[str, str] = dataclass_field(default_factory=dict)
    """A pattern of further ids, `org/name`, for each pattern of names that the hub knows by those too, such as before it renamed them."""


@dataclass(frozen=True)
class Published:
    """One published checkpoint."""

    name: str
    org: str
    hub_name: str
    fields: dict[str, Any]
    prompt: str | None
    also: str | None


@dataclass(frozen=True)
class Family:
    """All checkpoints of one `model_type`."""

    model_type: str
    """What `config.json` calls it."""
    architectures: list[str]
    """The classes of transformers that hold such a language model; the first one is written."""
    fields: list[Field | Joint]
    """How `config.json` spells our fields."""
    weights: list[Rule]
    """How its weights are named and laid out."""
    base: dict[str, Any]
    """Our fields that are the same in all its checkpoints."""
    brands: list[Brand]
    """What has been published."""
    wrappers: tuple[str, ...] = ()
    """Multimodal types whose `text_config` is of this type."""
    prefixes: tuple[tuple[str, str], ...] = ()
    """How some files begin names, and how the rules of `weights` begin them."""
    others: tuple[str, ...] = ()
    """How the names of a multimodal model's other weights begin, which are skipped on import and copied on export."""

    @cached_property
    def rules(self) -> list[Rule]:
        """The rules that rename its weights, with those for other spellings of the prefix."""
        return [*self.weights, *(prefixed(*pair) for pair in self.prefixes), *map(skipped, self.others)]

    def read(self, mapping: Mapping[str, Any]) -> dict[str, Any]:
        """Return our `Config` fields of a `config.json`.

        Args:
            mapping: What the file holds; of a multimodal model the text part counts.
        """
        text = mapping.get("text_config") if mapping.get("model_type") in self.wrappers else mapping
        if not isinstance(text, Mapping | None):
            raise UserError(f"`text_config` is a mapping in config.json, but got {text!r}.")
        fields = dict(self.base)
        for row in self.fields:
            fields |= row.read(text or {})
        return fields

    def in_their_words(self, sentence: str, mapping: Mapping[str, Any]) -> str:
        """Return a sentence about our fields that names the entries they come from too, as in "`hidden_size` (our `n_embd`)".

        Args:
            sentence: The names of fields stand between backticks.
            mapping: The `config.json` that was read.
        """
        text = mapping.get("text_config") if mapping.get("model_type") in self.wrappers else mapping
        for row in (row for row in self.fields if isinstance(row, Field)) if isinstance(text, Mapping) else ():
            there = [spelling for spelling in row.theirs if _look_up(text, spelling)[1] is not None]
            for ours in row.ours if there else ():
                if ours != there[0]:
                    sentence = sentence.replace(f"`{ours}`", f"`{there[0]}` (our `{ours}`)", 1)
        return sentence

    def write(
        self,
        fields: Mapping[str, Any],
        source: Mapping[str, Any] | None = None,
        meaning: Callable[[Mapping[str, Any]], Mapping[str, Any] | None] = lambda written: None,
    ) -> dict[str, Any]:
        """Return a `config.json` that transformers 4 and 5 read.

        Args:
            fields: Our `Config` fields.
            source: The `config.json` to start from. What no row maps is kept of one of this type; of another type only the token ids are.
            meaning: Returns all our fields of a `config.json`, or None of one that cannot be read. What the source leaves out is left out
                again where the result means the same.
        """
        source = dict(source or {})
        of_this_type = source.get("model_type") in (self.model_type, *self.wrappers)
        text = source.get("text_config") if source.get("model_type") in self.wrappers else source
        silent = [row for row in self.fields if of_this_type and row.silent(text or {})]
        while True:
            written = self._written(fields, source, silent)
            back = meaning(written) if silent else None
            still = [row for row in silent if back is not None and not row.wrong(fields, back)]
            if len(still) == len(silent):
                return written
            silent = still

    def _written(self, fields: Mapping[str, Any], source: dict[str, Any], silent: list[Field | Joint]) -> dict[str, Any]:
        """Return a `config.json` to which these rows add nothing."""
        source = deepcopy(source)
        wrapped = source.get("model_type") in self.wrappers
        if wrapped and self.read(source)["tie_embeddings"] != fields["tie_embeddings"]:
            source["tie_word_embeddings"] = fields["tie_embeddings"]
        kept = source.pop("text_config", None) or {} if wrapped else source
        if not wrapped and source.get("model_type") != self.model_type:
            kept = NO_TOKENS | {key: value for key, value in source.items() if key in TOKEN_IDS}
        written = dict(kept) if wrapped else {"architectures": self.architectures[:1], "model_type": self.model_type} | kept
        for row in self.fields:
            if not any(row is other for other in silent):
                row.write(written, fields)
        result = source | {"text_config": written} if wrapped else written
        return {key: value for key, value in result.items() if key not in NOT_CARRIED}

    def published(self) -> Iterator[Published]:
        """Yield every checkpoint of its brands, with the exact names that the patterns stand for."""
        for brand in self.brands:
            renamed = {ours: theirs for pair in brand.published_as.items() for ours, theirs in zip(*map(expand, pair), strict=True)}
            also = {name: hub_id for pair in brand.also.items() for name, hub_id in zip(*map(expand, pair), strict=True)}
            styles = brand.prompt if isinstance(brand.prompt, dict) else dict.fromkeys(brand.sizes, brand.prompt)
            prompts = {name: style for pattern, style in styles.items() for name in expand(pattern)}
            for pattern, sizes in brand.sizes.items():
                for name in expand(pattern):
                    fields = deepcopy(self.base | brand.base | sizes)
                    yield Published(name, brand.org, renamed.get(name, name), fields, prompts.get(name), also.get(name))


def whole(mapping: Mapping[str, Any], key: str, default: int, most: int = 10_000) -> int:
    """Return a whole number that an entry of `config.json` has to be, where it counts something."""
    value = mapping.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise UserError(f"`{key}` is a whole number of at most {most} in config.json, but got {value!r}.")
    return value


def expand(pattern: str) -> list[str]:
    """Return the names that a pattern stands for: `a{,-b}` is `a` and `a-b`."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    options, _, tail = rest.partition("}")
    return [head + option + end for option in options.split(",") for end in expand(tail)]


def _look_up(mapping: Mapping[str, Any], spelling: str) -> tuple[bool, Any]:
    """Return whether an entry is there, and its value."""
    first, _, rest = spelling.partition(".")
    if first not in mapping:
        return False, None
    value = mapping[first]
    if not rest:
        return True, value
    return _look_up(value, rest) if isinstance(value, Mapping) else (False, None)


def _put(mapping: dict[str, Any], spelling: str, value: Any) -> None:
    first, _, rest = spelling.partition(".")
    if not rest:
        mapping[first] = value
        return
    if not isinstance(mapping.get(first), dict):
        mapping[first] = {}
    _put(mapping[first], rest, value)


def _says(parse: Callable[[Any], Any], present: Any, value: Any) -> bool:
    try:
        return parse(present) == value
    except UserError:  # the source says what we cannot read; the config at hand says something else
        return False
