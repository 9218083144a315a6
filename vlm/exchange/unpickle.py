"""One pickled checkpoint file to safetensors, in a process of its own: `python -P unpickle.py IN OUT`.

torch's weights-only reader knows tensors and plain containers, and refuses every other name that a pickle asks for. It
is still a parser of hostile input, so it runs apart from everything else, within limits of memory, file size and time,
and only tensors leave this process. Started by `vlm.exchange.pickled` and by nothing else.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SPARE_BYTES = 2 << 30
"""Memory beyond three copies of the file."""
WRAPPERS = ("state_dict", "model", "model_state_dict", "module")
"""Under which training scripts keep the weights, beside optimizers and counters."""


def main(source: str, target: str) -> int:
    """Convert; facts as one line of JSON on stdout, or the reason of a refusal with exit code 2."""
    try:
        limit(Path(source).stat().st_size)
        loaded: Any = torch.load(source, map_location="cpu", weights_only=True)
        tensors, facts = weights_of(loaded)
        save_file(tensors, target, {"format": "pt"})
    except MemoryError:
        print(json.dumps({"error": "needs more memory than three times the file's size"}))
        return 2
    except Exception as error:  # whatever a hostile file makes the reader raise is a refusal, in one line
        print(json.dumps({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}))
        return 2
    print(json.dumps(facts))
    return 0


def limit(size: int) -> None:
    """Bound memory and file size from here on, where the system can."""
    try:
        import resource
    except ImportError:  # Windows
        return
    pages = Path("/proc/self/statm")
    taken = int(pages.read_text().split()[0]) * resource.getpagesize() if pages.exists() else 64 << 30
    for what, most in (
        (resource.RLIMIT_AS, taken + 3 * size + SPARE_BYTES),
        (resource.RLIMIT_FSIZE, 2 * size + (1 << 26)),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def weights_of(loaded: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a checkpoint by name, each with memory of its own, and what is told of them.

    Raises:
        ValueError: no map of names to tensors.
    """
    left: list[str] = []
    inside = None
    if isinstance(loaded, dict) and not _is_weights(loaded):
        inside = next((name for name in WRAPPERS if _is_weights(loaded.get(name))), None)
        if inside is not None:
            left = sorted(str(name) for name in loaded if name != inside)
            loaded = loaded[inside]
    if not _is_weights(loaded):
        kind = type(loaded).__name__
        odd = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)] if kind == "dict" else []
        raise ValueError(
            f"it holds a {kind} that is no map from names to tensors"
            + (f" ({', '.join(odd[:3])} are none); its keys: {', '.join(map(str, list(loaded)[:5]))}" if odd else "")
        )
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in loaded.items():
        if value.is_sparse or value.is_quantized:
            raise ValueError(f"tensor {name} is sparse or quantised")
        start = value.untyped_storage().data_ptr()
        own = value.detach().contiguous()
        tensors[name] = own.clone() if start in seen or own.untyped_storage().nbytes() > own.nbytes else own
        seen.add(start)
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()})
    facts = {"tensors": len(tensors), "bytes": sum(value.nbytes for value in tensors.values()), "dtypes": dtypes}
    return tensors, {**facts, "names": list(tensors), "inside": inside, "left_out": left, "torch": torch.__version__}


def _is_weights(value: Any) -> bool:
    whole = isinstance(value, dict) and len(value) > 0
    return whole and all(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items())


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
