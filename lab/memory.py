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
    mel = mel[:, :mel.shape[1] // 4 * 4].unflatten(1, (-1, 4)).unflatten(3, (16, 5))
    mel = mel.mean((2, 4))                                    # (B, T/4, 16)
    seconds = mel.unfold(1, 20, 1).flatten(2)                 # (B, W, 320)
    return F.normalize(seconds - seconds.mean(2, keepdim=True), dim=2)


def middles(clips):
    """Clips (B, T, 80) -> the second in the middle of each, at four shifts: (B, 4, 320)."""
    middle = max(0, clips.shape[1] // 2 - 42)
    shifted = [seconds_of(clips[:, middle + i:middle + i + 80]) for i in range(4)]
    return torch.cat(shifted, dim=1)


def nearest(seconds, pieces):
    """Distance of seconds (B, 4, 320) to the nearest second of log-mels (T, 80): (B,)."""
    best = torch.full(seconds.shape[:2], -1.0)
    for mel in pieces:
        if len(mel) < 80:
            continue
        found = (seconds @ seconds_of(mel[None])[0].T).amax(2)
        best = torch.maximum(best, found)
    return (2 - 2 * best.amax(1)).clamp(min=0).sqrt()


def training_speech(corpus, frames, seed):
    """Log-mels (T, 80) of about as many frames of training speech, drawn from all over it."""
    runs = [run for run in corpus.runs["train"] if run[2] >= 80]
    runs = np.random.default_rng(seed).permutation(runs)
    before = np.cumsum(runs[:, 2]) - runs[:, 2]
    for (shard, start, length), done in zip(runs.tolist(), before.tolist()):
        if done < frames:
            mel = corpus.shards[shard]["mel"][start:start + int(min(length, frames - done))]
            yield torch.from_numpy(mel.astype(np.float32))


def memory(corpus, generated, true, heldout=None, hours=10):
    """Compare generated and true continuations (B, T, 80) with at most `hours` of training speech:
    median distances; `nearer`, how often a generated clip is nearer than a true one (0.5 if it is
    like real speech); with `heldout` clips (B, T, 80), `nearer_than_heldout`, how often it is
    nearer to training speech than to as much of theirs. Flagged if either is more than chance
    allows: three standard deviations, of Mann & Whitney's U and of a share of clips."""
    frames = hours * 3600 * FRAME_RATE
    pieces = tqdm(training_speech(corpus, frames, 0), desc="looking for copies", leave=False)
    both = nearest(middles(torch.cat([generated, true])), pieces)
    near, near_true = both.split((len(generated), len(true)))
    nearer = float((near[:, None] < near_true).float().mean())
    sizes = len(near), len(near_true)
    chance = math.sqrt((sum(sizes) + 1) / (12 * math.prod(sizes)))
    found = {"generated": float(near.median()), "real": float(near_true.median()),
             "nearer": nearer, "flagged": nearer > 0.5 + 3 * chance}

    if heldout is not None:
        known = sum(run[2] for run in corpus.runs["train"] if run[2] >= 80)
        clips = heldout[:max(1, int(known / heldout.shape[1]))]
        seconds = middles(generated)
        as_much = training_speech(corpus, len(clips) * heldout.shape[1], 1)
        closer = nearest(seconds, as_much) < nearest(seconds, clips)
        found["nearer_than_heldout"] = float(closer.float().mean())
        found["flagged"] |= found["nearer_than_heldout"] > 0.5 + 3 * 0.5 / math.sqrt(len(closer))
    return found
