"""Zero-shot classification with a tower of ours and the rest of the SigLIP checkpoint that it came from.

A vision-language model reads patch features and drops the pooling head, so that a trained tower has none. The
checkpoint's head and text tower are still there; put behind the trained tower they say how far it has moved from the
texts that it was trained with. An untrained tower gives exactly the checkpoint's logits.

Text rules (big_vision's): names and templates are canonicalised (`vlm.siglip.canonicalize`: "Golden_Retriever." is
"golden retriever"), no BOS, the text cut so that an EOS fits, padded on the right to the full context, no mask, the
last position is read. SigLIP v1 pads with EOS, SigLIP 2 with `<pad>`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.errors import CheckpointError, DataError
from vlm.siglip.features import ProbeResult, over_images
from vlm.siglip.sets import check_ids, check_templates

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from vlm.data.examples import Labelled
    from vlm.encoders.contract import EncoderOutput
    from vlm.images.transforms import ImageTransform
    from vlm.model.dual import DualTower
    from vlm.siglip.processor import DualProcessor

log = logging.getLogger(__name__)


def zero_shot(
    checkpoint: str | Path | tuple[DualTower, DualProcessor],
    encoder: nn.Module,
    transform: ImageTransform,
    test: Sequence[Labelled],
    classes: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> ProbeResult | None:
    """Classify images by the text that is nearest to their pooled embedding.

    With several templates a class is the mean of its normalised text embeddings, as in CLIP. Test images whose label is
    none of `classes` count as wrong; `settings` says how many there are.

    Names that are the same text to the tower (ImageNet has two classes called crane and two called maillot) are one
    class here: nothing tells them apart. `settings["shared_names"]` says which, and a warning what to do.

    Args:
        checkpoint: what the tower was made from: a SigLIP or SigLIP 2 directory or hub id with both towers and the
            tokenizer, or what `vlm.siglip.load` returns.
        encoder, transform, batch_size, device: as for `vlm.measure.probes.features`; a SigLIP tower, trained or not.
        classes: names for the templates; a label of `test` means the class whose canonical name it has.
        templates: texts with one `{}`, such as `a photo of a {}.`

    Returns:
        the result, or None when `why_no_zero_shot` has a reason (which is logged).

    Raises:
        DataError: fewer than two classes, a name of punctuation alone, ids that occur twice, a template without `{}`,
            or as `features`.
        CheckpointError: the checkpoint or its tokenizer cannot be opened, or its width is another one than the tower's.
    """
    reason = why_no_zero_shot(checkpoint, encoder)
    if reason is not None:
        log.warning("no zero-shot accuracy: %s", reason)
        return None
    _check(test, classes, templates)
    import torch

    from vlm.siglip.classes import class_embeddings
    from vlm.siglip.loading import load
    from vlm.siglip.rules import canonicalize
    from vlm.siglip.templates import Templates, prompts

    shared = shared_names(classes)
    if shared:
        log.warning("%s", _about_shared(shared, len(classes)))
    names = list(dict.fromkeys(map(canonicalize, classes)))
    model, processor = checkpoint if isinstance(checkpoint, tuple) else load(checkpoint)
    texts = class_embeddings(model, processor, prompts(names, Templates("given", tuple(templates), canonical=True)))
    images = pooled(model, encoder, transform, [item.image for item in test], batch_size=batch_size, device=device)
    home = model.device
    with torch.no_grad():
        chosen = model.logits(images.to(home), texts.to(home)).argmax(1).tolist()
    right = {item.id: names[number] == canonicalize(item.label) for item, number in zip(test, chosen, strict=True)}
    unseen = [item.label for item in test if canonicalize(item.label) not in set(names)]
    settings = {
        "templates": list(templates),
        "context": model.config.text_config.max_position_embeddings,
        "text": "canonical (lower case, no punctuation), padded on the right",
        "shared_names": shared,
        "unseen_labels": sorted(set(unseen)),
        "unseen_items": len(unseen),
    }
    return ProbeResult(sum(right.values()) / len(test), right, 0, len(test), len(names), settings)


def _check(test: Sequence[Labelled], classes: Sequence[str], templates: Sequence[str]) -> None:
    from vlm.siglip.rules import canonicalize

    names = {canonicalize(name) for name in classes}
    if not test or len(names) < 2:
        raise DataError(
            f"zero-shot needs test images and at least two different classes, got {len(test)} images and the"
            f" {len(classes)} classes {', '.join(classes[:10])}"
        )
    if "" in names:
        empty = [name for name in classes if not canonicalize(name)]
        raise DataError(
            f"the class name {empty[0]!r} is empty to the text tower, which reads no punctuation; give it a word"
        )
    check_ids(test)
    check_templates(templates)


def shared_names(classes: Sequence[str]) -> dict[str, list[str]]:
    """Canonical name -> the names of several classes that are that one text to the tower."""
    from vlm.siglip.rules import canonicalize

    members: dict[str, list[str]] = {}
    for name in classes:
        members.setdefault(canonicalize(name), []).append(name)
    return {name: group for name, group in members.items() if len(group) > 1}


def _about_shared(shared: Mapping[str, Sequence[str]], num_classes: int) -> str:
    groups = [", ".join(map(repr, group)) for group in shared.values()]
    return (
        f"zero-shot: {sum(map(len, shared.values()))} of the {num_classes} class names are {len(shared)} texts to the"
        f" text tower ({'; '.join(groups[:5])}{'; ...' if len(groups) > 5 else ''}), which cannot tell them apart: each"
        " text is one class here, where an evaluation by class numbers gives all its images to the first. Give each"
        " class a name of its own ('crane bird', 'construction crane') for figures that compare"
    )


def why_no_zero_shot(checkpoint: str | Path | tuple[DualTower, DualProcessor], encoder: nn.Module) -> str | None:
    """Why zero-shot classification is impossible for this tower, in one sentence; None when it is possible.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    from vlm.checkpoints.files import read_json
    from vlm.checkpoints.places import locate
    from vlm.model.parts import encoder_spec, kind_of, text_towers

    config: Any = encoder.config
    kind, known = kind_of(encoder), {name: one for name, one in text_towers().items() if one.objective == "sigmoid"}
    if kind not in known:
        return f"the vision tower is {kind!r}; only {' and '.join(known)} towers have a text tower beside them"
    if encoder_spec(kind).chosen_layers(config):
        return "the tower ends at its feature layers, and the pooling head reads the normed output of the last block"
    if isinstance(checkpoint, tuple):
        return None
    if Path(checkpoint).suffix == ".npz":
        return f"{checkpoint}: big_vision parameters have no tokenizer; pass vlm.siglip.load(path, tokenizer=...)"
    found = read_json(locate(checkpoint) / "config.json")
    if found.get("model_type") not in {tower.model_type for tower in known.values()} or "text_config" not in found:
        return f"{checkpoint}: the checkpoint holds no text tower (model_type {found.get('model_type')!r})"
    return None


def pooled(
    model: DualTower,
    encoder: nn.Module,
    transform: ImageTransform,
    images: Sequence[Any],
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
) -> Tensor:
    """Image embeddings float32[N, E], not normalised: the checkpoint's pooling head on the tower's patch features.

    Raises:
        CheckpointError: head and tower differ in width.
    """
    head = model.model.vision_model.head
    width = encoder.config.hidden_size  # type: ignore[union-attr]
    if head.probe.shape[-1] != width:
        raise CheckpointError(
            f"the checkpoint's pooling head reads {head.probe.shape[-1]} channels, the tower gives {width}; pass the"
            f" checkpoint that the tower was made from"
        )

    def read(output: EncoderOutput) -> Tensor:
        return pool(head, output)

    home = head.probe.device
    head.to(next(encoder.parameters()).device if device is None else device)
    try:
        return over_images(encoder, transform, images, read, batch_size=batch_size, device=device)
    finally:
        head.to(home)


def pool(head: Any, output: EncoderOutput) -> Tensor:
    """SigLIP's attention pooling over real patches, float32[M, E]: one learned query, then a residual perceptron.

    Args:
        head: `vision_model.head` of transformers' SiglipModel or Siglip2Model.
    """
    features = output.features.float()
    hidden = None if output.mask is None else ~output.mask
    query = head.probe.float().expand(len(features), -1, -1)
    read, _ = head.attention(query, features, features, key_padding_mask=hidden, need_weights=False)
    result: Tensor = (read + head.mlp(head.layernorm(read)))[:, 0]
    return result
