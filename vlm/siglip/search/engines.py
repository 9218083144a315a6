"""Indexes of other engines: FAISS (pip install 'vlm-backbone[faiss]'), usearch (pip install 'vlm-backbone[usearch]').

An engine is asked for candidates alone: it may miss rows, and gives -1 where it has no more. What is shown to people
comes from `vlm.siglip.search.index`, which takes scores from the vectors themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vlm.errors import ConfigError, DiskError

LINKS = 32
"""Neighbours of a row in a graph (M)."""
BUILD_EFFORT = 128
"""Candidates that are looked at for each row that joins a graph (efConstruction)."""
TRAINED_ON = 64
"""Vectors for each cell of an inverted file, from which its centres are learned; FAISS asks for at least 39."""


class Engine(Protocol):
    """An index of another library.

    Attributes:
        settings: what it was built with. efforts: what `set_effort` may be given, rising; the last finds most.
        version: of the library.
    """

    settings: dict[str, Any]
    efforts: list[int]
    version: str

    def add(self, vectors: Tensor) -> None:
        """Take float32[n, D] in, as the next rows."""

    def search(self, queries: Tensor, count: int) -> Tensor:
        """Candidates of each query: int64[Q, count], -1 where there are no more."""

    def set_effort(self, effort: int) -> None:
        """How much of the index a query looks at; saved with it where the format has a place for it."""

    def save(self, path: Path) -> None:
        """Write the library's own format."""


class Faiss:
    """`flat` looks at every row, `ivf` at the cells nearest to the query, `hnsw` goes along a graph of neighbours.

    Vectors are kept in the number format of the store: float16 ones by FAISS's scalar quantizer `SQfp16`, as they are.
    """

    library, file = "faiss", "index.faiss"

    def __init__(self, index: Any, kind: str, settings: dict[str, Any]) -> None:
        faiss = _faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())
        self.index, self.kind, self.settings = index, kind, settings
        self.version: str = faiss.__version__
        cells = settings.get("cells", 1)
        self.efforts = {
            "flat": [1],
            "ivf": [*(2**i for i in range(cells.bit_length()) if 2**i < cells), cells],
            "hnsw": [32, 64, 128, 256, 512, 1024],
        }[kind]

    @classmethod
    def new(cls, kind: str, rows: int, width: int, dtype: str, sample: Callable[[int], Tensor]) -> Faiss:
        """An empty index for so many rows; `sample` gives float32[n, D] of the vectors that it will hold."""
        faiss = _faiss()
        stored, settings = "Flat" if dtype == "float32" else "SQfp16", dict[str, Any]()
        if kind == "ivf":
            # FAISS's guidelines: 4 to 16 times the root of the rows, and no more than there are vectors to learn from.
            settings["cells"] = max(1, min(int(4 * math.sqrt(rows)), rows // TRAINED_ON))
        elif kind == "hnsw":
            settings |= {"links": LINKS, "build_effort": BUILD_EFFORT}
        layout = {"flat": stored, "ivf": f"IVF{settings.get('cells')},{stored}", "hnsw": f"HNSW{LINKS},{stored}"}[kind]
        index = faiss.index_factory(width, layout, faiss.METRIC_INNER_PRODUCT)
        if kind == "hnsw":
            index.hnsw.efConstruction = BUILD_EFFORT
        elif kind == "ivf" and stored != "Flat":
            index.by_residual = False  # float16 values as they are, not what they differ by from a centre
        built = cls(index, kind, settings)
        if not index.is_trained:
            index.train(sample(TRAINED_ON * settings.get("cells", 1)).numpy())
        return built

    @classmethod
    def open(cls, path: Path, kind: str, settings: dict[str, Any]) -> Faiss:
        """Read an index. Raises ConfigError: FAISS cannot read it."""
        try:
            index = _faiss().read_index(str(path))
        except RuntimeError as error:
            raise ConfigError(f"{path}: FAISS cannot read it ({str(error)[:200]}); build the index again") from error
        return cls(index, kind, settings)

    def add(self, vectors: Tensor) -> None:
        self.index.add(vectors.numpy())

    def search(self, queries: Tensor, count: int) -> Tensor:
        _, rows = self.index.search(queries.numpy(), count)
        return torch.from_numpy(rows)

    def set_effort(self, effort: int) -> None:
        if self.kind == "ivf":
            self.index.nprobe = effort
        elif self.kind == "hnsw":
            self.index.hnsw.efSearch = effort

    def save(self, path: Path) -> None:
        with _written(path):
            _faiss().write_index(self.index, str(path))


class Usearch:
    """A graph of neighbours (`hnsw`), in the number format of the store."""

    library, file = "usearch", "index.usearch"

    def __init__(self, index: Any, settings: dict[str, Any]) -> None:
        self.index, self.settings = index, settings
        self.version: str = _usearch().__version__
        self.efforts = [64, 128, 256, 512, 1024]

    @classmethod
    def new(cls, kind: str, rows: int, width: int, dtype: str, sample: Callable[[int], Tensor]) -> Usearch:
        """An empty index; `rows` and `sample` are not needed here. Raises ConfigError: a kind that usearch lacks."""
        if kind != "hnsw":
            raise ConfigError(f"usearch has no index {kind!r}, only hnsw; take --index hnsw or --engine faiss")
        settings = {"links": LINKS, "build_effort": BUILD_EFFORT}
        number = {"float32": "f32", "float16": "f16"}[dtype]
        index = _usearch().index.Index(
            ndim=width, metric="ip", dtype=number, connectivity=LINKS, expansion_add=BUILD_EFFORT
        )
        return cls(index, settings)

    @classmethod
    def open(cls, path: Path, kind: str, settings: dict[str, Any]) -> Usearch:
        """Map an index from the disk. Raises ConfigError: usearch cannot read it."""
        try:
            index = _usearch().index.Index.restore(str(path), view=True)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{path}: usearch cannot read it ({str(error)[:200]}); build the index again") from error
        if index is None:
            raise ConfigError(f"{path}: no index of usearch; build it again")
        return cls(index, settings)

    def add(self, vectors: Tensor) -> None:
        import numpy as np

        keys = np.arange(len(self.index), len(self.index) + len(vectors))
        self.index.add(keys, vectors.numpy(), threads=torch.get_num_threads())

    def search(self, queries: Tensor, count: int) -> Tensor:
        found = self.index.search(queries.numpy(), count, threads=torch.get_num_threads())
        rows = torch.from_numpy(found.keys.astype("int64"))
        places = torch.arange(rows.shape[1])
        return rows.masked_fill_(places >= torch.from_numpy(found.counts.astype("int64"))[:, None], -1)

    def set_effort(self, effort: int) -> None:
        self.index.expansion_search = effort

    def save(self, path: Path) -> None:
        with _written(path):
            self.index.save(str(path))


ENGINES: dict[str, type[Faiss] | type[Usearch]] = {"faiss": Faiss, "usearch": Usearch}
KINDS = ("flat", "ivf", "hnsw")


@contextmanager
def _written(path: Path) -> Iterator[None]:
    """Both libraries say what the disk refuses as a RuntimeError with its words."""
    try:
        yield
    except RuntimeError as error:
        raise DiskError(f"cannot write {path}: {str(error)[-200:]}; make room or write to another place") from error


def _faiss() -> Any:
    with _extra("faiss"):
        import faiss
    return faiss


def _usearch() -> Any:
    with _extra("usearch"):
        import usearch.index
    return usearch


@contextmanager
def _extra(name: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f"an index of {name} needs it, and it cannot be imported ({error}): pip install 'vlm-backbone[{name}]';"
            " exact search needs nothing"
        ) from error
