"""lr_transfer: does the best learning rate of a small model hold for a large one? Sweeps over width
and over depth, with muP and CompleteP, and with standard parametrisation, where every size has the
same learning rates, weight decay and residual scale.

    python -m lab.lr_transfer            an hour and a half on one core; the same command resumes
    python -m lab.lr_transfer --draw     draws what is there: docs/figures/transfer.png

A row of lab/results/lr_transfer.csv is one run: the window of tiny, AdamW, 200 steps of 16 windows,
and the validation loss. A size's regret is how far its loss, at the best rate of the smallest size,
lies above its loss at its own best rate.
"""
import csv
import itertools
import statistics
import sys
from pathlib import Path

import torch

import cdslm
from lab.figures import new_figure, save_figure

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "lab/results/lr_transfer.csv"
FIGURE = ROOT / "docs/figures/transfer.png"

STEPS, SEEDS = 200, (0, 1)
AXES = {                                          # {what grows: (width, depth) of each size}
    "width": [(64, 2), (128, 2), (256, 2), (512, 2)],
    "depth": [(128, 1), (128, 2), (128, 4), (128, 8)],
}
RATES = {
    "muP": [2.0 ** i for i in range(-11, -6)],
    "standard": [2.0 ** i for i in range(-10, -4)],
}
FIELDS = "parametrisation", "width", "depth", "lr", "seed", "loss"


def planned():
    """All runs, small models first: (parametrisation, width, depth, lr, seed)."""
    sizes = {size for sizes in AXES.values() for size in sizes}
    runs = []
    for seed in SEEDS:
        for width, depth in sorted(sizes, key=lambda size: size[0] ** 2 * size[1]):
            for way, rates in RATES.items():
                runs += [(way, width, depth, lr, seed) for lr in rates]
    return runs


def done():
    """{run: loss} of the runs in the results file."""
    losses = {}
    if RESULTS.exists():
        for row in csv.DictReader(RESULTS.open()):
            run = (row["parametrisation"], int(row["width"]), int(row["depth"]), float(row["lr"]),
                   int(row["seed"]))
            losses[run] = float(row["loss"])
    return losses


def run(way, width, depth, lr, seed):
    """Train and validate one model, and add its row to the results file."""
    config = cdslm.Config(
        size="tiny", width=width, depth=depth, lr=lr, seed=seed, optimizer="adamw", batch_size=16,
        steps=STEPS, warmup=20, self_condition=0.0, min_snr_gamma=5.0, t_shift=0.0, ema=0.0,
        decoder="griffinlim", device="cpu")

    # With standard parametrisation every size is its own base, so nothing is scaled.
    cdslm.BASE_DEPTH, cdslm.BASE_WIDTH = (4, 512) if way == "muP" else (depth, width)
    device, dtype = cdslm.decide(config)
    corpus = cdslm.open_corpus(config)
    autoencoder = cdslm.fit_autoencoder(config, corpus, device, dtype)
    trainer = cdslm.Trainer(config, corpus, autoencoder, device, dtype)
    for _ in range(STEPS):
        trainer.finish(trainer.step())

    rows = [(way, width, depth, lr, seed, f"{trainer.validate()['mean']:.5f}")]
    if not RESULTS.exists():
        rows.insert(0, FIELDS)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def curves(losses, way, sizes):
    """{size: {lr: mean loss over the seeds}}, of the seeds that have a run at every rate."""
    found = {}
    for size in sizes:
        seeds = [seed for seed in SEEDS
                 if all((way, *size, lr, seed) in losses for lr in RATES[way])]
        if seeds:
            found[size] = {lr: statistics.mean(losses[way, *size, lr, seed] for seed in seeds)
                           for lr in RATES[way]}
    return found


def regrets(by_size):
    """{size: (best rate, regret)}."""
    best = {size: min(curve, key=curve.get) for size, curve in by_size.items()}
    of_the_smallest = next(iter(best.values()))
    return {size: (best[size], curve[of_the_smallest] / curve[best[size]] - 1)
            for size, curve in by_size.items()}


def draw(losses):
    """Loss against learning rate, a line per size: both parametrisations, over width and depth."""
    figure = new_figure(14, 3.6)
    from matplotlib import colormaps
    panels = figure.subplots(1, 4, sharey="row")
    for panel, (axis, way) in zip(panels, itertools.product(AXES, RATES)):
        by_size = curves(losses, way, AXES[axis])
        for shade, (size, (best, regret)) in zip((0.15, 0.4, 0.65, 0.9), regrets(by_size).items()):
            curve, colour = by_size[size], colormaps["viridis"](shade)
            value = size[1] if axis == "depth" else size[0]
            panel.plot(list(curve), list(curve.values()), color=colour, marker=".",
                       label=f"{value}: {regret:+.1%}")
            panel.plot(best, curve[best], "o", color=colour)
            print(f"{way:>9}, {axis} {value:>3}: best rate {best:.1e}, loss {curve[best]:.4f}, "
                  f"regret {regret:.2%}")
        panel.set(xscale="log", yscale="log", xlabel="learning rate of the base",
                  title=f"{way}, over {axis}")
        panel.minorticks_off()
        panel.set_yticks([0.07, 0.1, 0.15, 0.2], ["0.07", "0.1", "0.15", "0.2"])
        panel.legend(title=f"{axis}: regret")
    panels[0].set_ylabel("validation loss")
    save_figure(figure, FIGURE)


def main():
    if "--draw" not in sys.argv:
        for plan in planned():
            if plan not in done():
                run(*plan)
    draw(done())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
