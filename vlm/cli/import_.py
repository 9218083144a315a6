"""`vlm import`: a published checkpoint as a model directory, with the proof that it is the same model."""

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from vlm.cli import console
from vlm.cli.options import command, unless_auto

DETAILS = (
    "SOURCE is a PaliGemma 1 or 2 directory or hub id, or a big_vision .npz of PaliGemma (with --tokenizer), SigLIP or"
    " SigLIP 2. What was written is compared with SOURCE; the table is printed and saved as parity.json, and a"
    " difference beyond the tolerance is an error that leaves nothing behind."
)


def add(commands: Any) -> None:
    """Register the command."""
    parser = command(commands, run, "import", "turn a published checkpoint into a model directory", DETAILS)
    parser.add_argument("source", metavar="SOURCE", help="directory, hub id or .npz file")
    parser.add_argument("--out", "-o", type=Path, required=True, metavar="DIR", help="directory to make")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="sentencepiece .model of a PaliGemma .npz")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weights file (5GB)")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="number format; auto: the source's"
    )
    parser.add_argument(
        "--parity",
        choices=("full", "weights", "none"),
        default="full",
        help="full: run both models in float32; weights: compare the tensors only, for models too large for that",
    )
    parser.add_argument(
        "--verify", choices=("quick", "full", "none"), default="quick", help="how much of manifest.json to check"
    )
    parser.add_argument(
        "--from-pickle",
        action="store_true",
        help="SOURCE has pickled weights (pytorch_model.bin, or a file): write the same directory with safetensors;"
        " read by torch's weights-only reader, in a process of its own",
    )
    parser.add_argument("--allow-nonfinite", action="store_true", help="accept weights with NaN or infinity")


def run(options: Namespace) -> int:
    """`vlm import`: the parity table on stdout, or what was converted."""
    if options.from_pickle:
        return _from_pickle(options)
    console.quiet_transformers()
    from vlm.exchange.importing import convert

    report = convert(
        options.source,
        options.out,
        tokenizer=options.tokenizer,
        dtype=unless_auto(options.dtype),
        parity=options.parity,
        max_shard_size=options.max_shard_size,
        allow_nonfinite=options.allow_nonfinite,
        verify=options.verify,
        revision=options.revision,
    )
    if report.reader:
        print(f"{report.out}: compared with {options.source} in {report.reader}")
    print(report.table())
    print(f"written to {options.out}", file=sys.stderr)
    return console.OK


def _from_pickle(options: Namespace) -> int:
    """`--from-pickle`: a line for each file on stdout, and how to go on."""
    from vlm.errors import ConfigError
    from vlm.exchange.pickled import convert_pickle

    unread = [("--tokenizer", options.tokenizer), ("--dtype", unless_auto(options.dtype))]
    given = [name for name, value in unread if value is not None]
    if given:
        raise ConfigError(f"--from-pickle changes the file format and nothing else; leave {', '.join(given)} out")
    done = convert_pickle(options.source, options.out, revision=options.revision)
    for one in done:
        print(one)
    print(
        f"read by the weights-only reader of torch {done[0].facts['torch']} in a process of its own; only tensors were"
        f" taken over"
    )
    print(f"written to {options.out}; it is now an --encoder, a --decoder or a SOURCE as others are", file=sys.stderr)
    return console.OK
