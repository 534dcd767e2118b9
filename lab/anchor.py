"""anchor: a long continuation that keeps hearing the end of its prompt.

    python -m lab.coherence out/topics --anchor 0.5

DEVIATION: generated window by window, a voice drifts, because the model soon hears its own output
alone. With an anchor, every context begins with the last real seconds of the prompt; the rest are
the newest frames, as always. Nothing is trained again.
"""
import torch

from cdslm import FRAME_RATE, UserError, keyed, sample


def anchored(seconds):
    """A function like `sample` whose contexts begin with the last `seconds` of the prompt. The
    first window is that of `sample`. Raises UserError if no context is left."""
    def sample_anchored(model, context, frames=None, seed=0, progress=iter, **options):
        config, k = model.config, model.config.patch_size
        kept = round(seconds * FRAME_RATE / k) * k
        newest = model.hears - kept
        if kept < 1 or newest < k:
            raise UserError(f"--anchor {seconds:g} must be at least a token of {k} frames, and less"
                            f" than the {model.hears / FRAME_RATE:g} s that the model hears")
        frames = frames or config.gen_frames
        says = config.ctx_frames + config.gen_frames - model.hears            # frames at once
        made = heard = context
        for window in progress(range(-(-frames // says))):
            own = keyed(seed, "anchor", window) if window else seed
            x0 = sample(model, heard, says, seed=own, **options)
            made = torch.cat([made, x0], dim=1)
            heard = torch.cat([context[:, -kept:], made[:, -newest:]], dim=1)
        return made[:, context.shape[1]:][:, :frames]
    return sample_anchored if seconds else sample
