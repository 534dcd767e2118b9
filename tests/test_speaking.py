"""What speech costs and how it fails, for runs of any arm."""
import re
from types import SimpleNamespace

import pytest
import torch

from cdslm import UserError
from lab import autoregressive as ar
from lab import speaking
from lab.listener import Listener
from tests.test_autoregressive import FEW, random_model


def test_a_near_miss_is_one_phone_from_a_word():
    assert speaking.distance("kato", "kato") == 0
    assert [speaking.distance(text, "kato") for text in ("kabo", "kto", "kakto", "ato")] == [1, 1, 1, 1]
    assert speaking.distance("", "kato") == 4 and speaking.distance("otak", "kato") == 4


def test_mistakes_are_counted_where_they_are(monkeypatch):
    """Two words of three phones; the second of three is wrong, and lies in the second second."""
    monkeypatch.setattr(speaking.markov, "symbols_of", lambda word: word)
    monkeypatch.setattr(speaking, "pieces_of", lambda clip, language: [
        (-2, 0, 1), (0, 1, 4), (-1, 4, 5), (-1, 5, 6), (-1, 6, 7), (1, 7, 10), (-2, 10, 11)])
    starts = [0, 10, 20, 30, 90, 100, 110, 120, 130, 170, 180]
    language = SimpleNamespace(words=["abc", "def"])
    for text, near in (("aabcabddeff", 1), ("aabccbaddff", 0)):
        shares, found = speaking.mistakes([list(text)], [starts], [language], seconds=3)
        assert shares == [1, pytest.approx(2 / 5), 1] and found == near


@pytest.mark.parametrize("arm", ["A", "B", "C"])
def test_the_first_second_costs_less_where_it_comes_first(arm, small, monkeypatch):
    """All at once, a window must be whole."""
    config = small(gen_seconds=1.6, **FEW)
    model = random_model(arm, config)
    asked, continuation = [], model.continuation

    def watched(ctx, noise, *rest):
        asked.append(noise.shape[1])
        return continuation(ctx, noise, *rest)
    monkeypatch.setattr(model, "continuation", watched)
    monkeypatch.setattr(speaking, "TIMES", 1)
    flops, first, faster = speaking.cost(model, torch.zeros(1, config.ctx_frames, 80), 2)
    assert set(asked) == ({128} if arm == "A" else {80, 128})
    assert flops > 1e6 and 0 < first < 60 and faster > 0


def test_runs_of_all_arms_are_shown_beside_each_other(small, mute, cache, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(speaking, "load_listener", lambda: Listener().eval().requires_grad_(False))
    monkeypatch.setattr(speaking, "EVALUATIONS", (1, 2))
    monkeypatch.setattr(speaking, "TIMES", 1)
    runs = []
    for arm in "AB":
        config = small(out=str(tmp_path / arm), **FEW | dict(steps=1))
        ar.train(config, arm)
        runs.append(config.out)
    capsys.readouterr()
    picture = tmp_path / "speaking.png"
    monkeypatch.setattr("sys.argv", ["speaking", *runs, "--minutes", "0.1", "--plot", str(picture)])
    speaking.main()
    said = capsys.readouterr().out
    assert re.findall(r"^\| (A|B) \| (\d+|-) \|", said, re.M) == [
        ("A", "1"), ("A", "2"), ("B", "-")] and "| true, of B |" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"

    (tmp_path / "A/config.json").write_text((tmp_path / "A/config.json").read_text().replace(
        '"toy_grammar": "words"', '"toy_grammar": "topics"'))
    with pytest.raises(UserError, match="not trained on the default toy speech"):
        speaking.main()
    monkeypatch.setattr("sys.argv", ["speaking", *runs, "--minutes", "nan"])
    with pytest.raises(UserError, match="--minutes"):
        speaking.main()
