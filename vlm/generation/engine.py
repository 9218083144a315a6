"""The one loop that answers prompts: images decoded ahead, bad ones told, memory that runs out, shares of processes.

    engine = Engine(predictor=predictor, decoding=Decoding(max_new_tokens=20))
    for replies in engine.run([Request(id="a", prompt="caption en", images=["cat.jpg"])]):
        ...

`vlm.generate`, `vlm caption` and `vlm ask`, evaluation, scores during training, the demo and lmms-eval all call it.
Three things are apart: which requests go together (`vlm.generation.schedule`), how a batch of them is answered
(`Predictor`), and what becomes of a reply (the caller; `vlm.generation.predictions` keeps it on disk).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from vlm.errors import ConfigError, DataError, ImageError, VLMError
from vlm.generation import schedule
from vlm.generation.decoding import Decoding, choose
from vlm.generation.predictor import Bounded, Measures, Predictor, Scores
from vlm.generation.progress import Progress
from vlm.generation.request import Reply, Request
from vlm.generation.schedule import Batching, Limit
from vlm.images.load import load_image
from vlm.ranks import ALONE, Processes

logger = logging.getLogger(__name__)

MAX_BAD_IN_A_ROW = 100
"""So many undecodable images one after another mean a broken disk or a wrong folder, not bad luck."""

_DECODERS = 2  # threads that decode images while the model works; Pillow releases the interpreter lock


Decoded = list[Image.Image]
Job = tuple[Request, Decoded | VLMError]
"""A request with its images, or with why it cannot be asked."""
Step = Callable[[Sequence[Request], Sequence[Decoded]], list[Reply]]
"""One batch through the model."""


@dataclass(kw_only=True)
class Engine:
    """Answers requests in batches.

    Attributes:
        predictor: who answers. decoding: how. batching: how many at a time, and which together.
        group: the processes that share the requests; each is given all of them, and answers its share of the batches.
        strict: raise the first error, instead of making it a reply.
        most_bad: stop after so many undecodable images in a row; None never does.
        progress: what a bar (or lines in the log) calls the work; "" shows nothing. bar: False is for lines only.
        size: after a run, the most items of a batch.
    """

    predictor: Predictor
    decoding: Decoding = Decoding()
    batching: Batching = Batching()
    group: Processes = ALONE
    strict: bool = False
    most_bad: int | None = None
    progress: str = ""
    bar: bool = True
    size: int = field(default=0, init=False)

    def run(self, requests: Sequence[Request], *, done: Collection[str] = ()) -> Iterator[list[Reply]]:
        """Replies as they are ready, a batch at a time.

        Args:
            done: ids that are answered already. A batch of which a part is there (the run was killed while it was
                written, or had another batch size) is answered whole, so that its numbers do not depend on the
                interruption; only the missing replies are given.

        Raises:
            ConfigError: memory runs out with a fixed size, or with one item; or the predictor cannot do what is asked.
            DataError: `most_bad` images in a row could not be decoded. With `strict` also DataError and ImageError,
                which name the request.
        """
        step = self._step(requests)
        if all(request.id in done for request in requests):
            self.size = 0 if self.batching.size == "auto" else self.batching.size
            return iter(())
        batches = self._plan(requests, step)
        todo = [batch for batch in batches if any(request.id not in done for request in batch)]
        return self._replies(todo[self.group.rank :: self.group.world], step, len(requests), done)

    def _replies(
        self, batches: list[list[Request]], step: Step, total: int, done: Collection[str]
    ) -> Iterator[list[Reply]]:
        limit = Limit(self.size, self.batching)
        bad_in_a_row = 0
        with self._bar(batches, total, done) as bar:
            for batch in self._decoded(batches):
                for replies in _answered(step, batch, limit):
                    for reply in replies:
                        bad_in_a_row = bad_in_a_row + 1 if isinstance(reply.error, ImageError) else 0
                    new = [reply for reply in replies if reply.request.id not in done]
                    count = len(new)  # `done` may grow while the caller has them
                    yield new
                    self.size = limit.size
                    bar.advance(count)
                    if self.most_bad is not None and bad_in_a_row >= self.most_bad:
                        last = replies[-1].error
                        raise DataError(f"{bad_in_a_row} images in a row could not be decoded; the last: {last}")

    def _bar(self, batches: list[list[Request]], total: int, done: Collection[str]) -> Progress:
        group = self.group
        alone = group.world == 1
        return Progress(
            total if alone else sum(map(len, batches)),
            done=len(done) if alone else 0,
            label=self.progress if alone else f"{self.progress} (process {group.rank} of {group.world})",
            visible=bool(self.progress) and group.main,
            bar=self.bar,
        )

    # --- which together ---

    def _plan(self, requests: Sequence[Request], step: Step) -> list[list[Request]]:
        """All batches, the same in every process."""
        batching = self.batching
        if batching.tokens is not None:
            lengths = [batching.beams * length for length in self._lengths(requests)]
            places = schedule.plan([], 1, lengths=lengths, batch_tokens=batching.tokens)
            self.size = max(map(len, places))
        else:
            self.size = self._choose(requests, step)
            prompts = [request.prompt for request in requests]
            in_order = batching.order == "given"
            places = schedule.chunks(range(len(requests)), self.size) if in_order else schedule.plan(prompts, self.size)
        return [[requests[place] for place in batch] for batch in places]

    def _lengths(self, requests: Sequence[Request]) -> list[int]:
        if not isinstance(self.predictor, Measures):
            raise ConfigError("batch_tokens needs to know how long prompts are, and this predictor has no `lengths`")
        sizes = [schedule.image_sizes(request.images) for request in requests]
        prompts, ids = [request.prompt for request in requests], [request.id for request in requests]
        return self.predictor.lengths(sizes, prompts, ids=ids)

    def _choose(self, requests: Sequence[Request], step: Step) -> int:
        """The size of this run, the same for all processes."""
        if self.batching.size != "auto":
            return self.batching.size
        longest = sorted(range(len(requests)), key=lambda place: (len(requests[place].prompt), place))
        hardest = [self._fitting(*self._loaded(requests[place])) for place in longest[-schedule.TRIAL :]]
        usable = [(request, images) for request, images in hardest if not isinstance(images, VLMError)]

        def trial() -> None:
            step([request for request, _ in usable], [images for _, images in usable])

        # A predictor of one's own need not say where it is.
        device = str(getattr(self.predictor, "device", "cpu"))
        guessed = schedule.guess(device, trial, len(usable)) if usable else 1
        chosen = min([*self.group.gather(guessed), schedule.power_of_two(len(requests))])
        if self.group.main:
            logger.info("batch size %d (auto, on %s)", chosen, device)
        return chosen

    # --- images ---

    def _decoded(self, batches: Sequence[Sequence[Request]]) -> Iterator[list[Job]]:
        """Each batch with its decoded images, one batch ahead of the consumer."""
        with ThreadPoolExecutor(_DECODERS) as pool:
            waiting: list[list[Future[Job]]] = []
            for position in range(len(batches)):
                for ahead in batches[position + len(waiting) : position + 2]:
                    waiting.append([pool.submit(self._loaded, request) for request in ahead])
                # Not in the threads: a fast tokenizer that two threads use at once raises "Already borrowed".
                yield [self._fitting(*future.result()) for future in waiting.pop(0)]

    def _loaded(self, request: Request) -> Job:
        """The images of a request, or the error of the first that cannot be used."""
        try:
            return request, [load_image(image, background=self.predictor.background) for image in request.images]
        except ImageError as error:
            if self.strict:
                raise ImageError(error.code, f"sample {request.id!r}: {error}") from error
            return request, error

    def _fitting(self, request: Request, images: Decoded | VLMError) -> Job:
        """The same, or why prompt and images leave no room in the model."""
        if isinstance(images, VLMError) or not isinstance(self.predictor, Bounded):
            return request, images
        said = self.predictor.misfit(request.id, request.prompt, images)
        if said is None:
            return request, images
        if self.strict:
            raise DataError(f"sample {request.id!r}: {said}")
        return request, DataError(f"the prompt: {said}")

    # --- one batch ---

    def _step(self, requests: Sequence[Request]) -> Step:
        """How a batch is answered. Raises ConfigError: `likelihood` with a predictor that only writes text, or without
        candidates."""
        if self.decoding.by == "generate":
            return self._write
        predictor = self.predictor
        scores = isinstance(predictor, Scores)
        if not scores or not any(request.candidates for request in requests):
            name = type(predictor).__name__
            lacking = "nothing says what to choose from" if scores else f"a {name} has no `score`"
            raise ConfigError(f"answers cannot be chosen by likelihood: {lacking}")
        return self._choose_likeliest

    def _write(self, requests: Sequence[Request], pictures: Sequence[Decoded]) -> list[Reply]:
        texts = self.predictor.predict(
            [images[0] if len(images) == 1 else images for images in pictures],
            [request.prompt for request in requests],
            ids=[request.id for request in requests],
            decoding=self.decoding,
        )
        return [Reply(request=request, text=text) for request, text in zip(requests, texts, strict=True)]

    def _choose_likeliest(self, requests: Sequence[Request], pictures: Sequence[Decoded]) -> list[Reply]:
        assert isinstance(self.predictor, Scores)
        scores = self.predictor.score(
            [list(images) for images in pictures],
            [request.prompt for request in requests],
            [list(request.candidates) for request in requests],
            ids=[request.id for request in requests],
            normalization=self.decoding.normalization,
        )
        chosen = choose([request.candidates for request in requests], scores)
        return [
            Reply(request=request, text=text, log_likelihoods=values)
            for request, text, values in zip(requests, chosen, scores, strict=True)
        ]


def _answered(step: Step, batch: Sequence[Job], limit: Limit) -> Iterator[list[Reply]]:
    """The replies of a batch, in parts where the whole no longer fits."""
    start = 0
    while start < len(batch):
        end = min(len(batch), start + limit.size)
        replies = _attempt(step, batch[start:end])
        if replies is None:
            limit.shrink(end - start, batch[start][0].id)
            continue
        yield replies
        start = end


def _attempt(step: Step, batch: Sequence[Job]) -> list[Reply] | None:
    """One reply per request, or None when memory ran out."""
    usable = [(request, images) for request, images in batch if not isinstance(images, VLMError)]
    said: list[Reply] | None = []
    try:
        if usable:
            said = step([request for request, _ in usable], [images for _, images in usable])
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        said = None
    if said is None:
        _free()  # only here: inside `except`, the frames of the exception still hold their tensors
        return None
    good = iter(said)
    return [
        Reply(request=request, error=images) if isinstance(images, VLMError) else next(good)
        for request, images in batch
    ]


def _out_of_memory(error: Exception) -> bool:
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
