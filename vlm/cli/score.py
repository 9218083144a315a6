"""`vlm score`: a file of predictions against a file of annotations, without a model."""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import command

DETAILS = (
    "Reads the benchmarks' own files; the formats are told from the content and named on stderr."
    " Ids that are missing, too many or there twice are refused: the denominator never shrinks by itself."
)


def add(commands: Any) -> None:
    """The options of `vlm score`."""
    parser = command(commands, run, "score", "score a file of predictions", DETAILS)
    parser.add_argument("--metric", "-m", metavar="A,B", help="names of metrics, as listed by --list")
    parser.add_argument("--predictions", "-p", type=Path, metavar="FILE", help="what a model said (JSON or JSONL)")
    parser.add_argument("--references", "-r", type=Path, metavar="FILE", help="the annotations (JSON or JSONL)")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="VQA's questions, to check the annotations with")
    parser.add_argument("--format", metavar="NAME", help="format of the references, if not to be told from the content")
    parser.add_argument("--predictions-format", metavar="NAME", help="the same of the predictions")
    parser.add_argument("--split", metavar="NAME", help="only the annotations of this split")
    parser.add_argument(
        "--only-predicted", action="store_true", help="leave out annotations without a prediction; the output says so"
    )
    parser.add_argument("--by", metavar="A,B", help="facts to break scores down by (question_type, answer_type, ...)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--list", action="store_true", help="list the metrics and their rules, and the formats")


def run(options: Namespace) -> int:
    """Scores on stdout, the formats on stderr."""
    from vlm.errors import ConfigError

    if options.list:
        _list(options.json)
        return console.OK
    required = ("metric", "predictions", "references")
    missing = [f"--{name}" for name in required if getattr(options, name) is None]
    if missing:
        raise ConfigError(f"vlm score needs {', '.join(missing)}; `vlm score --list` names the metrics and formats")
    from vlm.eval.scoring import score_files, table

    outcome = score_files(
        options.predictions,
        options.references,
        options.metric,
        questions=options.questions,
        format=options.format,
        predictions_format=options.predictions_format,
        only_predicted=options.only_predicted,
        split=options.split,
        by=None if options.by is None else [fact.strip() for fact in options.by.split(",") if fact.strip()],
    )
    for what in ("predictions", "references"):
        print(f"{what}: {outcome[what]['file']} read as {outcome[what]['format']}", file=sys.stderr)
    print(json.dumps(outcome, indent=1) if options.json else table(outcome))
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
        print(json.dumps({"metrics": rows, "formats": formats}, indent=1))
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
