"""recognizers: speech to phones. `recogniser(name)` gives phones(wave (N,), rate) -> phones.

    toy         the toy recogniser of lab/listener.py
    hama        English; the model is in the package (pip install hama)
    hf:MODEL    a CTC phoneme model from the Hugging Face hub or from a folder
    text        none: the phones are written in .txt files
"""
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from cdslm import AUDIO_FILES, RATE, UserError, load_audio, log_mel, reason, resample
from lab.listener import load_listener

# What is known of the recognisers' errors.
ERRORS = {"text": "phones as written",
          "hama": "14 % of phones wrong in read English, 41 % in lone digits"}


def quiet_cuts(wave, rate):
    """Samples (N,) -> pieces of at most 12 s, each cut at the quietest 50 ms after its sixth
    second."""
    step = rate // 20
    while len(wave) > 12 * rate:
        loudness = wave[6 * rate:12 * rate].unfold(0, step, step).square().mean(1)
        cut = 6 * rate + int(loudness.argmin()) * step + step // 2
        yield wave[:cut]
        wave = wave[cut:]
    yield wave


def huggingface(name):
    """A CTC phoneme model -> its rate, and what turns a piece (N,) at that rate into phones: the
    likeliest token of each frame, without repeats, blanks and word boundaries."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC
    from transformers.utils import cached_file
    model = AutoModelForCTC.from_pretrained(name).eval()
    features = AutoFeatureExtractor.from_pretrained(name)
    vocabulary = json.loads(Path(cached_file(name, "vocab.json")).read_text(encoding="utf-8"))
    blank = model.config.pad_token_id
    symbols = {i: symbol for symbol, i in vocabulary.items()
               if i != blank and symbol[:1] not in "|<["}

    @torch.no_grad()
    def recognise(piece):
        inputs = features(piece.numpy(), sampling_rate=features.sampling_rate, return_tensors="pt")
        tokens = model(**inputs).logits[0].argmax(1).unique_consecutive().tolist()
        return [symbols[i] for i in tokens if i in symbols]
    return features.sampling_rate, recognise


def hama():
    """English phones, at 16 kHz."""
    from hama import ASRModel
    model, rate = ASRModel(), 16_000
    return rate, lambda piece: model(piece.numpy(), rate).phonemes


def recogniser(name):
    """phones(wave, rate) by its name on the command line; none for text."""
    if name == "text":
        return None
    if name == "toy":
        listener = load_listener()
        return lambda wave, rate: listener.hear(log_mel(resample(wave, rate)[None]))["clips"][0]
    if name != "hama" and not name.startswith("hf:"):
        raise UserError(f"unknown --recognizer {name}; choose toy, hama, hf:MODEL or text")

    try:
        own_rate, recognise = hama() if name == "hama" else huggingface(name[3:])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        package = "hama, which has no library for Windows" if name == "hama" else "transformers"
        raise UserError(f"--recognizer {name} can't run ({reason(error)}); it needs: "
                        f"pip install {package}") from None

    def phones(wave, rate):
        found = []
        for piece in quiet_cuts(resample(wave, rate, own_rate), own_rate):
            if len(piece) >= own_rate // 20:
                found.extend(recognise(piece))
        return found
    return phones


def read_folder(folder, phones):
    """Every file of a folder, an utterance each -> clips of phones, and seconds of speech. Without
    `phones`: text, and NaN."""
    folder, clips, seconds = Path(folder), [], 0.0 if phones else math.nan
    kind, suffixes = ("audio", AUDIO_FILES) if phones else ("text", {".txt"})
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    if not files:
        missing = f"no {kind} files in it" if folder.is_dir() else "no such folder"
        raise UserError(f"{folder}: {missing}")

    for path in tqdm(files, desc=f"recognising {folder}", unit="file", leave=False):
        try:
            if phones:
                wave = load_audio(path)
                clips.append(phones(wave, RATE))
                seconds += len(wave) / RATE
            else:
                clips.append(path.read_text(encoding="utf-8").split())
        except (UserError, OSError, UnicodeDecodeError) as error:
            why = reason(error).removeprefix(f"{path}: ")
            tqdm.write(f"skipped {path}: {why}", file=sys.stderr)
    if not clips:
        raise UserError(f"{folder}: none of its {len(files)} files can be read")
    return clips, seconds
