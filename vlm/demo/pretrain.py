"""`vlm demo --pretrain`: the checkpoints that the demo starts from, made from nothing but drawn scenes.

* `siglip/`, or another kind of tower: see `vlm.demo.towers`.
* `gemma/`: a small Gemma 3 with its tokenizer, trained on text only: it reads a description of a scene and then
  captions it or answers questions about it, in PaliGemma's format (prefix attended both ways, loss on the suffix).

Neither has seen or read of anything in its held-out place, and the decoder has never seen a picture: tying the two
together is what the demo itself shows. Each part trains in a process of its own on one thread, so that the same seed
gives the same bytes whatever the number of cores.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vlm import children
from vlm.demo import captions, questions, scenes, towers
from vlm.demo.learning import (
    ANSWER_PREFIX,
    CAPTION_PREFIX,
    MOST_THINGS,
    WEIGHTS,
    Words,
    complete,
    fit,
    make_tokenizer,
    pad,
    save,
)
from vlm.demo.towers import GRID
from vlm.files import publishing

TOWER_STEPS = 2000
DECODER_STEPS = 2000
DECODER_BATCH = 64
CAPTION_SHARE = 0.15
TOGETHER_SHARE = 0.6
"""Share of the decoder's steps in which a thing is one bag of words; then it is spread over patches."""
BAG_WORDS = 6

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


def pretrain(
    out: Path,
    *,
    encoder: str = "siglip",
    seed: int = 0,
    tower_steps: int = TOWER_STEPS,
    decoder_steps: int = DECODER_STEPS,
) -> None:
    """Make `out/ENCODER` and `out/gemma`; a part that is complete already is left alone.

    The weights are stored as float16, which halves the files; readers widen them to float32.
    """
    gemma = out / "gemma"
    gemma.mkdir(parents=True, exist_ok=True)
    if not complete(gemma, "tokenizer.json"):
        with publishing(gemma, keep=lambda name: True) as folder:
            make_tokenizer().save_pretrained(folder)
    jobs = tower_jobs([encoder], out, gemma, seed, tower_steps)
    if not complete(gemma, WEIGHTS):
        jobs.append((pretrain_decoder, (gemma, seed, decoder_steps)))
    run_jobs(jobs)


def tower_jobs(kinds: Sequence[str], out: Path, tokenizer: Path, seed: int, steps: int) -> list[children.Job]:
    """What is left to do for `out/KIND` of every kind."""
    left = [kind for kind in kinds if not complete(out / kind, towers.weights_file(kind))]
    return [(towers.pretrain_tower, (kind, out / kind, tokenizer, seed, steps)) for kind in left]


def run_jobs(jobs: Sequence[children.Job]) -> None:
    """Two at a time, each in a process of its own."""
    children.run_all(jobs, at_once=2, prepare=_prepare)


def _prepare() -> None:
    """In its process: our log on stderr, and nothing of transformers' but errors."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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
    bag_ids, text = torch.stack(bags), pad(ids)
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
    return pad(bags + [[]] * (MOST_THINGS - len(bags)), BAG_WORDS)


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
    return pad(bags, BAG_WORDS)


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


def pretrain_decoder(folder: Path, seed: int, steps: int) -> None:
    """Write config.json and model.safetensors (float16) beside the tokenizer."""
    words = Words(folder)
    vocabulary = -(-len(words.tokenizer) // 64) * 64
    torch.manual_seed(seed)
    config = Gemma3TextConfig(**DECODER, vocab_size=vocabulary, pad_token_id=0, bos_token_id=2, eos_token_id=1)
    model = Gemma3ForCausalLM(config)
    rng = random.Random(f"decoder {seed}")
    together = round(TOGETHER_SHARE * steps)
    batches = (decoder_batch(rng, words, DECODER_BATCH, spread=step >= together) for step in range(steps))
    fit("gemma", list(model.parameters()), batches, lambda b: decoder_loss(model, b), steps, 3e-3, 0.01)
    save(model, folder)
