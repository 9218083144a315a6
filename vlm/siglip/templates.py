"""Texts that a class name is put into before a text tower reads it, by name.

    none        the name as it is written; what the authors' demo does
    imagenet    the 81 of SigLIP's published ImageNet figures (big_vision's `clip_paper`): the 80 of CLIP's paper and
                the bare name. Names and templates are canonicalised (`vlm.siglip.rules.canonicalize`), as there
    openai      CLIP's own 80, names and punctuation as they are: for CLIP's published figures
    best        the 7 that CLIP's authors found to do as well, and the bare name (big_vision's `clip_best`)
    photo       what transformers' zero-shot pipeline writes where nothing else is asked for

Sources: openai/CLIP `notebooks/Prompt_Engineering_for_ImageNet.ipynb` (the 80, and the 7 in the order they were found
in); big_vision `evaluators/proj/image_text/prompt_engineering_constants.py` (the same 80 in the same order, then `{}`)
and `prompt_engineering.py` (canonicalised); transformers `pipelines/zero_shot_image_classification.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.errors import ConfigError, nearest
from vlm.siglip.rules import canonicalize

OPENAI = tuple(
    """\
a bad photo of a {}.
a photo of many {}.
a sculpture of a {}.
a photo of the hard to see {}.
a low resolution photo of the {}.
a rendering of a {}.
graffiti of a {}.
a bad photo of the {}.
a cropped photo of the {}.
a tattoo of a {}.
the embroidered {}.
a photo of a hard to see {}.
a bright photo of a {}.
a photo of a clean {}.
a photo of a dirty {}.
a dark photo of the {}.
a drawing of a {}.
a photo of my {}.
the plastic {}.
a photo of the cool {}.
a close-up photo of a {}.
a black and white photo of the {}.
a painting of the {}.
a painting of a {}.
a pixelated photo of the {}.
a sculpture of the {}.
a bright photo of the {}.
a cropped photo of a {}.
a plastic {}.
a photo of the dirty {}.
a jpeg corrupted photo of a {}.
a blurry photo of the {}.
a photo of the {}.
a good photo of the {}.
a rendering of the {}.
a {} in a video game.
a photo of one {}.
a doodle of a {}.
a close-up photo of the {}.
a photo of a {}.
the origami {}.
the {} in a video game.
a sketch of a {}.
a doodle of the {}.
a origami {}.
a low resolution photo of a {}.
the toy {}.
a rendition of the {}.
a photo of the clean {}.
a photo of a large {}.
a rendition of a {}.
a photo of a nice {}.
a photo of a weird {}.
a blurry photo of a {}.
a cartoon {}.
art of a {}.
a sketch of the {}.
a embroidered {}.
a pixelated photo of a {}.
itap of the {}.
a jpeg corrupted photo of the {}.
a good photo of a {}.
a plushie {}.
a photo of the nice {}.
a photo of the small {}.
a photo of the weird {}.
the cartoon {}.
art of the {}.
a drawing of the {}.
a photo of the large {}.
a black and white photo of a {}.
the plushie {}.
a dark photo of a {}.
itap of a {}.
graffiti of the {}.
a toy {}.
itap of my {}.
a photo of a cool {}.
a photo of a small {}.
a tattoo of the {}.""".split("\n")
)
"""In the order of the notebook, its grammar kept ("a origami", "a embroidered")."""
BEST = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


@dataclass(frozen=True)
class Templates:
    """How class names become texts.

    Attributes:
        name: a key of `TEMPLATES`, or `given`.
        texts: each with one `{}`.
        canonical: name and template are canonicalised (lower case, no ASCII punctuation) before the family's own rule.
    """

    name: str
    texts: tuple[str, ...]
    canonical: bool = False


TEMPLATES: dict[str, Templates] = {
    one.name: one
    for one in (
        Templates("none", ("{}",)),
        Templates("imagenet", (*OPENAI, "{}"), canonical=True),
        Templates("openai", OPENAI),
        Templates("best", (*BEST, "{}"), canonical=True),
        Templates("photo", ("This is a photo of {}.",)),
    )
}


def named(name: str) -> Templates:
    """The templates of a name. Raises `ConfigError` that lists the known ones."""
    if name not in TEMPLATES:
        raise ConfigError(f"unknown templates {name!r}{nearest(name, TEMPLATES)}; known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def given(texts: Sequence[str]) -> Templates:
    """Templates of one's own; `{label}` is another spelling of `{}`.

    Raises:
        ConfigError: a text without the place of the class, or with several.
    """
    made = tuple(text.replace("{label}", "{}") for text in texts)
    bad = [text for text, one in zip(texts, made, strict=True) if one.count("{}") != 1]
    if bad or not made:
        raise ConfigError(f"a template needs the place of the class, {{}}, exactly once; got {bad or list(texts)}")
    return Templates("given", made)


def prompts(names: Sequence[str], templates: Templates) -> list[tuple[str, ...]]:
    """The texts of each class; the mean of their embeddings stands for it."""
    clean = canonicalize if templates.canonical else str
    return [tuple(clean(text.replace("{}", name)) for text in templates.texts) for name in names]
