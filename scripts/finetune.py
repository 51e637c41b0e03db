#!/usr/bin/env python
"""The command `finetune` of this package, run from a clone: see `python scripts/finetune.py --help`."""

import sys
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":
    # The folder of this script comes first on the path, and its evaluate.py would hide the library of that name.
    with suppress(ValueError):
        sys.path.remove(str(Path(__file__).parent))
    from hf_tokenmixup.cli.finetune import entry_point

    entry_point()
