"""`vlm check`: a model checked by its behaviour."""

import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import at_least, check_device, command, unless_auto

log = logging.getLogger(__name__)

FAILED = 1
"""Exit code: at least one check failed."""
DETAILS = (
    "One line per check: ok, FAIL or n/a, the measured number and its limit."
    " Exit code 0: no check failed; 1: one did; 2: the model or the data cannot be opened."
)


def add(commands: Any) -> None:
    """The options of `vlm check`."""
    parser = command(commands, run, "check", "check a model by its behaviour", DETAILS)
    parser.add_argument("model", metavar="MODEL", help="model directory, hub id, or PaliGemma as a big_vision .npz")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="sentencepiece .model of a .npz")
    parser.add_argument("--data", "-d", type=Path, metavar="FILE", help="training data (JSONL) whose labels to check")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="folder of the images (that of the data)")
    parser.add_argument("--max-text-length", type=at_least(1), metavar="N", help="as in training: count longer texts")
    parser.add_argument("--stage-manifest", type=Path, metavar="FILE", help="STAGE/manifest.json (that of the run)")
    parser.add_argument("--only", metavar="A,B", help="names of checks, as in the second column of the output")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs; auto: a GPU if any"
    )
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="number format; auto: the checkpoint's"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: Namespace) -> int:
    """The report on stdout, progress on stderr."""
    import torch

    from vlm.check import runner
    from vlm.check.checks.stage import read_manifest
    from vlm.checkpoints.directory import load
    from vlm.data.reading import read
    from vlm.exchange.exporting import export

    check_device(options.device)
    console.quiet_transformers()
    only = None if options.only is None else [name.strip() for name in options.only.split(",") if name.strip()]
    # What a person can have mistyped is refused before the model is read.
    runner.choose(only)
    if options.stage_manifest is not None:
        read_manifest(options.stage_manifest)
    data = None if options.data is None else read(options.data, image_root=options.image_root)[0]
    device = unless_auto(options.device) or ("cuda" if torch.cuda.is_available() else "cpu")
    log.info("opening %s", options.model)
    model, processor = load(options.model, dtype=unless_auto(options.dtype), device=device, tokenizer=options.tokenizer)
    report = runner.run(
        model,
        processor,
        data=data,
        stage_manifest=options.stage_manifest,
        only=only,
        path=options.model,
        max_text_length=options.max_text_length,
        export=export,
    )
    print(report.to_json() if options.json else report.table())
    return console.OK if report.ok else FAILED
