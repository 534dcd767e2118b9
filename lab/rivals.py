"""rivals: all at once or one after the other, frames or codes? The study of docs/rival.md.

    python -m lab.rivals --out runs/rivals                 some hours on one core
    python -m lab.rivals --out runs/rivals --seed 1        one seed: processes may share the work
    python -m lab.rivals --out runs/rivals --stories DIR   also on a folder that lab.stories made
    python -m lab.rivals --table                           trains nothing: prints the results

Every arm of lab/autoregressive.py is trained with the same FLOPs and judged by the same programs,
each in a process of its own. The same command goes on where it stopped. Results are kept in
lab/results/rivals.csv.
"""
import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from cdslm import Parser, UserError, cli, replacing
from lab.report import spread

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "lab" / "results" / "rivals.csv"
ARMS, SEEDS = ("A", "B", "C"), (0, 1, 2)
# Times the default learning rates, what was best for each arm with 1e13 FLOPs on the default toy
# languages (docs/rival.md). The study has other languages.
RATES = {"A": 2, "B": 8, "C": 1}
# corpus: flags, budgets of FLOPs, judges.
STUDY = {
    "toy": ("--toy-seed 2", (2e13, 8e13), (
        "eval_pjsd", "lab.pairs --kinds word place order --draws 2")),
    "topics": ("--toy-seed 2 --toy-grammar topics", (8e13,), ("lab.coherence",)),
    "stories": ("--data STORIES", (8e13,), ("lab.words", "lab.pairs --draws 2"))}
# What is read from the judges' reports: file, and the way to a figure.
MEASURES = {
    **{name: ("judged.json", "toy", name, "value") for name in (
        "word_rate", "runs_2", "runs_3", "pair_bits", "language_kept", "speaker_kept",
        "style_kept")},
    **{f"pjsd_{n}": ("judged.json", "pjsd", n - 1) for n in (1, 2, 3)},
    **{kind: ("pairs.json", kind, "accuracy") for kind in (
        "word", "place", "order", "agreement", "non-word")},
    **{name: ("coherence.json", "figures", "generated", name, "value") for name in (
        "whole phrases", "topic, 1 later", "half-life, s", "closers agree", "voice comes back")},
    **{name: ("words.json", "figures", "generated", name, "value") for name in (
        "vocabulary", "pairs", "triples", "pronoun", "distinct pairs")}}


def python(*words):
    """Run a program of this repository. Raises UserError if it fails."""
    status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
    if status:
        raise UserError(f"{' '.join(words)} stopped with status {status}")


def share_decoder(folder, corpus, seed):
    """Begin a run with the sound decoder of another one: of a corpus and seed all have the same."""
    trained = sorted(folder.parent.glob(f"{corpus}-*-{seed}/autoencoder.pt"))
    if trained and not folder.exists():
        folder.mkdir()
        shutil.copy(trained[0], folder)


def run(folder, arm, flags, flops, judges):
    """Train one model and judge it, as far as that is not done yet. Returns its row."""
    rates = f"--lr {1e-3 * RATES[arm]} --muon-lr {0.02 * RATES[arm]}".split()
    python("-m", "lab.autoregressive", "--arm", arm, "--flops", f"{flops:g}", "--out", str(folder),
           *flags, *rates)
    for judge in judges:
        name, *more = judge.split()
        if not (folder / f"{name}.done").exists():
            python("-m", name, str(folder), *more)
            (folder / f"{name}.done").touch()

    rows = (folder / "log.jsonl").read_text().splitlines()
    last = json.loads(rows[-1])
    row = {"steps": last["step"], "flops_exact": f"{last['flops']:.4g}",
           "loss": f"{last['valid']['mean']:.4g}"}
    for name, (file, *way) in MEASURES.items():
        found = folder / file
        value = json.loads(found.read_text()) if found.exists() else None
        for key in way:
            known = isinstance(value, list) or value and key in value
            value = value[key] if known else None
        row[name] = "" if value is None else f"{value:.4g}"
    return row


def done():
    """The rows of the results file."""
    return list(csv.DictReader(RESULTS.open())) if RESULTS.exists() else []


def add(row):
    """Add a row to the results file, in the place of one of the same run."""
    key = "corpus", "arm", "flops", "seed"
    rows = [old for old in done() if any(old[name] != row[name] for name in key)] + [row]
    rows.sort(key=lambda row: (list(STUDY).index(row["corpus"]), float(row["flops"]), row["arm"],
                               row["seed"]))
    with replacing(RESULTS) as temporary, temporary.open("w") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table():
    """Print means over seeds, ± half of the distance between the outermost, in Markdown."""
    for corpus, (_, budgets, _) in STUDY.items():
        for flops in budgets:
            rows = [row for row in done()
                    if row["corpus"] == corpus and float(row["flops"]) == flops]
            sides = [[row for row in rows if row["arm"] == arm] for arm in ARMS]
            if not rows:
                continue
            print(f"\n| {corpus}, {flops:g} FLOPs | {' | '.join(ARMS)} |")
            print("|---" * (1 + len(ARMS)) + "|")
            print(f"| seeds | {' | '.join(str(len(side)) for side in sides)} |")
            for name in ("steps", "loss", *MEASURES):
                cells = [spread([float(row[name]) for row in side if row[name]],
                                0 if name in ("steps", "distinct pairs") else 3) for side in sides]
                if any(cells):
                    print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nwith {STUDY['toy'][1][0]:g} FLOPs, A needs so many times an arm's for its share of "
          f"phones in words: {multipliers(done())}")


def multipliers(rows):
    """{arm: FLOPs with which A has the arm's words at the smallest budget, relative to it}: on the
    straight line through A's words at all budgets, over the logarithm of FLOPs."""
    rows = [row for row in rows if row["corpus"] == "toy"]
    log_flops = {arm: [math.log(float(row["flops"])) for row in rows if row["arm"] == arm]
                 for arm in ARMS}
    words = {arm: [float(row["word_rate"]) for row in rows if row["arm"] == arm] for arm in ARMS}
    smallest = math.log(min(STUDY["toy"][1]))
    if len(set(log_flops["A"])) < 2:
        return {}
    slope, offset = np.polyfit(log_flops["A"], words["A"], 1)
    found = {}
    for arm in ARMS[1:]:
        at = [value for x, value in zip(log_flops[arm], words[arm]) if x == smallest]
        if at:
            needed = (np.mean(at) - offset) / slope
            found[arm] = round(math.exp(needed - smallest), 1)
    return found


def main():
    parser = Parser(__doc__)
    add_argument = parser.add_argument
    add_argument("--out", type=Path, default=Path("runs/rivals"), help="folder for the runs")
    add_argument("--seed", type=int, choices=SEEDS, help="train this seed alone [0, 1 and 2]")
    add_argument("--corpora", nargs="+", choices=STUDY, default=["toy", "topics"],
                 help="what to train on [toy topics; with --stories also stories]")
    add_argument("--stories", type=Path, help="a folder of stories")
    add_argument("--table", action="store_true", help="print the results that are there")
    arguments = parser.parse_args()
    corpora = arguments.corpora + ["stories"] * bool(arguments.stories)
    if "stories" in corpora and not arguments.stories:
        raise UserError("stories need --stories DIR, with a folder that lab.stories made")

    finished = {(row["corpus"], row["arm"], float(row["flops"]), int(row["seed"]))
                for row in done()}
    for seed in SEEDS if arguments.seed is None else [arguments.seed]:
        for corpus in () if arguments.table else dict.fromkeys(corpora):
            flags, budgets, judges = STUDY[corpus]
            flags = flags.replace("STORIES", str(arguments.stories and arguments.stories.resolve()))
            for flops in budgets:
                for arm in ARMS:
                    if (corpus, arm, flops, seed) in finished:
                        continue
                    folder = arguments.out.resolve() / f"{corpus}-{arm}-{flops:g}-{seed}"
                    share_decoder(folder, corpus, seed)
                    row = run(folder, arm, [*flags.split(), "--seed", str(seed)], flops, judges)
                    add({"corpus": corpus, "arm": arm, "flops": f"{flops:g}", "seed": str(seed),
                         **row})
    table()


if __name__ == "__main__":
    cli(main, resumable=True)
