"""sample.py --watch, several runs on one page, and the blind test: what they write."""
import json
import math
import re
import shutil

import pytest
import torch

import cdslm
import lab.blind
import lab.clips
import sample as speak
from cdslm import UserError, load_audio, load_run, read_config


@pytest.fixture(autouse=True)
def no_recogniser(monkeypatch):
    monkeypatch.setattr(lab.clips, "transcriber", lambda *arguments: None)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(program, word, ...): call a program's main -> what it prints."""
    def call(program, *words):
        monkeypatch.setattr("sys.argv", ["program", *map(str, words)])
        capsys.readouterr()
        program.main()
        return capsys.readouterr().out
    return call


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained[0], tmp_path / "a")


def test_watching_adds_estimates_and_guidance_to_the_page(folder, run):
    (folder / "watch-99.wav").write_bytes((folder / "1_true.wav").read_bytes())    # of an older command
    run(speak, folder, "--watch", "--steps", 5)
    names = ["watch-01", "watch-02", "watch-04", "watch-05", "watch-cfg-1", "watch-cfg-2", "watch-cfg-4"]
    assert sorted(path.stem for path in folder.glob("watch-*.wav")) == names
    assert all(len(load_audio(path)) == 1.2 * 24_000 for path in folder.glob("watch-*.wav"))
    assert (folder / "watch-05.wav").read_bytes() == (folder / "watch-cfg-2.wav").read_bytes()

    page = (folder / "index.html").read_text()
    section = page[page.index("Watch it think"):page.index("<h2>Held-out")]
    assert [section.index(f'src="{name}.wav"') for name in names] == sorted(
        section.index(f'src="{name}.wav"') for name in names)
    angles = cdslm.levels(read_config(folder), 5)
    for i in (1, 2, 4, 5):
        assert f"after {i} of 5\nlog-SNR {-2 * math.log(math.tan(angles[i - 1])):.1f}" in section
    assert all(f"guidance {scale}" in section for scale in (1, 2, 4))

    run(speak, folder, "--prompt", "none", "--steps", 1)                           # it stays there
    assert "log-SNR 10" not in page and "after 1 of 5\nlog-SNR -10.0" in (folder / "index.html").read_text()


@pytest.mark.parametrize("words", [[], ["--sampler", "ddim"], ["--cfg", "1", "--seed", "5"], ["--steps", "1"]])
def test_the_last_estimate_is_what_sample_returns(trained, words):
    config, model, autoencoder = load_run(trained[0])
    arguments = speak.parse([str(trained[0]), "--watch", "--steps", "7", *words])
    waves, _ = speak.contexts(arguments, config, model.hears)
    context = autoencoder.encode(waves)
    shown = list(speak.watch(arguments, model, context).values())
    expected = cdslm.sample(model, context, None, arguments.steps, arguments.cfg, arguments.sampler, arguments.seed)
    assert torch.equal(shown[-4][1], expected) and f"{arguments.steps} of {arguments.steps}" in shown[-4][0]
    if arguments.steps > 1:
        assert not torch.equal(shown[0][1], expected)


@pytest.mark.parametrize("words", [["--num", 2], ["--seconds", 3], ["--out", "x.wav"], ["another"]])
def test_watching_is_for_one_run_and_its_page(trained, words):
    with pytest.raises(UserError, match="--watch is for one run"):
        speak.parse([str(trained[0]), "--watch", *map(str, words)])


@pytest.fixture
def other(folder):
    """A second run with another setting, <odd> in name and text, and one more word to say."""
    other = shutil.copytree(folder, folder.with_name("b <i>"))
    facts = json.loads((other / "config.json").read_text())
    del facts["toy_grammar"]                                  # an older run: it has the default
    (other / "config.json").write_text(json.dumps(facts | {"min_snr_gamma": 5.0, "method": "<u>changed"}))
    return other


def test_several_runs_continue_the_same_contexts_from_the_same_noise(folder, other, run):
    said = run(speak, folder, other, "--steps", 2, "--num", 3)
    both = folder.with_name("a-vs-b <i>")
    assert str(both / "index.html") in said and not (folder / "continued-1.wav").exists()
    files = sorted(path.name for path in both.glob("*.wav"))
    assert files == ["1-1.wav", "1-2.wav", "2-1.wav", "2-2.wav", "3-1.wav", "3-2.wav"]
    for i in (1, 2, 3):                                       # the same weights, so the same sound
        assert (both / f"{i}-1.wav").read_bytes() == (both / f"{i}-2.wav").read_bytes()

    page = (both / "index.html").read_text()
    assert page.index("Settings that differ") < page.index("This command") < page.index("How it learned")
    table = page[page.index("<table"):page.index("</table>")]
    assert re.findall('scope="row">(.*?)<td>', table) == ["min_snr_gamma", "code of Part I"]
    assert "<td>0.2<td>5.0" in table and "&lt;u&gt;changed" in table and "<u>" not in page
    assert page.index('src="1-1.wav"') < page.index('src="1-2.wav"') < page.index('src="2-1.wav"')
    assert f"1: {folder}" in page and "b &lt;i&gt;" in page and "<h2>Held-out" not in page


def test_judges_of_several_runs_stand_beside_each_other(folder, other, run):
    for place, value in ((folder, 0.25), (other, 0.125)):
        (place / "judged.json").write_text(json.dumps({
            "n": [1], "pjsd": [value], "interval": [[value - 0.1, value + 0.1]], "true": [0.01], "floor": [0.02]}))
    run(speak, folder, other, "--steps", 1, "--num", 1, "--out", folder.with_name("both"))
    page = (folder.with_name("both") / "index.html").read_text()
    judged = page[page.index("<h2>Judged"):]
    rows = re.findall(r'scope="row">(.*?)<td>.*?<td>([\d.]+)', judged, re.S)
    assert [value for _, value in rows] == ["0.250", "0.125", "0.0100", "0.0200"]
    assert rows[0][0] == str(folder) and rows[2][0] == "true"


def test_a_page_of_several_runs_needs_a_folder(folder, other, tmp_path):
    for out in (tmp_path / "missing/both", folder / "config.json"):
        with pytest.raises(UserError, match="--out"):
            speak.output_files(speak.parse([str(folder), str(other), "--out", str(out)]))
    assert not (tmp_path / "missing").exists()


def test_runs_that_are_not_there_leave_nothing(folder, run, tmp_path):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="no run there"):
        run(speak, folder, tmp_path / "nowhere")
    assert sorted(tmp_path.iterdir()) == before


def test_half_of_the_blind_test_is_generated(folder, run):
    run(lab.blind, folder)
    page = (folder / "index.html").read_text()
    truths = re.findall('<li data-truth="(.*?)">.*?<audio [^>]*src="(.*?)"', page)
    assert sorted(name for _, name in truths) == [f"blind-{i:02}.wav" for i in range(1, 13)]
    assert sorted(truth for truth, _ in truths) == 6 * ["generated"] + 6 * ["true"]

    # The true ones are encoded and decoded, like the run's own reconstructions.
    true = [load_audio(folder / name) for truth, name in truths if truth == "true"]
    own = [load_audio(folder / f"{i}_reconstruction.wav") for i in range(1, 5)]
    assert sum(any(torch.allclose(wave, other, atol=1e-3) for other in own) for wave in true) == 4
