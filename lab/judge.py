"""judge: the honest measures of a model of toy speech, for studies of many models (`lab/ablate.py`,
`lab/scaling.py`). One run is judged by `eval_pjsd.py`.
"""
import contextlib
import math

import torch

import eval_pjsd
from cdslm import CFG, FRAME_RATE, STEPS, UserError, autocast, log_mel, sample
from lab import markov, pair_speech, pairs, quality
from lab.listener import batched, language_kept, load_listener, speak
from lab.sides import CONTEXTS, REFERENCE, decode, log_mel_of
from lab.topics import toy_speech

ASKED, NUMBER = ("word", "place", "order"), 100               # kinds of pairs; pairs of each
WINDOWS = 5                            # one after another, to see what is lost on the way
HEARD = 10                             # clips of a window each that DNSMOS hears


class Judge:
    """judge(model) -> {pjsd, floor: five values each; word_rate, runs_2, runs_3, pair_bits,
    language_kept; late_words, late_language: the same in the last of five windows; mel: Fréchet
    distance of log-mel; dnsmos; word, place, order: shares of pairs in which the true utterance has
    the smaller error}.

    Words and distances are read from the generated frames, without the decoder. Contexts,
    reference, pairs and noise are the same for all models."""

    def __init__(self, config, autoencoder, device, dtype, minutes):
        self.autoencoder, self.device, self.dtype = autoencoder, device, dtype
        self.toy = toy_speech(config)
        self.listener = load_listener()
        ctx, gen = config.ctx_frames, config.gen_frames
        clips = max(1, round(minutes * 60 * FRAME_RATE / gen))

        waves, spoken = speak(self.toy, CONTEXTS, clips, ctx + gen, "contexts", context=ctx)
        frames = batched(lambda part: autoencoder.encode(part.to(device)), waves)
        self.contexts = frames[:, :ctx]
        self.languages = [u.language for u in spoken]
        waves, _ = speak(self.toy, REFERENCE, 3 * clips, gen, "reference")
        mel = batched(log_mel, waves)
        self.reference = self.listener.hear(mel)["clips"]
        self.stats = autoencoder.mel_stats.cpu()
        self.reference_frames = quality.mel_frames(mel, self.stats)
        self.pairs = {}
        for kind in ASKED:
            with contextlib.suppress(UserError):              # the window is too short for it
                self.pairs[kind] = pair_speech.make_pairs(self.toy, kind, NUMBER, ctx, gen)

    def __call__(self, model, steps=STEPS, cfg=CFG):
        gen, few = model.config.gen_frames, -(-len(self.contexts) // WINDOWS)
        with autocast(self.device, self.dtype):
            frames = [sample(model, part, steps=steps, cfg=cfg, seed=i)
                      for i, part in enumerate(self.contexts.split(50))]
            later = sample(model, self.contexts[:few], WINDOWS * gen, steps, cfg)[:, -gen:]
            right = {kind: self.share_right(model, asked) for kind, asked in self.pairs.items()}
        frames = torch.cat(frames).float()
        mel, clips = self.hear(frames)
        _, last = self.hear(later.float())

        compared = eval_pjsd.compare(clips, self.reference)
        words = markov.score(self.toy, clips, self.languages)
        late = markov.score(self.toy, last, self.languages)
        return {
            "pjsd": compared["pjsd"], "floor": compared["floor"], **words,
            "language_kept": language_kept(self.toy, clips, self.languages),
            "late_words": late["word_rate"],
            "late_language": language_kept(self.toy, last, self.languages),
            "mel": quality.frechet(
                quality.mel_frames(mel.cpu(), self.stats), self.reference_frames),
            "dnsmos": self.opinion(frames[:HEARD]), **right}

    def hear(self, frames):
        """Frames (B, T, C) -> log-mel (B, T, 80) and the phones that are recognised in it."""
        mel = log_mel_of(self.autoencoder, frames)
        return mel, self.listener.hear(mel)["clips"]

    def share_right(self, model, asked):
        """Share of Pairs whose true utterance the model finds likelier."""
        errors, nulls = pairs.ask(model, self.autoencoder, asked, draws=2)
        return pairs.accuracy(errors, nulls, [pair.case for pair in asked])["accuracy"]

    def opinion(self, frames):
        """Mean overall DNSMOS of decoded frames; NaN without the package."""
        try:
            scores = quality.dnsmos(decode(self.autoencoder, frames))
        except UserError:
            return math.nan
        return float(scores["DNSMOS overall"].mean())
