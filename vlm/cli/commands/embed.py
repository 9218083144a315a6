"""`vlm embed`: a collection of pictures or texts into a folder of vectors."""

from __future__ import annotations

import json as jsons
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlm import children, words
from vlm.cli import console
from vlm.cli.options import DUAL_MODEL, Command, Dtype, Place, Shared, chosen_device, chosen_of
from vlm.errors import ConfigError
from vlm.settings import option

if TYPE_CHECKING:
    from vlm.data.collection import Entry
    from vlm.data.problems import Problem
    from vlm.siglip.embedding import Summary
    from vlm.siglip.writing import VectorWriter

_Device: Any = chosen_of(Place, "device")
_LISTED = 1000


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    place: _Device
    sources: list[str] = option(
        "pictures: files, folders, JSONL, tar shards; - reads paths or JSON lines from stdin",
        place=True,
        metavar="SOURCE",
        default=(),
        shown="",
    )
    model: str = option(
        "model directory or hub id with both towers; demo-siglip is the package's, of drawn scenes",
        default=DUAL_MODEL,
        flags=("-m",),
    )
    out: str = option("folder of the vectors; what is there already is added to", metavar="VECTORS")
    text: str | None = option(
        "embed texts: this column of the sources, or without a SOURCE each line of this file (- is stdin)",
        default=None,
        metavar="COLUMN|FILE",
    )
    dtype: Literal["float32", "float16"] | None = option(
        "number format of the vectors", default=None, shown="float32, or what is there"
    )
    image_root: str | None = option(
        "folder of the images that JSON lines name", default=None, metavar="DIR", shown="the file's own"
    )
    prune: bool = option("drop the vectors of what these sources no longer have", default=False)
    batch_size: int = option("pictures or texts at a time", default=32, metavar="N", least=1)
    decoders: int | None = option("threads that read pictures", default=None, metavar="N", least=1, shown="one a core")
    model_dtype: Dtype = option("of the model; auto: the checkpoint's, on a CPU float32", default="auto", shown="")
    other_versions: bool = option("add to vectors that other versions of the libraries have made", default=False)
    json: bool = option("print a JSON object instead of a line", default=False)


def run(options: Options) -> int:
    """One line, or one JSON object, on stdout; what cannot be used on stderr."""
    entries, problems = _found(options)
    if not entries:
        _tell(problems)
        if not problems:
            raise ConfigError("nothing to embed: the sources are empty")
        return children.REFUSED
    from vlm.siglip import space
    from vlm.siglip.loading import load
    from vlm.siglip.writing import VectorWriter

    console.quiet_transformers()
    device = chosen_device(options.place.device)
    model, processor = load(options.model, device=device, dtype=options.model_dtype)
    named = os.path.abspath(options.model) if os.path.exists(options.model) else options.model
    with VectorWriter(
        options.out,
        space.of(model, processor),
        "images" if options.text is None else "texts",
        dtype=options.dtype,
        model=named,
        other_versions=options.other_versions,
    ) as writer:
        summary = _embed(options, entries, problems, writer, (model, processor))
        _tell(summary.problems)
        print(_json(options, summary, writer) if options.json else _line(options, summary, writer))
    if not summary.problems:
        return console.OK
    return console.SKIPPED if summary.added + summary.changed + summary.unchanged else children.REFUSED


def _found(options: Options) -> tuple[list[Entry], list[Problem]]:
    """Everything that the sources hold, before torch is imported: a wrong path should not take seconds to say so."""
    from vlm.data.collection import entries_of, gathered, lines_of

    if options.sources:
        return gathered(entries_of(options.sources, image_root=options.image_root, text=options.text))
    if options.text is None:
        raise ConfigError("nothing to embed: give pictures as SOURCE, or texts as --text FILE")
    return gathered(lines_of(options.text))


def _embed(
    options: Options, entries: list[Entry], problems: list[Problem], writer: VectorWriter, model: tuple[Any, Any]
) -> Summary:
    from vlm.generation.progress import Progress
    from vlm.siglip import embedding

    for line in writer.told:
        print(f"warning: {options.out}: {line}", file=sys.stderr)
    plan = embedding.plan(entries, options.sources or [options.text or ""], writer)
    if options.text is None:
        encode = embedding.of_images(*model, batch_size=options.batch_size, decoders=options.decoders)
    else:
        encode = embedding.of_texts(*model, batch_size=options.batch_size)
    with Progress(plan.count, label="embedding", visible=plan.count > 0) as progress:
        return embedding.carry_out(plan, problems, writer, encode, prune=options.prune, advance=progress.advance)


def _tell(problems: list[Problem]) -> None:
    from vlm.data.problems import listing

    for line in words.lines(listing(problems), _LISTED):
        print(f"error: {line}", file=sys.stderr)


def _line(options: Options, summary: Summary, writer: VectorWriter) -> str:
    counts = {
        "added": summary.added,
        "changed": summary.changed,
        "unchanged": summary.unchanged,
        "dropped": len(summary.dropped),
        "bad": len(summary.problems),
    }
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "added")
    notes = [f"{told}; {len(writer.rows.living):,} {writer.manifest['dtype']} vectors of {writer.manifest['size']}"]
    if summary.added + summary.changed:
        notes.append(f"{summary.per_second:.1f} a second")
    if summary.gone:
        blocked = ", not dropped because a source could not be read whole" if options.prune else " (--prune drops them)"
        notes.append(f"{len(summary.gone):,} are gone from these sources{blocked}")
    if summary.cut:
        notes.append(f"{len(summary.cut):,} texts longer than the model reads, cut: {words.listed(summary.cut, 3)}")
    return f"{options.out}: {'; '.join(notes)}"


def _json(options: Options, summary: Summary, writer: VectorWriter) -> str:
    return jsons.dumps(
        {
            "vectors": options.out,
            "kind": writer.manifest["kind"],
            "rows": len(writer.rows.living),
            "size": writer.manifest["size"],
            "dtype": writer.manifest["dtype"],
            "added": summary.added,
            "changed": summary.changed,
            "unchanged": summary.unchanged,
            "dropped": summary.dropped,
            "gone": summary.gone,
            "cut": summary.cut,
            "problems": [
                {"id": f"{problem.file}:{problem.line}" if problem.line else problem.file, "code": problem.code}
                | {"error": problem.message}
                for problem in summary.problems
            ],
            "seconds": round(summary.seconds, 3),
            "per_second": round(summary.per_second, 1),
        }
    )


COMMAND = Command(
    name="embed",
    help="pictures or texts to vectors, in a folder that grows",
    details=(
        "What is new or changed (size or time of the file, the text itself) is embedded, the rest stays; a run that was"
        " killed goes on where it stopped. Pictures that cannot be read are named on stderr (exit code 3). The folder"
        " remembers the space of the model: another one is refused."
    ),
    options=Options,
    run=run,
    group="use",
)
