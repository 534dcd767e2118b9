"""speaking: what the speech of toy runs costs, and how it fails.

    python -m lab.speaking out/a out/b out/c                  runs of any arm, beside each other
    python -m lab.speaking out/a out/b --plot speaking.png    and a picture of one continuation

For each number of evaluations: FLOPs, CPU seconds (of all threads together) until a second of
speech is there, how many times faster than listening, and the words in it. The words are read from
the frames, without the decoder, so its time is not in these figures. Then the mistakes: in which
second after the context, and how far from a word.
"""
import math
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from cdslm import CFG, FRAME_RATE, STEPS, Parser, UserError, cli, keyed_noise, load_run
from lab import markov
from lab.clips import grouped, pieces_of
from lab.figures import new_figure, save_figure
from lab.listener import batched, load_listener, spans, speak
from lab.sides import CONTEXTS, continuations, log_mel_of
from lab.tokens import flops_of
from lab.topics import toy_speech
from lab.toyspeech import SYMBOLS

EVALUATIONS = 6, 12, 24, STEPS
TIMES = 3                              # the best of so many timings


# --------------------------------------------------------------------------------------------------
# What it costs.

def cost(model, ctx, evaluations):
    """FLOPs a second of speech; CPU seconds until its first second is there; seconds of speech that
    a second of computing makes. One context (1, Tc, C), one continuation."""
    config = model.config
    seconds = config.gen_frames / FRAME_RATE
    noise = keyed_noise(0, "cost", 0, (config.gen_frames, config.channels), ctx.device)[None]

    def speak_until(frames):
        return model.continuation(ctx, noise[:, :frames], evaluations, CFG, "dpm")

    def fastest(frames):
        times = []
        for _ in range(TIMES):
            begun = time.process_time()
            speak_until(frames)
            times.append(time.process_time() - begun)
        return min(times)

    flops = flops_of(lambda: speak_until(config.gen_frames)) / seconds
    # MM-DiT makes a window at once; the causal models may stop after a second.
    first = min(FRAME_RATE, config.gen_frames) if hasattr(model, "errors") else config.gen_frames
    return flops, fastest(first), seconds / fastest(config.gen_frames)


# --------------------------------------------------------------------------------------------------
# How it fails.

def distance(group, word):
    """How many phones must be changed, added or left out to make one of the other (Levenshtein)."""
    row = list(range(len(word) + 1))
    for i, phone in enumerate(group, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(word, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (phone != other))
    return row[-1]


def mistakes(clips, starts, languages, seconds):
    """Clips of phones, the frames where these start, and their Languages -> the share of phones in
    words in each second, and of the others the share that is one phone away from a word."""
    right, all_phones = [0] * seconds, [0] * seconds
    near = wrong = 0
    for clip, begins, language in zip(clips, starts, languages):
        words = [markov.symbols_of(word) for word in language.words]
        for word, start, stop in pieces_of(clip, language):
            for begin in begins[start:stop] if word != markov.EDGE else ():
                all_phones[begin // FRAME_RATE] += 1
                right[begin // FRAME_RATE] += word >= 0
        # Without the first and the last group, which may be cut in two.
        for text, complete in grouped(clip, pieces_of(clip, language))[1:-1]:
            if not complete:
                wrong += len(text)
                near += len(text) * any(distance(text, word) == 1 for word in words)
    shares = [a / b if b else math.nan for a, b in zip(right, all_phones)]
    return shares, near / wrong if wrong else math.nan


# --------------------------------------------------------------------------------------------------
# Runs, tables and a picture.

def open_run(folder, device, minutes):
    """A toy run, and encoded speech that it is to continue: contexts with what follows in truth,
    (B, T, C), and its languages."""
    config, model, autoencoder = load_run(folder, device)
    if config.data != "toy" or config.toy_grammar == "topics":
        raise UserError(f"{folder} was not trained on the default toy speech")
    toy = toy_speech(config)
    count = max(1, round(minutes * 60 * FRAME_RATE / config.gen_frames))
    ctx, gen = config.ctx_frames, config.gen_frames
    waves, spoken = speak(toy, CONTEXTS, count, ctx + gen, "contexts", context=ctx)
    frames = batched(lambda part: autoencoder.encode(part.to(model.silence.device)), waves)
    numbers = [u.language for u in spoken]
    return SimpleNamespace(
        name=Path(folder).name, config=config, model=model, autoencoder=autoencoder, frames=frames,
        toy=toy, numbers=numbers, languages=[toy.languages[number] for number in numbers])


def hear(run, listener, frames):
    """Frames (B, T, C) -> clips of phones, and the frames where these start."""
    mel = log_mel_of(run.autoencoder, frames.float())
    found = [spans(row) for row in listener.hear(mel)["frames"]]
    return ([[SYMBOLS[phone] for phone, _, _ in row] for row in found],
            [[start for _, start, _ in row] for row in found])


def print_costs(runs, listener):
    """Print what the runs' speech costs. Returns what they said with the most evaluations."""
    last = []
    print("| run | evaluations | GFLOPs a second of speech | first second after, CPU s | "
          "times real time | words | in 3 or more |\n" + "|---" * 7 + "|")
    for run in runs:
        ctx = run.frames[:1, :run.config.ctx_frames]
        without_noise = hasattr(run.model, "temperature")     # codes are drawn, not denoised
        for evaluations in EVALUATIONS[-1:] if without_noise else EVALUATIONS:
            said = continuations(run.model, run.frames, evaluations)
            clips, _ = hear(run, listener, said)
            found = markov.score(run.toy, clips, run.numbers)
            flops, first, faster = cost(run.model, ctx, evaluations)
            print(f"| {run.name} | {'-' if without_noise else evaluations} | {flops / 1e9:.2f} | "
                  f"{first:.2f} | {faster:.1f} | {found['word_rate']:.3f} | "
                  f"{found['runs_3']:.3f} |")
        last.append(said)
    return last


def print_mistakes(runs, said, listener):
    """Print where what the runs said is wrong, and how far from words; beside true speech."""
    seconds = max(-(-run.config.gen_frames // FRAME_RATE) for run in runs)
    heads = " | ".join(f"second {i + 1}" for i in range(seconds))
    print(f"\n| words in | {heads} | of the rest, one phone from a word |\n"
          + "|---" * (seconds + 2) + "|")
    for run, generated in zip(runs, said):
        true = run.frames[:, run.config.ctx_frames:]
        for name, frames in ((f"true, of {run.name}", true), (run.name, generated)):
            heard = hear(run, listener, frames)
            shares, near = mistakes(*heard, run.languages, seconds)
            cells = " | ".join(f"{share:.3f}" for share in [*shares, near])
            print(f"| {name} | {cells} |")


def draw(figure, runs, said, listener, item=0):
    """One context with its true continuation and those of the runs: log-mel, and below it what is
    heard, words in blue, the rest in red."""
    rows = [("true", runs[0], runs[0].frames[:, runs[0].config.ctx_frames:])]
    rows += [(run.name, run, generated) for run, generated in zip(runs, said)]
    for axes, (name, run, frames) in zip(figure.subplots(len(rows), 1, sharex=True), rows):
        ctx = run.config.ctx_frames
        shown = torch.cat([run.frames[item:item + 1, :ctx], frames[item:item + 1].float()], dim=1)
        mel = run.autoencoder.to_mel(shown)[0].T.cpu().numpy()
        axes.imshow(mel, origin="lower", aspect="auto", cmap="magma", interpolation="nearest",
                    extent=(-ctx / FRAME_RATE, frames.shape[1] / FRAME_RATE, 0, len(mel)))
        axes.axvline(0, color="white", linestyle=":")
        axes.set(yticks=[], ylabel=name)
        clips, starts = hear(run, listener, frames[item:item + 1])
        at = 0
        for text, complete in grouped(clips[0], pieces_of(clips[0], run.languages[item])):
            axes.text(starts[0][at] / FRAME_RATE, -4, text, va="top", fontsize=8,
                      color="C0" if complete else "C3", clip_on=False)
            at += len(text)
    axes.set_xlabel("seconds after the context")
    axes.tick_params(axis="x", pad=14)


def main():
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", help="run folders of toy speech")
    parser.add_argument("--minutes", type=float, default=6.0, help="of speech a row [6]")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu [auto]")
    parser.add_argument("--plot", type=Path, help="where to keep a picture of one continuation")
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < math.inf:
        raise UserError("--minutes must be more than 0")

    figure = new_figure(11, 1.5 * (1 + len(arguments.runs))) if arguments.plot else None
    runs = [open_run(folder, arguments.device, arguments.minutes) for folder in arguments.runs]
    listener = load_listener()
    said = print_costs(runs, listener)
    print_mistakes(runs, said, listener)
    if figure:
        draw(figure, runs, said, listener)
        save_figure(figure, arguments.plot)


if __name__ == "__main__":
    cli(main)
