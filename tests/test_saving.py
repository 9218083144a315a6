"""Writing a model: old or new and whole at every instant, what cannot be opened again refused, modes of the umask."""

from __future__ import annotations

import copy
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from coretools import loud, picture, shake
from safetensors import safe_open
from torch import nn

import vlm
from vlm import files
from vlm.build.presets import tiny
from vlm.checkpoints import identity, shards
from vlm.errors import CheckpointError, ConfigError, DiskError, VLMError
from vlm.exchange.importing import convert
from vlm.model.processor import Processor

Pair = tuple[vlm.VLM, vlm.Processor]


@pytest.fixture(scope="module")
def pairs() -> tuple[Pair, Pair]:
    """Two models whose files all differ."""
    one, other = tiny("siglip", "gemma"), tiny("siglip", "gemma2", "mlp")
    shake(one[0])
    shake(other[0], seed=8)
    return one, other


# --- kills ------------------------------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.truncate", "shutil.copyfile")


class Killer:
    """Ends the process, as a kill does, at the n-th operation on files below a folder."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.left = str(folder), at

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            os._exit(9)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | bytes | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.of(path)
        elif event in CHANGES:
            self.of(arguments[0])

    def of(self, path: Any) -> None:
        if os.fsdecode(path).startswith(self.folder):
            self.tick()

    def install(self) -> None:
        """Python's own operations, the exchange of directories, and weights that are written half."""
        swap, save_file = files._swap, shards.save_file

        def swapped(a: Path, b: Path) -> bool:
            self.tick()
            done = swap(a, b)
            self.tick()
            return done

        def half_written(tensors: Any, path: Path, **options: Any) -> None:
            self.tick()
            save_file(tensors, path, **options)
            if self.left == 0:
                os.truncate(path, os.stat(path).st_size // 2)
            self.tick()

        files._swap, shards.save_file = swapped, half_written  # type: ignore[assignment]
        sys.addaudithook(self.audit)


def killed_everywhere(prepare: Callable[[], Any], work: Callable[[], Any], folder: Path) -> Iterator[None]:
    """Run `work` in a child that is killed at its first operation, then at its second, and so on until it ends; yields
    after each."""
    for at in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        prepare()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                Killer(folder, at).install()
                work()
                status = 0
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        yield
        if status == 0:
            return
    raise AssertionError("the work never came to its end")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are of a forked process")
def test_a_save_that_is_killed_leaves_the_old_or_the_new(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    """At every operation on files; over a larger model in shards, with files of the user's own beside it."""
    (old, old_processor), (new, new_processor) = pairs
    place = tmp_path / "work" / "m"
    known = {identity.of_weights(old): "old", identity.of_weights(new): "new"}
    vlm.save(old, old_processor, tmp_path / "kept", max_shard_size="150KB")
    (tmp_path / "kept" / "notes").mkdir()
    for name in ("notes/mine.txt", "mine.txt"):
        (tmp_path / "kept" / name).write_text("mine")
    found = []
    runs = killed_everywhere(
        lambda: shutil.copytree(tmp_path / "kept", place),
        lambda: vlm.save(new, new_processor, place),
        tmp_path / "work",
    )
    for _ in runs:
        model, processor = vlm.load(place, verify="full")
        found.append(known[identity.of_weights(model)])
        assert processor.projector == {"old": old_processor, "new": new_processor}[found[-1]].projector
        assert (place / "mine.txt").read_text() == (place / "notes" / "mine.txt").read_text() == "mine"
        assert (len(list(place.glob("model*.safetensors"))) > 2) == (found[-1] == "old")
    assert found == sorted(found, reverse=True)  # old, old, ... new
    assert found.count("old") > 10 and found.count("new") > 2


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills are of a forked process")
def test_a_processor_that_is_killed_while_it_is_saved_leaves_the_old_or_the_new(
    pairs: tuple[Pair, Pair], tmp_path: Path
) -> None:
    (model, old), (_, other) = pairs
    new = Processor(old.tokenizer, {**old.image_transform.to_dict(), "mean": [0.1, 0.2, 0.3]}, old.projector)
    place = tmp_path / "work" / "m"
    found = []
    runs = killed_everywhere(lambda: vlm.save(model, old, place), lambda: new.save_pretrained(place), tmp_path / "work")
    for _ in runs:
        found.append(Processor.from_pretrained(place).image_transform.mean)
        assert (place / "model.safetensors").exists() and (place / "config.json").exists()
    assert set(found) == {old.image_transform.mean, new.image_transform.mean}


# --- what is refused --------------------------------------------------------------------------------------------------


class WithAdapters(nn.Module):
    """What peft's models look like from outside."""

    def __init__(self, model: vlm.VLM) -> None:
        super().__init__()
        self.base_model = model
        self.config = model.config

    def merge_and_unload(self) -> vlm.VLM:
        return self.base_model

    def save_pretrained(self, folder: Path, **_: Any) -> None:
        raise AssertionError("would have deleted what is there")


class Compiled(nn.Module):
    """What torch.compile returns, from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


class Adapted(nn.Module):
    """A linear layer that LoRA was put around in place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(layer.in_features, 2, bias=False)})


def up_proj(model: vlm.VLM) -> nn.Linear:
    layer: nn.Linear = model.model.language_model.layers[1].mlp.up_proj
    return layer


def with_lora(model: vlm.VLM) -> None:
    model.model.language_model.layers[1].mlp.up_proj = Adapted(up_proj(model))


def with_nan(model: vlm.VLM) -> None:
    up_proj(model).weight.data[3, 4] = float("nan")


def with_infinity(model: vlm.VLM) -> None:
    model.model.vision_tower.encoder.layers[1].mlp.fc1.bias.data[0] = float("-inf")


def untied(model: vlm.VLM) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)


def in_int8(model: vlm.VLM) -> None:
    up_proj(model).weight = nn.Parameter(up_proj(model).weight.detach().to(torch.int8), requires_grad=False)


def without_values(model: vlm.VLM) -> None:
    up_proj(model).to("meta")


def of_another_width(model: vlm.VLM) -> None:
    model.config.text_config.intermediate_size *= 2


def with_a_window(model: vlm.VLM) -> None:
    model.config.text_config.rms_norm_eps = float("nan")  # equal to nothing, and no JSON


def compiled(model: vlm.VLM) -> None:
    model.model.multi_modal_projector = Compiled(model.model.multi_modal_projector)


def impossible_generation(model: vlm.VLM) -> None:
    model.generation_config.num_return_sequences = 3


REFUSED: dict[str, tuple[Callable[[vlm.VLM], Any], str]] = {
    "adapters inside": (with_lora, r"adapters \(LoRA\) that are not merged: .*base_layer.weight.*merge_and_unload"),
    "nan": (with_nan, "up_proj.weight holds NaN or infinity"),
    "infinity": (with_infinity, "fc1.bias holds NaN or infinity"),
    "untied": (untied, "lm_head.weight is not the input embedding"),
    "int8": (in_int8, "1 tensors are no plain float32.*up_proj.weight int8; save the model before it is quantised"),
    "float64": (lambda model: model.double(), "float64: model.float"),
    "meta": (without_values, "up_proj.weight has no values: the model was built on the meta device"),
    "all meta": (lambda model: nn.Module.to(model, "meta"), "has no values"),
    "width": (of_another_width, r"have another shape: .*down_proj.weight \(32, 64\)"),
    "compiled part": (compiled, "multi_modal_projector._orig_mod.* wraps or replaces parts of the model"),
    "no number": (with_a_window, "could not be opened again|would be another model"),
    "generation": (impossible_generation, "generation_config contradicts itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_be_opened_again_is_refused_and_the_old_model_stays(
    name: str, pairs: tuple[Pair, Pair], tmp_path: Path
) -> None:
    (good, processor), _ = pairs
    vlm.save(good, processor, tmp_path / "m")
    before = {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()}
    change, message = REFUSED[name]
    model = copy.deepcopy(good)
    change(model)
    with pytest.raises(VLMError, match=message):
        vlm.save(model, processor, tmp_path / "m")
    assert {file.name: file.read_bytes() for file in (tmp_path / "m").iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]
    with pytest.raises(VLMError, match=message):
        vlm.save(model, processor, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_classes_are_refused_with_what_to_do(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    (model, processor), _ = pairs
    cases: list[tuple[Any, str]] = [
        (WithAdapters(model), r"a WithAdapters is a model with adapters \(LoRA\).*model.merge_and_unload\(\)"),
        (Compiled(model), "a Compiled wraps the model; save model._orig_mod"),
        (model.model, "a VLMModel is a model without its output layer"),
        (nn.Linear(2, 2), "the model is a Linear, expected a vlm.VLM"),
        (None, "the model is a NoneType"),
    ]
    for other, message in cases:
        with pytest.raises(ConfigError, match=message):
            vlm.save(other, processor, tmp_path / "m")
    with pytest.raises(ConfigError, match="the processor is a GemmaTokenizer, expected a vlm.Processor"):
        vlm.save(model, processor.tokenizer, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    vlm.save(WithAdapters(model).merge_and_unload(), processor, tmp_path / "m")


def test_an_equal_copy_of_the_embedding_is_a_tie(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    model, processor = copy.deepcopy(pairs[0][0]), pairs[0][1]
    known = identity.of_weights(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    vlm.save(model, processor, tmp_path / "m")
    assert identity.of_weights(vlm.load(tmp_path / "m")[0]) == known


def test_numbers_that_are_none_are_written_when_asked_for(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    model = copy.deepcopy(pairs[0][0])
    with_nan(model)
    vlm.save(model, pairs[0][1], tmp_path / "m", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="holds NaN"):
        vlm.load(tmp_path / "m")
    again, _ = vlm.load(tmp_path / "m", allow_nonfinite=True)
    assert torch.equal(up_proj(again).weight.view(torch.int32), up_proj(model).weight.view(torch.int32))
    convert(tmp_path / "m", tmp_path / "n", dtype="bfloat16", allow_nonfinite=True)


def test_an_offloaded_model_is_saved_whole(tmp_path: Path) -> None:
    model, processor = loud("siglip", "gemma")
    vlm.save(model, processor, tmp_path / "m")
    places = {"model.vision_tower": "disk", "model.multi_modal_projector": "cpu", "model.language_model": "disk"}
    parted, _ = vlm.load(tmp_path / "m", device_map=places, offload_folder=tmp_path / "off")
    vlm.save(parted, processor, tmp_path / "n", max_shard_size="60KB")
    assert identity.of_weights(vlm.load(tmp_path / "n", verify="full")[0]) == identity.of_weights(model)


def test_a_file_at_the_place_stays(pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for path, error in ((tmp_path / "file", ConfigError), (tmp_path / "file" / "m", DiskError)):
        with pytest.raises(error, match="file"):
            vlm.save(*pairs[0], path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("what", ["weights", "tokenizer", "json"])
def test_a_full_disk_leaves_the_old_model_and_is_told_in_a_line(
    what: str, pairs: tuple[Pair, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the errors that the libraries raise for it."""
    from safetensors import SafetensorError
    from transformers import PreTrainedTokenizerBase

    (old, processor), (new, new_processor) = pairs
    vlm.save(old, processor, tmp_path / "m")

    def full(*_: Any, **__: Any) -> None:
        if what == "weights":
            raise SafetensorError('Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "" }')
        if what == "tokenizer":
            raise Exception("No space left on device (os error 28)")  # as the tokenizers library does
        raise OSError(28, "No space left on device")

    owner, name = {
        "weights": (shards, "save_file"),
        "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
        "json": (Path, "write_text"),
    }[what]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(DiskError, match=r"cannot write .*m: No space left on device; make room"):
        vlm.save(new, new_processor, tmp_path / "m")
    if what == "json":  # as an export's own files are written
        monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CheckpointError, match="out: cannot be written: .*No space left on device"):
        vlm.export(old, processor, tmp_path / "out", parity="none")
    monkeypatch.undo()
    assert identity.of_weights(vlm.load(tmp_path / "m", verify="full")[0]) == identity.of_weights(old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m"]


# --- dtypes -----------------------------------------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: (file.get_slice(name).get_dtype(), file.get_tensor(name)) for name in file.keys()}


@pytest.mark.parametrize(
    ("encoder", "decoder", "parts"),
    [
        ("siglip", "gemma", {"encoder": "bfloat16"}),
        ("siglip2_naflex", "gemma2", {"decoder": "bfloat16"}),
        ("clip", "gemma3_text", {"projector": "bfloat16"}),
        ("dinov2", "gemma", {"encoder": "float16", "decoder": "bfloat16"}),
    ],
)
def test_every_tensor_keeps_its_dtype(encoder: str, decoder: str, parts: dict[str, str], tmp_path: Path) -> None:
    model, processor = tiny(encoder, decoder)
    shake(model)
    batch = processor([picture(1)], ["caption en"])
    with torch.no_grad():
        exact = model(**batch).logits
    for part, dtype in parts.items():
        for parameter in model.parts()[part].parameters():  # not the computed tables, which stay float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
    vlm.save(model, processor, tmp_path / "m")
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    for name, (dtype, tensor) in stored(tmp_path / "m").items():
        assert dtype == names[model.state_dict()[name].dtype]
        assert torch.equal(tensor, model.state_dict()[name])
    again, processor2 = vlm.load(tmp_path / "m")
    for name, tensor in model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype and torch.equal(again.state_dict()[name], tensor), name
    assert identity.of_model(again, processor2)["weights_sha256"] == identity.of_weights(model)
    with torch.no_grad():
        found = again(**batch).logits
    assert torch.equal(found, model(**batch).logits)
    assert (found - exact).abs().max() < 0.1 * exact.abs().max()  # only rounded
    assert len(vlm.generate(again, processor2, [picture(1)], ["caption en"], max_new_tokens=3)) == 1
    placed, _ = vlm.load(tmp_path / "m", device_map={"": "cpu"})
    assert {n: p.dtype for n, p in placed.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    whole, _ = vlm.load(tmp_path / "m", dtype="float32")
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}


def test_dtypes_that_cannot_be_multiplied_come_back_and_are_told(tmp_path: Path) -> None:
    """Inside a part every tensor keeps its dtype too; running it is refused in a sentence, and one dtype opens it."""
    model, processor = tiny()
    shake(model)
    up_proj(model).weight.data = up_proj(model).weight.data.bfloat16()
    vlm.save(model, processor, tmp_path / "m")
    again, _ = vlm.load(tmp_path / "m")
    assert {n: p.dtype for n, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    for act in (
        lambda: again(**processor([picture(1)], ["caption en"])),
        lambda: again(**processor([picture(1)], ["caption en"], ["no"])),
        lambda: vlm.generate(again, processor, [picture(1)], ["caption en"]),
    ):
        with pytest.raises(ConfigError, match="float32 and bfloat16 in language_model; .*dtype='float32'"):
            act()
    whole, _ = vlm.load(tmp_path / "m", dtype="float32")
    assert torch.isfinite(whole(**processor([picture(1)], ["caption en"])).logits).all()


def test_an_export_loses_nothing_of_the_widest_part(tmp_path: Path) -> None:
    """PaliGemma's readers know one dtype: the narrowest that holds all. bfloat16 and float16 need float32."""
    model, processor = tiny()
    shake(model)
    for part, dtype in {"encoder": torch.float16, "projector": torch.bfloat16, "decoder": torch.bfloat16}.items():
        for parameter in model.parts()[part].parameters():
            parameter.data = parameter.data.to(dtype)
    report = vlm.export(model, processor, tmp_path / "p")
    assert report.ok and report.dtype == "float32"
    state = vlm.load(tmp_path / "p")[0].state_dict()
    assert all(torch.equal(state[name], tensor.float()) for name, tensor in model.state_dict().items())


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_what_is_written_has_the_users_mode(umask: int, pairs: tuple[Pair, Pair], tmp_path: Path) -> None:
    """Files 0666 and directories 0777 without the umask, whatever library writes them."""
    model, processor = pairs[0]
    vlm.save(model, processor, tmp_path / "m")
    vlm.save(model, processor, tmp_path / "shards", max_shard_size="60KB")
    vlm.save(model, processor, tmp_path / "shards", max_shard_size="90KB")  # over another
    processor.save_pretrained(tmp_path / "processor")
    vlm.export(model, processor, tmp_path / "paligemma", parity="none")
    vlm.export(model, processor, tmp_path / "tower", to="tower", parity="none")
    convert(tmp_path / "m", tmp_path / "imported", dtype="bfloat16", parity="none")
    wrong = {
        str(path.relative_to(tmp_path)): oct(mode)
        for path in tmp_path.rglob("*")
        if (mode := stat.S_IMODE(path.stat().st_mode)) != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert wrong == {}
