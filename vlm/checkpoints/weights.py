"""The tensors of a checkpoint by name, read one at a time.

Headers are read and checked first (the safetensors library refuses a bad one), so that names, shapes and dtypes can be
compared with a configuration before any weight is in memory. A tensor is then a private view of the mapped file, one
mapping per tensor: it costs no copy, and where it is converted or moved its mapping goes with it, so that a model is
never in memory twice. Writing to a view does not reach the file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlm.checkpoints.files import INDEX, SINGLE, check_regular, is_plain, read_json
from vlm.checkpoints.places import locate
from vlm.checkpoints.source import Source, live_source
from vlm.errors import CheckpointError

QUANTISED_DTYPES = frozenset(
    {"I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0", "F6_E2M3", "F6_E3M2", "F4"}
)
QUANTISED_NAMES = re.compile(
    r"\.(qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state|SCB|weight_format"
    r"|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|weight_shape|input_scale)(\.|$)"
)
"""What GPTQ, AWQ, bitsandbytes, compressed-tensors and fp8 checkpoints call their tensors."""
ADAPTER_NAMES = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save)\.|^base_model\.model\.")
"""What the peft library calls them."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: the format's name, such as `BF16`.
        shape: its sizes.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Weights:
    """The tensors of a checkpoint directory by the names in its files; nothing is read until `read`.

    Raises:
        CheckpointError: no safetensors file, a missing, empty, cut or broken shard, an index that names files outside
            the directory or disagrees with the shards, or more than one set of weights.
    """

    def __init__(self, folder: Path, single: str = SINGLE) -> None:
        self.folder = folder
        files, listed = weight_files(folder) if single == SINGLE else ([folder / single], None)
        self.tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in read_header(file).items():
                if name in self.tensors:
                    raise CheckpointError(
                        f"{folder}: tensor {name} is in {self.tensors[name].file.name} and {file.name}"
                    )
                self.tensors[name] = info
        if listed is not None:
            _compare_index(folder, listed, self.tensors)
        _refuse_quantised(folder, self.tensors)
        _refuse_adapters(folder, self.tensors)

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, a view of the file that may be written to."""
        with safe_open(str(self.tensors[name].file), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def source(self, origin: str) -> Source:
        """All tensors; those of a whole model under their live names (`vlm.checkpoints.names`), others under the names
        in the files, without the constants that older versions of transformers stored."""
        return live_source(origin, self.tensors, self.read)


def directory_source(path: str | Path, single: str = SINGLE) -> Source:
    """All tensors of a Hugging Face directory or hub repository. Those of a whole model have their live names
    (`vlm.checkpoints.names`, the one table of layouts), all others the names in its files.

    Args:
        single: name of the file with the weights, where there is no index.
    """
    return Weights(locate(path), single).source(str(path))


def _refuse_quantised(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raise CheckpointError for weights that are no plain numbers, by what the configuration, dtypes and names say."""
    found = [name for name, info in tensors.items() if info.dtype in QUANTISED_DTYPES or QUANTISED_NAMES.search(name)]
    settings = _quantisation(folder)
    if settings is None and not found:
        return
    method = ""
    if settings is not None:
        method = str(settings.get("quant_method") or settings.get("quant_type") or "")
        bits = settings.get("bits") or settings.get("w_bit")
        bits = bits or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
        method = (
            f" ({method}{f', {bits} bits' if bits else ''})"
            if method or bits
            else " (config.json: quantization_config)"
        )
    names = ", ".join(f"{name} {tensors[name].dtype}" for name in sorted(found)[:3])
    shown = f": {len(found)} tensors such as {names}" if found else ""
    raise CheckpointError(
        f"{folder}: the weights are quantised{method}{shown}; only float32, bfloat16 and float16 are opened: take the"
        f" checkpoint that it was made from, or turn it back once with the library that made it (transformers:"
        f" model.dequantize(), then save_pretrained)"
    )


def _quantisation(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a configuration or of one of its parts."""
    if not (folder / "config.json").is_file():
        return None
    values = read_json(folder / "config.json")
    parts = [values, *(values.get(part) for part in ("text_config", "vision_config"))]
    found = [part.get("quantization_config") for part in parts if isinstance(part, dict)]
    return next((settings for settings in found if isinstance(settings, dict)), None)


def _refuse_adapters(folder: Path, tensors: dict[str, TensorInfo]) -> None:
    found = sorted(name for name in tensors if ADAPTER_NAMES.search(name))
    if found:
        raise CheckpointError(
            f"{folder}: the weights hold adapters (LoRA) that are not merged: {len(found)} tensors such as"
            f" {', '.join(found[:3])}; open them with the library that made them, merge (peft: merge_and_unload) and"
            f" save the result"
        )


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a directory, and the index when it is sharded.

    Raises:
        CheckpointError: as `Weights`.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and index.exists():
        raise CheckpointError(
            f"{folder}: holds both {SINGLE} and {INDEX}, one of them is left over; delete the one that is stale"
        )
    if not index.exists():
        if not single.exists():
            raise CheckpointError(
                f"{folder}: no {SINGLE} and no {INDEX}; only safetensors checkpoints are read (pickled weights:"
                f" `vlm import SOURCE --from-pickle --out DIR` converts them)"
            )
        _refuse_strays(folder, [SINGLE])
        return [single], None
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError(f"{index}: weight_map is missing or is not a map from tensors to files")
    names = sorted(set(listed.values()))
    for name in names:
        if not is_plain(name) or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: shard {name[:300]!r} is not a plain file name ending in .safetensors; refused"
            )
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name}: no such file, but {INDEX} lists it; copy it too")
    _refuse_strays(folder, names)
    return [folder / name for name in names], listed


def _refuse_strays(folder: Path, names: list[str]) -> None:
    strays = sorted(file.name for file in folder.glob("model*.safetensors") if file.name not in names)
    if strays:
        raise CheckpointError(
            f"{folder}: {', '.join(strays[:5])} beside {', '.join(names[:2])}, and no index lists both; delete what is"
            f" left over, or copy {INDEX}"
        )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of the tensors of a safetensors file.

    Raises:
        CheckpointError: not a regular file, or the header is broken or does not fit the file's length.
    """
    check_regular(file)
    try:
        with safe_open(str(file), framework="pt") as opened:  # the library checks lengths, offsets and dtypes
            slices = {name: opened.get_slice(name) for name in opened.keys()}
            return {name: TensorInfo(file, s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        start = file.read_bytes()[:64] if file.stat().st_size < 1024 else b""
        pointer = (
            " (this is a Git LFS pointer: run `git lfs pull`)" if start.startswith(b"version https://git-lfs") else ""
        )
        raise CheckpointError(f"{file}: not a complete safetensors file: {error}{pointer}; copy it again") from error


def _compare_index(folder: Path, listed: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    wrong = sorted(name for name in set(listed) | set(tensors) if listed.get(name) != _file_name(tensors.get(name)))
    if wrong:
        raise CheckpointError(
            f"{folder}: {INDEX} and the shards disagree about {len(wrong)} tensors: {', '.join(wrong[:5])}; copy the"
            f" index and all shards from one source"
        )


def _file_name(info: TensorInfo | None) -> str | None:
    return None if info is None else info.file.name
