"""The names that an outside checker of golden values asks for, mapped to the public functions of `vlm.eval.metrics`."""

from collections.abc import Sequence

from vlm.eval.metrics import anls as _anls
from vlm.eval.metrics import aokvqa as _aokvqa
from vlm.eval.metrics import boxes as _boxes
from vlm.eval.metrics import chartqa as _chartqa
from vlm.eval.metrics import choices as _choices
from vlm.eval.metrics import pope as _pope
from vlm.eval.metrics import tallyqa as _tallyqa
from vlm.eval.metrics import textvqa as _textvqa
from vlm.eval.metrics import vizwiz as _vizwiz
from vlm.eval.metrics import vqa as _vqa

vqa_v2 = _vqa.accuracy
vqa_v2_normalize = _vqa.normalize
textvqa = _textvqa.accuracy
aokvqa_direct_answer = _aokvqa.direct_answer
vizwiz = _vizwiz.accuracy
anls = _anls.anls
chartqa_relaxed = _chartqa.relaxed_match
pope_answer = _pope.answer
tallyqa = _tallyqa.match_big_vision
science_qa_choice = _choices.science_qa
box_iou = _boxes.box_iou
loc_to_box = _boxes.loc_to_box


def gqa(prediction: str, answer: str) -> bool:
    from vlm.eval import metrics

    return metrics.compute("gqa", {"q": prediction}, {"q": (answer,)}).value == 1.0


def pope_scores(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    return _pope.scores([_pope.answer(text) for text in predictions], labels)
