"""The demo in Chromium: upload, sliders, a run that trains, console errors, and the layout on narrow screens."""

import json
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hf_tokenmixup.cli.demo import create_app

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
WAIT_MS = 240_000  # a slow machine trains the classifier of digits in the first request
WIDE, NARROW = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def address(run_folder):
    """Address of a running demo."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    from hf_tokenmixup.demo.app import launch_options

    write_log(run_folder, {"epoch": 1, "step": 10, "loss": 2.5, "eval_top1": 0.25, "eval_top5": 0.5})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(run=str(run_folder), local_paths=True)
    app.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True, **launch_options())
    yield f"http://127.0.0.1:{port}"
    app.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, address):
    """Open the demo in a window of a size. Afterwards there must be no console error, and no request to elsewhere."""
    errors, elsewhere, contexts = [], [], []

    def record(route):
        if not route.request.url.startswith(address):
            elsewhere.append(route.request.url)
            return route.fulfill(body="")
        return route.continue_()

    def open_window(size=WIDE, theme="light"):
        contexts.append(browser.new_context(viewport={"width": size[0], "height": size[1]}))
        page = contexts[-1].new_page()
        page.route(lambda url: url.startswith("http"), record)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/?__theme={theme}", timeout=WAIT_MS)
        page.wait_for_selector("#horizontal img", timeout=WAIT_MS)
        return page

    yield open_window
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in elsewhere if "font" in url and "preconnect" not in url] == []


def write_log(folder, *records):
    (folder / "training_log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def numbers(page):
    return page.inner_text("#numbers .numbers")


def wait_for_other_numbers(page, before):
    page.wait_for_function(
        "before => document.querySelector('#numbers .numbers').innerText !== before", arg=before, timeout=WAIT_MS
    )
    return numbers(page)


def test_sliders_and_upload_change_the_numbers(open_page, tmp_path):
    page = open_page()
    before = numbers(page)
    assert "of 6" in before and "Label mass moved" in before
    tau = page.locator("#tau input[type=number]")
    assert tau.is_disabled()
    number = page.locator("#rho input[type=number]")
    number.fill("0")
    number.press("Tab")
    mixed = wait_for_other_numbers(page, before)
    slider = page.locator("#kappa input[type=range]")
    slider.focus()
    for _ in range(4):
        slider.press("ArrowRight")
    after = wait_for_other_numbers(page, mixed)
    # kappa changes the attention to collected tokens only.
    assert after.splitlines()[:-1] == mixed.splitlines()[:-1]
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 60, 3), dtype=np.uint8)).save(path)
    page.locator("#images input[type=file]").first.set_input_files(path)
    page.wait_for_function("document.querySelector('#numbers .numbers').innerText.includes('of 7')", timeout=WAIT_MS)


def test_curves_are_refreshed_while_a_run_trains(open_page, run_folder):
    page = open_page()
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector("#curves img", timeout=WAIT_MS)
    assert "0.25" in page.inner_text("#metrics")
    figure = page.get_attribute("#curves img", "src")
    write_log(
        run_folder,
        {"epoch": 1, "step": 10, "loss": 2.5, "eval_top1": 0.25, "eval_top5": 0.5},
        {"epoch": 2, "step": 20, "loss": 1.5, "eval_top1": 0.875, "eval_top5": 0.9},
    )
    page.wait_for_function("document.querySelector('#metrics').innerText.includes('0.875')", timeout=WAIT_MS)
    assert page.get_attribute("#curves img", "src") != figure


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_page_fits_its_window(open_page, tmp_path, size, theme):
    page = open_page(size, theme)
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    page.screenshot(path=folder / f"mixing-{size[0]}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    page.get_by_role("tab", name="Training").click()
    page.wait_for_selector("#curves img", timeout=WAIT_MS)
    page.screenshot(path=folder / f"training-{size[0]}-{theme}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
