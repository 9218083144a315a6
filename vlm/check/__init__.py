"""A model, checked by what it does: `run` changes inputs and watches outputs, and says for each check what it measured.

    import vlm
    from vlm import check

    model, processor = vlm.load("runs/x/model")
    report = check.run(model, processor, data="train.jsonl", path="runs/x/model")
    print(report.table())

`docs/check.md` says what each check means and what to do when it fails.
"""

from vlm.check.report import Report, Result
from vlm.check.runner import run
from vlm.check.table import CHECKS

__all__ = ["CHECKS", "Report", "Result", "run"]
