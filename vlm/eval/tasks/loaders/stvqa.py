"""ST-VQA, task 3: `train_task_3.json`.

`{"data": [{"question_id", "file_path" (coco-text/COCO_train2014_....jpg, ...), "question", "answers", "dataset",
...}]}` (rrc.cvc.uab.es, ch=11; big_vision `datasets/stvqa`). The test set has no public answers and there is no
official validation set; PaliGemma's val is the questions about the images that big_vision lists in `val_ids.py` as
`PSEUDO_VAL_IMAGE_PATHS`. That list is read as a literal; no code of the file is run. As there, images of coco-text are
taken from COCO's train2014, where they are larger.

Files: `questions`, the folders `images` and `images_coco`, and `val_ids` (optional: without it, every question).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from vlm.errors import DataError

from ..source import Item, Source

_NAME = "PSEUDO_VAL_IMAGE_PATHS"
_COCO = "coco-text/"


def read(source: Source) -> Iterator[Item]:
    kept = _listed(source.path("val_ids")) if source.has("val_ids") else None
    folder, coco = source.place("images"), source.place("images_coco")
    for row in source.object("questions").rows("data"):
        path = row.text("file_path")
        if kept is not None and path not in kept:
            continue
        image = coco / path.removeprefix(_COCO) if path.startswith(_COCO) else folder / path
        yield Item(
            id=row.key("question_id"),
            images=(image,),
            fields={"question": row.text("question")},
            answers=row.texts("answers"),
            info={"source": path.split("/")[0]},
        )


def _listed(path: Path) -> frozenset[str]:
    """The image paths that the Python file assigns to `PSEUDO_VAL_IMAGE_PATHS`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if _annotated(node) else []
            if any(isinstance(target, ast.Name) and target.id == _NAME for target in targets):
                value = node.value
                if isinstance(value, ast.Call) and value.args:  # frozenset([...]), set([...])
                    value = value.args[0]
                return frozenset(ast.literal_eval(value))
    except (SyntaxError, ValueError, TypeError) as error:
        raise DataError(f"{path}: cannot read {_NAME} as a list of text ({error})") from error
    raise DataError(f"{path}: no {_NAME} in the file; is this big_vision's datasets/stvqa/val_ids.py?")


def _annotated(node: ast.stmt) -> bool:
    return isinstance(node, ast.AnnAssign) and node.value is not None
