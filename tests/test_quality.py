"""Quality: distances are zero between equals and grow with the difference; missing judges are one line."""
import json
import sys
import types

import numpy as np
import pytest
import torch

import cdslm
from cdslm import HOP, RATE, UserError
from lab import quality
from lab.listener import speak
from lab.sides import Sides
from lab.toyspeech import ToySpeech
from tests.conftest import command

STATS = torch.tensor([-7.0, 2.5])


@pytest.fixture(scope="module")
def speech():
    """Waves (60, N) of toy speech, and the truth."""
    return speak(ToySpeech(), 7000, 60, 240, "speech")


def test_frechet_of_gaussians():
    """The closed form, for one and for correlated dimensions."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((200_000, 1)), 3 + 2 * rng.standard_normal((200_000, 1))
    assert quality.frechet(a, b) == pytest.approx(9 + 1, rel=0.02)            # (0 - 3)^2 + (1 - 2)^2
    assert quality.frechet(a, a) == pytest.approx(0, abs=1e-9)
    mixing = rng.standard_normal((3, 3))
    c = rng.standard_normal((1000, 3)) @ mixing
    assert quality.frechet(c, c) == pytest.approx(0, abs=1e-9)
    assert quality.frechet(c, c + [1, 2, 2]) == pytest.approx(9, abs=1e-6)
    assert quality.frechet(c, b[:1000] * [1, 1, 1]) == pytest.approx(quality.frechet(b[:1000] * [1, 1, 1], c))
    scipy = pytest.importorskip("scipy.linalg")
    d = rng.standard_normal((1000, 3)) @ rng.standard_normal((3, 3))
    root = scipy.sqrtm(np.cov(c.T) @ np.cov(d.T)).real
    exact = ((c.mean(0) - d.mean(0)) ** 2).sum() + np.trace(np.cov(c.T) + np.cov(d.T) - 2 * root)
    assert quality.frechet(c, d) == pytest.approx(exact, abs=1e-8)


def test_pitch_statistics_follow_the_truth(speech):
    waves, spoken = speech
    rows = quality.pitch_statistics(waves)
    assert rows.shape == (60, 4)
    truth = np.log2([u.speaker["pitch"] for u in spoken])
    assert np.corrcoef(rows[:, 0], truth)[0, 1] > 0.95
    spread = [list(quality_styles().values())[u.style][0] for u in spoken]
    assert np.corrcoef(rows[:, 1], spread)[0, 1] > 0.5
    assert (0.2 < rows[:, 3]).all() and (rows[:, 3] < 1).all()
    assert quality.pitch_statistics(torch.zeros(2, RATE)).shape == (0, 4)


def quality_styles():
    from lab.toyspeech import STYLES
    return STYLES


def test_distances_order_what_is_worse(speech):
    """Other speech of the kind is nearer than speech in noise; a higher voice is far in pitch."""
    waves, _ = speech
    mine, reference = waves[:20], waves[20:]
    noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(0))
    same = quality.distances(mine, reference, STATS)
    noisy = quality.distances(mine + 0.01 * noise, reference, STATS)
    fast = cdslm.resample(mine.flatten(), 36_000)             # half as high again
    length = mine.shape[1]
    higher = quality.distances(fast[:len(fast) // length * length].view(-1, length), reference, STATS)
    print(same, noisy, higher)
    assert noisy["mel"] > 3 * same["mel"] and higher["pitch"] > 2 * same["pitch"]
    assert np.isnan(quality.distances(torch.zeros(3, RATE), reference, STATS)["pitch"])


def sides_of(waves):
    length = 160 * HOP
    return Sides(waves[:8, :80 * HOP], waves[:8, 80 * HOP:], waves[8:40, :length], waves[8:40, :length],
                 torch.zeros(0), generated=waves[40:48, :length])


def test_absent_judges_are_one_line_each(speech, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "speechmos", None)
    monkeypatch.setitem(sys.modules, "resemblyzer", None)
    sides = sides_of(speech[0])
    report, notes = quality.judge(sides, sides.true, STATS)
    quality.show(report, notes)
    lines = capsys.readouterr().out.splitlines()
    assert set(report) == {"mel", "pitch"} and len(notes) == 2
    assert "pip install speechmos" in lines[-2] and "pip install resemblyzer" in lines[-1]
    with pytest.raises(UserError, match="pip install speechmos"):
        quality.dnsmos(sides.true)


def test_judges_get_sound_at_16_khz_and_are_averaged(speech, monkeypatch):
    """Adapters, with judges in the packages' place that return what they are given."""
    heard = []

    def run(samples, rate):
        heard.append((samples.dtype, rate, len(samples), np.abs(samples).max()))
        return {"ovrl_mos": 3.0 + len(heard) % 2, "sig_mos": 4.0, "bak_mos": 2.0, "p808_mos": 3.5, "extra": 0}

    class Voices:
        def __init__(self, device, verbose):
            assert device == "cpu" and not verbose

        def embed_utterance(self, samples):
            angle = float(np.abs(samples).mean())
            return np.array([np.cos(angle), np.sin(angle)])

    monkeypatch.setitem(sys.modules, "speechmos", types.SimpleNamespace(dnsmos=types.SimpleNamespace(run=run)))
    monkeypatch.setitem(sys.modules, "resemblyzer", types.SimpleNamespace(
        VoiceEncoder=Voices, preprocess_wav=lambda samples, rate: samples if rate == 16_000 else None))
    sides = sides_of(2 * speech[0])
    report, notes = quality.judge(sides, sides.true, STATS)
    assert not notes and len(heard) == 24
    assert heard[0][1:3] == (16_000, 160 * HOP * 16_000 // RATE) and max(row[3] for row in heard) <= 1
    assert report["DNSMOS overall"]["generated"] == {"value": 3.5, "half": pytest.approx(0.37, abs=0.01)}
    assert set(report["voice"]) == {"true", "reconstructed", "generated"}
    assert report["voice"]["true"]["value"] == pytest.approx(1, abs=0.01)


def test_a_run_is_judged(trained, tmp_path):
    kept = tmp_path / "quality.json"
    done = command("lab.quality", trained[0], "--minutes", "0.15", "--steps", "2", "--json", kept)
    assert done.returncode == 0, done.stderr
    report = json.loads(kept.read_text())
    assert report["mel"]["generated"]["value"] > report["mel"]["true"]["value"] >= 0
    assert "judged in" in done.stdout and not (trained[0] / "quality.json").exists()
    for words in (["run", "--minutes", "0"], ["run", "--steps", "0"], ["run", "--cfg", "nan"], []):
        with pytest.raises(UserError):
            quality.parse(words)


@pytest.mark.slow
def test_dnsmos_prefers_clean_speech(speech):
    pytest.importorskip("speechmos")
    waves = speech[0][:4]
    noise = torch.randn(waves.shape, generator=torch.Generator().manual_seed(0))
    clean, noisy = quality.dnsmos(waves), quality.dnsmos(waves + 0.03 * noise)
    print(clean, noisy)
    assert clean["DNSMOS background"].mean() > noisy["DNSMOS background"].mean() + 0.3


@pytest.mark.slow
def test_voices_tell_speakers_apart(speech):
    pytest.importorskip("resemblyzer")
    toy = ToySpeech()
    low, high = (dict(pitch=p, tract=t, rate=1.0, breath=0.1) for p, t in ((100, 0.95), (230, 1.14)))
    waves = torch.stack([torch.from_numpy(toy.utterance(i, 3.0, speaker=who).wave)
                         for i, who in enumerate((low, low, high, high))])
    alike = quality.voices(waves) @ quality.voices(waves).T
    print(alike)
    assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max()
