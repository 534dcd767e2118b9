"""Nothing is lost: runs killed at any moment, damaged files, full disks, signals."""
import collections
import concurrent.futures
import contextlib
import errno
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import cdslm
from cdslm import load, save, train
from cdslm import UserError, open_corpus
from tests.conftest import ROOT, SMALL, command, flags
from tests.test_checkpoints import Bomb, newest
from tests.test_training import log, same

RUN = SMALL | dict(steps=18, eval_every=3, decoder="neural", decoder_steps=4, self_condition=0.5)
PHASES = {"cache": (cdslm, "build_shard"), "autoencoder": (cdslm, "fit_autoencoder"), "step": (cdslm.Trainer, "step"),
          "validation": (cdslm.Trainer, "validate"), "checkpoint": (cdslm, "save")}


def told(pipe, phase, function):
    """`function`, telling when it begins and when it has ended."""
    def telling(*arguments, **options):
        pipe.send((phase, "begins", time.perf_counter()))
        result = function(*arguments, **options)
        pipe.send((phase, "ends", time.perf_counter()))
        return result
    return telling


def program(words, cache, pipe):
    """What `python cdslm.py WORDS` does, in a process that can be killed, without forecast and sound."""
    os.environ["CDSLM_CACHE"] = str(cache)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    cdslm.listen, cdslm.announce = lambda *_: None, lambda *_: None
    for phase, (owner, name) in PHASES.items():
        setattr(owner, name, told(pipe, phase, getattr(owner, name)))
    train(cdslm.parse(words))


def started(folder):
    """The program, begun, in `folder`: a process and what it tells of its phases."""
    processes = multiprocessing.get_context("forkserver")              # torch is imported once, not fifty times
    processes.set_forkserver_preload([__name__])
    hear, tell = processes.Pipe(duplex=False)
    words = ["--size", "tiny", *flags(**RUN | dict(out=folder / "run"))]
    process = processes.Process(target=program, args=(words, folder / "cache", tell))
    process.start()
    tell.close()
    return process, hear


def heard(pipe):
    """All that is still to hear from a process that has ended."""
    while True:
        try:
            yield pipe.recv()
        except EOFError:
            return


def at_home(cache, **more):
    """The environment with a cache of its own."""
    return os.environ | {"CDSLM_CACHE": str(cache)} | more


def heed():
    """Ctrl-C stops the program even if these tests run in the background, where it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def files(folder):
    """{name: contents} of a folder's files; of a log what is not a time, of checkpoints what is in them."""
    found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: log(path.parent) if name.endswith("log.jsonl") else load(path) if path.suffix == ".pt" else
            path.read_bytes().replace(str(folder).encode(), b"") for name, path in found.items()}


@pytest.mark.slow
def test_a_run_killed_at_25_moments_is_the_run_that_was_not(tmp_path, capsys):
    """SIGKILL within the cache, the autoencoder, a step, a validation and a checkpoint; then the same command."""
    folder = tmp_path / "whole"
    process, pipe = started(folder)
    begun, lengths = {}, collections.defaultdict(list)
    for phase, what, when in heard(pipe):
        if what == "begins":
            begun[phase] = when
        else:
            lengths[phase].append(when - begun[phase])
    process.join()
    assert process.exitcode == 0
    whole, rng, fell, halves = files(folder), random.Random(7), collections.Counter(), 0
    assert [row["step"] for row in whole["run/log.jsonl"]] == list(range(1, RUN["steps"] + 1))
    for number, phase in enumerate(5 * list(PHASES)):
        folder = tmp_path / str(number)
        process, pipe = started(folder)
        which, last = rng.randrange(len(lengths[phase])), None
        while which >= 0:                                              # until that phase begins for the n-th time ...
            last = pipe.recv()
            which -= last[:2] == (phase, "begins")
        time.sleep(0.8 * rng.random() * min(lengths[phase]))           # ... and then a little
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        open_phases = [last[0]]
        for phase_now, what, _ in heard(pipe):
            open_phases = open_phases + [phase_now] if what == "begins" else open_phases[:-1]
        fell[open_phases[-1] if open_phases else "between"] += 1
        halves += any(folder.rglob("*.tmp"))
        process, pipe = started(folder)
        collections.deque(heard(pipe), maxlen=0)
        process.join()
        assert process.exitcode == 0
        again = files(folder)
        assert whole.keys() <= again.keys() <= whole.keys() | {"run/trunk.previous.pt"}
        for name in whole.keys() - {"run/checkpoint.previous.pt"}:
            assert same(whole[name], again[name]), f"killed in {phase}: {name} differs"
    with capsys.disabled():
        where = ", ".join(f"{times} in {phase}" for phase, times in fell.items())
        print(f"\n{sum(fell.values())} kills ({where}; {halves} left a half-written file): all bit-identical to the "
              f"uninterrupted one")
    assert sum(fell.values()) == 25 and all(fell[phase] >= 2 for phase in PHASES)


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("during", ["training", "caching"])
def test_a_signal_stops_the_command_and_says_how_to_go_on(tmp_path, number, status, during):
    hours = {"training": 0.05, "caching": 3}[during]
    settings = SMALL | dict(out=tmp_path / "run", steps=100_000, eval_every=50_000, toy_hours=hours)
    process = subprocess.Popen([sys.executable, ROOT / "cdslm.py", *flags(**settings)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, env=at_home(tmp_path / "cache"), text=True, preexec_fn=heed)
    at = tmp_path / "run/log.jsonl" if during == "training" else tmp_path / "cache"
    while not at.exists():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == status and "the same command goes on" in said and "Traceback" not in said
    assert not list(tmp_path.rglob("*.tmp"))
    if during == "training":
        assert load(tmp_path / "run/checkpoint.pt")["step"] == len(log(tmp_path / "run")) > 0


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_without_a_broken_file(tmp_path):
    """In the middle of a checkpoint that takes forever."""
    slow = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import cdslm
step, save = cdslm.Trainer.step, cdslm.torch.save
def half(contents, path):
    if contents.get("step") != 5:
        return save(contents, path)
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
def stepped(trainer):
    if trainer.done == 4:
        os.kill(os.getpid(), signal.SIGINT)
    return step(trainer)
cdslm.torch.save, cdslm.Trainer.step = half, stepped
sys.argv = ["cdslm.py", *{flags(**SMALL | dict(out=tmp_path / "run", steps=8, eval_every=3))!r}]
cdslm.cli(cdslm.main)
"""
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, timeout=55, preexec_fn=heed)
    assert done.returncode == 130 and "the same command goes on" in done.stderr and "Traceback" not in done.stderr
    assert time.perf_counter() - begun < 50 and not list(tmp_path.rglob("*.tmp"))
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 3


def test_a_checkpoint_of_which_any_bit_is_flipped_is_noticed(tmp_path, capsys):
    for step in (5, 10):
        save(tmp_path / "checkpoint.pt", step=step, steps=100, weights=torch.arange(1000))
    whole = (tmp_path / "checkpoint.pt").read_bytes()
    start = whole.index(torch.arange(1000).numpy().tobytes())
    for place in (start, start + 4321, start + 7999):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / "checkpoint.pt").write_bytes(flipped)
        assert newest(tmp_path)["step"] == 5 and "warning" in capsys.readouterr().out


def test_the_newest_checkpoint_is_missing(tmp_path):
    """As after a kill between two renamings."""
    for step in (5, 10):
        save(tmp_path / "checkpoint.pt", step=step, steps=100)
    (tmp_path / "checkpoint.pt").unlink()
    assert newest(tmp_path)["step"] == 5


@pytest.fixture
def little(tmp_path):
    """A file system of 300 kB."""
    folder = tmp_path / "little"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)      # what failed is still open in a traceback


def test_a_full_disk_keeps_what_was_there(little):
    """Torch, libsndfile and numpy each tell of it in another way, or not at all."""
    save(little / "checkpoint.pt", step=1)
    cdslm.save_audio(little / "x.wav", torch.zeros(100))
    with pytest.raises(UserError, match="the disk is full") as error:
        save(little / "checkpoint.pt", step=2, weights=torch.randn(10 ** 6))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="the disk is full"):
        cdslm.save_audio(little / "x.wav", torch.zeros(10 ** 6))
    assert sorted(path.name for path in little.iterdir()) == ["checkpoint.pt", "x.wav"]
    assert load(little / "checkpoint.pt")["step"] == 1 and len(cdslm.load_audio(little / "x.wav")) == 100


@pytest.mark.slow
def test_a_disk_without_room_stops_the_run_with_one_line(tmp_path, little):
    for out, cache in ((little / "run", tmp_path / "cache"), (tmp_path / "run", little / "cache")):
        done = command("cdslm.py", *flags(**SMALL | dict(out=out)), env=at_home(cache))
        assert done.returncode == 2 and "the disk is full" in done.stderr.splitlines()[-1], done.stderr
        assert "Traceback" not in done.stderr and not list(little.rglob("*.tmp"))


def test_a_disk_that_is_full_in_mid_run_costs_nothing_that_was_saved(mute, small, tmp_path, monkeypatch, capsys):
    config = small(steps=8, eval_every=2)
    good = torch.save

    def save_first(contents, path):
        if contents.get("step") == 6:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        good(contents, path)

    monkeypatch.setattr(torch, "save", save_first)
    with pytest.raises(SystemExit) as stopped:
        cdslm.cli(lambda: train(config))
    assert stopped.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and os.strerror(errno.ENOSPC) in said[-1]
    assert load(tmp_path / "run/checkpoint.pt")["step"] == 4 and not list(tmp_path.rglob("*.tmp"))
    del stopped                                                        # its traceback holds the run's lock
    monkeypatch.undo()
    monkeypatch.setattr(cdslm, "listen", lambda *_: None)
    train(config)
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(1, 9))


def test_ten_bad_steps_in_a_row_stop_the_run(mute, small, tmp_path, monkeypatch):
    """From the seventh step on; with good ones again the same command goes on."""
    config, frames = small(steps=20, eval_every=3), cdslm.Trainer.frames

    def spoilt(trainer, mel):
        ctx, x0 = frames(trainer, mel)
        return ctx, x0 * (float("nan") if trainer.done >= 6 and len(mel) == 4 else 1)

    monkeypatch.setattr(cdslm.Trainer, "frames", spoilt)
    with pytest.raises(UserError, match="ten steps in a row.*--lr"):
        train(config)
    assert [row["skipped"] for row in log(tmp_path / "run")] == 6 * [0] + list(range(1, 10))
    assert all(torch.isfinite(weights).all() for weights in load(tmp_path / "run/checkpoint.pt")["model"].values())
    monkeypatch.setattr(cdslm.Trainer, "frames", frames)
    train(config)
    assert [row["step"] for row in log(tmp_path / "run")] == list(range(1, 21))
    assert log(tmp_path / "run")[-1]["skipped"] == 9


def test_a_loss_that_only_grows_is_not_called_whole(mute, small, tmp_path, monkeypatch):
    frames = cdslm.Trainer.frames

    def spoilt(trainer, mel):
        ctx, x0 = frames(trainer, mel)
        return ctx, x0 * 1e13 ** (trainer.done >= 3)

    monkeypatch.setattr(cdslm.Trainer, "frames", spoilt)
    with pytest.raises(UserError, match="above 100 or not finite: training has diverged.*another --out"):
        train(small(steps=30, eval_every=30))
    assert [row["skipped"] for row in log(tmp_path / "run")] == 12 * [0]


def test_two_runs_make_one_cache(small, monkeypatch):
    made, build = [], cdslm.build_shard

    def slowly(stem, *rest):
        made.append(stem)
        time.sleep(0.2)
        build(stem, *rest)

    monkeypatch.setattr(cdslm, "build_shard", slowly)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, other = pool.map(open_corpus, 2 * [small(toy_hours=0.02, toy_words=6)])
    assert len(made) == 1 and (one.windows("mel", "train", [3], 96) == other.windows("mel", "train", [3], 96)).all()


@pytest.fixture
def shard(small, cache):
    """The stem of a cached shard, whole before and after the test, and what opens the corpus it belongs to."""
    def reopened():
        return open_corpus(small(toy_hours=0.011, toy_words=5, gen_seconds=0.4))
    reopened()
    (path,) = cache.glob("toy-2x5-2x20s-*/00000.json")
    return path.with_suffix(""), reopened


def objects(thing):
    """An array that numpy can only save by pickling what is in it."""
    array = np.empty(1, object)
    array[0] = thing
    return array


def overwrite(path, place, new):
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(new)


DAMAGE = {  # what can be wrong with STEM.audio.npy, STEM.mel.npy and STEM.json
    "no samples": lambda audio, mel, about, trace: audio.unlink(),
    "no frames": lambda audio, mel, about, trace: mel.unlink(),
    "cut": lambda audio, mel, about, trace: os.truncate(mel, mel.stat().st_size - 1000),
    "empty": lambda audio, mel, about, trace: os.truncate(audio, 0),
    "header": lambda audio, mel, about, trace: overwrite(mel, 12, b"garbage"),
    "contents": lambda audio, mel, about, trace: about.write_text('{"clips": []}'),
    "a shorter stretch": lambda audio, mel, about, trace: overwrite(about, about.read_bytes().index(b"1600"), b"15"),
    "not JSON": lambda audio, mel, about, trace: about.write_bytes(b"\xff\xfe[[[["),
    "deep JSON": lambda audio, mel, about, trace: about.write_text(100_000 * "["),
    "bomb as .json": lambda audio, mel, about, trace: about.write_bytes(pickle.dumps(Bomb(trace), 2)),
    "bomb as .npy": lambda audio, mel, about, trace: mel.write_bytes(pickle.dumps(Bomb(trace), 2)),
    "bomb in .npy": lambda audio, mel, about, trace: np.save(audio, objects(Bomb(trace)), allow_pickle=True),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_made_again_and_a_bomb_in_it_does_not_go_off(shard, tmp_path, kind):
    stem, reopened = shard
    paths = [stem.with_name(stem.name + suffix) for suffix in (".audio.npy", ".mel.npy", ".json")]
    before = {path.name: path.read_bytes() for path in stem.parent.iterdir()}
    DAMAGE[kind](*paths, tmp_path / "executed")
    assert {path.name: path.read_bytes() for path in stem.parent.iterdir()} != before
    reopened()
    assert {path.name: path.read_bytes() for path in stem.parent.iterdir()} == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["autoencoder.pt", "checkpoint.pt"])
@pytest.mark.parametrize("how", ["saved by torch", "pickled"])
def test_a_bomb_in_a_run_folder_does_not_go_off(mute, small, tmp_path, name, how):
    train(small(steps=1))
    (tmp_path / "run" / name).unlink()
    if how == "pickled":
        (tmp_path / "run" / name).write_bytes(pickle.dumps(Bomb(tmp_path / "executed"), protocol=2))
    else:
        torch.save({"format": "cdslm 1", "step": Bomb(tmp_path / "executed")}, tmp_path / "run" / name)
    with pytest.raises(UserError, match=name) as error:
        load(tmp_path / "run" / name)
    assert "\n" not in str(error.value)
    for attempt in (lambda: train(small(steps=2)), lambda: cdslm.load_run(tmp_path / "run")):
        with contextlib.suppress(UserError):                           # there may be another to fall back to
            attempt()
    assert not (tmp_path / "executed").exists()


def test_a_folder_of_something_else_is_left_alone(mute, small, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("log.jsonl", "1_generated.wav", "config.json"):
        (tmp_path / "run" / name).write_text("mine")
        with pytest.raises(UserError, match=f"--out|{name}"):
            train(small())
        assert (tmp_path / "run" / name).read_text() == "mine"
        (tmp_path / "run" / name).unlink()


WATCHED = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import cdslm
touched = set()
def watch(event, arguments):
    if event == "open":
        names, (mode, flags) = arguments[:1], arguments[1:3]
        if not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or set(mode or "") & set("wax+")):
            return
    elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"):
        names = arguments[:2]
    else:
        return
    touched.update(os.path.abspath(os.fsdecode(name)) for name in names if isinstance(name, (str, bytes, os.PathLike)))
sys.addaudithook(watch)
sys.argv = ["cdslm.py", *sys.argv[1:]]
cdslm.cli(cdslm.main)
print(*touched, sep="\\n")
"""


@pytest.mark.slow
def test_only_the_run_folder_and_the_cache_are_written(tmp_path):
    """Seen twice: by what Python opens, renames and removes, and by what lies in the home and working folders after."""
    home, out, cache, temporary = (tmp_path / name for name in ("home", "out", "cache", "temporary"))
    home.mkdir()
    temporary.mkdir()
    (out / "mine").mkdir(parents=True)
    mine = {out / "notes.txt": b"mine", out / "mine/5_true.wav": b"mine too", out / "checkpoint.pt.bak": b"mine again"}
    for path, contents in mine.items():
        path.write_bytes(contents)
    where = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME")}
    where |= {name: str(temporary) for name in ("TMPDIR", "TMP", "TEMP")}      # which torch and Python try out
    environment = at_home(cache, PYTHONDONTWRITEBYTECODE="1", **where)
    words = flags(**SMALL | dict(out=out, decoder="neural", decoder_steps=2))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", WATCHED, *words], cwd=home, env=environment, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stderr
        touched = [line for line in done.stdout.splitlines() if line.startswith("/") and line != "/dev/null"]
        assert any(line.startswith(str(out)) for line in touched)
        assert not [line for line in touched if not line.startswith((str(out), str(cache), str(temporary)))]
        assert not any(path.is_file() for path in temporary.rglob("*"))
        assert not list(home.iterdir()) and all(path.read_bytes() == contents for path, contents in mine.items())


@pytest.mark.slow
def test_memory_is_flat_over_2000_steps(tmp_path):
    watched = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import cdslm
step = cdslm.Trainer.step
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def stepped(trainer):
    if trainer.done % 100 == 0:
        print(trainer.done, resident())
    return step(trainer)
cdslm.Trainer.step, cdslm.listen = stepped, lambda *_: None
cdslm.train(cdslm.parse(sys.argv[1:]))
"""
    settings = SMALL | dict(out=tmp_path / "run", steps=2201, eval_every=100, self_condition=0.5)
    done = subprocess.run([sys.executable, "-c", watched, *flags(**settings)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    memory = {int(row[0]): int(row[1]) for row in rows if len(row) == 2 and row[0].isdigit()}
    growth = memory[2200] / memory[200] - 1
    before, after = (round(memory[step] / 2 ** 20) for step in (200, 2200))
    print(f"\n{before} MiB at step 200, {after} MiB at step 2200: {growth:+.2%}")
    assert growth < 0.02


@pytest.mark.slow
def test_a_file_of_20_hours_is_cached_in_less_than_a_gibibyte(tmp_path):
    """8 bits at 8 kHz: 576 MB, written a minute at a time."""
    import soundfile
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    minute = (0.3 * rng.standard_normal(60 * 8000)).clip(-1, 1).astype(np.float32)
    with soundfile.SoundFile(tmp_path / "data/long.wav", "w", 8000, 1, "PCM_U8") as file:
        for _ in range(20 * 60):
            file.write(np.roll(minute, rng.integers(len(minute))))
    program = f"""
import resource, sys
sys.path.insert(0, {str(ROOT)!r})
import cdslm
opened = cdslm.open_corpus(cdslm.parse(sys.argv[1:]))
print(sum(shard["frames"] for shard in opened.shards), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    done = subprocess.run([sys.executable, "-c", program, *flags(data=tmp_path / "data", device="cpu")], text=True,
                          capture_output=True, env=at_home(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    frames, peak = map(int, done.stdout.splitlines()[-1].split())
    print(f"\n{frames / 80 / 3600:.2f} hours cached; peak memory {peak / 2 ** 20:.2f} GiB")
    assert frames == 20 * 3600 * 80 and peak < 2 ** 20
