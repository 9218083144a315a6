"""Google's original code against ours, through the importer, the processor and the model: golden cases made by running
big_vision on JAX (tests/data/big_vision/README.md), and every layout in which it stores parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import big_vision_adapter as adapter
import numpy as np
import pytest
import torch

import vlm
from vlm import siglip
from vlm.build.presets import TINY_CORPUS
from vlm.checkpoints import big_vision, big_vision_model
from vlm.checkpoints.big_vision_configs import paligemma_config
from vlm.errors import CheckpointError
from vlm.text import tokenizer as tokenizers

DATA = Path(__file__).parent / "data" / "big_vision"
Arrays = dict[str, np.ndarray]


def golden(name: str) -> Arrays:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def part(arrays: Arrays, prefix: str) -> Arrays:
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def config(arrays: Arrays) -> dict[str, Any]:
    return json.loads(str(arrays["config"]))


def distance(got: Any, wanted: Any) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert got.shape == wanted.shape
    return float(np.abs(got - wanted).max())


def worst_gradient(got: Arrays, wanted: Arrays) -> float:
    """Largest relative difference; the gradient of a key bias is zero in theory."""
    assert set(wanted) <= set(got)
    return max(distance(got[k], w) / (np.abs(w).max() + 1e-12) for k, w in wanted.items() if "key/bias" not in k)


def first_tokens(ids: Any, eos: int) -> list[list[int]]:
    rows = [list(map(int, row)) for row in ids]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


# --- PaliGemma --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paligemma() -> tuple[adapter.PaliGemma, Arrays]:
    case = golden("paligemma")
    return adapter.paligemma(part(case, "params/"), config(case)), case


def test_paligemma_forward(paligemma: tuple[adapter.PaliGemma, Arrays]) -> None:
    model, case = paligemma
    inputs = part(case, "in/")
    assert distance(model.image_features(inputs), case["out/zimg"]) < 2e-5
    assert distance(model.text_embeddings(inputs)[:1], case["out/ztxt"]) < 1e-6
    logits = model.text_logits(inputs)[inputs["valid_text"]]
    assert distance(logits, case["out/text_logits"]) < 3e-5
    assert np.abs(case["out/text_logits"]).max() > 0.5  # not a comparison of zeros


def test_paligemma_loss_and_gradients(paligemma: tuple[adapter.PaliGemma, Arrays]) -> None:
    model, case = paligemma
    inputs = part(case, "in/")
    assert distance(model.loss(inputs), case["out/loss"]) < 2e-5
    assert worst_gradient(model.grads(inputs), part(case, "grad/")) < 5e-5


def test_paligemma_decoding(paligemma: tuple[adapter.PaliGemma, Arrays]) -> None:
    model, case = paligemma
    inputs, eos = part(case, "in/"), config(case)["eos"]
    for wanted, got in (
        (case["dec/greedy_tokens"], model.greedy(inputs, 12, eos)),
        (case["dec/beam3_tokens"], model.beam(inputs, 12, eos, 3)),
    ):
        assert first_tokens(got, eos) == first_tokens(wanted, eos)


# --- SigLIP and NaFlex ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["siglip", "naflex"])
def test_two_towers(name: str) -> None:
    case = golden(name)
    model, inputs = adapter.TwoTowers(part(case, "params/"), config(case)), part(case, "in/")
    assert distance(model.image_pooled(inputs), case["out/img_head_input"]) < 2e-5
    assert distance(model.text_pooled(inputs), case["out/txt_logits"]) < 2e-5
    assert distance(model.logits(inputs), case["out/logits"]) < 2e-5
    loss, gradients = model.loss_and_grads(inputs)
    assert abs(loss - float(case["out/loss"])) < 1e-5
    assert worst_gradient(gradients, part(case, "grad/")) < 5e-5
    assert model.model.kind == ("siglip" if name == "siglip" else "siglip2_naflex")


def test_naflex_positions_at_every_grid() -> None:
    case = golden("naflex")
    table = case["params/img/pos_embedding"]
    grids = part(case, "posemb/")
    assert "64x1" in grids  # one column, where torch's own resize is wrong
    for name, wanted in grids.items():
        rows, columns = map(int, name.split("x"))
        assert distance(adapter.posemb(table, rows, columns), wanted) < 5e-6, name


# --- layouts ----------------------------------------------------------------------------------------------------------


def unstacked(arrays: Arrays) -> Arrays:
    """Stacked layers as big_vision names them one by one."""
    result: Arrays = {}
    for name, array in arrays.items():
        for stacked, single in (("encoderblock/", "encoderblock_{}/"), ("llm/layers/", "llm/layers/{}/")):
            if stacked in name:
                for i, layer in enumerate(array):
                    result[name.replace(stacked, single.format(i))] = layer
                break
        else:
            result[name] = array
    return result


def bfloat16(arrays: Arrays) -> Arrays:
    """As numpy stores bfloat16: two raw bytes."""
    return {k: torch.from_numpy(v).bfloat16().view(torch.uint16).numpy().view("V2") for k, v in arrays.items()}


LAYOUTS: dict[str, tuple[Callable[[Arrays], Arrays], str, torch.dtype]] = {
    "stacked": (lambda arrays: arrays, "", torch.float32),
    "loop": (unstacked, "params/", torch.float32),
    "half": (lambda arrays: {k: v.astype(np.float16) for k, v in arrays.items()}, "params/", torch.float16),
    "bfloat16": (bfloat16, "params/", torch.bfloat16),
}


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sentencepiece import SentencePieceTrainer

    folder = tmp_path_factory.mktemp("tokenizer")
    SentencePieceTrainer.train(
        sentence_iterator=iter(TINY_CORPUS * 20),
        model_prefix=str(folder / "t"),
        model_type="bpe",
        vocab_size=400,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "\n", "\n\n", "\t"],
        minloglevel=2,
    )
    return folder / "t.model"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stored_layout_gives_the_same_model(layout: str, tmp_path: Path, sentencepiece_file: Path) -> None:
    """From a file, with its tokenizer, and then through a directory of our own."""
    change, prefix, dtype = LAYOUTS[layout]
    case = part(golden("paligemma"), "params/")
    np.savez(tmp_path / "model.npz", **{prefix + k: v for k, v in change(case).items()})  # type: ignore[arg-type]
    model, processor = vlm.load(tmp_path / "model.npz", tokenizer=sentencepiece_file, force_fp16=True)
    wanted = adapter.PaliGemma(case, config(golden("paligemma"))).model.state_dict()
    assert model.dtype == dtype
    for name, tensor in model.state_dict().items():
        rows = wanted[name].shape[0] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else None
        assert torch.equal(tensor[:rows], wanted[name].to(dtype)), name
    vlm.save(model, processor, tmp_path / "saved")
    again, processor2 = vlm.load(tmp_path / "saved", force_fp16=True)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())
    assert processor2.image_transform == processor.image_transform
    assert processor2.image_transform.rounding == "down"


def test_placeholder_rows_are_the_mean_and_the_rest_is_untouched(sentencepiece_file: Path) -> None:
    case = part(golden("paligemma"), "params/")
    tokenizer = tokenizers.from_sentencepiece(sentencepiece_file)
    tokenizers.add_image_tokens(tokenizer)
    model, processor = big_vision_model.paligemma(case, tokenizer)
    table: Any = model.get_input_embeddings().weight
    stored = case["llm/embedder/input_embedding"]
    assert table.shape[0] % 64 == 0 and table.shape[0] > processor.image_token_id >= len(stored)
    assert np.array_equal(table[: len(stored)].detach().numpy(), stored)
    assert np.allclose(table[len(stored) :].detach().numpy(), stored.mean(0), atol=1e-6)


def test_einsum_axes_against_numpy() -> None:
    """Gemma 2's arrays, fused and not, applied as big_vision applies them, give what the linear layers give."""
    rng = np.random.default_rng(0)
    width, heads, kv, dim, mlp = 24, 4, 2, 6, 40
    x = rng.standard_normal((5, width)).astype(np.float32)
    for groups in (kv, heads):
        arrays = gemma2_arrays(rng, width, heads, groups, dim, mlp)
        model = big_vision_model.paligemma_model(arrays, 49)
        layer: Any = model.model.language_model.layers[1]
        prefix = "llm/layers/1/"
        if groups == heads:
            q, k, v = np.einsum("SD,3KDH->3SKH".replace("3", "c"), x, arrays[prefix + "attn/qkv_einsum/w"])
        else:
            q = np.einsum("TD,NDH->TNH", x, arrays[prefix + "attn/q_einsum/w"])
            k, v = np.einsum("SD,cKDH->cSKH", x, arrays[prefix + "attn/kv_einsum/w"])
        gate, up = (x @ w for w in arrays[prefix + "mlp/gating_einsum"])
        encoded = rng.standard_normal((5, heads, dim)).astype(np.float32)
        out = np.einsum("TNH,NHD->TD", encoded, arrays[prefix + "attn/attn_vec_einsum/w"])
        tensor = torch.from_numpy(x)
        with torch.no_grad():
            for module, wanted in (
                (layer.self_attn.q_proj, q),
                (layer.self_attn.k_proj, k),
                (layer.self_attn.v_proj, v),
                (layer.mlp.gate_proj, gate),
                (layer.mlp.up_proj, up),
            ):
                assert distance(module(tensor).numpy(), wanted.reshape(5, -1)) < 1e-5
            assert distance(layer.self_attn.o_proj(torch.from_numpy(encoded.reshape(5, -1))).numpy(), out) < 1e-5
        for name in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
            theirs = {
                "pre_attention_norm": layer.input_layernorm,
                "post_attention_norm": layer.post_attention_layernorm,
                "pre_ffw_norm": layer.pre_feedforward_layernorm,
                "post_ffw_norm": layer.post_feedforward_layernorm,
            }[name]
            assert np.array_equal(theirs.weight.detach().numpy(), arrays[f"{prefix}{name}/scale"])


def gemma2_arrays(rng: np.random.Generator, width: int, heads: int, kv: int, dim: int, mlp: int) -> Arrays:
    """A tiny PaliGemma 2 in big_vision's layout, layers one by one."""
    vit = part(golden("paligemma"), "params/img/")
    shapes = {"embedder/input_embedding": (50, width), "final_norm/scale": (width,)}
    for i in range(2):
        shapes |= {
            f"layers/{i}/attn/attn_vec_einsum/w": (heads, dim, width),
            f"layers/{i}/mlp/gating_einsum": (2, width, mlp),
            f"layers/{i}/mlp/linear": (mlp, width),
        }
        norms = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
        shapes |= {f"layers/{i}/{norm}/scale": (width,) for norm in norms}
        if kv == heads:
            shapes[f"layers/{i}/attn/qkv_einsum/w"] = (3, heads, width, dim)
        else:
            shapes[f"layers/{i}/attn/q_einsum/w"] = (heads, width, dim)
            shapes[f"layers/{i}/attn/kv_einsum/w"] = (2, kv, width, dim)
    arrays = {f"llm/{k}": rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    arrays |= {f"img/{k}": v for k, v in vit.items() if not k.startswith("head/")}
    return arrays | {
        "img/head/kernel": rng.standard_normal((32, width)).astype(np.float32),
        "img/head/bias": np.zeros(width, np.float32),
    }


def numpy_decoder(
    arrays: Arrays, x: np.ndarray, prefix: int, attention_cap: float, scale: float, layers: int
) -> np.ndarray:
    """Logits float[S, V] of embedded tokens float[S, D] by Gemma 2's formulas, float64, written from big_vision's."""
    length = len(x)
    mask = np.tril(np.ones((length, length), bool))
    mask[:prefix, :prefix] = True

    def norm(v: np.ndarray, name: str) -> np.ndarray:
        return v / np.sqrt((v**2).mean(-1, keepdims=True) + 1e-6) * (1 + arrays[f"llm/{name}/scale"].astype(np.float64))

    def rotate(v: np.ndarray) -> np.ndarray:
        half = v.shape[-1] // 2
        angle = np.arange(length)[:, None, None] / 10_000 ** (2 / v.shape[-1] * np.arange(half))
        a, b = v[..., :half], v[..., half:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    for i in range(layers):
        at = f"layers/{i}/"
        h = norm(x, at + "pre_attention_norm")
        q = rotate(np.einsum("TD,NDH->TNH", h, arrays[f"llm/{at}attn/q_einsum/w"])) * scale
        k, v = np.einsum("SD,cKDH->cSKH", h, arrays[f"llm/{at}attn/kv_einsum/w"])
        groups = q.shape[1] // k.shape[1]
        k, v = np.repeat(rotate(k), groups, 1), np.repeat(v, groups, 1)
        scores = np.einsum("TNH,SNH->NTS", q, k)
        scores = np.where(mask, np.tanh(scores / attention_cap) * attention_cap, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("NTS,SNH->TNH", weights / weights.sum(-1, keepdims=True), v)
        out = np.einsum("TNH,NHD->TD", mixed, arrays[f"llm/{at}attn/attn_vec_einsum/w"])
        x = x + norm(out, at + "post_attention_norm")
        h = norm(x, at + "pre_ffw_norm")
        gate, up = (h @ w for w in arrays[f"llm/{at}mlp/gating_einsum"])
        gelu = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + norm((gelu * up) @ arrays[f"llm/{at}mlp/linear"], at + "post_ffw_norm")
    return norm(x, "final_norm") @ arrays["llm/embedder/input_embedding"].astype(np.float64).T


@pytest.mark.parametrize("per_head", [False, True])
def test_gemma2_logits_against_numpy(per_head: bool) -> None:
    """Soft-caps, query scale, four norms, grouped heads, prefix mask: the whole decoder, uncapped and capped."""
    width, heads, dim = 24, 4, 8
    arrays = gemma2_arrays(np.random.default_rng(3), width, heads, 2, dim, 40)
    arrays = {k: (v * 0.4).astype(np.float32) if k.startswith("llm/") else v for k, v in arrays.items()}
    llm = {
        "attn_logits_softcap": 2.0,
        "final_logits_softcap": 3.0,
        "query_pre_attn_norm": "rsqrt_emb_per_head" if per_head else "rsqrt_head_dim",
    }
    model = adapter.PaliGemma(arrays, {"llm": llm, "image_token": 49})
    case = part(golden("paligemma"), "in/")
    text = np.array([[2, 7, 11, 30, 5, 9, 1, 0]])
    batch = {"image": case["image"][:1], "text": text, "mask_ar": np.array([[0, 0, 0, 0, 1, 1, 1, 1]])}
    tokens = np.concatenate([model.image_features(batch)[0], model.text_embeddings(batch)[0]]).astype(np.float64)
    scale = (width / heads if per_head else dim) ** -0.5
    wanted = numpy_decoder(arrays, tokens, prefix=16 + 4, attention_cap=2.0, scale=scale, layers=2)[16:]
    assert distance(model.text_logits(batch)[0], wanted) < 1e-4
    assert distance(model.text_logits_capped(batch)[0], np.tanh(wanted / 3) * 3) < 1e-4
    assert np.abs(wanted).max() > 3 and distance(np.tanh(wanted / 3) * 3, wanted) > 0.5


def test_gemma2_settings() -> None:
    """The published values, big_vision's own settings, no sliding window, and the 27B's query scale."""
    arrays = gemma2_arrays(np.random.default_rng(1), 24, 4, 2, 6, 40)
    shapes = {name: a.shape for name, a in arrays.items()}
    text = paligemma_config(shapes, 49).text_config
    assert (text.model_type, text.attn_logit_softcapping, text.final_logit_softcapping) == ("gemma2", 50.0, 30.0)
    assert text.query_pre_attn_scalar == 6 and set(text.layer_types) == {"full_attention"}
    llm = {"attn_logits_softcap": 7.0, "final_logits_softcap": 0.0, "query_pre_attn_norm": "rsqrt_emb_per_head"}
    text = paligemma_config(shapes, 49, llm={**llm, "width": 24, "scan": True}).text_config
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (7.0, None)
    assert text.query_pre_attn_scalar == 24 // 4
    large = {
        **{k: s for k, s in shapes.items() if k.startswith("img/")},
        "img/head/kernel": (32, 4608),
        "llm/embedder/input_embedding": (256, 4608),
        "llm/layers/attn/attn_vec_einsum/w": (46, 32, 128, 4608),
        "llm/layers/attn/kv_einsum/w": (46, 2, 16, 4608, 128),
        "llm/layers/mlp/linear": (46, 36864, 4608),
        "llm/layers/post_ffw_norm/scale": (46, 4608),
    }
    text = paligemma_config(large, 49).text_config
    assert (text.query_pre_attn_scalar, text.num_hidden_layers, text.num_key_value_heads) == (144, 46, 16)


def test_a_text_tower_without_a_head_gets_the_identity() -> None:
    """The released i18n checkpoint has none: its last position is the embedding."""
    case = part(golden("siglip"), "params/")
    bare = {k: v for k, v in case.items() if not k.startswith("txt/head/")}
    ids = torch.from_numpy(golden("siglip")["in/text"].astype(np.int64))
    with torch.no_grad():
        with_head, without = siglip.from_big_vision(case), siglip.from_big_vision(bare)
        wanted = without.encode_text(ids, normalize=False).numpy() @ case["txt/head/kernel"] + case["txt/head/bias"]
        assert distance(with_head.encode_text(ids, normalize=False).numpy(), wanted) < 1e-5


def test_two_tower_directories_of_transformers(tmp_path: Path) -> None:
    """What transformers saves opens, and gives what transformers gives."""
    model = siglip.from_big_vision(part(golden("siglip"), "params/"))
    model.model.save_pretrained(tmp_path)
    again, _ = siglip.load(tmp_path)
    pixels = adapter.pixels(part(golden("siglip"), "in/"))
    ids = torch.from_numpy(golden("siglip")["in/text"].astype(np.int64))
    from transformers import SiglipModel

    with torch.no_grad():
        theirs = SiglipModel.from_pretrained(tmp_path)(pixel_values=pixels, input_ids=ids, return_loss=True)
        ours = again(pixels, ids)
    assert torch.equal(ours.logits.T, theirs.logits_per_text) or distance(ours.logits.T, theirs.logits_per_text) < 1e-5
    assert ours.loss is not None and abs(float(ours.loss) - float(theirs.loss)) < 1e-5


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("img/head/bias"), "1 missing: model.multi_modal_projector.linear.bias"),
        (lambda a: a.update({"img/extra": a["img/head/bias"]}), r"1 arrays that are not .*img/extra"),
        (lambda a: a.update({"img/head/bias": np.zeros(7, np.float32)}), r"1 mis-shaped: .*linear.bias \(7,\)"),
        (lambda a: a.update({"img/head/bias": np.zeros(48, np.int8)}), "img/head/bias is of type int8"),
        (lambda a: a["img/head/bias"].__setitem__(3, np.nan), "linear.bias holds NaN"),
        (lambda a: a.pop("llm/embedder/input_embedding"), "no array llm/embedder/input_embedding"),
        (lambda a: a.update({"t": np.zeros(1, np.float32)}), "not of a PaliGemma checkpoint"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: Callable[[Arrays], Any], message: str) -> None:
    arrays = {k: v.copy() for k, v in part(golden("paligemma"), "params/").items()}
    change(arrays)
    with pytest.raises(CheckpointError, match=message):
        big_vision_model.paligemma_model(arrays, 999)


def test_settings_that_contradict_the_arrays_are_refused() -> None:
    arrays = part(golden("paligemma"), "params/")
    with pytest.raises(CheckpointError, match="llm.width is 64, the arrays have 48"):
        big_vision_model.paligemma_model(arrays, 999, llm={"width": 64})
    with pytest.raises(CheckpointError, match="without Gemma 2's norms"):
        big_vision_model.paligemma_model(arrays, 999, llm={"attn_logits_softcap": 50.0})
    with pytest.raises(CheckpointError, match="query_pre_attn_norm is 'rsqrt'"):
        big_vision_model.paligemma_model(arrays, 999, llm={"query_pre_attn_norm": "rsqrt"})


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        vlm.load(tmp_path / "absent.npz", tokenizer="t.model")
    (tmp_path / "there.npz").write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        vlm.load(tmp_path / "there.npz")
    for name, content in (
        ("text.npz", b"version https://git-lfs"),
        ("cut.npz", (DATA / "naflex.npz").read_bytes()[:5000]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not a complete .npz"), big_vision.open_npz(tmp_path / name):
            pass
    np.savez(tmp_path / "pickled.npz", a=np.array([{}], dtype=object))
    with (
        pytest.raises(CheckpointError, match="npz|type object"),
        big_vision.open_npz(tmp_path / "pickled.npz") as arrays,
    ):
        big_vision.headers(arrays, "pickled")
