"""Recipes of both generations of LitGPT's, read from an address and run."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from speaking import make_checkpoint

from litgpt import cli, names
from litgpt.metrics import Journal

OF_ADAMW = dict(lr=3e-3, weight_decay=0.02, betas=[0.8, 0.95])
SHARED = {  # as LitGPT's own recipes are written
    **dict(checkpoint_dir="checkpoints/some/model", out_dir="out/finetune/some-model", precision="bf16-true", devices=1),
    **dict(lora_r=4, lora_alpha=16, lora_dropout=0.05, lora_query=True, lora_key=False, lora_value=True, lora_mlp=False, lora_head=False),
    "data": {
        "class_path": "litgpt.data.Alpaca2k",
        "init_args": dict(mask_prompt=False, val_split_fraction=0.2, prompt_style="alpaca", ignore_index=-100, seed=42, num_workers=4)
        | dict(download_dir="data/alpaca2k"),
    },
    "train": dict(save_interval=200, log_interval=1, global_batch_size=4, micro_batch_size=2, lr_warmup_steps=2, epochs=1, max_tokens=None)
    | dict(max_steps=None, max_seq_length=64, tie_embeddings=None, max_norm=None, min_lr=6e-5),
    "eval": dict(interval=100, max_new_tokens=5, max_iters=100),
    **dict(logger_name="csv", seed=1337),
}
OLDER = dict(learning_rate=OF_ADAMW["lr"], weight_decay=OF_ADAMW["weight_decay"], beta1=OF_ADAMW["betas"][0], beta2=OF_ADAMW["betas"][1])
RECIPES = {
    "0.5": SHARED
    | dict(quantize=None, num_nodes=1)
    | dict(eval=SHARED["eval"] | dict(initial_validation=False, final_validation=True))
    | {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": OF_ADAMW}},
    "2024": SHARED | dict(quantize="bnb.nf4", train=SHARED["train"] | OLDER),
}
PAGES = {f"/{name}.yaml": yaml.safe_dump(recipe, sort_keys=False) for name, recipe in RECIPES.items()}
PAGES |= {"/page.yaml": "<!DOCTYPE html>\n<html><head><title>recipe.yaml: a page about it</title></head></html>\n", "/text.yaml": "moved"}


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The address of a server that has the recipes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path in PAGES else 404)
            self.end_headers()
            self.wfile.write(PAGES.get(self.path, "").encode())

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that put what is on this disk in the place of what is on the hub."""
    folder = tmp_path_factory.mktemp("here")
    make_checkpoint(folder / "model")
    (folder / "alpaca").mkdir()
    records = [{"instruction": f"Say {i}", "input": "", "output": "yes " * (1 + i % 5), "text": ""} for i in range(10)]
    (folder / "alpaca" / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    return ["--checkpoint_dir", str(folder / "model"), "--data.repo_id", str(folder / "alpaca"), "--precision", "32-true"]


@pytest.mark.parametrize("generation", RECIPES)
def test_a_recipe_at_an_address_trains_as_it_says_but_for_the_flags_before_and_after_it(
    site: str, here: list[str], tmp_path: Path, generation: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(PAGES[f"/{generation}.yaml"])
    for name, where in (("linked", f"{site}/{generation}.yaml"), ("copied", "recipe.yaml")):
        before, after = ["--optimizer.lr", "1e-3", "--lora_r", "2"], ["--out_dir", name, "--train.epochs", "2"]
        assert cli.main(["finetune", *before, *here, "--config", where, *after]) == 0
    given = yaml.safe_load((tmp_path / "linked" / "final" / names.HYPERPARAMETERS).read_text())
    recipe, train, of_data = RECIPES[generation], SHARED["train"] | dict(epochs=2), SHARED["data"]["init_args"]
    assert {key: given["optimizer"][key] for key in OF_ADAMW} == OF_ADAMW | dict(lr=1e-3)
    assert {key: given["train"][key] for key in train} == train
    assert {key: given["data"]["init_args"][key] for key in of_data} == of_data
    assert (given["quantize"], given["lora_r"], given["lora_alpha"]) == (recipe["quantize"], 2, 16)
    linked, copied = (
        [[row.get(column) for column in ("step", "loss", "val_loss", "learning_rate", "answer")] for row in rows]
        for rows in (Journal(tmp_path / name / "logs" / "metrics.jsonl").rows() for name in ("linked", "copied"))
    )
    assert linked == copied
    assert [row[3] for row in linked if row[1]] == pytest.approx([5e-4, 1e-3, 6e-5 + 0.5 * (1e-3 - 6e-5), 6e-5], rel=1e-6)


@pytest.mark.parametrize("page, why", [("nowhere.yaml", "404"), ("page.yaml", "YAML"), ("text.yaml", "A recipe is a mapping")])
def test_an_address_without_a_recipe_is_one_line(site: str, here: list[str], page: str, why: str, capsys: pytest.CaptureFixture):
    assert cli.main(["finetune", "--config", f"{site}/{page}", *here]) == 2
    said = capsys.readouterr().err.strip()
    assert why in said and f"{site}/{page}" in said and "\n" not in said
