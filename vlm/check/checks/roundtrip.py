"""Out and in again: the model's own directory, and PaliGemma's format where it can express the model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from vlm.check.report import Finding, not_applicable
from vlm.check.subject import Check, Disk, Subject, attention_backends, moved, text_length, text_logits
from vlm.decoders.contract import Facts
from vlm.errors import ConfigError
from vlm.model import decoder
from vlm.model.forward import VLM
from vlm.model.processor import Processor


def saved(subject: Subject) -> Finding:
    """`vlm.save` and `vlm.load`: every tensor, the logits and the processor."""
    missing = _no_room(subject)
    if missing or subject.disk is None:
        return not_applicable(missing)
    with _folder() as folder:
        subject.disk.save(subject.model, subject.processor, folder / "model")
        return _compare(subject, folder / "model", "vlm.save and vlm.load")


def exported(subject: Subject) -> Finding:
    """`vlm export --to paligemma`, its own parity report, and the export opened by `vlm.load`."""
    missing = _no_room(subject)
    if missing or subject.disk is None:
        return not_applicable(missing)
    with _folder() as folder:
        try:
            report = subject.disk.export(subject.model, subject.processor, folder / "model", to="paligemma")
        except ConfigError as error:
            return not_applicable(str(error))
        if not report.ok:
            return Finding(problem="the export's parity report has a mismatch; run `vlm export` to see it")
        return _compare(subject, folder / "model", "export and vlm.load; parity report ok")


def _compare(subject: Subject, path: Path, what: str) -> Finding:
    """The model in memory against the one on the disk: tensors that differ, and what the logits differ by."""
    model = subject.model
    assert subject.disk is not None
    other, processor = _load_like(subject.disk, model, path)
    own, theirs = model.state_dict(), other.state_dict()
    names = sorted(set(own) | set(theirs))
    differ = [name for name in names if name not in own or name not in theirs or not _equal(own[name], theirs[name])]
    tensors = subject.batch()
    length = text_length(model, tensors)
    move = float(moved(text_logits(model, tensors, length), text_logits(other, tensors, length)).max())
    problems = [f"{len(differ)} of {len(names)} tensors differ: {', '.join(differ[:3])}"] if differ else []
    if move and not differ:
        problems.append(_why(model, other))
    if not _same_processor(subject.processor, processor):
        problems.append("the processor came back changed (tokenizer or image transform)")
    detail = f"largest difference of a logit after {what}; {len(names) - len(differ)} of {len(names)} tensors bit-equal"
    return Finding(measured=move, limit=0, detail=detail, problem="; ".join(problems))


def _why(model: VLM, other: VLM) -> str:
    """What can make equal weights give other logits."""
    own, theirs = (decoder.facts(net.config.text_config) for net in (model, other))
    if own.windowed != theirs.windowed:
        return (
            f"the weights are equal, but the decoder's layers are {_kinds(own)} here (window {own.window}),"
            f" {_kinds(theirs)} after loading: PaliGemma 2 is opened without a window, as Google's code has it"
        )
    return (
        "the weights are equal: something that is not saved differs, such as rotary frequencies that model.to(dtype)"
        " has rounded (open the model with vlm.load(path, dtype=...) instead)"
    )


def _kinds(facts: Facts) -> str:
    return " and ".join(dict.fromkeys(facts.layer_types))


def _load_like(disk: Disk, model: VLM, path: Path) -> tuple[VLM, Processor]:
    """Open a directory with the dtype, device and attention backends of `model`."""
    other, processor = disk.load(path, dtype=model.dtype, device=model.device, force_fp16=model.dtype == torch.float16)
    backends = attention_backends(model)
    if attention_backends(other) != backends:
        other.set_attn_implementation(backends)
    return other, processor


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(one, two)


def _same_processor(one: Processor, two: Processor) -> bool:
    tokenizers = one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    return tokenizers and one.image_transform == two.image_transform


def _no_room(subject: Subject) -> str:
    """Why the model cannot be written to the temporary folder, or ""."""
    if subject.disk is None:
        return "nothing to write it with was given"
    needed = sum(tensor.numel() * tensor.element_size() for tensor in subject.model.state_dict().values())
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if any(tensor.device.type == "meta" for tensor in subject.model.parameters()):
        return "part of the model is offloaded to the disk; open it whole to check this"
    if needed < 0.9 * room:
        return ""
    return (
        f"the copy needs {needed / 1e9:.1f} GB, {tempfile.gettempdir()} has {room / 1e9:.1f} GB free; set TMPDIR to a"
        " folder with more"
    )


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vlm-check-") as name:
        yield Path(name)


CHECKS = (
    Check("round-trip", "saved and loaded, the model is the same bit for bit", saved, 190),
    Check("export", "exported to PaliGemma's format and loaded, the model is the same", exported, 200),
)
