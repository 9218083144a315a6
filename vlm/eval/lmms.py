"""Our models in lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval, 0.7), through its entry-point group.

    pip install vlm-backbone[lmms-eval]
    lmms-eval --model vlm --model_args pretrained=DIR --tasks pope --batch_size 16

lmms-eval finds `manifest` in the entry-point group `lmms_eval.models` and then imports `vlm.eval.lmms.Model`. That
class is made when it is first asked for, because its base class needs lmms-eval; what it does is in `Answers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from PIL import Image

from vlm.checkpoints.opening import Opening
from vlm.errors import ConfigError, DataError
from vlm.generation.decoding import Decoding
from vlm.generation.engine import Engine
from vlm.generation.models import ModelPredictor
from vlm.generation.request import Request
from vlm.generation.schedule import Batching

MODEL_ID = "vlm"


class Instance(Protocol):
    """An Instance of lmms-eval; `args`: context, generation settings, doc_to_visual, document id, task, split."""

    @property
    def args(self) -> tuple[str, dict[str, Any], Callable[[Any], Sequence[Any]], Any, str, str]: ...


class Answers:
    """The work of an lmms-eval model, without its base class.

    Args:
        pretrained: a model directory or hub id.
        batch_size: images at a time; `auto` is 16, because lmms-eval plans the batches itself.
        device, dtype: as for `vlm.eval.evaluate`.
        prefix: words put before every question, such as `answer en`, which PaliGemma models were trained with.
        first_line: keep only the first line of a question: lmms-eval's tasks append an instruction for chat models
            ("Answer the question using a single word or phrase.") that ours have never seen.
        beam_search: whose rule of beams, where a task asks for beams.
    """

    task_dict: dict[str, Any]
    """Set by lmms-eval: task -> split -> documents."""

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        device: str | None = None,
        dtype: str | None = None,
        prefix: str = "",
        first_line: bool | str = False,
        beam_search: str = Decoding.beam_search,
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = [name for name in others if name != "max_batch_size"]
        if unknown:
            raise ConfigError(
                f"--model_args: {', '.join(unknown)} is not known; known: pretrained, dtype, prefix, first_line,"
                " beam_search"
            )
        from vlm.checkpoints.directory import open_model

        pair = open_model(pretrained, Opening(device=device, dtype=dtype))
        self._predictor = ModelPredictor(*pair, name=pretrained)
        self.batch_size = 16 if batch_size == "auto" else int(batch_size)
        self._prefix, self._beam_search = prefix.strip(), beam_search
        self._first_line = str(first_line).lower() in ("true", "1", "yes")

    @property
    def device(self) -> Any:
        """Where the model is; lmms-eval gathers counts there."""
        return self._predictor.model.device

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answer to each request, in order. Requests with different settings are never in one batch.

        Raises:
            DataError: a request about video or sound.
            ConfigError: sampling, or another setting that would be ignored.
        """
        settings = [_decoding(request.args[1], self._beam_search) for request in requests]
        answers: dict[int, str] = {}
        for decoding in dict.fromkeys(settings):
            own = [index for index, found in enumerate(settings) if found == decoding]
            for start in range(0, len(own), self.batch_size):
                batch = own[start : start + self.batch_size]
                texts = self._answer([requests[index] for index in batch], decoding)
                answers.update(zip(batch, texts, strict=True))
        return [_until(answers[index], request.args[1].get("until")) for index, request in enumerate(requests)]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: lmms-eval 0.7.3 turns the pairs it asks for into text and then fails on them."""
        raise NotImplementedError(
            "vlm answers generate_until tasks only; for multiple choice by likelihood use `vlm eval --by likelihood`"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: our models answer one prompt."""
        raise NotImplementedError("vlm models answer one prompt and hold no conversation; choose another task")

    def _answer(self, instances: Sequence[Instance], decoding: Decoding) -> list[str]:
        """One batch: lmms-eval's images are made here, because all of them at once may not fit into the memory."""
        batching = Batching(size=len(instances), order="given", advice="give a smaller --batch_size")
        engine = Engine(predictor=self._predictor, decoding=decoding, batching=batching, strict=True)
        return [reply.text for replies in engine.run(list(map(self._request, instances))) for reply in replies]

    def _request(self, instance: Instance) -> Request:
        context, _, doc_to_visual, doc_id, task, split = instance.args
        name = f"{task}/{split}/{doc_id}"
        question = context.strip().split("\n", 1)[0] if self._first_line else context.strip()
        return Request(
            id=name,
            prompt=f"{self._prefix} {question}".strip(),
            images=_pictures(doc_to_visual(self.task_dict[task][split][doc_id]), name),
        )


def _pictures(visuals: Sequence[Any] | None, name: str) -> list[Image.Image]:
    pictures = list(visuals or ())
    strange = [type(visual).__name__ for visual in pictures if not isinstance(visual, Image.Image)]
    if strange:
        raise DataError(f"{name}: vlm models look at images; this request has {strange[0]} (video or sound?)")
    return pictures


def _decoding(settings: dict[str, Any], beam_search: str) -> Decoding:
    """lmms-eval's generation settings as ours: greedy or beams. `temperature` and `top_p` mean nothing there."""
    if settings.get("do_sample") or (settings.get("temperature") or 0) > 0:
        raise ConfigError(
            f"the task samples ({settings}); vlm answers greedily or by beams: --gen_kwargs do_sample=False"
        )
    return Decoding(
        max_new_tokens=int(settings.get("max_new_tokens") or Decoding.max_new_tokens),
        num_beams=int(settings.get("num_beams") or Decoding.num_beams),
        beam_search=beam_search,  # type: ignore[arg-type]  # checked there
    )


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first of the stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop, 1)[0] if stop else text
    return text


def manifest() -> Any:
    """What lmms-eval's registry asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, simple_class_path=f"{__name__}.Model")


def __getattr__(name: str) -> Any:
    if name != "Model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from lmms_eval.api.model import lmms
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lmms_eval":
            raise
        raise ConfigError("this needs lmms-eval; pip install vlm-backbone[lmms-eval]") from error
    model = type("Model", (Answers, lmms), {"is_simple": True, "__module__": __name__, "__doc__": Answers.__doc__})
    globals()["Model"] = model
    return model
