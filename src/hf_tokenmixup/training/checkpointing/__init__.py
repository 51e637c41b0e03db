"""Checkpoints: saving, integrity, the state to resume from, compatibility with the run, and disk space."""
