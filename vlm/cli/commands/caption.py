"""`vlm caption`: describe images."""

from dataclasses import dataclass

from vlm.cli.options import Command, Place, Prompts, Reading, Shared, Writing, opening
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    writing: Writing
    reading: Reading
    prompts: Prompts
    place: Place
    images: list[str] = option("image files", place=True, metavar="IMAGE")
    model: str = option("model directory or hub id", flags=("-m",))
    prompt: str = option("what the model is asked", default="caption en")
    batch_size: int = option("images at a time", default=8, metavar="N", least=1)
    json: bool = option("print one JSON object per image, errors included", default=False)


def run(options: Options) -> int:
    """One line per image on stdout, printed by `vlm.cli.answering`."""
    from vlm.cli.answering import Asking, ask_about

    how = Asking(
        prompt=options.prompt,
        model=options.model,
        opening=opening(options.place, options.reading),
        decoding=options.writing.decoding(),
        batch_size=options.batch_size,
        strip_control=options.prompts.strip_control,
    )
    return ask_about([[image] for image in options.images], how, as_json=options.json)


COMMAND = Command(
    name="caption",
    help="describe images",
    details="Images that cannot be read are named on stderr, the others are described (exit code 3).",
    options=Options,
    run=run,
    group="use",
)
