"""Shared utilities: environment of a run, redaction, class names and messages."""
