"""The commands, one module each: `main(arguments)` raises errors, and `entry_point()` ends the process with one line.

`scripts/NAME.py`, `hf-tokenmixup NAME` and `python -m hf_tokenmixup.cli.NAME` run the same code.
"""
