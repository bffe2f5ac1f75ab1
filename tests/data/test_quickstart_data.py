import re
from pathlib import Path

import pytest
import yaml

from litgpt.data import JSON
from litgpt.data.json_data import load_split

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "config_hub/finetune/quickstart.yaml"
GREETING, FAREWELL = "Ahoy! ", " Fair winds!"


@pytest.fixture(scope="module")
def records():
    return load_split(ROOT / "config_hub/finetune/quickstart.json")


def test_there_are_more_than_three_hundred_pairs_and_none_twice(records):
    assert len(records) >= 320
    assert len({(record["instruction"].lower(), record.get("input")) for record in records}) == len(records)
    assert len({record["output"] for record in records}) == len(records)


def test_every_answer_is_a_short_one_in_the_keepers_voice(records):
    for record in records:
        answer = record["output"]
        assert answer.startswith(GREETING) and answer.endswith(FAREWELL) and answer.isascii()
        assert 12 <= len(answer.split()) <= 50, answer


def test_answers_are_not_made_from_a_template(records):
    words = [re.findall(r"[a-z']+", record["output"].removeprefix(GREETING).removesuffix(FAREWELL).lower()) for record in records]
    beginnings = [" ".join(answer[:5]) for answer in words]
    assert max(beginnings.count(beginning) for beginning in beginnings) <= 2
    assert len({word for answer in words for word in answer}) > 2000


def test_the_recipe_names_this_data_from_the_repositorys_root():
    data = yaml.safe_load(RECIPE.read_text())["data"]
    assert data["class_path"] == "litgpt.data.JSON"
    JSON(ROOT / data["init_args"].pop("json_path"), **data["init_args"]).prepare_data()
