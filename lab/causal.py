"""causal: the networks of the rivals in lab/autoregressive.py, one position after the other.

A position is `patch_size` frames. B and C see the context and the continuation so far in one causal
transformer, the trunk; a head on it makes the next position, of codes (B) or of frames (C).

Both are asked for the same: model(codes or frames) -> what is known after each position;
`loss` in training, `errors` in validation, `continuation` in generating.

They may hear more than a context. In training, every position of a window hears all that is before
it; so in generating, a window is filled, and the newest two thirds of it begin the next one.

Symbols:  P positions    K codes a position    G codes a slot (lab/tokens.py)    d width
"""
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from cdslm import (ANGLES, BASE_DEPTH, SOLVERS, MMDiT, UserError, guided, levels, linear,
                   modulate, rotary, rotate)
from lab.tokens import CODES, GROUPS, codes_per_position

TOKENS = {"B": "fsq", "units": "units"}   # {arm: kind of its tokeniser}
CODE_BLOCKS, FRAME_BLOCKS = 2, 3          # depth of the heads
# CHOICE: noise on the true history, so that errors in the generated one do not grow (as in CALM).
HISTORY_NOISE = 0.3                       # its largest standard deviation


# --------------------------------------------------------------------------------------------------
# 1. The trunk.

def reach(config):
    """Frames of a window, and how many of them the next window begins with."""
    window = config.ctx_frames + config.gen_frames
    says = max(1, round(window / 3 / config.patch_size)) * config.patch_size
    return window, max(config.ctx_frames, window - says)


def is_full(model, past):
    """Whether a window begins: there is none yet, or the next position would not fit into it."""
    return past is None or (past[0][0].shape[2] + 1) * model.patch_size == model.window


def norm(x):
    """Layer normalisation without weights."""
    return F.layer_norm(x, x.shape[-1:])


def causal_attention(q, k, v):
    """Attention of the newest positions, q (B, H, T, D), to all positions up to their own, k and v
    (B, H, S, D)."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT                                   # (B, H, T, S)
    newest, total = scores.shape[-2:]
    future = torch.ones(newest, total, dtype=torch.bool, device=q.device)
    future = future.triu(total - newest + 1)
    scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class CausalBlock(nn.Module):
    """A block of the MM-DiT with one stream and no noise level, that sees the past alone."""

    def __init__(self, d):
        super().__init__()
        self.heads = max(1, d // 64)
        self.qkv = linear(d, 3 * d, "hidden")
        self.out = linear(d, d, "hidden")
        self.up = linear(d, 4 * d, "hidden")
        self.down = linear(4 * d, d, "hidden")

    def forward(self, x, cos, sin, residual, past):
        """x (B, T, d) and keys and values of what came before -> x, updated, and keys and values
        (B, H, S, D) of all S positions so far."""
        qkv = self.qkv(norm(x))
        qkv = qkv.unflatten(-1, (3, self.heads, -1))                          # (B, T, 3, H, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)                                      # (3, B, H, T, D)
        qk, v = qkv[:2], qkv[2]
        q, k = rotate(norm(qk), cos, sin)
        if past:
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)

        attended = causal_attention(q, k, v)                                  # (B, H, T, D)
        attended = attended.transpose(1, 2).flatten(2)                        # (B, T, d)
        x = x + residual * self.out(attended)
        hidden = F.gelu(self.up(norm(x)))
        return x + residual * self.down(hidden), (k, v)


class Trunk(nn.Module):
    """A causal transformer: (B, T, d) -> (B, T, d), and what the next call needs as `past`."""

    def __init__(self, d, depth):
        super().__init__()
        self.blocks = nn.ModuleList(CausalBlock(d) for _ in range(depth))

    def forward(self, x, past=None):
        start = past[0][0].shape[2] if past else 0
        head = x.shape[-1] // self.blocks[0].heads
        cos, sin = rotary(start + x.shape[1], head, x)
        cos, sin = cos[start:], sin[start:]
        residual = 1 / (len(self.blocks) / BASE_DEPTH)                        # CompleteP
        past = past or [None] * len(self.blocks)
        present = []
        for block, before in zip(self.blocks, past):
            x, seen = block(x, cos, sin, residual, before)
            present.append(seen)
        return norm(x), present


# --------------------------------------------------------------------------------------------------
# 2. B. A position is K codes.

def embedding(count, d, summed):
    """A table of vectors that knows its role; `summed` of them make one input."""
    table = nn.Embedding(count, d)
    nn.init.normal_(table.weight, std=summed ** -0.5)
    table.role = "input"
    return table


def choose(logits, u):
    """Logits (N, V), uniform u (N,) -> where the cumulative probability passes u (N,)."""
    cumulative = logits.softmax(-1).cumsum(-1)
    limit = u[:, None] * cumulative[:, -1:]                   # their sum is not quite 1
    return (cumulative < limit).sum(-1)


class CodeHead(nn.Module):
    """The codes of a position from what the trunk knows, h (N, d). Each depends on those before it,
    through a small causal transformer over them (the depth transformer of Lee et al. 2022)."""

    def __init__(self, d, per_position, groups):
        super().__init__()
        width = d // 256 * 64 or min(d, 64)                   # a quarter of d, at least a head
        self.per_position, self.groups = per_position, groups
        self.enter = linear(d, per_position * width, "hidden")                # a view of h for each
        self.embed = embedding(groups * CODES, width, 1)
        self.trunk = Trunk(width, CODE_BLOCKS)
        leave = [linear(width, CODES, "output", bias=True) for _ in range(groups)]
        self.leave = nn.ModuleList(leave)
        offsets = CODES * (torch.arange(per_position) % groups)
        self.register_buffer("offsets", offsets, persistent=False)

    def forward(self, h, codes):
        """h (N, d), true codes (N, K) -> logits (N, K, 625)."""
        views = self.enter(h).unflatten(1, (self.per_position, -1))           # (N, K, w)
        before = codes[:, :-1] + self.offsets[:-1]                            # (N, K - 1)
        previous = F.pad(self.embed(before), (0, 0, 1, 0))                    # (N, K, w)
        x, _ = self.trunk(views + previous)
        x = x.unflatten(1, (-1, self.groups))                                 # (N, K/G, G, w)
        logits = [leave(part) for leave, part in zip(self.leave, x.unbind(2))]
        logits = torch.stack(logits, dim=2)                                   # (N, K/G, G, 625)
        return logits.flatten(1, 2)

    def draw(self, h, u, temperature):
        """h (N, d), uniform u (N, K) -> codes (N, K)."""
        views = self.enter(h).unflatten(1, (self.per_position, -1))
        codes, previous, past = [], 0, None
        for i in range(self.per_position):
            view = views[:, i:i + 1]                                          # (N, 1, w)
            x, past = self.trunk(view + previous, past)
            leave = self.leave[i % self.groups]
            logits = leave(x[:, 0]).float()                                   # (N, 625)
            code = choose(logits / temperature, u[:, i])
            previous = self.embed(code + self.offsets[i])                     # (N, w)
            previous = previous[:, None]
            codes.append(code)
        return torch.stack(codes, dim=1)


class CodeModel(nn.Module):
    """model(codes (B, P, K)) -> h (B, P, d), what is known after each position."""
    ruler, temperature = 1, 1.0

    def __init__(self, config, kind):
        super().__init__()
        per_position = codes_per_position(config, kind)
        self.config, self.patch_size = config, config.patch_size
        self.window, self.hears = reach(config)
        self.given = config.ctx_frames // config.patch_size   # positions of a context
        self.register_buffer("silence", torch.zeros(config.channels))
        self.register_buffer("tokeniser_mark", torch.tensor(0))
        offsets = CODES * torch.arange(per_position)
        self.register_buffer("offsets", offsets, persistent=False)
        self.enter = embedding(per_position * CODES, config.width, per_position)
        self.trunk = Trunk(config.width, config.depth)
        self.head = CodeHead(config.width, per_position, GROUPS[kind])

    def adopt(self, tokeniser, mark):
        """Code with this tokeniser. Raises UserError if the model was trained with another."""
        if self.tokeniser_mark not in (0, mark):
            raise UserError("tokeniser.pt is not the one that the run's model was trained with")
        self.tokeniser_mark.fill_(mark)
        object.__setattr__(self, "tokeniser", tokeniser)      # none of its modules: saved apart

    def forward(self, codes, past=None):
        x = self.enter(codes + self.offsets).sum(2)                           # (B, P, d)
        return self.trunk(x, past)

    def loss(self, diffusion_loss, x0, ctx, *unused):
        """Mean negative log likelihood, in nats, of the codes of x0 (B, T, C) after ctx: (B,)."""
        frames = torch.cat([ctx, x0], dim=1)
        codes = self.tokeniser.encode(frames)
        h, _ = self(codes[:, :-1])
        known = h[:, self.given - 1:]                                         # (B, P, d)
        known = known.flatten(0, 1)                                           # (B P, d)
        targets = codes[:, self.given:]                                       # (B, P, K)
        logits = self.head(known, targets.flatten(0, 1))                      # (B P, K, 625)
        logits = logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return losses.view(len(x0), -1).mean(1)

    def errors(self, x0, ctx, eps, angles):
        """Nats a code (B, angles), the same at every noise angle: there is no noise."""
        losses = self.loss(None, x0, ctx)                                     # (B,)
        return losses[:, None].expand(-1, len(angles))

    def continuation(self, ctx, noise, *unused):
        """ctx (B, Tc, C), standard normal noise (B, T, C) -> frames (B, T, C)."""
        codes = self.tokeniser.encode(ctx)                                    # (B, P, K)
        noise = noise.unflatten(1, (-1, self.patch_size)).flatten(2)          # (B, T/k, k C)
        noise = noise[..., :codes.shape[2]]                                   # (B, T/k, K)
        u = torch.special.ndtr(noise)                                         # uniform
        past = None
        for part in u.unbind(1):
            new = codes[:, -1:]
            if is_full(self, past):
                new, past = codes[:, -self.hears // self.patch_size:], None
            h, past = self(new, past)
            drawn = self.head.draw(h[:, -1], part, self.temperature)          # (B, K)
            codes = torch.cat([codes, drawn[:, None]], dim=1)
        frames = self.tokeniser.decode(codes)
        return frames[:, ctx.shape[1]:]


# --------------------------------------------------------------------------------------------------
# 3. C. A position is k frames.

class HeadBlock(nn.Module):
    """A block of the head: an MLP, modulated by noise level and context."""
    heads = 1

    def __init__(self, d):
        super().__init__()
        self.adaln = linear(d, 3 * d, "adaln", bias=True)
        self.up = linear(d, 4 * d, "hidden")
        self.down = linear(4 * d, d, "hidden")

    def forward(self, ctx, gen, c, cos, sin, residual):
        modulation = self.adaln(F.silu(c + ctx))                              # (N, 1, 3 d)
        shift, scale, gate = modulation.chunk(3, dim=-1)
        hidden = F.gelu(self.up(modulate(gen, shift, scale)))
        return ctx, gen + residual * gate * self.down(hidden)


class FrameHead(MMDiT):
    """The denoiser of one position: an MM-DiT of one token, whose blocks are MLPs and whose context
    is what the trunk knows. head(xt (N, k, C), phi, h (N, d), estimate) -> a prediction like xt."""

    def __init__(self, config):
        super().__init__(config)
        self.enter_ctx = linear(config.width, config.width, "hidden")
        self.blocks = nn.ModuleList(HeadBlock(config.width) for _ in range(FRAME_BLOCKS))
        # What the trunk knows after a silent context; `continuation` sets it.
        self.register_buffer("silence", torch.zeros(1, config.width))

    def patches(self, x):
        """h, or frames, as one token: (N, 1, d) or (N, 1, k C)."""
        if x.ndim == 3:
            return super().patches(x)
        return torch.stack([x], dim=1)        # a copy: the FLOP counter does not follow a view


class FrameModel(nn.Module):
    """model(frames (B, T, C)) -> h (B, T/k, d), what is known after each position."""
    patches = MMDiT.patches
    ruler = (torch.tensor(ANGLES).tan() ** -2).clamp(max=5)   # weights of the validated errors

    def __init__(self, config):
        super().__init__()
        self.config, self.patch_size = config, config.patch_size
        self.window, self.hears = reach(config)
        self.given = config.ctx_frames // config.patch_size   # positions of a context
        self.register_buffer("silence", torch.zeros(config.channels))
        self.enter = linear(config.patch_size * config.channels, config.width, "input", bias=True)
        self.trunk = Trunk(config.width, config.depth)
        self.head = FrameHead(config)

    def forward(self, frames, past=None):
        return self.trunk(self.enter(self.patches(frames)), past)

    def known(self, ctx, history):
        """What is known before each position of a continuation, `history` (B, T, C), in one batch:
        (B P, d)."""
        frames = torch.cat([ctx, history], dim=1)
        h, _ = self(frames[:, :-self.patch_size])             # the last position comes before none
        known = h[:, self.given - 1:]                                         # (B, P, d)
        return known.flatten(0, 1)

    def positions(self, frames):
        """(B, T, C) -> (B P, k, C)."""
        return frames.unflatten(1, (-1, self.patch_size)).flatten(0, 1)

    def loss(self, diffusion_loss, x0, ctx, phi, eps, self_condition):
        """Loss (B,) at noise levels phi (B, P). The noise on the history of a position is that of
        the positions before it: none of it is on its own frames."""
        amount = HISTORY_NOISE * phi * 2 / math.pi                            # (B, P)
        amount = amount.repeat_interleave(self.patch_size, dim=1)[..., None]
        h = self.known(ctx, x0 + amount * eps)
        losses = diffusion_loss(self.head, self.positions(x0), h, phi.flatten(),
                                self.positions(eps), self_condition)
        return losses.unflatten(0, phi.shape).mean(1)

    def errors(self, x0, ctx, eps, angles):
        """Mean squared errors of x0 (B, T, C), predicted at noise angles: (B, angles). The history
        is the true one, without noise."""
        h = self.known(ctx, x0)                                               # (B P, d)
        targets = self.positions(x0)                                          # (B P, k, C)
        noise = self.positions(eps)
        errors = []
        for phi in angles:
            xt = math.cos(phi) * targets + math.sin(phi) * noise
            error = guided(self.head, h, 1, xt, phi, None) - targets
            error = error.square().mean((1, 2))                               # (B P,)
            error = error.unflatten(0, (len(x0), -1))                         # (B, P)
            errors.append(error.mean(1))
        return torch.stack(errors, dim=1)

    def continuation(self, ctx, noise, steps, cfg, sampler):
        """ctx (B, Tc, C), standard normal noise (B, T, C) -> frames (B, T, C). It is guided away
        from what a silent context and the same continuation lead to; in every window anew."""
        count, frames, past = len(ctx), ctx, None
        for eps in noise.split(self.patch_size, dim=1):
            new = frames[:, -self.patch_size:]
            new = new.repeat(2 if cfg != 1 else 1, 1, 1)      # guided: also after silence
            if is_full(self, past):
                new, past = frames[:, -self.hears:], None
                if cfg != 1:
                    new = torch.cat([new, self.silence.expand_as(new)])
            h, past = self(new, past)
            known = h[:count, -1]                                             # (B, d)
            self.head.silence = h[count:, -1]
            predict = functools.partial(guided, self.head, known, cfg)
            x0 = SOLVERS[sampler](predict, eps, levels(self.config, steps))   # (B, k, C)
            frames = torch.cat([frames, x0], dim=1)
        return frames[:, ctx.shape[1]:]


def utterance_errors(model, ctx, x0, parts, noise, angles):
    """As in lab/pairs.py, for B and C: errors (angles,) of x0 (T, C) after ctx (Tc, C), for B nats
    a code. Frames that do not fill a position do not count."""
    k, total = model.patch_size, 0
    size = math.ceil(len(x0) / parts / k) * k
    whole = len(x0) // k * k
    for at, eps in zip(range(0, whole, size), noise):
        target = x0[at:min(at + size, whole)]
        history = torch.cat([ctx, x0[:at]])[-len(ctx):]
        targets = target.expand(len(eps), -1, -1)             # (draws, T, C)
        histories = history.expand(len(eps), -1, -1)
        errors = model.errors(targets, histories, eps[:, :len(target)], angles)
        total = total + errors.mean(0).cpu() * len(target)    # (angles,)
    return total / len(x0)


def new_model(arm, config):
    """An untrained model of any arm."""
    if arm == "A":
        return MMDiT(config)
    if arm == "C":
        return FrameModel(config)
    return CodeModel(config, TOKENS[arm])
