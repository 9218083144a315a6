"""Build a model from parts, save it, open it again and ask it something. Runs offline in seconds.

The parts here are tiny and random, so the answers are noise; with published checkpoints the calls are the same:

    model, processor = vlm.new("google/siglip-base-patch16-224", "linear", "google/gemma-2b")
"""

import sys
import tempfile

from PIL import Image
from transformers import GemmaConfig, SiglipVisionConfig

import vlm
from vlm.text import tokenizer


def main(folder: str) -> None:
    tower = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        vision_use_head=False,
    )
    decoder = GemmaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=8,
    )
    words = tokenizer.build(["caption en", "answer en what colour is it?", "a red square"] * 20, vocab_size=400)
    model, processor = vlm.new(tower, "linear", decoder, words, seed=0)
    vlm.save(model, processor, folder)

    model, processor = vlm.load(folder)
    picture = Image.new("RGB", (48, 32), "red")
    texts = vlm.generate(
        model, processor, [picture, picture], ["caption en", "answer en what colour is it?"], max_new_tokens=5
    )
    print(len(texts), "texts, for example", repr(texts[0]))
    print(vlm.measure.info.table(vlm.measure.info.describe((model, processor))))


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
