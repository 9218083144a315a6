"""What a training run is: frozen dataclasses, read from one YAML file with dotted overrides.

    out: runs/shapes
    model: {path: models/start}
    data: {train: data/train.jsonl}
    stages:
    - {name: align, module: frozen_encoder, train: {projector: 1e-3}, steps: 500, batch_size: 64}
    - {name: tune, module: full, train: {encoder: 1e-5, projector: 1e-4, decoder: 1e-4}, epochs: 2, batch_size: 64}

Nothing here imports torch. Rules that need the world size or the data are checked when the run starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vlm import settings
from vlm.errors import ConfigError
from vlm.generation.decoding import TASK_TOKENS, Decoding
from vlm.train.stage_config import StageConfig, option, positive


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the model comes from: a directory (`path`), or parts as `vlm.new` takes them."""

    path: Path | None = None
    """A model directory, as written by `vlm.save` or by an earlier run."""
    encoder: str | dict[str, Any] | list[Any] | None = None
    """A checkpoint, or a vision configuration (`model_type` and its settings) for new weights; `A+B`, or a list of
    these, fuses towers."""
    encoder_kind: str | None = None
    """Read a SigLIP checkpoint as another kind, such as siglip2_naflex."""
    image_size: int | None = None
    """Side of the square images in pixels; another one than the tower's (or the model's at `path`) resamples its
    position table."""
    layer: int | list[int] = -1
    """Of the tower, whose output is the features: -1 the last with the final norm, -2 the one before without; several
    are concatenated."""
    fuse: dict[str, Any] = field(default_factory=dict)
    """For fused towers whose grids differ: `{grid: [rows, columns], resample: bilinear}`."""
    projector: str | dict[str, Any] | None = None
    """None: linear, or the projector of the model at `path`; another one than that starts with new weights."""
    decoder: str | dict[str, Any] | None = None
    """A Gemma checkpoint, or a transformers text configuration for new weights."""
    tokenizer: str | None = None
    """Where to find the tokenizer; None: the decoder checkpoint's."""
    image: dict[str, Any] = field(default_factory=dict)
    """Settings of the image transform to change, as for `vlm.new`."""
    seed: int = 0
    """Seed of the random weights of parts that come from no checkpoint."""
    softcap_in_loss: bool | None = None
    """Apply Gemma 2's final soft-cap to the training loss; None keeps the model's choice (off, as Google's recipe)."""
    softcap_in_generation: bool | None = None
    """Apply it when generating; None keeps the model's choice (on)."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.encoder is None and self.decoder is None):
            raise ConfigError("model: give either `path`, or `encoder` and `decoder`")
        if self.path is None and (self.encoder is None or self.decoder is None):
            raise ConfigError("model: a new model needs both `encoder` and `decoder`")
        for name in ("fuse", "tokenizer"):
            if self.path is not None and getattr(self, name):
                raise ConfigError(
                    f"model: `{name}` is for a new model and would not change the one at `path`; leave it out, or build"
                    f" the model with `vlm new` first"
                )

    def geometry(self) -> dict[str, Any]:
        """What is changed of the model at `path`, as `vlm.checkpoints.geometry.with_geometry` takes it."""
        changes = {name: getattr(self, name) for name in ("encoder_kind", "image_size", "image", "projector")}
        changes["layer"] = None if self.layer in (-1, [-1]) else self.layer
        return {name: value for name, value in changes.items() if value}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One annotation file of a mixture."""

    path: Path
    image_root: Path | None = None
    """Folder that image paths are relative to, and may not leave; None: the annotation file's own."""
    repeat: float = 1.0
    """How often each example is seen per epoch; 0.5 takes another random half in each epoch."""

    def __post_init__(self) -> None:
        if self.repeat <= 0:
            raise ConfigError(f"repeat must be above 0, got {self.repeat}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """JSONL files with `image`, `prefix` and `suffix` per line."""

    train: Path | list[Source]
    """One file, or a mixture of several."""
    val: Path | None = option(None, changes="none")
    """A file whose loss is measured (never trained on) every `validate_every` steps and at the end of each stage."""
    image_root: Path | None = None
    """Image folder of `train` (when it is one file) and `val`; None: each annotation file's own folder."""
    strip_control: bool = False
    """Remove control spellings that somebody wrote into the texts (`<image>`, `<bos>`, `[INST]`, a newline at the end
    of a prompt; see `vlm.text.control`). They are text to the model; that a file has some is told once in any case."""
    cache_images_mb: int = option(256, changes="none")
    """Decoded images kept in memory by each loading process, in MB; 0 decodes every time."""
    max_num_patches: int | list[int] | None = None
    """Patch budget of training images of a NaFlex tower; of a list, each step draws one. None: the model's own, which
    validation and the saved model keep in any case."""

    def __post_init__(self) -> None:
        if isinstance(self.train, list) and not self.train:
            raise ConfigError("train: the list of files is empty")
        if self.cache_images_mb < 0:
            raise ConfigError(f"cache_images_mb must be 0 or more, got {self.cache_images_mb}")
        if self.max_num_patches is not None and (not self.budgets() or min(self.budgets()) < 1):
            raise ConfigError(
                f"max_num_patches is {self.max_num_patches!r}, expected patches per image (1 or more) or a list such as"
                f" [128, 256, 576, 784, 1024]; leave it out to train with the model's own budget"
            )
        if isinstance(self.train, list) and self.image_root is not None and self.val is None:
            raise ConfigError(
                "image_root is for one training file and for `val`, and `train` is a list here; give each file of the"
                " list its own image_root"
            )

    def budgets(self) -> list[int]:
        """The patch budgets that training draws from; empty: the model's own."""
        if isinstance(self.max_num_patches, int):
            return [self.max_num_patches]
        return self.max_num_patches or []

    def sources(self) -> list[Source]:
        """The training files as a mixture."""
        if isinstance(self.train, list):
            return self.train
        return [Source(path=self.train, image_root=self.image_root)]


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What the model is asked while it trains: a fixed part of a file, or of tasks (`vlm.eval`)."""

    data: Path
    """A JSONL file, or with `tasks` the folder of the tasks' files."""
    metrics: list[str] = field(default_factory=list)
    """For a JSONL file: names of metrics."""
    tasks: str | None = None
    """Names of tasks, as in `vqav2,pope@random`; they bring their metrics and way of decoding."""
    image_root: Path | None = None
    """Folder of the images of a JSONL file; None: its own."""
    limit: int | None = 256
    """Items of each task: the same ones every time, drawn once with a fixed seed. None takes all."""
    max_new_tokens: int = TASK_TOKENS
    """For a JSONL file: most tokens of an answer; tasks bring their own."""
    batch_size: int = 16
    """Items at a time."""

    def __post_init__(self) -> None:
        if bool(self.metrics) == (self.tasks is not None):
            raise ConfigError("evaluate: give either `metrics`, for a JSONL file in `data`, or `tasks`, for a folder")
        positive("evaluate", limit=self.limit, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        defaults = {"image_root": None, "max_new_tokens": TASK_TOKENS}
        for name, default in defaults.items():
            if self.tasks is not None and getattr(self, name) != default:
                raise ConfigError(
                    f"evaluate: {name} is for a JSONL file; the tasks ({self.tasks}) bring their own; leave it out"
                )

    @property
    def decoding(self) -> Decoding:
        """How answers to the items of a JSONL file are made."""
        return Decoding(max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: model, data, stages in order, and the machine they run on."""

    out: Path = option(changes="machine")
    """Directory of everything the run writes; must be new, or the one to resume."""
    model: ModelConfig
    data: DataConfig
    stages: list[StageConfig]
    seed: int = 0
    """Decides data order, dropout and augmentation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    force_fp16: bool = option(False, changes="none")
    """Allow fp16 with a Gemma decoder, whose activations overflow it."""
    deterministic: bool = option(False, changes="none")
    """On a GPU, use only deterministic kernels (slower); a CPU always does."""
    accelerator: Literal["auto", "cpu", "gpu"] = option("auto", changes="machine")
    devices: int | Literal["auto"] = option("auto", changes="machine")
    """Processes per node, one device each; auto: every GPU, or one CPU process."""
    nodes: int = option(1, changes="machine")
    strategy: Literal["auto", "ddp"] = option("auto", changes="machine")
    workers: int = option(0, changes="machine")
    """Processes that load data, per rank; 0 loads in the training process."""
    checkpoint_every: int = option(500, changes="machine")
    """Optimizer steps between checkpoints; one is also written at the end of a stage and when the run is stopped."""
    keep_checkpoints: int = option(2, changes="machine")
    validate_every: int | None = option(None, changes="none")
    """Steps between measurements of the loss on `data.val`; it is also measured at the end of each stage."""
    evaluate: EvaluateConfig | None = option(None, changes="none")
    """Score the model's answers every `evaluate_every` steps and at the end of each stage; training is not changed."""
    evaluate_every: int | None = option(None, changes="none")
    log_every: int = option(20, changes="machine")
    """Steps between log lines when no progress bar is shown; `metrics.csv` has every step."""
    bad_image_share: float = option(0.01, changes="none")
    """The run stops when more than this share of the images read could not be decoded, or 100 in a row."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages: the list is empty; give at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages: every stage needs its own name, got {', '.join(names)}")
        self._check_caches()
        positive("run", nodes=self.nodes, checkpoint_every=self.checkpoint_every, log_every=self.log_every)
        positive("run", keep_checkpoints=self.keep_checkpoints, validate_every=self.validate_every)
        positive("run", evaluate_every=self.evaluate_every)
        if self.validate_every is not None and self.data.val is None:
            raise ConfigError(
                "validate_every is set, but there is nothing to validate on; add `val` to `data`, or leave it out"
            )
        if self.evaluate_every is not None and self.evaluate is None:
            raise ConfigError(
                "evaluate_every is set, but nothing says what to evaluate; add `evaluate: {data, metrics}`"
            )
        if self.devices != "auto":
            positive("run", devices=self.devices)
        if self.workers < 0 or not 0 <= self.bad_image_share <= 1:
            raise ConfigError("workers must be 0 or more, and bad_image_share between 0 and 1")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed}")

    def _check_caches(self) -> None:
        cached = [stage.name for stage in self.stages if stage.cache_features]
        if cached and len(self.data.budgets()) > 1:
            raise ConfigError(
                f"stage {cached[0]}: cache_features encodes each image at one size, but data.max_num_patches has"
                f" {len(self.data.budgets())}; give one number, or leave cache_features out"
            )


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run described by a YAML file, changed by overrides such as `stages.0.steps=100`. Raises `ConfigError`."""
    return settings.load(RunConfig, path, overrides)
