"""From embeddings to probabilities: length, scale, bias, and which function."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, logsigmoid

from vlm.check.dual_subject import TEXTS, DualSubject
from vlm.check.report import Finding
from vlm.check.subject import Check

SOFTMAX = ("clip", "open_clip")
"""Families that choose one text among several; the others ask of each pair by itself, and have a bias."""
RELATIVE = 1e-3
"""Largest relative error of numbers that are computed twice; half precision is compared at 20 times as much."""


@torch.no_grad()
def normalisation(subject: DualSubject) -> Finding:
    """The length of embeddings as the towers give them, and logits of embeddings that were made longer or shorter."""
    model = subject.model
    image, text = model.encode_image(**subject.pixels()), model.encode_text(subject.ids(TEXTS))
    lengths = torch.cat([image.float().norm(dim=-1), text.float().norm(dim=-1)])
    logits, scaled = (model.logits(one, two).float() for one, two in ((image, text), (3 * image, text / 4)))
    off = float((lengths - 1).abs().max())
    moved = float((logits - scaled).abs().max() / logits.abs().max())
    detail = f"embeddings have lengths in [{float(lengths.min()):.4g}, {float(lengths.max()):.4g}]"
    problem = ""
    if not moved <= _limit(subject):
        problem = f"logits move by {moved:.1e} of their size when embeddings are made longer: normalise both first"
    return Finding(measured=max(off, moved), limit=_limit(subject), detail=detail, problem=problem)


@torch.no_grad()
def bias(subject: DualSubject) -> Finding:
    """Logits against scale times cosine plus bias, of the parameters as they lie in the model."""
    scale, shift = (_parameter(subject, name) for name in ("logit_scale", "logit_bias"))
    if scale is None:
        return Finding(problem="the model has no logit_scale; open the checkpoint again")
    image, text = subject.image(subject.pixels()), subject.text(subject.ids(TEXTS))
    cosine = image @ text.T
    wanted = cosine * math.exp(scale) + (shift or 0.0)
    got = subject.model.logits(image.to(subject.model.device), text.to(subject.model.device)).float().cpu()
    error = float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
    stated = f"scale {math.exp(scale):.4g}, bias {'none' if shift is None else f'{shift:.4g}'}"
    detail = f"relative error of logits against scale x cosine + bias ({stated})"
    problem = _without(subject, float(cosine.max()), scale, shift)
    return Finding(measured=error, limit=_limit(subject), detail=detail, problem=problem)


def _without(subject: DualSubject, cosine: float, scale: float, shift: float | None) -> str:
    """What is wrong with the parameters themselves."""
    if _softmax(subject):
        return "" if shift is None else f"a softmax ignores a bias, and this model has one ({shift:.4g})"
    if shift is None:
        return "a sigmoid needs the learned bias, and this model has none; open the checkpoint again"
    if scale == shift == 0:
        return "scale and bias are both 0: transformers' random start, not a trained model; train from log 10 and -10"
    return ""


@torch.no_grad()
def probabilities(subject: DualSubject) -> Finding:
    """Probabilities against the family's function, over logits of ordinary size."""
    logits = torch.tensor([[-3.0, 0.5, 2.0], [1.0, 1.0, -8.0]])
    softmax = _softmax(subject)
    wanted = logits.softmax(-1) if softmax else logits.sigmoid()
    got = subject.model.probabilities(logits.to(subject.model.device)).float().cpu()
    name = "softmax over the texts" if softmax else "sigmoid of each pair"
    error = float((got - wanted).abs().max())
    problem = "" if error <= RELATIVE else f"probabilities of {subject.processor.rule.title} are the {name}"
    return Finding(measured=error, limit=RELATIVE, detail=f"error of probabilities against the {name}", problem=problem)


@torch.no_grad()
def loss(subject: DualSubject) -> Finding:
    """The loss against its formula, computed here in float64."""
    model = subject.model
    image, text = subject.image(subject.pixels()), subject.text(subject.ids(TEXTS))
    got = float(model.loss(image.to(model.device), text.to(model.device)))
    logits = model.logits(image.to(model.device), text.to(model.device)).double().cpu()
    wanted, name = _softmax_loss(logits) if _softmax(subject) else _sigmoid_loss(logits)
    error = abs(got - wanted) / max(1.0, abs(wanted))
    return Finding(
        measured=error, limit=_limit(subject), detail=f"relative error of the loss against {name}: {wanted:.4g}"
    )


def _sigmoid_loss(logits: Tensor) -> tuple[float, str]:
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return float(-logsigmoid(signs * logits).sum() / len(logits)), "the sum over pairs, mean over images"


def _softmax_loss(logits: Tensor) -> tuple[float, str]:
    both = [-log_softmax(table, -1).diagonal().mean() for table in (logits, logits.T)]
    return float(sum(both) / 2), "the mean of both directions' cross-entropy"


def _softmax(subject: DualSubject) -> bool:
    return subject.processor.rule.family in SOFTMAX


def _limit(subject: DualSubject) -> float:
    return RELATIVE if subject.model.dtype == torch.float32 else 20 * RELATIVE


def _parameter(subject: DualSubject, name: str) -> float | None:
    """The number of this name in the model, wherever it lies; None where there is none."""
    found = [weight for key, weight in subject.model.named_parameters() if key.split(".")[-1] == name]
    return float(found[0].float().reshape(())) if found else None


CHECKS = (
    Check("normalisation", "embeddings have length 1, and logits depend on their direction alone", normalisation, 50),
    Check("bias", "logits are scale x cosine + bias", bias, 60),
    Check("probabilities", "probabilities are those of the family: sigmoid, or softmax over texts", probabilities, 70),
    Check("loss", "the loss is that of the family", loss, 80),
)
