"""Studies: the paper's tables as training runs, and their results."""
