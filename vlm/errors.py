"""Every refusal meant for a user is a `VLMError`.

The message is one text that says what was got, what was expected and what to do, and it names the sample, file or key.
The command line prints it as `error: ...` and exits with code 2; anything else that escapes is a bug and keeps its
traceback.
"""

import difflib
from collections.abc import Iterable


class VLMError(ValueError):
    """A request that `vlm` refuses; the message is written for the person who made it."""


class ConfigError(VLMError):
    """A configuration with an unknown key, a value of the wrong type, or values that contradict each other."""


class DataError(VLMError):
    """An annotation file or a sample that cannot be used as it is."""


class CheckpointError(VLMError):
    """A model directory with files, tensors or numbers that are missing, unexpected or wrong."""


class GenerationError(VLMError):
    """Generation settings or inputs that cannot give a right answer."""


class DiskError(VLMError):
    """A file or directory that the disk does not take: full, read-only, over a quota, not allowed."""


class TrainingError(VLMError):
    """A training run that must not start or must not go on."""


class LaunchError(VLMError):
    """Another process of the same launch has died."""


class ImageError(VLMError):
    """An image that cannot be used.

    `code` is a short stable string (`vlm.images.CODES` lists them with their meaning): programs compare it, people read
    the message.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        # Exceptions cross process borders (data loader workers); the default pickling would drop `code`.
        return type(self), (self.code, str(self))


def nearest(name: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to a mistyped one, or `""` when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
