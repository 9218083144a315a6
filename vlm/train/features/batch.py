"""A batch that carries features in place of pixels, and what a step asks of a batch that may be either."""

from dataclasses import dataclass

from torch import Tensor

from vlm.encoders.contract import EncoderOutput
from vlm.model.batch import Batch

PIXELS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


@dataclass
class FeatureBatch(Batch):
    """A batch whose images were encoded before.

    Attributes:
        features: float[M, P, E]. feature_mask: bool[M, P], or None when every row is a patch. feature_grids: int64[M,
            2]. As `EncoderOutput`; all None when no example of the batch has an image.
    """

    features: Tensor | None = None
    feature_mask: Tensor | None = None
    feature_grids: Tensor | None = None

    def split(self) -> tuple[dict[str, Tensor], EncoderOutput | None]:
        """The tensors of the text, and what the tower gave (None without an image)."""
        names = ("features", "feature_mask", "feature_grids")
        encoded = None
        if self.features is not None and self.feature_grids is not None:
            encoded = EncoderOutput(self.features, self.feature_mask, self.feature_grids)
        return {name: tensor for name, tensor in self._tensors() if name not in names}, encoded


def has_images(batch: Batch) -> bool:
    """Whether a batch shows any image, as pixels or as features."""
    return batch.pixel_values is not None or (isinstance(batch, FeatureBatch) and batch.features is not None)
