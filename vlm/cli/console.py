"""How a command ends (`vlm.children.endings` sees to it), and what it says of itself. Exit codes:

    0    done, or the reader of the output has left (`| head`)
    1    `vlm check`: a check failed
    2    refused: one line `error: ...` on stderr (further lines only where several things are wrong), no traceback
    3    finished, but items were skipped; they are listed
    130  stopped by Ctrl-C      143  stopped by SIGTERM

Anything else is a bug of ours and keeps its traceback.
"""

import os
import shlex
import sys
from pathlib import Path

OK, FAILED, SKIPPED = 0, 1, 3


def again(option: str, without: str = "") -> str:
    """This process's command as it could be typed again, with an option more."""
    program, *words = sys.argv
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"the same torchrun command, with {option}"
    start = [Path(sys.executable).name, "-m", "vlm"] if Path(program).name == "__main__.py" else [Path(program).name]
    return shlex.join([*start, *(word for word in words if word != without), *([] if option in words else [option])])


def quiet_transformers() -> None:
    """No progress bars for reading weights, and no warnings of transformers: opening any SigLIP it warns of the token
    ids in its own defaults, and what matters in a configuration is checked here. Imports transformers."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
