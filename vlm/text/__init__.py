"""Tokens: tokenizers, the prompt format, `<loc>` text, control spellings."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("EncodedText", "PromptEncoder"), "prompts"),
    **dict.fromkeys(("CONTROL_NAMES", "LOC_TOKENS", "SEG_TOKENS"), "tokens"),
    **dict.fromkeys(
        ("MAX_CHARACTERS", "Tokenizer", "add_image_tokens", "from_sentencepiece", "image_token_id"), "tokenizer"
    ),
    **dict.fromkeys(("BINS", "NUM_CODES", "Box", "Move", "box_to_loc", "loc_to_box", "tokens_to_box"), "locations"),
    **dict.fromkeys(("first_segment", "problems"), "locations"),
    **dict.fromkeys(("control", "locations", "prompts", "tokenizer", "tokens"), ""),
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.text import control as control
    from vlm.text import locations as locations
    from vlm.text import prompts as prompts
    from vlm.text import tokenizer as tokenizer
    from vlm.text import tokens as tokens
    from vlm.text.locations import BINS as BINS
    from vlm.text.locations import NUM_CODES as NUM_CODES
    from vlm.text.locations import Box as Box
    from vlm.text.locations import Move as Move
    from vlm.text.locations import box_to_loc as box_to_loc
    from vlm.text.locations import first_segment as first_segment
    from vlm.text.locations import loc_to_box as loc_to_box
    from vlm.text.locations import problems as problems
    from vlm.text.locations import tokens_to_box as tokens_to_box
    from vlm.text.prompts import EncodedText as EncodedText
    from vlm.text.prompts import PromptEncoder as PromptEncoder
    from vlm.text.tokenizer import MAX_CHARACTERS as MAX_CHARACTERS
    from vlm.text.tokenizer import Tokenizer as Tokenizer
    from vlm.text.tokenizer import add_image_tokens as add_image_tokens
    from vlm.text.tokenizer import from_sentencepiece as from_sentencepiece
    from vlm.text.tokenizer import image_token_id as image_token_id
    from vlm.text.tokens import CONTROL_NAMES as CONTROL_NAMES
    from vlm.text.tokens import LOC_TOKENS as LOC_TOKENS
    from vlm.text.tokens import SEG_TOKENS as SEG_TOKENS

__getattr__, __dir__ = door(__name__, _HOMES)
