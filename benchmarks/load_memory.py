"""Peak memory of opening a sharded PaliGemma checkpoint, over its size on disk.

    python benchmarks/load_memory.py [--layers 9] [--dtype float32|bfloat16] [--folder DIR] [--repeats 3]

Writes a checkpoint of random weights (Gemma 2B's layer sizes, one shard per layer; 9 layers in float32 are 4 GB), opens
it in fresh processes, `vlm.load` and transformers' own class in turn, and prints one JSON line and a table. Peak is the
kernel's high-water mark of resident memory (VmHWM); `imported` is what the process holds before it opens anything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CHILD = """
import json, sys, time
which, folder = sys.argv[1:]
import torch, transformers, vlm
from transformers import PaliGemmaForConditionalGeneration
import vlm.checkpoints.directory

def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))

imported, start = memory("VmRSS"), time.perf_counter()
if which == "vlm":
    model, _ = vlm.load(folder)
else:
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder)
seconds = time.perf_counter() - start
check = sum(float(p.detach()[..., -1:].float().sum()) for p in model.parameters())  # read something of every tensor
print(json.dumps({"imported": imported, "peak": memory("VmHWM"), "seconds": seconds, "check": check}))
"""


def write(folder: Path, layers: int, dtype: str) -> int:
    """A directory of random weights; returns its weights' bytes."""
    import torch
    from safetensors.torch import save_file

    from vlm.build.presets import tiny
    from vlm.checkpoints.loader import empty
    from vlm.checkpoints.names import to_hub
    from vlm.checkpoints.source import expected_shapes
    from vlm.exchange.exporting import export
    from vlm.model.forward import VLM

    model, processor = tiny("siglip", "gemma")
    export(model, processor, folder, to="paligemma")  # configuration, tokenizer and processor of a small one
    (folder / "model.safetensors").unlink()
    config = model.config
    sizes = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": layers, "head_dim": 256}
    values = json.loads((folder / "config.json").read_text())
    values["text_config"] |= {**sizes, "num_attention_heads": 8, "num_key_value_heads": 1}
    values |= {"hidden_size": 2048, "projection_dim": 2048, "dtype": dtype}
    (folder / "config.json").write_text(json.dumps(values))
    for name, value in {**sizes, "num_attention_heads": 8, "num_key_value_heads": 1}.items():
        setattr(config.text_config, name, value)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in expected_shapes(empty(VLM, config)).items():
        group = name.split(".layers.")[1].split(".")[0] if "language_model.layers" in name else "rest"
        groups.setdefault(group, {})[to_hub(name)] = shape
    index, total = {}, 0
    generator = torch.Generator().manual_seed(0)
    for number, shapes in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors = {
            name: (torch.randn(shape, generator=generator) * 0.02).to(getattr(torch, dtype))
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, {"format": "pt"})
        total += sum(t.numel() * t.element_size() for t in tensors.values())
        index |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return total


def measure(which: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", CHILD, which, str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=9)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint (a temporary folder)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary) / "checkpoint"
        size = write(folder, options.layers, options.dtype)
        runs: dict[str, list[dict[str, float]]] = {"vlm": [], "transformers": []}
        for _ in range(options.repeats):
            for which, found in runs.items():
                found.append(measure(which, folder))
    result = {"bytes": size, "dtype": options.dtype, "layers": options.layers}
    print(f"{'':14}{'peak/size':>10}{'(peak-imported)/size':>22}{'seconds':>9}", file=sys.stderr)
    for which, found in runs.items():
        row = {
            "peak_over_size": statistics.median(run["peak"] / size for run in found),
            "load_over_size": statistics.median((run["peak"] - run["imported"]) / size for run in found),
            "seconds": statistics.median(run["seconds"] for run in found),
            "check": found[0]["check"],
        }
        result[which] = row
        shown = f"{row['peak_over_size']:>10.3f}{row['load_over_size']:>22.3f}{row['seconds']:>9.2f}"
        print(f"{which:14}{shown}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
