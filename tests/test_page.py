"""The listening page in a real browser, headless Chromium. Skipped without it or playwright."""

import json
import shutil

import pytest

import sample as speak

CLIPS = "[...document.querySelectorAll('audio')]"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as program:
        found = next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
        )
        try:
            browser = program.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip("no Chromium here")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(trained, tmp_path_factory):
    """A page with all that can be on it, and with odd names, in a folder that was moved since."""
    place = tmp_path_factory.mktemp("page")
    folder = shutil.copytree(trained[0], place / "run")
    for name in ("a #1? <b>&\"'%20: é", "long" * 40):
        shutil.copy(folder / "1_true.wav", folder / f"{name}.wav")
    row = dict(value=0.2, ceiling=0.9, floor=0.01)
    (folder / "judged.json").write_text(
        json.dumps(
            {
                "n": [1, 2],
                "pjsd": [0.0625, None],
                "floor": [0.03, None],
                "toy": {"speaker_kept": row, "long" * 40: row},
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "sys.argv", ["sample.py", str(folder), "--prompt", "none", "--num", "2", "--steps", "2"]
        )
        speak.main()
    return (folder.rename(place / "moved <i> # ?") / "index.html").as_uri()


@pytest.fixture
def open_page(browser, address):
    """open_page(width, ...) -> the page in a window of this width, its sounds and pictures loaded,
    and what went wrong."""

    def open_page(width, **options):
        page, wrong = browser.new_page(viewport=dict(width=width, height=800), **options), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith("file://") or wrong.append(request.url),
        )
        page.goto(address)
        page.wait_for_function(f"{CLIPS}.every(a => a.readyState || a.error)")
        return page, wrong

    return open_page


def test_every_player_has_a_source_and_a_duration_and_nothing_goes_wrong(open_page):
    page, wrong = open_page(1200)
    durations = page.evaluate(f"{CLIPS}.map(a => a.duration)")
    assert durations == pytest.approx([1.2] * 16) and not wrong
    assert all(page.evaluate("[...document.images].map(image => image.naturalWidth)"))


@pytest.mark.parametrize("width", [360, 1200])
def test_it_fits_its_window(open_page, width):
    page, _ = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll('body *')].filter(
        e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"""
    assert page.evaluate(f"{wide}.map(e => e.outerHTML)") == []
    lines = """[...document.querySelectorAll('th, td + td')].map(e => {
        const range = document.createRange(); range.selectNodeContents(e);
        return range.getClientRects().length })"""
    assert max(page.evaluate(lines)) == 1  # no number is broken
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16


def test_it_is_dark_where_the_reader_is(open_page):
    """Its text is light on dark, and dark on light."""
    text = [
        open_page(800, color_scheme=scheme)[0].evaluate("getComputedStyle(document.body).color")
        for scheme in ("light", "dark")
    ]
    assert text == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


def test_nothing_on_it_runs(open_page):
    page, _ = open_page(800)
    assert (
        page.evaluate("document.querySelectorAll('script, b, i, [onload], [onerror]').length") == 0
    )
