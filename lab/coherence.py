"""coherence: does a run that was trained on conversations (lab/topics.py) remember?

    python cdslm.py --toy-grammar topics --out out/topics
    python -m lab.coherence out/topics                     keeps out/topics/coherence.json

The run continues held-out prompts of 20 s for a minute each. The toy recogniser finds phones and
pitch; pauses cut them into phrases, and phones into words. Then, of phrases that are whole:

    topic after prompt      share of first phrases that have the topic of the prompt
    topic, 1 3 10 later     share of pairs of phrases, so many apart, that have the same topic
    half-life               seconds after which half of that is lost which exceeds chance; where
                            single phrases miss the topic, that is loss, too
    whole phrases           share that begins with an opener and ends with a closer
    closers agree           share of those in which the two belong together; in short and long ones
    replies answer          share of changes of the speaker where the first topic word answers
    phrases, seconds a turn until the voice changes
    voice comes back        share of turns whose voice is that of the turn before last
    semitones apart         between the two voices

Beside the run stand the true continuations, recognised in the same way, and texts: of the grammar;
of a babbler that knows which word follows which (pairs); of the grammar with one of its chances
changed, so that exactly one thing is forgotten; and of somebody who knows the grammar, but forgets
what lies outside the run's window: the best that the run can reach. Intervals (95 %) resample
conversations. The last table shows words, language and speaker every 5 s: what degrades?
"""
import dataclasses
import itertools
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdslm import (
    CFG, FRAME_RATE, GENERATING, HOP, Parser, UserError, cli, load_run, log_mel, read_config)
from lab.anchor import anchored
from lab.listener import batched, load_listener, spans
from lab.markov import NO_WORD, parse
from lab.report import keep
from lab.topics import (
    APART, CLOSER, CONTENT, LINK, OPENER, PAIRS, TOPIC_WORDS, TOPICS, WORDS, Chances, Phrase,
    TopicSpeech, toy_speech)
from lab.toyspeech import SYMBOLS, VOWELS
from lab.words import share

FIRST = 4_000_000          # its conversations; training and the other judges stay below
TEXTS = 64                 # conversations of each text
PROMPT = 20.0              # seconds: most prompts have both speakers, whatever the model hears
PAUSE = 8                  # frames, 100 ms: a silence that lasts so long ends a phrase
SAME = APART / 2           # octaves: two phrases that are nearer to each other have one voice
BACK = SAME / 2            # octaves: the same where a voice is known from several phrases
LAGS = 1, 3, 10            # phrases
LONG = 3.0                 # seconds from the opener to the end of the closer
VOICES = "voice comes back", "semitones apart"
BIN = 5                    # seconds of a bin of `over_time`
DRAWS = 500                # of the bootstrap
HALF_LIVES = np.geomspace(1, 300, 230)    # seconds, 2.5 % apart: those that can be found


# --------------------------------------------------------------------------------------------------
# 1. Phones and pitch, frame by frame -> phrases.

@dataclass
class SpokenPhrase:
    """A phrase as it was recognised."""
    pieces: list           # (word, first frame, last frame + 1); NO_WORD where no word fits
    pitch: float           # octaves above 150 Hz: the mean over its vowels

    @property
    def start(self):
        return self.pieces[0][1]

    @property
    def stop(self):
        return self.pieces[-1][2]

    @property
    def seconds(self):
        return (self.stop - self.start) / FRAME_RATE

    @property
    def words(self):
        return [word for word, _, _ in self.pieces]

    @property
    def topic(self):
        """The topic of most of its topic words; None without any."""
        topics = Counter((word - CONTENT) // TOPIC_WORDS for word in self.words if word >= CONTENT)
        return topics.most_common(1)[0][0] if topics else None

    @property
    def pair(self):
        """Numbers of its opener and its closer; None if it lacks either."""
        first, last = self.words[0], self.words[-1]
        if OPENER <= first < CLOSER <= last < LINK:
            return first - OPENER, last - CLOSER
        return None

    @property
    def first_place(self):
        """The place in its topic of the first topic word; None if it was not recognised."""
        return next(places(self.words[:2]), None)             # after the opener

    @property
    def last_place(self):
        """The place in its topic of the last topic word; None if it was not recognised."""
        return next(places(self.words[:-4:-1]), None)         # before the closer and a link


def places(words):
    """Yield the places in their topics of topic words."""
    for word in words:
        if word >= CONTENT:
            yield (word - CONTENT) % TOPIC_WORDS


def phrases_of(phone, octaves, language, at=0):
    """Phone numbers (T,) and pitch in octaves (T,), from frame `at` on -> the phrases between the
    pauses. Anything without a vowel is noise."""
    groups = []
    for span in spans(phone):
        if not groups or span[1] - groups[-1][-1][2] >= PAUSE:
            groups.append([])
        groups[-1].append(span)

    found = []
    for group in groups:
        first, last = group[0][1], group[-1][2]
        vowels = np.isin(phone[first:last], VOWELS)
        if not vowels.any():
            continue
        pieces = []
        for word, start, stop in parse([SYMBOLS[number] for number, _, _ in group], language):
            start, stop = at + group[start][1], at + group[stop - 1][2]
            if pieces and word == NO_WORD == pieces[-1][0]:   # one gap, however many phones
                start = pieces.pop()[1]
            pieces.append((word, start, stop))
        found.append(SpokenPhrase(pieces, float(octaves[first:last][vowels].mean())))
    return found


def turns_of(phrases):
    """Phrases -> lists of those in a row that have one voice."""
    turns = []
    for phrase in phrases:
        if not turns or abs(phrase.pitch - turns[-1][-1].pitch) > SAME:
            turns.append([])
        turns[-1].append(phrase)
    return turns


# --------------------------------------------------------------------------------------------------
# 2. Measures. A clip is the continuation of a prompt.

@dataclass
class Clip:
    """A stretch of speech, as it was recognised, and the prompt that it continues."""
    phone: np.ndarray      # (T,) index into SYMBOLS
    octaves: np.ndarray    # (T,) pitch in octaves above 150 Hz
    language: int
    prompt: list           # the true phrases of the prompt; their frames are negative


def count(clip, phrases, answers):
    """{measure: (right, all)} of the whole phrases of one clip."""
    topics = [phrase.topic for phrase in phrases]
    before = [phrase.topic for phrase in clip.prompt if phrase.topic is not None]
    found = {"topic after prompt": same(zip(before[-1:], topics))}
    for lag in LAGS:
        found[f"topic, {lag} later"] = same(zip(topics, topics[lag:]))

    complete = [phrase for phrase in phrases if phrase.pair]
    short = [phrase.pair for phrase in complete if phrase.seconds < LONG]
    long = [phrase.pair for phrase in complete if phrase.seconds >= LONG]
    found["whole phrases"] = len(complete), len(phrases)
    found["closers agree"] = same(short + long)
    found[f"  within {LONG:g} s"] = same(short)
    found["  later"] = same(long)
    return found | count_turns(turns_of(phrases), answers)


def count_turns(turns, answers):
    """{measure: (right, all)} of the turns of one clip."""
    # The answer to the last topic word of a turn, and the first one of the next.
    replies = []
    for turn, reply in itertools.pairwise(turns):
        place = turn[-1].last_place
        expected = None if place is None else answers[place]
        replies.append((expected, reply[0].first_place))

    pitches = [phrase.pitch for turn in turns for phrase in turn]
    seconds = sum(phrase.seconds for turn in turns for phrase in turn)
    voices = [np.mean([phrase.pitch for phrase in turn]) for turn in turns]
    back = [abs(voice - earlier) < BACK for earlier, voice in zip(voices, voices[2:])]
    # Two voices that speak equally often are two standard deviations apart.
    apart = 2 * 12 * np.std(pitches) if pitches else 0
    return {
        "replies answer": same(replies),
        "phrases a turn": (len(pitches), len(turns)),
        "seconds a turn": (seconds, len(turns)),
        "voice comes back": (sum(back), len(back)),
        "semitones apart": (apart, min(1, len(pitches))),
    }


def same(pairs):
    """(pairs that are alike, all pairs), without those where something was not recognised."""
    pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
    return sum(a == b for a, b in pairs), len(pairs)


def half_life(conversations):
    """{value, interval, cases}: seconds after which half of the agreement of topics that exceeds
    chance is lost. The exponential curve from 1 that fits best, by least squares over pairs of
    phrases of one conversation. Chance is how often phrases of any two conversations agree. A
    phrase that misses the topic in between counts as loss: who misses it in 3 of 10 phrases, but
    never forgets it, has about 20 s."""
    most = 1 + max(map(len, conversations), default=0)
    table = np.zeros((len(conversations), most, 3))           # agree, pairs, seconds; by lag
    topics = np.zeros((len(conversations), TOPICS))
    for phrases, rows, row in zip(conversations, table, topics):
        known = [(i, phrase) for i, phrase in enumerate(phrases) if phrase.topic is not None]
        for _, phrase in known:
            row[phrase.topic] += 1
        for (i, a), (j, b) in itertools.combinations(known, 2):
            rows[j - i] += a.topic == b.topic, 1, (b.start - a.start) / FRAME_RATE

    def fit(chosen):
        agree, pairs, seconds = table[chosen].sum(0)[1:].T    # (lags,) each
        frequency = topics[chosen].sum(0) / max(1, topics[chosen].sum())
        chance = (frequency ** 2).sum()
        there = pairs > 0
        agree, pairs, seconds = agree[there], pairs[there], seconds[there]
        kept = 0.5 ** (seconds / pairs / HALF_LIVES[:, None]) # (half-lives, lags)
        error = chance + (1 - chance) * kept - agree / pairs
        return HALF_LIVES[(pairs * error ** 2).sum(1).argmin()]

    cases = int(table[:, :, 1].sum())
    if not cases:
        return {"value": None, "interval": None, "cases": 0}
    rng, everything = np.random.default_rng(0), np.arange(len(conversations))
    drawn = [fit(rng.choice(everything, len(everything))) for _ in range(DRAWS)]
    interval = np.percentile(drawn, (2.5, 97.5)).tolist()
    return {"value": float(fit(everything)), "interval": interval, "cases": cases}


def figures(toy, clips, window=None):
    """{measure: {value, interval, cases}} of clips, all of them or what is remembered of them with
    a `window`, see `forget`."""
    conversations, rows = [], []
    for clip in clips:
        language = toy.languages[clip.language]
        phrases = phrases_of(clip.phone, clip.octaves, language)
        if window:
            phrases = forget(clip.prompt, phrases, *window)
        phrases = phrases[1:-1]                               # both ends are cut in two
        conversations.append(phrases)
        rows.append(count(clip, phrases, language.answers))
    groups = range(len(clips))
    found = {name: share([row[name] for row in rows], groups) for name in rows[0]}
    found["half-life, s"] = half_life(conversations)
    return found


def over_time(toy, clips):
    """{words, language, speaker, another speaker: a list of {value, interval, cases} for every 5 s}
    of clips. Words: share of speech inside whole words of the right language. Language: share of
    clips in which they cover more than those of any other. Speaker: share of phrases with a voice
    of the prompt; and, what chance would give, of the prompt of another clip."""
    frames = BIN * FRAME_RATE
    bins = max(1, min(len(clip.phone) for clip in clips) // frames)
    counts = np.zeros((4, bins, len(clips), 2))
    for at, clip in enumerate(clips):
        spoken = [phrases_of(clip.phone, clip.octaves, language) for language in toy.languages]
        inside = np.stack([covered(phrases, len(clip.phone)) for phrases in spoken])
        prompts = clip.prompt, clips[at - 1].prompt
        voices = [np.array([phrase.pitch for phrase in prompt]) for prompt in prompts]
        for number in range(bins):
            cut = slice(number * frames, (number + 1) * frames)
            words = inside[:, cut].sum(1)                     # (languages,)
            others = np.delete(words, clip.language).max(initial=0)
            pitches = [phrase.pitch for phrase in spoken[clip.language]
                       if cut.start <= phrase.start < cut.stop]
            counts[0, number, at] = words[clip.language], (clip.phone[cut] > 0).sum()
            counts[1, number, at] = words[clip.language] > others, 1
            for row, known in zip(counts[2:], voices):
                near = [(abs(pitch - known) < BACK).any() for pitch in pitches]
                row[number, at] = sum(near), len(near)

    names, groups = ("words", "language", "speaker", "another speaker"), range(len(clips))
    return {name: [share(bin, groups) for bin in rows] for name, rows in zip(names, counts)}


def covered(phrases, frames):
    """Which frames (T,) lie in whole words."""
    inside = np.zeros(frames, bool)
    for phrase in phrases:
        for word, start, stop in phrase.pieces:
            inside[start:stop] |= word != NO_WORD
    return inside


# --------------------------------------------------------------------------------------------------
# 3. Nulls: conversations that have forgotten exactly one thing, and a babbler. They are texts:
# true phones and pitch, without sound and recogniser.

NULLS = {
    "topic": Chances(new_topic=1 - 1 / TOPICS),   # each phrase draws among all topics
    "closer": Chances(agreement=0),
    "reply": Chances(reply=0),
    "turn": Chances(new_speaker=0),
    "voice": Chances(same_voice=0),
}


class WordPairs(TopicSpeech):
    """A babbler that knows how often each word follows each other word, and nothing further back.
    Phrases end with closers."""

    def phrases(self, rng, language, speakers):
        speakers.append(self.other_speaker(rng, speakers[0]))
        speaker = turn = 0
        word = int(rng.choice(WORDS, p=language.follows[CLOSER]))
        while True:
            words = [word]
            while not CLOSER <= word < LINK:
                word = int(rng.choice(WORDS, p=language.follows[word]))
                words.append(word)
            yield Phrase(words, -1, speaker, turn)
            word = int(rng.choice(WORDS, p=language.follows[word]))
            if rng.random() < self.chances.new_speaker:
                speaker, turn = 1 - speaker, turn + 1


def forget(prompt, phrases, ctx, gen):
    """True phrases as somebody would speak them who knows the grammar, but generates `gen` frames
    at once and remembers no more than `ctx` frames before those: the best that a model with this
    window can do. Topic, answer and closer are drawn where what determines them is forgotten;
    voices are not forgotten."""
    rng, moved, changed = np.random.default_rng(0), 0, []
    mentioned = max((start for phrase in prompt for word, start, _ in phrase.pieces
                     if word >= CONTENT), default=-math.inf)
    for phrase in phrases:
        pieces = []
        for word, start, stop in phrase.pieces:
            horizon = start // gen * gen - ctx
            if word >= CONTENT:
                topic, place = divmod(word - CONTENT, TOPIC_WORDS)
                if mentioned < horizon:
                    moved, place = rng.integers(TOPICS), rng.integers(TOPIC_WORDS)
                word = CONTENT + (topic + moved) % TOPICS * TOPIC_WORDS + place
                mentioned = start
            elif CLOSER <= word < LINK and phrase.start < horizon:
                word = CLOSER + rng.integers(PAIRS)
            pieces.append((int(word), start, stop))
        changed.append(SpokenPhrase(pieces, phrase.pitch))
    return changed


def true_clip(toy, talk, start):
    """A conversation from frame `start` on, as a recogniser without errors would give it; before it
    is the prompt."""
    octaves = np.log2(np.maximum(talk.f0, 50) / 150)
    language = toy.languages[talk.language]
    prompt = phrases_of(talk.phone[:start], octaves[:start], language, at=-start)
    return Clip(talk.phone[start:], octaves[start:], talk.language, prompt)


def texts(toy, seconds, number=TEXTS):
    """{name: clips} of the grammar's text and of its nulls, `seconds` after a prompt."""
    languages, seed = len(toy.languages), toy.seed
    grammars = {"text": toy, "pairs": WordPairs(languages, seed)}
    for name, chances in NULLS.items():
        grammars[name] = TopicSpeech(languages, seed, chances)

    sides = {}
    for name, grammar in grammars.items():
        talks = (grammar.utterance(FIRST + i, PROMPT + seconds, sound=False) for i in range(number))
        sides[name] = [true_clip(grammar, talk, round(PROMPT * FRAME_RATE)) for talk in talks]
    return sides


# --------------------------------------------------------------------------------------------------
# 4. A run.

def recognise(listener, waves, clips):
    """Sounds (B, N), clips -> the clips with the phones and the pitch that are recognised."""
    recognised = []
    for wave, clip in zip(waves, tqdm(clips, "recognising", leave=False)):
        phone, octaves, _ = listener(log_mel(wave[None]))
        phone = phone[0].argmax(1).numpy()
        recognised.append(dataclasses.replace(clip, phone=phone, octaves=octaves[0].numpy()))
    return recognised


def judge(arguments):
    """The report on a run, a dict that JSON can hold."""
    config = read_config(arguments.run)
    if config.data != "toy" or config.toy_grammar != "topics":
        raise UserError(f"{arguments.run} was not trained on conversations: python cdslm.py "
                        "--toy-grammar topics --out out/topics")
    config, model, autoencoder = load_run(arguments.run, arguments.device)
    speak = anchored(arguments.anchor, model)
    toy, listener, device = toy_speech(config), load_listener(), autoencoder.mel_stats.device
    prompt = max(round(PROMPT * FRAME_RATE), model.hears)
    frames = round(arguments.seconds * FRAME_RATE)

    def talk(number):
        return toy.utterance(FIRST + number, (prompt + frames) / FRAME_RATE)

    with ThreadPoolExecutor() as pool:
        numbers = range(arguments.num)
        talks = list(tqdm(pool.map(talk, numbers), "conversations", len(numbers), leave=False))
    clips = [true_clip(toy, talk, prompt) for talk in talks]
    waves = torch.from_numpy(np.stack([talk.wave for talk in talks]))

    # Continue the prompts; decode with the last second of the prompt, so that no edge is heard.
    context = batched(lambda part: autoencoder.encode(part.to(device)), waves[:, :prompt * HOP])
    generated = speak(model, context, frames, cfg=arguments.cfg, seed=arguments.seed,
                      progress=GENERATING)
    joined = torch.cat([context[:, -FRAME_RATE:], generated], dim=1)
    decoded = batched(lambda part: autoencoder.decode(part).cpu(), joined, "decoding", size=1)

    sides = {"generated": recognise(listener, decoded[:, FRAME_RATE * HOP:], clips),
             "true": recognise(listener, waves[:, prompt * HOP:], clips)}
    timed = {name: over_time(toy, side) for name, side in sides.items()}
    sides |= texts(toy, arguments.seconds)
    found = {name: figures(toy, side) for name, side in sides.items()}
    window = model.hears, config.ctx_frames + config.gen_frames - model.hears
    found["window"] = figures(toy, sides["text"], window)
    for name in VOICES:                                       # `forget` forgets no voice
        found["window"][name] = {"value": None, "interval": None, "cases": 0}
    return vars(arguments) | {"figures": found, "over_time": timed}


def cell(figure, with_interval=False):
    """A figure as it is printed, with half of its interval."""
    if not figure["cases"]:
        return "-"
    low, high = figure["interval"]
    values = [figure["value"], (high - low) / 2]
    texts = [f"{value:.{2 if value < 9.995 else 0}f}".removeprefix("0") for value in values]
    return " ±".join(texts) if with_interval else texts[0]


def show(report):
    """Print the figures of all sides beside each other, then those over time."""
    found = report["figures"]
    nulls = [name for name in found if name not in ("generated", "true")]
    print(f"{'':44}text of the grammar; of word pairs; without its")
    print(f"{'':22}{'generated':>11}{'true':>11}" + "".join(f"{name:>7}" for name in nulls))
    for name in found["true"]:
        cells = [cell(found[side][name], True).rjust(11) for side in ("generated", "true")]
        cells += [cell(found[null][name]).rjust(7) for null in nulls]
        print(f"{name:22}" + "".join(cells))

    rows = report["over_time"]
    bins = len(rows["true"]["words"])
    print(f"\n{'from second':22}" + "".join(f"{BIN * number:6}" for number in range(bins)))
    for measure in rows["true"]:
        for side in ("generated", "true"):
            cells = [cell(figure).rjust(6) for figure in rows[side][measure]]
            print(f"{measure + ', ' + side:22}" + "".join(cells))


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run folder, such as out/topics")
    add("--seconds", type=float, default=60.0, help="of each continuation [60]")
    add("--num", type=int, default=32, help="continuations [32]")
    add("--cfg", type=float, default=CFG, help=f"guidance [{CFG:g}]")
    add("--anchor", type=float, default=0.0,
        help="seconds of the prompt that all windows hear (lab/anchor.py) [0]")
    add("--seed", type=int, default=0, help="of the noise [0]")
    add("--device", default="auto", help="cuda, mps, cpu [auto]")
    add("--json", type=Path, help="where to keep the report [RUN/coherence.json]")
    arguments = parser.parse_args()
    if not (BIN <= arguments.seconds < math.inf and math.isfinite(arguments.cfg)):
        raise UserError(f"--seconds must be at least {BIN}, and --cfg a number")
    if arguments.num < 1 or arguments.seed < 0:
        raise UserError("--num must be at least 1, --seed at least 0")
    report = judge(arguments)
    show(report)
    keep(report, arguments.json or arguments.run / "coherence.json")


if __name__ == "__main__":
    cli(main)
