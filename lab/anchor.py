"""anchor: a long continuation that keeps hearing the end of its prompt.

    python -m lab.coherence out/topics --anchor 0.5

DEVIATION: generated window by window, a voice drifts, because the model soon hears its own output
alone. With an anchor, every context begins with the last real seconds of the prompt; the rest are
the newest frames, as always. Nothing is trained again.
"""
import math

import torch

from cdslm import CFG, FRAME_RATE, STEPS, UserError, keyed, keyed_noise, sample


def anchored(seconds, model):
    """A function like `sample` whose contexts begin with the last `seconds` of the prompt, which
    must be as long as the model hears. What it says first is what `sample` says. Raises UserError
    if no context is left beside the anchor."""
    if not seconds:
        return sample
    config, k = model.config, model.config.patch_size
    kept = round(seconds * FRAME_RATE / k) * k if math.isfinite(seconds) else 0
    newest = model.hears - kept
    if kept < 1 or newest < k:
        raise UserError(f"--anchor {seconds:g} must be at least a token of {k} frames, and less "
                        f"than the {model.hears / FRAME_RATE:g} s that the model hears")
    says = config.ctx_frames + config.gen_frames - model.hears                # frames at once
    shape = config.gen_frames, config.channels

    def sample_anchored(model, context, frames, seed=0, progress=iter, steps=STEPS, cfg=CFG):
        heard, anchor, parts = context[:, -model.hears:].float(), context[:, -kept:].float(), []
        for part in progress(range(-(-frames // says))):
            own = keyed(seed, "anchor", part) if part else seed
            noise = torch.stack([keyed_noise(own, "sample 0", item, shape, context.device)
                                 for item in range(len(context))])
            parts.append(model.continuation(heard, noise[:, :says], steps, cfg, "dpm"))
            recent = torch.cat([heard, parts[-1]], dim=1)[:, -newest:]
            heard = torch.cat([anchor, recent], dim=1)
        return torch.cat(parts, dim=1)[:, :frames]
    return sample_anchored
