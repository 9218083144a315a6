"""`vlm score`: a file of predictions against a file of annotations, without a model."""

import json as jsons
import sys
from dataclasses import dataclass
from pathlib import Path

from vlm.cli import console
from vlm.cli.options import Command, Shared, names
from vlm.errors import ConfigError
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    metric: str | None = option("names of metrics, as listed by --list", default=None, flags=("-m",), metavar="A,B")
    predictions: Path | None = option("what a model said (JSON or JSONL)", default=None, flags=("-p",), metavar="FILE")
    references: Path | None = option("the annotations (JSON or JSONL)", default=None, flags=("-r",), metavar="FILE")
    questions: Path | None = option("VQA's questions, to check the annotations with", default=None, metavar="FILE")
    format: str | None = option(
        "format of the references, if not to be told from the content", default=None, metavar="NAME"
    )
    predictions_format: str | None = option("the same of the predictions", default=None, metavar="NAME")
    split: str | None = option("only the annotations of this split", default=None, metavar="NAME")
    only_predicted: bool = option("leave out annotations without a prediction; the output says so", default=False)
    by: str | None = option(
        "facts to break scores down by (question_type, answer_type, ...)", default=None, metavar="A,B"
    )
    json: bool = option("print JSON", default=False)
    list: bool = option("list the metrics and their rules, and the formats", default=False)


def run(options: Options) -> int:
    """Scores on stdout, the formats on stderr."""
    if options.list:
        _list(options.json)
        return console.OK
    required = ("metric", "predictions", "references")
    missing = [f"--{name}" for name in required if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"vlm score needs {', '.join(missing)}; `vlm score --list` names the metrics and formats")
    from vlm.eval.scoring import score_files, table

    assert options.predictions is not None and options.references is not None and options.metric is not None

    outcome = score_files(
        options.predictions,
        options.references,
        options.metric,
        questions=options.questions,
        format=options.format,
        predictions_format=options.predictions_format,
        only_predicted=options.only_predicted,
        split=options.split,
        by=None if options.by is None else names(options.by),
    )
    for what in ("predictions", "references"):
        print(f"{what}: {outcome[what]['file']} read as {outcome[what]['format']}", file=sys.stderr)
    print(jsons.dumps(outcome, indent=1) if options.json else table(outcome))
    return console.OK


def _list(as_json: bool) -> None:
    from vlm.eval.gold import gold_formats, prediction_formats
    from vlm.eval.scoring import metric_rows
    from vlm.words import aligned

    rows = metric_rows()
    formats = {
        "references": {name: known.about for name, known in gold_formats().items()},
        "predictions": {name: known.about for name, known in prediction_formats().items()},
    }
    if as_json:
        print(jsons.dumps({"metrics": rows, "formats": formats}, indent=1))
        return
    for row in rows:
        facts = [f"needs {', '.join(row['needs'])}"] if row["needs"] else []
        facts += [f"uses {', '.join(row['uses'])}"] if row["uses"] else []
        row["line"] = row["rule"] + (f" [{'; '.join(facts)}]" if facts else "")
    print("\n".join(aligned([(row["name"], row["line"]) for row in rows])))
    for what, known in formats.items():
        print(
            f"\nformats of {what}\n"
            + "\n".join(aligned([(f"  {name}", "", "", "", about) for name, about in known.items()]))
        )


COMMAND = Command(
    name="score",
    help="score a file of predictions",
    details=(
        "Reads the benchmarks' own files; the formats are told from the content and named on stderr."
        " Ids that are missing, too many or there twice are refused: the denominator never shrinks by itself."
    ),
    options=Options,
    run=run,
    group="judge",
)
