"""A vision tower of one's own, in one file outside the library: patches through a linear layer and a small network.

    python examples/own_encoder.py DIR

builds a model on it in DIR and opens it again. On the command line the file's folder must be importable:

    PYTHONPATH=examples vlm info DIR --encoder-class own_encoder:PatchTower
"""

import sys
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

import vlm
from vlm.build.presets import tiny, tiny_decoder
from vlm.encoders import EncoderOutput, Spec, check_square, square_output, use
from vlm.images.transforms import ImageTransform

NAME = "own_encoder:PatchTower"


class Config(PreTrainedConfig):
    """The tower's numbers; `hidden_size` is the width of its features."""

    model_type = "patch_tower"

    hidden_size: int = 32
    num_hidden_layers: int = 2
    image_size: int = 28
    patch_size: int = 14
    num_channels: int = 3


class PatchTower(PreTrainedModel):
    """Each patch by itself: a linear layer, then layers with a residual."""

    config_class = Config
    main_input_name = "pixel_values"
    _supports_sdpa = True  # it has no attention that a backend could change

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width, side = config.hidden_size, config.patch_size
        self.patches = nn.Conv2d(config.num_channels, width, kernel_size=side, stride=side)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width)
        self.post_init()

    def forward(self, pixel_values: Tensor) -> EncoderOutput:
        """float[M, 3, H, W] -> features float[M, P, E] in row order."""
        check_square(self.config, pixel_values, NAME)
        features = self.patches(pixel_values.to(self.dtype)).flatten(2).transpose(1, 2)
        for layer in self.layers:
            features = features + nn.functional.gelu(layer(features))
        return square_output(self.config, self.norm(features))


def transform(config: Config, **settings: Any) -> ImageTransform:
    """Squares with values in [-1, 1]."""
    sizes = {"image_size": config.image_size, "patch_size": config.patch_size}
    return ImageTransform(**{"mode": "squash", **sizes, **settings})


SPEC = Spec(
    title="patch tower",
    config=Config,
    encoder=PatchTower,
    transform=transform,
    model_types=("patch_tower",),  # checkpoints that it reads,
    prefixes=("",),  # what stands before the names of its tensors there,
    left_out=r"classifier\.",  # and which of them it does not have
)


def main(folder: str) -> None:
    """Build, save, open."""
    use(NAME)
    tokenizer = tiny()[1].tokenizer
    model, processor = vlm.new(Config(), "linear", tiny_decoder("gemma"), tokenizer, encoder_kind=NAME)
    vlm.save(model, processor, folder)
    model, processor = vlm.load(folder)
    print(f"{folder}: encoder {model.config.encoder}, {processor.image_transform.max_patches} patches per image")


if __name__ == "__main__":
    main(sys.argv[1])
