"""ablate: what does each choice of the first command buy? Short runs, judged by their language.

    python -m lab.ablate                   each choice changed, one at a time; an hour on one core
    python -m lab.ablate --seed 1          one of three seeds alone: processes may share the work
    python -m lab.ablate --table           trains nothing: prints the results that are there

A model is `tiny`, trained for 1,000 steps. Frames are recognised without the decoder, so that only
the model is judged. Results are kept in lab/results/ablations.csv, where the same command goes on;
docs/results.md shows them, "What each choice buys".
"""
from pathlib import Path

import torch

from cdslm import (Parser, Trainer, cli, count, decide, fit_autoencoder, open_corpus,
                   parse as parse_config)
from lab.judge import ASKED, Judge
from lab.study import add_row, chosen_seeds, read_rows, spread

BASE = "--steps 1000 --decoder griffinlim --device cpu"
MINUTES = 10                           # of generated speech that is judged

# What is changed, one string of flags a model: first the neighbours of the default, then what the
# paper chose.
CHANGES = ["", "--min-snr-gamma 0.1", "--min-snr-gamma 0.5", "--t-shift 1.5",
           "--min-snr-gamma 5", "--self-condition 0", "--optimizer adamw"]

RESULTS = Path(__file__).parent / "results" / "ablations.csv"
DIGITS = {"loss": 4, "words": 3, "runs_2": 3, "pjsd_2": 3, "pjsd_3": 3, "pjsd_5": 3,
          "language": 2} | dict.fromkeys(ASKED, 2)


def run(config):
    """Train and judge one model: {name in DIGITS: value}."""
    device, dtype = decide(config)
    corpus = open_corpus(config)
    autoencoder = fit_autoencoder(config, corpus, device, dtype)
    trainer = Trainer(config, corpus, autoencoder, device, dtype)
    while trainer.done < config.steps:
        trainer.finish(trainer.step())

    report = Judge(config, autoencoder, device, dtype, MINUTES)(trainer.ema)
    pjsd = report["pjsd"]
    return {
        "loss": trainer.validate(256)["mean"], "words": report["word_rate"],
        "runs_2": report["runs_2"], "pjsd_2": pjsd[1], "pjsd_3": pjsd[2], "pjsd_5": pjsd[4],
        "language": report["language_kept"], **{kind: report[kind] for kind in ASKED}}


def table():
    """Print means over seeds, ± half of the distance between the outermost, in Markdown."""
    rows = read_rows(RESULTS)
    print(f"| changed | seeds | FLOPs | {' | '.join(DIGITS)} |")
    print("|---" * (3 + len(DIGITS)) + "|")
    for flags in CHANGES:
        mine = [row for row in rows if row["flags"] == flags]
        if not mine:
            continue
        cells = []
        for name, digits in DIGITS.items():
            cells.append(spread([float(row[name]) for row in mine], digits))
        config = parse_config(f"{BASE} {flags}".split())
        flops = count(config)["flops"] * config.batch_size * config.steps
        title = f"`{flags}`" if flags else "nothing"
        print(f"| {title} | {len(mine)} | {flops:.1e} | {' | '.join(cells)} |")


def main():
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, help="train this seed alone [0, 1 and 2]")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    arguments = parser.parse_args()
    seeds = chosen_seeds(arguments.seed)

    finished = {(row["flags"], int(row["seed"])) for row in read_rows(RESULTS)}
    for flags in CHANGES:
        for seed in seeds:
            if (flags, seed) not in finished and not arguments.table:
                measured = run(parse_config(f"{BASE} {flags} --seed {seed}".split()))
                values = {name: f"{value:.5g}" for name, value in measured.items()}
                add_row(RESULTS, {"flags": flags, "seed": seed, **values})
    table()


if __name__ == "__main__":
    torch.set_num_threads(1)
    cli(main)
