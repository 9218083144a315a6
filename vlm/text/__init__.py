"""Tokens: tokenizers, the prompt format, `<loc>` text, control spellings."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "PromptEncoder": "prompts",
    "control": "",
    "locations": "",
    "prompts": "",
    "tokenizer": "",
    "tokens": "",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.text import control as control
    from vlm.text import locations as locations
    from vlm.text import prompts as prompts
    from vlm.text import tokenizer as tokenizer
    from vlm.text import tokens as tokens
    from vlm.text.prompts import PromptEncoder as PromptEncoder

__getattr__, __dir__ = door(__name__, _HOMES)
