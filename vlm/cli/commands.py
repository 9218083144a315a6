"""The commands and their options. Bodies import what they need, so that `--help` costs no torch."""

import json
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm.cli import console

app = typer.Typer(
    name="vlm",
    help="Build, train, evaluate and run PaliGemma-style vision-language models.",
    epilog="Exit codes: 0 done, 2 refused (says why), 3 done but some items were skipped, 130/143 stopped by a signal.",
    no_args_is_help=True,
    add_completion=False,
    # rich would triple the time of --help
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class DType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Model = Annotated[str, typer.Option("--model", "-m", help="Model directory or hub id.", show_default=False)]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs; auto: a GPU if there is one.")]
DTypeOption = Annotated[DType, typer.Option("--dtype", help="Number format; auto: that of the checkpoint.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print one JSON object per image, errors included.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")]
NumBeams = Annotated[int, typer.Option(min=1, help="Beams of the search; 1 is greedy.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at a time.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip and list broken annotations instead of refusing them.")]


def command(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Make a function a command whose return value is the exit code."""
    from functools import wraps

    @wraps(function)
    def run(*args: Any, **options: Any) -> None:
        # Inside click, because click would turn Ctrl-C into an exit code of its own.
        with console.endings():
            raise SystemExit(function(*args, **options) or console.OK)

    app.command()(run)
    return function


@command
def train(
    config: Annotated[Path, typer.Option("--config", "-c", help="The run: a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting: stages.0.steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on after the newest complete checkpoint.")] = False,
    skip_bad: SkipBad = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the whole configuration and stop.")
    ] = False,
) -> int:
    """Train a model in stages."""
    from vlm import settings
    from vlm.train import load_config, run

    run_config = load_config(config, overrides or ())
    if print_config:
        import yaml

        print(yaml.safe_dump(settings.to_dict(run_config), sort_keys=False), end="")
        return console.OK
    print(run(run_config, resume=resume, skip_bad=skip_bad))
    summary = json.loads((run_config.out / "summary.json").read_text(encoding="utf-8"))
    return console.SKIPPED if summary["skipped_annotations"] or summary["failed_images"] else console.OK


@command
def eval(
    model: Model,
    data: Annotated[Path, typer.Option("--data", "-d", help="Annotations: a JSONL file.", show_default=False)],
    metrics: Annotated[str, typer.Option(help="Names, comma-separated: exact_match,cider.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results.", show_default=False)],
    image_root: Annotated[Path | None, typer.Option(help="Folder of the images; by default that of the data.")] = None,
    batch_size: BatchSize = 16,
    max_new_tokens: MaxNewTokens = 64,
    num_beams: NumBeams = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many items.")] = None,
    skip_bad: SkipBad = False,
    shuffle_images: Annotated[
        bool, typer.Option("--shuffle-images", help="Control: give every item another item's image.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the shuffling.")] = 0,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    as_json: Json = False,
) -> int:
    """Score a model on annotated images.

    Run again with the same options, it goes on where it stopped.
    """
    from vlm.eval import evaluate, table

    _check_device(device)
    console.quiet_transformers()
    results = evaluate(
        model,
        data,
        metrics,
        out,
        image_root=image_root,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        limit=limit,
        skip_bad=skip_bad,
        shuffle_images=shuffle_images,
        seed=seed,
        device=_unless_auto(device),
        dtype=_unless_auto(dtype),
    )
    print(json.dumps(results, indent=1) if as_json else table(results))
    print(f"written to {out}", file=sys.stderr)
    return console.SKIPPED if results["skipped"] else console.OK


@command
def caption(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", show_default=False)],
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the model is asked.")] = "caption en",
    max_new_tokens: MaxNewTokens = 64,
    num_beams: NumBeams = 1,
    batch_size: BatchSize = 8,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    as_json: JsonLines = False,
) -> int:
    """Describe images.

    Those that cannot be read are named on stderr, the others are described (exit code 3).
    """
    from vlm.cli.ask import ask_about

    _check_device(device)
    return ask_about(
        images,
        prompt,
        model,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=batch_size,
        device=device.value,
        dtype=_unless_auto(dtype),
        as_json=as_json,
    )


@command
def ask(
    image: Annotated[str, typer.Argument(metavar="IMAGE", show_default=False)],
    question: Annotated[str, typer.Argument(metavar="QUESTION", show_default=False)],
    model: Model,
    max_new_tokens: MaxNewTokens = 64,
    num_beams: NumBeams = 1,
    device: DeviceOption = Device.AUTO,
    dtype: DTypeOption = DType.AUTO,
    as_json: JsonLines = False,
) -> int:
    """Ask a question about an image."""
    from vlm.cli.ask import ask_about

    _check_device(device)
    return ask_about(
        [image],
        f"answer en {question}",
        model,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        batch_size=1,
        device=device.value,
        dtype=_unless_auto(dtype),
        as_json=as_json,
    )


@command
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model directory or hub id.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show the parts of a model, their sizes and costs."""
    from vlm.info import describe, table

    console.quiet_transformers()
    facts = describe(model)
    print(json.dumps(facts, indent=1) if as_json else table(facts))


@command
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for everything it makes.")] = Path("vlm-demo"),
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Pretrain the start checkpoints first; takes longer.")
    ] = False,
    pretrain: Annotated[
        bool, typer.Option("--pretrain", help="Only pretrain the start checkpoints: the files the package ships.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of data, weights and training.")] = 0,
) -> None:
    """Train a model on a small drawn world.

    Draws scenes, trains in two stages, scores the model on scenes it has never seen and shows its captions; minutes on
    two cores. Run again with the same options, it goes on where it stopped.
    """
    from vlm.demo import main

    main(out, from_scratch=from_scratch, pretrain=pretrain, seed=seed)


@command
def version() -> None:
    """Print the versions of vlm and what it stands on."""
    import platform
    from importlib import metadata

    from vlm import __version__

    print(f"vlm {__version__}, Python {platform.python_version()}")
    for name in ("torch", "transformers", "lightning", "accelerate", "Pillow"):
        try:
            print(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"{name} is not installed")


def _unless_auto(choice: StrEnum) -> str | None:
    return None if choice == "auto" else choice.value


def _check_device(device: Device) -> None:
    if device is Device.CUDA:
        import torch

        from vlm.errors import ConfigError

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu")
