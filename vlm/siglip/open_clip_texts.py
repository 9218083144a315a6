"""Texts as open_clip reads them: the library's own tokenizers, which no setting of a checkpoint can turn into code.

A configuration says which tokenizer there is and how texts are cleaned (`text_cfg`): SigLIP's have a sentencepiece
tokenizer and `clean: canonicalize`, OpenAI's and LAION's the library's byte pairs in small letters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoints.checks import FOREIGN
from vlm.encoders.open_clip import library
from vlm.errors import CheckpointError, ConfigError
from vlm.siglip.processor import DualProcessor, Texts
from vlm.siglip.rules import RULES, TextRule

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt")
SETTINGS = ("clean", "strip_sep_token")
"""What `tokenizer_kwargs` may hold: the rest would go to the code that opens tokenizers, or draws words at random."""
CLEANING = {
    "canonicalize": ("lower", "dropped, `_` becomes a blank, blanks run together"),
    "lower": ("lower", "kept"),
    "whitespace": ("kept, as it is written", "kept"),
}
"""Case and punctuation by open_clip's `clean`."""
PROBE = "a photo of a cat"
CONTEXT = 77
"""Of the library, where a configuration does not say."""


@dataclass(frozen=True)
class Cutter:
    """One of the library's tokenizers.

    Attributes:
        made: open_clip's `HFTokenizer` or `SimpleTokenizer`.
        clean: how it cleans a text; taken out of `made`, so that a text is cleaned once.
    """

    made: Any
    clean: Callable[[str], str]

    @classmethod
    def of(cls, made: Any) -> Cutter:
        clean = made.clean_fn
        made.clean_fn = str
        return cls(made, clean)

    @property
    def inner(self) -> Any:
        """transformers' tokenizer, where it is one."""
        return getattr(self.made, "tokenizer", None)

    @property
    def eos_token_id(self) -> int | None:
        """What ends a text."""
        return self.made.eot_token_id if self.inner is None else self.inner.eos_token_id

    @property
    def bos_token_id(self) -> int | None:
        """What a text begins with, where it does."""
        return self.made.sot_token_id if self.inner is None else self.inner.bos_token_id

    @property
    def pad_token_id(self) -> int | None:
        """What fills a row."""
        return 0 if self.inner is None else self.inner.pad_token_id

    @property
    def name_or_path(self) -> str:
        """What it is, for people."""
        return type(self.made).__name__

    @property
    def all_special_ids(self) -> list[int]:
        """Of the tokens that are no text."""
        return list(self.made.all_special_ids if self.inner is None else self.inner.all_special_ids)

    @property
    def backend_tokenizer(self) -> Any:
        """What has the whole definition as `to_str()`."""
        return self if self.inner is None else self.inner.backend_tokenizer

    def to_str(self) -> str:
        """The library's byte pairs, in their order, as JSON."""
        return json.dumps({"merges": list(self.made.bpe_ranks), "special": self.all_special_ids})

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """The ids of one text that is cleaned already."""
        if self.inner is not None:
            found: list[int] = self.inner(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": found}
        ids = self.made.encode(text)
        return {"input_ids": [self.made.sot_token_id, *ids, self.made.eot_token_id] if add_special_tokens else ids}

    def spelt(self, number: int | None) -> str:
        """The token of an id."""
        if number is None:
            return "none"
        return str(self.made.decoder[number] if self.inner is None else self.inner.convert_ids_to_tokens(number))

    def rows(self, texts: Sequence[str], context: int) -> Tensor:
        """int64[N, context]: what open_clip itself gives for texts that are cleaned already."""
        if not texts:
            return torch.zeros(0, context, dtype=torch.int64)
        ids: Tensor = self.made(list(texts), context_length=context)
        return ids

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it; open_clip's own byte pairs are part of the library and have no files."""
        if self.inner is not None:
            self.inner.save_pretrained(folder)


class OpenClipProcessor(DualProcessor):
    """What stands before an open_clip model's towers."""

    def texts(self, texts: Sequence[str]) -> Texts:
        """Texts as the library gives them to the text tower, each padded or cut to the whole context.

        Raises:
            ConfigError: the checkpoint has no tokenizer.
        """
        if self.tokenizer is None:
            raise ConfigError(
                "this checkpoint has no tokenizer, so it can read images only; load it with tokenizer=..."
            )
        cleaned = [self.rule.clean(text) for text in texts]
        lengths = [len(self.tokenizer(text)["input_ids"]) for text in cleaned]
        cut = tuple(number for number, count in enumerate(lengths) if count > self.context)
        rows = self.tokenizer.rows(cleaned, self.context)
        if self.vocabulary is not None and rows.numel() and int(rows.max()) >= self.vocabulary:
            raise ConfigError(
                f"the tokenizer gives token {int(rows.max())}, the text tower has {self.vocabulary}: it is not this"
                f" checkpoint's; pass the tokenizer of the checkpoint"
            )
        return Texts(rows, cut)


def open_cutter(folder: Path, text_cfg: dict[str, Any], given: Any = None) -> Cutter | None:
    """The tokenizer that open_clip takes for a configuration; None where the folder lacks its files.

    Args:
        folder: the checkpoint's.
        text_cfg: of its configuration.
        given: a folder with a tokenizer, in place of the checkpoint's.

    Raises:
        CheckpointError: it cannot be opened.
        ConfigError: a setting that is not read here.
    """
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    for key, value in settings.items():
        if key not in SETTINGS or not isinstance(value, str | bool):
            raise ConfigError(f"text_cfg.tokenizer_kwargs.{key} is {value!r}; read here: {', '.join(SETTINGS)}")
    settings["clean"] = _cleaning(text_cfg)
    settings["context_length"] = int(text_cfg.get("context_length", CONTEXT))
    tokenizers = library().tokenizer
    if not text_cfg.get("hf_tokenizer_name") and given is None:
        settings.pop("strip_sep_token", None)
        return Cutter.of(tokenizers.SimpleTokenizer(**settings))
    if given is not None and not isinstance(given, str | Path):
        raise ConfigError(f"tokenizer is a {type(given).__name__}; for an open_clip checkpoint give a folder")
    source = folder if given is None else Path(given)
    if not any((source / name).exists() for name in FILES):
        return None
    if text_cfg.get("tokenizer_mode"):
        settings["tokenizer_mode"] = text_cfg["tokenizer_mode"]
    try:
        made = tokenizers.HFTokenizer(str(source), local_files_only=True, trust_remote_code=False, **settings)
        made(PROBE)  # settings of a wrong type show only in use
    except FOREIGN as error:
        shown = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source}: the tokenizer cannot be opened ({shown}); copy its files again") from error
    return Cutter.of(made)


def _cleaning(text_cfg: dict[str, Any]) -> str:
    """How texts are cleaned: as it is stated, or the library's own choice for the kind of tokenizer.

    Raises:
        ConfigError: a word that the library does not know.
    """
    own = "whitespace" if text_cfg.get("hf_tokenizer_name") else "lower"
    clean = (text_cfg.get("tokenizer_kwargs") or {}).get("clean", own)
    if clean not in CLEANING:
        raise ConfigError(f"open_clip's clean is {clean!r}, known: {', '.join(CLEANING)}")
    return str(clean)


def rule_of(cutter: Cutter | None, text_cfg: dict[str, Any], *, sigmoid: bool) -> TextRule:
    """The family's rule as this configuration has it."""
    rule = RULES["open_clip_siglip" if sigmoid else "open_clip"]
    case, punctuation = CLEANING[_cleaning(text_cfg)]
    changes: dict[str, Any] = {"case": case, "punctuation": punctuation}
    changes["attention"] = "both" if text_cfg.get("no_causal_mask") else "causal"
    if cutter is not None:
        begins = cutter(PROBE)["input_ids"][:1] == [cutter.bos_token_id]
        changes |= {"clean": cutter.clean, "bos": cutter.spelt(cutter.bos_token_id) if begins else None}
        changes |= {"eos": cutter.spelt(cutter.eos_token_id), "pad": cutter.spelt(cutter.pad_token_id)}
    return replace(rule, **changes)


def check_rows(cutter: Cutter, rule: TextRule, text_cfg: dict[str, Any], origin: str) -> None:
    """Refuse a tokenizer that contradicts its family: the library would use it as it is, and every embedding would be
    another one.

    Raises:
        CheckpointError: says what it does and what it should do.
    """
    context = int(text_cfg.get("context_length", CONTEXT))
    row = cutter.rows([rule.clean(PROBE)], context)[0].tolist()
    words = cutter(rule.clean(PROBE), add_special_tokens=False)["input_ids"][: context - 1]
    end, pad = cutter.eos_token_id, cutter.pad_token_id
    if rule.family == "open_clip_siglip":
        wanted = [*words, end] + [pad] * (context - 1 - len(words))
        if row != wanted:
            raise CheckpointError(
                f"{origin}: the tokenizer gives {row[:12]}... for {PROBE!r}, SigLIP was trained with {wanted[:12]}...:"
                f" no begin token, the text, the end token {end}, then {pad} on the right to {context}; take the"
                f" tokenizer files of timm/{'ViT-B-16-SigLIP' if pad == end else 'ViT-B-16-SigLIP2-256'}"
            )
    elif text_cfg.get("pool_type") == "eos" and text_cfg.get("eos_id", 2) not in row:
        raise CheckpointError(
            f"{origin}: the text tower reads the position of id {text_cfg.get('eos_id', 2)}, which the tokenizer never"
            f" gives ({row[:12]}...); take the tokenizer files that belong to the weights"
        )
