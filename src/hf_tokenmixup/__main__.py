"""`python -m hf_tokenmixup COMMAND ...` is `hf-tokenmixup COMMAND ...`."""

from .cli.main import entry_point

entry_point()
