"""TokenMixup (NeurIPS 2022) for Hugging Face Transformers."""
