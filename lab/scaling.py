"""scaling: what is the best use of a compute budget? A small isoFLOP study, from the runs to the laws.

    python -m lab.scaling run --out runs/iso                                      three quarters of an hour on one core
    python -m lab.scaling run --budgets 4e12,1.2e13,4e13,1.2e14 --out runs/iso    some hours: steadier laws
    python -m lab.scaling fit runs/iso --plot runs/iso.png                        fit the laws, draw them

`run` trains toy speech as the paper trains (its loss, AdamW, no first guesses), but predicts x0, lest narrow models
measure their patches. Sizes have two blocks (CHOICE; one has four, where widths leave a gap), so that only the width
varies, and muP carries the learning rate over. Up to where its decay begins, a longer run is the shorter one: one trunk
a size gives every budget, each by a short decay branch. The same command goes on where it stopped.
On a cluster, start one job a size, with the same --out:

    for size in 2x48 2x64 4x64 2x128 2x192 2x256; do sbatch --wrap "python -m lab.scaling run --only $size"; done

Any flag of cdslm.py may follow: `--data DIR`, `--seed 7`, `--batch-size 64`. Each run is a line of OUT/runs.jsonl: N
parameters, D tokens of both streams, C training FLOPs (exact; 6ND beside it), loss, pJSD, seconds of its own.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import cdslm
import eval_pjsd
from lab import laws
from cdslm import (Parser, Trainer, UserError, claim, cli, count, decay_start, decide, interruptible, ranks, resume_point,
                   open_autoencoder, sample, write_config)
from cdslm import FRAME_RATE, lock, open_corpus, reason, replacing
from lab.listener import batched, load_listener, speak
from lab.plan import seconds_a_step
from lab.toyspeech import ToySpeech

STUDY = ("--size tiny --self-condition 0 --min-snr-gamma 5 --t-shift 0 --optimizer adamw --decoder griffinlim "
         "--toy-hours 20 --warmup 50").split()
BUDGETS = "6e11,2e12,6e12,2e13"
SIZES = "2x24,2x32,2x48,2x64,4x64,2x128,2x192,2x256,2x320,2x384,2x512"  # depth x width
VALIDATION, SAVE_EVERY = 256, 1000  # windows; steps
COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"  # Okabe & Ito's (2008), for all eyes


# ----------------------------------------------------------------------------------------------------------------------
# Run. The grid, budgets rising, since each run goes on from the trunk of the one before.

def plan(arguments, base):
    """[(size, budget, Config)] of every run: at each budget the `each` sizes next to a guess at the best, N^2 = C / 8,
    that short runs gave; at the budget `repeat` all are trained with a second seed too."""
    runs, shapes, budgets = [], {}, sorted(set(arguments.budgets))
    for depth, width in arguments.sizes:
        shape = dataclasses.replace(base, depth=depth, width=width)
        shapes[f"{depth}x{width}"] = shape, count(shape)
    only, repeat = arguments.only or shapes, arguments.repeat or budgets[:2][-1]
    if arguments.each < 1 or not arguments.minutes > 0 or repeat not in budgets or not set(only) <= set(shapes):
        raise UserError("--each must be at least 1, --minutes more than 0, --repeat of --budgets, --only of --sizes")
    for budget in budgets:
        near = sorted(shapes, key=lambda size: abs(math.log(8 * shapes[size][1]["parameters"] ** 2 / budget)))
        for seed in range(base.seed, base.seed + 1 + (budget == repeat)):
            for size, (shape, cost) in shapes.items():
                steps, out = round(budget / cost["flops"] / base.batch_size), arguments.out / f"{size}-seed{seed}"
                if size in near[:arguments.each] and size in only:
                    if steps < 4:
                        raise UserError(f"{budget:g} FLOPs are {steps} steps of {size}: too few to mean anything")
                    runs.append((size, budget, dataclasses.replace(shape, steps=steps, seed=seed, out=str(out))))
    return runs


def train(trainer, first, seconds, bar, signals):
    """Train to the end of this budget, or until a signal comes, from where the trunk of the budget before it ended,
    step `first`; a step moves the bar by the seconds that it is thought to take."""
    config, folder, start = trainer.config, Path(trainer.config.out), decay_start(trainer.config.steps)
    write_config(folder, config)
    shutil.copyfile(folder.parent / "autoencoder.pt", folder / "autoencoder.pt")
    with contextlib.suppress(UserError):                                      # if that is lost, or past: from the start
        trainer.restore(resume_point(folder, config))
    bar.update((trainer.done - first) * seconds)
    while trainer.done < config.steps and not signals:
        if trainer.done == start:
            trainer.save(folder / "trunk.pt")                                 # the next budget goes on from here
        if trainer.done == start or trainer.done % SAVE_EVERY == 0:
            trainer.save(folder / "checkpoint.pt")
        trainer.step()
        bar.update(seconds)
    trainer.save(folder / "checkpoint.pt")


def make_judge(config, autoencoder, device, dtype, minutes):
    """judge(trainer) -> what `eval_pjsd.compare` says of its averaged weights. Frames of toy speech are heard without
    the decoder, so that the model alone is judged; contexts and reference are the same for all."""
    if config.data != "toy":
        eval_pjsd.recogniser("hama")                                          # is it there?
        return lambda trainer: eval_pjsd.judge_run(eval_pjsd.parse([trainer.config.out, "--minutes", str(minutes)]))
    toy, listener = ToySpeech(config.toy_languages, config.toy_words), load_listener()
    n, m = config.ctx_frames, config.gen_frames
    clips = max(1, round(minutes * 60 * FRAME_RATE / m))
    contexts = speak(toy, eval_pjsd.CONTEXTS, clips, n + m, "contexts")[0]
    contexts = batched(lambda part: autoencoder.encode(part.to(device)), contexts)[:, :n]
    reference = speak(toy, eval_pjsd.REFERENCE, 3 * clips, m, "reference")[0]
    reference = listener.hear(batched(eval_pjsd.log_mel, reference))["clips"]

    def judge(trainer):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            said = torch.cat([sample(trainer.ema, part, steps=24, seed=i) for i, part in enumerate(contexts.split(32))])
        mel = autoencoder.to_mel(said.float()) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        return eval_pjsd.compare(listener.hear(mel)["clips"], reference)
    return judge


def measure(trainer, judge):
    """What is kept of a finished run. Raises UserError if it diverged."""
    config, losses, size = trainer.config, trainer.validate(VALIDATION), count(trainer.config)
    if not math.isfinite(losses["mean"]):
        raise UserError("its validation loss is not finite")
    seen, report = config.steps * config.batch_size, judge(trainer)
    hours = seen * (config.ctx_frames + config.gen_frames) / FRAME_RATE / 3600
    N, D = size["parameters"], seen * size["tokens"]
    return {"N": N, "D": D, "C": seen * size["flops"], "6ND": 6 * N * D, "hours": hours,
            "epochs": hours / trainer.corpus.hours("train"), "loss": losses.pop("mean"), "losses": losses,
            "skipped": trainer.skipped, "pjsd": report["pjsd"], "pjsd_floor": report["floor"]}


def written(path):
    """The lines of runs.jsonl so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def to_do(arguments, base, device, dtype):
    """[(size, budget, Config, step at which its trunk is there, seconds a step)] of the runs not done yet."""
    rows = written(arguments.out / "runs.jsonl")
    done = {(row["size"], row["budget"], row["seed"]) for row in rows if "error" not in row}
    runs, speed, trunk, work = plan(arguments, base), {}, {}, []
    for size, budget, config in runs:
        if size not in speed:
            speed[size] = seconds_a_step(config, device, dtype)
        if (size, budget, config.seed) not in done:
            work.append((size, budget, config, trunk.get(config.out, 0), speed[size]))
        trunk[config.out] = decay_start(config.steps)
    total = sum((config.steps - first) * seconds for _, _, config, first, seconds in work)
    print(f"{len(work)} of {len(runs)} runs to do: about {total / 60:.0f} min on this machine, and the judging")
    return work, total


def run(arguments, flags):
    """Train what the grid lacks, a line of runs.jsonl for each run; a failed one says why, and is tried again."""
    base, out, failed = cdslm.parse(STUDY + flags), arguments.out, 0
    if ranks()[1] > 1 or base.parallel == "fsdp":
        raise UserError("lab.scaling trains on one device; start torchrun cdslm.py for each run, and write its N, D, C "
                        "and loss to a CSV for lab.scaling fit")
    device, dtype = decide(base)
    work, total = to_do(arguments, base, device, dtype)
    if arguments.dry_run or not work:
        return
    out.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(base)
    with lock(out / ".lock", wait=True):                                      # the first job makes them for all
        autoencoder = open_autoencoder(dataclasses.replace(base, out=str(out)), corpus, device)
        judge = make_judge(base, autoencoder, device, dtype, arguments.minutes)
    bar = tqdm(total=total, smoothing=0, bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")
    signals = []
    with bar, interruptible(signals):
        for size, budget, config, first, seconds in work:
            bar.set_description_str(f"{size} {budget:.3g} FLOPs")
            row, begun = {"size": size, "budget": budget, "seed": config.seed}, time.perf_counter()
            with claim(config):
                try:
                    trainer = Trainer(config, corpus, autoencoder, device, dtype)
                    train(trainer, first, seconds, bar, signals)
                    if signals:
                        break
                    row |= {"seconds": time.perf_counter() - begun} | measure(trainer, judge)
                    bar.set_postfix_str(f"loss {row['loss']:.4f}")
                except (UserError, RuntimeError) as error:                    # the latter if memory is short
                    failed, row["error"] = failed + 1, reason(error)
                    tqdm.write(f"{size} at {budget:g} FLOPs failed: {row['error']}", file=sys.stderr)
            with lock(out / ".lock", wait=True), replacing(out / "runs.jsonl") as temporary:
                lines = [json.dumps(line) + "\n" for line in [*written(out / "runs.jsonl"), row]]
                temporary.write_text("".join(lines))
    print("stopped; the same command goes on from there" if signals else
          f"{len(work) - failed} runs done, {failed} failed; next: python -m lab.scaling fit {out}")
    if signals or failed:
        raise SystemExit(128 + signals[0] if signals else 1)


# ----------------------------------------------------------------------------------------------------------------------
# Fit. What `laws.py` finds, as a figure.

def draw(runs, report, path):
    """Draw the isoFLOPs with their optima, and kappa, r* and pJSD against compute."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure, rows = Figure(figsize=(9.6, 7.2), layout="constrained"), report["budgets"]
    C, bound = np.array([row["C"] for row in rows]), np.array([bool(row["edge"]) for row in rows])
    (iso, curvature), (ratio, metric) = figure.subplots(2, 2)
    law, (k, p) = laws.Law(*(report[name] for name in ("E", "A", "B", "alpha", "beta"))), report["cost"].values()
    sizes = np.geomspace(runs["N"].min() / 1.5, runs["N"].max() * 1.5, 200)
    for number, (row, marker) in enumerate(zip(rows, itertools.cycle("osD^vPX"))):
        shade, mine = matplotlib.colormaps["cividis"](0.9 * number / (len(rows) - 1)), runs["group"] == number
        iso.plot(runs["N"][mine], runs["loss"][mine], marker, color=shade, label=f"{row['C']:.2g}")
        iso.plot(sizes, law(sizes, row["C"] / (k * sizes ** p)), color=shade)
        iso.plot(row["N"], row["loss"], "*", color=COLOURS[4], markersize=13, markeredgecolor="white", zorder=3)
    iso.set(xscale="log", yscale="log", xlabel="N, parameters", ylabel="validation loss")
    iso.legend(title="C, FLOPs (stars: optima)", frameon=False)
    for axes, name in ((curvature, "kappa"), (ratio, "r")):
        values, ends = (np.array([row[name] for row in part]) for part in (rows, [row["interval"] for row in rows]))
        axes.fill_between(C, *ends.T, color=COLOURS[0], alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(C, values, color=COLOURS[0])
        for here, face, label in ((~bound, COLOURS[0], "law"), (bound, "white", "at the edge: a bound")):
            label = label if here.any() else None
            axes.plot(C[here], values[here], "o", color=COLOURS[0], markerfacecolor=face, label=label)
    curvature.plot(C, [row["parabola"]["kappa"] for row in rows], "s", color=COLOURS[4], label="parabola")
    best = [min(np.flatnonzero(runs["group"] == g), key=lambda i: runs["loss"][i]) for g in range(len(rows))]
    for n, (colour, marker) in enumerate(zip(COLOURS, "osD^v"[:len(rows[0].get("pjsd", ()))])):
        metric.plot(C, runs["pjsd"][best, n], marker, color=colour, label=f"n = {n + 1}")
        metric.plot(C, [row["pjsd"][n] for row in rows], color=colour)
        metric.plot(C, runs["pjsd_floor"][best, n], ":", color=colour)
    curvature.set_ylabel("κ = d² ln L / d(ln N)²")
    ratio.set(yscale="log", ylabel="r* = D*/N*, tokens a parameter")
    metric.set_ylabel("pJSD of the best runs, bits (dotted: floor)")
    for axes in (curvature, ratio, metric):
        axes.set(xscale="log", xlabel="C, training FLOPs")
        axes.set_xticks(C, [f"{c:.2g}" for c in C], minor=False, rotation=20)
        axes.set_xticks([], minor=True)
        axes.legend(framealpha=0.7, edgecolor="none") if axes.lines else axes.set_axis_off()
    form = path.suffix[1:] or "png"
    if form not in figure.canvas.get_supported_filetypes():
        raise UserError(f"--plot {path}: can't write {form}; png, pdf and svg can be")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format=form)


# ----------------------------------------------------------------------------------------------------------------------
# main.

def numbers(text):
    """"4e12,1.2e13" -> [4e12, 1.2e13]."""
    values = [float(word) for word in text.split(",")]
    if not all(0 < value < math.inf for value in values):
        raise ValueError
    return values


def shapes(text):
    """"2x64,2x128" -> [[2, 64], [2, 128]]."""
    sizes = [[int(number) for number in word.split("x")] for word in text.split(",")]
    if any(len(size) != 2 for size in sizes):
        raise ValueError
    return sizes


def parse(argv=None):
    """Command line -> arguments, and the flags that cdslm.py is to read."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="train a grid of runs; takes flags of cdslm.py too",
                                  description=None)
    running.add_argument("--budgets", type=numbers, default=BUDGETS, help=f"training FLOPs, exact [{BUDGETS}]")
    running.add_argument("--sizes", type=shapes, default=SIZES, help=f"depth x width of models [{SIZES}]")
    running.add_argument("--each", type=int, default=5, help="how many of them each budget trains [5]")
    running.add_argument("--only", type=lambda text: text.split(","), help="train these sizes of the grid alone")
    running.add_argument("--repeat", type=float, help="where a second seed is trained as well [the second budget]")
    running.add_argument("--minutes", type=float, default=10, help="minutes of speech that each run is judged by [10]")
    running.add_argument("--dry-run", action="store_true", help="print what is to be done, and exit")
    running.add_argument("--out", type=Path, default="runs/iso", help="folder of the study [runs/iso]")
    fitting = commands.add_parser("fit", help="fit the laws to runs", description=None)
    fitting.add_argument("runs", help="a folder of `run`; CSV or JSONL with loss and two of N, D, C")
    fitting.add_argument("--plot", type=Path, help="draw the figure here: png, pdf, svg")
    fitting.add_argument("--json", nargs="?", const="-", help="write the report here; without a path, to the screen")
    arguments, flags = parser.parse_known_args(argv)
    if arguments.command == "fit" and flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return arguments, flags


def main():
    arguments, flags = parse()
    if arguments.command == "run":
        return run(arguments, flags)
    runs, notes = laws.read(arguments.runs)
    report = laws.study(runs, notes)
    clean = json.loads(json.dumps(report), parse_constant=lambda _: None)     # JSON has no word for NaN
    print(json.dumps(clean, indent=2)) if arguments.json == "-" else laws.page(report)
    if arguments.json not in (None, "-"):
        with replacing(arguments.json) as temporary:
            temporary.write_text(json.dumps(clean, indent=2) + "\n")
    if arguments.plot:
        draw(runs, report, arguments.plot)


if __name__ == "__main__":
    cli(main)
