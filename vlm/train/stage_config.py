"""What a stage of a run is: which parts train, how and for how long.

A new setting is one field here and the line that uses it. The field says itself what a change of it does to a run that
goes on (`option`); `vlm.train.changes` reads it there.
"""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from vlm.errors import ConfigError, nearest

PARTS = ("encoder", "projector", "decoder")
MIN_RATE, MAX_RATE = 1e-12, 1.0
"""AdamW's step is about as long as the rate, whatever the gradient: outside these no float32 weight can be trained."""
TIMESCALE = 10_000.0

Changes = Literal["machine", "none", "rounding", "shape", "results"]


def option(default: Any = MISSING, *, factory: Callable[[], Any] | None = None, changes: Changes = "results") -> Any:
    """A field of a configuration that says what a change of it does to a run that goes on.

    Args:
        changes: `machine`, where and how it runs, and `none`, what is measured or refused: no result depends on it;
            `rounding`: the same gradient but for rounding; `shape`: it makes another model or aim, so it is fixed once
            the stage has begun; `results`, that of a plain field: the result is another.
    """
    if factory is not None:
        return field(default_factory=factory, metadata={"changes": changes})
    return field(default=default, metadata={"changes": changes})


def settings_that(kind: type, *changes: Changes) -> tuple[str, ...]:
    """Names of the fields of a configuration with one of these effects, in their order."""
    return tuple(one.name for one in fields(kind) if one.metadata.get("changes", "results") in changes)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage: which parts train, at what rate, for how long."""

    name: str
    """Name of the stage's folder in the run directory."""
    module: Literal["frozen_encoder", "full"]
    train: dict[str, float]
    """Part (encoder, projector, decoder) -> its peak learning rate. A part left out is frozen."""
    objective: str = option("captioning", changes="shape")
    """What it trains for: a file of `vlm/train/objectives`."""
    steps: int | None = None
    """Optimizer steps; or give `epochs`."""
    epochs: float | None = None
    image_size: int | list[int] | None = option(None, changes="shape")
    """Side of the square images in pixels from this stage on, as in PaliGemma's stage 2 (224, then 448): the position
    table is resampled, all other weights go on as they are. Of a fused tower, one for each member."""
    image: dict[str, Any] = option(factory=dict, changes="shape")
    """Settings of the image transform that change with this stage, such as `{max_num_patches: 1024}` of NaFlex."""
    layer: int | list[int] | None = option(None, changes="shape")
    """Feature layer of the tower from this stage on."""
    projector: str | dict[str, Any] | None = option(None, changes="shape")
    """Another projector from this stage on; it starts with new weights."""
    encoder_kind: str | None = option(None, changes="shape")
    """From this stage on, read SigLIP at any aspect ratio (`siglip2_naflex`), or NaFlex as squares (`siglip`)."""
    batch_size: int
    """Examples per optimizer step, over all ranks and micro-batches: the gradient does not depend on either."""
    accumulate: int = option(1, changes="rounding")
    """Micro-batches per optimizer step on each rank."""
    batch_tokens: int | None = option(None, changes="rounding")
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
    cache_features: bool = option(False, changes="rounding")
    """Encode each image once, before the first step, and keep the features on the disk until the stage is finished.
    For a frozen tower, and worth it where an image is seen several times."""

    def __post_init__(self) -> None:
        _check_name(self.name)
        self._check_parts()
        self._check_cache()
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"stage {self.name}: give either `steps` or `epochs`")
        positive(f"stage {self.name}", steps=self.steps, epochs=self.epochs, batch_size=self.batch_size)
        positive(f"stage {self.name}", accumulate=self.accumulate, clip_norm=self.clip_norm, eps=self.eps)
        positive(f"stage {self.name}", timescale=self.timescale, max_text_length=self.max_text_length)
        positive(f"stage {self.name}", batch_tokens=self.batch_tokens)
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
        shape = [name for name in settings_that(StageConfig, "shape") if name != "objective"]
        return {name: getattr(self, name) for name in shape if getattr(self, name)}

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


def positive(where: str, **values: float | None) -> None:
    """Raise `ConfigError` for a number that is not above 0; None is not set."""
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ConfigError(f"{where}: {name} must be above 0, got {value}")


def _check_name(name: str) -> None:
    reserved = {"start", "model", "logs", "tensorboard"}
    if not name or not all(c.isalnum() or c in "-_" for c in name) or name in reserved:
        raise ConfigError(
            f"stage name {name!r}: use letters, digits, `-` and `_` only, and none of {', '.join(sorted(reserved))}"
        )
