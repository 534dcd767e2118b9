"""report: prints what eval_pjsd.py found, every figure beside its nulls; keeps any judge's report.
"""
import json
import math

from cdslm import replacing
from lab.recognizers import ERRORS

ROWS = {
    "pjsd": "pJSD, bits",
    "from": "  95 % interval from",
    "to": "  to",
    "floor": "floor",
    "floor_sd": "  standard deviation",
    "excess": "excess over the floor",
    "normalized_excess": "  normalized",
    "corrected": "corrected for bias",
    "true": "true continuations",
    "variety": "distinct, of real speech's",
}
MEANING = {
    "word_rate": "phones inside whole words of the right language",
    "runs_2": "phones inside 2 or more such words in a row",
    "runs_3": "phones inside 3 or more such words in a row",
    "pair_bits": "bits by which word pairs are less likely than true ones (0: as likely)",
    "language_kept": "multilingual: most words are of the context's language",
    "speaker_kept": "multi-speaker: the same voice, by pitch and vocal tract together",
    "tract_kept": "the same vocal tract, less what pitch tells of it",
    "breath_kept": "the same breathiness",
    "rate_kept": "the speaker's tempo, among speakers in the same style",
    "style_kept": "prosodic, emotive: the same style, by pitch range alone",
}
WORDS = "word_rate", "runs_2", "runs_3", "pair_bits", "language_kept"


def number(value, form):
    """A figure as text; a dash where nothing can be said."""
    return "-" if value is None or math.isnan(value) else format(value, form)


def line(name, values, form):
    """Print a row of a table."""
    print(f"{name:<26}" + "".join(f"{number(v, form):>9}" for v in values))


def divergence_table(report):
    """pJSD for each n, what belongs to it, and the nulls' values."""
    lacking = [n for n, times in zip(report["n"], report["enough"]) if times > 1]
    print(f"{'n':<26}" + "".join(f"{n:>8}{'*' if n in lacking else ' '}" for n in report["n"]))
    low, high = zip(*report["interval"])
    rows = report | {"from": low, "to": high}
    for key, name in ROWS.items():
        line(name, rows[key], ".4f")
    for name, null in report.get("nulls", {}).items():
        line(f"null: {name}", null["pjsd"], ".4f")
    for language, row in report.get("by_language", {}).items():
        line(f"in language {language} alone", row["pjsd"], ".4f")
        line("  floor", row["floor"], ".4f")
    if lacking:
        times = ", ".join(f"{report['enough'][n - 1]:.1f} times as much for n = {n}"
                          for n in lacking)
        print(f"* too little speech: a low floor needs about {times}; until then, compare with "
              "floor and nulls only")
    print(*report["notes"], sep="\n", end="\n" if report["notes"] else "")


def sides_table(report):
    """Phones of each side, and the recogniser's errors."""
    for side, phones in report["phones"].items():
        rate = report["phones_per_second"][side]
        a_second = "" if math.isnan(rate) else f"{rate:.2f} a second, "
        print(f"{side:<12}{phones:>8} phones, {a_second}{report['empty'][side]:.1%} of clips empty")
    if "error_rate" in report:
        print(f"recogniser: toy; {report['error_rate']:.1%} of phones wrong on held-out speech, "
              f"{report['error_rate_reconstructed']:.1%} after the autoencoder")
    else:
        errors = ERRORS.get(report["recognizer"], "its error rate is not known")
        print(f"recogniser: {report['recognizer']}; {errors}")


def truth_table(rows):
    """What is kept of the context, with ceiling and floor."""
    print(f"\n{'':<15}{'value':>7}{'ceiling':>9}{'floor':>7}{'normalized':>12}")
    for name, row in rows.items():
        print(f"{name:<15}{number(row['value'], '.3f'):>7}{number(row['ceiling'], '.3f'):>9}"
              f"{number(row['floor'], '.3f'):>7}{number(row['normalized'], '.3f'):>12}"
              f"   {MEANING[name]}")
    print("ceiling: true continuations; floor: the truth of other contexts. Of words and runs: a "
          "phone\nbigram babbler; of pair_bits: words in free order")


def nulls_table(report):
    """Words of generated speech among those of the nulls, and the equivalent order."""
    if "toy" in report:
        print(f"\n{'':<22}" + "".join(f"{name:>14}" for name in WORDS))
        measured = {side: {name: report["toy"][name][key] for name in WORDS}
                    for side, key in (("generated", "value"), ("true speech", "ceiling"))}
        for name, row in (measured | report["nulls"]).items():
            values = "".join(f"{number(row[measure], '.3f'):>14}" for measure in WORDS)
            print(f"{name:<22}{values}")
    if "equivalent_order" in report:
        order = report["equivalent_order"]
        by = "words" if "toy" in report else "3-grams"
        true = f", true speech one of {order['true']:.1f}" if "true" in order else ""
        print(f"equivalent Markov order: by its {by}, generated speech knows as much as a babbler "
              f"of {order['generated']:.1f} phones{true}\n({order['most']}: that or more)")


def page(report):
    """Print a report."""
    divergence_table(report)
    sides_table(report)
    if "toy" in report:
        truth_table(report["toy"])
    nulls_table(report)
    if "memory" in report:
        found = report["memory"]
        print(f"\nnearest second of training speech: {found['generated']:.3f} from generated, "
              f"{found['real']:.3f} from real speech; generated is the nearer "
              f"{found['nearer']:.0%} of the time")
        if "nearer_than_heldout" in found:
            print(f"of generated clips, {found['nearer_than_heldout']:.0%} are nearer to training "
                  "speech than to as much held-out speech; of true continuations, "
                  f"{found['true_nearer_than_heldout']:.0%}")
        if found["flagged"]:
            print("FLAGGED: it may repeat what it learned from")
    for name, values in report.get("decided", {}).items():
        line(name, values, "g" if name == "log_snr" else ".3f")
    if "seconds" in report:
        print(f"judged in {report['seconds']:.0f} s, after {report['seconds_generating']:.0f} s of "
              "generating")


def as_json(report):
    """A report as the text of a file. JSON has no NaN: null stands for it."""
    plain = json.loads(json.dumps(report, default=str), parse_constant=lambda _: None)
    return json.dumps(plain, indent=2) + "\n"


def keep(report, path):
    """Write a report, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(as_json(report))
