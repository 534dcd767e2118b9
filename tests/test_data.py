import functools
import json
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import cdslm as room
from types import SimpleNamespace
from cdslm import Config
from lab import cache
from cdslm import HOP, RATE, UserError, keyed, keyed_noise, log_mel, open_corpus
from lab.topics import toy_source
from tests.conftest import command, speech_like


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "recordings"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("CDSLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def corpus(small, folder):
    """corpus(...): opens the folder with a window of 1.2 s."""
    return lambda **changes: open_corpus(small(data=str(folder), **changes))


def record(folder, name, seconds=8.0, rate=RATE, wave=None, **options):
    """A recording in the folder; its samples are noise unless given."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, speech_like(seconds, rate, seed=len(name)) if wave is None else wave, rate, **options)
    return path


def numbered(folder, name, seconds, sign=1):
    """A recording whose samples say in which frame of it they are: +-1, +-2, ... in 16 bits."""
    record(folder, name, wave=(sign * (1 + np.arange(round(seconds * 80))).repeat(HOP)).astype(np.int16))


def heard(corpus, split):
    """{(sign of the recording, frame)}: every frame that windows of a split can hold."""
    audio = corpus.windows("audio", split, range(22_000), 1)[:, HOP // 2]
    return {(int(np.sign(number)), abs(int(number)) - 1) for number in np.round(audio * 32767)}


def seconds_cached(corpus):
    return sum(shard["frames"] for shard in corpus.shards) / 80


def test_train_and_valid_keep_a_second_apart(corpus, folder):
    numbered(folder, "up.wav", 200)
    numbered(folder, "down.wav", 60, sign=-1)
    opened = corpus()
    train, valid = (heard(opened, split) for split in ("train", "valid"))
    assert not {(sign, frame + i) for sign, frame in valid for i in range(-79, 80)} & train
    assert 0.01 < len(valid) / len(train) < 0.3 and len(train) + len(valid) > 0.5 * 260 * 80
    assert opened.hours("train") == pytest.approx(len(train) / 80 / 3600, rel=0.01)


def test_they_keep_apart_where_a_long_recording_is_cut_too(corpus, folder, monkeypatch):
    monkeypatch.setattr(room, "SHARD_SECONDS", 60)
    numbered(folder, "long.wav", 290)
    opened = corpus()
    train, valid = (heard(opened, split) for split in ("train", "valid"))
    assert train and valid
    assert not {(sign, frame + i) for sign, frame in valid for i in range(-79, 80)} & train


def test_a_window_is_one_piece_of_one_recording_and_every_start_is_as_likely(corpus, folder):
    numbered(folder, "up.wav", 100)
    numbered(folder, "down.wav", 30, sign=-1)
    opened = corpus()
    audio = np.round(opened.windows("audio", "train", [keyed(1, "place", i) for i in range(2000)], 96) * 32767)
    frames = audio[:, HOP // 2::HOP]
    assert (frames == frames[:, :1] + np.sign(frames[:, :1]) * np.arange(96)).all()
    assert 0.15 < (frames < 0).mean() < 0.33 and len(np.unique(frames[:, 0])) > 700


def test_the_same_key_is_the_same_window(corpus, folder):
    record(folder, "a.wav", 60)
    keys = [5, 123_456_789, 2 ** 62]
    one, other = (corpus().windows("mel", "train", keys, 96) for _ in range(2))
    assert one.shape == (3, 96, 80) and one.dtype == np.float32 and (one == other).all()
    assert (one[0] != one[1]).any()


def test_audio_and_frames_of_a_key_belong_together(corpus, folder):
    record(folder, "a.wav", 60, rate=16_000)
    opened = corpus()
    audio, mel = (opened.windows(kind, "train", range(10, 14), 96) for kind in ("audio", "mel"))
    again = log_mel(torch.from_numpy(audio)).numpy()
    assert audio.shape == (4, 96 * HOP)
    assert np.abs(again - mel)[:, 4:-4].max() < 0.02


def test_a_split_is_stable(corpus, folder):
    numbered(folder, "a.wav", 100)
    assert heard(corpus(), "valid") == heard(corpus(), "valid")


@pytest.mark.parametrize("seconds", [9, 4, 1])
def test_a_new_file_moves_no_other_between_the_splits(corpus, folder, seconds, monkeypatch):
    """Recordings as long as a block, and clips that are joined; told apart by their loudness."""
    monkeypatch.setattr(room, "BLOCK_SECONDS", 10)

    def splits():
        return {split: {round(100 * level) for level in corpus_now.windows("audio", split, keys, 1)[:, 0]}
                for corpus_now in [corpus()] for split in ("train", "valid")}

    keys = [keyed(2, "split", i) for i in range(4000)]
    for level in range(10, 65):
        record(folder, f"{level}.wav", wave=np.full(seconds * 8000, level / 100), rate=8000)
    before = splits()
    record(folder, "00.wav", wave=np.full(seconds * 8000, 0.95), rate=8000)
    after = splits()
    assert before["valid"] and not before["valid"] & after["train"] - before["train"]
    assert not before["train"] & after["valid"] - before["valid"]


def test_an_interrupted_build_goes_on(corpus, folder, own_cache, monkeypatch):
    monkeypatch.setattr(room, "SHARD_SECONDS", 20)
    monkeypatch.setattr(room, "BLOCK_SECONDS", 10)
    for i in range(6):
        record(folder, f"{i}.wav", 15)
    opened = corpus()
    whole = opened.windows("mel", "train", range(50), 96)
    (place,) = own_cache.iterdir()
    shards = sorted(place.glob("*.json"))
    assert len(shards) > 2
    kept = shards[0].with_suffix(".mel.npy")
    stamp = kept.stat().st_mtime_ns
    shards[-1].unlink()
    shards[-1].with_suffix(".mel.npy").write_bytes(b"half written")
    again = corpus()
    assert (again.windows("mel", "train", range(50), 96) == whole).all()
    assert kept.stat().st_mtime_ns == stamp, "a shard that was complete was made again"


def test_hidden_files_do_not_count(corpus, folder):
    """macOS leaves a ._a.wav, which is no sound, beside a.wav on other disks."""
    record(folder, "a.wav", 30)
    (folder / "._a.wav").write_bytes(b"no sound")
    assert not corpus().skipped


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="Linux")
def test_many_shards_do_not_stay_open(corpus, folder, own_cache, monkeypatch):
    """A program may have about 1,000 files open; 1,000 hours are 2,000 shards."""
    monkeypatch.setattr(room, "SHARD_SECONDS", 10)
    monkeypatch.setattr(room, "BLOCK_SECONDS", 10)
    monkeypatch.setattr(room, "array", functools.lru_cache(maxsize=4)(room.array.__wrapped__))
    for i in range(20):
        record(folder, f"{i}.wav", 10)
    files = len(os.listdir("/proc/self/fd"))
    opened = corpus()
    opened.windows("mel", "train", range(200), 96)
    opened.windows("audio", "train", range(200), 96)
    assert len(opened.shards) >= 20 and len(os.listdir("/proc/self/fd")) <= files + 4


def test_a_finished_cache_is_not_built_again(corpus, folder, monkeypatch):
    record(folder, "a.wav", 30)
    corpus()
    monkeypatch.setattr(room, "build_shard", lambda *_: pytest.fail("built again"))
    corpus()


def test_other_ranks_open_what_rank_0_found(corpus, folder, small, own_cache, monkeypatch):
    record(folder, "a.wav", 30)
    opened = corpus()
    config = small(data=str(folder))
    Path(config.out).mkdir(parents=True)
    assert cache.indexed(config) is None
    cache.keep_index(config.out, opened)
    monkeypatch.setattr(room, "find_recordings", lambda *_: pytest.fail("searched again"))
    again = cache.indexed(config)
    keys = range(50)
    assert (again.windows("mel", "train", keys, 96) == opened.windows("mel", "train", keys, 96)).all()
    assert again.contents == opened.contents
    room.array.cache_clear()
    next(own_cache.rglob("*.audio.npy")).unlink()                      # as on a node with another disk
    assert cache.indexed(config) is None


def test_the_cache_can_be_made_before_training(folder, own_cache):
    record(folder, "a.wav", 30)
    done = command("lab.cache", "--data", folder)
    assert done.returncode == 0 and "the cache is in" in done.stdout and list(own_cache.rglob("*.json"))
    refused = command("lab.cache")
    assert refused.returncode == 2 and "--data FOLDER is missing" in refused.stderr


def test_a_changed_folder_gets_a_new_cache(corpus, folder, own_cache):
    record(folder, "a.wav", 30)
    assert seconds_cached(corpus()) == 30
    record(folder, "b.wav", 30)
    assert seconds_cached(corpus()) == 60
    assert len(list(own_cache.iterdir())) == 2, "a run may still use the old one"


def test_clips_shorter_than_the_window_are_joined_with_their_neighbours(corpus, folder):
    for i in range(200):
        record(folder, f"{i // 100}/{i:03d}.flac", 0.5, rate=8000)
    opened = corpus()
    assert seconds_cached(opened) == pytest.approx(100, rel=0.01)
    assert opened.windows("mel", "valid", range(4), 96).shape == (4, 96, 80)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "WAV"])
@pytest.mark.parametrize("channels, rate", [(1, 8000), (2, 44_100), (8, 48_000)])
def test_formats_rates_and_channels(corpus, folder, suffix, channels, rate):
    if suffix == "mp3" and channels > 2:
        pytest.skip("mp3 has two channels at the most")
    record(folder, f"deep/er/x.{suffix}", wave=np.repeat(speech_like(8, rate)[:, None], channels, 1), rate=rate)
    opened = corpus()
    loud = opened.windows("audio", "train", range(8), 96)
    assert loud.std() == pytest.approx(speech_like(8, rate).std() * min(1, RATE / rate) ** 0.5, rel=0.3)
    assert seconds_cached(opened) == pytest.approx(8, abs=0.15)


def test_files_that_cannot_be_used_are_skipped_counted_and_named(corpus, folder, capsys):
    record(folder, "good.wav", 30)
    (folder / "text.flac").write_text("no sound in here")
    (folder / "nothing.wav").write_bytes(b"")
    record(folder, "empty.wav", 0)
    record(folder, "nan.wav", wave=np.full(24_000, np.nan), subtype="FLOAT")
    whole = record(folder, "cut.flac", 5).read_bytes()
    (folder / "cut.flac").write_bytes(whole[:60])
    (folder / "notes.txt").write_text("not audio, nobody asked")
    opened = corpus()
    said = capsys.readouterr().out
    assert set(opened.skipped) == {"text.flac", "nothing.wav", "empty.wav", "nan.wav", "cut.flac"}
    assert "5 files" in said and all(name in said for name in opened.skipped)
    assert np.isfinite(opened.windows("mel", "train", range(100), 96)).all()
    assert set(corpus().skipped) == set(opened.skipped), "forgotten when the cache is used again"


def test_too_little_speech_is_a_users_error(corpus, folder):
    record(folder, "a.wav", 2)
    with pytest.raises(UserError, match="too little speech"):
        corpus()


def test_too_little_speech_is_said_before_any_is_cached(corpus, folder, cache, monkeypatch):
    monkeypatch.setattr("cdslm.build_cache", lambda source: pytest.fail("cached in vain"))
    record(folder, "a.wav", 2)
    with pytest.raises(UserError, match="too little speech"):
        corpus()


@pytest.mark.parametrize("size, seconds", [("tiny", 20), ("small", 20), ("base", 50)])
def test_toy_utterances_are_longer_than_the_window(size, seconds):
    """A window of 40 s can begin anywhere in the first 10."""
    source = toy_source(Config(size, toy_hours=1.0))
    assert {clip.seconds for clip in source.clips} == {seconds}
    assert sum(clip.seconds for clip in source.clips) == pytest.approx(3600, rel=0.01)
    assert source.name.endswith(f"x{seconds}s")


def test_a_disk_without_room_for_the_cache_is_said_first(small, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10 ** 6))
    with pytest.raises(UserError, match="0.00 GiB free, .* are needed for the cache"):
        open_corpus(small(toy_hours=0.06))


def test_one_recording_twice_is_too_little_speech(small, tmp_path):
    for folder in "ab":
        record(tmp_path / folder, "x.wav", 2)
    with pytest.raises(UserError, match="too little speech"):
        open_corpus(small(data=[str(tmp_path / "a"), str(tmp_path / "b")]))


def test_a_folder_without_sound_is_a_users_error(corpus, folder):
    with pytest.raises(UserError, match="no such folder"):
        corpus()
    folder.mkdir()
    with pytest.raises(UserError, match="--data"):
        corpus()
    (folder / "a.wav").write_text("hello")
    with pytest.raises(UserError, match="--data"):
        corpus()


def test_several_folders_are_one_corpus_and_keep_their_caches(corpus, small, folder, tmp_path, own_cache):
    other = tmp_path / "more"
    record(folder, "a.wav", 30)
    record(other, "a.wav", 50)
    (other / "b.wav").write_text("not sound")
    alone = corpus()
    (place,) = own_cache.iterdir()
    made = {path: path.stat().st_mtime_ns for path in place.glob("*.npy")}
    both = open_corpus(small(data=[str(folder), str(other)]))
    assert seconds_cached(both) == seconds_cached(alone) + 50 and both.skipped.keys() == {"b.wav"}
    assert made and all(path.stat().st_mtime_ns == time for path, time in made.items())
    with_toys = open_corpus(small(data=[str(folder), "toy"]))
    assert seconds_cached(with_toys) == seconds_cached(alone) + seconds_cached(open_corpus(small()))


def test_statistics_are_one_mean_and_one_deviation_over_all_bands(corpus, folder):
    record(folder, "a.wav", 60)
    opened = corpus()
    mel = opened.windows("mel", "train", [keyed(9, "check", i) for i in range(400)], 96)
    mean, deviation, live = opened.mel_stats()
    assert (mean, deviation) == (pytest.approx(mel.mean(), abs=0.05), pytest.approx(mel.std(), rel=0.05))
    assert live == 80


def test_dead_bands_are_counted(corpus, folder):
    """8 kHz recordings have nothing above 4 kHz."""
    record(folder, "a.wav", 60, rate=8000)
    assert 45 < corpus().mel_stats()[2] < 62


def test_toy_speech_is_the_corpus_of_toyspeech(small):
    from lab.toyspeech import ToySpeech
    opened = open_corpus(small())
    assert seconds_cached(opened) == 9 * 20
    heard = opened.windows("audio", "valid", [0], 96)[0]
    sources = [ToySpeech().utterance(i, 20.0).wave for i in range(9)]
    assert any(np.abs(wave[at:at + len(heard)] - heard).max() < 1e-3 for wave in sources
               for at in range(0, len(wave) - len(heard) + 1, HOP))


def test_randomness_is_keyed():
    assert keyed(0, "window", 5) == keyed(0, "window", 5)
    assert len({keyed(s, p, i) for s in range(3) for p in ("window", "noise") for i in range(50)}) == 300
    values = np.array([keyed(0, "x", i) / 2 ** 63 for i in range(2000)])
    assert 0 <= values.min() and values.max() < 1 and abs(values.mean() - 0.5) < 0.03
    assert torch.equal(keyed_noise(0, "n", 1, (3, 2), "cpu"), keyed_noise(0, "n", 1, (3, 2), "cpu"))


def test_a_shards_contents_are_plain_json(corpus, folder, own_cache):
    record(folder, "a.wav", 30)
    corpus()
    (place,) = own_cache.iterdir()
    (path,) = place.glob("*.json")
    assert json.loads(path.read_text())["clips"]
    audio = np.load(path.with_suffix(".audio.npy"), mmap_mode="r")
    mel = np.load(path.with_suffix(".mel.npy"), mmap_mode="r")
    assert audio.dtype == np.int16 and mel.dtype == np.float16 and mel.shape == (len(audio) // HOP, 80)


@pytest.mark.slow
def test_frames_join_without_a_seam_where_minutes_do(corpus, folder):
    record(folder, "a.wav", 130)
    opened = corpus()
    for split in ("train", "valid"):
        audio = opened.windows("audio", split, [keyed(3, "seam", i) for i in range(300)], 96)
        mel = opened.windows("mel", split, [keyed(3, "seam", i) for i in range(300)], 96)
        assert np.abs(log_mel(torch.from_numpy(audio)).numpy() - mel)[:, 4:-4].max() < 0.02
