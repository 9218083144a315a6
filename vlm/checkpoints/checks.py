"""What a checkpoint's configuration may say, checked and bounded before anything is built from it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from vlm.errors import CheckpointError, ConfigError, VLMError

# Far above any published model; a wrong number must not ask for terabytes or build layers for hours.
BOUNDS = {
    "hidden_size": 65_536,
    "intermediate_size": 1_048_576,
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1_024,
    "num_key_value_heads": 1_024,
    "head_dim": 4_096,
    "vocab_size": 4_000_000,
    "max_position_embeddings": 100_000_000,
    "sliding_window": 1 << 40,
    "image_size": 16_384,
    "patch_size": 1_024,
    "num_patches": 1_000_000,
    "num_channels": 64,
    # No use here, but transformers makes a table of names as long as this.
    "num_labels": 100_000,
}
# (key, above, below) of settings that are numbers, where they are given.
RANGES = (
    ("rms_norm_eps", 0.0, 1.0),
    ("layer_norm_eps", 0.0, 1.0),
    ("attention_dropout", -1e-9, 1.0),
    ("query_pre_attn_scalar", 0.0, 1e9),
    ("attn_logit_softcapping", 0.0, 1e9),
    ("final_logit_softcapping", 0.0, 1e9),
    ("rope_theta", 0.0, 1e15),
)
# Notes of whoever saved the file, not part of the architecture.
NOTES = ("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
# What transformers raises for values of a wrong type or kind; it has no exception of its own for them.
FOREIGN = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    OSError,
    ImportError,
    StrictDataclassError,
)


def check_numbers(values: Any, where: str) -> None:
    """Refuse sizes that are not whole numbers or are out of any sensible range.

    Raises:
        CheckpointError: names the key.
    """
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is {type(values).__name__}, expected a map of settings")
    for key, highest in BOUNDS.items():
        value = values.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= highest:
            raise CheckpointError(f"{where}.{key} is {value!r}, expected a whole number from 1 to {highest:,}")
    for key, low, high in RANGES:
        value = values.get(key)
        if value is not None and not (_is_number(value) and low < value < high):
            raise CheckpointError(f"{where}.{key} is {value!r}, expected a number above {low:g} and below {high:g}")
    for key in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key in values and values[key] is None:
            raise CheckpointError(f"{where}.{key} is null; write the number")
    if values.get("patch_size") and values.get("image_size", 1 << 30) < values["patch_size"]:
        raise CheckpointError(
            f"{where}: image_size {values['image_size']} is smaller than patch_size {values['patch_size']}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_text(values: dict[str, Any], where: str) -> None:
    """Refuse a decoder configuration that contradicts itself.

    Raises:
        CheckpointError: names the keys.
    """
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        nested = [part for part in rope.values() if isinstance(part, dict)] or [rope]
        thetas = [part["rope_theta"] for part in nested if "rope_theta" in part]
        wrong = [theta for theta in thetas if not (_is_number(theta) and theta > 0)]
        if wrong:
            raise CheckpointError(f"{where}: rope_parameters.rope_theta is {wrong[0]!r}, expected a positive number")
        stated = values.get("rope_theta")
        if stated is not None and thetas and stated not in thetas:
            raise CheckpointError(
                f"{where}: rope_theta is {stated!r}, rope_parameters say {sorted(map(str, thetas))}; leave one"
                " of them out"
            )


def guarded(build: Any, where: str, wrong: type[VLMError] = CheckpointError) -> Any:
    """Run a configuration's constructor; what it refuses becomes a CheckpointError (or `wrong`) that names the file."""
    try:
        return build()
    except ConfigError as error:
        raise wrong(f"{where}: {error}") from error
    except FOREIGN as error:
        raise wrong(
            f"{where}: not a usable configuration ({type(error).__name__}: {' '.join(str(error).split())[:300]}); copy"
            f" the file again"
        ) from error
