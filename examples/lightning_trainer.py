"""Finetune a model with Lightning's Trainer: your loop, your callbacks and loggers, our model and data.

Run it with: python examples/lightning_trainer.py MODEL DATA.json [TRAINER.ckpt]
"""

import sys
from pathlib import Path

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from litgpt import LLM
from litgpt.data import JSON


class Finetuned(LightningModule):
    """A model whose weights are all trained.

    Args:
        checkpoint_dir: The model, as `LLM.load` takes it.
        trainer_ckpt: A checkpoint of an earlier Trainer, to begin with its weights.
        lr: The learning rate after the warm-up.
    """

    def __init__(self, checkpoint_dir: str | Path, trainer_ckpt: Path | None = None, lr: float = 2e-5) -> None:
        super().__init__()
        self.llm = LLM.load(checkpoint_dir, distribute=None)  # the weights come in `setup`, on every process
        self.trainer_ckpt, self.lr = trainer_ckpt, lr

    def setup(self, stage: str) -> None:
        self.llm.trainer_setup(self.trainer_ckpt)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        _, loss = self.llm(batch["input_ids"], batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, loss = self.llm(batch["input_ids"], batch["labels"])
        self.log("val_loss", loss, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.llm.parameters(), lr=self.lr, weight_decay=0.0, betas=(0.9, 0.95))
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warm_up, "interval": "step"}}


def finetune(module: Finetuned, data_file: Path, **options: object) -> Trainer:
    """Train on the samples of a file, and return the Trainer, which has written a checkpoint.

    Args:
        module: What to train.
        data_file: Samples, as `litgpt.data.JSON` reads them.
        **options: Of the Trainer.
    """
    data = JSON(data_file, val_split_fraction=0.1)
    data.connect(module.llm.tokenizer, batch_size=2, max_seq_length=256)
    trainer = Trainer(**dict(max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1.0) | options)
    trainer.fit(module, data)
    return trainer


def main(checkpoint_dir: str, data_file: str, trainer_ckpt: str | None = None) -> None:
    """Finetune, ask the model a question, and write a folder that every command reads."""
    module = Finetuned(checkpoint_dir, None if trainer_ckpt is None else Path(trainer_ckpt))
    trainer = finetune(module, Path(data_file))
    llm = module.llm
    llm.model.to(llm.preprocessor.device)  # where the Trainer may have taken it from
    print(llm.generate("What food do llamas eat?"))
    llm.save(Path(trainer.default_root_dir) / "out" / "with-trainer")


if __name__ == "__main__":
    main(*sys.argv[1:])
