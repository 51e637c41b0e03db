#!/usr/bin/env python
"""The command `demo` of this package, run from a clone: see `python scripts/demo.py --help`."""

import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    # sys.path starts with this folder, whose evaluate.py would shadow the library `evaluate`.
    with suppress(ValueError):
        sys.path.remove(str(Path(__file__).parent))
    from hf_tokenmixup.cli.demo import entry_point

    entry_point()
