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

from vlm.data.benchmarks.contract import Benchmark
from vlm.data.items import Item
from vlm.data.source import Source
from vlm.errors import DataError

_NAME = "PSEUDO_VAL_IMAGE_PATHS"
_COCO = "coco-text/"

FORMAT = Benchmark(about='ST-VQA: {"data": [{"question_id", "file_path", "answers"}]}')


def read(source: Source) -> Iterator[Item]:
    kept = _listed(source.text("val_ids"), str(source.place("val_ids"))) if source.has("val_ids") else None
    folder, coco = source.images(), source.images("images_coco")
    for row in source.object("questions").rows("data"):
        path = row.text("file_path")
        if kept is not None and path not in kept:
            continue
        image = coco / path.removeprefix(_COCO) if path.startswith(_COCO) else folder / path
        yield Item(
            id=row.key("question_id"),
            images=(image,),
            fields={"question": row.text("question")},
            answers=row.answers("answers"),
            info={"source": path.split("/")[0]},
        )


def _listed(code: str, where: str) -> frozenset[str]:
    """The image paths that the Python file assigns to `PSEUDO_VAL_IMAGE_PATHS`."""
    try:
        tree = ast.parse(code)
        values = [value for name, value in _assignments(tree) if name == _NAME]
        # frozenset([...]) and set([...]) count as the list inside.
        lists = [value.args[0] if isinstance(value, ast.Call) and value.args else value for value in values]
        found = [frozenset(ast.literal_eval(value)) for value in lists]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise DataError(f"{where}: cannot read {_NAME} as a list of text ({error})") from error
    if not found:
        raise DataError(f"{where}: no {_NAME} in the file; is this big_vision's datasets/stvqa/val_ids.py?")
    return found[0]


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.expr]]:
    """The names that are assigned at the top of a module, each with its value."""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign):
            targets: list[ast.expr] = [node.target]
        elif isinstance(node, ast.Assign):
            targets = node.targets
        else:
            continue
        for target in targets:
            if isinstance(target, ast.Name) and node.value is not None:
                yield target.id, node.value
