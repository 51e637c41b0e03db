"""Studies: the paper's ablation tables and sweeps as training runs, and their results."""
