"""Examples and their checks, official files of benchmarks, the order of training."""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("Example", "Labelled", "Paired"), "examples"),
    **dict.fromkeys(("Problem", "Refused", "listing"), "problems"),
    **dict.fromkeys(("read", "read_labelled", "read_pairs"), "reading"),
    **dict.fromkeys(("File", "Item", "Shown", "check_same", "once"), "items"),
    **dict.fromkeys(("Document", "Row"), "rows"),
    **dict.fromkeys(("Source", "open_document"), "source"),
    **dict.fromkeys(("Benchmark", "Predictions", "without_extension"), "benchmarks.contract"),
    **dict.fromkeys(("Augmentation", "OfImages", "apply", "pipeline"), "augment"),
    **dict.fromkeys(("Key", "Mixture", "StepSampler", "drawn", "stage_seed", "steps_of"), "order"),
    **dict.fromkeys(("Entry", "entries_of", "gathered", "lines_of"), "collection"),
    "AnnotationFormat": "formats.contract",
    "cut": "budget",
    "of_items": "content",
    "without_control": "control",
    **dict.fromkeys(("augment", "collection", "content", "reading"), ""),
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.data import augment as augment
    from vlm.data import collection as collection
    from vlm.data import content as content
    from vlm.data import reading as reading
    from vlm.data.augment import Augmentation as Augmentation
    from vlm.data.augment import OfImages as OfImages
    from vlm.data.augment import apply as apply
    from vlm.data.augment import pipeline as pipeline
    from vlm.data.benchmarks.contract import Benchmark as Benchmark
    from vlm.data.benchmarks.contract import Predictions as Predictions
    from vlm.data.benchmarks.contract import without_extension as without_extension
    from vlm.data.budget import cut as cut
    from vlm.data.collection import Entry as Entry
    from vlm.data.collection import entries_of as entries_of
    from vlm.data.collection import gathered as gathered
    from vlm.data.collection import lines_of as lines_of
    from vlm.data.content import of_items as of_items
    from vlm.data.control import without_control as without_control
    from vlm.data.examples import Example as Example
    from vlm.data.examples import Labelled as Labelled
    from vlm.data.examples import Paired as Paired
    from vlm.data.formats.contract import AnnotationFormat as AnnotationFormat
    from vlm.data.items import File as File
    from vlm.data.items import Item as Item
    from vlm.data.items import Shown as Shown
    from vlm.data.items import check_same as check_same
    from vlm.data.items import once as once
    from vlm.data.order import Key as Key
    from vlm.data.order import Mixture as Mixture
    from vlm.data.order import StepSampler as StepSampler
    from vlm.data.order import drawn as drawn
    from vlm.data.order import stage_seed as stage_seed
    from vlm.data.order import steps_of as steps_of
    from vlm.data.problems import Problem as Problem
    from vlm.data.problems import Refused as Refused
    from vlm.data.problems import listing as listing
    from vlm.data.reading import read as read
    from vlm.data.reading import read_labelled as read_labelled
    from vlm.data.reading import read_pairs as read_pairs
    from vlm.data.rows import Document as Document
    from vlm.data.rows import Row as Row
    from vlm.data.source import Source as Source
    from vlm.data.source import open_document as open_document

__getattr__, __dir__ = door(__name__, _HOMES)
