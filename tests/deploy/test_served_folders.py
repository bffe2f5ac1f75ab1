"""What finetuning leaves is served as it is: a LoRA run, an adapter folder, what Adapter and Adapter v2 trained."""

from functools import cache
from pathlib import Path

import pytest
from deploy.process import TERM, served
from deploy.serving import serving
from finetune.conftest import samples  # noqa: F401
from finetune.test_adapters import arguments, base  # noqa: F401

from litgpt import LLM
from litgpt.deploy.serve import run_server
from litgpt.errors import UserError
from litgpt.finetune import adapter, adapter_v2, lora

METHODS = {"lora": lora, "adapter": adapter, "adapter_v2": adapter_v2}
PROMPT = "Say 3"
ASKED = {"prompt": PROMPT, "temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def runs(base: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a finished run of each method."""
    place = tmp_path_factory.mktemp("runs")
    for name, module in METHODS.items():
        module.setup(base, **arguments(samples, place / name, max_steps=3))
    return place


@cache
def said(folder: Path) -> str:
    """What the Python interface answers."""
    llm = LLM.load(folder, distribute=None)
    llm.distribute(precision="32-true")
    return llm.generate(PROMPT, max_new_tokens=12, temperature=0.0)


FOLDERS = [f"{name}/{part}" for name in METHODS for part in ("final", "step-000003")] + ["lora/final/adapter"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_of_a_run_answers_over_the_network_what_it_answers_in_python(runs, base, folder):  # noqa: F811
    expected = said(runs / folder)
    assert expected == said(runs / folder.split("/")[0] / "final") != said(base)
    with serving(runs / folder) as server:
        assert server.post("/predict", ASKED).json() == {"output": expected}
        chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12}
        assert server.post("/v1/chat/completions", chat).json()["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("words", [["adapter_v2/final"], ["lora/final/adapter"]], ids=" ".join)
def test_the_command_takes_the_folder_in_the_place_of_a_model(runs, base, words, tmp_path):  # noqa: F811
    [folder] = words
    with served(runs / folder, tmp_path, "--temperature", 0) as server:
        assert server.ask("/predict", {"prompt": PROMPT, "max_new_tokens": 12}) == (200, {"output": said(runs / folder)})
        assert server.ask("/v1/models")[1]["data"][0]["id"] == Path(folder).name
        server.signal(TERM)
        assert server.exit_code() == 0


@pytest.mark.parametrize("method", ["adapter", "adapter_v2"])
@pytest.mark.parametrize("way", ["in the place of the model", "beside the model"])
def test_beside_what_adapter_trained_no_lora_adapters_are_taken(runs, base, tmp_path, method, way):  # noqa: F811
    final = runs / method / "final"
    model, more = (final, {}) if way == "in the place of the model" else (base, {"adapter": final})
    for flag in ({"adapter_dir": tmp_path}, {"adapters": {"mine": runs / "lora" / "final" / "adapter"}}):
        with pytest.raises(UserError, match="No LoRA adapters can stand beside what Adapter trained"):
            run_server(model, port=0, **flag, **more)
