"""What several packages share: the environment of a run, redaction of what is published, class names."""
