"""The listening page: its parts, and itself in a real browser, headless Chromium. The browser's
tests are skipped without it or playwright."""
import json
import math
import shutil
import struct
import time
import zlib

import numpy as np
import pytest
import torch

import lab.blind
import lab.clips
import sample as speak
from cdslm import RATE, Config, UserError, log_mel, read_config, save_audio
from lab import markov
from lab.clips import english_transcriber, examine, toy_transcriber
from lab.page import measures, write_page
from lab.pictures import chart, draw, magma, png, round_losses, round_steps
from lab.report import MEANING
from lab.toyspeech import ToySpeech
from tests.conftest import speech_like

CLIPS = "[...document.querySelectorAll('audio')]"
BAD = "<script>alert(1)<script>"
WORDS = "word rate: phones inside whole words of the right language"
SPEAKER = "speaker kept: " + MEANING["speaker_kept"]


def fake_transcriber(config, run, patient):
    said = {"language": "language A", "context": [["zɛ", False]], "share": 0.5,
            "continuation": [["lɑp", True], [BAD, False]]}
    return lambda wave, context: said


# --------------------------------------------------------------------------------------------------
# Pictures.

def read_png(file):
    """A PNG file's bytes -> pixels (height, width, 3)."""
    assert file[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(file):
        length, = struct.unpack(">I", file[at:at + 4])
        kind, data = file[at + 4:at + 8], file[at + 8:at + 8 + length]
        check, = struct.unpack(">I", file[at + 8 + length:at + 12 + length])
        assert check == zlib.crc32(kind + data)
        chunks[kind], at = data, at + 12 + length
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"] and not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_a_png_holds_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    assert (read_png(png(pixels)) == pixels).all()


def test_matplotlib_reads_the_same_and_its_magma_looks_the_same(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    colormaps = pytest.importorskip("matplotlib").colormaps
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    (tmp_path / "x.png").write_bytes(png(pixels))
    assert (np.round(255 * image.imread(tmp_path / "x.png")) == pixels).all()
    values = np.linspace(0, 1, 256)
    assert np.abs(magma(values) - 255 * colormaps["magma"](values)[:, :3]).max() < 5


def test_a_picture_is_the_log_mel_with_a_line_where_the_context_ends(tmp_path):
    wave = torch.from_numpy(speech_like(1.2))
    draw(tmp_path / "x.png", wave, 0.4)
    pixels = read_png((tmp_path / "x.png").read_bytes())[::-1]                # band 0 first
    assert pixels.shape == (80, 96, 3)
    assert (pixels[::3, 32] == magma(1.0)).all() and not (pixels[1::3, 32] == magma(1.0)).all()
    expected = magma((log_mel(wave[None])[0].T.clamp(-10, 1).numpy() + 10) / 11)
    expected[::3, 32] = magma(1.0)
    assert (pixels == expected).all()


@pytest.mark.parametrize("last, steps", [
    (1, [0, 1]), (10, [0, 2, 4, 6, 8, 10]), (500, [0, 100, 200, 300, 400, 500]),
    (4500, [0, 1000, 2000, 3000, 4000]), (99, [0, 20, 40, 60, 80]), (2501, [0, 1000, 2000])])
def test_steps_on_an_axis_are_round(last, steps):
    assert list(round_steps(last)) == steps


def test_losses_on_an_axis_are_round():
    assert round_losses(0.0019, 0.06) == pytest.approx([0.002, 0.005, 0.01, 0.02, 0.05])
    assert round_losses(0.014, 0.034) == pytest.approx([0.02, 0.03])
    assert round_losses(0.4, 0.71) == pytest.approx([0.4, 0.5, 0.6, 0.7])


def test_a_chart_has_its_points_and_says_where_the_rate_decays():
    html = chart("loss <of>", {"a<b>": [(0, 1.0), (50, 0.1), (100, 0.01)], "flat": [(100, 0.1)]}, decay=75)
    assert "loss &lt;of&gt;" in html and "a&lt;b&gt;" in html and "learning rate decays" in html
    low, high = math.log(0.01 / 1.1), math.log(1.1)
    for x, loss in ((44, 1.0), (198, 0.1), (352, 0.01)):
        y = 216 - 208 * (math.log(loss) - low) / (high - low)
        assert f"{x:.1f},{y:.1f}" in html
    assert "M275.0 8H352" in html and "after step 100" in html
    assert "learning rate" not in chart("x", {"a": [(1, 0.5), (2, 0.25)]})


def test_a_long_line_is_thinned_and_what_is_no_loss_is_left_out():
    points = [(step, 2.0) for step in range(1, 10_001)] + [(10_001, math.nan), (10_002, 0.0)]
    html = chart("x", {"a": points})
    assert html.count(",") < 400 and "2.0000" in html and "nan" not in html.lower()


# --------------------------------------------------------------------------------------------------
# What is said.

class Ear:
    """Stands for the toy recogniser: knows the phones of each part by its length."""

    def __init__(self, phones):
        self.phones = phones

    def hear(self, mel):
        return {"clips": [list(self.phones[mel.shape[1]])]}


def test_complete_words_are_told_from_other_phones_and_counted_as_the_judge_counts(monkeypatch):
    toy, rng = ToySpeech(), np.random.default_rng(0)
    words = [markov.symbols_of(word) for word in toy.languages[1].words]
    odd = markov.symbols_of(toy.languages[1].words[3][:1] * 2)                # no word begins so
    for _ in range(20):
        picked = [words[i] for i in rng.integers(16, size=6)]
        phones = [*picked[0][1:], *picked[1], *odd, *picked[2], *picked[3][:-1]]
        ear = Ear({80: [*picked[4], *picked[5]], 240: phones})
        monkeypatch.setattr(lab.clips, "load_listener", lambda ear=ear: ear)
        said = toy_transcriber(Config())(torch.zeros(4 * RATE), 1.0)
        assert said["language"] == "language B"
        for side, clip in (("context", ear.phones[80]), ("continuation", phones)):
            assert "".join(text for text, _ in said[side]) == "".join(clip)
        assert {text for text, complete in said["continuation"] if complete} <= {"".join(word) for word in words}
        assert said["share"] == markov.score(toy, [phones], [1])["word_rate"]


def test_a_clip_in_which_nothing_is_heard_has_no_share(monkeypatch):
    monkeypatch.setattr(lab.clips, "load_listener", lambda: Ear({80: [], 160: [], 240: [], 320: ["i"]}))
    transcribe = toy_transcriber(Config())
    for context, seconds in ((0.0, 3), (1.0, 2), (1.0, 1), (0.0, 4)):
        said = transcribe(torch.zeros(seconds * RATE), context)
        assert said["share"] is None and said["context"] == []


@pytest.mark.slow
def test_the_real_recogniser_hears_true_toy_speech():
    """Nearly all of it are complete words, also without a context."""
    toy, transcribe, shares = ToySpeech(), toy_transcriber(Config()), []
    for number in range(12):
        spoken = toy.utterance(3_000_000 + number, 4.0)
        said = transcribe(torch.from_numpy(spoken.wave), (number % 2) * 1.0)
        shares.append(said["share"])
        assert said["language"] == f"language {'AB'[spoken.language]}"
    assert np.mean(shares) > 0.85


def test_english_words_are_told_from_others_where_the_vocabulary_is_known(tmp_path, monkeypatch):
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories/stories.json").write_text('{"words": "small", "seed": 0, "voices": 1}')
    texts = {24_000: "Tom had", 48_000: " a red zebra. Then - he ran! "}
    hear = lambda wave: texts[len(wave)]
    monkeypatch.setattr(lab.words, "read_config", lambda run: Config(data=str(tmp_path / "stories")))
    said = english_transcriber(hear, tmp_path)(torch.ones(3 * RATE), 1.0)
    assert said["context"] == [["Tom", True], ["had", True]] and said["share"] == 5 / 7
    assert [word for word, known in said["continuation"] if not known] == ["zebra.", "-"]

    monkeypatch.setattr(lab.words, "read_config", lambda run: Config(data=str(tmp_path)))
    said = english_transcriber(hear, tmp_path)(torch.ones(3 * RATE), 1.0)
    assert said["share"] is None and not any(known for _, known in said["continuation"])
    assert english_transcriber(hear, tmp_path)(torch.zeros(RATE), 0.0)["continuation"] == []


def test_without_a_recogniser_nothing_is_said(monkeypatch, tmp_path):
    def missing(name):
        raise UserError("no speech recogniser")
    monkeypatch.setattr(lab.clips, "recogniser", missing)
    monkeypatch.setenv("CDSLM_CACHE", str(tmp_path))
    assert lab.clips.transcriber(Config(data="recordings"), tmp_path, True) is None
    monkeypatch.setattr(lab.clips, "load_listener", lambda: pytest.fail("no time to train it"))
    assert lab.clips.transcriber(Config(), tmp_path, False) is None

    def full():
        raise OSError("the disk is full")
    monkeypatch.setattr(lab.clips, "load_listener", full)
    assert lab.clips.transcriber(Config(), tmp_path, True) is None


def test_a_page_without_transcripts_says_how_to_get_them(trained):
    page = (trained[0] / "index.html").read_text()
    assert (lab.page.UNHEARD in page) != (lab.page.LEGEND in page)


# --------------------------------------------------------------------------------------------------
# What is kept of each sound.

@pytest.fixture
def sounds(tmp_path):
    for number, name in enumerate(("a.wav", "b.wav")):
        save_audio(tmp_path / name, torch.from_numpy(speech_like(1.0, seed=number)))
    return tmp_path


def test_only_new_sounds_are_drawn_and_transcribed(sounds, monkeypatch):
    heard = []

    def transcriber(*arguments):
        return lambda wave, context: heard.append(context) or {"share": context}
    monkeypatch.setattr(lab.clips, "transcriber", transcriber)
    first = examine(sounds, {"a.wav": ("an <a>", 0.5)}, Config(), sounds, True)
    assert heard == [0.5, 0.0] and list(first) == ["a.wav", "b.wav"] and first["a.wav"]["caption"] == "an <a>"
    monkeypatch.setattr(lab.clips, "draw", lambda *arguments: pytest.fail("drawn again"))
    assert examine(sounds, {}, Config(), sounds, True) == first and len(heard) == 2

    # A file that has changed, or whose picture is missing.
    drawn = []
    monkeypatch.setattr(lab.clips, "draw", lambda path, wave, context: drawn.append(path.name))
    save_audio(sounds / "b.wav", torch.from_numpy(speech_like(1.0, seed=5)))
    (sounds / "a.mel.png").unlink()
    again = examine(sounds, {}, Config(), sounds, True)
    assert drawn == ["a.mel.png", "b.mel.png"] and heard == [0.5, 0.0, 0.5, 0.0]
    assert again["b.wav"]["digest"] != first["b.wav"]["digest"]


@pytest.mark.parametrize("text", ["", "[]", '{"a.wav": 3}', '{"a.wav": {"digest": 3}}', "{" * 10])
def test_a_damaged_list_of_sounds_is_made_anew(sounds, monkeypatch, text):
    monkeypatch.setattr(lab.clips, "transcriber", lambda *arguments: None)
    (sounds / "clips.json").write_text(text)
    (sounds / "c.wav").write_text("not a sound")
    assert sorted(examine(sounds, {}, Config(), sounds, True)) == ["a.wav", "b.wav"]


def test_what_there_is_no_time_for_is_heard_next_time(sounds, monkeypatch):
    monkeypatch.setattr(lab.clips, "transcriber", lambda *arguments: lambda wave, context: {"share": None})
    monkeypatch.setattr(lab.clips, "HASTE", -1)
    assert all("said" not in clip for clip in examine(sounds, {}, Config(), sounds, False).values())
    assert all("said" in clip for clip in examine(sounds, {}, Config(), sounds, True).values())


def test_measures_are_those_of_the_judges(tmp_path):
    row = dict(value=0.5, ceiling=0.9, floor=0.1)
    (tmp_path / "judged.json").write_text(json.dumps({
        "n": [1, 2, 3, 4], "pjsd": [0.1, None, 0.3, 0.4], "interval": 4 * [[0.0, 0.2]], "true": 4 * [0.01],
        "floor": 4 * [0.02], "toy": {"word_rate": row, "speaker_kept": row},
        "nulls": {"bigram": {"pjsd": 4 * [0.07], "word_rate": 0.2}}}))
    found = measures(tmp_path)
    assert list(found) == ["pJSD, n = 1", "pJSD, n = 2", "pJSD, n = 3", WORDS, SPEAKER]
    assert found["pJSD, n = 1"] == {"generated": (0.1, [0.0, 0.2]), "true": (0.01, None),
                                    "floor": (0.02, None), "bigram": (0.07, None)}
    assert found[WORDS] == {"generated": (0.5, None), "true": (0.9, None), "bigram": (0.2, None)}
    assert found[SPEAKER]["chance"] == (0.1, None)

    (tmp_path / "judged.json").unlink()
    figure = dict(value=0.5, interval=[0.4, 0.6], cases=9)
    (tmp_path / "words.json").write_text(json.dumps({
        "figures": {side: {"pairs": figure, "name 1": figure} for side in ("true", "generated")}}))
    assert measures(tmp_path) == {"pairs": {side: (0.5, [0.4, 0.6]) for side in ("true", "generated")}}


# --------------------------------------------------------------------------------------------------
# In a browser.

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as program:
        names = "chromium", "chromium-browser", "google-chrome"
        found = next(filter(None, map(shutil.which, names)), None)
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
    folder = shutil.copytree(trained[0], place / BAD)
    (folder / "clips.json").unlink()                          # another test may have had the real recogniser
    for name in ("a #1? <b>&\"'%20: é", "long" * 40, BAD):
        shutil.copy(folder / "1_true.wav", folder / f"{name}.wav")
    row = dict(value=0.2, ceiling=0.9, floor=0.01)
    (folder / "judged.json").write_text(json.dumps({
        "n": [1, 2], "pjsd": [0.0625, None], "interval": [[0.05, 0.07], None], "true": [0.01, None],
        "floor": [0.03, None], "nulls": {BAD: {"pjsd": [0.1, None]}},
        "toy": {"speaker_kept": row, "long" * 40: row}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.clips, "transcriber", fake_transcriber)
        for program, words in ((speak, ["--watch", "--steps", "2"]), (lab.blind, []),
                               (speak, ["--prompt", "none", "--num", "2", "--steps", "2"])):
            patch.setattr("sys.argv", ["sample.py", str(folder), *words])
            program.main()
    return (folder.rename(place / "moved <i> # ?") / "index.html").as_uri()


@pytest.fixture
def open_page(browser, address):
    """open_page(width, ...) -> the page in a window of this width, and what goes wrong there."""
    def open_page(width, address=address, **options):
        page, wrong = browser.new_page(viewport=dict(width=width, height=800), **options), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith("file://") or wrong.append(request.url))
        page.goto(address)
        return page, wrong
    return open_page


def scroll_through(page):
    """Scroll down to the end, so that all sounds and pictures load."""
    page.evaluate("""async () => { for (let y = 0; y < document.body.scrollHeight; y += 400) {
        scrollTo(0, y); await new Promise(done => setTimeout(done, 30)) } }""")
    page.wait_for_function(f"{CLIPS}.every(a => a.readyState || a.error)")


def test_every_player_has_a_source_and_a_duration_and_nothing_goes_wrong(open_page):
    page, wrong = open_page(1200)
    scroll_through(page)
    durations = page.evaluate(f"{CLIPS}.map(a => a.duration)")
    assert durations == pytest.approx([1.2] * (12 + 3 + 2 + 5 + 12)) and not wrong
    visible = "[...document.images].filter(image => image.offsetParent)"
    page.wait_for_function(f"{visible}.every(image => image.complete)")
    widths = page.evaluate(f"{visible}.map(image => image.naturalWidth)")
    assert widths == [96] * (12 + 3 + 2 + 5)


@pytest.mark.parametrize("width", [360, 768, 1200])
def test_it_fits_its_window(open_page, width):
    page, _ = open_page(width)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    wide = """[...document.querySelectorAll('body *:not(svg *)')].filter(
        e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"""
    assert page.evaluate(f"{wide}.map(e => e.outerHTML)") == []
    lines = """[...document.querySelectorAll('.measure td:last-child, .chart td')].map(e => {
        const range = document.createRange(); range.selectNodeContents(e.firstChild ?? e);
        return range.getClientRects().length })"""
    assert max(page.evaluate(lines)) == 1                     # no number is broken
    assert page.evaluate("parseFloat(getComputedStyle(document.body).fontSize)") >= 16
    buttons = page.evaluate("[...document.querySelectorAll('button')].map(b => b.offsetHeight)")
    assert min(buttons) >= 40                                 # large enough for a finger


def test_it_is_dark_where_the_reader_is(open_page):
    """Its text is light on dark, and dark on light."""
    text = [open_page(800, color_scheme=scheme)[0].evaluate("getComputedStyle(document.body).color")
            for scheme in ("light", "dark")]
    assert text == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]


def test_nothing_in_a_run_folder_runs_on_the_page(open_page):
    page, _ = open_page(800)
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('[onload], [onerror], iframe, link').length") == 0
    assert page.evaluate("document.body.innerText").count(BAD) >= 5


def test_everything_has_a_name_for_a_screen_reader(open_page):
    page, _ = open_page(800)
    names = page.evaluate(f"{CLIPS}.map(a => a.ariaLabel)")
    assert all(names) and page.evaluate(f"{CLIPS}.every(a => a.controls)")
    charts = page.evaluate("[...document.querySelectorAll('.chart svg')].map(e => [e.role, e.ariaLabel])")
    assert [role for role, _ in charts] == ["img", "img"] and all("arrow keys" in name for _, name in charts)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("[...document.images].every(image => image.hasAttribute('alt'))")
    heads = page.evaluate("[...document.querySelectorAll('tr')].every(row => row.querySelector('th'))")
    assert heads


def test_what_is_said_stands_below_its_player(open_page):
    page, _ = open_page(1200)
    said = page.evaluate("[...document.querySelectorAll('figure > .said')].map(e => e.innerHTML)")
    assert len(said) == 34
    assert all('<span class="context">zɛ</span> ┊' in text and "<b>lɑp</b>" in text for text in said)
    assert all("50% in words, language A" in text and "&lt;script&gt;" in text for text in said)


def values(page):
    """What the first chart shows: {line: value}, and at which step."""
    rows = page.evaluate("""[...document.querySelectorAll('.chart:first-of-type tr')].map(
        row => [row.firstElementChild.innerText.trim(), row.lastElementChild.innerText])""")
    return dict(rows), page.evaluate("document.querySelector('.chart caption').innerText")


def test_a_chart_shows_the_values_at_the_step_that_is_chosen(open_page, trained):
    """By pointing, by tapping, and with the arrow keys."""
    rows = [json.loads(line) for line in (trained[0] / "log.jsonl").read_text().splitlines()]
    for options in ({}, {"has_touch": True}):
        page, _ = open_page(500, **options)
        found, at = values(page)
        assert at == "after step 10" and found["training"] == f"{rows[-1]['loss']:.4f}"
        page.locator(".chart svg").first.scroll_into_view_if_needed()
        box = page.locator(".chart svg").first.bounding_box()
        x = box["x"] + box["width"] * (44 + 308 * 0.5) / 360
        if options:
            page.touchscreen.tap(x, box["y"] + 50)
        else:
            page.mouse.move(x, box["y"] + 50)
        found, at = values(page)
        assert at == "after step 5" and float(found["training"]) == pytest.approx(rows[4]["loss"], abs=1e-4)
        mean = rows[4]["valid"]["mean"]
        assert float(found["validation, mean"]) == pytest.approx(mean, abs=1e-4)

    page.locator(".chart svg").first.focus()
    for _ in range(4):
        page.keyboard.press("ArrowLeft")
    assert values(page)[1] == "after step 3"
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert values(page)[1] == "after step 10"


def test_the_blind_test_tells_nothing_before_and_counts_after(open_page):
    orders = []
    for _ in range(2):
        page, wrong = open_page(360)
        orders.append(page.evaluate("[...document.querySelectorAll('#blind audio')].map(a => a.src)"))
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    shown = "[...document.querySelectorAll('#blind :is(img, .said)')].filter(e => e.offsetParent).length"
    assert page.evaluate(shown) == 0 and "wrong" not in page.inner_text("#blind")
    assert len({*page.evaluate("[...document.querySelectorAll('#blind audio')].map(a => a.ariaLabel)")}) == 1

    items = page.locator("#blind li")
    for i in range(12):
        truth, other = items.nth(i).get_attribute("data-truth"), {"true": "generated", "generated": "true"}
        answer = truth if i < 9 else other[truth]
        items.nth(i).get_by_role("button", name=answer, exact=True).click()
        assert items.nth(i).locator("output").inner_text() == f"{'right' if i < 9 else 'wrong'}: it is {truth}"
        assert items.nth(i).get_by_role("button").first.is_disabled()
        assert (page.inner_text("#score") == "") == (i < 11)
    assert "9 of 12 right: 75 % (95 % interval 47 to 91 %; by chance 50 %)" in page.inner_text("#score")
    assert page.evaluate(shown) == 24 and not wrong


def test_without_scripts_all_can_still_be_played(open_page):
    page, _ = open_page(800, java_script_enabled=False)
    assert page.locator("audio[controls][src]").count() == 34


def test_a_page_of_200_clips_opens_at_once_and_loads_what_is_seen(open_page, sounds, trained, monkeypatch):
    monkeypatch.setattr(lab.clips, "transcriber", fake_transcriber)
    for i in range(200):
        shutil.copy(sounds / "a.wav", sounds / f"clip-{i}.wav")
    write_page(sounds, read_config(trained[0]), "python -m lab.page x")
    seconds = []
    for _ in range(3):                                        # the machine may be busy
        began = time.perf_counter()
        page, wrong = open_page(1200, (sounds / "index.html").as_uri())
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    page.wait_for_timeout(300)
    assert 0 < page.evaluate(f"{CLIPS}.filter(a => a.readyState).length") < 40
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.wait_for_function(f"{CLIPS}.at(-1).duration == 1")
    assert page.evaluate(f"{CLIPS}.length") == 202 and not wrong
