"""pairs: which of two utterances does a model find likelier?

Samples show a part of what a model knows. Here it is asked: noise is added to both utterances of a
pair, the same noise to both, and the model chooses the one whose clean frames it predicts with the
smaller error (sWUGGY, sBLIMP, StoryCloze and SALMon ask by likelihood). What both begin with is the
context of both. Chance is 0.5.

    python -m lab.pairs out/tiny                     a run of toy speech; kinds are explained below
    python -m lab.pairs out/stories                  a run of stories: see lab/pair_stories.py;
                                                     --stories asks other runs the same
    python -m lab.pairs out/mine salmon_benchmark    any run, recordings: see lab/pair_files.py

Of toy speech both utterances have the same voice, style and random numbers, and last equally long:

    word        a word, or a non-word of as many phones, all of whose phone pairs the language has
    place       a rare word after the word that prefers it, or another rare word
    order       words in the order of the grammar, or shuffled
    language    after a context, speech of the same language, or of another
    speaker     after a context, speech of the same speaker, or of another
    style       after a context, speech in the same style, or in another

In `place`, `language`, `speaker` and `style`, as in all pairs of stories, pairs come in twos that
mirror each other: what is right in one is wrong in the other, so that liking some sound cannot pass
for knowledge. Nor can it hide knowledge where both pairs are judged as one, by the sum of their
errors: `matched`.

`null` is what a model scores that always predicts the mean frame, as an untrained one does. Where
it is far from 0.5, the utterances of a pair differ in their sound.

Utterances of different length: the error is a mean over frames, as slamkit's likelihood is one over
tokens; both utterances are cut into equally many windows of about equal length, as few as the
model's window allows; silence around a recording does not count.
"""
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import Diffusion, Parser, UserError, cli, keyed_noise, load_run
from lab import causal, pair_speech, pair_stories
from lab.figures import new_figure, save_figure
from lab.pair_files import find_pairs, read_pair
from lab.report import keep
from lab.topics import toy_speech
from lab.words import stories_of

# CHOICE: measured, see docs/results.md.
LEVELS = -8, -6, -4, -2, 0, 2, 4       # log-SNRs of the noise
DECISIVE = slice(1, 6)                 # of these: where language is decided, -6 to 2
DRAWS = 4
ANGLES = [math.atan(math.exp(-level / 2)) for level in LEVELS]        # of the noise

STORIES = {"words": "small", "seed": 0, "voices": 6}
ALIKE = 0.02                           # mean difference of frames that count as the same


# --------------------------------------------------------------------------------------------------
# 1. The error of a model.

def utterance_errors(model, ctx, x0, parts, noise):
    """Mean squared errors (levels,) of the x0 that a model predicts from noisy versions of x0
    (T, C) after ctx (Tc, C). x0 is cut into `parts` windows; noise is (parts, draws, Tg, C)."""
    if hasattr(model, "errors"):                              # one position after the other
        return causal.utterance_errors(model, ctx, x0, parts, noise, ANGLES)
    config, diffusion = model.config, Diffusion(model.config)
    k = config.patch_size
    size = math.ceil(len(x0) / parts / k) * k
    phi = torch.tensor(ANGLES, device=x0.device).repeat(noise.shape[1])       # (draws * levels,)
    phi_b = phi[:, None, None]

    total = torch.zeros(len(phi), device=x0.device)
    for at, draws in zip(range(0, len(x0), size), noise):
        target = x0[at:at + size]
        real = len(target)
        target = torch.cat([target, model.silence.expand(-real % k, -1)])     # whole tokens
        history = torch.cat([ctx, x0[:at]])[-config.ctx_frames:]

        # All levels and draws in one batch.
        eps = draws[:, :len(target)].repeat_interleave(len(LEVELS), dim=0)
        xt = phi_b.cos() * target + phi_b.sin() * eps
        prediction = model(xt, phi, history.expand(len(xt), -1, -1)).float()
        error = diffusion.clean(prediction, xt, phi_b) - target
        total += error[:, :real].square().mean(2).sum(1)
    return total.view(-1, len(LEVELS)).mean(0).cpu() / len(x0)


def shared_frames(a, b):
    """How many frames two utterances (T, C) begin with that are alike."""
    length = min(len(a), len(b))
    differs = (a[:length] - b[:length]).abs().mean(1) > ALIKE
    return int(differs.float().argmax()) if differs.any() else length


@torch.no_grad()
def pair_errors(model, sides, shared, draws, item):
    """Errors (2, levels) of both utterances (T, C) of pair number `item` from frame `shared` on,
    and the errors (2,) of predicting the mean frame. The noise depends on pair and draw alone. More
    than two are compared in the same way."""
    config = model.config
    n, m = config.ctx_frames, config.gen_frames
    start = sides[0][:shared][-n:]
    silence = model.silence.float().expand(n - len(start), -1)
    ctx = torch.cat([silence, start])
    ends = [side[shared:] for side in sides]

    parts = math.ceil(max(map(len, ends)) / m)
    shape, device = (m, config.channels), ctx.device
    noise = []
    for part in range(parts):
        for draw in range(draws):
            noise.append(keyed_noise(draw, f"pairs {part}", item, shape, device))
    noise = torch.stack(noise).unflatten(0, (parts, draws))   # (parts, draws, Tg, C)

    errors = [utterance_errors(model, ctx, end, parts, noise) for end in ends]
    null = [end.square().mean().cpu() for end in ends]
    return torch.stack(errors), torch.stack(null)


def ask(model, autoencoder, pairs, draws):
    """`pair_errors` of Pairs: (P, 2, levels) and (P, 2)."""
    device, least = autoencoder.mel_stats.device, model.config.patch_size
    errors, nulls = [], []
    for item, pair in enumerate(tqdm(pairs, desc="denoising", unit="pair", leave=False)):
        sides = []
        for wave in (pair.true, pair.false):
            frames = autoencoder.encode(wave[None].to(device))
            sides.append(frames[0])
        shared = pair.shared
        if shared is None:
            most = min(map(len, sides)) - least               # something must be left of both
            shared = max(0, min(shared_frames(*sides), most))
        error, null = pair_errors(model, sides, shared, draws, item)
        errors.append(error)
        nulls.append(null)
    return torch.stack(errors), torch.stack(nulls)


# --------------------------------------------------------------------------------------------------
# 2. Which it chooses.

def interval(share, count):
    """95 % interval of a share of `count` independent cases (Wilson 1927)."""
    z = 1.96
    extra = z ** 2 / count
    middle = (share + extra / 2) / (1 + extra)
    variance = share * (1 - share) / count + extra / (4 * count)
    half = z * math.sqrt(variance) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def score(errors):
    """Errors (..., levels) -> what a model chooses the smallest of (...): the logarithm, mean over
    DECISIVE levels, so that a ratio counts as much at each of them."""
    return errors.log()[..., DECISIVE].mean(-1)


def share_right(gain):
    """Share of choices (P, ...) that are right, along the first dimension. A tie is half right."""
    return (gain.sign() / 2 + 0.5).mean(0)


def accuracy(errors, nulls, cases, mirrored=False):
    """{accuracy, interval, pairs, null, levels} from errors (P, 2, levels) of true and false
    utterances, from those of the mean frame (P, 2), and from each pair's case.

    A model chooses by `score`. If every two pairs mirror each other, `matched` is the accuracy of
    choosing for both at once."""
    gain = errors[:, 1].log() - errors[:, 0].log()            # (P, levels)
    chosen = score(errors[:, 1]) - score(errors[:, 0])        # (P,)
    share = float(share_right(chosen))
    count = len(set(cases))
    null = share_right(nulls[:, 1] - nulls[:, 0])
    levels = dict(zip(map(str, LEVELS), share_right(gain).tolist()))
    row = {
        "accuracy": share,
        "interval": interval(share, count),
        "pairs": len(gain),
        "cases": count,
        "null": float(null),
        "levels": levels,
    }
    if mirrored:
        both = chosen.unflatten(0, (-1, 2)).sum(1)            # (P/2,)
        matched = float(share_right(both))
        row["matched"] = matched
        row["matched_interval"] = interval(matched, count)
    return row


# --------------------------------------------------------------------------------------------------
# 3. The pairs of a run, and the table.

def makers(arguments, config):
    """{kind: () -> Pairs} for a run, of a folder of recordings, of toy speech or of stories; and
    those kinds whose pairs come in twos that mirror each other."""
    count = arguments.number
    if arguments.folder:
        found = {}
        for kind, paths in find_pairs(arguments.folder).items():
            order = np.random.default_rng(0).permutation(len(paths))[:count]
            found[kind] = lambda paths=paths, order=order: [read_pair(*paths[i]) for i in order]
        return found, ()

    if config.data == "toy" and not arguments.stories:
        if config.toy_grammar == "topics":
            raise UserError(f"{arguments.run} was trained on conversations, of which there are no "
                            "pairs; see python -m lab.coherence")
        toy = toy_speech(config)
        sizes = config.ctx_frames, config.gen_frames
        made = {kind: lambda kind=kind: pair_speech.make_pairs(toy, kind, count, *sizes)
                for kind in pair_speech.KINDS if kind != "language" or len(toy.languages) > 1}
        return made, pair_speech.SWAPPED

    settings = STORIES
    if not arguments.stories:
        settings = json.loads((stories_of(arguments.run) / "stories.json").read_text())
    made = {kind: lambda kind=kind: pair_stories.make_pairs(settings, kind, count)
            for kind in pair_stories.KINDS}
    return made, pair_stories.KINDS


def text(row, name):
    """An accuracy with its interval, or a dash."""
    if name not in row:
        return f"{'-':>20}"
    low, high = row["interval" if name == "accuracy" else f"{name}_interval"]
    return f"{row[name]:>6.3f} ({low:.2f} to {high:.2f})"


def draw_curve(report, path):
    """Draw accuracy against noise level, if matplotlib is there; says where."""
    try:
        axes = new_figure(6.4, 4).subplots()
    except UserError as error:
        return f"({error})"
    for kind, row in report.items():
        axes.plot(LEVELS, row["levels"].values(), marker="o", label=kind)
    axes.axhline(0.5, color="grey", linewidth=1)
    axes.axvspan(LEVELS[DECISIVE][0], LEVELS[DECISIVE][-1], color="grey", alpha=0.1)
    axes.set(ylim=(0.3, 1.02), ylabel="accuracy by this level alone", xlabel="log-SNR")
    axes.legend(frameon=False)
    save_figure(axes.figure, path)
    return f"accuracy against noise level: {path}"


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder, such as out/tiny")
    add("folder", type=Path, nargs="?", help="a folder of pairs of recordings")
    add("--stories", action="store_true",
        help="English sentences, for a run on other English than lab/stories.py made")
    add("--kinds", nargs="+", help="kinds of pairs [all]")
    add("--number", type=int, default=200,
        help="pairs of each kind; of recordings, chosen at random [200]")
    add("--draws", type=int, default=DRAWS, help=f"noises for each pair [{DRAWS}]")
    add("--curve", action="store_true", help="draw accuracy against noise level: RUN/pairs.png")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--json", type=Path, help="where to keep the result [RUN/pairs.json]")
    arguments = parser.parse_args(argv)
    if arguments.folder and arguments.stories:
        raise UserError("give a folder of pairs or --stories, not both")
    if arguments.number < 1 or arguments.draws < 1:
        raise UserError("--number and --draws must be at least 1")
    return arguments


def main():
    arguments = parse()
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    kinds, mirrored = makers(arguments, config)
    unknown = set(arguments.kinds or []) - set(kinds)
    if unknown:
        raise UserError(f"--kinds {' '.join(sorted(unknown))}: there are {', '.join(kinds)}")

    width = max(9, *map(len, kinds)) + 1
    print("share of pairs whose true utterance has the smaller denoising error; chance: 0.5\n")
    print(f"{'':<{width}}{'pairs':>6} {'accuracy':>20} {'matched':>20} {'null':>6}",
          "  at log-SNR", *(f"{level:>5}" for level in LEVELS))
    report, started = {}, time.perf_counter()
    for kind in arguments.kinds or kinds:
        pairs = kinds[kind]()
        errors, nulls = ask(model, autoencoder, pairs, arguments.draws)
        cases = [pair.case for pair in pairs]
        row = report[kind] = accuracy(errors, nulls, cases, kind in mirrored)
        levels = [f"{value:>5.2f}" for value in row["levels"].values()]
        print(f"{kind:<{width}}{row['pairs']:>6}", text(row, "accuracy"), text(row, "matched"),
              f"{row['null']:>6.3f}", " " * 12, *levels, flush=True)
    print(f"{time.perf_counter() - started:.0f} s")

    keep(report, arguments.json or arguments.run / "pairs.json")
    if arguments.curve:
        print(draw_curve(report, arguments.run / "pairs.png"))


if __name__ == "__main__":
    cli(main)
