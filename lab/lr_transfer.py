"""Does the best learning rate of a small model serve a large one? Sweeps over width and over depth, with muP and with
standard parametrisation, where every size has the same rates, decay and residual scale.

    python -m lab.lr_transfer            an hour and a half on one core; goes on where it stopped
    python -m lab.lr_transfer --draw     draws what is there: docs/figures/transfer.png

A line of lab/results/lr_transfer.csv is one run: tiny's window, AdamW, 200 steps of 16 windows, and its validation
loss. The regret of a size is what its loss at the best rate of the smallest size is above its loss at its own best.
"""
import csv
import itertools
import statistics
import sys
from pathlib import Path

import torch

import cdslm
from cdslm import open_corpus

ROOT = Path(__file__).parents[1]

RESULTS, FIGURE = ROOT / "lab/results/lr_transfer.csv", ROOT / "docs/figures/transfer.png"
STEPS, SEEDS, AXES = 200, (0, 1), {"width": [(64, 2), (128, 2), (256, 2), (512, 2)],
                                   "depth": [(128, 1), (128, 2), (128, 4), (128, 8)]}
RATES = {"muP": [2.0 ** i for i in range(-11, -6)], "standard": [2.0 ** i for i in range(-10, -4)]}
FIELDS = ("parametrisation", "width", "depth", "lr", "seed", "loss")


def planned():
    """Every run, small ones first: (parametrisation, width, depth, lr, seed)."""
    sizes = sorted({size for sizes in AXES.values() for size in sizes}, key=lambda size: size[0] ** 2 * size[1])
    return [(way, *size, lr, seed) for seed, size in itertools.product(SEEDS, sizes) for way in RATES
            for lr in RATES[way]]


def done():
    """{run: loss} of the runs that are in the file."""
    if not RESULTS.exists():
        return {}
    rows = list(csv.DictReader(RESULTS.open()))
    return {(row["parametrisation"], int(row["width"]), int(row["depth"]), float(row["lr"]), int(row["seed"])):
            float(row["loss"]) for row in rows}


def run(way, width, depth, lr, seed):
    """Train and validate one model; its line in the file."""
    config = cdslm.Config(size="tiny", width=width, depth=depth, lr=lr, seed=seed, optimizer="adamw", batch_size=16,
                          steps=STEPS, warmup=20, self_condition=0.0, min_snr_gamma=5.0, t_shift=0.0, ema=0.0,
                          decoder="griffinlim", device="cpu")
    base = (4, 512) if way == "muP" else (depth, width)         # standard: every size is its own base
    cdslm.BASE_DEPTH, cdslm.BASE_WIDTH = base
    device, dtype = cdslm.decide(config)
    corpus = open_corpus(config)
    trainer = cdslm.Trainer(config, corpus, cdslm.fit_autoencoder(config, corpus, device, dtype), device, dtype)
    for _ in range(STEPS):
        trainer.step()
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([FIELDS] * new + [(way, width, depth, lr, seed, f"{trainer.validate()['mean']:.5f}")])


def curves(losses, way, sizes):
    """{size: {lr: mean loss over the seeds}} of the sizes whose runs are all there for a seed at least."""
    seeds = {size: [seed for seed in SEEDS if all((way, *size, lr, seed) in losses for lr in RATES[way])]
             for size in sizes}
    return {size: {lr: statistics.mean(losses[way, *size, lr, seed] for seed in some) for lr in RATES[way]}
            for size, some in seeds.items() if some}


def regrets(by_size):
    """{size: (best lr, relative loss above its best at the best lr of the smallest)}."""
    best = {size: min(curve, key=curve.get) for size, curve in by_size.items()}
    first = next(iter(best.values()))
    return {size: (best[size], curve[first] / curve[best[size]] - 1) for size, curve in by_size.items()}


def draw(losses):
    """Loss against learning rate, a line a size: both ways, over width and over depth."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, 4, figsize=(14, 3.6), sharey="row", layout="constrained")
    for panel, (axis, way) in zip(panels, itertools.product(AXES, RATES)):
        by_size = curves(losses, way, AXES[axis])
        for shade, (size, (best, regret)) in zip((0.15, 0.4, 0.65, 0.9), regrets(by_size).items()):
            value, colour = size[axis == "depth"], pyplot.cm.viridis(shade)
            panel.plot(*zip(*by_size[size].items()), color=colour, marker=".", label=f"{value}: {regret:+.1%}")
            panel.plot(best, by_size[size][best], "o", color=colour)
            print(f"{way:>9}, {axis} {value:>3}: best rate {best:.1e}, loss {by_size[size][best]:.4f}, "
                  f"regret {regret:.2%}")
        panel.set(xscale="log", yscale="log", xlabel="learning rate of the base", title=f"{way}, over {axis}")
        panel.minorticks_off()
        panel.set_yticks([0.07, 0.1, 0.15, 0.2], ["0.07", "0.1", "0.15", "0.2"])
        panel.legend(title=f"{axis}: regret")
    panels[0].set_ylabel("validation loss")
    figure.savefig(FIGURE, dpi=110)


def main():
    for plan in () if "--draw" in sys.argv else planned():
        if plan not in done():
            run(*plan)
    draw(done())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
