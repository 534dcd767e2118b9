"""best: of several continuations, the one that the model itself finds likeliest.

    python sample.py out/tiny --best-of 4
    python eval_pjsd.py out/tiny --best-of 4

Likeliest is the one with the least denoising error, as in lab/pairs.py: all continuations of a
context get the same noise, and the logarithms of their errors count alike at all decisive levels.
"""
import torch

from cdslm import UserError, keyed, sample
from lab.pairs import DRAWS, pair_errors, score


def best_of(count):
    """A function like `sample` that returns the best of `count` continuations of each context. The
    first one is that of `sample`. Raises UserError for less than one."""
    if count < 1:
        raise UserError("--best-of must be at least 1")
    if count == 1:
        return sample

    def sample_best(model, context, frames=None, seed=0, **options):
        seeds = [seed] + [keyed(seed, "best of", number) for number in range(1, count)]
        continuations = [sample(model, context, frames, seed=each, **options) for each in seeds]
        best = []
        for item, start in enumerate(context):
            sides = [torch.cat([start, x0[item]]) for x0 in continuations]
            errors, _ = pair_errors(model, sides, len(start), DRAWS, item)
            chosen = int(score(errors).argmin())
            best.append(continuations[chosen][item])
        return torch.stack(best)
    return sample_best
