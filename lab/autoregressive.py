"""autoregressive: the rivals of continuous diffusion, in cdslm's own training loop.

"Continuous or discrete" hides a second question, "all at once or one after the other". These arms
take the two apart. A position is `patch_size` frames.

    A        cdslm: continuous frames, the whole continuation at once
    B        codes (lab/tokens.py), position after position; the codes of a position one after the
             other, by a small transformer over them
    C        continuous frames, position after position; the frames of a position at once, by a
             small diffusion head (Li et al. 2024), as in SALAD, LatentLM and CALM
    units    B on k-means units

    python -m lab.autoregressive --arm B --lr 8e-3 --muon-lr 0.16 --out out/ar     train; it takes
                                               all flags of cdslm.py
    python -m lab.autoregressive --arm C --flops 2e13 --out out/c     for a budget of FLOPs
    python eval_pjsd.py out/ar                 judge it, as every run; so sample.py and all judges
    python -m lab.autoregressive eval_pjsd out/ar --temperature 0.9   what only B has
    python -m lab.autoregressive eval_pjsd out/ar --ceiling           true speech through its tokens

All arms continue the same contexts, in the same windows. The networks of B and C are in
lab/causal.py.
"""
import functools
import importlib
import json
import math
import sys
from pathlib import Path

import torch

import cdslm
from cdslm import (ANGLES, CHECKPOINTS, VALIDATION_WINDOWS, Diffusion, Parser,
                   Trainer, UserError, autocast, cli, config_parser, count, keyed, keyed_noise,
                   load_run, ranks, read_json, replacing, to_config)
from lab.causal import TOKENS, CodeModel, new_model
from lab.tokens import flops_of, new_tokeniser, open_tokeniser, tokeniser_flops

ARMS = "A", "B", "C", "units"
PROGRAMS = "eval_pjsd", "sample", "lab.pairs", "lab.coherence", "lab.words"
GOLDEN = (5 ** 0.5 - 1) / 2


# --------------------------------------------------------------------------------------------------
# 1. Training: cdslm's, with another network, loss and count of FLOPs.

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
            "flops": plain + config.self_condition * guess, "flops_tokeniser": tokeniser}


class ArmTrainer(Trainer):
    """A run of B or C in training."""

    def __init__(self, arm, config, corpus, autoencoder, device, dtype):
        super().__init__(config, corpus, autoencoder, device, dtype,
                         functools.partial(new_model, arm))
        self.diffusion, self.size = ByPosition(config), count_arm(arm, config)
        with replacing(Path(config.out) / "arm.json") as temporary:
            temporary.write_text(json.dumps({"arm": arm}) + "\n")
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
    # Before its first checkpoint a run of A has nothing to lose: its folder is of no arm.
    begun = any((folder / name).exists() for name in ("arm.json", *CHECKPOINTS))
    if begun and read_arm(folder) != arm:
        raise UserError(f"--out {folder} holds a run of arm {read_arm(folder)}; choose another "
                        "--out")
    if arm == "A":
        return cdslm.train(config)
    if ranks()[1] > 1 or config.compile or config.checkpoint_activations:
        raise UserError(f"arm {arm} runs on one device, without torchrun, --compile and "
                        "--checkpoint-activations")
    config.compile = False
    cdslm.train(config, functools.partial(ArmTrainer, arm), functools.partial(count_arm, arm))


def steps_for(flops, arm, config):
    """How many training steps a budget of FLOPs pays for, after the tokeniser."""
    size = count_arm(arm, config)
    steps = (flops - size["flops_tokeniser"]) / (size["flops"] * config.batch_size)
    if not 1 <= steps < math.inf:
        raise UserError(f"--flops {flops:g} does not pay for the tokeniser and some steps")
    return int(steps)


# --------------------------------------------------------------------------------------------------
# 2. Generating and judging, by the programs that do it for cdslm.

def load(folder, device="cpu"):
    """As `cdslm.load_run`, which calls this for a run of another arm than A."""
    arm = read_arm(folder)
    config, model, autoencoder = load_run(folder, device, functools.partial(new_model, arm))
    if arm in TOKENS:
        model.adopt(*open_tokeniser(folder, config, TOKENS[arm], autoencoder))
    return config, model, autoencoder


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
    """Run `main` of one of PROGRAMS with what only B has: a temperature, and tokens."""
    parser = Parser(add_help=False)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--ceiling", action="store_true")
    arguments, sys.argv[1:] = parser.parse_known_args(words)
    if not 0 < arguments.temperature < math.inf:
        raise UserError("--temperature must be more than 0")
    if arguments.ceiling and name != "eval_pjsd":
        raise UserError("--ceiling is for eval_pjsd")
    if name not in PROGRAMS:
        raise UserError(f"{name} is none of {', '.join(PROGRAMS)}")
    if arguments.temperature != 1:
        arms = {read_arm(word) for word in words if Path(word).is_dir()}
        if not arms & set(TOKENS):
            raise UserError("--temperature is for runs of B and of units")

    program, parts = importlib.import_module(name), {}
    CodeModel.temperature = arguments.temperature
    if arguments.ceiling:
        parts["generate"] = through_tokens
        report = program.parse()
        if report.run and not report.json:                    # judged.json is of the model
            sys.argv += ["--json", str(Path(report.run) / "ceiling.json")]
    program.main(**parts)


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
