"""eval_pjsd: is what it says shaped like language?

Speech is turned into phones, and the phoneme n-grams of generated and of real speech, n = 1 ... 5, are compared by the
Jensen-Shannon divergence [paper] in bits: 0 if both are distributed alike, 1 if they share nothing. Little speech looks
unlike anything, even more of its kind, so each value stands beside its *floor*: as much real speech, judged alike. Of
toy speech, heard by `lab/listener.py`, the truth is known: there, what the paper could only play is measured as well.

    python eval_pjsd.py out/tiny                                                  a run: it speaks, we judge
    python eval_pjsd.py --generated mine --reference real --recognizer hama       any two folders of audio
    python eval_pjsd.py out/tiny --decided                                        what is decided at which noise level
"""
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import CFG, STEPS, Parser, cli, guided, load_run, sample
from cdslm import (AUDIO_FILES, FRAME_RATE, HOP, RATE, UserError, load_audio, log_mel, open_corpus, reason, replacing,
                    resample)
from lab.listener import batched, decided, draw_decided, error_rate, load_listener, speak, toy_truth
from lab.toyspeech import ToySpeech

NS, ENOUGH, BLOCKS = (1, 2, 3, 4, 5), 200, 20  # n-grams; phones that a value needs; blocks of the jackknife
SIDES = "generated", "reference", "true"
CONTEXTS, REFERENCE = 1_000_000, 2_000_000     # toy utterances from these numbers on: training stops far below
ROWS = {"pjsd": "pJSD, bits", "from": "  95 % interval from", "to": "  to", "floor": "floor", "floor_sd": "  deviation",
        "excess": "excess over the floor", "normalized_excess": "  normalized", "corrected": "corrected for bias",
        "true": "true continuations"}
MEANING = {"word_rate": "words: phones inside whole words of the right language",
           "language_kept": "multilingual: goes on in the language of the context",
           "speaker_kept": "multi-speaker: goes on in the same voice, by pitch and vocal tract",
           "style_kept": "prosodic, emotive: goes on in the same style, by pitch range and tempo"}


# ----------------------------------------------------------------------------------------------------------------------
# The estimator. A clip is a list of phones, a corpus a list of clips; n-grams never cross clips.

def jsd(p, q):
    """Jensen-Shannon divergence (Lin 1991) in bits of two histograms (K,), normalised or not; NaN if one is empty."""
    if not (p.sum() and q.sum()):
        return math.nan
    p, q = p / p.sum(), q / q.sum()
    bits = [-(x[x > 0] * np.log2(x[x > 0])).sum() for x in ((p + q) / 2, p, q)]
    return float(np.clip(bits[0] - (bits[1] + bits[2]) / 2, 0, 1))


def tabulate(n, *corpora):
    """For each corpus a function from a choice of its clips, a mask (clips,), to the histogram (K,) of n-grams."""
    number, tables = {}, []
    for corpus in corpora:
        pairs = [(number.setdefault(tuple(clip[i:i + n]), len(number)), owner)
                 for owner, clip in enumerate(corpus) for i in range(len(clip) - n + 1)]
        tables.append(np.array(pairs, int).reshape(-1, 2).T)
    return [lambda keep, gram=gram, owner=owner: np.bincount(gram[keep[owner]], minlength=len(number))
            for gram, owner in tables]


def draw(rng, lengths, phones):
    """A random choice of clips, a mask (clips,), with about `phones` phones in all, at least one clip unless that is 0.
    Without replacement: clips seen twice look like a poorer language, and add the bias of small samples once more."""
    order = rng.permutation(len(lengths))
    middles = np.cumsum(lengths[order]) - lengths[order] / 2
    return np.isin(np.arange(len(lengths)), order[:max(np.searchsorted(middles, phones), phones > 0)])


def jackknife(p, q, count):
    """Bias and variance (2,) that `count` clips, tabulated as p, bring to their divergence from the histogram q (K,),
    from what changes when one block of neighbouring clips after the other is left out (Quenouille 1956, Tukey 1958)."""
    parts = np.array_split(np.arange(count), min(BLOCKS, count))
    values = np.array([jsd(p(~np.isin(np.arange(count), part)), q) for part in parts])
    return (len(parts) - 1) * np.array([values.mean() - jsd(p(np.ones(count, bool)), q), values.var()])


def compare(generated, reference, true=(), splits=20):
    """Judge one corpus by another: {name: list over n}, NaN where nothing can be said and `notes` on why.

    Each of `splits` random splits sets a part B of the reference aside with as many phones as were generated (at most
    half of them all; then the generated speech is thinned to match). Both are judged by the rest, A, and so carry the
    same bias: J(generated, A) is the value, J(B, A) the floor, means over splits; `true` continuations are judged like
    the generated. The 95 % interval is for what so much speech gives on average, both corpora jackknifed; `corrected`
    is without most of the bias, by the same jackknife (it tests better than Miller & Madow's correction)."""
    corpora = generated, reference, true
    lengths = [np.array([len(clip) for clip in corpus], int) for corpus in corpora]
    total, clips = [int(x.sum()) for x in lengths], [int((x > 0).sum()) for x in lengths]
    notes = [f"no interval{' and no floor' * i}: the {side} speech is a single clip"
             for i, side in enumerate(SIDES[:2]) if clips[i] == 1]
    if few := min(total[:2]) < ENOUGH:
        notes = [f"no value: {total[0]} phones generated, {total[1]} in the reference; fewer than {ENOUGH} say nothing"]
    phones, aside = (min(total[0], total[1] // 2),) * 2 if clips[1] > 1 else (math.inf, 0)
    table = np.full((len(NS), len(ROWS)), math.nan)
    for n, row in zip(() if few else NS, table):
        (p, q, r), rng, values = tabulate(n, *corpora), np.random.default_rng(0), []
        for _ in range(splits):
            held = draw(rng, lengths[1], aside)
            mine, theirs = p(draw(rng, lengths[0], phones)), r(draw(rng, lengths[2], phones))
            values.append([jsd(x, q(~held)) for x in (mine, q(held), theirs)])
        (value, floor, ceiling), deviation = np.mean(values, 0), np.std(values, 0)[1]
        all_p, all_q = p(lengths[0] >= 0), q(lengths[1] >= 0)
        bias, variance = jackknife(p, all_q, len(generated)) + jackknife(q, all_p, len(reference))
        freedom = max(1, min(BLOCKS, len(generated), len(reference)) - 1)
        reach = 1.96 * (1 + 1.21 / freedom + 1.44 / freedom ** 2) * math.sqrt(variance)  # Student's t, A&S 26.7.5
        share = (value - floor) / (1 - floor) if floor < 0.999 else math.nan
        row[:] = (value, *np.clip([value - reach, value + reach], 0, 1), floor, deviation, value - floor, share,
                  jsd(all_p, all_q) - bias, ceiling)
    figures = dict(zip(ROWS, table.T.tolist()))
    return {"n": list(NS), "interval": list(zip(figures.pop("from"), figures.pop("to"))), **figures, "notes": notes}


# ----------------------------------------------------------------------------------------------------------------------
# Recognisers: phones(wave (N,), rate) -> list of phones.

def quiet_cuts(wave, rate):
    """Samples (N,) -> pieces of at most 12 s, each cut at the quietest 50 ms after its sixth second."""
    step = rate // 20
    while len(wave) > 12 * rate:
        loudness = wave[6 * rate:12 * rate].unfold(0, step, step).square().mean(1)
        cut = 6 * rate + int(loudness.argmin()) * step + step // 2
        yield wave[:cut]
        wave = wave[cut:]
    yield wave


def huggingface(name):
    """A CTC phoneme model from the Hugging Face hub or from a folder -> its rate, and what turns a piece (N,) at that
    rate into phones: the likeliest token of each frame, without repeats, blanks and word boundaries."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC
    from transformers.utils import cached_file
    model, features = AutoModelForCTC.from_pretrained(name).eval(), AutoFeatureExtractor.from_pretrained(name)
    vocabulary = json.loads(Path(cached_file(name, "vocab.json")).read_text(encoding="utf-8"))
    symbols = {i: s for s, i in vocabulary.items() if i != model.config.pad_token_id and s[:1] not in "|<["}

    @torch.no_grad()
    def hear(piece):
        inputs = features(piece.numpy(), sampling_rate=features.sampling_rate, return_tensors="pt")
        tokens = model(**inputs).logits[0].argmax(1).unique_consecutive().tolist()
        return [symbols[i] for i in tokens if i in symbols]
    return features.sampling_rate, hear


def recogniser(name):
    """phones(wave, rate) by its name on the command line; none for text."""
    if name == "text":
        return None
    if name == "toy":
        listener = load_listener()
        return lambda wave, rate: listener.hear(log_mel(resample(wave, rate)[None]))["clips"][0]
    if name != "hama" and not name.startswith("hf:"):
        raise UserError(f"unknown --recognizer {name}; choose toy, hama, hf:MODEL or text")
    try:
        if name == "hama":                                                    # English; the model is in the package
            from hama import ASRModel
            own, model = 16_000, ASRModel()
            hear = lambda piece: model(piece.numpy(), own).phonemes
        else:
            own, hear = huggingface(name[3:])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        package = "hama, which has no library for Windows" if name == "hama" else "transformers"
        raise UserError(f"--recognizer {name} can't run ({reason(error)}); it needs: pip install {package}") from None
    return lambda wave, rate: [phone for piece in quiet_cuts(resample(wave, rate, own), own)
                               if len(piece) >= own // 20 for phone in hear(piece)]


def read_folder(folder, phones):
    """Every file of a folder, an utterance each -> clips of phones, seconds of speech. Without `phones`: text, NaN."""
    folder, clips, seconds = Path(folder), [], 0.0 if phones else math.nan
    kind, suffixes = ("audio", AUDIO_FILES) if phones else ("text", {".txt"})
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        raise UserError(f"{folder}: {f'no {kind} files in it' if folder.is_dir() else 'no such folder'}")
    for path in tqdm(files, desc=f"listening to {folder}", unit="file", leave=False):
        try:
            wave = load_audio(path) if phones else ()
            clips.append(phones(wave, RATE) if phones else path.read_text(encoding="utf-8").split())
            seconds += len(wave) / RATE
        except (UserError, OSError, UnicodeDecodeError) as error:
            tqdm.write(f"skipped {path}: {reason(error).removeprefix(f'{path}: ')}", file=sys.stderr)
    if not clips:
        raise UserError(f"{folder}: none of its {len(files)} files can be read")
    return clips, seconds


# ----------------------------------------------------------------------------------------------------------------------
# The report: the figures, whether anything was learned by heart, the page.

def glimpses(mel):
    """Log-mel (B, T, 80) -> (B, W, 320): each second of it in 20 steps and 16 bands, level and contrast removed."""
    mel = mel[:, :mel.shape[1] // 4 * 4].unflatten(1, (-1, 4)).unflatten(3, (16, 5)).mean((2, 4))
    seconds = mel.unfold(1, 20, 1).flatten(2)
    return torch.nn.functional.normalize(seconds - seconds.mean(2, keepdim=True), dim=2)


def memory(corpus, generated, true, hours=10):
    """Distance of a second amid each generated and each true continuation (B, T, 80) to the nearest of `hours` of
    training speech: medians, how often generated speech is the nearer (0.5 if it is like real speech), and whether that
    is more often than chance allows (three standard deviations of Mann & Whitney's U)."""
    middle, both = max(0, generated.shape[1] // 2 - 42), torch.cat([generated, true])
    seconds = torch.cat([glimpses(both[:, middle + phase:middle + phase + 80]) for phase in range(4)], dim=1)
    runs = np.random.default_rng(0).permutation([run for run in corpus.runs["train"] if run[2] >= 80])
    runs = runs[np.cumsum(runs[:, 2]) - runs[:, 2] < hours * 3600 * FRAME_RATE]
    best = torch.full(seconds.shape[:2], -1.0)
    for shard, start, length in tqdm(runs.tolist(), desc="looking for copies", unit="run", leave=False):
        mel = torch.from_numpy(corpus.shards[shard]["mel"][start:start + length].astype(np.float32))
        best = torch.maximum(best, (seconds @ glimpses(mel[None])[0].T).amax(2))
    mine, theirs = (2 - 2 * best.amax(1)).clamp(min=0).sqrt().split((len(generated), len(true)))
    nearer = float((mine[:, None] < theirs).float().mean())
    chance = math.sqrt((len(mine) + len(theirs) + 1) / (12 * len(mine) * len(theirs)))
    return {"generated": float(mine.median()), "real": float(theirs.median()), "nearer": nearer,
            "flagged": nearer > 0.5 + 3 * chance}


def judge(name, clips, seconds):
    """The report on clips of phones, in the order of SIDES, and the seconds that each side took."""
    phones = [sum(map(len, side)) for side in clips]
    return {"recognizer": name, **compare(*clips), "phones": dict(zip(SIDES, phones)),
            "phones_per_second": {side: count / time for side, count, time in zip(SIDES, phones, seconds)},
            "empty": {side: sum(not clip for clip in c) / len(c) for side, c in zip(SIDES, clips)}}


def windows(corpus, split, frames, count):
    """At most `count` windows from all over a corpus, of which no two overlap: (B, N)."""
    places = [(shard, start + at) for shard, start, length in corpus.runs[split]
              for at in range(0, length - frames + 1, frames)]
    cut = [corpus.shards[shard]["audio"][at * HOP:(at + frames) * HOP]
           for shard, at in np.random.default_rng(0).permutation(places)[:count]]
    return torch.from_numpy(np.stack(cut).astype(np.float32) / 32767)


def judge_run(arguments):
    """The report on a run: it continues held-out contexts, and what it says is judged beside the true continuations."""
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    corpus, n, m = open_corpus(config), config.ctx_frames, config.gen_frames
    count = max(1, round(arguments.minutes * 60 * FRAME_RATE / m))
    toy = ToySpeech(config.toy_languages, config.toy_words) if config.data == "toy" else None
    name = arguments.recognizer or ("toy" if toy else "hama")
    if toy and name != "toy" or not toy and (arguments.decided or name == "text"):
        raise UserError("a toy run is judged by the toy recogniser, any other by any but text and without --decided")
    if toy:
        listener, (waves, spoken) = load_listener(), speak(toy, CONTEXTS, count, n + m, "contexts", context=n)
        hear = lambda x: listener.hear(batched(log_mel, x))
    else:
        phones, waves = recogniser(name), windows(corpus, "valid", n + m, count)
        hear = lambda x: {"clips": [phones(wave, RATE) for wave in tqdm(x, desc="listening", unit="clip", leave=False)]}
    sound = lambda x: batched(lambda part: autoencoder.decode(part).cpu(), x, "decoding")
    device, seeds = autoencoder.mel_stats.device, itertools.count()
    frames = batched(lambda part: autoencoder.encode(part.to(device)), waves)
    speech = batched(lambda part: sample(model, part, steps=arguments.steps, cfg=arguments.cfg, seed=next(seeds)),
                     frames[:, :n], "speaking", size=32)
    started = time.perf_counter()
    reference = speak(toy, REFERENCE, 3 * count, m, "reference")[0] if toy else windows(corpus, "train", m, 3 * count)
    sides = sound(speech), reference, waves[:, n * HOP:]
    generated, reference, true = heard = [hear(x) for x in sides]
    report = judge(name, [h["clips"] for h in heard], [x.numel() / RATE for x in sides])
    if m >= 83:                                                               # a second, and room to shift it
        report["memory"] = memory(corpus, *(batched(log_mel, x) for x in sides[::2]))
    if toy:
        report |= {"toy": toy_truth(toy, spoken, generated, true), "error_rate": error_rate(true["clips"], spoken),
                   "error_rate_reconstructed": error_rate(hear(sound(frames[:64, n:]))["clips"], spoken)}
    if arguments.decided:
        def predict(xt, phi):
            pairs = torch.cat([frames[:, :n], xt], dim=1)
            x0 = batched(lambda part: guided(model, part[:, :n], 1, part[:, n:], phi, None), pairs, size=32)
            return autoencoder.to_mel(x0) * autoencoder.mel_stats[1] + autoencoder.mel_stats[0]
        report["decided"] = decided(predict, listener, toy, frames[:, n:], spoken)
    return report | {"seconds": time.perf_counter() - started}


def page(report):
    """Print a report."""
    def line(name, values, form):
        print(f"{name:<22}" + "".join(f"{'-' if math.isnan(v) else format(v, form):>9}" for v in values))

    print(f"{'n':<22}" + "".join(f"{n:>8}{' *'[n > 3]}" for n in report["n"]))
    rows = report | dict(zip(("from", "to"), zip(*report["interval"])))
    for key, name in ROWS.items():
        line(name, rows[key], ".4f")
    print("* to be trusted only when there are hours of speech", *report["notes"], sep="\n")
    for side, phones in report["phones"].items():
        print(f"{side:<12}{phones:>8} phones, {report['phones_per_second'][side]:.2f} a second, "
              f"{report['empty'][side]:.1%} of clips empty".replace("nan a second, ", ""))
    if "toy" in report:
        print("recogniser: toy; {error_rate:.1%} of phones wrong on held-out speech, {error_rate_reconstructed:.1%} "
              "after the autoencoder".format(**report))
        print(f"\n{'':<15}{'value':>7}{'ceiling':>9}{'floor':>7}{'normalized':>12}")
    else:
        errors = {"text": "phones as written", "hama": "it mishears 14 % of read English, 41 % of lone digits"}
        print(f"recogniser: {report['recognizer']};", errors.get(report["recognizer"], "its error rate is not known"))
    for name, row in report.get("toy", {}).items():
        figures = "{value:7.3f}{ceiling:9.3f}{floor:7.3f}{normalized:12.3f}".format(**row)
        print(f"{name:<15}{figures}   {MEANING[name]}")
    if "memory" in report:
        print("\nnearest second of training speech: {generated:.3f} from generated, {real:.3f} from real speech; "
              "generated is the nearer {nearer:.0%} of the time".format(**report["memory"])
              + ": FLAGGED, it may repeat what it learned from" * report["memory"]["flagged"])
    for name, values in report.get("decided", {}).items():
        line(name, values, "g" if name == "log_snr" else ".3f")
    if "seconds" in report:
        print(f"judged in {report['seconds']:.0f} s, speaking excluded")


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", help="a run folder, such as out/tiny")
    parser.add_argument("--generated", help="instead of a run: a folder of speech, a file an utterance")
    parser.add_argument("--reference", help="with --generated: a folder of real speech")
    parser.add_argument("--recognizer", help="toy, hama (English), hf:MODEL, text (.txt files) [hama; toy runs: toy]")
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of speech that a run is to speak [10]")
    parser.add_argument("--cfg", type=float, default=CFG, help="its guidance [2]")
    parser.add_argument("--steps", type=int, default=STEPS, help="its evaluations of the network [24]")
    parser.add_argument("--device", default="auto", help="its device: cuda, mps, cpu [auto]")
    parser.add_argument("--decided", action="store_true", help="toy: what is decided when? Draws RUN/decided.png")
    parser.add_argument("--json", type=Path, help="where to keep the report [a run: RUN/judged.json]")
    arguments = parser.parse_args(argv)
    if bool(arguments.run) == bool(arguments.generated) or bool(arguments.generated) != bool(arguments.reference):
        raise UserError("give a run folder, or --generated and --reference with a folder each")
    if not (0 < arguments.minutes < math.inf and math.isfinite(arguments.cfg) and arguments.steps > 0):
        raise UserError("--minutes and --steps must be more than 0, --cfg a number")
    return arguments


def main():
    arguments = parse()
    if arguments.run:
        report = judge_run(arguments)
    else:
        phones = recogniser(name := arguments.recognizer or "hama")
        report = judge(name, *zip(*[read_folder(path, phones) for path in (arguments.generated, arguments.reference)]))
    page(report)
    if "decided" in report:
        print(draw_decided(report["decided"], Path(arguments.run) / "decided.png"))
    if path := arguments.json or arguments.run and Path(arguments.run) / "judged.json":
        with replacing(path) as temporary:
            clean = json.loads(json.dumps(report), parse_constant=lambda _: None)  # JSON has no word for NaN
            temporary.write_text(json.dumps(clean, indent=2) + "\n")


if __name__ == "__main__":
    cli(main)
