"""The nulls: babblers follow their tables, words are found, the order of a text is recovered."""
import subprocess
import sys
import types

import numpy as np
import pytest

import eval_pjsd as judge
from lab import markov
from lab.markov import BABBLERS, FREE_ORDER, GRAMMAR
from lab.toyspeech import SYMBOLS, ToySpeech
from tests.conftest import ROOT

TOY = ToySpeech()
LANGUAGE = types.SimpleNamespace(words=[(1, 2, 3), (4, 5, 6), (7, 8)])


def say(*numbers):
    return [SYMBOLS[n] for n in numbers]


def clips_like_speech(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(2, size=count), rng.integers(24, 33, size=count)


@pytest.fixture(scope="module")
def texts():
    languages, lengths = clips_like_speech(600)
    return languages, markov.null_texts(TOY, languages, lengths, seed=5)


@pytest.fixture(scope="module")
def ladder():
    """Word rates of the babblers, from texts other than those that are tested."""
    languages, lengths = clips_like_speech(600, seed=1)
    nulls = markov.null_texts(TOY, languages, lengths, seed=6)
    return [markov.score(TOY, nulls[name], languages)["word_rate"] for name in BABBLERS]


def test_clips_are_as_long_as_asked(texts):
    languages, nulls = texts
    _, lengths = clips_like_speech(600)
    assert set(nulls) == {*BABBLERS, FREE_ORDER, GRAMMAR}
    for clips in nulls.values():
        assert [len(clip) for clip in clips] == lengths.tolist()


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_babbler_knows_its_order_and_no_more(order):
    """Its n-grams are the grammar's up to its order; one phone more, and they are not."""
    rng = np.random.default_rng(order)
    clip = markov.exact_babbler(TOY, order, 0).draw(rng, 40_000)
    found = []
    for n in (order, order + 1):
        exact, counted = markov.ngrams(TOY, n), markov.counted([clip], n)
        exact = {tuple(SYMBOLS[p] for p in gram): odds for gram, odds in exact.items()}
        grams = exact | counted
        found.append(judge.jsd(*[np.array([table.get(gram, 0) for gram in grams])
                                 for table in (exact, counted)]))
    print(f"order {order}: {found[0]:.4f} bits at its order, {found[1]:.4f} one phone further")
    assert found[0] < 0.005 and found[1] > 4 * found[0]


def test_true_text_scores_one_once_the_edges_are_left_out(texts):
    languages, nulls = texts
    true = markov.score(TOY, nulls[GRAMMAR], languages)
    print(true)
    assert true["word_rate"] > 0.99 and true["runs_2"] > 0.99 and true["runs_3"] > 0.98
    with_edges = np.concatenate([markov.words_in(clip, TOY.languages[number]) >= 0
                                 for clip, number in zip(nulls[GRAMMAR], languages)]).mean()
    assert with_edges < 0.92
    # Edges do not help speech of the other language, nor shuffled phones.
    assert markov.score(TOY, nulls[GRAMMAR], 1 - languages)["word_rate"] < 0.1
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(clip).tolist() for clip in nulls[GRAMMAR]]
    assert markov.score(TOY, shuffled, languages)["word_rate"] < 0.05


def test_a_bigram_babbler_is_of_order_two_and_true_text_above_four(texts, ladder):
    languages, nulls = texts
    orders = {}
    for name, clips in nulls.items():
        rate = markov.score(TOY, clips, languages)["word_rate"]
        orders[name] = markov.equivalent_order(rate, ladder)
    print(orders)
    for order, name in enumerate(BABBLERS[:5], 1):
        assert orders[name] == pytest.approx(order, abs=0.25)
    assert orders[GRAMMAR] > 4.5


def test_word_pairs_tell_free_order_from_the_grammar(texts):
    languages, nulls = texts
    rows = {name: markov.score(TOY, nulls[name], languages) for name in (FREE_ORDER, GRAMMAR)}
    assert rows[FREE_ORDER]["word_rate"] > 0.99
    assert rows[FREE_ORDER]["pair_bits"] > 1 and abs(rows[GRAMMAR]["pair_bits"]) < 0.15


def test_runs_are_of_words_without_a_gap():
    language = types.SimpleNamespace(words=LANGUAGE.words, follows=np.full((3, 3), 1 / 3))
    toy = types.SimpleNamespace(languages=[language], word_share=lambda number: np.full(3, 1 / 3))
    # The first and the last phone are left out, then "2 3" as the end and "4 5" as the beginning
    # of a word; 9 is no word. Two words in a row, a gap, one word: 6 and 3 of 10 phones.
    clip = say(9, 2, 3, 1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 5, 9)
    row = markov.score(toy, [clip], [0])
    assert row["word_rate"] == pytest.approx(9 / 10) and row["runs_2"] == pytest.approx(6 / 10)
    assert row["runs_3"] == 0 and row["pair_bits"] == pytest.approx(0)
    three = markov.score(toy, [say(9, 1, 2, 3, 7, 8, 4, 5, 6, 9)], [0])
    assert three["runs_3"] == 1
    nothing = markov.score(toy, [[], say(9, 9, 9, 9)], [0, 0])
    assert nothing["word_rate"] == 0 and np.isnan(nothing["pair_bits"])


def test_whole_words_are_preferred_to_edges():
    pieces = markov.parse(say(7, 8, 1, 2, 3, 4, 5), LANGUAGE, edges=True)
    assert pieces == [(2, 0, 2), (0, 2, 5), (markov.EDGE, 5, 7)]
    assert markov.parse(say(7, 8, 4, 5), LANGUAGE)[1:] == [(-1, 2, 3), (-1, 3, 4)]


def test_equivalent_order_interpolates():
    assert markov.equivalent_order(0.35, [0.1, 0.2, 0.5]) == pytest.approx(2.5)
    assert markov.equivalent_order(0.35, [0.5, 0.2, 0.1]) == pytest.approx(1.5)
    assert [markov.equivalent_order(x, [0.1, 0.2, 0.5]) for x in (0, 1)] == [1, 3]


def test_nulls_of_a_transcript(texts):
    """Counted babblers, too, put text at its order; and true text above a trigram."""
    languages, lengths = clips_like_speech(1600, seed=2)
    reference = markov.null_texts(TOY, 0 * languages, lengths, seed=7)[GRAMMAR]
    few, lengths = 0 * languages[:400], lengths[:400]
    nulls = markov.null_texts(TOY, few, lengths, seed=8)
    orders = {name: judge.transcript_nulls(nulls[name], reference)["equivalent_order"]["generated"]
              for name in ("bigram", GRAMMAR)}
    print(orders)
    assert orders["bigram"] == pytest.approx(2, abs=0.2) and orders[GRAMMAR] > 2.7
    assert judge.transcript_nulls([["a"]], [["a"], ["b"]]) == {}


def test_the_table_is_printed():
    done = subprocess.run([sys.executable, "-m", "lab.markov", "--minutes", "1"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(name) for line in lines) for name in (*BABBLERS, GRAMMAR))
    bad = subprocess.run([sys.executable, "-m", "lab.markov", "--words", "1"], cwd=ROOT,
                         capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ")
