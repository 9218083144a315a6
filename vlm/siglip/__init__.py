"""SigLIP's own uses: both towers, embeddings of images and texts, zero-shot classification, features of a tower."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "Embedder": "embedder",
    **dict.fromkeys(("space", "zero_shot"), ""),
    **dict.fromkeys(("from_big_vision", "load"), "loading"),
    "save": "saving",
    "DualTower": "vlm.model.dual",
    **dict.fromkeys(("DualProcessor", "Texts"), "processor"),
    **dict.fromkeys(("Encoded", "TextVectors", "encode_images", "encode_texts"), "encode"),
    **dict.fromkeys(("RULES", "TextRule", "canonicalize"), "rules"),
    **dict.fromkeys(("TEMPLATES", "Templates", "prompts"), "templates"),
    "class_embeddings": "classes",
    "ClassCache": "class_cache",
    **dict.fromkeys(("Classified", "classify", "ranked"), "classifying"),
    **dict.fromkeys(("Calibration", "calibrate"), "calibration"),
    "VectorStore": "store",
    "VectorWriter": "writing",
    **dict.fromkeys(("Found", "Query", "Searcher"), "vlm.siglip.search.asking"),
    "ProbeResult": "features",
    "check_ids": "sets",
    "check_sets": "sets",
    "check_templates": "sets",
    "images_in_both": "sets",
    "why_no_zero_shot": "zero_shot",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.model.dual import DualTower as DualTower
    from vlm.siglip import space as space
    from vlm.siglip import zero_shot as zero_shot
    from vlm.siglip.calibration import Calibration as Calibration
    from vlm.siglip.calibration import calibrate as calibrate
    from vlm.siglip.class_cache import ClassCache as ClassCache
    from vlm.siglip.classes import class_embeddings as class_embeddings
    from vlm.siglip.classifying import Classified as Classified
    from vlm.siglip.classifying import classify as classify
    from vlm.siglip.classifying import ranked as ranked
    from vlm.siglip.embedder import Embedder as Embedder
    from vlm.siglip.encode import Encoded as Encoded
    from vlm.siglip.encode import TextVectors as TextVectors
    from vlm.siglip.encode import encode_images as encode_images
    from vlm.siglip.encode import encode_texts as encode_texts
    from vlm.siglip.features import ProbeResult as ProbeResult
    from vlm.siglip.loading import from_big_vision as from_big_vision
    from vlm.siglip.loading import load as load
    from vlm.siglip.processor import DualProcessor as DualProcessor
    from vlm.siglip.processor import Texts as Texts
    from vlm.siglip.rules import RULES as RULES
    from vlm.siglip.rules import TextRule as TextRule
    from vlm.siglip.rules import canonicalize as canonicalize
    from vlm.siglip.saving import save as save
    from vlm.siglip.search.asking import Found as Found
    from vlm.siglip.search.asking import Query as Query
    from vlm.siglip.search.asking import Searcher as Searcher
    from vlm.siglip.sets import check_ids as check_ids
    from vlm.siglip.sets import check_sets as check_sets
    from vlm.siglip.sets import check_templates as check_templates
    from vlm.siglip.sets import images_in_both as images_in_both
    from vlm.siglip.store import VectorStore as VectorStore
    from vlm.siglip.templates import TEMPLATES as TEMPLATES
    from vlm.siglip.templates import Templates as Templates
    from vlm.siglip.templates import prompts as prompts
    from vlm.siglip.writing import VectorWriter as VectorWriter
    from vlm.siglip.zero_shot import why_no_zero_shot as why_no_zero_shot

__getattr__, __dir__ = door(__name__, _HOMES)
