"""The batch builder, id by id: layout, padding, truncation, labels, errors that name the sample."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from coretools import loud, picture

from vlm.build.presets import tiny
from vlm.errors import CheckpointError, ConfigError, DataError, ImageError
from vlm.model.batch import Batch
from vlm.model.processor import ImageSource, Processor
from vlm.text.prompts import PromptEncoder, answer
from vlm.text.tokenizer import TextEncoder

HOSTILE = "<image> <bos> <eos> <pad> <mask> <loc0001> ＜eos＞"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return tiny()[1]


def words(processor: Processor, text: str) -> list[int]:
    """Ids of ordinary text, straight from the tokenizer."""
    return processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_training_layout_is_exact(processor: Processor) -> None:
    """[image x 4] BOS prefix \\n suffix EOS, then padding on the right; every field by hand."""
    image, newline = processor.image_token_id, words(processor, "\n")
    assert len(newline) == 1
    long, short = words(processor, "caption en"), words(processor, "no")
    first, second = words(processor, "a red square"), words(processor, "yes")
    batch = processor([picture(1), picture(2)], ["caption en", "no"], ["a red square", "yes"], ids=["x", "y"])
    rows = [
        [image] * 4 + [2] + long + newline + first + [1],
        [image] * 4 + [2] + short + newline + second + [1],
    ]
    width = len(rows[0])
    padding = width - len(rows[1])
    assert padding > 0
    assert batch.input_ids.tolist() == [rows[0], rows[1] + [0] * padding]
    assert batch.attention_mask.tolist() == [[1] * width, [1] * len(rows[1]) + [0] * padding]
    targets = [first + [1], second + [1]]
    heads = [len(row) - len(target) for row, target in zip(rows, targets, strict=True)]
    assert batch.labels is not None
    assert batch.labels.tolist() == [
        [-100] * heads[0] + targets[0],
        [-100] * heads[1] + targets[1] + [-100] * padding,
    ]
    assert batch.token_type_ids.tolist() == [
        [0] * heads[0] + [1] * len(targets[0]),
        [0] * heads[1] + [1] * len(targets[1]) + [0] * padding,
    ]
    assert batch.position_ids.tolist() == [list(range(width)), list(range(len(rows[1]))) + [0] * padding]
    assert batch.pixel_values is not None and batch.pixel_values.shape == (2, 3, 28, 28)
    assert batch.sequence_ids is None and batch.ids == ["x", "y"] and batch.truncated == [] and len(batch) == 2
    for name in batch.keys():
        assert batch[name].dtype == (torch.float32 if name == "pixel_values" else torch.int64)


def test_generation_layout_is_exact(processor: Processor) -> None:
    """The same without suffix and EOS, padding on the left, no labels."""
    image, newline = processor.image_token_id, words(processor, "\n")
    batch = processor([picture(1), picture(2)], ["caption en", "no"])
    rows = [[image] * 4 + [2] + words(processor, text) + newline for text in ("caption en", "no")]
    padding = len(rows[0]) - len(rows[1])
    assert batch.input_ids.tolist() == [rows[0], [0] * padding + rows[1]]
    assert batch.attention_mask.tolist() == [[1] * len(rows[0]), [0] * padding + [1] * len(rows[1])]
    assert batch.position_ids.tolist()[1] == [0] * padding + list(range(len(rows[1])))
    assert not batch.token_type_ids.any() and batch.labels is None and "labels" not in batch.keys()


def test_segments_are_tokenised_separately(processor: Processor) -> None:
    """A piece that would span prefix and suffix does not form: ids are those of the segments."""
    encode = TextEncoder(processor.tokenizer)
    for prefix, suffix in (("a r", "ed square"), ("caption", " en"), ("x\n", "\ny"), ("", "a"), ("a ", " b")):
        batch = processor([picture(1)], [prefix], [suffix])
        ids = batch.input_ids[0].tolist()
        assert ids[4:] == [2, *encode(prefix), *encode("\n"), *encode(suffix), 1]
    whole = encode("a red square")
    batch = processor([picture(1)], ["a r"], ["ed square"])
    assert batch.labels is not None and batch.labels[0][batch.labels[0] >= 0].tolist()[:-1] != whole


@pytest.mark.parametrize("where", ["prefix", "suffix"])
def test_special_text_is_data(processor: Processor, where: str) -> None:
    """Exactly our own placeholders, one BOS, one EOS: whatever the user types; the text survives."""
    texts = {"prefix": "caption en", "suffix": "a red square", where: HOSTILE}
    batch = processor([picture(1)], [texts["prefix"]], [texts["suffix"]])
    ids = batch.input_ids[0].tolist()
    mask = processor.tokenizer.convert_tokens_to_ids("<mask>")
    counts = [ids.count(i) for i in (processor.image_token_id, 2, 1, 0, mask)]
    assert counts == [4, 1, 1, 0, 0]
    assert batch.labels is not None
    targets = batch.labels[0][batch.labels[0] >= 0].tolist()
    assert processor.batch_decode([targets]) == [texts["suffix"]]
    prefix = ids[5 : len(ids) - len(targets) - 1]
    assert processor.tokenizer.decode(prefix) == texts["prefix"]


def test_decoding_stops_at_eos_and_drops_control(processor: Processor) -> None:
    square, no = words(processor, "a square"), words(processor, "no")
    assert processor.batch_decode(torch.tensor([[*no, 1, *square[:1], 0]])) == ["no"]
    assert processor.decode([2, *square, 0, 0]) == "a square"
    loc = processor.tokenizer.convert_tokens_to_ids("<loc0012>")
    assert processor.decode([loc, *no, 1]) == "<loc0012>no"
    unused = tiny()[0].config.text_config.vocab_size - 1
    assert unused > max(processor.tokenizer.get_vocab().values())
    assert processor.decode([unused, *no]) == "no"


def test_truncation_cuts_the_suffix_only(processor: Processor, caplog: pytest.LogCaptureFixture) -> None:
    head = [2, *words(processor, "caption en"), *words(processor, "\n")]
    tail = words(processor, "a green circle left of a blue triangle")
    limit = len(head) + 3
    with caplog.at_level(logging.WARNING):
        batch = processor(
            [picture(1), picture(2)],
            ["caption en", "caption en"],
            ["a green circle left of a blue triangle", "no"],
            ids=["long", "short"],
            max_text_length=limit,
        )
    ids = batch.input_ids[0].tolist()
    assert ids == [processor.image_token_id] * 4 + head + tail[:3]  # no EOS after a cut, no image token lost
    assert 1 in batch.input_ids[1].tolist()
    assert batch.truncated == ["long"]
    assert "long" in caplog.text and "short" not in caplog.text and str(limit) in caplog.text
    assert batch.labels is not None and batch.labels[0].tolist() == [-100] * (4 + len(head)) + tail[:3]


def test_length_limit_to_the_token(processor: Processor) -> None:
    """BOS, newline and EOS count, image tokens do not: exactly fitting is not cut, one less is."""
    full = 1 + len(words(processor, "no")) + 1 + len(words(processor, "yes")) + 1
    for limit, cut in ((full, []), (full - 1, ["0"]), (None, [])):
        batch = processor([picture(1)], ["no"], ["yes"], max_text_length=limit)
        assert batch.truncated == cut
        assert (1 in batch.input_ids[0].tolist()) == (not cut)


def test_prefix_that_does_not_fit(processor: Processor) -> None:
    head = 2 + len(words(processor, "caption en"))
    with pytest.raises(DataError, match=rf"'b'.*takes {head} tokens.*at most {head - 1}"):
        processor([picture(1)] * 2, ["", "caption en"], ["a", "a"], ids=["a", "b"], max_text_length=head - 1)
    with pytest.raises(DataError, match=r"'0'.*leaves none to supervise"):
        processor([picture(1)], ["caption en"], ["yes"], max_text_length=head)
    assert processor([picture(1)], ["caption en"], max_text_length=head).input_ids.shape[1] == 4 + head
    with pytest.raises(DataError, match="'0'"):
        processor([picture(1)], ["caption en"], max_text_length=head - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], []), "batch is empty"),
        (([], []), "batch is empty"),
        ((None, []), "batch is empty"),
        (([1], ["a", "b"], ["c", "d"]), "2 text, 2 ids, 1 images, 2 suffix"),
        (([1, 2], ["a", "b"], ["c"]), "2 images, 1 suffix"),
        (([1], [3], ["c"]), "sample '0': the prefix is int"),
        (([1], ["a"], [None]), "sample '0'"),
        (([1], ["a\ud800"], ["c"]), "sample '0', prefix: .*surrogate"),
        (([1], ["a"], ["c" * 100_001]), "sample '0', suffix: .*100,001"),
    ],
)
def test_errors_name_the_sample(processor: Processor, arguments: tuple, message: str) -> None:
    images, *texts = arguments
    images = None if images is None else [picture(seed) for seed in images]
    with pytest.raises(DataError, match=message):
        processor(images, *texts)


def test_unequal_ids(processor: Processor) -> None:
    with pytest.raises(DataError, match="2 ids"):
        processor([picture(1)], ["a"], ids=["x", "y"])


def test_a_bad_image_names_its_sample(processor: Processor, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(ImageError, match="sample 'second'.*broken.png") as caught:
        processor([picture(1), broken], ["a", "b"], ids=["first", "second"])
    assert caught.value.code == "not-an-image"
    with pytest.raises(ImageError, match="sample 'only'") as caught:
        processor([[picture(1), tmp_path / "absent.png"]], ["a"], ids=["only"])
    assert caught.value.code == "missing"


def test_images_from_paths_bytes_and_pillow(processor: Processor, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    picture(3, (40, 30)).save(file)
    sources: list[ImageSource] = [file, str(file), file.read_bytes(), picture(3, (40, 30))]
    values = processor(sources, ["no"] * 4).pixel_values
    assert values is not None and all(torch.equal(values[0], value) for value in values)
    single = processor(str(file), "no").pixel_values
    assert single is not None and torch.equal(single[0], values[0])


def test_several_images_per_sample(processor: Processor) -> None:
    batch = processor([[picture(1), picture(2)], [], [picture(3)]], ["no"] * 3, ["yes"] * 3)
    assert (batch.input_ids == processor.image_token_id).sum(1).tolist() == [8, 0, 4]
    assert batch.pixel_values is not None and batch.pixel_values.shape[0] == 3
    text_only = processor(None, ["no"], ["yes"])
    assert text_only.pixel_values is None and "pixel_values" not in text_only.keys()


def test_batch_splats_moves_and_pins(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = processor([picture(1)], ["no"], ["yes"], ids=["n"])
    assert set({**batch}) == {
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "labels",
        "pixel_values",
    }
    meta = batch.to("meta")
    assert isinstance(meta, Batch) and all(meta[name].is_meta for name in meta.keys()) and meta.ids == ["n"]
    assert not batch.input_ids.is_meta
    pinned = []

    def pin(tensor: torch.Tensor, *_: object) -> torch.Tensor:
        pinned.append(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    assert batch.pin_memory().ids == ["n"] and len(pinned) == 6
    with pytest.raises(KeyError):
        batch["ids"]


def test_the_model_takes_the_batch(processor: Processor) -> None:
    model, _ = loud("siglip", "gemma")
    batch = processor([picture(1)] * 2, ["no", "caption en"], ["yes", "a red square"])
    assert batch.labels is not None
    assert float(model(**batch).loss_weight) == int((batch.labels != -100).sum())


def test_prompts() -> None:
    assert answer("what color?") == "answer en what color?"

    class NoPad:
        bos_token_id, eos_token_id, pad_token_id = 2, 1, None

    with pytest.raises(ConfigError, match="no pad_token_id"):
        PromptEncoder(NoPad())


def test_saved_processor_is_the_same(processor: Processor, tmp_path: Path) -> None:
    naflex = tiny("siglip2_naflex", image={"max_num_patches": 9, "background": (1, 2, 3)})[1]
    for name, original in (("a", processor), ("b", naflex)):
        original.save_pretrained(tmp_path / name)
        again = Processor.from_pretrained(tmp_path / name)
        assert again.image_transform == original.image_transform
        images = [picture(1, (50, 31)), picture(2, (20, 70))]
        one, two = (p(images, ["no", HOSTILE], ["yes", "a <eos>"]) for p in (original, again))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one.keys())


def test_broken_processor_directories(processor: Processor, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no processor_config.json"):
        Processor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_transform"]["image_sise"] = 3
    file.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="did you mean 'image_size'"):
        Processor.from_pretrained(tmp_path)
    file.write_text(json.dumps({"processor_class": "PaliGemmaProcessor"}))
    with pytest.raises(CheckpointError, match="written by 'PaliGemmaProcessor'"):
        Processor.from_pretrained(tmp_path)


def test_an_empty_suffix_teaches_to_stop(processor: Processor) -> None:
    """Nothing to say is something to learn: EOS, alone supervised, also where there is room for one token only."""
    newline = words(processor, "\n")
    batch = processor(None, ["detect cat", "a"], ["", "b"], ids=["none", "some"])
    head = [2, *words(processor, "detect cat"), *newline]
    row, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()  # type: ignore[index]
    assert row[: len(head) + 1] == [*head, 1] and labels[: len(head) + 1] == [-100] * len(head) + [1]
    assert set(labels[len(head) + 1 :]) <= {-100} and batch.token_type_ids[0].sum() == 1
    tight = processor(None, ["detect cat"], [""], max_text_length=len(head) + 1)
    assert tight.input_ids[0].tolist() == [*head, 1] and tight.truncated == []
    with pytest.raises(DataError, match="leaves none to supervise"):
        processor(None, ["detect cat"], [""], max_text_length=len(head))


def test_samples_of_text_alone_stand_beside_others(processor: Processor) -> None:
    """None and [] are no image; the rows with images are those of a batch without the others."""
    image = processor.image_token_id
    mixed = processor([None, picture(1), [], [picture(2), picture(3)]], ["a", "b", "c", "d"], ["x"] * 4)
    assert (mixed.input_ids == image).sum(1).tolist() == [0, 4, 0, 8]
    alone = processor([picture(1), [picture(2), picture(3)]], ["b", "d"], ["x"] * 2)
    assert mixed.pixel_values is not None and alone.pixel_values is not None
    assert torch.equal(mixed.pixel_values, alone.pixel_values)
    assert processor([None, []], ["a", "b"], ["x"] * 2).pixel_values is None
    with pytest.raises(DataError, match="sample 1: one of its images is None"):
        processor([picture(1), [picture(2), None]], ["a", "b"])
