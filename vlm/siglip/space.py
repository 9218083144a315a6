"""The space of embeddings that a model makes, as JSON values: vectors of two spaces are never compared or mixed.

A cosine between vectors of different weights, other pixels or texts cut differently is a number like any other; nothing
in it says that it means nothing. So whoever keeps vectors keeps their space beside them, and asks before it adds to
them or compares anything with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from vlm.checkpoints.digests import canonical, of_tensors, of_tokenizer, of_values
from vlm.errors import ConfigError
from vlm.words import differences, listed

Space = dict[str, Any]
"""What `of` returns."""
SIDES = ("running",)
"""What changes the last digits of a vector and not its space: libraries and backends. Another one may ask, but vectors
that are kept together are made by one."""
_DIGESTS = {
    "weights": "weights of the model",
    "configuration": "configuration of the model",
    "texts.tokenizer": "tokenizer",
}
_SAMPLE = "Ab_C.  D-é É!"
"""A text that every rule of case, punctuation and blanks changes in its own way."""
_LIBRARIES = ("torch", "transformers", "pillow")


def of(model: Any, processor: Any) -> Space:
    """The space of a `vlm.model.dual.DualTower` and its `DualProcessor`: everything that decides a vector.

    Returns:
        `family`, `size` (D), `weights` and `configuration` (digests), `dtype` of the weights, `preprocessing` (every
        number of the image transform), `pooling`, `normalisation`, `texts` (rule, context, tokenizer); and under
        `running` the versions of the libraries and the attention backend.
    """
    config = model.config if isinstance(model.config, Mapping) else model.config.to_dict()
    rule, tokenizer = processor.rule, processor.tokenizer
    return {
        "family": model.family,
        "size": model.embedding_size,
        "weights": of_tensors(sorted(model.state_dict().items())),
        "dtype": str(model.dtype).removeprefix("torch."),
        "configuration": of_values(canonical(config)),
        "preprocessing": canonical(processor.transform.to_dict()),
        "pooling": "each tower's own",
        "normalisation": "length 1, in float32",
        "texts": {
            # What the rule does, not the words that tell of it: those may be put better one day.
            "cleaned": rule.clean(_SAMPLE),
            **{name: getattr(rule, name) for name in ("bos", "eos", "pad", "side", "attention")},
            "context": processor.context,
            "tokenizer": None if tokenizer is None else of_tokenizer(tokenizer),
        },
        "running": {
            **{name: version(name).partition("+")[0] for name in _LIBRARIES},
            "attention": config.get("_attn_implementation") or _attention(model),
        },
    }


def apart(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two spaces differ, each in a few words; empty where they are one space."""
    there, here = ({key: value for key, value in space.items() if key not in SIDES} for space in (stored, now))
    return differences(there, here, _DIGESTS)


def check(stored: Mapping[str, Any], now: Mapping[str, Any], where: str, *, writing: bool) -> list[str]:
    """Refuse vectors of another space than those that are kept.

    Args:
        stored: the space beside the vectors. now: that of the model that would add to them, or ask.
        where: names the vectors.
        writing: the model would add to them. Then the libraries count too: those that are kept together are made by
            one set of versions, or a difference in the last digits has no explanation later.

    Returns:
        where it may go on: what differs all the same, for whoever tells it.

    Raises:
        ConfigError: names every difference, and what to do.
    """
    told = apart(stored, now)
    sides = [line for name in SIDES for line in differences(stored.get(name), now.get(name), key=name)]
    if told:
        advice = "write to another folder" if writing else "ask with the model that made them, or embed them again"
        raise ConfigError(
            f"{where}: vectors of another model are another space, and no cosine between them means anything: "
            f"{listed(told, separator='; ')}; {advice}"
        )
    if sides and writing:
        raise ConfigError(
            f"{where}: its vectors were made with other libraries: {listed(sides, separator='; ')}; install those,"
            " write to another folder, or say --other-versions to add to it all the same"
        )
    return sides


def _attention(model: Any) -> str | None:
    """The attention backend of a transformers model that is held as `model`; None for another."""
    held = getattr(model, "model", None)
    found: str | None = getattr(getattr(held, "config", None), "_attn_implementation", None)
    return found
