"""blind: can you tell generated from true speech? A test on the listening page of a run.

    python -m lab.blind out/tiny        then open out/tiny/index.html

Twelve clips, RUN/blind-01.wav and so on, begin with held-out speech. Six of the continuations are
generated; six are the true ones, encoded and decoded, so that the decoder alone gives no clip away.
The page plays them in random order, and counts.
"""
from pathlib import Path

import torch

from cdslm import GENERATING, Parser, cli, load, load_run, open_page, sample, save_audio

CLIPS = 12


def main():
    parser = Parser(__doc__)
    parser.add_argument("run", type=Path, help="a run folder, such as out/tiny")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other continuations [0]")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu [auto]")
    arguments = parser.parse_args()
    folder = arguments.run
    config, model, autoencoder = load_run(folder, arguments.device)

    examples = load(folder / "autoencoder.pt")["examples"]
    waves = examples[torch.arange(CLIPS) % len(examples)].float() / 32767
    frames = autoencoder.encode(waves.to(autoencoder.mel_stats.device))       # (CLIPS, T, C)
    context = frames[:CLIPS // 2, :config.ctx_frames]
    continuation = sample(model, context, seed=arguments.seed, progress=GENERATING)
    frames[:CLIPS // 2, config.ctx_frames:] = continuation

    written = {}
    for i, wave in enumerate(autoencoder.decode(frames)):
        file = folder / f"blind-{i + 1:02}.wav"
        save_audio(file, wave)
        written[file] = "generated" if i < CLIPS // 2 else "true"
    open_page(folder, config, f"python -m lab.blind {folder}", written, config.ctx_seconds)


if __name__ == "__main__":
    cli(main)
