"""clips: the sounds of a folder for the listening page: their pictures, and what is said in them.

    python -m lab.page out/tiny        draws them, and writes down what is said

Of toy speech these are the phones that the toy recogniser hears, grouped; of other speech English
words, where the recogniser of lab/words.py is installed. A clip is a dict; those of a folder are
kept in its clips.json, so that only new sounds are drawn and transcribed:

    caption, context      a text, and seconds of context
    digest                of the file
    said                  if there is a recogniser, a transcript, a dict:
      language                  language A, language B, ... of toy speech, or English
      context, continuation     lists of [text, complete]: is it a complete word of the language?
      share                     of the continuation's phones that are inside complete words, as
                                eval_pjsd.py counts them (word_rate); of English, share of its words
                                that are in the vocabulary of the stories; None without any
"""
import hashlib
import json
import time

from cdslm import HOP, RATE, UserError, cache_root, log_mel, read_audio, read_json, replacing
from lab.listener import SHORTEST, guess_language, load_listener
from lab.markov import EDGE, NO_WORD, parse
from lab.pictures import draw
from lab.stories import GRAMMARS, allowed
from lab.topics import toy_speech
from lab.toyspeech import VERSION
from lab.words import recogniser, stories_of, tokens

HASTE, PATIENCE = 4, 60           # seconds to transcribe: at the end of training, after a command
SILENT = 1e-3                     # sound that stays below this, -60 dBFS, has no words


def examine(folder, notes, config, run, patient):
    """Draw and transcribe what is new in a folder -> {file name: clip}, first those of `notes`,
    {file name: (caption, seconds of context)}. Sounds that cannot be read are left out. `config`
    and `run` belong to the run that made them; for `patient`, see `transcriber`."""
    try:
        known = {name: dict(clip) for name, clip in read_json(folder / "clips.json").items()}
    except (UserError, AttributeError, TypeError, ValueError):
        known = {}                                            # a new folder, or a damaged file
    clips = look(folder, notes, known)
    transcribe_all(folder, clips, config, run, patient)
    with replacing(folder / "clips.json") as temporary:
        temporary.write_text(json.dumps(clips, indent=1) + "\n")
    return clips


def look(folder, notes, known):
    """The clips of a folder, each with a picture. What is `known` of a file that has not changed is
    kept."""
    clips = {}
    others = sorted(folder.glob("*.wav"), key=lambda path: (len(path.name), path.name))
    for name in dict.fromkeys([*notes, *(path.name for path in others)]):
        path, old = folder / name, known.get(name, {})
        picture = path.with_suffix(".mel.png")
        caption, context = old.get("caption", name), old.get("context", 0.0)
        if name in notes:
            caption, context = notes[name]
        try:
            digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            clip = {"caption": caption, "context": context, "digest": digest}
            if picture.exists() and clip.items() <= old.items():
                clip = old
            else:
                draw(picture, next(read_audio(path)), context)
        except (UserError, OSError, StopIteration):
            continue
        clips[name] = clip
    return clips


def transcribe_all(folder, clips, config, run, patient):
    """Add what is said to the clips that lack it, as far as there is time."""
    lacking = [name for name, clip in clips.items() if "said" not in clip]
    transcribe = transcriber(config, run, patient) if lacking else None
    end = time.monotonic() + (PATIENCE if patient else HASTE)
    for name in lacking:
        if transcribe and time.monotonic() < end:
            wave = next(read_audio(folder / name))            # its first minute
            clips[name]["said"] = transcribe(wave, clips[name]["context"])


def transcriber(config, run, patient):
    """transcribe(wave (N,), seconds of context) -> transcript, for the sounds of a run; None where
    there is no recogniser. A `patient` caller waits a minute, once, while the toy recogniser is
    trained."""
    try:
        if config.data != "toy":
            return english_transcriber(recogniser("tiny.en"), run)
        if patient or any(cache_root().glob(f"listener-{VERSION}-*.pt")):
            return toy_transcriber(config)
    except (UserError, OSError):
        pass                                                  # no package, no cache
    return None


def split(wave, context):
    """Samples (N,) -> those of the context, those of the continuation."""
    return wave.tensor_split([round(context * RATE)])


# --------------------------------------------------------------------------------------------------
# Toy speech.

def toy_transcriber(config):
    """The transcriber of toy speech. The language is the one whose phones fit the context best, or
    without context, the continuation."""
    toy, listener = toy_speech(config), load_listener()

    def phones(wave):
        if len(wave) < SHORTEST * HOP:
            return []
        return listener.hear(log_mel(wave[None]))["clips"][0]

    def transcribe(wave, seconds):
        context, continuation = map(phones, split(wave, seconds))
        number = max(0, int(guess_language(toy, [context or continuation])[0]))
        language = toy.languages[number]
        pieces = pieces_of(continuation, language)
        inside = sum(stop - start for word, start, stop in pieces if word >= 0)
        outside = sum(stop - start for word, start, stop in pieces if word == NO_WORD)
        return {
            "language": f"language {chr(ord('A') + number)}",
            "context": grouped(context, pieces_of(context, language)),
            "continuation": grouped(continuation, pieces),
            "share": inside / (inside + outside) if inside + outside else None}
    return transcribe


def pieces_of(clip, language):
    """A clip of phones -> [(word, start, stop)], cut as the judge cuts it: the first and the last
    phone, which may be cut in two, and pieces of words beside them are an EDGE."""
    last = len(clip) - 1
    if last < 1:
        return [(EDGE, 0, 1)] if clip else []
    inner = parse(clip[1:-1], language, edges=True)
    inner = [(word, start + 1, stop + 1) for word, start, stop in inner]
    return [(EDGE, 0, 1), *inner, (EDGE, last, last + 1)]


def grouped(clip, pieces):
    """Phones and their pieces -> [[text, complete]]: the phones of a word together, and those
    between two words."""
    groups = []
    for word, start, stop in pieces:
        text, complete = "".join(clip[start:stop]), word >= 0
        if groups and not complete and not groups[-1][1]:
            groups[-1][0] += text
        else:
            groups.append([text, complete])
    return groups


# --------------------------------------------------------------------------------------------------
# English.

def vocabulary(run):
    """The words, in lower case, of the stories that a run was trained on; none if on others."""
    try:
        settings = read_json(stories_of(run) / "stories.json")
        return {word for word, in allowed(GRAMMARS[settings["words"]], 1)}
    except (UserError, LookupError):
        return set()


def english_transcriber(hear, run):
    """The transcriber of English; `hear` turns samples (N,) into a text."""
    known = vocabulary(run)

    def words(wave):
        if len(wave) == 0 or wave.abs().max() < SILENT:
            return []
        found = []
        for word in hear(wave).split():
            parts = set(tokens(word)) - {"."}
            found.append([word, bool(parts) and parts <= known])
        return found

    def transcribe(wave, seconds):
        context, continuation = map(words, split(wave, seconds))
        complete = [inside for _, inside in continuation]
        share = sum(complete) / len(complete) if known and complete else None
        return {"language": "English", "context": context, "continuation": continuation,
                "share": share}
    return transcribe
