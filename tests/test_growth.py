"""Growth: simulated speech is opened like real speech, exponents are right, and every size was measured."""
import sys

import numpy as np
import pytest
from lab import growth
from tests.conftest import command

import cdslm


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, and an empty cache."""
    monkeypatch.setenv("CDSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_a_simulated_cache_is_opened_and_not_made_again(folder, monkeypatch):
    growth.prepare("hours", 1, folder)
    monkeypatch.setattr(cdslm, "build_shard", None)
    corpus = cdslm.open_corpus(cdslm.Config("tiny", data=f"{folder}/speech"))
    assert sum(shard["frames"] for shard in corpus.shards) == 3600 * cdslm.FRAME_RATE
    assert corpus.stored("mel", "valid", [1, 2], 320).shape == (2, 320, 80)
    audio = next((folder / "cache").rglob("*.audio.npy"))
    assert audio.stat().st_size > 8e7 and audio.stat().st_blocks * 512 < 1e6              # it is a hole


@pytest.mark.parametrize("number", [1, 10, 400])
def test_short_clips_are_all_in_the_corpus(folder, monkeypatch, number):
    growth.prepare("clips", number, folder)
    monkeypatch.setattr(cdslm, "build_shard", None)
    shards = cdslm.build_cache(growth.short_clips(number))
    assert sum(len(shard["clips"]) for shard in shards) == number
    growth.open_clips(number, folder)()
    growth.split_clips(number, folder)()


@pytest.mark.parametrize("what", growth.AXES["files"][2])
def test_every_recording_is_found(folder, what):
    growth.prepare("files", 110, folder)
    found = growth.AXES["files"][2][what](110, folder)()
    assert len(found.clips if what == "search a folder" else found) == 110


@pytest.mark.parametrize("what", ["generate", "decode"])
def test_a_measurement_is_positive(what):
    seconds, own, mapped = growth.measure("window", 1, what, None)
    assert seconds > 0 and own >= 0 and mapped >= 0


def test_exponents_are_those_of_the_last_decade_and_of_the_last_two_sizes():
    sizes = np.array([1, 10, 20, 50, 100.0])
    assert growth.exponents(sizes, 3 * sizes ** 2) == pytest.approx((2, 2))
    assert growth.exponents(sizes, np.array([50, 1, 1, 1, 2.0]))[1] == pytest.approx(1)
    assert growth.exponents(sizes, 0 * sizes) is None


def test_every_size_was_measured_and_is_shown(capsys):
    rows = growth.read_rows(growth.RESULTS)
    measured = {(row["axis"], row["what"], int(row["size"])) for row in rows}
    assert measured == {(axis, what, size) for axis, (_, sizes, work) in growth.AXES.items()
                        for what in work for size in sizes}
    growth.table(rows)
    assert capsys.readouterr().out.count("\n") == 2 + sum(len(work) for _, _, work in growth.AXES.values())


def test_a_figure(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(growth, "AXES", {axis: growth.AXES[axis] for axis in ("window", "clips")})  # is quicker
    growth.draw(growth.read_rows(growth.RESULTS), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_mistakes_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["growth", "hourz"])
    with pytest.raises(cdslm.UserError, match="hourz: the axes are window, "):
        growth.main()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(cdslm.UserError, match="pip install matplotlib"):
        growth.draw([], tmp_path / "growth.png")


@pytest.mark.slow
def test_the_program_measures_two_sizes_of_each():
    before = growth.RESULTS.read_text()
    done = command("lab.growth", "window", "files", "--quick")
    assert done.returncode == 0, done.stderr
    assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == 6           # and the title
    assert growth.RESULTS.read_text() == before
