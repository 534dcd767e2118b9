"""decided: at which noise level does a model know what it will generate?

The model predicts x0 from a true continuation with noise on it; the toy recogniser reads language,
speaker, phones and words from the prediction. `python eval_pjsd.py RUN --decided` draws it.
"""
import math

import numpy as np
import torch
from tqdm import tqdm

from cdslm import UserError, guided, keyed_noise
from lab.figures import new_figure, save_figure
from lab.listener import batched, guess_language, nearness, spans, voice_truth
from lab.markov import words_in
from lab.sides import log_mel_of

LOG_SNRS = range(-10, 9, 2)


def word_frames(frames, clip, language):
    """The word under each frame (T,), -1: none, of recognised frames and the phones in them."""
    words = np.full(len(frames), -1)
    for (_, start, stop), word in zip(spans(frames), words_in(clip, language)):
        words[start:stop] = word
    return words


def decided(predict, listener, toy, x0, spoken):
    """{log_snr, language, speaker, phone, word: list over noise levels}: accuracy of what is read
    from the log-mel (B, T, 80) = predict(xt, phi) of x0 (B, T, C) and noise. Languages are told by
    their phones, speakers count by `nearness`, phones and words by frames."""
    phones = np.stack([u.phone for u in spoken])
    words = np.stack([u.word for u in spoken])
    languages = [toy.languages[u.language] for u in spoken]
    voices = voice_truth(spoken)[:, :2]
    eps = torch.stack([keyed_noise(0, "decided", i, x0.shape[1:], x0.device)
                       for i in range(len(x0))])

    rows = []
    for level in tqdm(LOG_SNRS, desc="when is it decided", unit="level", leave=False):
        phi = math.atan(math.exp(-level / 2))
        found = listener.hear(predict(math.cos(phi) * x0 + math.sin(phi) * eps, phi))
        guesses = guess_language(toy, found["clips"])
        found_words = np.stack([
            word_frames(*each) for each in zip(found["frames"], found["clips"], languages)])
        rows.append([
            level,
            (guesses == [u.language for u in spoken]).mean(),
            nearness(found["voice"][:, :2], voices),
            (found["frames"] == phones)[phones > 0].mean(),
            (found_words == words)[words >= 0].mean()])
    names = "log_snr", "language", "speaker", "phone", "word"
    return dict(zip(names, np.array(rows, float).T.tolist()))


def what_is_decided(model, autoencoder, listener, toy, frames, spoken):
    """`decided` of a model for utterances (B, Tc + Tg, C), without guidance and self-conditioning.
    """
    n = model.config.ctx_frames

    def estimate(pairs, phi):
        return guided(model, pairs[:, :n], 1, pairs[:, n:], phi, None)

    def predict(xt, phi):
        pairs = torch.cat([frames[:, :n], xt], dim=1)
        x0 = batched(lambda part: estimate(part, phi), pairs, size=32)
        return log_mel_of(autoencoder, x0)
    return decided(predict, listener, toy, frames[:, n:], spoken)


def draw_decided(rows, path):
    """Draw it, if matplotlib is there; says where."""
    try:
        axes = new_figure(6.4, 4).subplots()
    except UserError as error:
        return f"({error})"
    for name, marker in zip(list(rows)[1:], "osd^"):
        axes.plot(rows["log_snr"], rows[name], marker=marker, label=name)
    axes.set(ylim=(0, 1.02), ylabel="accuracy of what it predicts")
    axes.set(xlabel="log-SNR of what the model sees")
    axes.legend(frameon=False)
    save_figure(axes.figure, path)
    return f"drawn in {path}"
