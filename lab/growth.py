"""growth: how do time and memory grow with the window, the batch, the depth, and the speech?

    python -m lab.growth                     measure what lab/results/growth.csv lacks
    python -m lab.growth clips files         measure these axes anew
    python -m lab.growth --table             measure nothing: print the exponents, in Markdown
    python -m lab.growth --plot growth.png   draw all curves on log axes (needs matplotlib)
    python -m lab.growth --quick             the two smallest sizes, to see that it works

A measurement has a process of its own, with one thread. It gives CPU seconds, of the fastest of
three runs, and the peak of its memory beyond that of the loaded program. The network is `tiny`, on
the CPU. Speech is simulated: many names of one file (this needs a disk with hard links). Where time
or memory grows as size^p, p is fitted to the last decade of sizes, and to the last two sizes.
"""
import copy
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from cdslm import (FRAME_RATE, HOP, MELS, SHARD_SECONDS, AudioAutoencoder, Clip, Config, Corpus,
                   Diffusion, MMDiT, OneDevice, Parser, Source, UserError, build_cache, cache_root,
                   cli, decide, fingerprint, folder_source, keyed, make_optimizers, open_corpus,
                   places, sample, split, training_step)
from lab.figures import new_figure, save_figure
from lab.study import ROOT, read_rows, write_rows

RESULTS = ROOT / "lab" / "results" / "growth.csv"
COLUMNS = "axis", "size", "what", "seconds", "MiB", "mapped MiB"
SMALL = 10                                            # MiB: below, memory is as good as none
CLIP_SECONDS, WINDOW = 5.0, 4 * FRAME_RATE            # a short clip; the frames of a window


# --------------------------------------------------------------------------------------------------
# Simulated speech, in folders of a hundred.

def clip_name(i):
    return f"{i // 100:05d}/{i:07d}.wav"


def recordings(folder, number, seconds):
    """Silent recordings. Only the first takes room on the disk: the others are links to it."""
    for i in range(number):
        path = folder / clip_name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        if i == 0:
            soundfile.write(path, np.zeros(round(seconds * 8000), np.int16), 8000)
        else:
            os.link(folder / clip_name(0), path)


def short_clips(number):
    """A Source of clips without files; a minute in all, or more."""
    seconds = max(CLIP_SECONDS, 60 / number)
    clips = [Clip(clip_name(i), seconds, None) for i in range(number)]
    return Source("clips", "", clips, {})


def simulate_cache(source):
    """The cache of a source, in the form that `build_cache` finds complete. Shards of one length
    share their arrays: audio is a hole in the disk, log-mel is noise."""
    folder = cache_root() / f"{source.name}-{fingerprint(source.contents)}"
    folder.mkdir(parents=True)
    shards, total, first = {}, 0.0, {}
    for clip in source.clips:
        total += clip.seconds
        row = [clip.name, clip.minute, round(clip.seconds * FRAME_RATE)]
        shards.setdefault(int(total / SHARD_SECONDS), []).append(row)

    for number, clips in shards.items():
        stem = folder / f"{number:05d}"
        frames = sum(length for _, _, length in clips)
        if frames in first:
            for kind in ("audio", "mel"):
                os.link(f"{first[frames]}.{kind}.npy", f"{stem}.{kind}.npy")
        else:
            first[frames] = stem
            shape = frames * HOP,
            np.lib.format.open_memmap(f"{stem}.audio.npy", "w+", np.int16, shape)
            noise = np.random.default_rng(0).standard_normal((frames, MELS), np.float32)
            np.save(f"{stem}.mel.npy", noise.astype(np.float16))
        Path(f"{stem}.json").write_text(json.dumps({"clips": clips, "skipped": {}}))


def prepare(axis, size, folder):
    """Put on the disk what the measurements of this size need."""
    speech = Path(folder) / "speech"
    if axis == "hours":
        recordings(speech, round(size * 3600 / SHARD_SECONDS), SHARD_SECONDS)
        simulate_cache(folder_source(speech))
    elif axis == "clips":
        simulate_cache(short_clips(size))
    elif axis == "files":
        recordings(speech, size, CLIP_SECONDS)


# --------------------------------------------------------------------------------------------------
# What is measured: a function of (size, folder) that returns a function without arguments.

def step_of(**settings):
    """A training step of `tiny` on noise; all are self-conditioned."""
    config = Config("tiny", self_condition=1.0, device="cpu", **settings)
    device, dtype = decide(config)
    model = MMDiT(config)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizers, hardware = make_optimizers(model, config, dtype), OneDevice(device, dtype)
    ctx = torch.randn(config.batch_size, config.ctx_frames, MELS)
    x0 = torch.randn(config.batch_size, config.gen_frames, MELS)
    batches = [(ctx, x0, torch.randn_like(x0))]
    return lambda: training_step(model, ema, optimizers, Diffusion(config), config, 0, batches,
                                 hardware)


def of_window(seconds):
    """Settings of a window of this length: a quarter is context, as in `tiny`."""
    return dict(ctx_seconds=seconds / 4, gen_seconds=3 * seconds / 4, batch_size=1)


def window_step(size, _):
    return step_of(**of_window(size))


def batch_step(size, _):
    return step_of(batch_size=size)


def depth_step(size, _):
    return step_of(depth=size, width=192)


def generate(size, _):
    """One window, with 4 evaluations of the network."""
    config = Config("tiny", **of_window(size))
    model, context = MMDiT(config).eval(), torch.randn(1, config.ctx_frames, MELS)
    return lambda: sample(model, context, steps=4)


def decode(size, _):
    autoencoder = AudioAutoencoder().eval().requires_grad_(False)
    frames = torch.randn(1, size * FRAME_RATE, MELS)
    return lambda: autoencoder.decode(frames)


def open_hours(_, folder):
    config = Config("tiny", data=f"{folder}/speech")
    return lambda: open_corpus(config)


def read(_, folder):
    """A hundred batches of 32 windows."""
    corpus = open_corpus(Config("tiny", data=f"{folder}/speech"))
    keys = [keyed(0, "window", i) for i in range(3200)]

    def batches():
        for i in range(0, len(keys), 32):
            corpus.stored("mel", "train", keys[i:i + 32], WINDOW)
    return batches


def split_clips(size, _):
    length = round(CLIP_SECONDS * FRAME_RATE) if size > 12 else 60 * FRAME_RATE // size
    clips = [(clip_name(i), 0, 0, i * length, length) for i in range(size)]
    return lambda: split(clips, WINDOW)


def open_clips(size, _):
    source = short_clips(size)
    return lambda: Corpus(build_cache(source), WINDOW)


def search(_, folder):
    """Finding the files and reading their headers."""
    return lambda: folder_source(f"{folder}/speech")


def name_all(_, folder):
    names = [str(path) for path in Path(folder).rglob("*.wav")]
    return lambda: places(names)


# Axis: its unit, its sizes, and what is measured.
AXES = {
    "window": ("seconds of a window", (3, 6, 12, 30, 60, 120),
               {"training step": window_step, "generate": generate, "decode": decode}),
    "batch": ("windows in a batch", (1, 2, 4, 8, 16, 32, 64), {"training step": batch_step}),
    "depth": ("blocks of width 192", (1, 2, 4, 8, 16), {"training step": depth_step}),
    "hours": ("hours of speech", (3, 10, 30, 100, 300, 1000),
              {"open": open_hours, "read 100 batches": read}),
    "clips": ("clips", (1, 10, 100, 1000, 10_000, 100_000, 1_000_000),
              {"split": split_clips, "open": open_clips}),
    "files": ("files", (1, 10, 100, 1000, 10_000),
              {"search a folder": search, "each after --data": name_all}),
}


# --------------------------------------------------------------------------------------------------
# Measuring, each time in a process of its own.

def memory():
    """MiB: the most that this process has had; and what it has of mapped files now, which the
    system takes back when it needs room (known on Linux only)."""
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    mapped, status = 0, Path("/proc/self/status")
    if status.exists():
        mapped = int(re.search(r"RssFile:\s*(\d+)", status.read_text())[1])
    return np.array([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, mapped / 2 ** 10])


def measure(axis, size, what, folder):
    """CPU seconds of the fastest of three runs (of fewer, if they take long). MiB beyond the loaded
    program: of its own, and of mapped files."""
    before, seconds = memory(), []
    work = AXES[axis][2][what](size, folder)
    while len(seconds) < 3 and sum(seconds) < 10:
        begun = time.process_time()
        work()
        seconds.append(time.process_time() - begun)
    peak, mapped = memory() - before
    return min(seconds), max(0.0, peak - mapped), max(0.0, mapped)


def alone(function, cache, *arguments):
    """The numbers that a function of this file returns, from a process of its own."""
    code = ("from lab import growth, process; process.keep_memory(); "
            f"print(); print(*growth.{function}{arguments!r} or ())")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CDSLM_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it was killed"]
        raise UserError(f"{' '.join(map(str, arguments[:3]))}: {lines[-1]}")
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


def measure_size(axis, size):
    """The rows of all that is measured at one size."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        if axis in ("hours", "clips", "files"):
            alone("prepare", cache, axis, size, folder)
        for what in AXES[axis][2]:
            values = alone("measure", cache, axis, size, what, folder)
            numbers = [f"{value:.4g}" for value in values]
            rows.append(dict(zip(COLUMNS, [axis, str(size), what, *numbers])))
            print(*rows[-1].values(), flush=True)
    return rows


def keep(rows):
    """Write the results file, in the order of AXES."""
    order = list(AXES)
    rows.sort(key=lambda row: (order.index(row["axis"]), row["what"], int(row["size"])))
    write_rows(RESULTS, rows)


# --------------------------------------------------------------------------------------------------
# Showing.

def curves(rows):
    """(axis, what, sizes, seconds, MiB) of each curve, in the order of AXES."""
    for axis, (_, _, measured) in AXES.items():
        for what in measured:
            own = [row for row in rows if (row["axis"], row["what"]) == (axis, what)]
            if own:
                sizes, seconds, mib = (np.array([float(row[name]) for row in own])
                                       for name in ("size", "seconds", "MiB"))
                yield axis, what, sizes, seconds, mib


def exponents(sizes, values):
    """p of values ~ sizes^p, least squares on log axes: over the last decade of sizes, and between
    the last two. None where a value is 0."""
    decade = sizes >= sizes.max() / 10
    if decade.sum() < 2 or values[decade].min() <= 0:
        return None
    x, y = np.log(sizes[decade]), np.log(values[decade])
    return np.polyfit(x, y, 1)[0], (y[-1] - y[-2]) / (x[-1] - x[-2])


def table(rows):
    """Print what the largest size takes, and the exponents, in Markdown."""
    print("| what | up to | seconds | exponent; at the end | MiB | exponent; at the end |")
    print("|---" * 6 + "|")
    for axis, what, sizes, *measures in curves(rows):
        cells = []
        for values, least in zip(measures, (0, SMALL)):
            found = exponents(sizes, values) if values[-1] >= least else None
            cells.append(f"{values[-1]:.2g}" if least == 0 else f"{values[-1]:.0f}")
            cells.append("{:.2f}; {:.2f}".format(*found) if found else "")
        print(f"| {what} | {sizes[-1]:,.0f} {AXES[axis][0]} | {' | '.join(cells)} |")


def draw(rows, path):
    """Draw time and memory of each axis on log axes. Over the last decade a grey line of slope 1
    ends in the same point."""
    figure = new_figure(13, 5.2)
    panels = figure.subplots(2, len(AXES), sharex="col")
    columns = dict(zip(AXES, panels.T))
    for axis, what, sizes, seconds, mib in curves(rows):
        mib = np.where(mib < 1, np.nan, mib)                  # nothing
        decade = sizes[sizes >= sizes[-1] / 10]
        for panel, values in zip(columns[axis], (seconds, mib)):
            panel.plot(sizes, values, marker=".", label=what)
            panel.plot(decade, values[-1] * decade / decade[-1], color="0.75", zorder=0)
            panel.set(xscale="log", yscale="log")
            panel.tick_params(which="minor", labelleft=False)

    for axis, (upper, lower) in columns.items():
        upper.legend(frameon=False, fontsize="small")
        lower.set_xlabel(AXES[axis][0])
        lower.set_ylim(1, 2000)
    panels[0, 0].set_ylabel("CPU seconds")
    panels[1, 0].set_ylabel("MiB of memory")
    save_figure(figure, path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("axes", nargs="*", help=f"measure these anew: {', '.join(AXES)}")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    parser.add_argument("--plot", metavar="PATH", help="draw the results that are there")
    parser.add_argument("--quick", action="store_true", help="two small sizes; nothing is kept")
    arguments = parser.parse_args()
    for axis in arguments.axes:
        if axis not in AXES:
            raise UserError(f"{axis}: the axes are {', '.join(AXES)}")

    rows = [row for row in read_rows(RESULTS) if row["axis"] not in arguments.axes]
    if arguments.quick:
        rows = []
    if not arguments.table and not arguments.plot:
        finished = {(row["axis"], int(row["size"])) for row in rows}
        for axis in arguments.axes or AXES:
            for size in AXES[axis][1][:2 if arguments.quick else None]:
                if (axis, size) in finished:
                    continue
                rows += measure_size(axis, size)
                if not arguments.quick:
                    keep(rows)
    if arguments.plot:
        draw(rows, arguments.plot)
    table(rows)


if __name__ == "__main__":
    cli(main)
