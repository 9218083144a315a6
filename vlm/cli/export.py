"""`vlm export`: a model for transformers, vLLM and lmms-eval, with the proof that it is the same model."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import check_device, command, unless_auto

DETAILS = (
    "What is written is opened again by transformers' own classes and compared with MODEL; the table of differences is"
    " printed and saved as parity.json, and a difference beyond the tolerance is an error that leaves nothing behind."
)


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(commands, run, "export", "write a model for transformers, vLLM and lmms-eval", DETAILS)
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument(
        "--to",
        choices=("paligemma", "tower"),
        default="paligemma",
        help="paligemma: the layout of PaliGemma on the Hub; tower: the vision tower alone as a SigLIP checkpoint",
    )
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (5GB)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="number format; auto: the model's"
    )
    parser.add_argument(
        "--parity",
        choices=("full", "weights", "none"),
        default="full",
        help="full: run both models in float32; weights: compare the files only, for models too large for that",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where the comparison runs (cpu); auto: a GPU if there is one",
    )


def run(options: Namespace) -> int:
    """`vlm export`: the parity table on stdout."""
    check_device(options.device)
    console.quiet_transformers()
    import torch

    from vlm.checkpoints.directory import load
    from vlm.exchange.exporting import export
    from vlm.exchange.publishing import check_out

    check_out(options.out)  # before minutes of loading
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load(options.model, device=device)
    report = export(
        model,
        processor,
        options.out,
        to=options.to,
        source=options.model,
        dtype=unless_auto(options.dtype),
        max_shard_size=options.max_shard_size,
        parity=options.parity,
    )
    if report.reader:
        print(f"{report.out}: opened by {report.reader}, compared with {options.model}")
    print(report.table())
    print(f"written to {options.out}", file=sys.stderr)
    return console.OK
