"""Tokens of PaliGemma and Gemma by name."""

import re

IMAGE_TOKEN = "<image>"
LOC_TOKENS = [f"<loc{i:04d}>" for i in range(1024)]
SEG_TOKENS = [f"<seg{i:03d}>" for i in range(128)]
GEMMA_NAMES = r"image|mask|pad|eos|bos|unk|unused\d+|start_of_\w+|end_of_\w+|\d+mass"
"""Names of Gemma's control tokens, without their brackets."""
CONTROL_NAMES = re.compile(rf"<({GEMMA_NAMES})>|\[.+\]")
"""Gemma's control tokens by name: not all of them are marked special in its tokenizer files."""
