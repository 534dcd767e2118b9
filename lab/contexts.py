"""contexts: what buys coherence? The study of docs/coherence.md.

    python -m lab.contexts --out runs/contexts        about three hours on one core
    python -m lab.contexts --plot contexts.png        trains nothing: draws the results

Arm C (lab/autoregressive.py) learns the conversations of lab/topics.py with windows from 3 to 24
seconds and the same FLOPs, and lab/coherence.py asks what it remembers. In training a lesson is a
position after the context: with a long context every lesson has a long past. In generating, B and C
hear the newest two thirds of a window, or a context if that is more; A hears its context. The same
command goes on where it stopped. Results are kept in lab/results/contexts.csv.
"""
import itertools
import json
from pathlib import Path

from cdslm import Parser, UserError, cli
from lab.figures import new_figure, save_figure
from lab.study import ROOT, add_row, adopt_decoder, chosen_seeds, python, read_rows, spread

RESULTS = ROOT / "lab" / "results" / "contexts.csv"
FLOPS = 8e13                          # what the first command takes
FLAGS = "--toy-grammar topics --toy-languages 1"
# {(arm, seconds of context, of continuation, what else differs): more flags}. Batches of C hold
# about as many seconds.
RUNS = {
    ("C", 1, 2, ""): "--batch-size 20",
    ("C", 1, 5, ""): "--batch-size 10",
    ("C", 1, 11, ""): "--batch-size 5",
    ("C", 1, 23, ""): "--batch-size 3",
    ("C", 4, 8, ""): "--batch-size 5",
    ("C", 4, 8, "8 blocks"): "--batch-size 5 --depth 8 --width 192",
    ("C", 4, 8, "patches of 4"): "--batch-size 5 --patch-size 4",
    ("C", 8, 8, ""): "--batch-size 4",
    ("B", 4, 8, ""): "--batch-size 5 --lr 8e-3 --muon-lr 0.16",
    ("A", 1, 3, ""): "",
}
REPEATED = ("C", 4, 8, "")            # with three seeds
COLOURS = {"C": "tab:blue", "B": "tab:orange", "A": "tab:green"}
MEASURES = {                          # column: its name in the report
    "first": "topic after prompt", "topic_1": "topic, 1 later", "topic_10": "topic, 10 later",
    "half_life": "half-life, s", "whole": "whole phrases", "closers": "closers agree",
    "replies": "replies answer", "voice": "voice comes back"}


def run(out, arm, ctx, gen, variant, seed):
    """Train one model and judge it, as far as that is not done yet. Returns its row."""
    name = f"{arm}-{ctx}-{gen}-{variant.replace(' ', '-')}-{seed}"
    folder = out / name.replace("--", "-")
    adopt_decoder(out, folder, seed)
    python("lab.autoregressive", "--arm", arm, "--flops", f"{FLOPS:g}", "--out", str(folder),
           "--ctx-seconds", str(ctx), "--gen-seconds", str(gen), "--seed", str(seed),
           *FLAGS.split(), *RUNS[arm, ctx, gen, variant].split())
    if not (folder / "coherence.json").exists():
        python("lab.coherence", str(folder))

    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    row = {"arm": arm, "ctx": str(ctx), "gen": str(gen), "variant": variant, "seed": str(seed),
           "steps": last["step"], "flops": f"{last['flops']:.3g}"}
    figures = json.loads((folder / "coherence.json").read_text())["figures"]
    for column, name in MEASURES.items():
        found = figures["generated"][name]
        value, (low, high) = found["value"], found["interval"] or (None, None)
        for end, number in (("", value), ("_low", low), ("_high", high)):
            row[column + end] = "nan" if number is None else f"{number:.4g}"    # of no case
    return row | {"half_life_window": f"{figures['window']['half-life, s']['value']:.4g}",
                  "half_life_true": f"{figures['true']['half-life, s']['value']:.4g}"}


def key_of(row):
    """The entry of RUNS that a row belongs to."""
    return row["arm"], int(row["ctx"]), int(row["gen"]), row["variant"]


def table(rows):
    """Print the results in Markdown, means of seeds."""
    print(f"| arm | context + continuation | seeds | steps | {' | '.join(MEASURES.values())} |")
    print("|---" * (4 + len(MEASURES)) + "|")
    for key in RUNS:
        found = [row for row in rows if key_of(row) == key]
        if found:
            arm, ctx, gen, variant = key
            cells = [spread([float(row[column]) for row in found], 2) for column in MEASURES]
            shape = f"{ctx} + {gen} s" + (f", {variant}" if variant else "")
            print(f"| {arm} | {shape} | {len(found)} | {found[0]['steps']} | "
                  f"{' | '.join(cells)} |")


def draw(rows, path):
    """Draw half-life and agreement of closers against the seconds of a window. Filled: with a
    context of 4 s or more every lesson has a long past."""
    rows = [row for row in rows if not row["variant"]]
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2, sharex=True)
    for panel, column, title in ((left, "half_life", "half-life of the topic, s"),
                                 (right, "closers", "closers that agree")):
        for (arm, colour), far in itertools.product(COLOURS.items(), (False, True)):
            found = [row for row in rows if row["arm"] == arm and (int(row["ctx"]) > 1) == far]
            if not found:
                continue
            windows = [int(row["ctx"]) + int(row["gen"]) for row in found]
            values = [float(row[column]) for row in found]
            below = [v - float(row[column + "_low"]) for v, row in zip(values, found)]
            above = [float(row[column + "_high"]) - v for v, row in zip(values, found)]
            panel.errorbar(windows, values, (below, above), fmt="o", color=colour, capsize=3,
                           fillstyle="full" if far else "none",
                           label=f"{arm}, context of {'4 s or more' if far else '1 s'}")
        panel.set(xscale="log", xlabel=f"seconds of a window ({FLOPS:g} FLOPs each)", title=title)
        panel.set_xticks([3, 6, 12, 24], ["3", "6", "12", "24"], minor=False)
        panel.minorticks_off()

    # What somebody could reach who knows the grammar, but has such a window; and true speech.
    known = sorted((int(row["ctx"]) + int(row["gen"]), float(row["half_life_window"]))
                   for row in rows if row["arm"] == "C" and row["seed"] == "0")
    left.plot(*zip(*known), color="0.7", linestyle="--", label="what windows of C allow")
    left.axhline(float(rows[0]["half_life_true"]), color="0.5", label="true speech")
    left.set(yscale="log", ylim=(0.9, 45))
    left.set_yticks([1, 3, 10, 30], ["1", "3", "10", "30"])
    right.set_ylim(0, 1)
    chance = right.axhline(0.25, color="0.7", linestyle=":", label="chance")
    handles, _ = left.get_legend_handles_labels()
    figure.legend(handles=[*handles, chance], loc="outside right center", frameon=False)
    save_figure(figure, path)


def main():
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/contexts"), help="folder for the "
                        "runs")
    parser.add_argument("--seed", type=int, help="train this seed alone [0, 1 and 2]")
    parser.add_argument("--plot", type=Path, help="draw the results that are there")
    arguments = parser.parse_args()

    rows = read_rows(RESULTS)
    if arguments.plot:
        if not rows:
            raise UserError(f"--plot: there are no results in {RESULTS}")
        return draw(rows, arguments.plot)
    done = {(*key_of(row), int(row["seed"])) for row in rows}
    for seed in chosen_seeds(arguments.seed):
        for key in RUNS:
            wanted = seed == 0 or key == REPEATED
            if wanted and (*key, seed) not in done:
                rows = add_row(RESULTS, run(arguments.out.resolve(), *key, seed))
    table(rows)


if __name__ == "__main__":
    cli(main, resumable=True)
