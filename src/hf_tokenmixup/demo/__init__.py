"""Demo of TokenMixup in a browser. Only `app` needs Gradio."""
