"""The study of the arms: what is run, what is kept, what is said of it."""
import json
from pathlib import Path

import pytest

from cdslm import UserError
from lab import rivals
from lab.study import python as study_python


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Programs that leave what the real ones leave; the words they were called with."""
    called = []
    monkeypatch.setattr(rivals, "RESULTS", tmp_path / "rivals.csv")
    monkeypatch.setattr(rivals, "FRONTIERS", tmp_path / "frontiers.csv")

    def python(*words):
        called.append(words)
        if "--json" in words:
            toy = {name: {"value": 0.25} for name in rivals.KEPT}
            report = {"toy": toy, "pjsd": [0.1, 0.2, 0.3], "variety": [1, 1, 1, 1, 0.9]}
            Path(words[-1]).write_text(json.dumps(report))
        elif words[0] == "lab.autoregressive":
            folder = tmp_path / "out" / words[words.index("--out") + 1].split("/")[-1]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "autoencoder.pt").write_text(words[2])
            row = {"step": 3, "valid": {"mean": 0.5}}
            (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
            toy = {name: {"value": 0.25} for name in rivals.KEPT}
            (folder / "judged.json").write_text(json.dumps({"toy": toy, "pjsd": [0.1, 0.2, 0.3]}))
            pairs = {kind: {"accuracy": 0.75} for kind in ("word", "place", "order")}
            (folder / "pairs.json").write_text(json.dumps(pairs))
    monkeypatch.setattr(rivals, "python", python)
    return called, tmp_path / "out"


def test_each_model_is_trained_and_judged_once(study, monkeypatch, capsys):
    called, out = study
    monkeypatch.setattr("sys.argv", ["rivals", "--out", str(out), "--seed", "1"])
    rivals.main()
    trained = [words for words in called if words[0] == "lab.autoregressive"]
    assert len(trained) == 8 and len(called) == 8 * (1 + len(rivals.JUDGES))
    assert {("--arm", "B"), ("--lr", "0.008")} <= set(zip(trained[1], trained[1][1:]))
    rows = rivals.read_rows(rivals.RESULTS)
    assert [row["arm"] for row in rows] == [*"ABCABCAB"] and rows[0]["pjsd_2"] == "0.2"
    said = capsys.readouterr().out
    assert "| word_rate | 0.250 | 0.250 | 0.250 |" in said and "| steps | 3 | 3 | 3 |" in said

    rivals.main()                                             # nothing is left to do
    assert len(called) == 8 * (1 + len(rivals.JUDGES))
    monkeypatch.setattr("sys.argv", ["rivals", "--out", str(out), "--seed", "2"])
    rivals.main()                                             # an hour a run: two seeds only
    assert [row["seed"] for row in rivals.read_rows(rivals.RESULTS)] == [*"12121212121211"]


def test_the_decoder_of_a_seed_is_shared(study, monkeypatch):
    called, out = study
    rivals.run(out, "A", 2e13, 0)
    (out / "A-2e+13-0/autoencoder.pt").write_text("of A")
    seen = []
    original = rivals.python

    def watched(*words):
        seen.append((out / "C-2e+13-0/autoencoder.pt").read_text())
        original(*words)
    monkeypatch.setattr(rivals, "python", watched)
    rivals.run(out, "C", 2e13, 0)
    assert seen[0] == "of A"


def test_how_many_times_the_flops():
    """C has with 2e13 FLOPs what A has with 8e13; B has with 8e13 what A has halfway (on the axis of
    the logarithm) between 8e13 and 3.2e14. More than A ever has, or less, is not compared; nor
    where A does not rise."""
    def rows(seed, *points):
        return [dict(arm=arm, flops=str(flops), seed=seed, word_rate=str(words)) for arm, flops, words in points]
    others = ("C", 2e13, .4), ("C", 8e13, .9), ("B", 2e13, .1), ("B", 8e13, .6)
    one = rows("0", ("A", 2e13, .2), ("A", 8e13, .4), ("A", 3.2e14, .8), *others)
    two = rows("1", ("A", 2e13, .3), ("A", 8e13, .4), ("C", 2e13, .35))
    falls = rows("2", ("A", 2e13, .3), ("A", 8e13, .7), ("A", 3.2e14, .65), ("C", 2e13, .6))
    assert rivals.multipliers([*one, *two, *falls]) == {
        ("C", 2e13): [pytest.approx(4), pytest.approx(2)], ("B", 8e13): [pytest.approx(2)]}
    assert rivals.multipliers(rows("0", *others)) == {}


def test_each_point_of_a_frontier_is_judged_once(study, monkeypatch, capsys):
    called, out = study
    with pytest.raises(UserError, match="not trained and judged yet"):
        rivals.frontier(out, [0])
    for arm in "ABC":
        rivals.run(out, arm, 8e13, 0)
    called.clear()
    monkeypatch.setattr("sys.argv", ["rivals", "--frontier", "--seed", "0", "--out", str(out)])
    rivals.main()
    assert len(called) == 12 and ("--temperature", "0.7") in set(zip(called[4], called[4][1:]))
    assert "| B | 0.9 | 0.250 | 0.250 | 0.300 | 0.900 |" in capsys.readouterr().out
    rivals.main()
    assert len(called) == 12


def test_bad_input(study, monkeypatch):
    monkeypatch.setattr("sys.argv", ["rivals", "--seed", "7"])
    with pytest.raises(UserError, match="--seed must be one of"):
        rivals.main()


def test_a_program_that_fails_is_named():
    with pytest.raises(UserError, match="eval_pjsd --nonsense stopped with status 2"):
        study_python("eval_pjsd", "--nonsense")
