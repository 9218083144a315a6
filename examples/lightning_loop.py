"""A training loop of one's own: a plain Lightning module over the model, a plain `Trainer`, a loader of `Batch`es.

    python examples/lightning_loop.py

`vlm train` does much more (stages, exact resume, gradients that do not depend on accumulation); this is what a loop
needs at least. The model is tiny and random, and learns the names of two colours in seconds.
"""

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import vlm

EXAMPLES = [(Image.new("RGB", (28, 28), name), "what color?", name) for name in ("red", "blue")] * 8


class Captioner(pl.LightningModule):
    """The loss of the model, logged; validation on batches of the same kind."""

    def __init__(self, model: vlm.VLM, rate: float = 3e-3) -> None:
        super().__init__()
        self.model, self.rate = model, rate

    def training_step(self, batch: Any, _number: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("loss", loss, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Any, _number: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.rate)


def loader(processor: vlm.Processor, examples: Iterable[tuple[Image.Image, str, str]], size: int) -> Any:
    """Batches of (image, prompt, answer) in their order."""

    def together(chosen: list[tuple[Image.Image, str, str]]) -> Any:
        images, prompts, answers = zip(*chosen, strict=True)
        return processor(list(images), list(prompts), list(answers))

    return DataLoader(list(examples), batch_size=size, collate_fn=together)  # type: ignore[arg-type]


def main(epochs: int = 10) -> dict[str, float]:
    """Train, and return what was logged last."""
    pl.seed_everything(0)
    model, processor = vlm.build.presets.tiny()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Captioner(model), loader(processor, EXAMPLES, 4), loader(processor, EXAMPLES[:4], 4))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


if __name__ == "__main__":
    print(main())
