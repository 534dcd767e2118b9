"""Speak: continue held-out contexts, a recording, or silence.

    python sample.py out/tiny                                            continue the contexts kept in the run
    python sample.py out/digits --prompt me.flac --seconds 12 --cfg 3    continue a recording
    python sample.py out/tiny --prompt none --num 8                      eight beginnings out of silence, in one batch

Each file is the context followed by the continuation. Beyond the window the model was trained on it goes on window by
window; all is decoded as one, so no seam is heard. The same command writes the same files on the same machine. Sound
that is written to the run folder, as it is without --out, is also put on its page: open RUN/index.html in a browser.
"""
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from cdslm import CFG, STEPS, Parser, UserError, cli, load, load_run, open_page, sample, GENERATING
from cdslm import FRAME_RATE, HOP, RATE, load_audio, save_audio

SILENT = 1e-3  # a prompt that never gets louder than -60 dBFS says nothing


def parse(argv=None):
    """Command line -> arguments."""
    parser = Parser(__doc__)
    parser.add_argument("run", help="a run folder, such as out/tiny")
    parser.add_argument("--prompt", help="a recording to continue, or 'none' for silence; held-out contexts by default")
    parser.add_argument("--seconds", type=float, help="seconds to speak [what it was trained to speak in one go]")
    parser.add_argument("--num", type=int, help="how many continuations [1; 4 without --prompt]")
    parser.add_argument("--cfg", type=float, default=CFG, help="guidance: 1 none; more, closer to the context [2]")
    parser.add_argument("--steps", type=int, default=STEPS, help="evaluations of the network a window [24]")
    parser.add_argument("--sampler", default="dpm", choices=("dpm", "ddim"), help="DPM-Solver++(2M) or DDIM [dpm]")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another continuation [0]")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu; auto takes the first there is")
    parser.add_argument("--out", type=Path, help="the WAV to write; several become x-1.wav, ... [RUN/continued.wav]")
    arguments = parser.parse_args(argv)
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UserError("--seconds must be more than 0")
    if arguments.num is None:
        arguments.num = 1 if arguments.prompt else 4
    if arguments.num < 1 or arguments.steps < 1 or not math.isfinite(arguments.cfg) or arguments.seed < 0:
        raise UserError("--num and --steps must be at least 1, --seed at least 0, --cfg a number")
    if arguments.out and not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: no folder {arguments.out.parent}")
    return arguments


def contexts(arguments, config, autoencoder):
    """What to continue: frames (num, T, C) with T at least the model's context; the last of them are what it hears."""
    need = config.ctx_frames
    if arguments.prompt is None:
        waves = load(Path(arguments.run) / "autoencoder.pt")["examples"].float() / 32767
        waves = waves[torch.arange(arguments.num) % len(waves), :need * HOP]
    else:
        wave = torch.zeros(0) if arguments.prompt == "none" else load_audio(arguments.prompt)
        if len(wave) and wave.abs().max() < SILENT:
            print(f"{arguments.prompt} is silent: starting from silence")
            wave = torch.zeros(0)
        elif 0 < len(wave) < need * HOP:
            print(f"{arguments.prompt} has {len(wave) / RATE:.1f} s: silence before it makes {need / FRAME_RATE:g} s")
        wave = F.pad(wave, (max(0, need * HOP - len(wave)), 0))
        waves = wave[len(wave) % HOP:].repeat(arguments.num, 1)
    return autoencoder.encode(waves.to(autoencoder.mel_stats.device))


def main():
    arguments = parse()
    folder, (config, model, autoencoder) = Path(arguments.run), load_run(arguments.run, arguments.device)
    frames = contexts(arguments, config, autoencoder)
    more = config.gen_frames if arguments.seconds is None else max(1, round(arguments.seconds * FRAME_RATE))
    spoken = sample(model, frames[:, -config.ctx_frames:], more, arguments.steps, arguments.cfg, arguments.sampler,
                    arguments.seed, progress=GENERATING)
    waves = autoencoder.decode(torch.cat([frames, spoken], dim=1))
    path = arguments.out or folder / "continued.wav"
    files = [path.with_stem(f"{path.stem}-{i}") for i in range(1, arguments.num + 1)] if arguments.num > 1 else [path]
    for file, wave in zip(files, waves):
        save_audio(file, wave)
        print(f"{file}: {frames.shape[1] / FRAME_RATE:.1f} s of context, then {more / FRAME_RATE:.1f} s of its own")
    if path.parent.samefile(folder):
        open_page(folder, config, shlex.join(["python", "sample.py", *sys.argv[1:]]),
                  [folder / file.name for file in files], frames.shape[1] / FRAME_RATE)


if __name__ == "__main__":
    cli(main)
