"""scaling: what is the best use of a compute budget? A small isoFLOP study: runs, then laws.

    python -m lab.scaling run --out runs/iso                        45 minutes on one core
    python -m lab.scaling run --out runs/iso --seed 1               a second seed, beside the first
    python -m lab.scaling fit runs/iso --plot runs/iso.png          fits the laws, draws them

`run` trains on toy speech as `tiny` is trained, but with the paper's optimiser, AdamW: its learning
rates hold at every size (muP), and its own work is nothing beside the network's. CHOICE: one family
of shapes, 64 of width a block (the paper: 128), so that small models also have depth; below that,
one narrower block. Before its learning rate decays, a longer run is the same as a shorter one. So
one trunk per size and seed serves every budget, each by a short decay branch. The same command
resumes the study. On a cluster, start one job per size, with the same --out:

    for size in 1x64 2x128 3x192 4x256 5x320; do
        sbatch --wrap "python -m lab.scaling run --only $size"; done

Any flag of cdslm.py may follow: `--data DIR`, `--seed 7`, `--batch-size 64`. Each run is a line of
OUT/runs.jsonl: N parameters, D tokens of both streams, C training FLOPs (exact; 6ND beside it), the
validation loss with the weight that the run was trained with, what `lab/judge.py` says, seconds.
"""
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
from tqdm import tqdm

import eval_pjsd
from cdslm import (FRAME_RATE, Parser, Trainer, UserError, checked, claim, cli, count,
                   decay_start, decide, lock, open_autoencoder, open_corpus, parse as parse_config,
                   ranks, reason, replacing, resume_point, write_config)
from lab import laws
from lab.figures import new_figure, save_figure
from lab.judge import Judge
from lab.plan import seconds_a_step
from lab.process import interruptible
from lab.report import as_json, keep

STUDY = "--size tiny --optimizer adamw --toy-hours 48 --warmup 20".split()
BUDGETS = "6e11,2e12,6e12,2e13,6e13"
SIZES = "1x32,1x48,1x64,2x128,3x192,4x256,5x320"              # depth x width
EPOCHS, LEAST_STEPS = 16, 100          # toy speech is repeated so often at most; steps of a run
VALIDATION = 256                                                              # windows
SAVE_EVERY = 1000                                                             # steps
MEASURES = {
    "word_rate": "share of phones in words", "runs_2": "in two or more",
    "word": "pairs right: word or not", "place": "words in place", "order": "in order",
    "language_kept": "clips in their language", "late_words": "words in the fifth window",
    "late_language": "its language", "mel": "Fréchet distance of log-mel", "dnsmos": "DNSMOS"}
# Colours that everyone can tell apart (Okabe & Ito 2008).
COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"


# --------------------------------------------------------------------------------------------------
# Run. Budgets rise, since each run begins at the trunk of the one before.

def best_size(budget):
    """The parameters at which short runs had their optimum."""
    return 1.9e5 * (budget / 6e11) ** 0.6


def plan(arguments, base):
    """[(size, budget, Config)] of all runs. Each budget trains `each` sizes, those nearest to
    `best_size` among those that need not repeat their speech too often."""
    shapes = {}
    for depth, width in arguments.sizes:
        config = checked(dataclasses.replace(base, depth=depth, width=width))
        shapes[f"{depth}x{width}"] = config, count(config)
    only = arguments.only or shapes
    if arguments.each < 1 or not arguments.minutes > 0:
        raise UserError("--each must be at least 1, --minutes more than 0")
    if not set(only) <= set(shapes):
        raise UserError("--only must be some of --sizes")
    windows_an_hour = 3600 * FRAME_RATE / (base.ctx_frames + base.gen_frames)
    most = math.inf
    if base.data == "toy":
        most = EPOCHS * base.toy_hours * windows_an_hour / base.batch_size

    runs = []
    for budget in sorted(set(arguments.budgets)):
        steps = {size: round(budget / cost["flops"] / base.batch_size)
                 for size, (_, cost) in shapes.items()}
        able = [size for size in shapes if LEAST_STEPS <= steps[size] < most]
        if not able:
            raise UserError(f"{budget:g} FLOPs suit none of --sizes: a run would have fewer than "
                            f"{LEAST_STEPS} steps, or hear its speech more than {EPOCHS} times")
        able.sort(key=lambda size: abs(math.log(shapes[size][1]["parameters"] / best_size(budget))))
        for size in sorted(able[:arguments.each], key=list(shapes).index):
            if size in only:
                out = str(arguments.out / f"{size}-seed{base.seed}")
                config = dataclasses.replace(shapes[size][0], steps=steps[size], out=out)
                runs.append((size, budget, config))
    return runs


def train(trainer, first, seconds, bar, signals):
    """Train to the end of this budget, or until a signal comes. The trunk of the budget before it
    ended at step `first`; a step moves the bar by `seconds`, its estimated time."""
    config, folder = trainer.config, Path(trainer.config.out)
    start = decay_start(config.steps)
    write_config(folder, config)
    shutil.copyfile(folder.parent / "autoencoder.pt", folder / "autoencoder.pt")
    with contextlib.suppress(UserError):                      # without a checkpoint: from the start
        trainer.restore(resume_point(folder, config))
    bar.update((trainer.done - first) * seconds)

    while trainer.done < config.steps and not signals:
        if trainer.done == start:
            trainer.save(folder / "trunk.pt")                 # the next budget begins here
        if trainer.done == start or trainer.done % SAVE_EVERY == 0:
            trainer.save(folder / "checkpoint.pt")
        trainer.finish(trainer.step())
        bar.update(seconds)
    trainer.save(folder / "checkpoint.pt")


def make_judge(config, autoencoder, device, dtype, minutes):
    """judge(trainer) -> {measure: value} of its EMA weights; toy speech is judged without the
    decoder."""
    if config.data == "toy":
        judge = Judge(config, autoencoder, device, dtype, minutes)
        return lambda trainer: judge(trainer.ema)

    eval_pjsd.recogniser("hama")                              # raises UserError now, not in an hour

    def judge_recordings(trainer):
        arguments = eval_pjsd.parse([trainer.config.out, "--minutes", str(minutes)])
        report = eval_pjsd.judge_run(arguments)
        return {"pjsd": report["pjsd"], "floor": report["floor"]}
    return judge_recordings


def trained_loss(losses, gamma):
    """The mean of validation losses {log-SNR: loss}, which are weighted by min(SNR, 5), with the
    weight min(SNR, gamma) instead."""
    snrs = [math.exp(float(level)) for level in losses]
    terms = [loss * min(snr, gamma) / min(snr, 5) for snr, loss in zip(snrs, losses.values())]
    return sum(terms) / len(terms)


def measure(trainer, judge):
    """What is kept of a finished run. Raises UserError if it diverged."""
    config, size = trainer.config, count(trainer.config)
    losses = trainer.validate(VALIDATION)
    if not math.isfinite(losses.pop("mean")):
        raise UserError("its validation loss is not finite")
    report = judge(trainer)

    windows = config.steps * config.batch_size
    hours = windows * (config.ctx_frames + config.gen_frames) / FRAME_RATE / 3600
    N, D = size["parameters"], windows * size["tokens"]
    return {
        "N": N, "D": D, "C": windows * size["flops"], "6ND": 6 * N * D, "hours": hours,
        "epochs": hours / trainer.corpus.hours("train"),
        "loss": trained_loss(losses, config.min_snr_gamma), "losses": losses,
        "skipped": trainer.skipped, "pjsd_floor": report.pop("floor"), **report}


def read_rows(folder):
    """The lines of OUT/runs.jsonl so far."""
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(folder, row):
    """Add a line to OUT/runs.jsonl, which several jobs may write."""
    with lock(folder / ".lock", wait=True), replacing(folder / "runs.jsonl") as temporary:
        lines = [json.dumps(line) + "\n" for line in [*read_rows(folder), row]]
        temporary.write_text("".join(lines))


def to_do(arguments, base, device, dtype):
    """[(size, budget, Config, step at which its trunk is there, seconds a step)] of the runs that
    are not done yet, and their total seconds."""
    done = {(row["size"], row["budget"], row["seed"]) for row in read_rows(arguments.out)
            if "error" not in row}
    runs = plan(arguments, base)
    speed, trunk, work = {}, {}, []
    for size, budget, config in runs:
        if size not in speed:
            speed[size] = seconds_a_step(config, device, dtype)
        if (size, budget, config.seed) not in done:
            work.append((size, budget, config, trunk.get(config.out, 0), speed[size]))
        trunk[config.out] = decay_start(config.steps)
    total = sum((config.steps - first) * seconds for _, _, config, first, seconds in work)
    print(f"{len(work)} of {len(runs)} runs to do: about {total / 60:.0f} min on this machine, and "
          "the judging")
    return work, total


def run(arguments, flags):
    """Train the missing runs of the grid, and add a line to runs.jsonl for each. The line of a run
    that failed says why; the same command tries it again."""
    base, out = parse_config(STUDY + flags), arguments.out
    if ranks()[1] > 1 or base.parallel == "fsdp":
        raise UserError("lab.scaling trains on one device; start torchrun cdslm.py for each run, "
                        "and write its N, D, C and loss to a CSV for lab.scaling fit")
    device, dtype = decide(base)
    work, total = to_do(arguments, base, device, dtype)
    if arguments.dry_run or not work:
        return

    out.mkdir(parents=True, exist_ok=True)
    corpus = open_corpus(base)
    with lock(out / ".lock", wait=True):                      # the first job makes them for all
        autoencoder = open_autoencoder(dataclasses.replace(base, out=str(out)), corpus, device)
        judge = make_judge(base, autoencoder, device, dtype, arguments.minutes)

    form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    signals, failed = [], 0
    with tqdm(total=total, smoothing=0, bar_format=form) as bar, interruptible(signals):
        for size, budget, config, first, seconds in work:
            bar.set_description_str(f"{size} {budget:.3g} FLOPs")
            row = {"size": size, "budget": budget, "seed": config.seed}
            begun = time.perf_counter()
            with claim(config):
                try:
                    trainer = Trainer(config, corpus, autoencoder, device, dtype)
                    train(trainer, first, seconds, bar, signals)
                    if signals:
                        break
                    row["seconds"] = time.perf_counter() - begun
                    row |= measure(trainer, judge)
                    bar.set_postfix_str(f"loss {row['loss']:.4f}")
                except (UserError, RuntimeError) as error:    # RuntimeError: out of memory
                    failed, row["error"] = failed + 1, reason(error)
                    tqdm.write(f"{size} at {budget:g} FLOPs failed: {row['error']}",
                               file=sys.stderr)
            add_row(out, row)

    if signals:
        print("stopped; the same command goes on from there")
        raise SystemExit(128 + signals[0])
    print(f"{len(work) - failed} runs done, {failed} failed; next: python -m lab.scaling fit {out}")
    if failed:
        raise SystemExit(1)


# --------------------------------------------------------------------------------------------------
# Fit. What `laws.py` finds, as a figure of four panels.

def draw(runs, report, path):
    """Draw the isoFLOP curves with their optima, and kappa, r* and pJSD against compute."""
    figure = new_figure(9.6, 7.2)
    (iso, curvature), (ratio, metric) = figure.subplots(2, 2)
    draw_curves(iso, runs, report)
    draw_trend(curvature, report["budgets"], "kappa")
    draw_trend(ratio, report["budgets"], "r")
    C = [row["C"] for row in report["budgets"]]
    parabolas = [row["parabola"]["kappa"] for row in report["budgets"]]
    curvature.plot(C, parabolas, "s", color=COLOURS[4], label="parabola")
    draw_metric(metric, runs, report["budgets"])

    curvature.set_ylabel("κ = d² ln L / d(ln N)²")
    ratio.set(yscale="log", ylabel="r* = D*/N*, tokens a parameter")
    metric.set_ylabel("pJSD of the best runs, bits (dotted: floor)")
    for axes in (curvature, ratio, metric):
        axes.set(xscale="log", xlabel="C, training FLOPs")
        axes.set_xticks(C, [f"{c:.2g}" for c in C], minor=False, rotation=20)
        axes.set_xticks([], minor=True)
        if axes.lines:
            axes.legend(framealpha=0.7, edgecolor="none")
        else:
            axes.set_axis_off()
    save_figure(figure, path)


def draw_curves(axes, runs, report):
    """Loss against N: the runs of each budget, the law, and its optimum."""
    from matplotlib import colormaps
    law = laws.Law(*(report[name] for name in ("E", "A", "B", "alpha", "beta")))
    k, p = report["cost"]["k"], report["cost"]["p"]
    sizes = np.geomspace(runs["N"].min() / 1.5, runs["N"].max() * 1.5, 200)
    budgets = report["budgets"]
    for number, (row, marker) in enumerate(zip(budgets, itertools.cycle("osD^vPX"))):
        colour = colormaps["cividis"](0.9 * number / (len(budgets) - 1))
        group = runs["group"] == number
        axes.plot(runs["N"][group], runs["loss"][group], marker, color=colour,
                  label=f"{row['C']:.2g}")
        axes.plot(sizes, law(sizes, row["C"] / (k * sizes ** p)), color=colour)
        axes.plot(row["N"], row["loss"], "*", color=COLOURS[4], markersize=13,
                  markeredgecolor="white", zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="N, parameters", ylabel="validation loss")
    axes.legend(title="C, FLOPs (stars: optima)", frameon=False)


def draw_trend(axes, budgets, name):
    """A figure of the law against compute, with its interval; hollow where it is only a bound."""
    C = np.array([row["C"] for row in budgets])
    values = np.array([row[name] for row in budgets])
    low, high = np.array([row["interval"][name] for row in budgets]).T
    bound = np.array([bool(row["edge"]) for row in budgets])
    axes.fill_between(C, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(C, values, color=COLOURS[0])
    kinds = (~bound, COLOURS[0], "law"), (bound, "white", "at the edge: a bound")
    for which, face, label in kinds:
        axes.plot(C[which], values[which], "o", color=COLOURS[0], markerfacecolor=face,
                  label=label if which.any() else None)


def draw_metric(axes, runs, budgets):
    """pJSD of the best run of each budget against compute, with the fused fit and the floor."""
    C = [row["C"] for row in budgets]
    best = []
    for number in range(len(budgets)):
        group = np.flatnonzero(runs["group"] == number)
        best.append(group[runs["loss"][group].argmin()])
    orders = len(budgets[0].get("pjsd", ()))
    for n, colour, marker in zip(range(orders), COLOURS, "osD^v"):
        axes.plot(C, runs["pjsd"][best, n], marker, color=colour, label=f"n = {n + 1}")
        axes.plot(C, [row["pjsd"][n] for row in budgets], color=colour)
        axes.plot(C, runs["pjsd_floor"][best, n], ":", color=colour)


def print_measures(path):
    """Print what the best runs of each budget know and how they sound, if the table says it: means
    over seeds of the size with the lowest loss."""
    path = Path(path)
    rows, columns = laws.read_rows(path / "runs.jsonl" if path.is_dir() else path)
    if not {"budget", "size", "word_rate"} <= columns:
        return
    print("\nof the best size at each budget; " + ", ".join(MEASURES.values()))
    print(f"{'C':>9} {'size':>7}" + "".join(f"{name:>14}" for name in ("loss", *MEASURES)))
    rows = [{"size": row["size"], "budget": float(row["budget"])} |
            {name: laws.number(row.get(name)) for name in ("loss", *MEASURES)} for row in rows]
    for budget in sorted({row["budget"] for row in rows}):
        sizes = {}
        for row in rows:
            if row["budget"] == budget and math.isfinite(row["loss"]):
                values = [row[name] for name in ("loss", *MEASURES)]
                sizes.setdefault(row["size"], []).append(values)
        means = {size: np.mean(values, axis=0) for size, values in sizes.items()}
        best = min(means, key=lambda size: means[size][0])
        cells = "".join(f"{value:>14.4g}" for value in means[best])
        print(f"{budget:>9.2g} {best:>7}{cells}")


# --------------------------------------------------------------------------------------------------
# The command line.

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

    running = commands.add_parser("run", help="train a grid of runs; takes flags of cdslm.py too")
    running.add_argument("--budgets", type=numbers, default=BUDGETS,
                         help=f"training FLOPs, exact [{BUDGETS}]")
    running.add_argument("--sizes", type=shapes, default=SIZES,
                         help=f"depth x width of models [{SIZES}]")
    running.add_argument("--each", type=int, default=4,
                         help="number of sizes that each budget trains [4]")
    running.add_argument("--only", type=lambda text: text.split(","),
                         help="train only these sizes of the grid")
    running.add_argument("--minutes", type=float, default=10,
                         help="minutes of generated speech to judge each run by [10]")
    running.add_argument("--dry-run", action="store_true",
                         help="print what is to be done, and exit")
    running.add_argument("--out", type=Path, default="runs/iso",
                         help="folder of the study [runs/iso]")

    fitting = commands.add_parser("fit", help="fit the laws to runs")
    fitting.add_argument("runs",
                         help="a folder of `run`; CSV or JSONL with loss and two of N, D, C")
    fitting.add_argument("--plot", type=Path, help="draw the figure here: png, pdf, svg")
    fitting.add_argument("--json", nargs="?", const="-",
                         help="write the report here; without a path, print it")

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
    if arguments.json == "-":
        print(as_json(report), end="")
    else:
        laws.page(report)
        print_measures(arguments.runs)
    if arguments.json not in (None, "-"):
        keep(report, arguments.json)
    if arguments.plot:
        draw(runs, report, arguments.plot)


if __name__ == "__main__":
    cli(main, resumable=True)
