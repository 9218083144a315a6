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
from vlm.errors import ConfigError, nearest
from vlm.generation.decoding import TASK_TOKENS, Decoding

PARTS = ("encoder", "projector", "decoder")
MIN_RATE, MAX_RATE = 1e-12, 1.0
"""AdamW's step is about as long as the rate, whatever the gradient: outside these no float32 weight can be trained."""
TIMESCALE = 10_000.0


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
    val: Path | None = None
    """A file whose loss is measured (never trained on) every `validate_every` steps and at the end of each stage."""
    image_root: Path | None = None
    """Image folder of `train` (when it is one file) and `val`; None: each annotation file's own folder."""
    strip_control: bool = False
    """Remove control spellings that somebody wrote into the texts (`<image>`, `<bos>`, `[INST]`, a newline at the end
    of a prompt; see `vlm.text.control`). They are text to the model; that a file has some is told once in any case."""
    cache_images_mb: int = 256
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
        _positive("evaluate", limit=self.limit, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
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
class StageConfig:
    """One stage: which parts train, at what rate, for how long."""

    name: str
    """Name of the stage's folder in the run directory."""
    module: Literal["frozen_encoder", "full"]
    train: dict[str, float]
    """Part (encoder, projector, decoder) -> its peak learning rate. A part left out is frozen."""
    objective: str = "captioning"
    """What it trains for: a file of `vlm/train/objectives`."""
    steps: int | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = None
    image_size: int | list[int] | None = None
    """Side of the square images in pixels from this stage on, as in PaliGemma's stage 2 (224, then 448): the position
    table is resampled, all other weights go on as they are. Of a fused tower, one for each member."""
    image: dict[str, Any] = field(default_factory=dict)
    """Settings of the image transform that change with this stage, such as `{max_num_patches: 1024}` of NaFlex."""
    layer: int | list[int] | None = None
    """Feature layer of the tower from this stage on."""
    projector: str | dict[str, Any] | None = None
    """Another projector from this stage on; it starts with new weights."""
    encoder_kind: str | None = None
    """From this stage on, read SigLIP at any aspect ratio (`siglip2_naflex`), or NaFlex as squares (`siglip`)."""
    batch_size: int
    """Examples per optimizer step, over all ranks and micro-batches: the gradient does not depend on either."""
    accumulate: int = 1
    """Micro-batches per optimizer step on each rank."""
    batch_tokens: int | None = None
    """Instead of `accumulate`: the most tokens of a micro-batch (image and text, padding included). The examples of a
    step are cut into as many micro-batches as that takes, similar lengths together; the gradient stays the same."""
    precision: Literal["fp32", "bf16", "fp16"] | None = None
    """None: the run's. bf16 and fp16 are mixed precision: weights and optimizer stay float32."""
    schedule: Literal["constant", "linear", "cosine", "rsqrt"] = "cosine"
    warmup: float = 0.05
    """Steps of linear warm-up when 1 or more, a fraction of the stage when below 1."""
    final: float = 0.0
    """Learning rate at the end of `linear` and `cosine`, as a fraction of the peak."""
    timescale: float = TIMESCALE
    """Steps after which `rsqrt` has divided the rate by sqrt(2)."""
    clip_norm: float | None = 1.0
    """Largest global gradient norm; None does not clip."""
    weight_decay: float = 0.0
    """AdamW's, on weight matrices and embeddings; never on norms and biases."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    loss_reduction: Literal["token", "example"] = "token"
    max_text_length: int | None = None
    """Longest text in tokens, images not counted; a longer answer is cut and counted, a longer prompt is refused."""
    augment: list[str] = field(default_factory=list)
    """Names from `vlm.data.augment.AUGMENTATIONS`; list only those that cannot change the answer."""
    cache_features: bool = False
    """Encode each image once, before the first step, and keep the features on the disk until the stage is finished.
    For a frozen tower, and worth it where an image is seen several times."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        self._check_parts()
        self._check_cache()
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"stage {self.name}: give either `steps` or `epochs`")
        _positive(f"stage {self.name}", steps=self.steps, epochs=self.epochs, batch_size=self.batch_size)
        _positive(f"stage {self.name}", accumulate=self.accumulate, clip_norm=self.clip_norm, eps=self.eps)
        _positive(f"stage {self.name}", timescale=self.timescale, max_text_length=self.max_text_length)
        _positive(f"stage {self.name}", batch_tokens=self.batch_tokens)
        self._check_schedule()
        self._check_adamw()
        if self.batch_tokens is not None and self.accumulate > 1:
            raise ConfigError(
                f"stage {self.name}: accumulate cuts a step into equal micro-batches, batch_tokens by length; give one"
                f" of the two"
            )
        if self.batch_size % self.accumulate:
            raise ConfigError(
                f"stage {self.name}: batch_size {self.batch_size} cannot be cut into {self.accumulate} equal "
                f"micro-batches (accumulate)"
            )

    def geometry(self) -> dict[str, Any]:
        """What changes of the model with this stage, as `vlm.checkpoints.geometry.with_geometry` takes it."""
        names = ("image_size", "image", "layer", "projector", "encoder_kind")
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def _check_schedule(self) -> None:
        """Settings of another schedule than the one that is set would be without effect."""
        if self.warmup < 0 or not 0 <= self.final <= 1:
            raise ConfigError(f"stage {self.name}: warmup must be 0 or more, final between 0 and 1")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ConfigError(
                f"stage {self.name}: warmup {self.warmup:g} is no whole number of steps; below 1 it is a fraction of"
                f" the stage"
            )
        if self.final != 0 and self.schedule not in ("linear", "cosine"):
            raise ConfigError(
                f"stage {self.name}: final {self.final:g} has no effect on the schedule {self.schedule!r}; leave it"
                f" out, or choose linear or cosine"
            )
        if self.timescale != TIMESCALE and self.schedule != "rsqrt":
            raise ConfigError(
                f"stage {self.name}: timescale {self.timescale:g} has no effect on the schedule {self.schedule!r};"
                f" leave it out, or choose rsqrt"
            )

    def _check_adamw(self) -> None:
        if self.weight_decay < 0:
            raise ConfigError(f"stage {self.name}: weight_decay must be 0 or more, got {self.weight_decay:g}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"stage {self.name}: betas must be at least 0 and below 1, got {list(self.betas)}")
        if not 1e-30 <= self.eps <= 1:
            raise ConfigError(
                f"stage {self.name}: eps must be between 1e-30 (float32 holds little less) and 1 (more stops every"
                f" weight), got {self.eps:g}"
            )
        for part, rate in self.train.items():
            if rate * self.weight_decay >= 1:
                raise ConfigError(
                    f"stage {self.name}: weight_decay {self.weight_decay:g} times the learning rate of {part}"
                    f" ({rate:g}) is 1 or more: every step would wipe the weights out; lower one of them"
                )

    def _check_parts(self) -> None:
        for part, rate in self.train.items():
            if part not in PARTS:
                raise ConfigError(
                    f"stage {self.name}: train: unknown part {part!r}{nearest(part, PARTS)}; known: {PARTS}"
                )
            if rate <= 0:
                raise ConfigError(
                    f"stage {self.name}: train.{part}: the learning rate must be above 0, got {rate}; "
                    f"leave the part out to freeze it"
                )
            if not MIN_RATE <= rate <= MAX_RATE:
                raise ConfigError(
                    f"stage {self.name}: train.{part}: a learning rate of {rate:g} cannot train: AdamW moves a weight"
                    f" by about the rate in each step, so below {MIN_RATE:g} nothing changes and above {MAX_RATE:g}"
                    f" nothing is left; usual are 1e-6 to 1e-2"
                )
        if not self.train:
            raise ConfigError(f"stage {self.name}: nothing trains; give at least one part a learning rate in `train`")
        if self.module == "frozen_encoder" and "encoder" in self.train:
            raise ConfigError(
                f"stage {self.name}: module frozen_encoder freezes the encoder; use module full to train it"
            )

    def _check_cache(self) -> None:
        if self.cache_features and self.module != "frozen_encoder":
            raise ConfigError(
                f"stage {self.name}: cache_features needs a tower that does not change: use module frozen_encoder, or"
                f" leave cache_features out"
            )
        if self.cache_features and self.augment:
            raise ConfigError(
                f"stage {self.name}: cache_features encodes each image once, but augment ({', '.join(self.augment)})"
                f" changes it every time; leave one of them out"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run: model, data, stages in order, and the machine they run on."""

    out: Path
    """Directory of everything the run writes; must be new, or the one to resume."""
    model: ModelConfig
    data: DataConfig
    stages: list[StageConfig]
    seed: int = 0
    """Decides data order, dropout and augmentation."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    force_fp16: bool = False
    """Allow fp16 with a Gemma decoder, whose activations overflow it."""
    deterministic: bool = False
    """On a GPU, use only deterministic kernels (slower); a CPU always does."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | Literal["auto"] = "auto"
    """Processes per node, one device each; auto: every GPU, or one CPU process."""
    nodes: int = 1
    strategy: Literal["auto", "ddp"] = "auto"
    workers: int = 0
    """Processes that load data, per rank; 0 loads in the training process."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints; one is also written at the end of a stage and when the run is stopped."""
    keep_checkpoints: int = 2
    validate_every: int | None = None
    """Steps between measurements of the loss on `data.val`; it is also measured at the end of each stage."""
    evaluate: EvaluateConfig | None = None
    """Score the model's answers every `evaluate_every` steps and at the end of each stage; training is not changed."""
    evaluate_every: int | None = None
    log_every: int = 20
    """Steps between log lines when no progress bar is shown; `metrics.csv` has every step."""
    bad_image_share: float = 0.01
    """The run stops when more than this share of the images read could not be decoded, or 100 in a row."""

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages: the list is empty; give at least one stage")
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ConfigError(f"stages: every stage needs its own name, got {', '.join(names)}")
        self._check_caches()
        _positive("run", nodes=self.nodes, checkpoint_every=self.checkpoint_every, log_every=self.log_every)
        _positive("run", keep_checkpoints=self.keep_checkpoints, validate_every=self.validate_every)
        _positive("run", evaluate_every=self.evaluate_every)
        if self.validate_every is not None and self.data.val is None:
            raise ConfigError(
                "validate_every is set, but there is nothing to validate on; add `val` to `data`, or leave it out"
            )
        if self.evaluate_every is not None and self.evaluate is None:
            raise ConfigError(
                "evaluate_every is set, but nothing says what to evaluate; add `evaluate: {data, metrics}`"
            )
        if self.devices != "auto":
            _positive("run", devices=self.devices)
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


def _positive(where: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{where}: {name} must be above 0, got {value}")


def _check_name(name: str) -> None:
    reserved = {"start", "model", "logs", "tensorboard"}
    if not name or not all(c.isalnum() or c in "-_" for c in name) or name in reserved:
        raise ConfigError(
            f"stage name {name!r}: use letters, digits, `-` and `_` only, and none of {', '.join(sorted(reserved))}"
        )
