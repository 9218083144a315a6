"""A model, checked by what it does: `run` changes inputs and watches outputs, and says for each check what it measured.

    import vlm
    from vlm import check

    model, processor = vlm.load("runs/x/model")
    report = check.run(model, processor, data="train.jsonl", path="runs/x/model")
    print(report.table())

`docs/check.md` says what each check means and what to do when it fails.
"""

from typing import TYPE_CHECKING, Any

from vlm.registry import door

_HOMES = {
    **dict.fromkeys(("CHECKS", "DUAL_CHECKS", "run_dual"), "runner"),
    "Report": "report",
    "Result": "report",
}

__all__ = ["run", *_HOMES]

if TYPE_CHECKING:
    from vlm.check.report import Report as Report
    from vlm.check.report import Result as Result
    from vlm.check.runner import CHECKS as CHECKS
    from vlm.check.runner import DUAL_CHECKS as DUAL_CHECKS
    from vlm.check.runner import run_dual as run_dual

__getattr__, __dir__ = door(__name__, _HOMES)


def run(model: Any, processor: Any, **options: Any) -> "Report":
    """All checks, or some, on one model; see `vlm.check.runner.run`."""
    from vlm.check import runner
    from vlm.exchange.exporting import export

    return runner.run(model, processor, export=export, **options)
