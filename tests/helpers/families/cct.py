"""Tiny CCT."""

from . import Family

# `test_cct.py` compares it with the released code.
CASES = {
    "cct": Family(own={"tokenizer": "patch", "drop_path_rate": 0.0}, submodule="linear1", num_prefix_tokens=0),
}
