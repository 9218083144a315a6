"""Parts of a model in different dtypes: what passes from one to the next, and what to say where they cannot be
multiplied."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError, GenerationError, nearest
from vlm.model import decoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a model's weights can be, by the names that people give."""
MISMATCH = re.compile(r"dtype|scalar type|(Float|Half|BFloat16|Double)Tensor|expected .*(Float|Half|BFloat16|Double)")
"""What torch says when it is to multiply two dtypes; it has no exception of its own for that."""


def named(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of a name; a dtype is itself.

    Raises:
        ConfigError: an unknown name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(dtype, DTYPES)}; known: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def check_dtype(config: Any, dtype: torch.dtype, *, force: bool = False) -> None:
    """Refuse float16 for Gemma: activations exceed 65504 and the output is empty or NaN.

    Args:
        config: the `VLMConfig`.

    Raises:
        GenerationError: the dtype is float16 and `force` is False.
    """
    if dtype == torch.float16 and decoder.spec(config.text_config).overflows_float16 and not force:
        raise GenerationError(
            f"float16 overflows in {config.text_config.model_type} decoders (activations above 65504) and gives"
            f" empty or NaN output;"
            " use bfloat16 or float32, or force_fp16=True to try all the same"
        )


def names(module: nn.Module) -> str:
    """The floating-point dtypes of a module's parameters, such as `bfloat16 and float32`."""
    found = {dtype_name(p.dtype) for p in module.parameters() if p.is_floating_point()}
    return " and ".join(sorted(found))


def enter(tensor: Tensor, module: nn.Module) -> Tensor:
    """A tensor in the dtype of the module that reads it next. Autocast chooses for itself, and so does a module whose
    weights are quantised."""
    own = next((parameter.dtype for parameter in module.parameters()), tensor.dtype)
    if own == tensor.dtype or not own.is_floating_point or own.itemsize < 2:
        return tensor
    return tensor if torch.is_autocast_enabled(tensor.device.type) else tensor.to(own)


def told(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that says in a sentence when its parts' own parameters are of dtypes that do not go together.

    Raises:
        ConfigError: in place of torch's RuntimeError.
    """

    @functools.wraps(forward)
    def checked(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        try:
            return forward(self, *args, **kwargs)
        except RuntimeError as error:
            if " and " not in names(self) or not MISMATCH.search(str(error)):
                raise
            raise ConfigError(
                f"the model's parameters are {_by_part(self)}; torch does not multiply two dtypes inside a part"
                f" ({' '.join(str(error).split())[:200]}): open it in one, vlm.load(path, dtype='float32'), or convert"
                f" it, model.float()"
            ) from error

    return checked


def _by_part(model: nn.Module) -> str:
    parts: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        # model.PART.… in the whole model, PART.… in the one without its output layer
        part = name.removeprefix("model.").split(".")[0]
        parts.setdefault(part, "")
        dtype = dtype_name(parameter.dtype)
        if dtype not in parts[part].split(" and "):
            parts[part] = f"{parts[part]} and {dtype}".removeprefix(" and ")
    return ", ".join(f"{dtypes} in {part}" for part, dtypes in parts.items())
