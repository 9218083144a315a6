"""`vlm import`: a published checkpoint as a model directory, with the proof that it is the same model."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm.cli import console
from vlm.cli.options import Command, Dtype, Shared, unless_auto
from vlm.settings import option


@dataclass(frozen=True, kw_only=True)
class Options:
    shared: Shared
    source: str = option("directory, hub id or .npz file", place=True, metavar="SOURCE")
    out: Path = option("directory to make", flags=("-o",), metavar="DIR")
    tokenizer: Path | None = option("sentencepiece .model of a PaliGemma .npz", default=None, metavar="FILE")
    revision: str | None = option("branch, tag or commit of a hub id", default=None, metavar="NAME")
    max_shard_size: str = option("of a weights file", default="5GB", metavar="SIZE")
    dtype: Dtype = option("number format; auto: the source's", default="auto", shown="")
    parity: Literal["full", "weights", "none"] = option(
        "full: run both models in float32; weights: compare the tensors only, for models too large for that",
        default="full",
    )
    verify: Literal["quick", "full", "none"] = option("how much of manifest.json to check", default="quick")
    from_pickle: bool = option(
        "SOURCE has pickled weights (pytorch_model.bin, or a file): write the same directory with safetensors; read by"
        " torch's weights-only reader, in a process of its own",
        default=False,
    )
    allow_nonfinite: bool = option("accept weights with NaN or infinity", default=False)


def run(options: Options) -> int:
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


def _from_pickle(options: Options) -> int:
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


COMMAND = Command(
    name="import",
    help="turn a published checkpoint into a model directory",
    details=(
        "SOURCE is a PaliGemma 1 or 2 directory or hub id, or a big_vision .npz of PaliGemma (with --tokenizer), SigLIP"
        " or SigLIP 2. What was written is compared with SOURCE; the table is printed and saved as parity.json, and a"
        " difference beyond the tolerance is an error that leaves nothing behind."
    ),
    options=Options,
    run=run,
    group="build",
)
