"""`vlm demo --pretrain`: the two checkpoints that the demo starts from, made from nothing but drawn scenes.

* `siglip/`: a small SigLIP. Loss: the sigmoid loss on picture-caption pairs (arXiv 2303.15343) plus, as in SigLIP 2
  (arXiv 2502.14786, after LocCa), a decoder that captions each place of the picture from the patch features. That
  decoder is thrown away afterwards.
* `gemma/`: a small Gemma 3 with its tokenizer, trained on text only: it reads a description of a scene and then
  captions it or answers questions about it, in PaliGemma's format (prefix attended both ways, loss on the suffix).

Neither has seen or read of anything in its held-out place, and the decoder has never seen a picture: tying the two
together is what the demo itself shows. Each part trains in a process of its own on one thread, so that the same seed
gives the same bytes whatever the number of cores.
"""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, SiglipConfig, SiglipModel

from vlm import tokenizer as tokenizers
from vlm.demo import captions, questions, scenes

log = logging.getLogger("vlm")

CAPTION_PREFIX = "caption en"
ANSWER_PREFIX = "answer en {}"
CONTEXT = 24
"""Text positions of the SigLIP."""
PLACE_WORDS = 6
"""Size, colour, shape, two words of place, end."""
LOOSE_SHARE = 0.25
"""Share of the tower's pictures that show one thing of any size anywhere."""
PIECES = 500
"""Upper bound of the tokenizer's own pieces: 256 bytes, Gemma's special pieces, and every word of the demo as one."""
MOST_THINGS = 4
"""In a picture of the tower's pretraining: more than the demo shows."""
TOWER_STEPS = 2000
TOWER_BATCH = 64
DECODER_STEPS = 2000
DECODER_BATCH = 64
WARMUP = 150
CAPTION_SHARE = 0.15
TOGETHER_SHARE = 0.6
"""Share of the decoder's steps in which a thing is one bag of words; then it is spread over patches."""
BAG_WORDS = 6

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
DECODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "query_pre_attn_scalar": 32,
    "sliding_window": 512,
    "layer_types": ["full_attention"] * 3,
}


def pretrain(out: Path, *, seed: int = 0, tower_steps: int = TOWER_STEPS, decoder_steps: int = DECODER_STEPS) -> None:
    """Make `out/siglip` and `out/gemma`; a part that is complete already is left alone.

    The weights are stored as float16, which halves the files; readers widen them to float32.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "gemma" / "tokenizer.json").exists():
        make_tokenizer().save_pretrained(out / "gemma")
    jobs: list[tuple[Callable[..., None], Path, int]] = []
    if not (out / "siglip" / "model.safetensors").exists():
        jobs.append((pretrain_tower, out, tower_steps))
    if not (out / "gemma" / "model.safetensors").exists():
        jobs.append((pretrain_decoder, out, decoder_steps))
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(job, folder, seed, steps) for job, folder, steps in jobs]:
            future.result()


def make_tokenizer() -> tokenizers.Tokenizer:
    """A Gemma tokenizer in which every word of the demo is one piece. Always the same."""
    rng = random.Random("tokenizer")
    corpus: list[str] = []
    for _ in range(4000):
        scene = scenes.make_scene(rng, most=MOST_THINGS)
        corpus += [CAPTION_PREFIX, *captions.captions(rng, scene)]
        for question in questions.ask(rng, scene, len(questions.KINDS), tuple(questions.KINDS)):
            corpus += [ANSWER_PREFIX.format(question.text), question.answer]
    return tokenizers.build(corpus, vocab_size=PIECES)


class Words:
    """Text to ids, each text tokenised once."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder / "gemma"), trust_remote_code=False)
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self.tokenizer(text, add_special_tokens=False).input_ids
        return self._known[text]


def _pad(rows: list[list[int]], length: int = 0) -> Tensor:
    """int64[B, S] with 0 (the pad id) after each row; S is at least `length`."""
    length = max(length, *map(len, rows))
    return torch.tensor([row + [0] * (length - len(row)) for row in rows])


def pixels(batch: list[scenes.Scene]) -> Tensor:
    """float[B, 3, H, W] in [-1, 1], as SigLIP normalises."""
    stacked = np.stack([np.asarray(scenes.draw(scene)) for scene in batch])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


# --- The tower ------------------------------------------------------------------------------------------------------


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
    return pixels(batch), _pad(short, CONTEXT), torch.stack(places)


def _words_of_places(scene: scenes.Scene, words: Words) -> Tensor:
    """int64[9, PLACE_WORDS + 1]: BOS, what stands there ("small red circle top left", or nothing), EOS, padding."""
    rows: list[list[int]] = [[] for _ in scenes.PLACES]
    for thing in scene.things:
        size = next((f" {name}" for name, (low, high) in scenes.RADIUS.items() if low <= thing.radius <= high), "")
        cell = 3 * int(thing.y // scenes.CELL) + int(thing.x // scenes.CELL)
        rows[cell] = words(f"{size} {thing.name} {scenes.PLACES[cell]}")
    return _pad([[2, *row, 1] for row in rows], PLACE_WORDS + 1)


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


def pretrain_tower(out: Path, seed: int, steps: int) -> None:
    """Write `out/siglip`: config.json, preprocessor_config.json and model.safetensors (float16)."""
    words = Words(out)
    vocabulary = tokenizers.image_token_id(words.tokenizer) + 1  # the pieces; <loc> and <seg> come after <image>
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config={**TEXT, "vocab_size": vocabulary}, vision_config=VISION))
    nn.init.constant_(model.logit_scale, math.log(10.0))
    nn.init.constant_(model.logit_bias, -10.0)
    captioner = PlaceCaptioner(vocabulary)
    rng = random.Random(f"tower {seed}")
    batches = (tower_batch(rng, words, TOWER_BATCH) for _ in range(steps))
    parameters = [*model.parameters(), *captioner.parameters()]
    _train("siglip", parameters, batches, lambda b: tower_loss(model, captioner, b), steps, 2e-3, 0.05)
    _save(model, out / "siglip", {"preprocessor_config.json": PREPROCESSOR})


# --- The decoder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A batch of described scenes, each with a question (or a call for a caption) and the answer.

    A description is made of bags of words, each the sum of its words' embeddings. A linear projection of patch
    features can give just that, so the decoder's reading carries over to pictures.
    """

    bags: Tensor
    """int64[B, K, W]: the words of each bag, padded with 0; a bag may be empty"""
    ids: Tensor
    """int64[B, T]: BOS, prefix, newline, suffix, padded with 0"""
    visible: Tensor
    """bool[B, S, S], S = K + T; [b, i, j]: i sees j. Both ways in description and prefix, else causal."""
    targets: Tensor
    """int64[B, T]: the next token of a suffix, or -100"""
    weights: Tensor
    """float[B, T]: every suffix counts the same, however long"""


def decoder_batch(rng: random.Random, words: Words, size: int, *, spread: bool) -> Page:
    """`spread`: one bag for each patch of a picture, most of them empty; else one for each thing."""
    bags, ids, targets, weights, prefixes = [], [], [], [], []
    for _ in range(size):
        scene = scenes.make_scene(rng)
        prefix, suffix = reading(rng, scene)
        given, said = [2, *words(prefix), *words("\n")], words(suffix)
        bags.append(_patches(rng, scene, words) if spread else _things(rng, scene, words))
        ids.append(given + said)
        targets.append([-100] * (len(given) - 1) + [*said, 1])
        weights.append([0.0] * (len(given) - 1) + [1 / (len(said) + 1)] * (len(said) + 1))
        prefixes.append(len(bags[-1]) + len(given))
    bag_ids, text = torch.stack(bags), _pad(ids)
    num_bags, length = bag_ids.shape[1], text.shape[1]
    every = torch.arange(num_bags + length)
    in_prefix = every < torch.tensor(prefixes)[:, None]
    filled = torch.cat([(bag_ids > 0).any(-1) | spread, text > 0], dim=1)
    visible = (in_prefix[:, None, :] | (every[:, None] >= every)) & filled[:, None, :]
    padded = [row + [-100] * (length - len(row)) for row in targets]
    shares = [row + [0.0] * (length - len(row)) for row in weights]
    return Page(bag_ids, text, visible, torch.tensor(padded), torch.tensor(shares))


def reading(rng: random.Random, scene: scenes.Scene) -> tuple[str, str]:
    """(prefix, suffix): a question and its answer, or now and then the call for a caption and one."""
    if rng.random() < CAPTION_SHARE:
        return CAPTION_PREFIX, rng.choice(captions.captions(rng, scene))
    question = questions.ask(rng, scene, 1)[0]
    return ANSWER_PREFIX.format(question.text), question.answer


def _things(rng: random.Random, scene: scenes.Scene, words: Words) -> Tensor:
    """int64[MOST_THINGS, BAG_WORDS]: one bag for each thing, in random order."""
    things = list(scene.things)
    rng.shuffle(things)
    bags = [_bag(thing, words) for thing in things]
    return _pad(bags + [[]] * (MOST_THINGS - len(bags)), BAG_WORDS)


def _patches(rng: random.Random, scene: scenes.Scene, words: Words) -> Tensor:
    """int64[GRID * GRID, BAG_WORDS]; a large thing covers all patches of its place, a small one some of them."""
    standing = {(thing.row, thing.column): thing for thing in scene.things}
    per_place = GRID // 3
    covered = {
        place: set(rng.sample(range(per_place**2), per_place**2 if thing.size == "large" else rng.randint(1, 3)))
        for place, thing in standing.items()
    }
    bags: list[list[int]] = []
    for row in range(GRID):
        for column in range(GRID):
            place = (row // per_place, column // per_place)
            here = row % per_place * per_place + column % per_place in covered.get(place, ())
            bags.append(_bag(standing[place], words) if here else [])
    return _pad(bags, BAG_WORDS)


def _bag(thing: scenes.Thing, words: Words) -> list[int]:
    return words(f" {thing.size} {thing.name} {thing.place}")


def decoder_loss(model: Gemma3ForCausalLM, page: Page) -> Tensor:
    embed = model.get_input_embeddings()
    known = (page.bags > 0)[..., None]
    bags = (embed(page.bags) * known).sum(2) / known.sum(2).clamp(min=1).sqrt()
    mask = torch.zeros(page.visible.shape).masked_fill(~page.visible, torch.finfo(torch.float32).min)[:, None]
    hidden = model.model(
        inputs_embeds=torch.cat([bags, embed(page.ids)], dim=1),
        attention_mask={"full_attention": mask, "sliding_attention": mask},
        use_cache=False,
    ).last_hidden_state[:, bags.shape[1] :]
    asked = page.targets >= 0
    losses = F.cross_entropy(model.lm_head(hidden[asked]), page.targets[asked], reduction="none")
    return (losses * page.weights[asked]).sum() / page.weights.sum()


def pretrain_decoder(out: Path, seed: int, steps: int) -> None:
    """Write `out/gemma`: config.json and model.safetensors (float16) beside the tokenizer."""
    words = Words(out)
    vocabulary = -(-len(words.tokenizer) // 64) * 64
    torch.manual_seed(seed)
    config = Gemma3TextConfig(**DECODER, vocab_size=vocabulary, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    model = Gemma3ForCausalLM(config)
    rng = random.Random(f"decoder {seed}")
    together = round(TOGETHER_SHARE * steps)
    batches = (decoder_batch(rng, words, DECODER_BATCH, spread=step >= together) for step in range(steps))
    _train("gemma", list(model.parameters()), batches, lambda b: decoder_loss(model, b), steps, 3e-3, 0.01)
    _save(model, out / "gemma")


# --- Both -----------------------------------------------------------------------------------------------------------


def _train(
    name: str,
    parameters: list[nn.Parameter],
    batches: Iterator[Any],
    loss_of: Callable[[Any], Tensor],
    steps: int,
    rate: float,
    weight_decay: float,
) -> None:
    """AdamW on one thread, the rate rising for WARMUP steps and falling to zero in a straight line."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    started = time.monotonic()
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, step / WARMUP) * (1 - (step - 1) / steps)
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps:
            log.info("%s: step %d of %d, loss %.3f, %.0f s", name, step, steps, loss.item(), time.monotonic() - started)


def _save(model: Any, folder: Path, files: dict[str, Any] | None = None) -> None:
    """Write the checkpoint with its weights last, so that a folder with weights is complete."""
    finished = folder.with_name(folder.name + ".part")
    model.half().save_pretrained(finished)
    for name, content in (files or {}).items():
        (finished / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for file in sorted(finished.iterdir(), key=lambda f: f.suffix == ".safetensors"):
        os.replace(file, folder / file.name)
    finished.rmdir()
