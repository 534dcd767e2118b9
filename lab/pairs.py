"""pairs: which of two utterances does a model find likelier?

Samples show a part of what a model knows. Here it is asked: noise is added to both utterances of a
pair, the same noise to both, and the model chooses the one whose clean frames it predicts with the
smaller error (sWUGGY, sBLIMP and SALMon ask language models so, by likelihood). Both are
synthesised with the same voice, style and random numbers, and last equally long. Chance is 0.5.

    word        a word, or a non-word of as many phones, all of whose phone pairs the language has
    place       a rare word after the word that prefers it, or another rare word
    order       words in the order of the grammar, or shuffled
    language    after a context, speech of the same language, or of another
    speaker     after a context, speech of the same speaker, or of another
    style       after a context, speech in the same style, or in another

In `place`, `language`, `speaker` and `style` pairs come in twos that have the same two candidates,
and what is right in one is wrong in the other: liking some sound cannot pass for knowledge. Nor can
it hide knowledge where both pairs are judged as one, by the sum of their errors: `matched`.

    python -m lab.pairs out/tiny
    python -m lab.pairs out/tiny --kinds word order --number 400
"""
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cdslm import Parser, UserError, cli, guided, keyed_noise, load_run, replacing
from lab.listener import batched
from lab.pair_speech import KINDS, SWAPPED, make_pairs
from lab.toyspeech import ToySpeech

LEVELS = -8, -6, -4, -2, 0, 2, 4       # log-SNRs of the noise
DECISIVE = slice(1, 6)                 # of these: where language is decided, -6 to 2


@torch.no_grad()
def denoising_errors(model, frames, draws=4, size=32):
    """Mean squared errors (P, levels) of the x0 that a model predicts from noisy continuations, of
    frames (P, Tc + Tg, C). The noise of item i depends on i and the draw alone."""
    n = model.config.ctx_frames
    errors = torch.zeros(len(frames), len(LEVELS))
    for start in tqdm(range(0, len(frames), size), desc="denoising", unit="batch", leave=False):
        part = frames[start:start + size]
        ctx, x0 = part[:, :n], part[:, n:]
        for draw in range(draws):
            items = range(start, start + len(part))
            eps = torch.stack([
                keyed_noise(draw, "pairs", item, x0.shape[1:], x0.device) for item in items])
            for column, level in enumerate(LEVELS):
                phi = math.atan(math.exp(-level / 2))
                xt = math.cos(phi) * x0 + math.sin(phi) * eps
                estimate = guided(model, ctx, 1, xt, phi, None)
                error = (estimate - x0).square().mean((1, 2))
                errors[start:start + size, column] += error.cpu() / draws
    return errors


def interval(share, count):
    """95 % interval of a share of `count` independent cases (Wilson 1927)."""
    z = 1.96
    extra = z ** 2 / count
    middle = (share + extra / 2) / (1 + extra)
    variance = share * (1 - share) / count + extra / (4 * count)
    half = z * math.sqrt(variance) / (1 + extra)
    return max(0.0, middle - half), min(1.0, middle + half)


def share_right(gain):
    """Share of choices (P, ...) that are right, along the first dimension. A tie is half right."""
    return (gain.sign() / 2 + 0.5).mean(0)


def accuracy(true, false, swapped=False):
    """{accuracy, interval, pairs, levels} from errors (P, levels) of true and of false utterances.

    A model chooses by the logarithm of its error, mean over DECISIVE levels, so that a ratio counts
    as much at each of them. If every two pairs are swapped, they are one case for the interval, and
    `matched` is the accuracy of choosing for both at once."""
    gain = false.log() - true.log()                           # (P, levels)
    chosen = gain[:, DECISIVE].mean(1)                        # (P,)
    cases = len(gain) // 2 if swapped else len(gain)
    share = float(share_right(chosen))
    levels = dict(zip(map(str, LEVELS), share_right(gain).tolist()))
    row = {"accuracy": share, "interval": interval(share, cases), "pairs": len(gain),
           "levels": levels}
    if swapped:
        both = chosen.unflatten(0, (-1, 2)).sum(1)            # (P/2,)
        matched = float(share_right(both))
        row["matched"] = matched
        row["matched_interval"] = interval(matched, cases)
    return row


def ask(model, autoencoder, toy, kind, count, draws):
    """The accuracy of a model on about `count` pairs of a kind."""
    config, device = model.config, autoencoder.mel_stats.device
    waves = make_pairs(toy, kind, count, config.ctx_frames, config.gen_frames)
    errors = []
    for side in waves:
        frames = batched(lambda part: autoencoder.encode(part.to(device)), side)
        errors.append(denoising_errors(model, frames, draws))
    return accuracy(*errors, kind in SWAPPED)


def text(row, name):
    """An accuracy with its interval, or a dash."""
    if name not in row:
        return f"{'-':>20}"
    low, high = row["interval" if name == "accuracy" else f"{name}_interval"]
    return f"{row[name]:>6.3f} ({low:.2f} to {high:.2f})"


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder of toy speech, such as out/tiny")
    add("--kinds", nargs="+", choices=KINDS, default=KINDS, help="kinds of pairs [all]")
    add("--number", type=int, default=200, help="pairs of each kind [200]")
    add("--draws", type=int, default=4, help="noises for each pair [4]")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--json", type=Path, help="where to keep the result [RUN/pairs.json]")
    arguments = parser.parse_args(argv)
    if arguments.number < 1 or arguments.draws < 1:
        raise UserError("--number and --draws must be at least 1")
    return arguments


def main():
    arguments = parse()
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    if config.data != "toy":
        raise UserError(f"{arguments.run} was not trained on toy speech, of which pairs are made")
    toy = ToySpeech(config.toy_languages, config.toy_words)
    kinds = [kind for kind in arguments.kinds if kind != "language" or len(toy.languages) > 1]

    print("share of pairs whose true utterance has the smaller denoising error; chance: 0.5\n")
    print(f"{'':<9}{'pairs':>6} {'accuracy':>20} {'matched':>20}", "  at log-SNR",
          *(f"{level:>5}" for level in LEVELS))
    report, started = {}, time.perf_counter()
    for kind in kinds:
        row = ask(model, autoencoder, toy, kind, arguments.number, arguments.draws)
        report[kind] = row
        levels = [f"{value:>5.2f}" for value in row["levels"].values()]
        print(f"{kind:<9}{row['pairs']:>6}", text(row, "accuracy"), text(row, "matched"),
              " " * 12, *levels, flush=True)
    print(f"{time.perf_counter() - started:.0f} s")

    with replacing(arguments.json or arguments.run / "pairs.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli(main)
