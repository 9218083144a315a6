"""A model directory in VLMEvalKit (github.com/open-compass/VLMEvalKit), which has no plug-ins: it is registered here.

    git clone https://github.com/open-compass/VLMEvalKit && pip install -e VLMEvalKit
    VLM_MODEL=runs/x/model python examples/vlmevalkit_model.py VLMEvalKit/run.py --model vlm --data POPE

VLM_PREFIX is put before every question ("answer en" by default, which PaliGemma models were trained with), and the
instruction for chat models on the lines after the question is left out; VLM_PREFIX="" keeps everything as it is.
"""

import os
import runpy
import sys
from functools import partial
from typing import Any


def register(path: str, prefix: str = "answer en", name: str = "vlm", **load_options: Any) -> type:
    """Make the model directory `path` known to VLMEvalKit as `name`, and return its class."""
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    import vlm

    class Model(BaseModel):
        INTERLEAVE = True  # several images in one message

        def __init__(self, **_: Any) -> None:
            super().__init__()
            self.model, self.processor = vlm.load(path, **load_options)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            images = [part["value"] for part in message if part["type"] == "image"]
            question = "\n".join(part["value"] for part in message if part["type"] == "text").strip()
            prompt = f"{prefix} {question.splitlines()[0]}" if prefix else question
            return vlm.generate(self.model, self.processor, [images], [prompt])[0]

    supported_VLM[name] = partial(Model)
    return Model


if __name__ == "__main__":
    register(os.environ["VLM_MODEL"], os.environ.get("VLM_PREFIX", "answer en"))
    sys.argv = sys.argv[1:]  # run.py and its options
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
