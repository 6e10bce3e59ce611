"""The page in headless Chromium: no complaint in the console, and everything that answers a click or a key does."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Browser
from page_job import NEEDLE, add_evaluation, quantize_pico

import fourge

# Where a browser was asked for, as in CI, a missing one is a failure and no reason to skip.
pytestmark = pytest.mark.skipif(
    (CHROMIUM is None or DRIVER is None) and "FOURGE_BROWSER" not in os.environ,
    reason="needs chromium and chromedriver: apt-get install chromium chromium-driver",
)
ENTER, RIGHT, DOWN = "\ue007", "\ue014", "\ue015"


@pytest.fixture(scope="module")
def url(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    output = quantize_pico(pico("llama"), tmp_path_factory.mktemp("page") / "quantized")
    add_evaluation(output)
    return fourge.page(output).path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running


@pytest.fixture
def page(browser: Browser, url: str) -> Browser:
    browser.logs()
    browser.requests()
    browser.open(url)
    return browser


def test_it_loads_without_a_complaint_and_asks_for_nothing(page: Browser, url: str) -> None:
    assert page.logs() == []
    assert page.requests() == [url]
    assert page.run("return window.hostile === undefined && document.images.length === 0")


def test_every_shape_is_as_large_as_it_should_be(page: Browser) -> None:
    """A shape that the parser nests in another is not drawn."""
    sizes = page.run(
        "return [...document.querySelectorAll('svg rect, svg circle')].map(e => e.getBoundingClientRect().width)"
    )
    assert len(sizes) > 50 and min(sizes) > 0
    right = page.run(
        "return Math.max(...[...document.querySelectorAll('svg *')].map(e => e.getBoundingClientRect().right))"
    )
    assert right <= page.run("return document.documentElement.clientWidth")


def test_the_heat_map_answers_a_click(page: Browser) -> None:
    page.click('[data-cell="1/mlp.down_proj"] rect')
    assert page.run("return document.querySelector('#cell h3').textContent") == "Layer 1, mlp.down_proj"
    facts = page.run("return [...document.querySelectorAll('#cell dt')].map(e => e.textContent)")
    assert facts[:2] == ["weight error", "largest calibrated input"] and "event" in facts
    assert page.logs() == []


def test_the_heat_map_answers_the_keyboard(page: Browser) -> None:
    page.run("document.querySelector('#heat [tabindex=\"0\"]').focus()")
    for key in (RIGHT, DOWN, ENTER):
        page.type(":focus", key)
    assert page.run("return document.querySelector('#cell h3').textContent") == "Layer 1, self_attn.k_proj"
    assert page.run("return document.querySelectorAll('#heat [tabindex=\"0\"]').length") == 1


def test_the_search_finds_a_flip(page: Browser) -> None:
    shown = "return [...document.querySelectorAll('.flip')].filter(e => e.offsetHeight > 0).map(e => e.textContent)"
    assert len(page.run(shown)) == 3
    page.type("#flip-search", NEEDLE.upper())
    (found,) = page.run(shown)
    assert NEEDLE in found
    assert page.run("return document.querySelector('#flip-count').textContent") == "1 shown"
    page.type("#flip-search", " nowhere")
    assert page.run(shown) == []


def test_the_side_of_a_flip_can_be_chosen(page: Browser) -> None:
    page.run(
        "const side = document.getElementById('flip-side'); side.value = 'won'; side.dispatchEvent(new Event('input'))"
    )
    assert page.run("return [...document.querySelectorAll('.flip:not([hidden])')].map(e => e.dataset.side)") == ["won"]


def test_it_follows_the_system_and_then_the_button(page: Browser, url: str) -> None:
    paper = "return getComputedStyle(document.body).backgroundColor"
    page.emulate_dark(False)
    light = page.run(paper)
    page.emulate_dark(True)
    dark = page.run(paper)
    assert light != dark
    page.click("#theme")
    assert page.run(paper) == light
    page.open(url)
    assert page.run(paper) == light
    page.click("#theme")
    assert page.run(paper) == dark
    page.emulate_dark(False)
    page.run("localStorage.clear()")


def test_without_its_script_tables_and_flips_are_there(browser: Browser, url: str, tmp_path: Path) -> None:
    html = Path(url.removeprefix("file://")).read_text()
    silent = tmp_path / "silent.html"
    silent.write_text(html.replace("startTheme();", "throw 0;"))  # its digest is not the policy's any more
    browser.open(silent.as_uri())
    assert browser.run("return document.getElementById('theme').hidden && document.querySelector('.controls').hidden")
    assert browser.run("return [...document.querySelectorAll('.flip')].every(e => e.offsetHeight > 0)")
    assert browser.run("return document.querySelectorAll('table.numbers').length") >= 4
