"""Broken and odd input: recordings of every kind, and command lines that nobody would type."""

import contextlib
import json
import os
import signal
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import cdslm
from lab import plan
import sample
from cdslm import AUDIO_FILES, RATE, UserError, folder_source, load_audio, open_corpus, printable
from tests.conftest import speech_like

FORMATS = {
    "wav": "PCM_16",
    "flac": "PCM_16",
    "ogg": "VORBIS",
    "mp3": "MPEG_LAYER_III",
    "aiff": "PCM_24",
    "au": "PCM_16",
    "caf": "FLOAT",
    "w64": "PCM_16",
    "opus": "OPUS",
    "rf64": "PCM_16",
}
FINE = "fine"  # what a case is called if it must not be left out
JOINED = "joined files"  # of which libsndfile reads the first


def write(path, wave, rate=RATE, subtype=None):
    kind = {"aif": "AIFF", "opus": "OGG"}.get(path.suffix[1:].lower())
    soundfile.write(path, wave, rate, subtype=subtype, format=kind)


def collect(folder):
    """Fill a folder with at least 200 recordings, most of them broken; no two have one name."""
    rng, half = np.random.default_rng(0), speech_like(0.5)
    collect_formats(folder, half, rng)
    collect_waves(folder, half)
    collect_names(folder, rng)
    collect_liars(folder)
    collect_links(folder, half)


def collect_formats(folder, half, rng):
    """Every format: whole, cut short, and with flipped bits."""
    for suffix, subtype in FORMATS.items():
        whole = folder / f"{FINE} {suffix}.{suffix}"
        write(whole, half, subtype=subtype)
        data = whole.read_bytes()
        for end in range(0, 257, 16):
            (folder / f"cut {end}.{suffix}").write_bytes(data[:end])
        (folder / f"cut in half.{suffix}").write_bytes(data[: len(data) // 2])
        (folder / f"{JOINED}.{suffix}").write_bytes(20 * data)
        for i in range(12):
            broken = bytearray(data)
            for at in rng.integers(0, 128, 1 + i % 3):
                broken[at] ^= 1 << int(rng.integers(8))
            (folder / f"flipped {i}.{suffix}").write_bytes(broken)
    subtypes = "PCM_U8 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW IMA_ADPCM MS_ADPCM GSM610"
    for subtype in subtypes.split():
        write(folder / f"{FINE} {subtype}.wav", half, subtype=subtype)


def collect_waves(folder, half):
    """Odd samples, lengths, rates and numbers of channels."""
    values = {
        "NaN": [np.nan],
        "Inf": [np.inf],
        "minus Inf": [-np.inf],
        "huge": [1e30, -1e30, 3e38],
        "huger": [1e300],
    }
    for name, odd in values.items():
        wave = half.astype(np.float64)
        wave[100 : 100 + len(odd)] = odd
        write(folder / f"{name}.wav", wave, subtype="DOUBLE")
        write(
            folder / f"{name} in 8 channels.wav",
            np.repeat(wave[:, None], 8, 1) * [1, 1, 1, 1, -1, -1, -1, -1],
            subtype="DOUBLE",
        )
    ramp = np.linspace(-1, 1, 12_000)
    for name, wave in {
        "denormal": 1e-310 * ramp,
        "denormal float": 1e-42 * ramp,
        "DC": 0 * ramp + 1,
        "silence": 0 * ramp,
        "clipped": np.sign(ramp),
        "impulse": np.eye(1, 12_000)[0],
        "too loud": 9 * ramp,
    }.items():
        write(folder / f"{FINE} {name}.wav", wave, subtype="DOUBLE")
    for count in (0, 1, 2, 299, 300, 301):
        write(folder / f"{FINE * bool(count)} {count} samples.wav", half[:count])
    for rate in (8000, 11_025, 22_050, 44_100, 48_000, 96_000, 192_000):
        write(folder / f"{FINE} {rate} Hz.wav", half, rate)
    for rate in (1, 100, 7999, 192_001, 384_000, 2**31 - 1):
        write(folder / f"{rate} Hz.wav", half, rate)
    for channels in (2, 3, 8, 64):
        write(folder / f"{FINE} {channels} channels.wav", np.repeat(half[:2000, None], channels, 1))


def collect_names(folder, rng):
    """Odd names, and files that are no recordings whatever their name."""
    for name in (
        "two words",
        'it\'s "quoted"',
        "two\nlines",
        "\x1b[31mred",
        "naïve 語 🙂",
        "-x",
        "--help",
        "%s {x}",
        "$HOME `id`",
        os.fsdecode(b"\xff\xfe"),
        "long" * 55,
        ".hidden",
        "tab\t",
        "\u202egnirts",
    ):
        usable = FINE if name.isascii() or name.encode(errors="ignore") else ""
        (folder / f"{name}{usable}.wav").write_bytes((folder / f"{FINE} wav.wav").read_bytes())
        (folder / f"{name}broken.wav").write_text("no sound in here")
    for name, data in {
        "text": b"hello\n" * 100,
        "zeros": bytes(5000),
        "noise": rng.bytes(5000),
        "riff": b"RIFF",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "gzip": b"\x1f\x8b\x08" + bytes(100),
    }.items():
        for suffix in ("wav", "flac", "ogg", "mp3", "sph"):
            (folder / f"{name} renamed.{suffix}").write_bytes(data)


def collect_liars(folder):
    """Headers that promise more than the file holds."""
    flac = bytearray((folder / f"{FINE} flac.flac").read_bytes())
    flac[21:26] = bytes([flac[21] | 15, 255, 255, 255, 255])  # 2 ** 36 - 1 samples: 33 days
    (folder / "promises a month.flac").write_bytes(flac)
    ogg = bytearray((folder / f"{FINE} ogg.ogg").read_bytes())
    last = ogg.rindex(b"OggS") + 6
    ogg[last : last + 8] = struct.pack("<q", 2**62)  # and its checksum is wrong
    (folder / "promises an age.ogg").write_bytes(ogg)
    wav = bytearray((folder / f"{FINE} wav.wav").read_bytes())
    wav[40:44] = b"\xff\xff\xff\xff"
    (folder / f"{FINE} promises 4 GB.wav").write_bytes(wav)


def collect_links(folder, half):
    """Folders, links and pipes that are called like recordings."""
    (folder / "folder.wav").mkdir()
    write(folder / "folder.wav" / f"{FINE} inside.wav", half)
    (folder / "dangling.wav").symlink_to("nowhere")
    (folder / "loop.wav").symlink_to("loop.wav")
    (folder / "endless.wav").symlink_to("/dev/zero")
    (folder / "up.wav").symlink_to("..")
    (folder / f"{FINE} link.wav").symlink_to(f"{FINE} wav.wav")
    os.mkfifo(folder / "pipe.wav")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A folder of odd recordings, and a minute of speech, so that a model can be trained."""
    folder = tmp_path_factory.mktemp("around") / "zoo"       # a link leads out of it
    folder.mkdir()
    collect(folder)
    write(folder / f"{FINE} and long.wav", speech_like(60))
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_FILES)
    files = [path for path in found if path.is_file() and not path.name.startswith(".")]
    assert len(files) >= 200
    return folder, files


@contextlib.contextmanager
def within(seconds):
    """No hang."""

    def ring(*_):
        raise TimeoutError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.slow
def test_a_folder_of_odd_recordings(zoo, small, capsys):
    folder, files = zoo
    config = small(data=str(folder))
    with within(200):
        opened = open_corpus(config)
    names = {printable(path.relative_to(folder).as_posix()): path for path in files}
    said = capsys.readouterr().out
    assert opened.skipped.keys() <= names.keys()
    assert f"{len(opened.skipped)} files can't be used, or not whole" in said
    assert all(line.isprintable() for line in said.splitlines())
    used = {clip.name for clip in folder_source(config.data).clips}
    twice = {f"{FINE} wav.wav"}                               # a link leads to it
    assert used | opened.skipped.keys() == names.keys() - twice, "neither used nor counted"
    assert not [name for name in opened.skipped if FINE in name]
    counted = {name.split(".")[1] for name in opened.skipped if JOINED in name}
    assert counted == FORMATS.keys() - {"w64"}, "not counted"  # of w64 libsndfile reads all
    kept = names.keys() - opened.skipped.keys()
    assert not [
        name for name in kept if name.startswith(("NaN", "Inf", "text", "zeros", "png", "pipe"))
    ]
    for shard in opened.shards:
        assert np.isfinite(np.load(f"{shard['stem']}.mel.npy")).all()
    assert sum(shard["frames"] for shard in opened.shards) >= 60 * 80
    assert open_corpus(config).skipped == opened.skipped
    print(
        f"\n{len(names)} recordings: {len(kept)} used, {len(opened.skipped)} left out and counted"
    )


@pytest.mark.slow
def test_each_alone_is_speech_or_a_users_error(zoo, small, tmp_path, monkeypatch):
    """As the only recording of a folder: nothing else hides it."""
    for number, path in enumerate(zoo[1]):
        if path.name == "up.wav":
            continue
        alone = tmp_path / str(number) / path.name
        alone.parent.mkdir()
        alone.symlink_to(path)
        with within(20), contextlib.suppress(UserError):
            open_corpus(small(data=str(alone.parent)))


@pytest.mark.slow
def test_each_as_a_prompt_is_continued_or_refused_with_one_line(
    zoo, trained, tmp_path, monkeypatch, capsys
):
    spoken = refused = 0
    for path in [*zoo[1], zoo[0] / "missing.wav", zoo[0]]:
        out = tmp_path / "x.wav"
        out.unlink(missing_ok=True)
        words = [
            "sample.py",
            trained[0],
            f"--prompt={path}",
            "--out",
            out,
            "--steps",
            1,
            "--seconds",
            0.2,
        ]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        status = 0
        with within(60):
            try:
                cdslm.cli(sample.main)
            except SystemExit as stopped:
                status = stopped.code
        error = capsys.readouterr().err.splitlines()
        if status:
            assert status == 2 and not out.exists() and FINE not in path.name, path
            assert error[-1].startswith("error: ") and not [
                line for line in error if "Traceback" in line
            ], path
            refused += 1
        else:
            wave = load_audio(out)
            assert torch.isfinite(wave).all() and wave.abs().max() <= 1, path
            spoken += 1
    print(f"\n{spoken + refused} prompts: {spoken} continued, {refused} refused")
    assert spoken > 40 and refused > 100


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="no such users here")
def test_what_may_not_be_read_is_counted(small, monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("", "data", "data/closed", "cache"):
            (folder / part).mkdir(exist_ok=True)
            (folder / part).chmod(0o777)
        write(folder / "data/open.wav", speech_like(30))
        write(folder / "data/shut.wav", speech_like(1))
        write(folder / "data/closed/x.wav", speech_like(1))
        (folder / "data/shut.wav").chmod(0)
        (folder / "data/closed").chmod(0)
        monkeypatch.setenv("CDSLM_CACHE", str(folder / "cache"))
        root = os.geteuid() == 0
        if root:  # who may read everything
            os.seteuid(65534)
        try:
            skipped = open_corpus(small(data=str(folder / "data"))).skipped
            assert skipped.keys() == {"shut.wav", "closed"}
        finally:
            if root:
                os.seteuid(0)
            (folder / "data/closed").chmod(0o700)


def odd_flags():
    """Strategies for each flag with what may stand after it."""
    from hypothesis import strategies as st

    words = ["", "-", "--", "nan", "1e999", "-0", "0x10", "１", "1_000", "None", "\n", "\udcff"]
    numbers = [10**9, 2**31, 2**63, 10**30, 10**400]
    anything = st.one_of(
        st.integers(-3, 300),
        st.integers(),
        st.floats(),
        st.floats(0, 50),
        st.text(max_size=8),
        st.sampled_from(words + numbers),
    )
    devices = [
        "cpu",
        "auto",
        "cuda",
        "cuda:99",
        "mps",
        "meta",
        "cpu:3",
        "tpu",
        "xla",
        "hpu",
        "vulkan",
    ]
    for name, field in cdslm.Config.__dataclass_fields__.items():
        likely = {"int": st.integers(1, 300), "float": st.floats(0, 2)}.get(
            field.type.__name__, anything
        )
        if field.metadata["choices"] or name == "device":
            likely = st.sampled_from(field.metadata["choices"] or devices)
        flag = "--" + name.replace("_", "-")
        if field.type is bool:
            yield st.sampled_from([[flag], [flag], [flag + "=1"]])
        else:
            yield st.tuples(st.just(flag), likely.map(str)).map(list)
            yield st.tuples(st.just(flag), anything.map(str)).map(list)
            yield likely.map(lambda value, flag=flag: [f"{flag}={value}"])
    yield st.sampled_from([["--what"], ["-x"], ["x"], ["--size"], ["--"], ["--steps", "1", "2"]])


@pytest.mark.slow
def test_any_command_line_passes_a_dry_run_or_is_a_users_error(capsys):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    one, passed, refused = st.one_of(*odd_flags()), [], []

    @hypothesis.settings(
        max_examples=500,
        deadline=10_000,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.lists(one, max_size=5))
    def check(flags):
        words = [word for flag in flags for word in flag]
        try:
            cdslm.cli(lambda: plan.facts(cdslm.parse(words), 0, 400.0))
            passed.append(words)
        except SystemExit as stopped:
            refused.append(words)
            assert stopped.code == 2 or {"-h", "--help"} & set(words)
        said = capsys.readouterr()
        assert said.err.count("\n") == (words in refused) and said.err[:7] in ("", "error: ")
        if words in passed and "--json" in words:
            assert json.loads(said.out)["parameters"] > 0

    check()
    print(f"\n{len(passed)} command lines passed, {len(refused)} were refused")
    assert len(passed) > 50 and len(refused) > 50
