"""Learning rate as a pure function of the step."""

import math

from vlm.train.stage_config import StageConfig


def multiplier(stage: StageConfig, step: int, steps: int) -> float:
    """What the peak learning rates are multiplied by in optimizer step `step` (0-based) of `steps`; in [0, 1].

    Warm-up of w steps gives 1/w, 2/w, ..., 1. After it `linear` and `cosine` fall towards `final`, which they would
    reach one step after the last: no step is wasted on a rate of 0. `rsqrt` is 1 / sqrt(1 + t / timescale), t steps
    after the warm-up, and needs no known end.
    """
    warmup = warmup_steps(stage, steps)
    if step < warmup:
        return (step + 1) / warmup
    since = step - warmup
    if stage.schedule == "constant":
        return 1.0
    if stage.schedule == "rsqrt":
        return 1.0 / math.sqrt(1.0 + since / stage.timescale)
    progress = min(1.0, since / max(1, steps - warmup))
    shape = 1.0 - progress if stage.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return stage.final + (1.0 - stage.final) * shape


def warmup_steps(stage: StageConfig, steps: int) -> int:
    """Warm-up in steps: `warmup` itself from 1 on, rounded; below 1 that fraction of the stage."""
    return round(stage.warmup * steps if stage.warmup < 1 else stage.warmup)
