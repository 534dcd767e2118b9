"""kept: what of a context does generated toy speech keep? Each measure by itself, so that each can
fail.

The toy recogniser (`lab/listener.py`) reads a voice from a clip: pitch, vocal tract, pitch range
and tempo. In toy speech some of them go together: high voices have short vocal tracts, and the
tempo is that of the style times that of the speaker. Here they are taken apart. Breath is read from
the spectrum of the vowels, by a linear estimate that is fitted to other toy speech.

    tract_kept     the vocal tract, less what the pitch tells of it
    breath_kept    how breathy the voice is
    rate_kept      the speaker's tempo, compared with speakers in the same style
    style_kept     the style, by pitch range alone

Each is the share of other clips whose truth a clip is farther from than from its own: 1 for the
very voice, 0.5 for any.
"""
import numpy as np
import torch

from cdslm import log_mel
from lab.listener import batched, speak, voice_truth
from lab.toyspeech import VOWELS, ToySpeech

CLIPS = 400                            # that the estimate of breath is fitted to
CLIP_FRAMES = 320
RIDGE = 30.0
SHIFTS = 8                             # other contexts, for the floor


def vowel_spectra(mel, frames):
    """Log-mels (B, T, 80) and recognised phones (B, T) -> (B, 158): the mean spectrum of the vowels
    of each clip, and how uneven their spectra are from band to band, as harmonics make them."""
    mel = mel.float().cpu()
    vowel = torch.from_numpy(np.isin(frames, VOWELS)).float()                 # (B, T)
    share = vowel / vowel.sum(1, keepdim=True).clamp(min=1)
    uneven = (mel[..., 2:] - 2 * mel[..., 1:-1] + mel[..., :-2]).abs()        # (B, T, 78)
    both = torch.cat([mel, uneven], dim=2)
    return (both * share[..., None]).sum(1).numpy()


class BreathMeter:
    """Ridge regression (Hoerl & Kennard 1970) from `vowel_spectra` to the logarithm of breath."""

    def __init__(self, listener):
        toy = ToySpeech(languages=8, words=40, seed=1)        # what the recogniser learned from
        waves, spoken = speak(toy, 0, CLIPS, CLIP_FRAMES, "breath: speech")
        mel = batched(log_mel, waves)
        features = vowel_spectra(mel, listener.hear(mel)["frames"])
        target = breath_truth(spoken)
        self.mean, self.scale = features.mean(0), features.std(0) + 1e-3
        x = (features - self.mean) / self.scale
        gram = x.T @ x + RIDGE * np.eye(x.shape[1])
        self.weights = np.linalg.solve(gram, x.T @ (target - target.mean()))
        self.offset = target.mean()

    def read(self, mel, frames):
        """Log of breath (B,) of log-mels (B, T, 80) with recognised phones (B, T)."""
        x = (vowel_spectra(mel, frames) - self.mean) / self.scale
        return x @ self.weights + self.offset


def breath_truth(spoken):
    """The logarithm of breath (B,)."""
    return np.log([u.speaker["breath"] for u in spoken])


def nearness(value, truth, group=None):
    """Share of the other clips' truths (B,) that a value (B,) is farther from than from its own,
    mean over clips. Clips with the same truth are not compared; with `group` (B,), only clips of
    the same group are."""
    apart = np.abs(value[:, None] - truth[None])                              # (B, B)
    own = np.diag(apart)[:, None]
    compared = truth[:, None] != truth[None]
    if group is not None:
        compared &= group[:, None] == group[None]
    nearer = (apart > own) + 0.5 * (apart == own)
    return float(nearer[compared].mean()) if compared.any() else 0.5


def voice_kept(voice, breath, spoken):
    """{measure: value} of recognised voices (B, 4) and breath (B,), against the truth of `spoken`.
    """
    truth = voice_truth(spoken)
    slope, offset = np.polyfit(truth[:, 0], truth[:, 1], 1)

    def less_pitch(rows):
        return rows[:, 1] - slope * rows[:, 0] - offset
    return {
        "tract_kept": nearness(less_pitch(voice), less_pitch(truth)),
        "breath_kept": nearness(breath, breath_truth(spoken)),
        "rate_kept": nearness(voice[:, 3], truth[:, 3], np.array([u.style for u in spoken])),
        "style_kept": nearness(voice[:, 2], truth[:, 2]),
    }


def voice_rows(listener, spoken, generated, true):
    """{measure: value, ceiling, floor, normalized} of continuations, each side (recognised,
    log-mels (B, T, 80)). The ceiling is the true continuation, the floor that of other contexts."""
    meter = BreathMeter(listener)
    heard, breath = [], []
    for recognised, mel in (generated, true):
        heard.append(recognised["voice"])
        breath.append(meter.read(mel, recognised["frames"]))
    value = voice_kept(heard[0], breath[0], spoken)
    ceiling = voice_kept(heard[1], breath[1], spoken)
    others = [voice_kept(heard[1], breath[1], spoken[i:] + spoken[:i])
              for i in range(1, max(2, min(SHIFTS + 1, len(spoken))))]

    rows = {}
    for name, v in value.items():
        c, f = ceiling[name], float(np.mean([other[name] for other in others]))
        normalized = (v - f) / (c - f) if c != f else float("nan")
        rows[name] = {"value": v, "ceiling": c, "floor": f, "normalized": normalized}
    return rows
