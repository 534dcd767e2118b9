"""What real users bring: odd folders, odd files, odd environments."""
import errno
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

import cdslm
from cdslm import Config, UserError, load, load_audio, open_corpus, sample, train
from lab import plan
from tests.conftest import ROOT, SMALL, command, flags, speech_like
from tests.test_training import log


def record(path, seconds, seed=0, rate=8000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech_like(seconds, rate, seed), rate, **options)
    return path


@pytest.fixture
def recordings(tmp_path):
    """Ten recordings of 20 s."""
    for number in range(10):
        record(tmp_path / f"recs/{number}.wav", 20, number)
    return tmp_path / "recs"


# --------------------------------------------------------------------------------------------------
# 1. Nobody reads our output.

@pytest.mark.parametrize("closed", [pytest.param("stdout", marks=pytest.mark.slow),
                                    pytest.param("stderr", marks=pytest.mark.slow), "both"])
def test_a_reader_that_goes_away_costs_nothing(tmp_path, closed):
    """As `| tee log` or `| head -1`, and a terminal that was closed."""
    words = flags(**SMALL | dict(out=tmp_path / "run", steps=30, eval_every=10))
    streams = {name: subprocess.PIPE if closed in (name, "both") else subprocess.DEVNULL for name in ("stdout", "stderr")}
    process = subprocess.Popen([sys.executable, ROOT / "cdslm.py", *words], **streams)
    for name in streams:
        if streams[name] == subprocess.PIPE:
            getattr(process, name).close()
    assert process.wait(timeout=200) == 0
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 30


def test_ctrl_c_through_a_pipe_saves_the_step(tmp_path):
    """The terminal sends Ctrl-C to tee as well: it is gone when we want to print."""
    words = flags(**SMALL | dict(out=tmp_path / "run", steps=100_000, eval_every=50_000))
    process = subprocess.Popen([sys.executable, ROOT / "cdslm.py", *words], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while not (tmp_path / "run/log.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == 130
    assert load(tmp_path / "run/checkpoint.pt")["step"] == len(log(tmp_path / "run")) > 0


def test_the_head_of_a_long_output_is_no_error():
    done = subprocess.run(f"{sys.executable} cdslm.py --print-params | head -2; echo ${{PIPESTATUS[0]}}", shell=True,
                          executable="/bin/bash", cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "0" and not done.stderr


@pytest.mark.slow
def test_without_any_stderr_it_trains(tmp_path):
    words = flags(**SMALL | dict(out=tmp_path / "run"))
    program = f"import sys, cdslm; sys.stderr = sys.stdout = None; sys.argv[1:] = {words!r}; cdslm.cli(cdslm.main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and load(tmp_path / "run/checkpoint.pt")["step"] == 4


@pytest.mark.slow
def test_a_terminal_of_ascii_shows_any_name(tmp_path):
    out = tmp_path / "Stimme-\u00fc\u4e2d"
    done = command("cdslm.py", *flags(**SMALL | dict(out=out)), env=os.environ | dict(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0, done.stderr
    assert (out / "1_generated.wav").exists() and "\\u4e2d" in done.stdout


# --------------------------------------------------------------------------------------------------
# 2, 3. A cache in use; disks without locks.

def test_a_cache_in_use_stays(small, recordings):
    """A file is added while the first run trains; another run then needs another cache."""
    first = open_corpus(small(data=str(recordings)))
    before = first.windows("mel", "train", range(50), 96)
    record(recordings / "new.wav", 20, 99)
    open_corpus(small(data=str(recordings)))
    assert (first.windows("mel", "train", range(50), 96) == before).all()
    assert all(Path(f"{shard['stem']}.mel.npy").exists() for shard in first.shards)


@pytest.mark.parametrize("number", ["ENOLCK"])
def test_a_disk_without_locks_is_noted(mute, small, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(getattr(errno, number), "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    train(small(steps=1, toy_hours=0.03))
    assert "can't be locked here" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# 4, 5. Little speech, short clips; a file more.

def test_four_folders_of_one_short_file_each(small, tmp_path):
    folders = [tmp_path / name for name in "abcd"]
    for number, folder in enumerate(folders):
        record(folder / "x.wav", 13 + number, number)
    corpus = open_corpus(small(data=[str(folder) for folder in folders], ctx_seconds=0.2, gen_seconds=0.3))
    assert corpus.hours("train") > 0 and corpus.hours("valid") > 0


def test_clips_a_little_shorter_than_a_window_are_joined(tmp_path):
    """40 clips of 31 s for windows of 40 s."""
    for number in range(40):
        record(tmp_path / f"recs/{number}.wav", 31, number)
    corpus = open_corpus(Config("base", data=str(tmp_path / "recs"), out=str(tmp_path / "run")))
    assert corpus.hours("train") * 3600 > 31 * 30 and corpus.hours("valid") * 3600 >= 40


def test_what_is_announced_is_what_can_be_used(small, tmp_path, capsys):
    """A clip alone in its folder is too short for a window, and is counted."""
    record(tmp_path / "recs/long.wav", 100)
    for number in range(60):
        record(tmp_path / f"recs/{number}/clip.wav", 0.9, number)
    corpus = open_corpus(small(data=str(tmp_path / "recs")))
    used = {split: corpus.runs[split][corpus.runs[split][:, 2] >= 96, 2].sum() / 80 for split in ("train", "valid")}
    assert corpus.hours("train") * 3600 == pytest.approx(used["train"]) and sum(used.values()) <= 100
    assert "0.02 in pieces shorter than a window" in capsys.readouterr().out


def test_long_clips_are_never_joined(small, tmp_path):
    """A window lies within one recording wherever that is long enough."""
    for number in range(30):
        level = np.full(5 * 8000, (number + 1) / 100)
        (tmp_path / "recs").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"recs/{number}.wav", level, 8000)
    corpus = open_corpus(small(data=str(tmp_path / "recs")))
    windows = corpus.windows("audio", "train", [cdslm.keyed(0, "x", i) for i in range(500)], 96)[:, 2400:-2400]
    assert np.ptp(windows, axis=1).max() < 0.005


def split_of(corpus, levels=400):
    found = {}
    for split in ("train", "valid"):
        windows = corpus.windows("audio", split, [cdslm.keyed(0, "y", i) for i in range(6000)], 8)[:, 1200]
        found[split] = set(np.round(windows * levels).astype(int).tolist())
    return found


def test_a_clip_more_moves_no_other(small, tmp_path):
    """Short clips in one folder, one added in front."""
    def clip(name, level):
        soundfile.write(tmp_path / "recs" / name, np.full(3 * 8000, level / 400), 8000)

    (tmp_path / "recs").mkdir()
    for level in range(10, 210):
        clip(f"{level:03d}.wav", level)
    before = split_of(open_corpus(small(data=str(tmp_path / "recs"))))
    clip("000.wav", 300)
    after = split_of(open_corpus(small(data=str(tmp_path / "recs"))))
    assert before["valid"] and not before["valid"] & after["train"] and not before["train"] & after["valid"]


def test_a_resumed_run_notes_that_its_recordings_changed(mute, small, recordings, capsys):
    train(small(steps=2, data=str(recordings)))
    assert "have changed" not in capsys.readouterr().out
    record(recordings / "new.wav", 20, 99)
    train(small(steps=4, data=str(recordings)))
    assert "note: the recordings have changed since this run began" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# 7. Recordings that would not be heard.

@pytest.mark.parametrize("suffix", [".m4a", ".webm", ".MP4"])
def test_what_soundfile_lacks_is_named_with_the_remedy(small, recordings, capsys, suffix):
    (recordings / f"x{suffix}").write_bytes(b"whatever")
    corpus = open_corpus(small(data=str(recordings)))
    said = capsys.readouterr().out
    assert f"x{suffix}" in corpus.skipped and f"x{suffix}" in said and "ffmpeg -i" in said


def test_linked_folders_are_searched_and_loops_end(small, recordings, tmp_path):
    record(tmp_path / "elsewhere/y.wav", 30, 7)
    (recordings / "link").symlink_to(tmp_path / "elsewhere")
    (recordings / "loop").symlink_to(recordings)
    corpus = open_corpus(small(data=str(recordings)))
    assert sum(shard["frames"] for shard in corpus.shards) == (10 * 20 + 30) * 80


def test_stereo_in_opposite_phase_is_not_silence(tmp_path):
    wave = speech_like(2, 24_000)
    soundfile.write(tmp_path / "x.wav", np.stack([wave, -wave], 1), 24_000)
    assert load_audio(tmp_path / "x.wav").std() == pytest.approx(wave.std(), rel=0.01)


@pytest.mark.parametrize("scale, expected", [(1, 1), (32767, 1), (0.1, 0.1), (2.0, None)])
def test_floats_in_the_scale_of_integers_are_not_clipped(tmp_path, scale, expected):
    wave = speech_like(2, 24_000)
    soundfile.write(tmp_path / "x.wav", wave * scale, 24_000, subtype="FLOAT")
    found = load_audio(tmp_path / "x.wav")
    expected = np.clip(wave * scale, -1, 1).std() if expected is None else wave.std() * expected
    assert found.std() == pytest.approx(expected, rel=0.01)


# --------------------------------------------------------------------------------------------------
# 6. Recordings that libsndfile reads only in part.

def joined(path, **options):
    """Three recordings of 10 s, one after the other in one file."""
    parts = []
    for number in range(3):
        record(path, 10, number, 24_000, **options)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))


def without_length(path):
    """An mp3 of variable bit rate whose header does not state its length: loud, then quiet."""
    wave = speech_like(32, 24_000)
    wave[12 * 24_000:22 * 24_000] *= 0.001
    soundfile.write(path, wave, 24_000, bitrate_mode="VARIABLE", compression_level=0.3)
    path.write_bytes(path.read_bytes().replace(b"Xing", bytes(4)))


def too_short_a_header(path):
    """A WAV of 30 s whose header says 10 s."""
    record(path, 30, rate=24_000)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at:at + 4] = (10 * 48_000).to_bytes(4, "little")
    path.write_bytes(data)


def no_length(path):
    """A FLAC that was written to a pipe: its header has no length."""
    record(path, 30, rate=24_000)
    data = bytearray(path.read_bytes())
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    path.write_bytes(data)


def shortened(path):
    record(path, 30, rate=24_000)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])


@pytest.mark.parametrize("name, make", [
    ("joined.wav", joined), ("joined.flac", joined), ("joined.mp3", joined), ("joined.ogg", joined),
    ("lie.wav", too_short_a_header), ("pipe.flac", no_length), ("vbr.mp3", without_length),
    ("cut.mp3", shortened), ("cut.flac", shortened)])
def test_what_is_read_in_part_is_counted(small, recordings, capsys, name, make):
    """What can be read of it is used, and the file is named."""
    make(recordings / name)
    corpus = open_corpus(small(data=str(recordings)))
    assert name in corpus.skipped and f"1 files can't be used, or not whole: {name}" in capsys.readouterr().out
    seconds = sum(shard["frames"] for shard in corpus.shards) / 80 - 200
    assert seconds == 0 or 9 < seconds < 32
    with pytest.raises(UserError, match=name):
        load_audio(recordings / name)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.au"])
def test_whole_recordings_are_not_called_cut(recordings, name):
    """Nor does a picture or a chunk of text after the sound make them so."""
    record(recordings / name, 62, rate=24_000)
    assert len(load_audio(recordings / name)) == 62 * 24_000
    with open(recordings / name, "ab") as file:
        file.write(bytes(4000))
    assert len(load_audio(recordings / name)) == pytest.approx(62 * 24_000, abs=2400)


def test_recordings_of_any_name_are_read(small, recordings, tmp_path):
    """Bytes that are not UTF-8, and a folder of such a name."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xff"))
    recordings.rename(folder)
    (folder / "3.wav").rename(folder / os.fsdecode(b"\xe9.wav"))
    corpus = open_corpus(small(data=str(folder)))
    assert not corpus.skipped and sum(shard["frames"] for shard in corpus.shards) == 200 * 80


def test_an_out_that_torch_cannot_open_is_refused_first(small, recordings, tmp_path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/o\xff")
    with pytest.raises(UserError, match="not valid UTF-8"):
        train(small(data=str(recordings), out=out))
    with pytest.raises(UserError, match="could not be written"):
        cdslm.save_audio(out + ".wav", torch.zeros(10))
    assert not Path(out).exists()


# --------------------------------------------------------------------------------------------------
# 8, 9. One place, one name; output inside the input.

def test_one_folder_has_one_name(mute, small, recordings, tmp_path, monkeypatch):
    """Relative, with a slash, absolute, from elsewhere, by a link, with ~."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(recordings)
    train(small(steps=1, data="recs"))
    for name in ("recs/", "./recs", str(recordings), "link", "~/recs", Path("recs")):
        train(small(steps=1, data=name))
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    train(small(steps=1, data="../recs"))
    assert Path(cdslm.read_config(tmp_path / "run").data[0]) == recordings


def test_folders_that_overlap_are_used_once(small, recordings):
    record(recordings / "sub/y.wav", 30, 5)
    alone = open_corpus(small(data=str(recordings)))
    both = open_corpus(small(data=[str(recordings), str(recordings / "sub"), f"{recordings}/"]))
    assert both.hours("train") == alone.hours("train")


def test_the_cache_of_another_user_is_read(small, recordings, monkeypatch):
    """A complete cache needs no right to write; a new one names what to set."""
    corpus = open_corpus(small(data=str(recordings)))

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cdslm, "lock", denied)
    monkeypatch.setattr(Path, "write_text", denied)
    assert open_corpus(small(data=str(recordings))).hours("train") == corpus.hours("train")
    record(recordings / "more.wav", 20)
    with pytest.raises(UserError, match="cache .*: Permission denied; set CDSLM_CACHE"):
        open_corpus(small(data=str(recordings)))


def test_a_moved_folder_keeps_its_cache(small, recordings, tmp_path, monkeypatch):
    open_corpus(small(data=str(recordings)))
    (tmp_path / "new").mkdir()
    recordings.rename(tmp_path / "new/recs")
    monkeypatch.setattr(cdslm, "build_shard", lambda *_: pytest.fail("cached again"))
    open_corpus(small(data=str(tmp_path / "new/recs")))


def test_one_file_is_data_too(small, tmp_path):
    path = record(tmp_path / "talk.wav", 120)
    corpus = open_corpus(small(data=str(path)))
    assert corpus.hours("train") > 0.02 and not corpus.skipped


def test_a_glob_is_data_too_and_nothing_is_not(small, recordings, monkeypatch):
    monkeypatch.chdir(recordings)
    assert len(cdslm.places("[0-3]*.wav")) == 4
    record(recordings / "old [0-3]/a.wav", 1)
    assert cdslm.places("old [0-3]") == [str(recordings / "old [0-3]")]
    with pytest.raises(UserError, match="no such folder"):
        train(small(data=""))


def test_a_run_folder_inside_the_data_is_not_learned_from(mute, small, recordings, monkeypatch):
    monkeypatch.chdir(recordings)
    hours = open_corpus(small(data=".", out="run")).hours("train")
    train(small(steps=1, data=".", out="run"))
    record(recordings / "run/1_generated.wav", 20)
    assert open_corpus(small(data=".", out="run")).hours("train") == hours


# --------------------------------------------------------------------------------------------------
# 10, 11, 14. Odd environments; memory; messages.

@pytest.mark.parametrize("left_over", [dict(RANK="1", WORLD_SIZE="2"), dict(LOCAL_RANK="3", RANK="")])
def test_variables_left_over_from_a_launcher_do_not_count(mute, small, monkeypatch, left_over):
    for name, value in left_over.items():
        monkeypatch.setenv(name, value)
    train(small(steps=1))
    assert cdslm.ranks() == (0, 1)


def test_a_rank_alone_says_that_it_waits(monkeypatch, capsys):
    """All variables of a launcher are there, but no other rank is."""
    for name, value in dict(RANK="3", WORLD_SIZE="4", MASTER_ADDR="here", MASTER_PORT="1234").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cdslm, "WAIT", 0.01)
    monkeypatch.setattr(cdslm.dist, "init_process_group", lambda *_, **__: time.sleep(0.3) or 1 / 0)
    with pytest.raises(ZeroDivisionError), cdslm.together():
        pass
    assert "rank 3 of 4 waits for the others at here:1234" in capsys.readouterr().out


def test_without_a_home_it_says_what_to_set(monkeypatch):
    monkeypatch.delenv("CDSLM_CACHE")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(UserError, match="set CDSLM_CACHE"):
        cdslm.cache_root()


def test_it_trains_in_a_thread(mute, small, tmp_path):
    errors = []

    def work():
        try:
            train(small(steps=2))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors and load(tmp_path / "run/checkpoint.pt")["step"] == 2


def test_what_a_notebook_hands_over(small, tmp_path):
    (tmp_path / "b").mkdir()
    config = small(out=tmp_path / "run", data=(tmp_path, "toy"))
    assert config.out == str(tmp_path / "run")
    assert cdslm.places(config.data) == [str(tmp_path.resolve()), "toy"] and cdslm.places(tmp_path / "b")
    frames = cdslm.AudioAutoencoder(decoder="griffinlim").encode(torch.from_numpy(0.1 * np.ones((1, 3000))))
    assert frames.dtype == torch.float32


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 500])
def test_a_context_of_any_length_can_be_continued(small, frames):
    model = cdslm.MMDiT(small()).eval()
    context = torch.zeros(2, frames, 80)
    assert sample(model, context, 50, steps=1).shape == (2, 50, 80)


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
                                   MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_is_one_line(capsys, error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        cdslm.cli(main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: out of memory") and said.count("\n") == 1


def test_other_errors_of_torch_are_not_hidden():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError):
        cdslm.cli(main)


def test_a_checkpoint_given_for_the_run_folder(trained):
    with pytest.raises(UserError, match="is a file; give the run folder"):
        cdslm.load_run(trained[0] / "checkpoint.pt")


def test_printed_commands_can_be_pasted(small, capsys, tmp_path, cache):
    out = tmp_path / "my run; it's"
    train(small(steps=1, out=str(out)))
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("next: python sample.py"))
    assert shlex.split(line)[3] == str(out)


def test_only_training_promises_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt

    for resumable in (False, True):
        with pytest.raises(SystemExit):
            cdslm.cli(main, resumable)
        assert ("goes on" in capsys.readouterr().err) == resumable


# --------------------------------------------------------------------------------------------------
# 11, 13. Prompts and outputs of sample.py.

def test_a_long_prompt_is_copied_not_resynthesised(trained, tmp_path):
    """Only its end is encoded and decoded; there is no jump where the two meet."""
    wave = speech_like(60, 24_000)
    soundfile.write(tmp_path / "me.wav", wave, 24_000, subtype="PCM_16")
    done = command("sample.py", trained[0], "--prompt", tmp_path / "me.wav", "--out", tmp_path / "x.wav", "--steps", "2")
    assert done.returncode == 0 and "60.0 s of context" in done.stdout, done.stderr
    made, given = load_audio(tmp_path / "x.wav"), load_audio(tmp_path / "me.wav")
    seen = len(given) - round(0.4 * 24_000)
    ratio = made[:seen].std() / given[:seen].std()                            # loud samples turn all down
    assert len(made) == len(given) + round(0.8 * 24_000)
    assert (made[:seen] - ratio * given[:seen]).abs().max() < 1e-3


@pytest.mark.parametrize("out, why", [("x.mp3", "only .wav"), ("x", "only .wav"), ("me.wav", "is the prompt itself"),
                                      ("no/x.wav", "no folder")])
def test_what_sample_would_write_is_checked_first(trained, tmp_path, monkeypatch, out, why):
    import sample as program
    record(tmp_path / "me.wav", 2)
    before = (tmp_path / "me.wav").read_bytes()
    words = ["sample.py", str(trained[0]), "--prompt", str(tmp_path / "me.wav"), "--out", str(tmp_path / out)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(program, "load_run", lambda *_: pytest.fail("work began"))
    with pytest.raises(UserError, match=why):
        program.main()
    assert (tmp_path / "me.wav").read_bytes() == before


def test_an_output_folder_gets_files_with_names(trained, tmp_path, monkeypatch):
    import sample as program
    monkeypatch.setattr(sys, "argv", ["sample.py", str(trained[0]), "--num", "3", "--out", f"{tmp_path}/", "--steps", "1"])
    program.main()
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == [f"continued-{i}.wav" for i in (1, 2, 3)]


@pytest.mark.parametrize("version, asked, answers, why", [
    (None, "auto", True, "was built without CUDA; pip install torch"),
    ("13.0", "auto", True, "needs a driver for CUDA 13.0; update the driver, or pip install torch"),
    (None, "cpu", True, ""), (None, "auto", False, "")])
def test_a_gpu_that_this_torch_cannot_use_is_noted(small, monkeypatch, capsys, version, asked, answers, why):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(plan.subprocess, "run", lambda name, **_: SimpleNamespace(returncode=0 if answers else 9))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    cdslm.announce(small(device=asked), torch.device("cpu"), torch.float32)
    said = capsys.readouterr().out
    assert why in said and ("note:" in said) == bool(why)
