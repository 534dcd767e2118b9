"""judge: the honest measures of a model of toy speech, without its decoder. For the studies that
judge many models (`lab/ablate.py`, `lab/scaling.py`); one run is judged by `eval_pjsd.py`.
"""
import torch

import eval_pjsd
from cdslm import CFG, FRAME_RATE, STEPS, autocast, log_mel, sample
from lab import markov, pair_speech, pairs
from lab.listener import batched, language_kept, load_listener, speak
from lab.sides import CONTEXTS, REFERENCE
from lab.toyspeech import ToySpeech

ASKED = "word", "place", "order"       # kinds of pairs
NUMBER = 100                           # of each kind


class Judge:
    """judge(model) -> {pjsd: five values, floor: five, word_rate, runs_2, runs_3, pair_bits,
    language_kept; word, place, order: shares of pairs in which the true one has the smaller error}.

    What a model generates after held-out contexts is recognised from its frames, so that no decoder
    is judged. Contexts, reference, pairs and noise are the same for all models."""

    def __init__(self, config, autoencoder, device, dtype, minutes):
        self.autoencoder, self.device, self.dtype = autoencoder, device, dtype
        self.toy = ToySpeech(config.toy_languages, config.toy_words)
        self.listener = load_listener()
        ctx, gen = config.ctx_frames, config.gen_frames
        clips = max(1, round(minutes * 60 * FRAME_RATE / gen))

        waves, spoken = speak(self.toy, CONTEXTS, clips, ctx + gen, "contexts", context=ctx)
        frames = batched(lambda part: autoencoder.encode(part.to(device)), waves)
        self.contexts = frames[:, :ctx]
        self.languages = [u.language for u in spoken]
        waves, _ = speak(self.toy, REFERENCE, 3 * clips, gen, "reference")
        self.reference = self.listener.hear(batched(log_mel, waves))["clips"]
        self.pairs = {kind: pair_speech.make_pairs(self.toy, kind, NUMBER, ctx, gen)
                      for kind in ASKED}

    def __call__(self, model, steps=STEPS, cfg=CFG):
        with autocast(self.device, self.dtype):
            frames = [sample(model, part, steps=steps, cfg=cfg, seed=i)
                      for i, part in enumerate(self.contexts.split(50))]
            right = {kind: self.share_right(model, asked) for kind, asked in self.pairs.items()}
        mel = self.autoencoder.to_mel(torch.cat(frames).float())
        mean, std = self.autoencoder.mel_stats
        clips = self.listener.hear(mel * std + mean)["clips"]

        compared = eval_pjsd.compare(clips, self.reference)
        words = markov.score(self.toy, clips, self.languages)
        language = language_kept(self.toy, clips, self.languages)
        return {"pjsd": compared["pjsd"], "floor": compared["floor"], **words,
                "language_kept": language, **right}

    def share_right(self, model, asked):
        """Share of Pairs whose true utterance the model finds likelier."""
        errors, _ = pairs.ask(model, self.autoencoder, asked, draws=2)
        chosen = pairs.score(errors[:, 1]) - pairs.score(errors[:, 0])
        return float(pairs.share_right(chosen))
