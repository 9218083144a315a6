"""Vision towers of the demo's size, of any encoder kind, and their pretraining on drawn scenes.

The loss: the sigmoid loss on picture-caption pairs (arXiv 2303.15343) plus, as in SigLIP 2 (arXiv 2502.14786, after
LocCa), a decoder that captions each place of the picture from the patch features. Text tower, pooling head and that
decoder are SigLIP's for every kind and are thrown away afterwards (a SigLIP keeps its text tower): kinds differ in
nothing but the tower, and the same seed gives all of them the same pictures and captions in the same order.
"""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MODEL_MAPPING, AutoModel, SiglipConfig, SiglipModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlm.checkpoints.checks import NOTES
from vlm.demo import captions, scenes
from vlm.demo.learning import MOST_THINGS, Words, fit, pad, save
from vlm.exchange.hub_files import preprocessor_values
from vlm.images.transforms import ImageTransform
from vlm.model.parts import encoder_spec
from vlm.text.tokens import IMAGE_TOKEN, LOC_TOKENS

CONTEXT = 24
"""Text positions of the SigLIP."""
PLACE_WORDS = 6
"""Size, colour, shape, two words of place, end."""
LOOSE_SHARE = 0.25
"""Share of the tower's pictures that show one thing of any size anywhere."""
BATCH = 64

VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": scenes.IMAGE_SIZE,
    "patch_size": 12,
}
GRID = scenes.IMAGE_SIZE // VISION["patch_size"]
"""Patches on a side."""
NUMBERS = ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
"""What a kind's `small` takes, in order."""
SIZE = {**VISION, "mlp_ratio": VISION["intermediate_size"] // VISION["hidden_size"], "num_patches": GRID**2}
"""The same in the words of every kind's configuration; each has some of them."""
PREPROCESSOR: dict[str, Any] = {
    "image_processor_type": "SiglipImageProcessor",
    "do_resize": True,
    "size": {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""What SigLIP's processors record: bilinear (2) resize, values in [-1, 1]."""
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "projection_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


# --- Towers of any kind ---------------------------------------------------------------------------------------------


def config(kind: str) -> Any:
    """A tower of the demo's size: the kind's `small(...)` where it has one, else its `tiny()` with other numbers.

    Raises:
        ConfigError: no such kind, or its library is missing.
    """
    spec = encoder_spec(kind)
    if spec.small is not None:
        return spec.small(*(VISION[name] for name in NUMBERS))
    values = spec.tiny().to_dict()
    ours = {name: value for name, value in SIZE.items() if name in values}
    return spec.read_config({**{name: value for name, value in values.items() if name not in NOTES}, **ours})


def image_transform(kind: str) -> ImageTransform:
    """The kind's own normalisation, and the whole picture: the demo's things stand at its edges too."""
    spec = encoder_spec(kind)
    own = {"max_num_patches": GRID**2} if spec.any_aspect else {"mode": "squash"}
    transform: ImageTransform = spec.transform(config(kind), **own)
    return transform


class AnyTower(nn.Module):
    """A tower of any kind in the place of SigLIP's, with SigLIP's pooling head: the same pixels in, the same out."""

    def __init__(self, kind: str, head: nn.Module) -> None:
        super().__init__()
        self.transform = image_transform(kind)
        self.tower = encoder_spec(kind).encoder._from_config(config(kind))
        self.head = head

    def forward(self, pixel_values: Tensor) -> BaseModelOutputWithPooling:
        """float[B, 3, H, W] in [-1, 1] -> patch features float[B, P, E], and float[B, E]."""
        features = self.tower(**self.inputs(pixel_values)).features
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=self.head(features))

    def inputs(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the tower reads of these pictures, by the transform that the model will have."""
        values = ((pixel_values + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        pixels = self.transform([Image.fromarray(picture) for picture in values])
        return {name: value for name, value in pixels._asdict().items() if isinstance(value, Tensor)}


def as_transformers(kind: str, tower: nn.Module) -> nn.Module:
    """The same tower as transformers' own class, which a checkpoint is read with elsewhere; where transformers has
    none, the tower itself.

    A tensor of that class that the kind leaves out (DINO's mask token) becomes zero.
    """
    if type(tower.config) not in MODEL_MAPPING:
        return tower
    spec = encoder_spec(kind)
    theirs: nn.Module = AutoModel.from_config(tower.config)
    own = {spec.rename(name): tensor for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if spec.rename(name) in own:
                tensor.copy_(own.pop(spec.rename(name)))
            else:
                assert re.match(spec.left_out, spec.rename(name)), name
                tensor.zero_()
    assert not own, sorted(own)
    return theirs


# --- Pretraining ----------------------------------------------------------------------------------------------------


def pixels(batch: list[scenes.Scene]) -> Tensor:
    """float[B, 3, H, W] in [-1, 1], as SigLIP normalises."""
    stacked = np.stack([np.asarray(scenes.draw(scene)) for scene in batch])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


class PlaceCaptioner(nn.Module):
    """Patch features -> a few words about each of the nine places of the picture: the pretraining's second head.

    The words of one place see each other from left to right and the patches of that place, nothing else; where they
    are they can only know from the patches. So the patches learn to say what stands on them, and where.
    """

    def __init__(self, vocabulary: int, width: int = 128) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.words.weight, std=0.05)
        self.order = nn.Parameter(torch.randn(PLACE_WORDS, width) * 0.05)
        self.layer = nn.TransformerDecoderLayer(width, 4, 256, 0.0, "gelu", batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(width)
        word_place = torch.arange(len(scenes.PLACES) * PLACE_WORDS) // PLACE_WORDS
        later = torch.ones(len(word_place), len(word_place), dtype=torch.bool).triu(1)
        self.register_buffer("blocked_words", (word_place[:, None] != word_place) | later)
        rows = torch.arange(GRID) * 3 // GRID
        patch_place = (3 * rows[:, None] + rows).flatten()
        self.register_buffer("blocked_patches", word_place[:, None] != patch_place)

    def forward(self, features: Tensor, ids: Tensor) -> Tensor:
        """float[B, P, E] and int64[B, 9, PLACE_WORDS] -> logits float[B, 9, PLACE_WORDS, V] of each next word."""
        hidden = (self.words(ids) + self.order).flatten(1, 2)
        hidden = self.layer(hidden, features, tgt_mask=self.blocked_words, memory_mask=self.blocked_patches)
        return F.linear(self.norm(hidden), self.words.weight).unflatten(1, ids.shape[1:])


def tower_batch(rng: random.Random, words: Words, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels float[B, 3, H, W], captions int64[B, CONTEXT], words of each place int64[B, 9, PLACE_WORDS + 1])."""
    batch, short, places = [], [], []
    for _ in range(size):
        loose = rng.random() < LOOSE_SHARE
        scene = scenes.make_loose_thing(rng) if loose else scenes.make_scene(rng, most=MOST_THINGS)
        fits = [f"a {scene.things[0].name}"] if loose else captions.captions(rng, scene)
        said = [c for c in map(words, fits) if len(c) < CONTEXT]
        batch.append(scene)
        short.append([*rng.choice(said), 1])
        places.append(_words_of_places(scene, words))
    return pixels(batch), pad(short, CONTEXT), torch.stack(places)


def _words_of_places(scene: scenes.Scene, words: Words) -> Tensor:
    """int64[9, PLACE_WORDS + 1]: BOS, what stands there ("small red circle top left", or nothing), EOS, padding."""
    rows: list[list[int]] = [[] for _ in scenes.PLACES]
    for thing in scene.things:
        size = next((f" {name}" for name, (low, high) in scenes.RADIUS.items() if low <= thing.radius <= high), "")
        cell = 3 * int(thing.y // scenes.CELL) + int(thing.x // scenes.CELL)
        rows[cell] = words(f"{size} {thing.name} {scenes.PLACES[cell]}")
    return pad([[2, *row, 1] for row in rows], PLACE_WORDS + 1)


def tower_loss(model: SiglipModel, captioner: PlaceCaptioner, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    pictures, short, places = batch
    seen = model.vision_model(pixel_values=pictures)
    read = model.text_model(input_ids=short)
    similarity = F.normalize(seen.pooler_output, dim=-1) @ F.normalize(read.pooler_output, dim=-1).T
    logits = similarity * model.logit_scale.exp() + model.logit_bias
    matches = 2 * torch.eye(len(logits)) - 1
    pairs = -F.logsigmoid(logits * matches).sum(-1).mean()
    described = captioner(seen.last_hidden_state, places[..., :-1])
    return 0.2 * pairs + F.cross_entropy(described.flatten(0, 2), places[..., 1:].flatten(), ignore_index=0)


def new_tower(kind: str, folder: Path, seed: int) -> None:
    """Write a checkpoint of a tower with new weights, in the same format."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tower = encoder_spec(kind).encoder._from_config(config(kind))
        save_tower(kind, tower, folder)


def save_tower(kind: str, tower: nn.Module, folder: Path) -> None:
    """Write the tower alone (float16), in transformers' format where it has one."""
    transform = image_transform(kind)
    # A transform of several towers has no such file; its kind's default is what is meant.
    files = {} if transform.members else {"preprocessor_config.json": preprocessor_values(transform)}
    save(as_transformers(kind, tower), folder, files, weights_file(kind))


def weights_file(kind: str) -> str:
    """The name of the file of weights in a checkpoint of this kind; it is written last."""
    return encoder_spec(kind).weights_file


def pair(kind: str, vocabulary: int) -> tuple[SiglipModel, PlaceCaptioner]:
    """The model that is pretrained, with new weights: a SigLIP, its tower exchanged for one of the kind."""
    model = SiglipModel(SiglipConfig(text_config={**TEXT, "vocab_size": vocabulary}, vision_config=VISION))
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    captioner = PlaceCaptioner(vocabulary)
    if kind != "siglip":
        model.vision_model = AnyTower(kind, model.vision_model.head)
    return model, captioner


def pretrain_tower(kind: str, folder: Path, tokenizer: Path, seed: int, steps: int) -> None:
    """Write a checkpoint in transformers' format: config.json, preprocessor_config.json, model.safetensors (float16).

    Args:
        kind: an encoder kind.
        tokenizer: the folder of the demo's tokenizer.
        steps: 0 writes new weights.
    """
    if steps == 0:
        new_tower(kind, folder, seed)
        return
    words = Words(tokenizer)
    added = words.tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, LOC_TOKENS[0]])
    vocabulary = min(added) + 1  # the pieces and one more, whichever of the added tokens comes first
    torch.manual_seed(seed)
    model, captioner = pair(kind, vocabulary)
    rng = random.Random(f"tower {seed}")
    batches = (tower_batch(rng, words, BATCH) for _ in range(steps))
    parameters = [*model.parameters(), *captioner.parameters()]
    fit(kind, parameters, batches, lambda b: tower_loss(model, captioner, b), steps, 2e-3, 0.05)
    if kind == "siglip":
        save(model, folder, {"preprocessor_config.json": PREPROCESSOR})
    else:
        save_tower(kind, model.vision_model.tower, folder)
