"""The model card of an export: what it is, how it was made, how to open it, and the parity figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from vlm.exchange.hub_files import preprocessor_values
from vlm.exchange.parity import ParityReport
from vlm.exchange.towers import parts
from vlm.files import write_text
from vlm.model.decoder import facts as decoder_facts
from vlm.model.decoder import spec as decoder_spec
from vlm.model.forward import VLM
from vlm.model.parts import encoder_spec
from vlm.model.processor import Processor

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
PROVENANCE = "training.json"
"""Written beside a trained model by `vlm train`."""
PALIGEMMA_USE = """\
## Use

With transformers (`pip install "transformers>=5.17" torch Pillow`):

```python
import torch
from PIL import Image
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

path = "{path}"
model = PaliGemmaForConditionalGeneration.from_pretrained(path).eval()
processor = AutoProcessor.from_pretrained(path, backend="pil")
image = Image.open("photo.jpg").convert("RGB")
inputs = processor(images=image, text="<image>caption en", return_tensors="pt")
inputs.pop("labels", None)
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Pass everything the processor returns: without `token_type_ids` transformers does not know the prefix from the answer.
{attention}
With vlm: `vlm caption photo.jpg --model {path}`, or in Python `model, processor = vlm.load("{path}")`.

## Prompt format

`<image>` x {tokens}, `<bos>`, prompt, newline; the model writes the answer and `<eos>`. Image, prompt and newline see
each other in both directions, the answer sees what came before. The processors above write all but the prompt. Use the
prompts the model was trained on; PaliGemma's are such as

- `caption en`
- `answer en what is on the table?`
- `detect cat ; dog` (boxes as four `<loc>` tokens: top, left, bottom, right, in 1024 steps of the side)
"""
TOWER_USE = """\
## Use

With transformers (`pip install "transformers>=5.17" torch Pillow`):

```python
import torch
from PIL import Image
from transformers import {processor}, {architecture}

path = "{path}"
tower = {architecture}.from_pretrained(path).eval()
processor = {processor}.from_pretrained(path)
inputs = processor(images=[Image.open("photo.jpg").convert("RGB")], return_tensors="pt")
with torch.inference_mode():
    features = tower(**inputs).last_hidden_state  # one row per patch{padding}
```
"""
NEW_MODEL = """\
As the tower of a new model: `vlm.new(encoder="{path}", projector="linear", decoder=...)`.
"""


def write(folder: Path, model: VLM, processor: Processor, report: ParityReport, origin: str) -> None:
    """Write `README.md`.

    Args:
        origin: directory or hub id that the model was opened from; may be empty.
    """
    provenance = _provenance(origin)
    front = yaml.safe_dump(front_matter(model, report, origin, provenance), sort_keys=False)
    title = Path(report.out).name
    sections = [
        f"---\n{front}---\n",
        f"# {title}\n",
        _what(model, processor, report),
        _training(provenance),
        _use(model, processor, report, title),
        _parity(report),
    ]
    write_text(folder / "README.md", "\n".join(part for part in sections if part))


def front_matter(model: VLM, report: ParityReport, origin: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """The fields that the Hub reads."""
    is_tower = report.to == "tower"
    values: dict[str, Any] = {
        "library_name": _library(model) if is_tower else "transformers",
        "pipeline_tag": "image-feature-extraction" if is_tower else "image-text-to-text",
        "tags": ["vlm", model.config.encoder if is_tower else "paligemma"],
    }
    bases = _base_models(origin, provenance)
    if bases:
        values["base_model"] = bases if len(bases) > 1 else bases[0]
    return values


def _library(model: VLM) -> str:
    """The Hub's name of the library that opens the tower."""
    return encoder_spec(model.config.encoder).library_name


def _base_models(origin: str, provenance: dict[str, Any]) -> list[str]:
    """Hub ids among the things the model was made from; local paths are nobody else's."""
    made_from = provenance.get("config", {}).get("model", {})
    named = [origin, *(made_from.get(key) for key in ("path", "encoder", "decoder"))]
    # A part is also given as its configuration (keys and values), and several towers as a list.
    flat = [one for item in named for one in (item if isinstance(item, list) else [item]) if isinstance(one, str)]
    return [name for name in dict.fromkeys(flat) if HUB_ID.fullmatch(name) and not Path(name).exists()]


def _provenance(origin: str) -> dict[str, Any]:
    """What `vlm train` wrote beside the model, if it did."""
    file = Path(origin) / PROVENANCE
    if not origin or not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _what(model: VLM, processor: Processor, report: ParityReport) -> str:
    vision, text = model.config.vision_config, model.config.text_config
    numbers = sum(parameter.numel() for parameter in model.model.vision_tower.parameters())
    spec = encoder_spec(model.config.encoder)
    members = spec.members(vision)
    tower = (
        f"a {spec.title} vision tower ({vision.num_hidden_layers} layers, width"
        f" {vision.hidden_size}, patches of {vision.patch_size} px)"
        if not members
        else f"several vision towers side by side ({', '.join(kind for kind, _ in members)})"
    )
    images = f"Images: {processor.image_transform.describe()}."
    written = f"Written by vlm in {report.dtype}."
    if report.to == "tower":
        return f"The vision tower of a vision-language model: {tower}, {numbers:,} parameters. {images} {written}\n"
    numbers = sum(parameter.numel() for parameter in model.parameters())
    decoder = f"a {decoder_spec(text).title} decoder ({text.num_hidden_layers} layers, width {text.hidden_size})"
    return (
        f"A vision-language model in PaliGemma's architecture and layout: {tower}, a linear projector and {decoder},"
        f" {numbers:,} parameters. {images} {written}\n\n"
        f"The licences and terms of the weights and data it was made from apply.\n"
    )


def _training(provenance: dict[str, Any]) -> str:
    """The last run's stages; file names and paths of the machine are left out."""
    stages = provenance.get("config", {}).get("stages", [])
    lines = []
    for stage in stages:
        length = f"{stage['steps']} steps" if stage.get("steps") else f"{stage.get('epochs')} epochs"
        rates = ", ".join(f"{part} at {rate:g}" for part, rate in stage.get("train", {}).items())
        lines.append(f"- `{stage.get('name')}`: {length} of {stage.get('batch_size')} examples; trained: {rates}")
    if not lines:
        return ""
    examples = provenance.get("examples")
    seen = f" on {examples:,} examples" if isinstance(examples, int) else ""
    return "\n".join([f"## Training\n\nTrained by `vlm train`{seen}:\n", *lines, ""])


def _use(model: VLM, processor: Processor, report: ParityReport, title: str) -> str:
    if report.to == "tower":
        return _tower_use(model, processor, title)
    attention = ""
    if decoder_facts(model.config.text_config).attention_softcap is not None:
        attention = 'On transformers 5.17 pass `attn_implementation="eager"`: its sdpa drops the attention soft-cap.\n'
    return PALIGEMMA_USE.format(path=title, tokens=processor.image_transform.max_patches, attention=attention)


def _tower_use(model: VLM, processor: Processor, title: str) -> str:
    """How to open a tower: with transformers where that is its library, and as part of a new model."""
    towers = parts(model, processor)
    if len(towers) > 1:
        path = "+".join(f"{title}/{one.name}" for one in towers)
        config = model.config.vision_config
        grid = f", fuse={{'grid': {config.grid}, 'resample': '{config.resample}'}}" if config.resample else ""
        fused = NEW_MODEL.format(path=path).replace(", decoder=...", f", decoder=...{grid}")
        return f"## Use\n\nEach tower is in a directory of its own.\n{fused}"
    published = towers[0].published
    if not published.transformers:
        return "## Use\n\n" + NEW_MODEL.format(path=title)
    kind = str(preprocessor_values(processor.image_transform)["image_processor_type"])
    use = TOWER_USE.format(
        path=title,
        architecture=published.architecture,
        processor=f"{kind}Pil",
        padding=", padding rows included" if encoder_spec(model.config.encoder).any_aspect else "",
    )
    return f"{use}\n{NEW_MODEL.format(path=title)}"


def _parity(report: ParityReport) -> str:
    opened = f"opened by {report.reader} and compared with the model it was written from" if report.reader else ""
    return f"## Parity\n\nAfter writing, this directory was {opened or 'not run'}:\n\n```\n{report.table()}\n```\n"
