"""Evaluation of a model of two towers: zero-shot classification, retrieval, k-NN and a linear probe of its embeddings.

A model is anything that makes vectors (`contract.Embedder`); this room never opens one.
"""

from typing import TYPE_CHECKING

from vlm.registry import door

_HOMES = {
    "Embedder": "contract",
    **dict.fromkeys(("Benchmark", "Chosen", "chosen", "get", "names", "table"), "benchmark"),
    **dict.fromkeys(("Pool", "Sets", "class_names", "classes", "labelled", "pools"), "data"),
    "Options": "job",
    "evaluate_towers": "run",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from vlm.eval.towers.benchmark import Benchmark as Benchmark
    from vlm.eval.towers.benchmark import Chosen as Chosen
    from vlm.eval.towers.benchmark import chosen as chosen
    from vlm.eval.towers.benchmark import get as get
    from vlm.eval.towers.benchmark import names as names
    from vlm.eval.towers.benchmark import table as table
    from vlm.eval.towers.contract import Embedder as Embedder
    from vlm.eval.towers.data import Pool as Pool
    from vlm.eval.towers.data import Sets as Sets
    from vlm.eval.towers.data import class_names as class_names
    from vlm.eval.towers.data import classes as classes
    from vlm.eval.towers.data import labelled as labelled
    from vlm.eval.towers.data import pools as pools
    from vlm.eval.towers.job import Options as Options
    from vlm.eval.towers.run import evaluate_towers as evaluate_towers

__getattr__, __dir__ = door(__name__, _HOMES)
