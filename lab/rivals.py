"""rivals: all at once or one after the other, frames or codes? The study of docs/rival.md.

    python -m lab.rivals --out runs/rivals               a night on one core
    python -m lab.rivals --out runs/rivals --seed 1      one seed: processes may share the work
    python -m lab.rivals --frontier                      judges what is there, with other guidance
    python -m lab.rivals --table                         trains nothing: prints the results

Every arm of lab/autoregressive.py is trained on the same toy speech with the same FLOPs, and judged
by the same programs, each in a process of its own. The same command goes on where it stopped.
Results are kept in lab/results/rivals.csv, those of --frontier in lab/results/frontiers.csv:
guidance (A, C) and temperature (B) trade variety for correctness.
"""
import json
import math
from pathlib import Path

import numpy as np

from cdslm import Parser, UserError, cli
from lab.study import (ROOT, SEEDS, add_row, adopt_decoder, chosen_seeds, python, read_rows,
                       spread)

RESULTS = ROOT / "lab" / "results" / "rivals.csv"
FRONTIERS = ROOT / "lab" / "results" / "frontiers.csv"
ARMS = "A", "B", "C"
# FLOPs: (arms, seeds). What takes an hour a run is run less often.
BUDGETS = {2e13: (ARMS, SEEDS), 8e13: (ARMS, SEEDS), 3.2e14: (("A", "B"), SEEDS[:2])}
FRONTIER = 8e13                       # the largest budget that all arms have
DIALS = {"A": ("--cfg", (1, 1.5, 2, 3)), "B": ("--temperature", (0.7, 0.8, 0.9, 1)),
         "C": ("--cfg", (1, 1.5, 2, 3))}
# Times the default learning rates, what was best for each arm with 1e13 FLOPs on the default toy
# languages (docs/rival.md). The study has other languages.
RATES = {"A": 2, "B": 8, "C": 1}
FLAGS = "--toy-seed 2"
JUDGES = "eval_pjsd", "lab.pairs --kinds word place order --draws 2"
# What is read from the judges' reports: file, and the way to a figure.
KEPT = ("word_rate", "runs_2", "runs_3", "pair_bits", "language_kept", "speaker_kept",
        "style_kept")
MEASURES = {name: ("judged.json", "toy", name, "value") for name in KEPT}
MEASURES |= {f"pjsd_{n}": ("judged.json", "pjsd", n - 1) for n in (1, 2, 3)}
MEASURES |= {kind: ("pairs.json", kind, "accuracy") for kind in ("word", "place", "order")}


def run(out, arm, flops, seed):
    """Train one model and judge it, as far as that is not done yet. Returns its row."""
    folder = out / f"{arm}-{flops:g}-{seed}"
    adopt_decoder(out, folder, seed)
    flags = f"{FLAGS} --lr {1e-3 * RATES[arm]} --muon-lr {0.02 * RATES[arm]} --seed {seed}"
    python("lab.autoregressive", "--arm", arm, "--flops", f"{flops:g}", "--out", str(folder),
           *flags.split())
    for judge in JUDGES:
        name, *more = judge.split()
        if not (folder / f"{name}.done").exists():
            python(name, str(folder), *more)
            (folder / f"{name}.done").touch()

    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    row = {"arm": arm, "flops": f"{flops:g}", "seed": str(seed), "steps": last["step"],
           "loss": f"{last['valid']['mean']:.4g}"}
    for name, (file, *way) in MEASURES.items():
        value = json.loads((folder / file).read_text())
        for key in way:
            value = value[key]
        row[name] = f"{value:.4g}"
    return row


def order(row):
    """Where a row of the results belongs."""
    return float(row["flops"]), row["arm"], row["seed"]


def point(out, arm, seed, value):
    """Judge one run with FRONTIER FLOPs with another guidance or temperature. Returns its row."""
    flag, folder = DIALS[arm][0], out / f"{arm}-{FRONTIER:g}-{seed}"
    if not (folder / "judged.json").exists():
        raise UserError(f"{folder}: not trained and judged yet; first without --frontier")
    path = folder / f"judged{flag}-{value:g}.json"
    python("lab.autoregressive", "eval_pjsd", str(folder), flag, f"{value:g}", "--json", str(path))
    report = json.loads(path.read_text())
    return {"arm": arm, "seed": str(seed), "dial": f"{value:g}",
            "word_rate": f"{report['toy']['word_rate']['value']:.4g}",
            "runs_3": f"{report['toy']['runs_3']['value']:.4g}",
            "pjsd_3": f"{report['pjsd'][2]:.4g}",
            "variety_5": f"{report['variety'][4]:.4g}"}


def frontier(out, seeds):
    """Judge every point that is not judged yet, and print a table."""
    points = [(arm, seed, value) for seed in seeds for arm in ARMS for value in DIALS[arm][1]]
    rows = read_rows(FRONTIERS)
    done = {(row["arm"], row["seed"], row["dial"]) for row in rows}
    for arm, seed, value in points:
        if (arm, str(seed), f"{value:g}") not in done:
            rows = add_row(FRONTIERS, point(out, arm, seed, value))

    print("| arm | guidance or temperature | words | in 3 or more | pJSD₃ | distinct 5-grams |")
    print("|---" * 6 + "|")
    for arm, (_, values) in DIALS.items():
        for value in values:
            found = [row for row in rows if (row["arm"], row["dial"]) == (arm, f"{value:g}")]
            cells = [spread([float(row[name]) for row in found], 3)
                     for name in ("word_rate", "runs_3", "pjsd_3", "variety_5")]
            print(f"| {arm} | {value:g} | {' | '.join(cells)} |")


def table():
    """Print means over seeds, ± half of the distance between the outermost, in Markdown."""
    done = read_rows(RESULTS)
    for flops, (arms, _) in BUDGETS.items():
        rows = [row for row in done if float(row["flops"]) == flops]
        sides = [[row for row in rows if row["arm"] == arm] for arm in arms]
        print(f"\n| {flops:g} FLOPs | {' | '.join(arms)} |")
        print("|---" * (1 + len(arms)) + "|")
        print(f"| seeds | {' | '.join(str(len(side)) for side in sides)} |")
        for name in ("steps", "loss", *MEASURES):
            digits = 0 if name == "steps" else 3
            cells = [spread([float(row[name]) for row in side], digits) for side in sides]
            print(f"| {name} | {' | '.join(cells)} |")
    for (arm, flops), factors in multipliers(done).items():
        print(f"\nwords of {arm} with {flops:g} FLOPs: A needs {spread(factors, 1)} times as many "
              f"({len(factors)} seeds)")


def multipliers(rows):
    """{(arm, FLOPs): [how many times the FLOPs A needs for the arm's share of phones in words, for
    each seed]}. Between two budgets A's share is a straight line over the logarithm of FLOPs. A
    share that is not within A's, or within A's where they do not rise, is compared with nothing."""
    words = {(row["arm"], float(row["flops"]), row["seed"]): float(row["word_rate"])
             for row in rows}
    found = {}
    for (arm, flops, seed), share in words.items():
        line = sorted((budget, rate) for (other, budget, its), rate in words.items()
                      if other == "A" and its == seed)
        budgets, rates = zip(*line) if line else ((), ())
        rising = all(low < high for low, high in zip(rates, rates[1:]))
        if arm != "A" and rates and rising and rates[0] <= share <= rates[-1]:
            needed = math.exp(np.interp(share, rates, np.log(budgets)))
            found.setdefault((arm, flops), []).append(needed / flops)
    return found


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/rivals"), help="folder for the runs")
    parser.add_argument("--seed", type=int, help="train this seed alone [0, 1 and 2]")
    parser.add_argument("--frontier", action="store_true",
                        help="judge the largest runs with other guidance or temperature")
    parser.add_argument("--table", action="store_true", help="print the results that are there")
    arguments = parser.parse_args()
    seeds = chosen_seeds(arguments.seed)
    if arguments.frontier:
        return frontier(arguments.out.resolve(), seeds)

    finished = {(row["arm"], float(row["flops"]), int(row["seed"])) for row in read_rows(RESULTS)}
    grid = [(arm, flops, seed) for seed in seeds for flops, (arms, its_seeds) in BUDGETS.items()
            for arm in arms if seed in its_seeds]
    for arm, flops, seed in grid:
        if (arm, flops, seed) not in finished and not arguments.table:
            add_row(RESULTS, run(arguments.out.resolve(), arm, flops, seed), order)
    table()


if __name__ == "__main__":
    cli(main, resumable=True)
