"""autoregressive: the rivals of continuous diffusion, in cdslm's own training loop.

"Continuous or discrete" hides a second question, "all at once or one after the other". These arms
take the two apart. A position is `patch_size` frames.

    A        cdslm: continuous frames, the whole continuation at once
    B        codes (lab/tokens.py), position after position; the codes of a position one after the
             other, by a small transformer over them
    C        continuous frames, position after position; the frames of a position at once, by a
             small diffusion head (Li et al. 2024), as in SALAD, LatentLM and CALM
    units    B on k-means units

    python -m lab.autoregressive --arm B --size tiny --out out/ar     train; all flags of cdslm.py
    python -m lab.autoregressive --arm C --flops 2e13 --out out/c     for a budget of FLOPs
    python -m lab.autoregressive eval_pjsd out/ar --temperature 0.9   judge; so with any program
    python -m lab.autoregressive lab.pairs out/ar                     that loads a run of cdslm
    python -m lab.autoregressive eval_pjsd out/ar --ceiling           true speech through its tokens

All arms continue the same contexts, in the same windows. B and C see the context and the
continuation so far in one causal transformer, the trunk.
"""
import functools
import importlib
import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

import cdslm
from cdslm import (ANGLES, BASE_DEPTH, CFG, STEPS, VALIDATION_WINDOWS, Diffusion, MMDiT, Parser,
                   Trainer, UserError, autocast, cli, config_parser, count, dpm_solver, guided,
                   keyed, keyed_noise, launched_together, levels, linear, load_run, modulate, own,
                   read_json, replacing, rotary, rotate, sample, to_config)
from lab.tokens import (CODES, GROUPS, codes_per_position, flops_of, new_tokeniser, open_tokeniser,
                        tokeniser_flops)

ARMS = "A", "B", "C", "units"
TOKENS = {"B": "fsq", "units": "units"}   # {arm: kind of its tokeniser}
CODE_BLOCKS, FRAME_BLOCKS = 2, 3          # depth of the heads
# CHOICE: noise on the true history, so that errors in the generated one do not grow (as in CALM).
HISTORY_NOISE = 0.3                       # its largest standard deviation
GOLDEN = (5 ** 0.5 - 1) / 2


# --------------------------------------------------------------------------------------------------
# 1. The trunk.

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
        qkv = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)   # (3, B, H, T, D)
        qk, v = qkv[:2], qkv[2]
        q, k = rotate(norm(qk), cos, sin)
        if past:
            k = torch.cat([past[0], k], dim=2)
            v = torch.cat([past[1], v], dim=2)

        attended = causal_attention(q, k, v)                                  # (B, H, T, D)
        x = x + residual * self.out(attended.transpose(1, 2).flatten(2))
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
        angles = rotary(start + x.shape[1], head, x.device)
        cos, sin = [table[start:].to(x.dtype) for table in angles]
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
        previous = self.embed(codes[:, :-1] + self.offsets[:-1])              # (N, K - 1, w)
        x, _ = self.trunk(views + F.pad(previous, (0, 0, 1, 0)))
        x = x.unflatten(1, (-1, self.groups))                                 # (N, K/G, G, w)
        logits = [leave(x[:, :, group]) for group, leave in enumerate(self.leave)]
        return torch.stack(logits, dim=2).flatten(1, 2)

    def draw(self, h, u, temperature):
        """h (N, d), uniform u (N, K) -> codes (N, K)."""
        views = self.enter(h).unflatten(1, (self.per_position, -1))
        codes, previous, past = [], 0, None
        for i in range(self.per_position):
            x, past = self.trunk(views[:, i:i + 1] + previous, past)          # (N, 1, w)
            logits = self.leave[i % self.groups](x[:, 0]).float()
            code = choose(logits / temperature, u[:, i])
            previous = self.embed(code + self.offsets[i])[:, None]
            codes.append(code)
        return torch.stack(codes, dim=1)


class CodeModel(nn.Module):
    """model(codes (B, P, K)) -> h (B, P, d), what is known after each position."""
    ruler = 1

    def __init__(self, config, kind):
        super().__init__()
        per_position = codes_per_position(config, kind)
        self.config, self.patch_size = config, config.patch_size
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
        codes = self.tokeniser.encode(torch.cat([ctx, x0], dim=1))
        h, _ = self(codes[:, :-1])
        known = h[:, self.given - 1:].flatten(0, 1)                           # (B P, d)
        targets = codes[:, self.given:]                                       # (B, P, K)
        logits = self.head(known, targets.flatten(0, 1))                      # (B P, K, 625)
        logits = logits.flatten(0, 1).float()
        losses = F.cross_entropy(logits, targets.flatten(), reduction="none")
        return losses.view(len(x0), -1).mean(1)

    def errors(self, x0, ctx, eps, angles):
        """Nats a code (B, angles), the same at every noise angle: there is no noise."""
        return self.loss(None, x0, ctx)[:, None].expand(-1, len(angles))

    def continuation(self, ctx, noise, temperature, **unused):
        """ctx (B, Tc, C), standard normal noise (B, T, C) -> frames (B, T, C)."""
        codes = self.tokeniser.encode(ctx)                                    # (B, P, K)
        noise = noise.unflatten(1, (-1, self.patch_size)).flatten(2)          # (B, T/k, k C)
        u = torch.special.ndtr(noise[..., :codes.shape[2]])                   # uniform
        h, past = self(codes)
        for part in u.unbind(1):
            drawn = self.head.draw(h[:, -1], part, temperature)
            drawn = drawn[:, None]                                            # (B, 1, K)
            codes = torch.cat([codes, drawn], dim=1)
            h, past = self(drawn, past)
        return self.tokeniser.decode(codes)[:, ctx.shape[1]:]


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
        return h[:, self.given - 1:].flatten(0, 1)

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
            errors.append(error.unflatten(0, (len(x0), -1)).mean(1))
        return torch.stack(errors, dim=1)

    def continuation(self, ctx, noise, steps, cfg, **unused):
        """ctx (B, Tc, C), standard normal noise (B, T, C) -> frames (B, T, C). It is guided away
        from what a silent context and the same continuation lead to."""
        count, contexts = len(ctx), ctx
        if cfg != 1:
            contexts = torch.cat([ctx, self.silence.expand_as(ctx)])
        h, past = self(contexts)
        frames = []
        for eps in noise.split(self.patch_size, dim=1):
            known = h[:count, -1]                                             # (B, d)
            self.head.silence = h[count:, -1]
            predict = functools.partial(guided, self.head, known, cfg)
            x0 = dpm_solver(predict, eps, levels(self.config, steps))         # (B, k, C)
            frames.append(x0)
            h, past = self(x0.repeat(len(contexts) // count, 1, 1), past)
        return torch.cat(frames, dim=1)


# --------------------------------------------------------------------------------------------------
# 4. Training: cdslm's, with another network, loss and count in the places of its own.

def new_model(arm, config):
    """An untrained model of any arm."""
    if arm == "A":
        return MMDiT(config)
    return FrameModel(config) if arm == "C" else CodeModel(config, TOKENS[arm])


class ByPosition(Diffusion):
    """The loss of B and C. Each position of a window has a noise level of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.shifts = GOLDEN * torch.arange(config.gen_frames // config.patch_size)

    def times(self, u):
        """Uniform u (B,) -> times (B, P), spread evenly over the positions of a window."""
        return super().times((u[:, None] + self.shifts) % 1)

    def loss(self, model, *batch):
        return model.loss(super().loss, *batch)


def count_arm(arm, config):
    """As `cdslm.count`, and FLOPs of training the tokeniser. Those of B and C are counted while a
    window is trained on, tokeniser and heads included."""
    if arm == "A":
        return count(config) | {"flops_tokeniser": 0}
    model, diffusion, tokeniser = new_model(arm, config), ByPosition(config), 0
    if arm in TOKENS:
        model.adopt(new_tokeniser(config, TOKENS[arm]), 0)
        tokeniser = tokeniser_flops(config, TOKENS[arm])
    ctx = torch.zeros(1, config.ctx_frames, config.channels)
    x0 = torch.zeros(1, config.gen_frames, config.channels)
    phi = diffusion.angle(diffusion.times(torch.zeros(1)))

    def train_on_a_window(self_condition):
        diffusion.loss(model, x0, ctx, phi, x0, self_condition).sum().backward()

    plain = flops_of(lambda: train_on_a_window(False))
    guess = flops_of(lambda: train_on_a_window(True)) - plain
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters,
            "tokens": (config.ctx_frames + config.gen_frames) // config.patch_size,
            "flops": plain + config.self_condition * guess, "flops_guess": guess,
            "flops_tokeniser": tokeniser}


class ArmTrainer(Trainer):
    """A run of B or C in training. `Trainer` makes its network of what `train` puts in the place of
    MMDiT."""

    def __init__(self, arm, config, corpus, autoencoder, device, dtype):
        super().__init__(config, corpus, autoencoder, device, dtype)
        self.diffusion = ByPosition(config)
        # Without the roles that no layer of B has; torch would not restore them.
        groups = self.optimizers[0].param_groups
        groups[:] = [group for group in groups if group["params"]]
        if arm in TOKENS:
            self.tokeniser = open_tokeniser(config.out, config, TOKENS[arm], autoencoder, corpus,
                                            dtype)

    def restore(self, found):
        super().restore(found)
        if isinstance(self.model, CodeModel):
            self.model.adopt(*self.tokeniser)
            self.ema.adopt(*self.tokeniser)

    def step(self):
        row = super().step()
        row["flops"] += self.size["flops_tokeniser"]
        return row

    @torch.no_grad()
    def validate(self, number=VALIDATION_WINDOWS):
        """The EMA weights on fixed held-out windows and noise: nats a code, or the mean error of
        `Trainer.validate`."""
        keys = [keyed(0, "validation", i) for i in range(number)]
        mel = self.corpus.windows("mel", "valid", keys, self.corpus.window)
        ctx, x0 = self.frames(torch.from_numpy(mel))
        eps = torch.stack([keyed_noise(0, "validation", i, x0.shape[1:], self.device)
                           for i in range(number)])
        size = self.config.micro_batch or self.config.batch_size
        with autocast(self.device, self.hardware.dtype):
            rows = [self.ema.errors(*part, ANGLES)
                    for part in zip(x0.split(size), ctx.split(size), eps.split(size))]
        errors = torch.cat(rows).cpu() * self.ema.ruler
        return {"mean": errors.mean().item()}


def read_arm(folder):
    """The arm of a run folder; one without arm.json is a run of cdslm.py."""
    path = Path(folder) / "arm.json"
    arm = read_json(path).get("arm") if path.exists() else "A"
    if arm not in ARMS:
        raise UserError(f"{path}: unknown arm {arm!r}; the arms are {', '.join(ARMS)}")
    return arm


def train(config, arm):
    """As `cdslm.train`, for any arm."""
    folder = Path(config.out)
    if (folder / "config.json").exists() and read_arm(folder) != arm:
        raise UserError(f"--out {folder} holds a run of arm {read_arm(folder)}; choose another "
                        "--out")
    if arm == "A":
        return cdslm.train(config)
    if launched_together() or config.compile or config.checkpoint_activations:
        raise UserError(f"arm {arm} runs on one device, without torchrun, --compile and "
                        "--checkpoint-activations")

    importlib.import_module("lab.plan")                       # with cdslm's own network

    def own_arm(config, corpus):
        with replacing(folder / "arm.json") as temporary:
            temporary.write_text(json.dumps({"arm": arm}) + "\n")
        own(config, corpus)

    with mock.patch.multiple(
            cdslm, MMDiT=functools.partial(new_model, arm), count=functools.partial(count_arm, arm),
            Trainer=functools.partial(ArmTrainer, arm), own=own_arm, load_run=load,
            sample=generate):
        cdslm.train(config)
    print(f"judge it: python -m lab.autoregressive eval_pjsd {folder}")


def steps_for(flops, arm, config):
    """How many training steps a budget of FLOPs pays for, after the tokeniser."""
    size = count_arm(arm, config)
    steps = (flops - size["flops_tokeniser"]) / (size["flops"] * config.batch_size)
    if not 1 <= steps < math.inf:
        raise UserError(f"--flops {flops:g} does not pay for the tokeniser and some steps")
    return int(steps)


# --------------------------------------------------------------------------------------------------
# 5. Generating and judging, by the programs that do it for cdslm.

def load(folder, device="cpu"):
    """As `cdslm.load_run`, for a run of any arm."""
    arm = read_arm(folder)
    with mock.patch.object(cdslm, "MMDiT", functools.partial(new_model, arm)):
        config, model, autoencoder = load_run(folder, device)
    if arm in TOKENS:
        model.adopt(*open_tokeniser(folder, config, TOKENS[arm], autoencoder))
    return config, model, autoencoder


@torch.no_grad()
def generate(model, context, frames=None, steps=STEPS, cfg=CFG, sampler="dpm", seed=0,
             progress=iter, temperature=1.0):
    """As `cdslm.sample`, with a model of any arm. B has a temperature; C has steps and guidance, as
    A has."""
    if isinstance(model, MMDiT):
        return sample(model, context, frames, steps, cfg, sampler, seed, progress)
    config, frames = model.config, frames or model.config.gen_frames
    silence = model.silence.float().expand(len(context), config.ctx_frames, -1)
    speech = torch.cat([silence, context.float()], dim=1)     # the context may be short
    given, shape = speech.shape[1], (config.gen_frames, config.channels)
    for window in progress(range(-(-frames // config.gen_frames))):
        missing = given + frames - speech.shape[1]
        needed = -(-missing // config.patch_size) * config.patch_size
        noise = torch.stack([keyed_noise(seed, f"sample {window}", item, shape, speech.device)
                             for item in range(len(speech))])
        ctx = speech[:, -config.ctx_frames:]
        continuation = model.continuation(
            ctx, noise[:, :needed], steps=steps, cfg=cfg, temperature=temperature)
        speech = torch.cat([speech, continuation], dim=1)
    return speech[:, given:given + frames]


def utterance_errors(of_cdslm, angles, model, ctx, x0, parts, noise):
    """As in lab/pairs.py, for any arm: errors (levels,) of x0 (T, C) after ctx (Tc, C), for B nats
    a code. Frames that do not fill a position do not count."""
    if isinstance(model, MMDiT):
        return of_cdslm(model, ctx, x0, parts, noise)
    k, total = model.patch_size, 0
    size = math.ceil(len(x0) / parts / k) * k
    whole = len(x0) // k * k
    for at, eps in zip(range(0, whole, size), noise):
        target = x0[at:min(at + size, whole)]
        history = torch.cat([ctx, x0[:at]])[-len(ctx):]
        targets = target.expand(len(eps), -1, -1)             # (draws, T, C)
        histories = history.expand(len(eps), -1, -1)
        errors = model.errors(targets, histories, eps[:, :len(target)], angles)
        total = total + errors.mean(0).cpu() * len(target)    # (levels,)
    return total / len(x0)


def through_tokens(sides, model, autoencoder, *unused):
    """In the place of what a model generates: the true continuations, through its tokens."""
    if not isinstance(model, CodeModel):
        raise UserError("--ceiling is for runs of B and of units, which have tokens")
    waves = []
    for frames in sides.frames.split(8):
        frames = model.tokeniser.decode(model.tokeniser.encode(frames))
        frames = frames[:, model.config.ctx_frames:]
        waves.append(autoencoder.decode(frames).cpu())
    sides.generated = torch.cat(waves)


def run_program(name, words):
    """Run `main` of a program that loads a run, such as eval_pjsd or lab.pairs, for any arm."""
    parser = Parser(add_help=False)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--ceiling", action="store_true")
    arguments, sys.argv[1:] = parser.parse_known_args(words)
    if not 0 < arguments.temperature < math.inf:
        raise UserError("--temperature must be more than 0")
    if arguments.ceiling and name != "eval_pjsd":
        raise UserError("--ceiling is for eval_pjsd")

    # What the program imports from cdslm.
    cdslm.load_run = load
    cdslm.sample = functools.partial(generate, temperature=arguments.temperature)
    try:
        program = importlib.import_module(name)
        main = program.main
    except (ModuleNotFoundError, AttributeError):
        raise UserError(f"{name} is no program that loads a run; try eval_pjsd") from None

    if name == "lab.pairs":
        angles = [math.atan(math.exp(-level / 2)) for level in program.LEVELS]
        program.utterance_errors = functools.partial(
            utterance_errors, program.utterance_errors, angles)
    if arguments.ceiling:
        program.generate = through_tokens
    main()


def parse(argv=None):
    """Command line -> Config and arm."""
    parser = config_parser(__doc__)
    group = parser.add_argument_group("rivals")
    group.add_argument("--arm", choices=ARMS, default="B", help="what is trained [B]")
    group.add_argument("--flops", type=float, metavar="FLOAT",
                       help="instead of --steps: as many as this budget pays for")
    arguments = parser.parse_args(argv)
    if arguments.flops is not None and arguments.steps:
        raise UserError("give --steps or --flops, not both")
    if arguments.flops is not None:
        arguments.steps = steps_for(arguments.flops, arguments.arm, to_config(arguments))
    return to_config(arguments), arguments.arm


def main():
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        return run_program(words[0], words[1:])
    train(*parse(words))


if __name__ == "__main__":
    cli(main, resumable=True)
