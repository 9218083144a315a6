"""`vlm export`: a model for transformers, vLLM and lmms-eval, with the proof that it is the same model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm.cli import console
from vlm.cli.options import Command, Device, Dtype, Shared, chosen_device, unless_auto
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    model: str = option("model directory or hub id", place=True, metavar="MODEL")
    to: Literal["paligemma", "tower"] = option(
        "paligemma: the layout of PaliGemma on the Hub; tower: the vision tower alone in its library's format",
        default="paligemma",
    )
    out: Path = option("directory to make", flags=("-o",), metavar="DIR")
    max_shard_size: str = option("of a weights file", default="5GB", metavar="SIZE")
    dtype: Dtype = option("number format; auto: the model's", default="auto", shown="")
    parity: Literal["full", "weights", "none"] = option(
        "full: run both models in float32; weights: compare the files only, for models too large for that",
        default="full",
    )
    device: Device = option("where the comparison runs; auto: a GPU if there is one", default="cpu")


def run(options: Options) -> int:
    """`vlm export`: the parity table on stdout."""
    device = chosen_device(options.device)
    console.quiet_transformers()
    from vlm.checkpoints.directory import load
    from vlm.exchange.exporting import export
    from vlm.exchange.publishing import check_out

    check_out(options.out)  # before minutes of loading
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


COMMAND = Command(
    name="export",
    help="write a model for transformers, vLLM and lmms-eval",
    details=(
        "What is written is opened again by transformers' own classes and compared with MODEL; the table of differences"
        " is printed and saved as parity.json, and a difference beyond the tolerance is an error that leaves nothing"
        " behind."
    ),
    options=Options,
    run=run,
    group="build",
)
