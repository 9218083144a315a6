"""`vlm ask`: a question about images, or about none."""

from dataclasses import dataclass
from pathlib import Path

from vlm.cli.options import Command, Place, Prompts, Reading, Shared, Writing, opening
from vlm.errors import ConfigError
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    writing: Writing
    reading: Reading
    prompts: Prompts
    place: Place
    images: list[str] = option("image files", default=(), place=True, metavar="IMAGE", shown="")
    question: str = option("what to ask about them, in English", place=True, metavar="QUESTION")
    model: str = option("model directory or hub id", flags=("-m",))
    json: bool = option("print a JSON object, also for an error", default=False)


def run(options: Options) -> int:
    """The answer on stdout."""
    from vlm.cli.answering import Asking, ask_about

    if not options.images and Path(options.question).is_file():
        raise ConfigError(f"{options.question} is a file, and there is no question; write it behind the image")
    how = Asking(
        prompt=f"answer en {options.question}",
        model=options.model,
        opening=opening(options.place, options.reading),
        decoding=options.writing.decoding(),
        batch_size=1,
        strip_control=options.prompts.strip_control,
    )
    return ask_about([list(options.images)], how, as_json=options.json)


COMMAND = Command(
    name="ask",
    help="ask a question about images",
    details="Several images are shown together, in their order; without one the question is about text alone.",
    options=Options,
    run=run,
    group="use",
)
