"""sample: continue held-out contexts, a recording, or silence.

    python sample.py out/tiny                                            contexts of the run
    python sample.py out/digits --prompt me.flac --seconds 12 --cfg 3    a recording
    python sample.py out/tiny --prompt none --num 8                      silence, eight times

Each file is the context followed by the generated continuation. A continuation that is longer than
the model's window is generated window by window and decoded as a whole, so no seam is audible. The
same command writes the same files on the same machine. Files that are written to the run folder, as
they are without --out, also appear on its page: open RUN/index.html in a browser.
"""
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from cdslm import (CFG, FRAME_RATE, GENERATING, HOP, RATE, STEPS, Parser, UserError, cli, load,
                   load_audio, load_run, open_page, sample, save_audio)

SILENT = 1e-3           # a prompt whose samples all stay below this, -60 dBFS, holds no speech


def parse(argv=None):
    """Command line -> arguments. Raises UserError for values that are not allowed."""
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run folder, such as out/tiny")
    parser.add_argument("--prompt",
                        help="a recording to continue, or none: silence [held-out contexts]")
    parser.add_argument("--seconds", type=float, help="seconds to generate [one window]")
    parser.add_argument("--num", type=int, help="number of continuations [1; 4 without --prompt]")
    parser.add_argument("--cfg", type=float, default=CFG,
                        help=f"guidance scale; 1: no guidance [{CFG:g}]")
    parser.add_argument("--steps", type=int, default=STEPS,
                        help=f"network evaluations per window [{STEPS}]")
    parser.add_argument("--sampler", default="dpm", choices=("dpm", "ddim"),
                        help="DPM-Solver++(2M) or DDIM [dpm]")
    parser.add_argument("--seed", type=int, default=0,
                        help="another seed gives another continuation [0]")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps, cpu; auto: the first that is available")
    parser.add_argument("--out", type=Path, help="WAV file to write; with --num above 1, x.wav "
                                                 "becomes x-1.wav, ... [RUN/continued.wav]")
    arguments = parser.parse_args(argv)

    if arguments.num is None:
        arguments.num = 1 if arguments.prompt else 4
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UserError("--seconds must be more than 0")
    if arguments.num < 1 or arguments.steps < 1:
        raise UserError("--num and --steps must be at least 1")
    if arguments.seed < 0:
        raise UserError("--seed must be at least 0")
    if not math.isfinite(arguments.cfg):
        raise UserError("--cfg must be a number")
    if arguments.out and not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: no folder {arguments.out.parent}")
    return arguments


def read_prompt(prompt, samples):
    """A prompt, a file or "none", as a wave (N,) of at least `samples` samples and of whole frames.
    A shorter one has silence before it."""
    wave = torch.zeros(0)
    if prompt != "none":
        wave = load_audio(prompt)
        if wave.abs().max() < SILENT:
            print(f"{prompt} is silent: starting from silence")
            wave = torch.zeros(0)
        elif len(wave) < samples:
            print(f"{prompt} is {len(wave) / RATE:.1f} s long: padded with silence in front to "
                  f"{samples / RATE:g} s")
    wave = F.pad(wave, (max(0, samples - len(wave)), 0))

    # The end of the prompt is what is continued, so the incomplete frame is cut from its start.
    return wave[len(wave) % HOP:]


def contexts(arguments, config, autoencoder):
    """The frames to continue, (num, T, C). The model sees only the last `config.ctx_frames`."""
    samples = config.ctx_frames * HOP
    if arguments.prompt is None:
        examples = load(Path(arguments.run) / "autoencoder.pt")["examples"]
        chosen = torch.arange(arguments.num) % len(examples)
        waves = examples[chosen, :samples].float() / 32767                    # (num, N)
    else:
        wave = read_prompt(arguments.prompt, samples)
        waves = wave.repeat(arguments.num, 1)                                 # (num, N)
    return autoencoder.encode(waves.to(autoencoder.mel_stats.device))


def main():
    arguments = parse()
    folder = Path(arguments.run)
    config, model, autoencoder = load_run(folder, arguments.device)
    context = contexts(arguments, config, autoencoder)

    # Generate, then decode the context and the continuation together.
    frames = config.gen_frames
    if arguments.seconds is not None:
        frames = max(1, round(arguments.seconds * FRAME_RATE))
    continuation = sample(model, context[:, -config.ctx_frames:], frames, arguments.steps,
                          arguments.cfg, arguments.sampler, arguments.seed, progress=GENERATING)
    waves = autoencoder.decode(torch.cat([context, continuation], dim=1))

    # Write the files.
    path = arguments.out or folder / "continued.wav"
    files = [path]
    if arguments.num > 1:
        files = [path.with_stem(f"{path.stem}-{i}") for i in range(1, arguments.num + 1)]
    context_seconds = context.shape[1] / FRAME_RATE
    for file, wave in zip(files, waves):
        save_audio(file, wave)
        print(f"{file}: {context_seconds:.1f} s of context, then {frames / FRAME_RATE:.1f} s "
              "generated")

    if path.parent.samefile(folder):
        command = shlex.join(["python", "sample.py", *sys.argv[1:]])
        open_page(folder, config, command, [folder / file.name for file in files], context_seconds)


if __name__ == "__main__":
    cli(main)
