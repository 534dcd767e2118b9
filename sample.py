"""sample: continue held-out contexts, a recording, or silence.

    python sample.py out/tiny                                            contexts of the run
    python sample.py out/digits --prompt me.flac --seconds 12 --cfg 3    a recording
    python sample.py out/tiny --prompt none --num 8                      silence, eight times
    python sample.py out/tiny --best-of 4      keeps the one of four that the model finds likeliest
    python sample.py out/tiny --watch          how one continuation comes about, step by step
    python sample.py out/a out/b               two runs, the same contexts and the same noise

Each file is the context followed by the continuation. If that is longer than the model's window, it
is generated window by window and decoded as a whole, so no seam is audible. Of a long prompt, the
model sees the end; what comes before is copied from the recording. The same command writes the same
files on the same machine. Files in the run folder, as without --out, are also on RUN/index.html.
"""
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from cdslm import (CFG, FRAME_RATE, GENERATING, HOP, RATE, SOLVERS, STEPS, MMDiT, Parser, UserError,
                   cli, guided, keyed_noise, lab, levels, load, load_audio, load_run, open_page,
                   sample, save_audio)

SILENT = 1e-3           # a prompt whose samples all stay below this, -60 dBFS, holds no speech
FADE = 480              # samples (20 ms) over which a copied prompt turns into the decoded one
SHOWN = 1, 2, 4, 8, 16  # evaluations after which --watch shows the estimate of x0; and after all
SCALES = 1, 2, 4        # of the guidance that --watch compares


def parse(argv=None):
    """Command line -> arguments. Raises UserError for values that are not allowed."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", metavar="run", nargs="+", help="a run folder, such as out/tiny; or several")
    add("--prompt", help="a recording to continue, or none: silence [held-out contexts]")
    add("--seconds", type=float, help="seconds to generate [one window]")
    add("--num", type=int, help="number of continuations [1; 4 without --prompt]")
    add("--cfg", type=float, default=CFG, help=f"guidance scale; 1: no guidance [{CFG:g}]")
    add("--steps", type=int, default=STEPS, help=f"network evaluations per window [{STEPS}]")
    add("--sampler", default="dpm", choices=[*SOLVERS], help="DPM-Solver++(2M) or DDIM [dpm]")
    add("--seed", type=int, default=0, help="another seed gives another continuation [0]")
    add("--best-of", type=int, default=1, help="of so many continuations, keep the likeliest [1]")
    add("--device", default="auto", help="cuda, mps, cpu; auto: the first that is available")
    add("--watch", action="store_true", help="show on the page how one continuation comes about")
    add("--out", type=Path,
        help="WAV file to write, or a folder for it; of several, x.wav becomes x-1.wav, ... "
             "[RUN/continued.wav]; of several runs, a folder [A-vs-B beside A]")
    arguments = parser.parse_intermixed_args(argv)

    others = arguments.num or arguments.seconds or arguments.out or arguments.best_of > 1
    if arguments.watch and (others or arguments.runs[1:]):
        raise UserError("--watch is for one run, without --num, --seconds, --best-of and --out")
    if arguments.num is None:
        arguments.num = 1 if arguments.prompt or arguments.watch else 4
    if arguments.seconds is not None and not 0 < arguments.seconds < math.inf:
        raise UserError("--seconds must be more than 0")
    numbers = arguments.num > 0 and arguments.steps > 0 and arguments.seed >= 0
    if not (numbers and math.isfinite(arguments.cfg)):
        raise UserError("--num and --steps must be at least 1, --seed at least 0, --cfg a number")
    if arguments.prompt not in (None, "none") and not Path(arguments.prompt).is_file():
        raise UserError(f"{arguments.prompt}: no such file")
    return arguments


def output_files(arguments):
    """The WAV files to write, a list for each run. Raises UserError if they can't be, or if one is
    the prompt."""
    path, runs = arguments.out or Path(arguments.runs[0]), arguments.runs
    if len(runs) > 1:
        if not arguments.out:
            path = path.with_name("-vs-".join(Path(run).resolve().name for run in runs))
        if path.is_file() or not path.parent.is_dir():
            raise UserError(f"--out {path}: for several runs this is a folder, in one that exists")
        return [[path / f"{i + 1}-{k + 1}.wav" for i in range(arguments.num)]
                for k in range(len(runs))]

    if path.is_dir() or not arguments.out:                    # no folder: load_run will say so
        path = path / "continued.wav"
    if path.suffix.lower() != ".wav":
        raise UserError(f"--out {path}: only .wav files can be written")
    if arguments.out and not path.parent.is_dir():
        raise UserError(f"--out {path}: no folder {path.parent}")
    files = [path]
    if arguments.num > 1:
        files = [path.with_stem(f"{path.stem}-{i}") for i in range(1, arguments.num + 1)]
    for file in files:
        is_file = arguments.prompt not in (None, "none")
        if is_file and file.exists() and file.samefile(arguments.prompt):
            raise UserError(f"--out {file} is the prompt itself; choose another --out")
    return [files]


def contexts(arguments, config, hears):
    """The speech to continue: waves (num, N) that a model sees which hears so many frames, and what
    comes before (M,). A prompt shorter than a context has silence before it."""
    samples, prompt = config.ctx_frames * HOP, arguments.prompt
    if prompt is None:
        examples = load(Path(arguments.runs[0]) / "autoencoder.pt")["examples"]
        chosen = torch.arange(arguments.num) % len(examples)
        return examples[chosen, :samples].float() / 32767, torch.zeros(0)

    wave = torch.zeros(0)
    if prompt != "none":
        wave = load_audio(prompt)
        if wave.abs().max() < SILENT:
            print(f"{prompt} is silent: starting from silence")
            wave = torch.zeros(0)
        elif len(wave) < samples:
            print(f"{prompt}: padded with {(samples - len(wave)) / RATE:.1f} s of silence in front")
    wave = F.pad(wave, (max(0, samples - len(wave)), 0))

    # The end of the prompt is what is continued, so the incomplete frame is cut from its start.
    wave, heard = wave[len(wave) % HOP:], hears * HOP
    return wave[-heard:].repeat(arguments.num, 1), wave[:-heard]


def speak(arguments, run, waves, before, seconds, sample):
    """Continue waves (num, N) by some seconds: (num, N'). They fade in after `before` (M,)."""
    _, model, autoencoder = run
    context = autoencoder.encode(waves.to(autoencoder.mel_stats.device))      # (num, T, C)
    continuation = sample(
        model, context, max(1, round(seconds * FRAME_RATE)), steps=arguments.steps,
        cfg=arguments.cfg, sampler=arguments.sampler, seed=arguments.seed, progress=GENERATING)
    decoded = autoencoder.decode(torch.cat([context, continuation], dim=1)).cpu()

    # The recording before the context, which is copied, fades into the decoded context.
    if len(before):
        fade = torch.linspace(0, 1, FADE)
        decoded[:, :FADE] = fade * decoded[:, :FADE] + (1 - fade) * waves[:, :FADE]
    return decoded


def watch(arguments, model, context):
    """Frames of one continuation of `context` (1, T, C) in the making, {file name: (caption,
    frames)}: some estimates of x0, and what the same noise becomes under other guidance."""
    steps, sampler, seed = arguments.steps, arguments.sampler, arguments.seed
    angles, estimates = levels(model.config, steps), []

    def predict(x, phi, estimate):
        estimates.append(guided(model, context, arguments.cfg, x, phi, estimate))
        return estimates[-1]

    # The same noise as in `sample`, whose result is the last estimate.
    shape = 1, model.config.gen_frames, model.config.channels
    noise = keyed_noise(seed, "sample 0", 0, shape, context.device)
    SOLVERS[sampler](predict, noise, angles)

    shown = {}
    for i, (phi, x0) in enumerate(zip(angles, estimates), 1):
        if i in SHOWN or i == steps:
            log_snr = -2 * math.log(math.tan(phi))
            shown[f"watch-{i:02}.wav"] = f"after {i} of {steps}\nlog-SNR {log_snr:.1f}", x0
    for scale in SCALES:
        x0 = sample(model, context, None, steps, scale, sampler, seed)
        shown[f"watch-cfg-{scale}.wav"] = f"guidance {scale}", x0
    return shown


def main():
    arguments = parse()
    if arguments.best_of != 1 and not lab("best"):
        raise UserError("--best-of needs lab/best.py beside cdslm.py")
    speaker = sample if arguments.best_of == 1 else lab("best").best_of(arguments.best_of)
    files, written = output_files(arguments), {}
    place = files[0][0].parent
    runs = [load_run(run, arguments.device) for run in arguments.runs]
    config, model, autoencoder = runs[0]
    waves, before = contexts(arguments, config, max(model.hears for _, model, _ in runs))
    context_seconds = (len(before) + waves.shape[1]) / RATE
    seconds = arguments.seconds or config.gen_frames / FRAME_RATE

    if arguments.watch:
        if not isinstance(model, MMDiT):
            raise UserError("--watch is for runs of cdslm.py")
        context = autoencoder.encode(waves.to(autoencoder.mel_stats.device))
        shown = watch(arguments, model, context)
        for old in place.glob("watch-*.wav"):
            old.unlink()
        for name, (caption, x0) in shown.items():
            save_audio(place / name, autoencoder.decode(torch.cat([context, x0], dim=1))[0])
            written[place / name] = caption
    else:
        place.mkdir(exist_ok=True)
        for name, run, own in zip(arguments.runs, runs, files):
            sounds = speak(arguments, run, waves, before, seconds, speaker)
            for i, (file, wave) in enumerate(zip(own, sounds), 1):
                save_audio(file, torch.cat([before, wave]))
                written[file] = f"{i}: {name}" if len(runs) > 1 else file.name
                print(f"{file}: {context_seconds:.1f} s of context, then {seconds:.1f} s generated")

    if len(runs) > 1 or place.samefile(arguments.runs[0]):
        command = shlex.join(["python", "sample.py", *sys.argv[1:]])
        open_page(place, config, command, written, context_seconds, arguments.runs)


if __name__ == "__main__":
    cli(main)
