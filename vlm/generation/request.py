"""What is asked of a model, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.errors import VLMError
from vlm.images.load import ImageInput


@dataclass(frozen=True, kw_only=True)
class Request:
    """One prompt about some images, or about none."""

    id: str
    prompt: str
    images: Sequence[ImageInput] = ()
    """What `vlm.load_image` reads."""
    candidates: Sequence[str] = ()
    """What `likelihood` chooses from."""
    key: Any = None
    """Whatever the caller wants back with the reply."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of a request: a text, or why there is none."""

    request: Request
    text: str = ""
    log_likelihoods: Sequence[float] | None = None
    """Of the candidates, where one of them was chosen."""
    error: VLMError | None = None
    """An image that cannot be decoded, or a prompt that leaves no room in the model beside its images."""

    @property
    def finish(self) -> str | None:
        """How the text ended, where the predictor says it (`vlm.generation.Answer`)."""
        found: str | None = getattr(self.text, "finish", None)
        return found

    @property
    def code(self) -> str:
        """A short stable word for the error."""
        return getattr(self.error, "code", "too-long")

    def record(self) -> dict[str, Any]:
        """What is kept of it: `id`, `prefix`, `prediction`, and what else there is to say."""
        record: dict[str, Any] = {"id": self.request.id, "prefix": self.request.prompt, "prediction": str(self.text)}
        if self.error is not None:
            return {**record, "error": {"code": self.code, "message": str(self.error)}}
        if self.log_likelihoods is not None:
            scores = list(self.log_likelihoods)
            return {**record, "candidates": list(self.request.candidates), "log_likelihoods": scores}
        return record if self.finish is None else {**record, "finish": self.finish}
