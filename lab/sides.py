"""sides: what a run generates after held-out contexts, beside real speech. For those who judge it
(`eval_pjsd.py`, `lab/quality.py`).
"""
import itertools
import math
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from cdslm import CFG, FRAME_RATE, HOP, UserError, sample
from lab.listener import batched, speak
from lab.topics import toy_speech
from lab.toyspeech import ToySpeech

# First toy utterances; training stops far below.
CONTEXTS, REFERENCE, HELDOUT = 1_000_000, 2_000_000, 5_000_000
HELDOUT_COUNT, HELDOUT_FRAMES = 30, 20 * FRAME_RATE           # of toy speech


@dataclass
class Sides:
    """Waves (B, N) of a run and of real speech, and the truth where they are toy speech."""
    context: torch.Tensor              # held-out contexts
    true: torch.Tensor                 # what follows them in truth
    reference: torch.Tensor            # other speech, three times as much
    heldout: torch.Tensor              # speech that the run did not see
    frames: torch.Tensor               # contexts with what follows, encoded: (B, T, C)
    toy: ToySpeech | None = None
    spoken: list = field(default_factory=list)                # truth of `true`
    referents: list = field(default_factory=list)             # truth of `reference`
    generated: torch.Tensor | None = None
    seconds: float = 0.0               # that generating took


def check(arguments):
    """Raise UserError unless a run can generate with these arguments."""
    if not (0 < arguments.minutes < math.inf and math.isfinite(arguments.cfg)
            and arguments.steps > 0):
        raise UserError("--minutes and --steps must be more than 0, --cfg a number")


def windows(corpus, kind, split, frames, count):
    """At most `count` windows from all over a corpus, of which no two overlap, as `Corpus.windows`
    gives them."""
    keys, first = [], 0
    for end in corpus.ends(split, frames).tolist():
        keys += range(first, end, frames)
        first = end
    keys = np.random.default_rng(0).permutation(keys)[:count]
    return torch.from_numpy(corpus.windows(kind, split, keys, frames))


def real_sides(config, corpus, autoencoder, count):
    """Sides of `count` windows, before anything is generated. Speech of real recordings comes from
    the corpus, toy speech is made."""
    n, m = config.ctx_frames, config.gen_frames
    toy, spoken, referents = None, [], []
    if config.data == "toy":
        toy = toy_speech(config)
        waves, spoken = speak(toy, CONTEXTS, count, n + m, "contexts", context=n)
        reference, referents = speak(toy, REFERENCE, 3 * count, m, "reference")
        # As utterances of the training speech are: each speaker speaks for 20 s.
        heldout, _ = speak(toy, HELDOUT, HELDOUT_COUNT, HELDOUT_FRAMES, "held-out")
    else:
        waves = windows(corpus, "audio", "valid", n + m, count)
        reference = windows(corpus, "audio", "train", m, 3 * count)
        heldout = windows(corpus, "audio", "valid", m, 3 * count)

    device = autoencoder.mel_stats.device
    frames = batched(lambda part: autoencoder.encode(part.to(device)), waves)
    return Sides(waves[:, :n * HOP], waves[:, n * HOP:], reference, heldout, frames, toy, spoken,
                 referents)


def decode(autoencoder, frames):
    """Frames (B, T, C) -> waves (B, N)."""
    return batched(lambda part: autoencoder.decode(part).cpu(), frames, "decoding")


def log_mel_of(autoencoder, frames):
    """Frames (B, T, C) -> log-mel (B, T, 80), without the decoder."""
    mean, std = autoencoder.mel_stats
    return autoencoder.to_mel(frames) * std + mean


def continuations(model, frames, steps, cfg=CFG, sample=sample):
    """What the model generates after the contexts that frames (B, T, C) begin with: (B, Tg, C)."""
    seeds = itertools.count()

    def continue_speech(part):
        return sample(model, part, steps=steps, cfg=cfg, seed=next(seeds))
    contexts = frames[:, :model.config.ctx_frames]
    return batched(continue_speech, contexts, "generating", size=32)


def generate(sides, model, autoencoder, steps, cfg, sample=sample):
    """Add what the model generates after the contexts."""
    started = time.perf_counter()
    x0 = continuations(model, sides.frames, steps, cfg, sample)
    sides.seconds = time.perf_counter() - started
    sides.generated = decode(autoencoder, x0)
