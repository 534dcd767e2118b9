import html
import json
import re
import shlex
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile
import torch

import cdslm
import lab.best
import lab.clips
import sample as speak
from cdslm import FRAME_RATE, HOP, RATE, UserError, load_audio
from lab.page import making
from tests.conftest import command, speech_like


@pytest.fixture
def say(trained, monkeypatch, tmp_path, capsys):
    """say("--num", 2, ...): run sample.py on the shared run -> (the file asked for, its output)."""
    monkeypatch.setattr(lab.clips, "transcriber", lambda *arguments: None)

    def run(*words, out="x.wav", run=trained[0], sample=cdslm.sample):
        words = [str(run), "--out", str(tmp_path / out), "--steps", "2", *map(str, words)]
        monkeypatch.setattr("sys.argv", ["sample.py", *words])
        capsys.readouterr()
        for module in (speak, lab.best):
            monkeypatch.setattr(module, "sample", sample)
        speak.main()
        return tmp_path / out, capsys.readouterr().out

    return run


@pytest.fixture
def recording(tmp_path):
    def make(name="me.flac", seconds=2.0, rate=16_000, wave=None):
        soundfile.write(tmp_path / name, speech_like(seconds, rate) if wave is None else wave, rate)
        return tmp_path / name

    return make


def seconds(path):
    return soundfile.info(path).frames / RATE


def test_a_recording_is_continued(say, recording):
    path, said = say("--prompt", recording(seconds=2.0), "--seconds", 1.5, "--cfg", 2, "--seed", 3)
    assert soundfile.info(path).samplerate == RATE and seconds(path) == pytest.approx(3.5, abs=0.02)
    assert "padded" not in said and "silen" not in said and "x.wav" in said


def test_the_recording_itself_comes_first(say, recording):
    prompt = recording(seconds=2.0)
    path, _ = say("--prompt", prompt)
    given, got = load_audio(prompt), load_audio(path)
    loudness = [
        w[: 2 * RATE].unflatten(0, (-1, 1200)).square().mean(1).sqrt() for w in (given, got)
    ]
    assert torch.corrcoef(torch.stack(loudness))[0, 1] > 0.9


def test_without_a_prompt_held_out_contexts_are_continued(say, tmp_path):
    say()
    files = sorted(tmp_path.glob("x-*.wav"))
    assert len(files) == 4 and all(seconds(file) == pytest.approx(1.2) for file in files)
    assert len({file.read_bytes() for file in files}) == 4


def test_several_are_made_in_one_batch(say, recording, tmp_path):
    batches = []

    def counted(model, context, *rest, **options):
        batches.append(len(context))
        return cdslm.sample(model, context, *rest, **options)

    say("--prompt", recording(), "--num", 3, sample=counted)
    files = sorted(tmp_path.glob("x-*.wav"))
    assert batches == [3] and len({file.read_bytes() for file in files}) == 3


@pytest.mark.parametrize("sampler", ["dpm", "ddim"])
def test_the_same_command_makes_the_same_file(say, recording, sampler):
    files = [
        say("--prompt", recording(), "--sampler", sampler, "--seed", seed, out=f"{i}.wav")[
            0
        ].read_bytes()
        for i, seed in enumerate((3, 3, 4))
    ]
    assert files[0] == files[1] != files[2]


def test_the_best_of_several_is_kept(say):
    """The same as by hand, from the same context; one alone is what is made without the flag."""
    plain, one = [say("--prompt", "none", *words, out=out)[0].read_bytes()
                  for words, out in (((), "a.wav"), (("--best-of", 1), "b.wav"))]
    assert plain == one
    calls = []

    def sample(model, context, frames, seed, **options):
        calls.append(cdslm.sample(model, context, frames, seed=seed, **options))
        return calls[-1]

    path, _ = say("--prompt", "none", "--best-of", 3, out="c.wav", sample=sample)
    files = []
    for made in list(calls):
        other, _ = say("--prompt", "none", out="d.wav", sample=lambda *_, made=made, **__: made)
        files.append(other.read_bytes())
    assert len(set(files)) == 3 and path.read_bytes() in files and files[0] == plain
    with pytest.raises(UserError, match="--watch is for one run"):
        speak.parse(["run", "--watch", "--best-of", "2"])


def test_without_the_lab_there_is_no_best(say, monkeypatch):
    monkeypatch.setattr(speak, "lab", lambda name: None)
    with pytest.raises(UserError, match="needs lab/best.py"):
        say("--prompt", "none", "--best-of", 2)


def test_beyond_a_window_it_goes_on(say):
    path, _ = say("--prompt", "none", "--seconds", 4.1)
    assert seconds(path) == pytest.approx(0.4 + 4.1, abs=0.02)


def test_from_silence(say):
    path, _ = say("--prompt", "none")
    assert np.isfinite(soundfile.read(path)[0]).all() and seconds(path) == pytest.approx(1.2)


def test_a_short_prompt_is_padded_with_silence_in_front_with_a_notice(say, recording):
    path, said = say("--prompt", recording(seconds=0.1))
    assert "padded" in said and seconds(path) == pytest.approx(1.2, abs=0.02)
    begin = load_audio(path)[: RATE // 5]
    assert begin.square().mean().sqrt() < 0.01


def test_a_silent_prompt_is_silence_with_a_notice(say, recording):
    silent, said = say("--prompt", recording(wave=np.zeros(32_000)), out="a.wav")
    assert "silen" in said
    assert silent.read_bytes() == say("--prompt", "none", out="b.wav")[0].read_bytes()


def test_it_works_when_the_training_data_is_gone(trained, say, monkeypatch):
    monkeypatch.setattr(cdslm, "open_corpus", lambda _: pytest.fail("looked for the data"))
    monkeypatch.setenv("CDSLM_CACHE", "/nowhere")
    say()


@pytest.mark.parametrize(
    "words",
    [
        ["--seconds", "0"],
        ["--seconds", "-1"],
        ["--seconds", "nan"],
        ["--seconds", "inf"],
        ["--num", "0"],
        ["--best-of", "0"],
        ["--steps", "0"],
        ["--cfg", "nan"],
        ["--sampler", "euler"],
        ["--seed", "-1"],
        ["--prompt", "/no/such/file.wav"],
        ["--prompt", __file__],
        ["--device", "tpu9"],
        ["--what"],
    ],
)
def test_a_mistake_is_a_users_error_of_one_line(say, words):
    with pytest.raises(UserError) as error:
        say(*words)
    assert "\n" not in str(error.value)


def test_a_mistake_writes_nothing(say, tmp_path):
    with pytest.raises(UserError):
        say("--prompt", __file__)
    assert not list(tmp_path.glob("x*"))


def test_a_file_in_a_folder_that_is_not_there_is_a_users_error(say):
    with pytest.raises(UserError, match="--out"):
        say(out="missing/x.wav")


def test_a_missing_run_is_a_users_error(say, tmp_path):
    with pytest.raises(UserError, match="no run there"):
        say(run=tmp_path / "nowhere")


def test_a_prompt_that_is_not_audio_is_one_line_and_status_2(trained):
    done = command("sample.py", trained[0], "--prompt", __file__)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )


def test_no_seam_between_windows(say):
    """Decoded as one: where a window ends nothing jumps more than elsewhere."""
    path, _ = say("--prompt", "none", "--seconds", 6)
    wave = load_audio(path)
    jump = wave.diff().abs()
    seams = [round((0.4 + 0.8 * i) * FRAME_RATE) * HOP for i in range(1, 7)]
    assert max(jump[at - 30 : at + 30].max() for at in seams) <= jump[RATE // 2 :].max()
    typical = jump[RATE // 2 :].unfold(0, 60, 60).amax(1).quantile(0.98)
    assert sum(bool(jump[at - 30 : at + 30].max() > typical) for at in seams) <= 2


# --------------------------------------------------------------------------------------------------
# The page. How it looks and plays in a browser is in test_page.py.


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the run, to be written to."""
    return shutil.copytree(trained[0], tmp_path / "run")


def test_the_page_shows_all_there_is(folder, say):
    row = dict(value=0.25, ceiling=0.5, floor=0.125, normalized=1 / 3)
    (folder / "judged.json").write_text(json.dumps({
        "n": [1, 2], "pjsd": [0.0625, None], "interval": [[0.051, 0.072], None], "true": [0.011, None],
        "floor": [0.03125, None], "toy": {"word_rate": row}}))
    (folder / "decided.png").write_bytes(b"")
    (folder / "older.wav").write_bytes((folder / "1_true.wav").read_bytes())
    _, said = say("--prompt", "none", "--num", 2, out="run/new.wav", run=folder)
    page = (folder / "index.html").read_text()
    sounds = {"new-1.wav", "new-2.wav", "older.wav"}
    sounds |= {f"{i}_{kind}.wav" for i in range(1, 5) for kind in ("generated", "true", "reconstruction")}
    assert {name for name in sounds if f'src="{name}"' in page} == sounds == {f.name for f in folder.glob("*.wav")}
    assert all(f'src="{Path(name).stem}.mel.png"' in page for name in sounds)
    assert "index.html" in said and "--prompt none --num 2" in page and 'src="decided.png"' in page
    for figure in ("0.0625", "0.0110", "0.0312", "0.250", "0.500", "0.125"):
        assert f"<td>{figure}" in page
    assert "0.0510 to 0.0720" in page and "word rate" in page
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    for level, loss in last["valid"].items():
        assert f"log-SNR {level}<td>{loss:.4f}" in page or f"validation, mean<td>{loss:.4f}" in page


def test_the_page_has_the_command_that_makes_such_a_run(folder, say):
    say("--prompt", "none", out="run/new.wav", run=folder)
    page = (folder / "index.html").read_text()
    line = page[page.index("python cdslm.py") :].split("</pre>")[0]
    assert cdslm.parse(shlex.split(line)[2:]) == cdslm.read_config(folder)
    for data in ('it\'s <odd> & "so"', ["a b", "c"]):
        odd = cdslm.Config(data=data, zero_terminal_snr=True, t_shift=-1.0, depth=3, out="a b")
        line = html.unescape(making(odd).removeprefix("<pre>").split("</pre>")[0])
        assert cdslm.parse(shlex.split(line)[2:]) == odd


def test_what_is_not_there_or_damaged_is_left_out_of_the_page(folder, say):
    for path in (*folder.glob("[1-4]_*"), folder / "log.jsonl"):
        path.unlink()
    (folder / "judged.json").write_text('{"n": ')
    (folder / "broken.wav").write_text("not a sound")
    say("--prompt", "none", out="run/new.wav", run=folder)
    page = (folder / "index.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["This command", "How it was made"]
    assert re.findall('<audio .*?src="(.*?)"', page) == ["new.wav"]


def test_nothing_in_a_run_folder_can_put_its_own_html_on_the_page(folder, say):
    bad = "<script>alert('x\")</script>"
    shutil.copy(folder / "1_true.wav", folder / f"{bad.replace('/', '')}.wav")
    shutil.copy(folder / "1_true.wav", folder / "%20#?&:é.wav")
    row = dict(value=0.2, ceiling=0.2, floor=0.2)
    (folder / "judged.json").write_text(
        json.dumps({"n": [bad], "pjsd": [0.1], "interval": [[0, 1]], "true": [0.1], "floor": [0.1],
                    "nulls": {bad: {"pjsd": [0.1]}}, "toy": {bad: row}})
    )
    with open(folder / "log.jsonl", "a") as log:
        log.write(
            json.dumps({"step": 11, "loss": 0.5, "lr": 0.1, "hours": 1, "epochs": 1,
                        "valid": {bad: 0.5, "mean": 0.5}})
            + "\n"
        )
    say("--prompt", "none", out=f"run/{bad.replace('/', '')}-2.wav", run=folder)
    page = (folder / "index.html").read_text()
    assert page.count("<script") == 1 and page.count("&lt;script") >= 8
    links = map(unquote, re.findall('<audio .*?src="(.*?)"', page))
    assert sorted(links) == sorted(path.name for path in folder.glob("*.wav"))


def test_sound_that_goes_elsewhere_leaves_the_run_as_it_was(folder, say):
    before = sorted(folder.iterdir())
    _, said = say("--prompt", "none", run=folder)
    assert sorted(folder.iterdir()) == before and "index.html" not in said
