"""sample: continue held-out contexts, a recording, or silence.

    python sample.py out/tiny                                            contexts of the run
    python sample.py out/digits --prompt me.flac --seconds 12 --cfg 3    a recording
    python sample.py out/tiny --prompt none --num 8                      silence, eight times

Each file is the context followed by the generated continuation. A continuation that is longer than
the model's window is generated window by window and decoded as a whole, so no seam is audible. Of a
long prompt, the model sees the end; what comes before is copied from the recording. The same
command writes the same files on the same machine. Files that are written to the run folder, as they
are without --out, also appear on its page: open RUN/index.html in a browser.
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
FADE = 480              # samples (20 ms) over which a copied prompt turns into the decoded one


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
    parser.add_argument("--out", type=Path,
                        help="WAV file to write, or a folder for it; with --num above 1, x.wav "
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
    if arguments.prompt not in (None, "none") and not Path(arguments.prompt).is_file():
        raise UserError(f"{arguments.prompt}: no such file")
    return arguments


def output_files(arguments):
    """The WAV files to write. Raises UserError if they can't be, or if one is the prompt."""
    path = arguments.out or Path(arguments.run)
    if path.is_dir():
        path = path / "continued.wav"
    if path.suffix.lower() != ".wav":
        raise UserError(f"--out {path}: only .wav files can be written")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no folder {path.parent}")
    files = [path]
    if arguments.num > 1:
        files = [path.with_stem(f"{path.stem}-{i}") for i in range(1, arguments.num + 1)]
    for file in files:
        is_file = arguments.prompt not in (None, "none")
        if is_file and file.exists() and file.samefile(arguments.prompt):
            raise UserError(f"--out {file} is the prompt itself; choose another --out")
    return files


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


def contexts(arguments, config):
    """The speech to continue: waves (num, N) that the model sees, and what comes before (M,)."""
    samples = config.ctx_frames * HOP
    if arguments.prompt is None:
        examples = load(Path(arguments.run) / "autoencoder.pt")["examples"]
        chosen = torch.arange(arguments.num) % len(examples)
        return examples[chosen, :samples].float() / 32767, torch.zeros(0)
    wave = read_prompt(arguments.prompt, samples)
    return wave[-samples:].repeat(arguments.num, 1), wave[:-samples]


def main():
    arguments = parse()
    folder, files = Path(arguments.run), output_files(arguments)
    config, model, autoencoder = load_run(folder, arguments.device)
    waves, before = contexts(arguments, config)

    # Generate, then decode the context and the continuation together.
    frames = config.gen_frames
    if arguments.seconds is not None:
        frames = max(1, round(arguments.seconds * FRAME_RATE))
    context = autoencoder.encode(waves.to(autoencoder.mel_stats.device))      # (num, T, C)
    continuation = sample(model, context, frames, arguments.steps, arguments.cfg,
                          arguments.sampler, arguments.seed, progress=GENERATING)
    decoded = autoencoder.decode(torch.cat([context, continuation], dim=1)).cpu()

    # The recording before the context is copied and fades into the decoded context.
    if len(before):
        fade = torch.linspace(0, 1, FADE)
        decoded[:, :FADE] = fade * decoded[:, :FADE] + (1 - fade) * waves[:, :FADE]
    context_seconds = (len(before) + waves.shape[1]) / RATE
    for file, wave in zip(files, decoded):
        save_audio(file, torch.cat([before, wave]))
        print(f"{file}: {context_seconds:.1f} s of context, then {frames / FRAME_RATE:.1f} s "
              "generated")

    if files[0].parent.samefile(folder):
        command = shlex.join(["python", "sample.py", *sys.argv[1:]])
        open_page(folder, config, command, [folder / file.name for file in files], context_seconds)


if __name__ == "__main__":
    cli(main)
