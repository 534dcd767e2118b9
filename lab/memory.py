"""memory: does generated speech repeat what the model was trained on?

Seconds of generated speech are compared with seconds of training speech, level and contrast
removed. Two tests raise a flag. Is generated speech nearer to training speech than real speech is?
And is it nearer to training speech than to as much speech that the model never saw? The second one
also works where generated speech is far from any real speech.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cdslm import FRAME_RATE

LEAST_FRAMES = 83                      # a second, and room to shift it by three frames


def seconds_of(mel):
    """Log-mel (B, T, 80) -> (B, W, 320): each second of it in 20 steps and 16 bands, level and
    contrast removed."""
    whole = mel.shape[1] // 4 * 4
    mel = mel[:, :whole].unflatten(1, (-1, 4))                # (B, T/4, 4, 80)
    mel = mel.unflatten(3, (16, 5))                           # (B, T/4, 4, 16, 5)
    mel = mel.mean((2, 4))                                    # (B, T/4, 16)

    seconds = mel.unfold(1, 20, 1)                            # (B, W, 16, 20)
    seconds = seconds.flatten(2)                              # (B, W, 320)
    level = seconds.mean(2, keepdim=True)
    return F.normalize(seconds - level, dim=2)


def middles(clips):
    """Clips (B, T, 80) -> the second in the middle of each, at four shifts: (B, 4, 320)."""
    middle = clips.shape[1] // 2 - 42
    shifted = []
    for start in range(max(0, middle), max(0, middle) + 4):
        second = clips[:, start:start + FRAME_RATE]
        shifted.append(seconds_of(second))
    return torch.cat(shifted, dim=1)


def nearest(seconds, pieces):
    """Distance of seconds (B, 4, 320) to the nearest second of log-mels (T, 80): (B,)."""
    best = torch.full(seconds.shape[:2], -1.0)
    for mel in pieces:
        if len(mel) < FRAME_RATE:
            continue
        known = seconds_of(mel[None])[0]                      # (W, 320)
        cosine = seconds @ known.T                            # (B, 4, W)
        best = torch.maximum(best, cosine.amax(2))
    squared = 2 - 2 * best.amax(1)
    return squared.clamp(min=0).sqrt()


def long_runs(corpus):
    """Runs (shard, start, length) of training speech that last a second at least."""
    return [run.tolist() for run in corpus.runs["train"] if run[2] >= FRAME_RATE]


def training_speech(corpus, frames, seed):
    """Log-mels (T, 80) of about as many frames of training speech, drawn from all over it."""
    runs = long_runs(corpus)
    np.random.default_rng(seed).shuffle(runs)
    missing = int(frames)
    for shard, start, length in runs:
        length = min(length, missing)
        missing -= length
        if length:
            mel = corpus.shards[shard]["mel"][start:start + length]
            yield torch.from_numpy(mel.astype(np.float32))


def memory(corpus, generated, true, heldout=None, hours=10):
    """Compare generated and true continuations (B, T, 80) with at most `hours` of training speech:
    median distances; `nearer`, how often a generated clip is nearer than a true one (0.5 if it is
    like real speech); with `heldout` clips (B, T, 80), `nearer_than_heldout`, how often it is
    nearer to training speech than to as much of theirs. Flagged if either is more than chance
    allows: three standard deviations, of Mann & Whitney's U and of a share of clips."""
    frames = hours * 3600 * FRAME_RATE
    pieces = training_speech(corpus, frames, 0)
    pieces = tqdm(pieces, desc="looking for copies", unit="run", leave=False)
    distances = nearest(middles(torch.cat([generated, true])), pieces)
    count, count_true = len(generated), len(true)
    near, near_true = distances.split((count, count_true))
    nearer = float((near[:, None] < near_true).float().mean())
    chance = math.sqrt((count + count_true + 1) / (12 * count * count_true))
    found = {
        "generated": float(near.median()),
        "real": float(near_true.median()),
        "nearer": nearer,
        "flagged": nearer > 0.5 + 3 * chance,
    }
    if heldout is None:
        return found

    # As many clips of training speech as of held-out speech, equally long: as many seconds to be
    # near to.
    count_heldout, length = heldout.shape[:2]
    pieces = training_speech(corpus, count_heldout * length, 1)
    known = [clip for mel in pieces for clip in mel.split(length) if len(clip) == length]
    seconds = middles(generated)
    to_training = nearest(seconds, known)
    to_heldout = nearest(seconds, heldout[:len(known)])
    share = float((to_training < to_heldout).float().mean())
    chance = 0.5 / math.sqrt(count)
    found["nearer_than_heldout"] = share
    found["flagged"] = found["flagged"] or share > 0.5 + 3 * chance
    return found
