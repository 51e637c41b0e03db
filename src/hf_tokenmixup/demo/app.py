"""The Gradio app of the demo: a thin layer over `mixing` and `runs`."""

import base64
import io
import threading
from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from matplotlib.figure import Figure
from PIL import Image

from ..saliency import SALIENCY_DETECTORS
from .classifier import DemoClassifier, digit_images
from .mixing import MAX_IMAGES, MixingSettings, format_numbers, mix_images
from .runs import read_run

REFRESH_SECONDS = 5
MAX_CLASSIFIERS = 2  # in memory
RHO, TAU, KAPPA = 1.3, 0.43, 3
MAX_RHO = 5.0
# Width of a figure, in pixels for each of its inches. A wide figure scrolls sideways on a narrow screen, where its
# text would be too small.
PIXELS, MIN_PIXELS = 72, 52
CSS = Path(__file__).with_name("app.css")
INTRODUCTION = """# TokenMixup
Horizontal TokenMixup (HTM) replaces some tokens of an image by more salient tokens of another one. Vertical TokenMixup
(VTM) lets a layer also attend to salient tokens of earlier layers. [Paper](https://arxiv.org/abs/2210.07562)"""


def figure_html(figure: Figure | None, text: str) -> str:
    """Return a figure as HTML with a text for those who do not see it; empty without a figure."""
    if figure is None:
        return ""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    inches = figure.get_figwidth()
    width = f"min({inches * PIXELS:.0f}px, max(100%, {inches * MIN_PIXELS:.0f}px))"
    image = f'<img alt="{escape(text)}" style="width: {width}" src="data:image/png;base64,{data}">'
    return f'<div class="figure">{image}</div>'


def numbers_html(numbers: list[tuple[str, str]], message: str) -> str:
    """Return names and values as HTML, with a message below them."""
    cells = "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b></div>" for name, value in numbers)
    note = f'<div class="note">{escape(message)}</div>' if message else ""
    return f'<div class="numbers">{cells}</div>{note}'


def table_html(rows: list[tuple[str, str]], message: str) -> str:
    """Return names and values as a table, with a message above it."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    note = f'<div class="note">{escape(message)}</div>' if message else ""
    return f'<div class="run">{note}<table>{cells}</table></div>'


def build_app(
    load: Callable[[str], DemoClassifier], model: str = "", run: str = "", *, local_paths: bool = True
) -> gr.Blocks:
    """Build the app.

    Args:
        load: Returns the classifier of a name on the Hub or a folder; of digits for an empty name.
        model: Name or folder of the model at the start.
        run: Output folder of a run at the start.
        local_paths: Whether visitors may name other folders of this machine than `model` and `run`.

    Returns:
        The app. `launch_options` are for its `launch`.
    """
    lock = threading.Lock()
    load_cached = lru_cache(MAX_CLASSIFIERS)(load)

    def check_path(path: str, allowed: str) -> None:
        if not local_paths and path != allowed and Path(path).exists():
            raise ValueError(f"Folders of this machine cannot be read in a public demo, got {path}.")

    def classifier(name: str | None) -> DemoClassifier:
        name = (name or "").strip()
        if name:
            check_path(name, model)
        return load_cached(name)

    def show(images, name, layer, rho, all_easy, tau, kappa, detector) -> tuple[str, str, str, str]:
        opened = []
        for path, _ in images or []:
            with Image.open(path) as image:
                opened.append(image.convert("RGB"))
        # The settings of a model change while it is in use.
        with lock:
            settings = MixingSettings(int(layer), rho, None if all_easy else tau, int(kappa), detector)
            result = mix_images(classifier(name), opened, settings)
            numbers = numbers_html(format_numbers(result.numbers), result.message)
            vertical = figure_html(result.vertical, "Collected tokens") or numbers_html(
                [], "Layer 0 has no earlier layers to collect tokens from. Choose a higher layer."
            )
            return (
                numbers,
                figure_html(result.horizontal, "Mixed images"),
                figure_html(result.saliency, "Saliency"),
                vertical,
            )

    def with_errors(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*values: Any) -> Any:
            try:
                return function(*values)
            except (OSError, ValueError) as error:
                raise gr.Error(" ".join(str(error).split()), print_exception=False) from error

        return wrapped

    def change_model(name, layer, kappa):
        with lock:
            config = classifier(name).model.config
        last, tokens = config.network.num_layers - 1, config.num_patch_tokens
        return gr.update(maximum=last, value=min(layer, last)), gr.update(maximum=tokens, value=min(kappa, tokens))

    def show_run(folder: str, shown: Any) -> tuple[Any, Any, Any]:
        folder = folder.strip()
        if not folder:
            return "", table_html([], "Enter the output folder of a run."), None
        try:
            check_path(folder, run)
            summary = read_run(folder, shown)
        except ValueError as error:
            return "", table_html([], str(error)), None
        if summary is None:
            return gr.skip(), gr.skip(), gr.skip()
        return (
            figure_html(summary.curves, "Training curves"),
            table_html(summary.rows, summary.status),
            summary.version,
        )

    with gr.Blocks(title="TokenMixup", analytics_enabled=False) as app:
        gr.Markdown(INTRODUCTION)
        with gr.Tab("Mixing"):
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    images = gr.Gallery(
                        digit_images(),
                        label=f"Images (2 to {MAX_IMAGES})",
                        columns=3,
                        height=330,
                        format="png",
                        object_fit="contain",
                        file_types=["image"],
                        sources=["upload", "clipboard"],
                        interactive=True,
                        elem_id="images",
                    )
                    name = gr.Textbox(
                        model,
                        label="Model",
                        placeholder="empty: a small ViT for digits",
                        info="Folder or name on the Hub. Enter loads it.",
                        elem_id="model",
                    )
                with gr.Column(scale=3, min_width=320):
                    with gr.Row():
                        layer = gr.Slider(
                            0,
                            2,
                            1,
                            step=1,
                            label="Layer",
                            info="HTM before it, VTM in it.",
                            min_width=220,
                            elem_id="layer",
                        )
                        kappa = gr.Slider(
                            1,
                            16,
                            KAPPA,
                            step=1,
                            label="kappa",
                            info="Tokens of each earlier layer.",
                            elem_id="kappa",
                            min_width=220,
                        )
                    with gr.Row():
                        rho = gr.Slider(
                            0, MAX_RHO, RHO, step=0.05, label="rho",
                            info="Minimum difference in saliency, as a multiple of 1 / number of patch tokens.",
                            elem_id="rho", min_width=220,
                        )  # fmt: skip
                        tau = gr.Slider(
                            0.01, 1, TAU, step=0.01, label="tau",
                            info="As a fraction of ln(number of classes). Not used while all images are easy.",
                            elem_id="tau", min_width=220, interactive=False,
                        )  # fmt: skip
                    detector = gr.Radio(
                        list(SALIENCY_DETECTORS),
                        value="attention",
                        label="Detector",
                        elem_id="detector",
                        min_width=220,
                    )
                    all_easy = gr.Checkbox(
                        True,
                        label="All images are easy",
                        info="tau is not used. Otherwise the layer needs a trained ScoreNet.",
                        elem_id="all_easy",
                        min_width=220,
                    )
            numbers = gr.HTML(elem_id="numbers")
            gr.Markdown("### Horizontal: pairs, mixed images and labels")
            horizontal = gr.HTML(elem_id="horizontal")
            gr.Markdown("### Vertical: collected tokens")
            vertical = gr.HTML(elem_id="vertical")
            gr.Markdown("### Saliency")
            saliency = gr.HTML(elem_id="saliency")
        with gr.Tab("Training"):
            folder = gr.Textbox(
                run, label="Output folder of a run", info=f"Refreshed every {REFRESH_SECONDS} s.", elem_id="run"
            )
            version = gr.State(None)
            curves = gr.HTML(elem_id="curves")
            metrics = gr.HTML(elem_id="metrics")
            timer = gr.Timer(REFRESH_SECONDS)

        settings = [images, name, layer, rho, all_easy, tau, kappa, detector]
        figures = [numbers, horizontal, saliency, vertical]
        shown = {"fn": with_errors(show), "inputs": settings, "outputs": figures, "api_visibility": "private"}
        changed = [item.change for item in (images, layer, rho, all_easy, tau, kappa, detector)]
        all_easy.change(
            lambda is_on: gr.update(interactive=not is_on),
            all_easy,
            tau,
            api_visibility="private",
            show_progress="hidden",
        )
        gr.on(changed, **shown, trigger_mode="always_last", show_progress="minimal")
        limits = {"fn": with_errors(change_model), "inputs": [name, layer, kappa], "outputs": [layer, kappa]}
        for event in (name.submit, app.load):
            event(**limits, api_visibility="private").success(**shown)
        watched = {"fn": show_run, "inputs": [folder, version], "outputs": [curves, metrics, version]}
        gr.on([folder.change, timer.tick, app.load], **watched, api_visibility="private", show_progress="hidden")
    return app


def launch_options() -> dict[str, Any]:
    """Return the options of `launch` for the look of the app. The fonts are those of the system."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return {"theme": theme, "css_paths": CSS, "footer_links": []}
