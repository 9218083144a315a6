"""How each family of two-tower models reads text: the one table that code, documentation and `vlm info` share."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

_PUNCTUATION = str.maketrans({"_": " "} | {mark: None for mark in string.punctuation if mark != "_"})


def canonicalize(text: str) -> str:
    """A text as SigLIP v1 and SigLIP's zero-shot evaluation read it: "Golden_Retriever." -> "golden retriever".

    An underscore is a blank, other ASCII punctuation is dropped, letters are lower-cased, blanks run together. Source:
    big_vision `evaluators/proj/image_text/prompt_engineering.py`. (transformers' SiglipTokenizer drops underscores too:
    "a_b" is "ab" there.)
    """
    return " ".join(text.translate(_PUNCTUATION).lower().split())


@dataclass(frozen=True, kw_only=True)
class TextRule:
    """How a family's texts become token ids.

    Attributes:
        family: its key in `RULES`.
        title: its name for people.
        clean: what is done to a text before it is cut into tokens.
        case, punctuation: that, in words.
        bos: the beginning-of-sequence token that is put before the text, if there is one.
        eos: the token after it, as the released vocabulary spells it.
        pad: the token that fills the row up to the context; the same as `eos` where that is repeated.
        side: where the padding stands.
        mask: whether the text tower is given an attention mask.
        attention: a position sees those on both sides of it, padding too, or those before it (`causal`).
        pooled: which position becomes the embedding.
        context: how many positions, in words; the number is read from each checkpoint's position table.
        differs: where other libraries read texts in another way.
        source: where the rule is written down.
    """

    family: str
    title: str
    clean: Callable[[str], str]
    case: str
    punctuation: str
    bos: str | None = None
    eos: str
    pad: str
    side: Literal["right"] = "right"
    mask: Literal["never"] = "never"
    attention: Literal["both", "causal"] = "both"
    pooled: str
    context: str
    differs: str
    source: str

    @property
    def tokens(self) -> str:
        """The row of a text, in words."""
        start = f"`{self.bos}`, text" if self.bos else "text"
        fill = "that again" if self.pad == self.eos else f"`{self.pad}`"
        return f"{start}, `{self.eos}`, then {fill} on the {self.side}"


_LAST = "the last position, whatever stands there; no EOS search, no attention pooling"
_FIRST_END = "the first end token; what stands after it is never seen"
RULES: dict[str, TextRule] = {
    rule.family: rule
    for rule in (
        TextRule(
            family="siglip",
            title="SigLIP",
            clean=canonicalize,
            case="lower",
            punctuation="dropped, `_` becomes a blank, blanks run together",
            eos="</s>",
            pad="</s>",
            pooled=_LAST,
            context="64; 16 in so400m-patch14-224",
            differs="transformers drops `_` without a blank (`a_b` is `ab`)",
            source="big_vision `pp/ops_text.py` (`tokenize`, eos sticky, pad_value 1) and `prompt_engineering.py`",
        ),
        TextRule(
            family="siglip2",
            title="SigLIP 2, FixRes and NaFlex",
            clean=str.lower,
            case="lower",
            punctuation="kept",
            eos="<eos>",
            pad="<pad>",
            pooled=_LAST,
            context="64",
            differs=(
                "transformers' FixRes directories name a plain Gemma tokenizer, which does not lower-case; open_clip"
                " drops punctuation; big_vision's own lower-casing is of ASCII letters only"
            ),
            source='arXiv 2502.14786, section 2.1; big_vision `SigLIP2_demo.ipynb` (`lower|tok(length=64, bos="no",'
            ' eos="sticky")`)',
        ),
        TextRule(
            family="clip",
            title="CLIP",
            clean=str,
            case="lower",
            punctuation="kept, blanks run together (both done by the tokenizer)",
            bos="<|startoftext|>",
            eos="<|endoftext|>",
            pad="<|endoftext|>",
            attention="causal",
            pooled=_FIRST_END,
            context="77",
            differs=(
                "OpenAI's own tokenizer also mends broken Unicode (ftfy) and reads HTML entities; it pads with 0, which"
                " no position before it can see, and takes `<|endoftext|>` typed by a user for the end"
            ),
            source="openai/CLIP `clip/simple_tokenizer.py`, `clip/model.py`; transformers `CLIPTokenizer`, `CLIPModel`",
        ),
        TextRule(
            family="open_clip",
            title="open_clip",
            clean=str,
            case="lower",
            punctuation="kept; broken Unicode is mended (ftfy), HTML entities are read, blanks run together",
            bos="<start_of_text>",
            eos="<end_of_text>",
            pad="!",
            attention="causal",
            pooled=_FIRST_END,
            context="77; as `text_cfg` says",
            differs=(
                "each `open_clip_config.json` states its tokenizer, how texts are cleaned (`clean`) and which position"
                " is read (`pool_type`); what a checkpoint states replaces this row"
            ),
            source="open_clip `tokenizer.py` (`SimpleTokenizer`, `HFTokenizer`), `transformer.py` (`text_global_pool`)",
        ),
        TextRule(
            family="open_clip_siglip",
            title="open_clip with a bias: SigLIP and SigLIP 2",
            clean=canonicalize,
            case="lower",
            punctuation="dropped, `_` becomes a blank, blanks run together; before that ftfy and HTML entities",
            eos="</s>",
            pad="</s>",
            pooled=_LAST,
            context="64; as `text_cfg` says",
            differs=(
                "SigLIP 2 was trained with punctuation, which this drops; most image towers and the text towers of v1"
                " run an exact GELU where the original runs the tanh approximation; images are resized bicubic"
            ),
            source="open_clip `model_configs/*SigLIP*.json` (`clean: canonicalize`, `pool_type: last`), `tokenizer.py`",
        ),
    )
}
"""By family. A checkpoint's own length is read from its position table."""


def table() -> str:
    """The rules as a table in Markdown, one family a row: `docs/siglip.md` shows it."""
    heads = ("family", "case", "punctuation", "tokens", "context", "mask", "embedding", "elsewhere", "source")
    rows = [
        (f"{r.title} (`{r.family}`)", r.case, r.punctuation, r.tokens, r.context, r.mask, r.pooled, r.differs, r.source)
        for r in RULES.values()
    ]
    cells = [heads, ("---",) * len(heads), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
