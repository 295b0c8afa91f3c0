"""Films on the page: light until touched, by mouse, keys and ear, and on paper."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import films
import matplotlib.pyplot as plt
import notebooks
import pytest
from docutils import nodes

from _style import film

STATIC = notebooks.ROOT / "book" / "_static"
SITE = notebooks.ROOT / "_build" / "html"
ABOUT = 'A "line" & its slope'
FRAMES = 5


@pytest.fixture(scope="module")
def inline() -> str:
    """A film as the notebook has it."""
    figures = []
    for i in range(FRAMES):
        figure, ax = plt.subplots(figsize=(3, 2))
        ax.plot([0, i])
        figures.append(figure)
    page = film(figures, range(FRAMES), alt=f"{ABOUT}:", name="blocks", seconds=0.05)
    return str(page.data)


@pytest.fixture(scope="module")
def site(inline, tmp_path_factory) -> Path:
    """A page with the film, its frames beside it, to be opened from its file."""
    folder = tmp_path_factory.mktemp("site")
    kept = []

    def keep(picture: bytes) -> str:
        (folder / f"{len(kept)}.png").write_bytes(picture)
        kept.append(f"{len(kept)}.png")
        return kept[-1]

    node = films.read_film(inline, keep)
    assert node is not None
    builder = SimpleNamespace(imgpath=".", images={name: name for name in kept})
    writer = SimpleNamespace(body=[], builder=builder)
    with pytest.raises(nodes.SkipNode):
        films.visit_html(writer, node)
    for name in ("film.css", "film.js"):
        shutil.copy(STATIC / name, folder)
    (folder / "page.html").write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Film</title>'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="film.css">'
        '<script defer src="film.js"></script><div style="height: 3000px"></div>'
        f"{''.join(writer.body)}</html>",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if not found:
        pytest.skip("there is no Chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, site):
    """Open the page; its `asked` are the frames that it has loaded so far."""
    contexts = []

    def call(**options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.asked, page.faults = [], []
        page.on("request", lambda r: page.asked.append(Path(r.url).name))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.goto((site / "page.html").as_uri())
        page.asked = [name for name in page.asked if name.endswith(".png")]
        return page

    yield call
    for context in contexts:
        assert not any(page.faults for page in context.pages)
        context.close()


def visible(page) -> list[str]:
    """The frames that are seen, by the files they come from."""
    return [
        Path(image.get_attribute("src")).name
        for image in page.query_selector_all(".film img")
        if image.is_visible() and image.evaluate("image => image.naturalWidth > 0")
    ]


def wait_for(page, frame: int) -> None:
    page.wait_for_function(
        "i => { const all = [...document.querySelectorAll('.film figure')];"
        " return all.findIndex(frame => !frame.hidden) === i; }",
        arg=frame,
        timeout=5000,
    )


def pause(page, milliseconds: int) -> None:
    """Set the pace of the film."""
    page.evaluate(
        "ms => { document.querySelector('.film').dataset.pause = ms; }", milliseconds
    )


def test_a_film_is_read_from_what_the_notebook_holds(inline):
    kept = []
    node = films.read_film(inline, lambda picture: kept.append(picture) or "x.png")
    assert node is not None
    assert (node["about"], node["name"], node["pause"]) == (ABOUT, "blocks", 50)
    assert [image["label"] for image in node.frames] == [
        f"blocks {i}" for i in range(FRAMES)
    ]
    assert [i for i, image in enumerate(node.frames) if image["keep"]] == [0, 2, 4]
    assert {image["size"] for image in node.frames} == {(288, 192)}
    assert len(set(kept)) == FRAMES
    assert all(picture.startswith(b"\x89PNG") for picture in kept)


def test_other_html_is_no_film():
    assert films.read_film('<div class="verdicts"></div>', pytest.fail) is None


def test_frames_come_when_the_slider_is_touched_and_not_before(opened):
    page = opened()
    page.locator(".film").scroll_into_view_if_needed()
    page.locator("input").focus()
    page.wait_for_timeout(200)
    assert set(page.asked) <= {"0.png"}
    assert visible(page) == ["0.png"]
    page.keyboard.press("ArrowRight")
    wait_for(page, 1)
    page.wait_for_load_state("networkidle")
    assert visible(page) == ["1.png"]
    assert set(page.asked) == {f"{i}.png" for i in range(FRAMES)}


def test_keys_move_it_and_it_says_what_it_shows(opened):
    page = opened()
    slider = page.get_by_role("slider", name="blocks")
    slider.focus()
    page.keyboard.press("End")
    wait_for(page, FRAMES - 1)
    assert slider.get_attribute("aria-valuetext") == "blocks 4"
    assert page.get_by_role("status").last.text_content() == f"blocks 4: {ABOUT}"
    assert page.locator("output").text_content() == "blocks 4"
    image = page.get_by_role("img")
    assert image.count() == 1, "the hidden frames are read out too"
    assert image.get_attribute("alt") == f"blocks 4: {ABOUT}"
    assert page.get_by_role("group", name=f"Film: {ABOUT}").count() == 1


def test_it_can_be_stopped_and_plays_to_the_end(opened):
    page = opened()
    button = page.get_by_role("button")
    pause(page, 3000)
    button.click()
    assert button.text_content() == "❚❚ Pause"
    button.click()
    assert button.text_content() == "▶ Play"
    pause(page, 20)
    page.wait_for_timeout(200)
    assert page.locator("input").input_value() == "0"
    button.click()
    wait_for(page, FRAMES - 1)
    button.filter(has_text="Play").wait_for()
    pause(page, 3000)
    button.click()  # once more, from the start
    wait_for(page, 0)


def test_nothing_moves_by_itself_under_reduced_motion(opened):
    page = opened(reduced_motion="reduce")
    button = page.get_by_role("button")
    assert button.text_content() == "▶ Next"
    button.click()
    wait_for(page, 1)
    page.wait_for_timeout(200)
    assert visible(page) == ["1.png"]
    assert page.get_by_role("status").last.text_content() == f"blocks 1: {ABOUT}"


def test_on_paper_there_are_three_frames(opened):
    page = opened()
    page.emulate_media(media="print")
    page.locator(".film").scroll_into_view_if_needed()
    page.wait_for_function(
        "() => [...document.querySelectorAll('.keep img')].every(i => i.naturalWidth)"
    )
    assert visible(page) == ["0.png", "2.png", "4.png"]
    assert page.get_by_text("blocks 2", exact=True).is_visible()
    assert not page.get_by_role("button").is_visible()


def test_without_scripts_there_are_three_frames(browser, site):
    page = browser.new_page(java_script_enabled=False)
    page.goto((site / "page.html").as_uri())
    page.mouse.wheel(0, 3000)
    page.wait_for_timeout(500)
    shown = page.locator(".film img:visible")
    assert shown.count() == 3
    assert not page.locator("button").is_visible()
    page.close()


def test_in_the_pdf_there_are_three_frames(inline):
    node = films.read_film(inline, lambda picture: "x.png")
    assert node is not None
    writer = SimpleNamespace(
        body=[], encode=str, builder=SimpleNamespace(images={"x.png": "x.png"})
    )
    with pytest.raises(nodes.SkipNode):
        films.visit_latex(writer, node)
    page = "".join(writer.body)
    assert page.count(r"\includegraphics") == 3
    assert re.findall(r"blocks \d", page) == ["blocks 0", "blocks 2", "blocks 4"]


def test_no_page_carries_a_film_inside():
    pages = sorted((SITE / "book").glob("*.html"))
    if not pages:
        pytest.skip("the site has not been built: make book")
    found = 0
    for path in pages:
        page = path.read_text(encoding="utf-8")
        assert "data:image/png" not in page, path.name
        for src in re.findall(
            r'<figure class="(?:keep)?".*?<img [^>]*src="([^"]*)"', page
        ):
            assert (path.parent / src).is_file(), f"{path.name}: {src}"
            found += 1
        assert ("film.js" in page) == ('class="film"' in page)
    assert found
