"""markov: what would a text score that knows only n phones in a row? The nulls of every figure.

A babbler of order n draws each phone given the last n - 1, and knows neither words nor sentences.
Its table is the exact one of a toy language's grammar, or is counted in a reference transcript.
Beside the babblers stand right words in free order, and text of the grammar itself. All are scored
as generated speech is. The *equivalent order* of speech is that of the babbler that scores alike.

    python -m lab.markov                          the nulls of the default corpus of toy speech
    python -m lab.markov --minutes 60 --words 64
"""
import collections
import functools
import math

import numpy as np

from cdslm import Parser, UserError, cli
from lab.toyspeech import SYMBOLS, ToySpeech

ORDERS = 1, 2, 3, 4, 5, 6
BABBLERS = [{1: "unigram", 2: "bigram", 3: "trigram"}.get(n, f"{n}-gram") for n in ORDERS]
FREE_ORDER, GRAMMAR = "words in free order", "true text"
CLIP_PHONES, CLIPS_PER_MINUTE = (24, 33), 20          # of 3 s of toy speech
MEASURES = "word_rate", "runs_2", "runs_3", "pair_bits"
NO_WORD, EDGE = -1, -2                 # what covers a phone, if no whole word does


# --------------------------------------------------------------------------------------------------
# Words in a stream of phones. A clip is a list of symbols.

def symbols_of(phones):
    """Phone numbers -> tuple of symbols."""
    return tuple(SYMBOLS[phone] for phone in phones)


@functools.lru_cache(maxsize=64)
def lexicon(words):
    """Words, a tuple of tuples of phone numbers -> {symbols: number}, the sizes of words from the
    longest on, all proper beginnings and all proper ends of words."""
    whole, beginnings, ends = {}, set(), set()
    for number, word in enumerate(words):
        symbols = symbols_of(word)
        whole[symbols] = number
        for cut in range(1, len(symbols)):
            beginnings.add(symbols[:cut])
            ends.add(symbols[cut:])
    sizes = sorted({len(word) for word in whole}, reverse=True)
    return whole, sizes, beginnings, ends


def parse(clip, language, edges=False):
    """Cover as many of a clip's phones as can be with whole words -> [(word, start, stop)], where
    NO_WORD stands for a phone that no word covers.

    A clip is cut out of speech, and its first and last word are cut in two. With `edges`, a piece
    at the start that ends some word, and one at the end that begins some word, is an EDGE."""
    clip = tuple(clip)
    whole, sizes, beginnings, ends = lexicon(tuple(language.words))

    # best[stop]: phones explained, phones in whole words, and the last piece of the first `stop`.
    best = [(0, 0, None)]
    for stop in range(1, len(clip) + 1):
        explained, inside, _ = best[stop - 1]
        ways = [(explained, inside, (NO_WORD, stop - 1, stop))]
        for size in sizes:
            word = whole.get(clip[stop - size:stop]) if size <= stop else None
            if word is not None:
                explained, inside, _ = best[stop - size]
                ways.append((explained + size, inside + size, (word, stop - size, stop)))
        if edges and clip[:stop] in ends:
            ways.append((stop, 0, (EDGE, 0, stop)))
        if edges and stop == len(clip):
            for start in range(stop):
                if clip[start:] in beginnings:
                    explained, inside, _ = best[start]
                    ways.append((explained + stop - start, inside, (EDGE, start, stop)))
        best.append(max(ways, key=lambda way: way[:2]))

    pieces, stop = [], len(clip)
    while stop:
        pieces.append(best[stop][2])
        stop = pieces[-1][1]
    return pieces[::-1]


def words_in(clip, language):
    """The word that covers each of a clip's S phones (S,), -1: none."""
    pieces = parse(clip, language)
    words = []
    for word, start, stop in pieces:
        words += [word] * (stop - start)
    return np.array(words, int)


def word_runs(pieces):
    """Pieces of a clip -> its runs of words without a gap between them: lists of pieces."""
    runs, run = [], []
    for piece in pieces:
        if piece[0] >= 0:
            run.append(piece)
        elif run:
            runs.append(run)
            run = []
    return [*runs, run] if run else runs


def score(toy, clips, languages):
    """{measure: value} of clips of phones, each judged by the words of its language.

    word_rate: share of phones inside whole words. runs_2, runs_3: share of phones inside at least 2
    or 3 whole words in a row. pair_bits: how many bits less likely than the grammar's own its word
    pairs are, under the grammar, a pair (0: as likely; pairs of a favourite few are below 0).

    The first and the last phone of a clip, which may be cut in two, and the pieces of words beside
    them are left out of everything."""
    phones, pairs = 0, 0
    inside = {1: 0, 2: 0, 3: 0}
    surprise = 0.0
    entropies = [pair_entropy(toy, number) for number in range(len(toy.languages))]

    for clip, number in zip(clips, languages):
        language = toy.languages[number]
        pieces = parse(clip[1:-1], language, edges=True)
        phones += sum(stop - start for word, start, stop in pieces if word != EDGE)
        for run in word_runs(pieces):
            for least in inside:
                if len(run) >= least:
                    inside[least] += run[-1][2] - run[0][1]
            for (word, *_), (following, *_) in zip(run, run[1:]):
                surprise -= math.log2(language.follows[word, following]) + entropies[number]
                pairs += 1

    return {
        "word_rate": inside[1] / max(1, phones),
        "runs_2": inside[2] / max(1, phones),
        "runs_3": inside[3] / max(1, phones),
        "pair_bits": surprise / pairs if pairs else math.nan,
    }


def pair_entropy(toy, language):
    """Bits of the next word given this one."""
    follows = toy.languages[language].follows
    bits = -(follows * np.log2(follows)).sum(1)               # (V,)
    return float(toy.word_share(language) @ bits)


# --------------------------------------------------------------------------------------------------
# Tables of n phones, exact or counted, and text drawn from them.

def ngrams(toy, n, language=0):
    """The grammar's exact distribution {n phones: probability}, pauses left out: what endless
    speech would give."""
    spoken, table = toy.languages[language], {}

    def extend(phones, word, odds):
        """Grow a stretch of speech word by word until n phones are certain."""
        if len(phones) >= n:
            table[phones[:n]] = table.get(phones[:n], 0) + odds
            return
        for following, chance in enumerate(spoken.follows[word]):
            extend(phones + spoken.words[following], following, odds * chance)

    for word, odds in enumerate(toy.word_share(language)):
        for start in range(len(spoken.words[word])):
            extend(spoken.words[word][start:], word, odds)
    total = sum(table.values())
    return {gram: odds / total for gram, odds in table.items()}


def counted(clips, n):
    """The distribution {n phones: share} of a transcript."""
    table = collections.Counter()
    for clip in clips:
        table.update(tuple(clip[i:i + n]) for i in range(len(clip) - n + 1))
    total = sum(table.values())
    return {gram: count / total for gram, count in table.items()}


class Babbler:
    """Draws text in which every n phones are distributed as in a table {n phones: probability}."""

    def __init__(self, table):
        self.grams = list(table)
        self.cumulative = np.cumsum(list(table.values()))
        following = {}
        for gram, odds in table.items():
            following.setdefault(gram[:-1], []).append((gram[-1], odds))
        self.following = {}
        for before, rows in following.items():
            phones, odds = zip(*rows)
            self.following[before] = phones, np.cumsum(odds)

    def draw(self, rng, length):
        """A clip of `length` phones that starts anywhere."""
        clip, known = [], len(self.grams[0]) - 1
        while len(clip) < length:
            before = tuple(clip[len(clip) - known:])
            if clip and before in self.following:
                phones, cumulative = self.following[before]
                clip.append(phones[pick(rng, cumulative)])
            else:                      # at the start, and where a counted table knows no way on
                clip.extend(self.grams[pick(rng, self.cumulative)])
        return clip[:length]


def pick(rng, cumulative):
    """An index, drawn by cumulative odds that need not end at 1."""
    drawn = rng.random() * cumulative[-1]
    index = np.searchsorted(cumulative, drawn, side="right")
    return min(int(index), len(cumulative) - 1)


def draw_words(rng, language, share, length, free):
    """A clip of `length` phones of right words, cut anywhere, in the grammar's order or free."""
    sizes = np.array([len(word) for word in language.words])
    word = pick(rng, np.cumsum(share * sizes))            # a cut falls more often into a long word
    phones = list(language.words[word][rng.integers(sizes[word]):])
    while len(phones) < length:
        word = pick(rng, np.cumsum(share if free else language.follows[word]))
        phones.extend(language.words[word])
    return list(symbols_of(phones[:length]))


@functools.lru_cache(maxsize=64)
def exact_babbler(toy, order, language):
    """The babbler of a toy language's exact grammar, in symbols."""
    table = ngrams(toy, order, language)
    return Babbler({symbols_of(gram): odds for gram, odds in table.items()})


def null_texts(toy, languages, lengths, seed=0):
    """{name: clips of these lengths in these languages}: text of all babblers and of words."""
    shares = [toy.word_share(number) for number in range(len(toy.languages))]
    texts = {name: [] for name in (*BABBLERS, FREE_ORDER, GRAMMAR)}
    for row, (name, clips) in enumerate(texts.items()):
        rng = np.random.default_rng((seed, row))
        for number, length in zip(map(int, languages), lengths):
            if name in BABBLERS:
                clip = exact_babbler(toy, ORDERS[row], number).draw(rng, length)
            else:
                language, free = toy.languages[number], name == FREE_ORDER
                clip = draw_words(rng, language, shares[number], length, free)
            clips.append(clip)
    return texts


def transcript_texts(reference, lengths, seed=0):
    """{name: clips}: text of the babblers whose tables are counted in a reference transcript."""
    texts = {}
    for order, name in zip(ORDERS[:4], BABBLERS):
        table = counted(reference, order)
        if table:
            babbler, rng = Babbler(table), np.random.default_rng((seed, order))
            texts[name] = [babbler.draw(rng, length) for length in lengths]
    return texts


def equivalent_order(value, ladder):
    """The order, interpolated, of the babbler that would score `value`; `ladder` holds the scores
    of the babblers of order 1, 2, ... Values outside it are given its first or last order."""
    orders, ladder = np.arange(1, len(ladder) + 1), np.array(ladder, float)
    if ladder[-1] < ladder[0]:                            # divergences fall with the order
        value, ladder = -value, -ladder
    rising = np.maximum.accumulate(ladder)
    return float(np.interp(value, rising, orders))


def main():
    parser = Parser(__doc__)
    parser.add_argument("--minutes", type=int, default=10, help="speech in each text [10]")
    parser.add_argument("--words", type=int, default=16, help="words in each language [16]")
    arguments = parser.parse_args()
    if arguments.minutes < 1 or arguments.words < 2:
        raise UserError("--minutes must be at least 1, --words at least 2")
    from eval_pjsd import NS, compare                         # eval_pjsd.py imports this file

    # The texts, and true text three times as long to compare them with.
    toy = ToySpeech(words=arguments.words)
    clips = arguments.minutes * CLIPS_PER_MINUTE
    rng = np.random.default_rng(0)
    languages = rng.integers(len(toy.languages), size=4 * clips)
    lengths = rng.integers(*CLIP_PHONES, size=4 * clips)
    reference = null_texts(toy, languages[clips:], lengths[clips:], seed=1)[GRAMMAR]
    texts = null_texts(toy, languages[:clips], lengths[:clips])

    names = [*MEASURES, "order", *(f"pJSD {n}" for n in NS)]
    print(f"{arguments.minutes} minutes of text; order: the equivalent Markov order, by words\n")
    print(" " * 20, *(f"{name:>9}" for name in names))
    scores = {name: score(toy, text, languages) for name, text in texts.items()}
    ladder = [scores[name]["word_rate"] for name in BABBLERS]
    for name, text in texts.items():
        order = equivalent_order(scores[name]["word_rate"], ladder)
        pjsd = compare(text, reference, splits=4)["pjsd"]
        row = [*scores[name].values(), order, *pjsd]
        print(f"{name:<20}", *(f"{value:>9.3f}" for value in row))


if __name__ == "__main__":
    cli(main)
