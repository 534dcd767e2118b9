"""memory: does generated speech repeat what the model was trained on?

Pieces of generated speech are compared with pieces of training speech, level and contrast removed.
Two tests raise a flag. Is a second of generated speech nearer to training speech than a second of
real speech is? That finds copies. And are quarters of a second, phones in somebody's voice, nearer
to training speech than to as much speech that the model never saw, more often than those of the
true continuations are? That finds a model that knows the voices of its training speech alone, also
where what it generates is far from any real speech.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from cdslm import FRAME_RATE, array
from lab.sides import windows

LEAST_FRAMES = 83                      # a second, and room to shift it by three frames
SECOND, QUARTER = 20, 5                # lengths of pieces, in steps of four frames


def pieces_of(mel, steps):
    """Log-mel (B, T, 80) -> (B, W, 16 steps): each piece of it of so many steps of 50 ms, in 16
    bands, level and contrast removed."""
    whole = mel.shape[1] // 4 * 4
    mel = mel[:, :whole].unflatten(1, (-1, 4))                # (B, T/4, 4, 80)
    mel = mel.unflatten(3, (16, 5))                           # (B, T/4, 4, 16, 5)
    mel = mel.mean((2, 4))                                    # (B, T/4, 16)

    pieces = mel.unfold(1, steps, 1)                          # (B, W, 16, steps)
    pieces = pieces.flatten(2)                                # (B, W, 16 steps)
    level = pieces.mean(2, keepdim=True)
    return F.normalize(pieces - level, dim=2)


def middles(clips):
    """Clips (B, T, 80) -> the second in the middle of each, at four shifts: (B, 4, 320)."""
    middle = clips.shape[1] // 2 - 42
    shifted = []
    for start in range(max(0, middle), max(0, middle) + 4):
        second = clips[:, start:start + FRAME_RATE]
        shifted.append(pieces_of(second, SECOND))
    return torch.cat(shifted, dim=1)


def nearest(pieces, mels, steps):
    """Distance of pieces (B, W, 16 steps) to the nearest piece of log-mels (T, 80): (B, W)."""
    best = torch.full(pieces.shape[:2], -1.0)
    for mel in mels:
        known = pieces_of(mel[None], steps)[0]                # (W', 16 steps)
        cosine = pieces @ known.T                             # (B, W, W')
        best = torch.maximum(best, cosine.amax(2))
    squared = 2 - 2 * best
    return squared.clamp(min=0).sqrt()


def training_speech(corpus, frames):
    """Log-mels (T, 80) of at most so many frames of training speech, drawn from all over it."""
    runs = [run.tolist() for run in corpus.runs["train"] if run[2] >= FRAME_RATE]
    np.random.default_rng(0).shuffle(runs)
    missing = int(frames)
    for shard, start, length in runs:
        length = min(length, missing)
        missing -= length
        if length >= FRAME_RATE:
            mel = array(corpus.shards[shard]["stem"], "mel")[start:start + length]
            yield torch.from_numpy(mel.astype(np.float32))


def prefers_training(clips, known, heldout):
    """Share of clips (B, T, 80) whose quarters of a second are nearer to the log-mels `known` than
    to those of `heldout`, on average."""
    pieces = pieces_of(clips, QUARTER)
    to_training, to_heldout = [nearest(pieces, mels, QUARTER).mean(1) for mels in (known, heldout)]
    return float((to_training < to_heldout).float().mean())


def memory(corpus, generated, true, heldout=None, hours=10):
    """Compare generated and true continuations (B, T, 80) with at most `hours` of training speech:
    median distances; `nearer`, how often a second of a generated clip is nearer than one of a true
    clip (0.5 if it is like real speech). With `heldout` (R, T, 80), stretches of speech that the
    model never saw: `nearer_than_heldout`, the share of generated clips that are nearer to as many
    stretches of training speech, and the share of true clips, which shows by how much the two sets
    of stretches differ in themselves. Flagged if either is more than chance allows: three standard
    deviations, of Mann & Whitney's U and of the difference of two shares."""
    count, count_true = len(generated), len(true)
    mels = training_speech(corpus, hours * 3600 * FRAME_RATE)
    mels = tqdm(mels, desc="looking for copies", unit="run", leave=False)
    distances = nearest(middles(torch.cat([generated, true])), mels, SECOND).amin(1)
    near, near_true = distances.split((count, count_true))
    nearer = float((near[:, None] < near_true).float().mean())
    chance = math.sqrt((count + count_true + 1) / (12 * count * count_true))
    found = {
        "generated": float(near.median()),
        "real": float(near_true.median()),
        "nearer": nearer,
        "flagged": nearer > 0.5 + 3 * chance,
    }
    if heldout is None or not corpus.ends("train", heldout.shape[1])[-1]:
        return found

    # As many stretches of both, equally long: as much to be near to.
    known = windows(corpus, "mel", "train", heldout.shape[1], len(heldout))
    share, usual = [prefers_training(clips, known, heldout[:len(known)])
                    for clips in (generated, true)]
    chance = math.sqrt(0.25 / count + 0.25 / count_true)
    found["nearer_than_heldout"], found["true_nearer_than_heldout"] = share, usual
    found["flagged"] = found["flagged"] or share - max(0.5, usual) > 3 * chance
    return found
