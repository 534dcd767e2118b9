"""pair_stories: makes the pairs of English sentences that `lab/pairs.py --stories` asks about.

All sentences follow another sentence, which names no person, and are spoken by the text-to-speech
of `lab/stories.py` with the same voice and the same random numbers. Pairs come in twos, of which
each mirrors the other: what is right in one is wrong in the other.

    agreement   Anna loved her small dog          or  Anna loved his small dog
                Tom loved his small dog           or  Tom loved her small dog
    order       Tom gave the ball to his dog      or  Tom gave the dog to his ball
                The dog sat on the red ball       or  The ball sat on the red dog
    non-word    The big dog was tired             or  The big dall was tired
                Then Tom put the ball under ...   or  Then Tom put the bog under ...

Non-words exchange their ends, so the foils hold the very sounds of the true words.
"""
import functools
import itertools
import re

import numpy as np
import torch
from tqdm import tqdm

from cdslm import HOP, RATE
from lab.pair_speech import Pair
from lab.stories import GRAMMARS, PAUSE, PERSON, STORY, VOICES, people, say

KINDS = "agreement", "order", "non-word"
NOUNS = "ANIMAL", "THING", "PLACE"
FIRST = 3_000_000                      # the seeds of its groups; stories stay below
VOWEL = re.compile("[aeiouy]")


class World:
    """The grammar, the voice and the slots of one group of pairs."""

    def __init__(self, settings, number):
        self.words = settings["words"]
        self.grammar = GRAMMARS[self.words]
        self.rng = np.random.default_rng([settings["seed"], FIRST + number])
        self.voice = VOICES[self.rng.integers(settings["voices"])]
        self.seed = int(self.rng.integers(2 ** 31))
        self.slots = {slot: self.draw(slot) for slot in STORY}
        self.person = self.rng.choice(people(self.grammar))
        personal = {"SUBJ", *PERSON}
        impersonal = [template for template in self.templates() if not personal & set(template)]
        sentence = self.write(self.choose(impersonal))
        self.context = self.speak(sentence)
        pause = self.rng.uniform(*PAUSE)
        self.pause = np.zeros(round(pause * RATE), np.float32)

    def choose(self, items):
        """One of a list."""
        return items[self.rng.integers(len(items))]

    def draw(self, slot):
        """A word that fits into a slot."""
        return str(self.rng.choice(self.grammar[slot].split()))

    def templates(self, *slots):
        """The sentences of the grammar, lists of words and slots, that have all of these slots."""
        split = [template.split() for template in self.grammar["sentences"]]
        return [template for template in split if set(slots) <= set(template)]

    def write(self, template, **changed):
        """A template -> the sentence. A slot that is not `changed` has the same word whenever it
        is used."""
        for slot in set(template) & set(self.grammar) - set(self.slots):
            self.slots[slot] = self.draw(slot)
        slots = self.slots | self.person | {"SUBJ": self.person["NAME"]} | changed
        text = " ".join(slots.get(word, word) for word in template)
        return text[0].upper() + text[1:] + "."

    def speak(self, text):
        """A sentence as sound (N,)."""
        return say(text, self.voice, self.seed)

    def pair(self, true, false, case):
        """The Pair of two sentences after the context, which fills whole frames."""
        start = np.concatenate([self.context, self.pause])
        start = np.pad(start, (-len(start) % HOP, 0))
        sides = []
        for text in (true, false):
            wave = np.concatenate([start, self.speak(text)])
            sides.append(torch.from_numpy(wave))
        return Pair(*sides, len(start) // HOP, case)


def agreement_pairs(world):
    """Texts [(true, false), ...]: his or her, of a man and of a woman."""
    persons = people(world.grammar)
    men = [person for person in persons if person["HE"] == "he"]
    women = [person for person in persons if person["HE"] == "she"]
    man, woman = world.choose(men), world.choose(women)
    template = world.choose(world.templates("SUBJ", "HIS"))
    pairs = []
    for right, wrong in ((man, woman), (woman, man)):
        name = right["NAME"]
        true = world.write(template, SUBJ=name, HIS=right["HIS"])
        false = world.write(template, SUBJ=name, HIS=wrong["HIS"])
        pairs.append((true, false))
    return pairs


def order_templates(world):
    """[(template, template, slot, slot)]: the first has one noun before the other, the second after
    it."""
    found = []
    for a, b in itertools.combinations(NOUNS, 2):
        both = world.templates(a, b)
        forward = [template for template in both if template.index(a) < template.index(b)]
        backward = [template for template in both if template not in forward]
        for first, second in itertools.product(forward, backward):
            found.append((first, second, a, b))
    return found


def order_pairs(world):
    """Texts [(true, false), ...]: two nouns in their places, or exchanged."""
    first, second, a, b = world.choose(order_templates(world))
    exchanged = {a: world.slots[b], b: world.slots[a]}
    return [(world.write(template), world.write(template, **exchanged))
            for template in (first, second)]


def mixed(word, other):
    """The consonants that a word begins with, and the rest of the other."""
    start, end = VOWEL.search(word).start(), VOWEL.search(other).start()
    return word[:start] + other[end:]


@functools.cache
def vocabulary(words):
    """All words of a grammar, in lower case."""
    grammar = GRAMMARS[words]
    texts = [text for part in grammar.values() for text in np.atleast_1d(part)]
    texts += [text for person in people(grammar) for text in person.values()]
    return {word.lower() for text in texts for word in text.split()}


def non_word_pairs(world):
    """Texts [(true, false), ...]: two words of the stories, or two that have exchanged their ends
    and are none."""
    known = vocabulary(world.words)
    first = second = next(iter(known))
    while first in known or second in known:
        a, b = world.choose(NOUNS), world.choose(NOUNS)
        word, other = world.draw(a), world.draw(b)
        first, second = mixed(word, other), mixed(other, word)

    pairs = []
    for slot, true, false in ((a, word, first), (b, other, second)):
        template = world.choose(world.templates(slot))
        pairs.append((world.write(template, **{slot: true}),
                      world.write(template, **{slot: false})))
    return pairs


def make_pairs(settings, kind, count):
    """About `count` pairs of a kind, for stories of these settings (see `lab/stories.py`)."""
    makers = {"agreement": agreement_pairs, "order": order_pairs, "non-word": non_word_pairs}
    pairs = []
    for number in tqdm(range((count + 1) // 2), f"{kind}: speech", unit="group", leave=False):
        world = World(settings, number)
        for true, false in makers[kind](world):
            pairs.append(world.pair(true, false, number))
    return pairs
