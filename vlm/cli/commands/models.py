"""`vlm models`: which checkpoint to take."""

import json as jsons
import sys
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlm.cli import console
from vlm.cli.options import Command, Shared
from vlm.settings import option, parse_size


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    names: list[str] = option("only those whose names hold all of these words", default=(), place=True, metavar="WORD")
    use: Literal["document", "retrieval", "multilingual", "backbone", "edge", "classification"] | None = option(
        "what is worth taking for this, with a sentence each", default=None
    )
    fit: str | None = option("only those that run in this much memory, such as 8GB", default=None, metavar="SIZE")
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = option(
        "of the weights, for the memory", default="bfloat16"
    )
    json: bool = option("print JSON", default=False)


def run(options: Options) -> int:
    """The table or the JSON on stdout."""
    from vlm.catalogue.choice import memory_bytes, picks
    from vlm.catalogue.released import find, load
    from vlm.catalogue.table import choice, page

    most = None if options.fit is None else parse_size(options.fit)
    reasons = {pick.checkpoint.id: pick.why for pick in picks(options.use)} if options.use else {}
    named = {one.id: one for one in find(options.names)}
    asked = [named[key] for key in (reasons or named) if key in named]
    memory = {one.id: memory_bytes(one, options.dtype) for one in asked}
    fitting = [one for one in asked if most is None or memory[one.id] <= most]
    if options.json:
        print(jsons.dumps([_record(one, memory[one.id], load().source(one), reasons) for one in fitting], indent=1))
    elif options.use:
        print(choice(options.use, reasons, fitting, memory))
    else:
        print(page(fitting, memory, _text(), chosen=bool(options.names)))
    if most is not None and len(fitting) < len(asked):
        limit = f"{most / 1e9:g} GB in {options.dtype}"
        print(f"{len(asked) - len(fitting)} of {len(asked)} need more than {limit}", file=sys.stderr)
    return console.OK


def _text() -> dict[str, str]:
    """Family -> how its text is read, from the one table of rules."""
    from vlm.siglip.rules import RULES

    read = {name: f"case: {rule.case}, punctuation: {rule.punctuation}; {rule.tokens}" for name, rule in RULES.items()}
    own = "prompt and answer as they are, a newline between them"
    return {**read, "siglip2_naflex": read["siglip2"], "paligemma": own, "paligemma2": own}


def _record(checkpoint: Any, memory: int, source: str, reasons: dict[str, str]) -> dict[str, Any]:
    values = {**asdict(checkpoint), "memory_bytes": memory, "source": source}
    return {**values, "why": reasons[checkpoint.id]} if checkpoint.id in reasons else values


COMMAND = Command(
    name="models",
    help="which SigLIP or PaliGemma to take",
    details=(
        "Every released SigLIP, SigLIP 2 and PaliGemma checkpoint: size, image tokens, text length, licence,"
        " the papers' figures, known traps. Memory is that of one image: weights, the"
        " decoder's cache and 0.75 GB for the rest."
    ),
    options=Options,
    run=run,
    group="use",
)
