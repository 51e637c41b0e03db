"""The commands: one module each, with `main(arguments)`, which raises, and `entry_point()`, which ends the process.

`scripts/NAME.py`, `hf-tokenmixup NAME` and `python -m hf_tokenmixup.cli.NAME` run the same code.
"""
