"""Vectors on the disk: added to, killed at any byte, read without being loaded, never mixed with another space."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vlm.errors import ConfigError, DataError, DiskError
from vlm.siglip import space as spaces
from vlm.siglip import writing
from vlm.siglip.loading import load
from vlm.siglip.rules import RULES
from vlm.siglip.store import VectorStore
from vlm.siglip.writing import VectorWriter

SPACE: dict[str, Any] = {
    "family": "siglip",
    "size": 6,
    "weights": "aa",
    "dtype": "float32",
    "configuration": "bb",
    "preprocessing": {"size": [224, 224], "mean": [0.5, 0.5, 0.5]},
    "pooling": {"images": "head", "texts": "last"},
    "normalisation": "length 1",
    "texts": {"context": 64, "tokenizer": "cc"},
    "running": {"torch": "2.13.0", "attention": "sdpa"},
}


def writer(folder: Path, **how: Any) -> VectorWriter:
    return VectorWriter(folder, how.pop("space", SPACE), how.pop("kind", "images"), rows_per_shard=5, **how)


def vectors(*numbers: int) -> Tensor:
    return torch.stack([torch.arange(6.0) + 10 * number for number in numbers])


def records(*numbers: int) -> list[dict[str, Any]]:
    return [{"id": f"{n}.png", "stamp": f"s{n}", "source": "p", "info": {"n": n}} for n in numbers]


def fill(folder: Path, *batches: tuple[int, ...], **how: Any) -> None:
    with writer(folder, **how) as store:
        for batch in batches:
            store.add(records(*batch), vectors(*batch))
            store.commit()


def read(folder: Path) -> tuple[list[str], Tensor]:
    store = VectorStore.open(folder)
    assert len(store) == len(store.ids) == sum(map(len, store.shards))
    return store.ids, torch.cat([*store.shards, torch.zeros(0, 6, dtype=store.shards[0].dtype)])


# --- what is written is read ------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_over_several_shards(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0, 1, 2), (3, 4, 5, 6, 7, 8, 9, 10), (11,))
    ids, found = read(tmp_path / "v")
    assert ids == [f"{n}.png" for n in range(12)] and torch.equal(found, vectors(*range(12)))
    store = VectorStore.open(tmp_path / "v")
    assert store.info[7] == {"n": 7} and store.kind == "images" and store.size == 6 and store.space == SPACE
    assert [len(shard) for shard in store.shards] == [5, 5, 2]


def test_every_shard_is_a_safetensors_file_of_others_too(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0, 1, 2), (3, 4, 5, 6), dtype="float16")
    files = sorted((tmp_path / "v").glob("*.safetensors"))
    theirs = torch.cat([load_file(file)["vectors"] for file in files])
    assert theirs.dtype == torch.float16 and torch.equal(theirs, vectors(*range(7)).half())
    assert torch.equal(read(tmp_path / "v")[1], theirs)


def test_shards_are_mapped_and_not_loaded(tmp_path: Path) -> None:
    """A vector that changes on the disk changes under whoever has opened it, before its page is touched."""
    fill(tmp_path / "v", (0, 1))
    (shard,) = VectorStore.open(tmp_path / "v").shards
    with open(tmp_path / "v/vectors-00000.safetensors", "rb+") as file:
        file.seek(4096)
        file.write(b"\0\0\x80\x3f")
    assert shard[0, 0] == 1.0


def test_appended_changed_dropped_and_known_anew(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0, 1, 2, 3, 4, 5))
    with writer(tmp_path / "v") as store:
        assert store.rows.record("1.png") == {"row": 1, **records(1)[0]}
        store.add([{"id": "1.png", "stamp": "new"}, *records(6)], vectors(77, 6))
        store.know("2.png", {"source": "q", "info": {"n": "two"}})
        store.drop(["0.png", "4.png"])
        store.refuse("bad.png", "s", "corrupt", "why")
        store.commit()
    ids, found = read(tmp_path / "v")
    assert ids == ["2.png", "3.png", "5.png", "1.png", "6.png"]
    assert torch.equal(found, vectors(2, 3, 5, 77, 6))
    store_ = VectorStore.open(tmp_path / "v")
    assert store_.info == [{"n": "two"}, {"n": 3}, {"n": 5}, {}, {"n": 6}]
    assert [len(shard) for shard in store_.shards] == [2, 3], "pieces of the first shard without rows 0, 1 and 4"
    with writer(tmp_path / "v") as again:
        assert again.rows.bad["bad.png"]["code"] == "corrupt" and again.rows.record("0.png") is None
        again.add([{"id": "bad.png", "stamp": "t"}], vectors(8))
        assert again.rows.bad == {}


def test_many_dead_rows_are_left_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlm.siglip.store._RUNS", 1)
    fill(tmp_path / "v", (0, 1, 2, 3, 4, 5))
    with writer(tmp_path / "v") as store:
        store.drop(["1.png", "3.png", "5.png"])
        store.commit()
    assert torch.equal(read(tmp_path / "v")[1], vectors(0, 2, 4))
    with writer(tmp_path / "v") as store:
        store.drop(["0.png", "2.png", "4.png"])
        store.commit()
    assert VectorStore.open(tmp_path / "v").shards == [] and len(VectorStore.open(tmp_path / "v")) == 0


def test_what_was_not_committed_is_not_there(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0,))
    with writer(tmp_path / "v") as store:
        store.add(records(1), vectors(1))
    assert read(tmp_path / "v")[0] == ["0.png"]


# --- kills ------------------------------------------------------------------------------------------------------------


def test_a_kill_between_any_two_writes_loses_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder as it is before each call that changes it is a kill there; from each the work is finished."""
    states: list[Path] = []
    folder = tmp_path / "v"

    def before(name: str, call: Any) -> Any:
        def keep(*args: Any) -> Any:
            states.append(tmp_path / f"state{len(states)}")
            shutil.copytree(folder, states[-1])
            return call(*args)

        return keep

    for name in ("write", "ftruncate", "fsync", "lseek"):
        monkeypatch.setattr(writing.os, name, before(name, getattr(os, name)))
    batches = ((0, 1, 2), (3, 4, 5, 6), (7, 8), (9, 10, 11))
    fill(folder, *batches)
    monkeypatch.undo()
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(states) > 15
    for state in states:
        with writer(state) as store:
            there = store.rows.count
            assert there in (0, 3, 7, 9, 12)
            for batch in batches:
                if batch[0] >= there:
                    store.add(records(*batch), vectors(*batch))
                    store.commit()
        assert {path.name: path.read_bytes() for path in state.iterdir()} == whole, state


def test_a_reader_beside_a_killed_writer_sees_what_counts(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0, 1, 2))
    with open(tmp_path / "v/vectors-00000.safetensors", "ab") as file:
        file.write(b"half a vector")
    with open(tmp_path / "v/rows.jsonl", "ab") as file:
        file.write(b'{"row": 3, "id": "torn')
    assert read(tmp_path / "v")[0] == ["0.png", "1.png", "2.png"]
    fill(tmp_path / "v", (3,))
    assert torch.equal(read(tmp_path / "v")[1], vectors(0, 1, 2, 3))
    assert torch.equal(load_file(tmp_path / "v/vectors-00000.safetensors")["vectors"], vectors(0, 1, 2, 3))


def test_a_full_disk_is_one_error_and_everything_before_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "v", (0, 1))
    with writer(tmp_path / "v") as store:
        store.add(records(2), vectors(2))

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writing.os, "fsync", full)
        with pytest.raises(DiskError, match=r"vectors-00000\.safetensors: No space left"):
            store.commit()
        assert read(tmp_path / "v")[0] == ["0.png", "1.png"]
        monkeypatch.undo()
        store.commit()
    assert torch.equal(read(tmp_path / "v")[1], vectors(0, 1, 2))


@pytest.mark.parametrize("damage", ["line", "order", "shard", "gone"])
def test_damage_is_told_and_never_read_over(tmp_path: Path, damage: str) -> None:
    fill(tmp_path / "v", (0, 1, 2))
    rows, shard = tmp_path / "v/rows.jsonl", tmp_path / "v/vectors-00000.safetensors"
    lines = rows.read_text().splitlines(keepends=True)
    if damage == "line":
        rows.write_text(lines[0] + lines[2])
    elif damage == "order":
        rows.write_text(lines[1] + lines[0] + lines[2])
    elif damage == "shard":
        os.truncate(shard, 4096 + 3 * 24 - 1)
    else:
        shard.unlink()
    said = r"rows.jsonl:\d: this line does not follow" if damage in ("line", "order") else "rows there"
    with pytest.raises(DataError, match=said):
        VectorStore.open(tmp_path / "v")
    with pytest.raises(DataError, match=said):
        writer(tmp_path / "v")


# --- one space, one writer --------------------------------------------------------------------------------------------


def changed(**changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps({**SPACE, **changes}))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (changed(weights="zz"), r"other weights of the model \(weights\)"),
        (
            changed(preprocessing={"size": [256, 256], "mean": [0.5] * 3}),
            r"preprocessing.size: there \[224, 224\], now",
        ),
        (changed(pooling={"images": "head", "texts": "first"}), 'pooling.texts: there "last", now "first"'),
        (changed(normalisation="none"), 'normalisation: there "length 1", now "none"'),
        (changed(texts={"context": 16, "tokenizer": "cc"}), "texts.context: there 64, now 16"),
        (changed(texts={"context": 64, "tokenizer": "dd"}), "other tokenizer"),
        (changed(size=8), "size: there 6, now 8"),
        (changed(dtype="bfloat16"), 'dtype: there "float32", now "bfloat16"'),
    ],
)
def test_another_space_is_refused_with_every_difference(tmp_path: Path, now: dict[str, Any], said: str) -> None:
    fill(tmp_path / "v", (0,))
    with pytest.raises(ConfigError, match=said):
        writer(tmp_path / "v", space=now)
    with pytest.raises(ConfigError, match=said):
        spaces.check(VectorStore.open(tmp_path / "v").space, now, "v", writing=False)
    assert read(tmp_path / "v")[0] == ["0.png"]


def test_other_libraries_may_ask_and_may_add_only_when_told_so(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0,))
    now = changed(running={"torch": "2.11.0", "attention": "sdpa"})
    assert spaces.check(SPACE, now, "v", writing=False) == ['running.torch: there "2.13.0", now "2.11.0"']
    with pytest.raises(ConfigError, match="made with other libraries: running.torch: there"):
        writer(tmp_path / "v", space=now)
    with writer(tmp_path / "v", space=now, other_versions=True) as store:
        assert store.told == ['running.torch: there "2.13.0", now "2.11.0"']


def test_other_kind_number_format_or_content_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "v", (0,), dtype="float16")
    with pytest.raises(ConfigError, match="holds vectors of images, these are of texts"):
        writer(tmp_path / "v", kind="texts")
    with pytest.raises(ConfigError, match="holds float16 vectors, asked for float32"):
        writer(tmp_path / "v", dtype="float32")
    fill(tmp_path / "v", (1,))
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other things \(thesis.txt\)"):
        writer(tmp_path / "other")
    assert os.listdir(tmp_path / "other") == ["thesis.txt"]
    with pytest.raises(ConfigError, match="is a file"):
        writer(tmp_path / "other/thesis.txt")
    for wrong in ("nowhere", "other"):
        with pytest.raises(ConfigError, match="no vectors here"):
            VectorStore.open(tmp_path / wrong)


def test_a_second_writer_is_refused_while_the_first_is_there(tmp_path: Path) -> None:
    with writer(tmp_path / "v") as first:
        with pytest.raises(ConfigError, match="another process is adding to these vectors"):
            writer(tmp_path / "v")
        first.add(records(0), vectors(0))
        first.commit()
        assert read(tmp_path / "v")[0] == ["0.png"], "reading needs no lock"
    fill(tmp_path / "v", (1,))


def test_a_space_is_what_a_rule_does_and_not_its_words() -> None:
    model, processor = load("demo-siglip")
    known = spaces.of(model, processor)
    reworded = dataclasses.replace(processor.rule, case="small", punctuation="stays", pooled="the end", title="S2")
    assert not spaces.apart(known, spaces.of(model, dataclasses.replace(processor, rule=reworded)))
    for change in ({"clean": str.upper}, {"clean": RULES["siglip"].clean}, {"pad": "<eos>"}, {"side": "left"}):
        other = dataclasses.replace(processor, rule=dataclasses.replace(processor.rule, **change))
        assert spaces.apart(known, spaces.of(model, other)), change


def test_half_weights_compute_in_float32_on_a_cpu() -> None:
    """Where half is many times slower; and the checkpoint's own format where it is asked for."""
    assert str(load("demo-siglip", dtype="auto")[0].dtype) == "torch.float32"
    assert str(load("demo-siglip")[0].dtype) == "torch.float16"
    assert str(load("demo-siglip", dtype="bfloat16")[0].dtype) == "torch.bfloat16"
