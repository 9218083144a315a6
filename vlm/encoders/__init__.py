"""Vision towers, one file each; the file name is the kind. A file declares `SPEC`, a `vlm.encoders.Spec`, and nothing
else is needed."""

from typing import TYPE_CHECKING, Any

from vlm import registry

_HOMES = {
    "RUNNING": "contract",
    "Spec": "contract",
    "TextTower": "contract",
    "EncoderOutput": "contract",
    "Published": "contract",
    "check_output": "contract",
    "check_square": "contract",
    "square_grid": "contract",
    "square_output": "contract",
    "square_tokens": "contract",
    "stated": "contract",
    "final_norm": "_layers",
    "fuse": "fused",
    "run_blocks": "_layers",
}

__all__ = [*_HOMES, "use"]

if TYPE_CHECKING:
    from vlm.encoders._layers import final_norm as final_norm
    from vlm.encoders._layers import run_blocks as run_blocks
    from vlm.encoders.contract import RUNNING as RUNNING
    from vlm.encoders.contract import EncoderOutput as EncoderOutput
    from vlm.encoders.contract import Published as Published
    from vlm.encoders.contract import Spec as Spec
    from vlm.encoders.contract import TextTower as TextTower
    from vlm.encoders.contract import check_output as check_output
    from vlm.encoders.contract import check_square as check_square
    from vlm.encoders.contract import square_grid as square_grid
    from vlm.encoders.contract import square_output as square_output
    from vlm.encoders.contract import square_tokens as square_tokens
    from vlm.encoders.contract import stated as stated
    from vlm.encoders.fused import fuse as fuse

__getattr__, __dir__ = registry.door(__name__, _HOMES)


def use(name: str) -> Any:
    """Make an encoder of one's own known in this process, for `vlm.new(encoder_kind=name)` and for opening models
    (`vlm.registry.use`).

    Args:
        name: `MODULE:CLASS`, such as `mylab.towers:MyTower`. The module declares `SPEC`; the class stands in the
            place of its encoder.

    Raises:
        ConfigError: it cannot be imported, or declares no `SPEC`.
    """
    return registry.use(__name__, name)
