import subprocess
import sys

import pytest
from tiny import EVERY_VARIANT, tiny_config

from litgpt.families import FAMILIES
from litgpt.weights import Rule, ignored, interleaved_qkv, joined, parted, prefixed, same, tied, where

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def test_rules_say_what_becomes_what():
    assert same("a.{}.*", "b.{}.*") == Rule("same", ("a.{}.*",), ("b.{}.*",))
    assert joined(["q", "k", "v"], "qkv") == Rule("joined", ("q", "k", "v"), ("qkv",))
    assert parted("gate_up", ["gate", "up"]) == Rule("parted", ("gate_up",), ("gate", "up"))
    assert interleaved_qkv("a", "b").kind == "interleaved_qkv"
    assert tied("a", "b") == Rule("tied", ("a",), ("b",))
    assert ignored("a") == Rule("ignored", ("a",), ())
    assert prefixed("there.", "usual.") == Rule("prefixed", ("there.",), ("usual.",))
    assert where(same("a", "b"), n_head=2, bias=True) == Rule("same", ("a",), ("b",), only=(("n_head", 2), ("bias", True)))


@EVERY_VARIANT
def test_no_weight_has_two_rules(model_type, changes):
    rules = [rule for rule in tiny_config(model_type, **changes).rules if rule.kind not in ("alias", "prefixed", "skipped")]
    for side in ("theirs", "ours"):
        names = [name for rule in rules for name in getattr(rule, side)]
        assert len(names) == len(set(names))


@EVERY_FAMILY
def test_both_sides_of_a_rule_have_the_same_numbers_and_ends(family):
    for rule in family.weights:
        numbers = [(name, name.count("{}")) for name in rule.ours]
        numbers += [(name, name.count("{}") - bool(rule.count)) for name in rule.theirs]
        shapes = {(number, name.endswith("*")) for name, number in numbers}
        assert len(shapes) == 1, rule


def test_rules_families_and_configs_need_no_torch():
    code = "import sys, litgpt.config; sys.exit(any(m in sys.modules for m in ('torch', 'lightning', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
