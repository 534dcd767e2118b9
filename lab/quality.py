"""quality: how good does generated speech sound? Judges of quality, as the paper used, and
distances that need no judge.

    python -m lab.quality out/tiny                3 minutes of speech; keeps out/tiny/quality.json
    pip install speechmos                         adds DNSMOS
    pip install resemblyzer "setuptools<81"       adds the similarity of voices

Held-out contexts are continued. Generated speech stands beside the true continuations and the same
encoded and decoded (reconstructed):

    mel, pitch     Fréchet distance (Dowson & Landau 1982) from other real speech: of log-mel
                   frames, and of each clip's pitch, its spread, its movement, its voiced frames
    DNSMOS         mean opinion scores from 1 to 5, guessed by a network that was trained on real
                   speech in noise (Reddy et al. 2022; P.808: 2021)
    voice          cosine between the voices of context and continuation, by Resemblyzer (Wan et
                   al. 2018); `another`: of the context of another clip

None of these measures language. The paper found that such scores saturate while language goes on
improving (its sixth finding): compare runs of different size with eval_pjsd.py and with this.
"""
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import (CFG, DECODER_FFT, FRAME_RATE, RATE, STEPS, Parser, UserError, cli, load_run,
                   log_mel, open_corpus, pitch, reason, resample, stft)
from lab.listener import batched
from lab.report import keep
from lab.sides import check, decode, generate, real_sides

PERIODIC = 0.375                       # from here on the decoder makes more pulses than noise
LOUD = 0.01                            # of the loudest frame: 40 dB below it is silence
JUDGE_RATE = 16_000                    # of DNSMOS and Resemblyzer


# --------------------------------------------------------------------------------------------------
# Distances between two sets of speech.

def square_root(matrix):
    """The square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(min=0)) @ vectors.T


def frechet(a, b):
    """Squared Fréchet distance of the Gaussians that fit rows a (A, D) and b (B, D)."""
    a, b = a.astype(float), b.astype(float)
    gap = a.mean(0) - b.mean(0)
    cov_a, cov_b = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (a, b))
    root = square_root(cov_a)
    product = np.linalg.eigvalsh(root @ cov_b @ root).clip(min=0)
    trace = np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(product).sum()
    return float(gap @ gap + max(0.0, trace))


def mel_frames(mel, stats):
    """Log-mel (B, T, 80) -> normalised frames (B * T, 80); `stats` are mean and deviation."""
    return ((mel - stats[0]) / stats[1]).flatten(0, 1).numpy()


def pitch_statistics(waves):
    """Waves (B, N) -> (clips, 4): mean and standard deviation of log2 pitch over the voiced frames
    of a clip, its mean change from frame to frame, and the share of frames that are voiced. Clips
    with fewer than ten are left out."""
    rows = []
    for wave in waves:
        magnitude = stft(wave[None], DECODER_FFT).abs()                       # (1, 601, T)
        hertz, periodicity = pitch(magnitude)
        energy = magnitude[0].norm(dim=0)
        voiced = (periodicity[0] > PERIODIC) & (energy > LOUD * energy.max())
        if voiced.sum() >= 10:
            track = hertz[0].log2()
            steps = track.diff().abs()[voiced[1:] & voiced[:-1]]
            change = steps.mean() if len(steps) else torch.zeros(())
            rows.append([track[voiced].mean(), track[voiced].std(), change, voiced.float().mean()])
    return np.array(rows, float).reshape(-1, 4)


def distances(waves, reference, stats):
    """{mel, pitch}: Fréchet distances of waves (B, N) from a reference; of pitch in the
    reference's standard deviations."""
    sides = [mel_frames(batched(log_mel, side), stats) for side in (waves, reference)]
    found = {"mel": frechet(*sides)}
    rows, others = pitch_statistics(waves), pitch_statistics(reference)
    found["pitch"] = math.nan
    if min(len(rows), len(others)) > 4:
        scale = others.std(0) + 1e-6
        found["pitch"] = frechet(rows / scale, others / scale)
    return found


# --------------------------------------------------------------------------------------------------
# Judges that packages carry. Each raises UserError if its package is not there.

def dnsmos(waves):
    """{name: scores (B,)} of waves (B, N)."""
    try:
        from speechmos import dnsmos as judge
    except ImportError as error:
        raise UserError(f"no DNSMOS ({reason(error)}): pip install speechmos") from None
    names = {"ovrl_mos": "overall", "sig_mos": "signal", "bak_mos": "background",
             "p808_mos": "P.808"}
    rows = []
    for wave in tqdm(waves, desc="DNSMOS", unit="clip", leave=False):
        samples = resample(wave, RATE, JUDGE_RATE).clamp(-1, 1).numpy()
        rows.append(judge.run(samples, JUDGE_RATE))
    return {f"DNSMOS {name}": np.array([float(row[key]) for row in rows])
            for key, name in names.items()}


def voices(waves):
    """Speaker embeddings (B, 256), each of length 1, of waves (B, N)."""
    try:
        from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError as error:
        raise UserError(f"no similarity of voices ({reason(error)}): pip install resemblyzer "
                        '"setuptools<81"') from None
    encoder, rows = VoiceEncoder("cpu", verbose=False), []
    for wave in tqdm(waves, desc="voices", unit="clip", leave=False):
        samples = resample(wave, RATE, JUDGE_RATE).numpy()
        spoken = preprocess_wav(samples, JUDGE_RATE)
        if len(spoken) < JUDGE_RATE // 2:                     # little but silence
            spoken = samples
        rows.append(encoder.embed_utterance(spoken))
    return np.stack(rows)


def mean(scores):
    """A mean of scores (B,) and half of its 95 % interval."""
    half = 1.96 * np.std(scores, ddof=1) / math.sqrt(len(scores))
    return {"value": float(np.mean(scores)), "half": float(half)}


def judge(sides, reconstructed, stats):
    """{measure: {side: figure}}, and notes on what is not installed."""
    waves = {"true": sides.true, "reconstructed": reconstructed, "generated": sides.generated}
    report, notes = {"mel": {}, "pitch": {}}, []
    for side, sound in waves.items():
        for name, value in distances(sound, sides.reference, stats).items():
            report[name][side] = {"value": value}

    try:
        for side, sound in waves.items():
            for name, scores in dnsmos(sound).items():
                report.setdefault(name, {})[side] = mean(scores)
    except UserError as error:
        notes.append(str(error))
    try:
        context = voices(sides.context)
        report["voice"], report["voice, another"] = {}, {}
        for side, sound in waves.items():
            voice = voices(sound)
            report["voice"][side] = mean((voice * context).sum(1))
            other = np.roll(context, 1, axis=0)
            report["voice, another"][side] = mean((voice * other).sum(1))
    except UserError as error:
        notes.append(str(error))
    return report, notes


def show(report, notes):
    """Print the table, then what is not installed."""
    columns = list(report["mel"])
    print(f"{'':<20}" + "".join(f"{side:>16}" for side in columns))
    for name, row in report.items():
        cells = ""
        for side in columns:
            half = f" ± {row[side]['half']:.3f}" if "half" in row[side] else " " * 8
            cells += f"{row[side]['value']:.3f}{half}".rjust(16)
        print(f"{name:<20}{cells}")
    print(*notes, sep="\n", end="\n" if notes else "")


def parse(argv=None):
    """Command line -> arguments. Raises UserError for one that makes no sense."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder, such as out/tiny")
    add("--minutes", type=float, default=3.0, help="minutes of generated speech [3]")
    add("--cfg", type=float, default=CFG, help=f"guidance scale [{CFG:g}]")
    add("--steps", type=int, default=STEPS,
        help=f"evaluations of the network per window [{STEPS}]")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--json", type=Path, help="where to keep the report [RUN/quality.json]")
    arguments = parser.parse_args(argv)
    check(arguments)
    return arguments


def main():
    arguments = parse()
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    corpus = None if config.data == "toy" else open_corpus(config)
    count = max(2, round(arguments.minutes * 60 * FRAME_RATE / config.gen_frames))
    sides = real_sides(config, corpus, autoencoder, count)
    generate(sides, model, autoencoder, arguments.steps, arguments.cfg)
    reconstructed = decode(autoencoder, sides.frames[:, config.ctx_frames:])

    started = time.perf_counter()
    report, notes = judge(sides, reconstructed, autoencoder.mel_stats.cpu())
    show(report, notes)
    print(f"{len(sides.true)} clips, judged in {time.perf_counter() - started:.0f} s")
    keep(report, arguments.json or arguments.run / "quality.json")


if __name__ == "__main__":
    cli(main)
