"""eval_pjsd: is generated speech shaped like language?

A recogniser turns speech into phones. The phoneme n-grams of generated and of real speech, n = 1 to
5, are compared by the Jensen-Shannon divergence [paper] in bits: 0 if both are distributed alike, 1
if they share nothing. A short sample diverges even from more speech of the same kind, so each value
stands beside its *floor*: as much real speech, compared in the same way. It also stands beside its
*nulls* (`lab/markov.py`): text that knows only how n phones follow each other. Of toy speech the
truth is known, and words, language, speaker and style are measured as well.

    python eval_pjsd.py out/tiny                                                a run
    python eval_pjsd.py --generated a --reference b --recognizer hama           two folders of audio
    python eval_pjsd.py out/tiny --decided               what the model knows at which noise level
"""
import math
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cdslm import (CFG, FRAME_RATE, RATE, STEPS, Parser, UserError, cli, load_run, log_mel,
                   open_corpus)
from lab import markov
from lab.best import best_of
from lab.decided import draw_decided, what_is_decided
from lab.kept import voice_rows
from lab.listener import batched, error_rate, language_kept, load_listener, toy_truth
from lab.memory import LEAST_FRAMES, memory
from lab.recognizers import read_folder, recogniser
from lab.report import keep, page
from lab.sides import CONTEXTS, REFERENCE, check, decode, generate, real_sides  # noqa: F401

NS = 1, 2, 3, 4, 5                     # n-grams
ENOUGH = 200                           # phones that any value needs
LOW_FLOOR = 0.06                       # bits: at most so high, `corrected` is right within 0.01
BLOCKS = 20                            # of the jackknife
SPLITS = 20                            # of the reference
SIDES = "generated", "reference", "true"
FIGURES = ("pjsd", "floor", "floor_sd", "excess", "normalized_excess", "corrected", "true",
           "variety")


# --------------------------------------------------------------------------------------------------
# The estimator. A clip is a list of phones, a corpus a list of clips; n-grams never cross clips.

def entropy(p):
    """Entropy in bits of a normalised histogram."""
    p = p[p > 0]
    return -(p * np.log2(p)).sum()


def jsd(p, q):
    """Jensen-Shannon divergence (Lin 1991) in bits of two histograms (K,), normalised or not; NaN
    if one is empty."""
    if not (p.sum() and q.sum()):
        return math.nan
    p, q = p / p.sum(), q / q.sum()
    divergence = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2
    return float(np.clip(divergence, 0, 1))


def tabulate(n, *corpora):
    """For each corpus a function from a choice of its clips, a mask (clips,), to the histogram (K,)
    of n-grams."""
    number, tables = {}, []
    for corpus in corpora:
        grams, owners = [], []
        for owner, clip in enumerate(corpus):
            for start in range(len(clip) - n + 1):
                gram = tuple(clip[start:start + n])
                grams.append(number.setdefault(gram, len(number)))
                owners.append(owner)
        tables.append((np.array(grams, int), np.array(owners, int)))

    def histogram(grams, owners):
        return lambda keep: np.bincount(grams[keep[owners]], minlength=len(number))
    return [histogram(*table) for table in tables]


def draw(rng, lengths, phones):
    """A random choice of clips, a mask (clips,), with about `phones` phones in all, at least one
    clip unless that is 0. Without replacement: clips taken twice look like a poorer language, and
    add the bias of small samples once more."""
    order = rng.permutation(len(lengths))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    count = max(np.searchsorted(middles, phones), int(phones > 0))
    return np.isin(np.arange(len(lengths)), order[:count])


def jackknife(p, q, count):
    """Bias and variance (2,) that `count` clips, tabulated as p, bring to their divergence from the
    histogram q (K,), from what changes when one block of neighbouring clips after the other is left
    out (Quenouille 1956, Tukey 1958)."""
    clips = np.arange(count)
    parts = np.array_split(clips, min(BLOCKS, count))
    values = np.array([jsd(p(~np.isin(clips, part)), q) for part in parts])
    bias = values.mean() - jsd(p(np.ones(count, bool)), q)
    return (len(parts) - 1) * np.array([bias, values.var()])


def reach(variance, blocks):
    """Half of a 95 % interval: 1.96 standard deviations, widened for few blocks (Student's t,
    Abramowitz & Stegun 26.7.5)."""
    freedom = max(1, blocks - 1)
    return 1.96 * (1 + 1.21 / freedom + 1.44 / freedom ** 2) * math.sqrt(variance)


def compare_ngrams(n, corpora, lengths, phones, aside, splits):
    """The row of `compare` for one n: {figure: value}, with the two ends of the interval."""
    generated, reference, true = tabulate(n, *corpora)
    rng, values, distinct = np.random.default_rng(0), [], []
    for _ in range(splits):
        held = draw(rng, lengths[1], aside)
        rest = reference(~held)
        sides = (generated(draw(rng, lengths[0], phones)), reference(held),
                 true(draw(rng, lengths[2], phones)))
        values.append([jsd(side, rest) for side in sides])
        distinct.append([np.count_nonzero(side) for side in sides[:2]])
    value, floor, ceiling = np.mean(values, axis=0)

    counts = len(corpora[0]), len(corpora[1])
    all_generated, all_reference = generated(lengths[0] >= 0), reference(lengths[1] >= 0)
    bias, variance = (jackknife(generated, all_reference, counts[0])
                      + jackknife(reference, all_generated, counts[1]))
    half = reach(variance, min(BLOCKS, *counts))
    said, real = np.mean(distinct, axis=0)
    return {
        "pjsd": value, "floor": floor, "floor_sd": np.std(values, 0)[1], "true": ceiling,
        "excess": value - floor,
        "normalized_excess": (value - floor) / (1 - floor) if floor < 0.999 else math.nan,
        "corrected": jsd(all_generated, all_reference) - bias,
        "variety": said / real if real else math.nan,
        "interval": tuple(np.clip([value - half, value + half], 0, 1).tolist())}


def compare(generated, reference, true=(), splits=SPLITS):
    """Compare two corpora: {name: list over n}, NaN where nothing can be said and `notes` on why.

    Each of `splits` random splits sets a part B of the reference aside with as many phones as were
    generated (at most half of them all; then the generated speech is thinned to match). Both are
    compared with the rest, A, and so carry the same bias: J(generated, A) is the value, J(B, A) the
    floor, means over splits; `true` continuations are treated like the generated. The 95 % interval
    is for what so much speech gives on average, both corpora jackknifed; `corrected` is without
    most of the bias, by the same jackknife (it tests better than Miller & Madow's correction).
    `variety` is how many distinct n-grams were generated, relative to as much real speech.
    `enough` is how many times as much speech each n needs for its floor to be low."""
    corpora = generated, reference, true
    lengths = [np.array([len(clip) for clip in corpus], int) for corpus in corpora]
    total = [int(x.sum()) for x in lengths]
    clips = [int((x > 0).sum()) for x in lengths]

    notes = []
    if clips[0] == 1:
        notes.append("no interval: the generated speech is a single clip")
    if clips[1] == 1:
        notes.append("no interval and no floor: the reference speech is a single clip")
    few = min(total[:2]) < ENOUGH
    if few:
        notes = [f"no value: {total[0]} phones generated, {total[1]} in the reference; "
                 f"fewer than {ENOUGH} say nothing"]

    # A reference of one clip cannot be split.
    phones = aside = min(total[0], total[1] // 2)
    if clips[1] <= 1:
        phones, aside = math.inf, 0
    nothing = dict.fromkeys(FIGURES, math.nan) | {"interval": (math.nan, math.nan)}
    rows = [nothing if few else compare_ngrams(n, corpora, lengths, phones, aside, splits)
            for n in NS]
    report = {name: [float(row[name]) for row in rows] for name in FIGURES}
    # Floors fall as the inverse of the amount of speech.
    enough = [floor / LOW_FLOOR for floor in report["floor"]]
    return {"n": list(NS), "interval": [row["interval"] for row in rows], **report,
            "enough": enough, "notes": notes}


# --------------------------------------------------------------------------------------------------
# The report.

def judge(name, clips, seconds):
    """The report on clips of phones, in the order of SIDES, and the seconds that each side took."""
    sides = dict(zip(SIDES, clips))
    phones = {side: sum(map(len, corpus)) for side, corpus in sides.items()}
    rates = {side: phones[side] / time for side, time in zip(sides, seconds)}
    empty = {side: sum(not clip for clip in corpus) / len(corpus)
             for side, corpus in sides.items()}
    return {"recognizer": name, **compare(*clips), "phones": phones, "phones_per_second": rates,
            "empty": empty}


def divergences(text, reference):
    """pJSD of a null's text, as generated speech has it."""
    return compare(text, reference, splits=4)["pjsd"]


def transcript_nulls(generated, reference):
    """{name: {pjsd}} of babblers counted in one half of the reference, compared with the other, and
    the equivalent order of the generated speech by its 3-grams there. {} if speech is short."""
    texts = markov.transcript_texts(reference[::2], [len(clip) for clip in generated])
    other = reference[1::2]
    rows = {name: {"pjsd": divergences(text, other)} for name, text in texts.items()}
    value = divergences(generated, other)
    if not rows or math.isnan(value[2]):
        return {}
    ladder = [row["pjsd"][2] for row in rows.values()]
    order = markov.equivalent_order(value[2], ladder)
    return {"nulls": rows, "equivalent_order": {"generated": order, "most": len(ladder)}}


def toy_nulls(toy, spoken, clips, rows):
    """The nulls of toy speech, {name: {pjsd, word_rate, ...}}: text in clips as long as those that
    were generated, and the equivalent order of generated and of true speech by their words."""
    generated, reference, _ = clips
    languages = [u.language for u in spoken]
    texts = markov.null_texts(toy, languages, [len(clip) for clip in generated])
    nulls = {name: markov.score(toy, text, languages) |
             {"language_kept": language_kept(toy, text, languages),
              "pjsd": divergences(text, reference)} for name, text in texts.items()}
    ladder = [nulls[name]["word_rate"] for name in markov.BABBLERS]
    words = rows["word_rate"]
    return {"nulls": nulls, "equivalent_order": {
        "generated": markov.equivalent_order(words["value"], ladder),
        "true": markov.equivalent_order(words["ceiling"], ladder), "most": len(ladder)}}


def by_language(clips, spoken):
    """{language of the context: {pjsd, floor, true}}: the three sides of each language alone, by
    the truth of each side's clips. Speech of the wrong language shows here, but not in the whole.
    """
    rows = {}
    for number in sorted({u.language for u in spoken[0]}):
        sides = [[clip for clip, u in zip(side, truth) if u.language == number]
                 for side, truth in zip(clips, spoken)]
        row = compare(*sides, splits=4)
        rows[str(number)] = {name: row[name] for name in ("pjsd", "floor", "true")}
    return rows


def judge_run(arguments, generate=generate):
    """The report on a run: it continues held-out contexts, and what it generates is compared with
    other speech beside the true continuations."""
    sample = best_of(arguments.best_of)
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    if arguments.decided and hasattr(model, "errors"):
        raise UserError("--decided is for runs of cdslm.py, where all frames have one noise level")
    is_toy, m = config.data == "toy", config.gen_frames
    if is_toy and config.toy_grammar == "topics":
        raise UserError(f"{arguments.run} was trained on conversations; judge it with "
                        "python -m lab.coherence")
    name = arguments.recognizer or ("toy" if is_toy else "hama")
    allowed = name == "toy" if is_toy else name != "text" and not arguments.decided
    if not allowed:
        raise UserError("a toy run is judged by the toy recogniser, any other by any but text and "
                        "without --decided")

    # What turns sound into phones.
    if is_toy:
        listener = load_listener()
        recognise = lambda x: listener.hear(batched(log_mel, x))
    else:
        phones = recogniser(name)
        recognise = lambda x: {"clips": [
            phones(wave, RATE) for wave in tqdm(x, desc="recognising", unit="clip", leave=False)]}

    # Three sides: generated, reference, true.
    corpus = open_corpus(config)
    count = max(1, round(arguments.minutes * 60 * FRAME_RATE / m))
    sides = real_sides(config, corpus, autoencoder, count)
    generate(sides, model, autoencoder, arguments.steps, arguments.cfg, sample)
    started = time.perf_counter()
    waves = sides.generated, sides.reference, sides.true
    generated, _, true = found = [recognise(wave) for wave in waves]
    clips = [side["clips"] for side in found]
    report = judge(name, clips, [wave.numel() / RATE for wave in waves])

    mels = [batched(log_mel, x) for x in (sides.generated, sides.true, sides.heldout)]
    if m >= LEAST_FRAMES:
        report["memory"] = memory(corpus, *mels)
    if is_toy:
        toy, spoken = sides.toy, sides.spoken
        rebuilt = recognise(decode(autoencoder, sides.frames[:64, config.ctx_frames:]))["clips"]
        report["error_rate"] = error_rate(clips[2], spoken)
        report["error_rate_reconstructed"] = error_rate(rebuilt, spoken)
        report["toy"] = toy_truth(toy, spoken, generated, true)
        report["toy"] |= voice_rows(listener, spoken, (generated, mels[0]), (true, mels[1]))
        report["by_language"] = by_language(clips, (spoken, sides.referents, spoken))
        report |= toy_nulls(toy, spoken, clips, report["toy"])
    else:
        report |= transcript_nulls(*clips[:2])
    if arguments.decided:
        report["decided"] = what_is_decided(
            model, autoencoder, listener, toy, sides.frames, spoken)
    return report | {"minutes": arguments.minutes, "seconds": time.perf_counter() - started,
                     "seconds_generating": sides.seconds}


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder, such as out/tiny")
    add("--generated", help="instead of a run: a folder of speech, a file an utterance")
    add("--reference", help="with --generated: a folder of real speech")
    add("--recognizer", help="toy, hama (English), hf:MODEL, text (.txt files) "
                             "[hama; toy runs: toy]")
    add("--minutes", type=float, default=20.0,
        help="minutes of speech that a run generates [20]")
    add("--cfg", type=float, default=CFG, help=f"guidance scale [{CFG:g}]")
    add("--steps", type=int, default=STEPS,
        help=f"evaluations of the network per window [{STEPS}]")
    add("--best-of", type=int, default=1, help="of so many, judge the likeliest (lab/best.py) [1]")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--decided", action="store_true",
        help="toy: what is decided at which noise level? Draws RUN/decided.png")
    add("--json", type=Path, help="where to keep the report [a run: RUN/judged.json]")
    arguments = parser.parse_args(argv)
    by_run, by_folder = bool(arguments.run), bool(arguments.generated)
    if by_run == by_folder or by_folder != bool(arguments.reference):
        raise UserError("give a run folder, or --generated and --reference with a folder each")
    check(arguments)
    return arguments


def main(**parts):
    arguments = parse()
    if arguments.run:
        report = judge_run(arguments, **parts)
    else:
        name = arguments.recognizer or "hama"
        phones = recogniser(name)
        folders = arguments.generated, arguments.reference
        clips, seconds = zip(*[read_folder(folder, phones) for folder in folders])
        report = judge(name, clips, seconds) | transcript_nulls(*clips)
    page(report)
    if "decided" in report:
        print(draw_decided(report["decided"], Path(arguments.run) / "decided.png"))

    path = arguments.json
    if path is None and arguments.run:
        path = Path(arguments.run) / "judged.json"
    if path:
        keep(report, path)


if __name__ == "__main__":
    cli(main)
