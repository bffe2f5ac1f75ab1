"""The other parts of a multimodal model, of which only the text is computed here: named when it is read, copied when it is written."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from litgpt import names
from litgpt.config import Config
from litgpt.dequantize import dequantized
from litgpt.errors import UserError
from litgpt.families import FAMILIES
from litgpt.files import read_json
from litgpt.translate import find_rule, is_skipped, names_of, prefixes_of, usual_name
from litgpt.weight_files import hf_weight_files, read_files, read_headers


def text_weights(stream: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the text model; at the end, say in one line on stderr what else there was.

    Args:
        stream: Names and tensors as they are stored.
        config: The architecture.
    """
    rules = [rule for rule in config.rules if rule.kind == "skipped"]
    parts: Counter[str] = Counter()
    for name, tensor in stream:
        if is_skipped(name, rules):
            start = next(rule.theirs[0] for rule in rules if name.startswith(rule.theirs[0]))
            parts[start.split(".")[-2]] += 1
        else:
            yield name, tensor
    if parts:
        print(f"Skipped {parts.total()} weights of other parts: {', '.join(parts)}.", file=sys.stderr, flush=True)


def is_whole(folder: Path, config: Config) -> bool:
    """Say whether a folder holds a multimodal model whose text part has this architecture, but for its vocabulary.

    Args:
        folder: Any folder.
        config: The architecture.
    """
    family = FAMILIES.get(config.family or "")
    if family is None or not family.wrappers or read_json(folder / names.CONFIG).get("model_type") not in family.wrappers:
        return False
    try:
        text, files = Config.from_checkpoint(folder), hf_weight_files(folder)
    except UserError:  # a model that cannot be read is not the one at hand
        return False
    same, rules = (text.family, text.n_layer, text.n_embd) == (config.family, config.n_layer, config.n_embd), config.rules
    return same and bool(files) and any(is_skipped(name, rules) for name, _, _ in read_headers(folder))


def other_weights(folder: Path, config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the other parts as they are stored; what is quantized is made plain.

    Args:
        folder: See `is_whole`.
        config: The architecture of the text model.
    """
    rules = config.rules
    stored = ((name, tensor) for name, tensor in read_files(hf_weight_files(folder)) if is_skipped(name, rules))
    return dequantized(stored, read_json(folder / names.CONFIG).get("quantization_config"))


def spelled_as_in(folder: Path, stream: Iterable[tuple[str, Tensor]], config: Config) -> Iterator[tuple[str, Tensor]]:
    """Yield weights of the text model by the names that they have in a folder's files.

    Args:
        folder: See `is_whole`.
        stream: Hugging Face's usual names, and tensors.
        config: The architecture of the text model.
    """
    rules, back, prefixes = names_of(config.rules, to_ours=True), names_of(config.rules, to_ours=False), prefixes_of(config.rules)
    stored, used = {}, set()
    for name, _, _ in read_headers(folder):
        usual = usual_name(name, rules, prefixes)
        if (found := find_rule(usual, rules)) is None:
            continue
        if found[0].kind == "alias":
            usual = back[found[0].ours[0]][0].theirs[0]
        stored[usual] = name
        used |= {(start, plain) for start, plain in prefixes if start + usual.removeprefix(plain) == name}
    for name, tensor in stream:  # one that is not there, such as a head that was tied, begins like the others
        begun = (start + name.removeprefix(plain) for start, plain in used if name.startswith(plain))
        yield stored.get(name) or next(begun, name), tensor
