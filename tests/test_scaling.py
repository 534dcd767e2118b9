"""The scaling study: known laws are found again, odd tables are refused or named, a grid runs."""

import csv
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch

import cdslm
from cdslm import Trainer, UserError, load_run
from lab import judge, laws, scaling
from lab.laws import Law, edge, fit, fuse, optimum, parabola, read, study
from lab.listener import Listener
from tests.conftest import SMALL, command, flags

CHINCHILLA = Law(1.82, 482, 2085, 0.348, 0.366)  # Besiroglu et al. 2024
SMALLER = Law(0.008, 8, 300, 0.5, 0.6)  # about as a laptop's


def grid(law, budgets, sizes=12, noise=0.0, seed=0, reach=1.5, k=6.0, p=1.0):
    """Runs around the optimum of each budget: N, D, C and loss, each (budgets * sizes,)."""
    rng, rows = np.random.default_rng(seed), []
    for C in budgets:
        best = optimum(law, C, k, p)["N"]
        rows += [(N, C / (k * N**p), C) for N in best * np.exp(np.linspace(-reach, reach, sizes))]
    N, D, C = np.array(rows).T
    return N, D, C, law(N, D) * np.exp(noise * rng.standard_normal(len(N)))


def metrics(law, N, D, a=(15.0, 30.0, 60.0), b=(1.3, 1.2, 1.0), floor=(0.002, 0.02, 0.08)):
    """Metrics (n, 3) that follow a law's loss, and their floor, as `fuse` has them."""
    a, b, floor = (np.array(x) for x in (a, b, floor))
    return floor + (1 - floor) * (1 - np.exp(-a * (law(N, D) - law.E)[:, None] ** b)), np.tile(
        floor, (len(N), 1)
    )


def write(path, rows):
    """Rows of a table as CSV or JSONL -> path."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    return path


def table(names="N D loss", law=SMALLER, budgets=(1e12, 1e13), sizes=5, noise=0.01):
    """Rows with these columns."""
    columns = dict(zip(("N", "D", "C", "loss"), grid(law, budgets, sizes, noise)))
    return [
        dict(zip(names.split(), map(float, row)))
        for row in zip(*(columns[name] for name in names.split()))
    ]


@pytest.fixture
def few(monkeypatch):
    """Few bootstrap samples: where only the rest matters."""
    monkeypatch.setattr(laws, "SAMPLES", 4)


# --------------------------------------------------------------------------------------------------
# The law.


@pytest.mark.slow
def test_the_exponents_are_found_again_through_noise():
    found = [
        fit(N, D, loss)
        for N, D, _, loss in (
            grid(CHINCHILLA, np.logspace(18, 22, 10), noise=0.01, seed=seed) for seed in range(10)
        )
    ]
    off = [
        max(abs(law.alpha / CHINCHILLA.alpha - 1), abs(law.beta / CHINCHILLA.beta - 1))
        for law in found
    ]
    assert sum(x < 0.1 for x in off) >= 9, off


@pytest.mark.parametrize("law", [CHINCHILLA, SMALLER, Law(1.69, 406.4, 410.7, 0.34, 0.28)])
def test_a_law_without_noise_is_found_exactly(law):
    N, D, _, loss = grid(
        law, np.geomspace(1e17, 1e22, 6) if law.E > 1 else np.geomspace(1e12, 1e14, 5), sizes=8
    )
    found = fit(N, D, loss)
    assert [found.E, found.A, found.B, found.alpha, found.beta] == pytest.approx(
        [law.E, law.A, law.B, law.alpha, law.beta], rel=1e-3
    )


def test_a_few_runs_gone_wrong_change_little():
    N, D, _, loss = grid(CHINCHILLA, np.logspace(18, 22, 10), noise=0.003)
    loss[[7, 50, 90]] *= 1.5
    assert fit(N, D, loss).alpha == pytest.approx(CHINCHILLA.alpha, rel=0.1)


def test_the_fit_is_where_no_other_law_is_better():
    N, D, _, loss = grid(SMALLER, np.geomspace(1e12, 3e13, 4), sizes=5, noise=0.01)

    def cost(law):
        return np.abs(np.log(law(N, D) / loss)).mean()

    best, rng = fit(N, D, loss), np.random.default_rng(0)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(100):
            other = Law(
                *np.array(list(vars(best).values())) * np.exp(size * rng.standard_normal(5))
            )
            assert cost(other) > cost(best) - 1e-5
    assert cost(SMALLER) > cost(best)


def test_the_optimum_is_the_lowest_point_of_its_isoflop():
    for law, C, k, p in ((CHINCHILLA, 1e21, 6.0, 1.0), (SMALLER, 1e13, 2.6, 0.98)):
        best = optimum(law, C, k, p)
        assert k * best["N"] ** p * best["D"] == pytest.approx(C)
        sizes = best["N"] * np.exp(np.linspace(-3, 3, 60_001))
        loss = law(sizes, C / (k * sizes**p))
        assert sizes[loss.argmin()] == pytest.approx(
            best["N"], rel=1e-3
        ) and loss.min() == pytest.approx(best["loss"])
        u = np.array([-1e-3, 0, 1e-3])
        logs = np.log(law(best["N"] * np.exp(u), best["D"] * np.exp(-p * u)))
        assert best["kappa"] == pytest.approx((logs[0] - 2 * logs[1] + logs[2]) / 1e-6, rel=1e-3)
        flat = sizes[loss <= 1.01 * loss.min()]
        assert best["N_range"] == pytest.approx([flat[0], flat[-1]], rel=5e-3)
        assert best["D_range"] == pytest.approx(
            [C / (k * flat[-1] ** p), C / (k * flat[0] ** p)], rel=5e-3
        )


def test_the_trends_are_those_of_the_optima():
    k, p = 2.6, 0.98
    first, last = (optimum(SMALLER, C, k, p) for C in (1e12, 1e14))
    found = laws.trends(SMALLER, 1e12, 1e14, k, p)
    for name in ("N", "D", "r", "kappa"):
        assert found[f"{name}_exponent"] == pytest.approx(
            math.log(last[name] / first[name]) / math.log(100)
        )
    assert found["N_exponent_6ND"] == pytest.approx(0.6 / 1.1)


def test_a_parabola_finds_a_bottom_or_says_there_is_none():
    N = np.array([1e5, 2e5, 4e5, 9e5])
    bottom = parabola(N, 0.03 * np.exp(0.1 * np.log(N / 3e5) ** 2))
    assert bottom == pytest.approx({"N": 3e5, "kappa": 0.2})
    assert math.isnan(parabola(N, 0.03 * np.exp(-0.1 * np.log(N / 3e5) ** 2))["N"])
    assert math.isnan(parabola(N[:2], np.array([1.0, 2.0]))["N"])


def test_an_optimum_at_the_edge_is_a_bound():
    N, loss = np.array([1e5, 2e5, 4e5]), np.array([3.0, 2.0, 3.0])
    assert edge(N, loss, 2e5, N) is None
    assert edge(N, loss, 0.9e5, N) == edge(N, loss[[1, 0, 0]], 2e5, N) == "low"
    assert edge(N, loss, 5e5, N) == edge(N, loss[[0, 0, 1]], 2e5, N) == "high"
    alone = [edge(N[:1], loss[:1], best, N) for best in (0.9e5, 3e5, 5e5)]
    assert alone == ["low", None, "high"]


def test_runs_that_form_no_isoflops_have_intervals_and_no_edges(few):
    N, D = (x.flatten() for x in np.meshgrid(np.geomspace(1e5, 1e7, 5), np.geomspace(1e6, 3e8, 4)))
    loss = SMALLER(N, D) * np.exp(0.01 * np.random.default_rng(0).standard_normal(20))
    order = np.argsort(N * D)
    runs = {
        "N": N[order],
        "D": D[order],
        "C": 6 * (N * D)[order],
        "loss": loss[order],
        "group": np.arange(20),
    }
    report = study(runs, [])
    assert all(low < high for low, high in report["interval"].values())
    inside = [row for row in report["budgets"] if 1e5 < row["N"] < 1e7]
    assert inside and not any(row["edge"] for row in inside)


def test_metrics_are_fitted_with_the_law():
    N, D, C, loss = grid(SMALLER, np.geomspace(1e12, 3e13, 4), sizes=6, noise=0.002)
    pjsd, floor = metrics(SMALLER, N, D)
    noisy = pjsd * np.exp(0.01 * np.random.default_rng(0).standard_normal(pjsd.shape))
    runs = {"N": N, "D": D, "loss": loss, "pjsd": noisy, "pjsd_floor": floor}
    predict, (a, b) = fuse(fit(N, D, loss), runs)
    assert b == pytest.approx([1.3, 1.2, 1.0], rel=0.1)
    better = optimum(SMALLER, 1e14)
    N, D = np.array([better["N"]]), np.array([better["D"]])
    guess = predict(N, D)
    assert guess[0] == pytest.approx(SMALLER(N, D), rel=0.05)
    assert guess[1][0] == pytest.approx(metrics(SMALLER, N, D)[0][0], rel=0.1)


# --------------------------------------------------------------------------------------------------
# The report.


@pytest.fixture(scope="module")
def report():
    """The report on 4 budgets, 6 sizes and three metrics, almost without noise, and on one budget
    twice."""
    N, D, C, loss = grid(SMALLER, [1e12, 3e12, 1e13, 3e13], sizes=6, noise=0.003, k=2.6, p=0.98)
    group = np.repeat(np.arange(4), 6)
    pjsd, floor = metrics(SMALLER, N, D)
    runs = {"N": N, "D": D, "C": C, "loss": loss, "group": group, "pjsd": pjsd, "pjsd_floor": floor}
    runs = {name: np.concatenate([x, x[group == 1]]) for name, x in runs.items()}
    runs["loss"][-6:] *= np.exp(0.01 * np.array([1, -1, 1, -1, 1, -1]))
    runs["pjsd"][-6:] += 0.004
    order = np.argsort(runs["C"], kind="stable")
    return study({name: x[order] for name, x in runs.items()}, ["a note"])


def test_the_report_finds_a_known_law(report):
    k, p = report["cost"].values()
    assert (k, p) == pytest.approx((2.6, 0.98))
    for name, true in zip(("E", "A", "B", "alpha", "beta"), (0.008, 8, 300, 0.5, 0.6)):
        low, high = report["interval"][name]
        assert low < high and 0.9 * low < true < 1.1 * high
    assert report["N_exponent"] == pytest.approx(0.6 / (0.5 + 0.98 * 0.6), rel=0.05)
    for row in report["budgets"]:
        true = optimum(SMALLER, row["C"], k, p)
        assert row["N"] == pytest.approx(true["N"], rel=0.1) and row["r"] == pytest.approx(
            true["r"], rel=0.2
        )
        assert row["parabola"]["N"] == pytest.approx(true["N"], rel=0.3)
        assert row["interval"]["kappa"][0] <= row["kappa"] * 1.05 and row["edge"] is None
        assert (
            row["N_range"][0] < row["N"] < row["N_range"][1]
            and row["D_range"][0] < row["D"] < row["D_range"][1]
        )
    assert report["warnings"] == [] and report["excluded"] == ["a note"] and report["runs"] == 30


def test_the_report_holds_out_and_compares_seeds(report):
    assert 0 < report["heldout_error"] < 0.02 and 0 < report["heldout_error_fused"] < 0.02
    assert all(0 <= x < 0.02 for x in report["heldout_pjsd"]) and len(report["pjsd"]["b"]) == 3
    assert report["seeds"]["log_loss"] == pytest.approx(0.01 / math.sqrt(2), rel=1e-3)
    assert report["seeds"]["pjsd"] == pytest.approx([0.004 / math.sqrt(2)] * 3)
    assert report["seeds"]["df"] == 6 and report["lack_of_fit"]["df"] == [19, 6]
    assert 0 < report["heldout_error_constant_r"] and list(report["followers"])[2] == "pJSD, n = 3"


@pytest.mark.slow
def test_intervals_cover_the_truth():
    hits = total = 0
    for seed in range(20):
        N, D, C, loss = grid(SMALLER, np.geomspace(1e12, 3e13, 4), sizes=6, noise=0.01, seed=seed)
        runs = {"N": N, "D": D, "C": C, "loss": loss, "group": np.repeat(np.arange(4), 6)}
        interval = study(runs, [])["interval"]
        for name, true in (("alpha", 0.5), ("beta", 0.6), ("N_exponent", 0.6 / 1.1)):
            hits, total = hits + (interval[name][0] <= true <= interval[name][1]), total + 1
    assert hits >= 0.8 * total


def test_the_page_says_what_the_report_knows(report, capsys):
    laws.page(report)
    said = capsys.readouterr().out
    for text in (
        "of 30 runs",
        f"{report['E']:.4g} [",
        "r* = D*/N*",
        "kappa",
        "N within 1%",
        "3e+13",
        "n = 3: a",
        f"{report['heldout_error']:.2%} off",
        "two seeds differ",
        "over the 24 sizes",
        "they do not reject it",
        f"alpha = beta:   loss {report['heldout_error_constant_r']:.2%} off",
        f"fused with the pJSD:  loss {report['heldout_error_fused']:.2%} off",
        "  pJSD, n = 3 ",
        "a note",
    ):
        assert text in said, text


# --------------------------------------------------------------------------------------------------
# Sizes with trunks and seeds.

STEEP = Law(0.01, 6, 300_000, 0.45, 1.15)  # r* falls quickly
EVEN = Law(0.01, 300, 600, 0.75, 0.75)  # r* is the same for all C
WIDTHS = 5e4 * 1.9 ** np.arange(8)


def trunks(law, noise=0.005, sizes=0.0, seed=0, seeds=2):
    """A study as `lab.scaling run` makes it: 5 budgets, each with the 5 sizes next to its optimum,
    and `seeds` trunks of each size. Half of the noise's variance is the trunk's; all runs of a size
    share a further error, of standard deviation `sizes`."""
    rng, rows = np.random.default_rng(seed), []
    of_size = dict(zip(WIDTHS, sizes * rng.standard_normal(len(WIDTHS))))
    of_trunk = dict(zip(WIDTHS, noise / 2**0.5 * rng.standard_normal((len(WIDTHS), seeds))))
    for group, C in enumerate(np.geomspace(6e11, 6e13, 5)):
        best = optimum(law, C)["N"]
        for N in sorted(sorted(WIDTHS, key=lambda N: abs(math.log(N / best)))[:5]):
            own = noise / 2**0.5 * rng.standard_normal(seeds)
            for error in own + of_trunk[N] + of_size[N]:
                D = C / (6 * N)
                rows.append((N, D, C, law(N, D) * math.exp(error), group))
    return dict(zip(("N", "D", "C", "loss", "group"), np.array(rows).T))


def least_squares(law, runs):
    return fit(runs["N"], runs["D"], runs["loss"], start=law, delta=math.inf)


@pytest.fixture
def some(monkeypatch):
    """Enough bootstrap samples for a rough interval."""
    monkeypatch.setattr(laws, "SAMPLES", 30)


@pytest.mark.parametrize("law", [STEEP, EVEN])
def test_a_study_with_trunks_finds_its_law_and_whether_r_is_constant(law, some, capsys):
    report = study(trunks(law), [])
    for name in ("E", "alpha", "beta", "N_exponent"):
        low, high = report["interval"][name]
        true = laws.trends(law, 6e11, 6e13, 6, 1).get(name) or getattr(law, name)
        assert low < high and low - 0.1 * true < true < high + 0.1 * true, name
    assert report["constant_r"]["rejected"] == (law is STEEP)
    held = report["heldout_error"], report["heldout_error_constant_r"]
    assert held[0] < 0.02 and (held[1] > 2 * held[0] if law is STEEP else held[1] < 0.02)
    assert not report["lack_of_fit"]["rejected"] and report["lack_of_fit"]["df"] == [20, 8]
    laws.page(report)
    said = capsys.readouterr().out
    assert "95 % of 30 bootstrap samples over the 8 sizes" in said
    assert "F(20, 8)" in said and "they do not reject it" in said
    assert ("no; it goes as C to the -" if law is STEEP else "it may be; it goes as C") in said


def test_sizes_that_share_an_error_widen_the_intervals_over_sizes(some):
    runs = trunks(STEEP, sizes=0.03)
    law = fit(runs["N"], runs["D"], runs["loss"], start=STEEP)
    widths = []
    for clusters in (runs["N"], np.arange(len(runs["N"]))):
        weights = laws.draws(clusters)
        found = [fit(runs["N"], runs["D"], runs["loss"], weight, law) for weight in weights]
        widths.append(np.ptp(laws.quantiles([law.beta / (law.alpha + law.beta) for law in found])))
    assert widths[0] > 1.3 * widths[1]


def test_a_sample_holds_all_runs_of_a_size_or_none():
    clusters = np.array([1.0, 1.0, 2.0, 3.0, 4.0, 4.0])
    for weight in laws.draws(clusters):
        assert weight[0] == weight[1] and weight[4] == weight[5]
        assert weight[[0, 2, 3, 4]].sum() == 4 and (weight[[0, 2, 3, 4]] > 0).sum() >= 3
    assert list(laws.draws(clusters[:4])) == []


def test_the_law_is_rejected_where_a_shape_is_odd_and_seldom_else():
    rejected = {0.0: 0, 0.05: 0}
    for odd in rejected:
        for seed in range(5):
            runs = trunks(STEEP, seed=seed)
            runs["loss"] = runs["loss"] * np.exp(odd * (runs["N"] == WIDTHS[3]))
            test = laws.lack_of_fit(least_squares(STEEP, runs), runs, laws.seeds(runs))
            rejected[odd] += test["rejected"]
    assert rejected[0.0] <= 1 and rejected[0.05] == 5


def test_a_seed_counts_once_a_size_however_many_budgets():
    runs = trunks(STEEP, noise=0.01)
    assert laws.seeds(runs)["df"] == 8
    assert laws.seeds(runs)["log_loss"] == pytest.approx(0.01, rel=0.5)
    once = trunks(STEEP, seeds=1)
    assert laws.seeds(once) is None and laws.lack_of_fit(STEEP, once, None) is None
    same = trunks(STEEP, noise=0)
    assert laws.lack_of_fit(STEEP, same, laws.seeds(same)) is None


@pytest.mark.parametrize("F, df, p", [(4.965, [1, 10], 0.05), (4.757, [3, 6], 0.05),
                                      (2.348, [10, 20], 0.05), (8.096, [1, 20], 0.01)])
def test_p_is_that_of_the_tables(F, df, p):
    assert laws.f_test(2 * F, 2.0, df)["p"] == pytest.approx(p, rel=0.02)
    assert laws.f_test(-1.0, 2.0, df)["p"] == 1


def test_a_tied_fit_has_one_exponent():
    runs = trunks(EVEN, noise=0)
    found = fit(runs["N"], runs["D"], runs["loss"], tied=True)
    assert found.alpha == found.beta == pytest.approx(0.75, rel=1e-3)
    assert found.E == pytest.approx(0.01, rel=1e-3)


def test_metrics_that_follow_the_loss_alone_do_and_others_do_not(some):
    runs, held = trunks(STEEP), 0
    runs["word_rate"] = -runs["loss"]
    for seed in range(10):
        noise = 0.001 * np.random.default_rng(seed).standard_normal(len(runs["N"]))
        follows = 0.3 + 0.1 * np.log(runs["loss"]) + noise
        runs["pjsd"] = np.stack([follows, follows + 0.02 * np.log2(runs["N"])], axis=1)
        runs["pjsd"][seed, 0] = math.nan
        found = laws.followers(runs)
        assert list(found) == ["pJSD, n = 1", "pJSD, n = 2", "word rate"]
        one, two, words = found.values()
        assert min(one["spearman"]) > 0.6 and words["spearman"] == pytest.approx([-1] * 5)
        assert one["slope"] == pytest.approx(0, abs=0.003)
        assert two["slope"] == pytest.approx(0.02, abs=0.003) and two["interval"][0] > 0.01
        held += one["interval"][0] <= 0 <= one["interval"][1]
    assert held >= 7
    runs["word_rate"] = np.full(len(runs["N"]), math.nan)
    assert "word rate" not in laws.followers(runs)


def test_rank_correlation_counts_ties_and_leaves_out_what_is_not_known():
    x = np.array([1.0, 2.0, 3.0, 4.0])
    assert laws.rank_correlation(x, x**3) == pytest.approx(1)
    assert laws.rank_correlation(x, np.array([1.0, 1.0, 2.0, 2.0])) == pytest.approx(0.8944, 1e-3)
    assert laws.rank_correlation(x, np.array([3.0, math.nan, 2.0, 1.0])) == pytest.approx(-1)
    assert math.isnan(laws.rank_correlation(x, np.ones(4)))
    assert math.isnan(laws.rank_correlation(x[:2], x[:2]))


# --------------------------------------------------------------------------------------------------
# Tables, good and bad.


def test_csv_and_jsonl_with_any_two_columns_say_the_same(tmp_path):
    seen = []
    for number, names in enumerate(("N D loss", "N C loss", "D C loss", "N D C loss")):
        for suffix in (".csv", ".jsonl"):
            runs, notes = read(write(tmp_path / f"{number}{suffix}", table(names)))
            assert not notes and runs["group"].tolist() == [0] * 5 + [1] * 5
            seen.append(np.stack([runs[name] for name in ("N", "D", "C", "loss")]))
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], rtol=1e-12)


def test_metrics_are_read_from_both(tmp_path):
    rows = [
        row | {"pjsd": [0.1, i / 10], "pjsd_floor": [0.0, 0.05], "word_rate": i / 20}
        for i, row in enumerate(table())
    ]
    for name in ("runs.csv", "runs.jsonl"):
        runs, _ = read(write(tmp_path / name, rows))
        assert runs["word_rate"].tolist() == [i / 20 for i in range(10)]
        assert runs["pjsd"].tolist() == [row["pjsd"] for row in rows] and runs[
            "pjsd_floor"
        ].shape == (10, 2)


def test_the_order_of_rows_does_not_matter_and_what_is_there_twice_counts_once(tmp_path):
    rows = table()
    straight = read(write(tmp_path / "a.csv", rows))[0]
    mixed, notes = read(write(tmp_path / "b.csv", rows[::-1] + rows[3:5]))
    assert all(np.array_equal(straight[name], mixed[name]) for name in straight)
    assert notes == ["2 rows for runs that have a later row"]


def test_seeds_are_no_duplicates_and_a_run_tried_again_counts_as_it_ended(tmp_path):
    rows = [
        row | {"size": f"s{i % 5}", "budget": 10.0 ** (12 + i // 5), "seed": 0}
        for i, row in enumerate(table())
    ]
    failed = {"size": "s0", "budget": 1e12, "seed": 0, "error": "ten steps in a row"}
    runs, notes = read(
        write(tmp_path / "a.jsonl", [failed, *rows, rows[1] | {"seed": 1, "loss": 0.05}])
    )
    assert len(runs["N"]) == 11 and notes == ["1 rows for runs that have a later row"]
    _, notes = read(write(tmp_path / "b.jsonl", [*rows, failed | {"seed": 2}]))
    assert notes == ["s0 at 1e+12 FLOPs: ten steps in a row"]


def test_a_table_from_elsewhere_may_have_seeds_and_a_mark(tmp_path):
    path = write(tmp_path / "a.csv", [row | {"seed": 0} for row in table()])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    runs, notes = read(path)
    assert len(runs["N"]) == 10 and not notes


def test_runs_that_are_not_numbers_are_left_out_and_named(tmp_path):
    rows = table(sizes=6)
    for i, bad in ((1, math.nan), (4, "diverged"), (7, math.inf), (9, -1.0)):
        rows[i]["loss"] = bad
    runs, notes = read(write(tmp_path / "runs.csv", rows))
    assert len(runs["N"]) == 8
    assert notes == [
        f"row {i}: N, D, C or its loss is not a positive number" for i in (2, 5, 8, 10)
    ]


@pytest.mark.parametrize(
    "rows, message",
    [
        (table(budgets=[1e12], sizes=8), "two budgets and six runs; here are 8, 1 and 8"),
        (table("N D loss", sizes=2), "here are 4, 2 and 4"),
        ([row | {"N": 1e6} for row in table()], "two sizes, two budgets and six runs; here are 1"),
        ([row | {"loss": math.nan} for row in table()], "row 10: N, D, C or its loss"),
        (table("N D"), "needs columns loss and two of N, D, C; has D, N"),
        (table("N loss"), "needs columns loss and two of N, D, C; has N, loss"),
        ([], "has none"),
        (
            [row | {"pjsd": [0.1] * (i % 2), "pjsd_floor": [0.1]} for i, row in enumerate(table())],
            "as long in every row",
        ),
    ],
)
def test_a_table_that_makes_no_law_is_one_line(tmp_path, rows, message):
    with pytest.raises(UserError) as error:
        read(write(tmp_path / "runs.jsonl", rows))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_is_no_table_is_one_line(tmp_path):
    (tmp_path / "bad.jsonl").write_text("{not json\n")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("bad.jsonl", "neither CSV nor JSONL"),
        ("list.jsonl", "neither CSV nor JSONL"),
        ("bytes.csv", "neither CSV nor JSONL"),
        ("none.csv", "No such file"),
        (".", "No such file"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)
    done = command("lab.scaling", "fit", tmp_path / "none.csv")
    assert (
        done.returncode == 2
        and done.stderr == f"error: {tmp_path}/none.csv: No such file or directory\n"
    )


def fitted(*words):
    """scaling.py fit ..., in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["scaling.py", "fit", *map(str, words)])
        scaling.main()


def test_an_optimum_at_the_edge_warns(tmp_path, few, capsys):
    rows = [row for i, row in enumerate(table(budgets=(1e12, 1e13, 1e14), sizes=7)) if i % 7 > 3]
    fitted(write(tmp_path / "runs.csv", rows), "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["edge"] for row in report["budgets"]] == ["low"] * 3
    assert "at 1e+12 FLOPs the optimum lies at the smallest size" in capsys.readouterr().out


def test_three_sizes_have_no_intervals_and_the_page_says_so(tmp_path, few, capsys):
    shapes = [(N, C / (6 * N)) for C in (1e12, 1e13) for N in (3e5, 6e5, 1.2e6)]
    rows = [{"N": N, "D": D, "loss": SMALLER(N, D)} for N, D in shapes]
    fitted(write(tmp_path / "runs.csv", rows))
    said, heard = capsys.readouterr()
    assert "fewer than four sizes: too few for intervals" in said and "[nan, nan]" in said
    assert "does the law hold? not known" in said and not heard


def test_json_alone_on_the_screen_and_no_nan_in_it(tmp_path, few, capsys):
    fitted(write(tmp_path / "runs.csv", table()), "--json")
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {
        "E",
        "A",
        "B",
        "alpha",
        "beta",
        "interval",
        "N_exponent",
        "D_exponent",
        "heldout_error",
    } <= set(report)
    assert {"C", "N", "D", "r", "kappa", "N_range", "D_range"} <= set(report["budgets"][0])
    assert report["heldout_error"] is None  # of two budgets none can be held out


@pytest.mark.parametrize("pjsd", [False, True])
def test_the_figure_is_drawn(tmp_path, few, pjsd):
    pytest.importorskip("matplotlib")
    rows = table("N D C loss", budgets=(1e12, 1e13, 1e14))
    if pjsd:
        values, floor = metrics(SMALLER, *(np.array([row[name] for row in rows]) for name in "ND"))
        values *= np.exp(0.01 * np.random.default_rng(0).standard_normal(values.shape))
        rows = [
            row | {"pjsd": v.tolist(), "pjsd_floor": f.tolist()}
            for row, v, f in zip(rows, values, floor)
        ]
    fitted(write(tmp_path / "runs.csv", rows), "--plot", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="can't write docx"):
        fitted(tmp_path / "runs.csv", "--plot", tmp_path / "figure.docx")
    assert not (tmp_path / "figure.docx").exists()


def test_without_matplotlib_it_says_so(tmp_path, few, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        fitted(write(tmp_path / "runs.csv", table()), "--plot", tmp_path / "figure.png")


# --------------------------------------------------------------------------------------------------
# A grid that is run.

TINY = flags(**{name: SMALL[name] for name in SMALL if name not in ("depth", "width", "steps")})


def start(patch, *words):
    """Run a grid of two sizes and two budgets, judged by a listener that is not trained."""
    torch.manual_seed(0)
    listener = Listener().eval().requires_grad_(False)
    patch.setattr(judge, "load_listener", lambda: listener)
    patch.setattr(judge.Judge, "opinion", lambda self, frames: math.nan)
    patch.setattr(scaling, "VALIDATION", 8)
    patch.setattr(scaling, "LEAST_STEPS", 4)
    grid = ["--budgets", "1e8,3e8", "--sizes", "1x16,1x24", "--minutes", "0.1", *map(str, words)]
    patch.setattr("sys.argv", ["scaling.py", "run", *grid, *TINY])
    scaling.main()


@pytest.fixture
def go(monkeypatch, cache):
    """go("--out", ...): run that grid, or another."""
    return lambda *words: start(monkeypatch, *words)


def rows(folder):
    """The runs of a folder, without what differs from time to time."""
    lines = [
        json.loads(line, parse_constant=str)
        for line in (folder / "runs.jsonl").read_text().splitlines()
    ]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in lines]


@pytest.fixture(scope="module")
def straight(cache, tmp_path_factory):
    """The folder of a grid run without incident, then of its larger budget with another seed."""
    folder = tmp_path_factory.mktemp("grid") / "straight"
    with pytest.MonkeyPatch.context() as patch:
        start(patch, "--out", folder)
        start(patch, "--out", folder, "--seed", "1", "--budgets", "3e8")
    return folder


def test_a_grid_runs_and_each_run_says_what_it_was(straight, few, capsys):
    found = rows(straight)
    assert [(row["size"], row["budget"], row["seed"]) for row in found] == [
        ("1x16", 1e8, 0),
        ("1x24", 1e8, 0),
        ("1x16", 3e8, 0),
        ("1x24", 3e8, 0),
        ("1x16", 3e8, 1),
        ("1x24", 3e8, 1),
    ]
    for row in found:
        config, model, _ = load_run(straight / f"{row['size']}-seed{row['seed']}")
        assert row["N"] == sum(p.numel() for p in model.parameters())
        assert (
            row["C"] == pytest.approx(row["budget"], rel=0.2)
            and row["6ND"] == 6 * row["N"] * row["D"]
        )
        assert row["hours"] / row["D"] == pytest.approx(config.patch_size / 80 / 3600)
        assert row["epochs"] > 0 and len(row["losses"]) == 10
        assert row["loss"] == scaling.trained_loss(row["losses"], config.min_snr_gamma)
        assert {"word_rate", "late_words", "mel", "dnsmos"} <= set(row)
        assert len(row["pjsd"]) == len(row["pjsd_floor"]) == 5
    fitted(straight)
    shown = capsys.readouterr().out
    assert "of 6 runs" in shown and "of the best size at each budget" in shown


def test_a_branch_is_the_run_that_was_so_long_from_the_start(go, straight, tmp_path):
    go("--out", tmp_path / "alone", "--budgets", "3e8", "--sizes", "1x24")
    assert rows(tmp_path / "alone") == [
        row
        for row in rows(straight)[:4]
        if (row["size"], row["budget"]) == ("1x24", 3e8)
    ]


def test_the_same_command_goes_on(go, straight, tmp_path, monkeypatch, capsys):
    step, count = Trainer.step, [0]

    def interrupted(trainer):
        count[0] += 1
        if count[0] in stops:
            os.kill(os.getpid(), signal.SIGINT)
        return step(trainer)

    go("--out", straight)  # nothing is left to do
    assert "0 of 4 runs to do" in capsys.readouterr().out and len(rows(straight)) == 6
    lengths = [row["D"] // (4 * 12) for row in rows(straight)[:4]]
    stops = {lengths[0] // 3, lengths[0] + 2, sum(lengths[:2]) + 5}
    monkeypatch.setattr(Trainer, "step", interrupted)
    for _ in stops:
        with pytest.raises(SystemExit) as stopped:
            go("--out", tmp_path / "again")
        assert stopped.value.code == 130
    go("--out", tmp_path / "again")
    assert rows(tmp_path / "again") == rows(straight)[:4]


def test_a_run_that_fails_is_reported_and_tried_again(go, straight, tmp_path, monkeypatch, capsys):
    step, validate = Trainer.step, Trainer.validate

    def failing(trainer):
        if trainer.config.width == 24:
            raise RuntimeError("out of memory\nand more")
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", failing)
    monkeypatch.setattr(Trainer, "validate", lambda trainer, number: {"mean": math.nan})
    with pytest.raises(SystemExit) as failed:
        go("--out", tmp_path / "again")
    found = rows(tmp_path / "again")
    assert failed.value.code == 1 and [row["error"] for row in found] == 2 * [
        "its validation loss is not finite",
        "out of memory",
    ]
    assert "1x24 at 1e+08 FLOPs failed: out of memory" in capsys.readouterr().err
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(Trainer, "validate", validate)
    go("--out", tmp_path / "again")
    go("--out", tmp_path / "again", "--seed", "1", "--budgets", "3e8")
    assert rows(tmp_path / "again")[4:] == rows(straight)
    assert read(tmp_path / "again")[1] == ["4 rows for runs that have a later row"]


def test_a_job_trains_its_part(go, straight, tmp_path):
    go("--out", tmp_path / "parts", "--only", "1x24")
    assert rows(tmp_path / "parts") == [row for row in rows(straight)[:4] if row["size"] == "1x24"]
    go("--out", tmp_path / "parts", "--only", "1x16")
    assert sorted(map(str, rows(tmp_path / "parts"))) == sorted(map(str, rows(straight)[:4]))


def planned(*words):
    arguments, rest = scaling.parse(["run", *words])
    return scaling.plan(arguments, cdslm.parse(scaling.STUDY + rest))


def test_each_budget_trains_the_sizes_next_to_its_guess():
    runs = planned("--budgets", "2e12,2e13,6e12")
    for budget in (2e12, 6e12, 2e13):
        mine = [config for size, C, config in runs if C == budget]
        sizes = [scaling.count(config)["parameters"] for config in mine]
        assert len(mine) == 4 and sizes == sorted(set(sizes)) and sizes[-1] > 5 * sizes[0]
        assert sizes[0] < scaling.best_size(budget) < sizes[3]
        for config in mine:
            windows = config.steps * config.batch_size
            cost = windows * scaling.count(config)["flops"]
            assert cost == pytest.approx(budget, rel=0.01)
            assert config.steps >= scaling.LEAST_STEPS
            assert windows * 4 / 3600 <= scaling.EPOCHS * config.toy_hours


def test_a_second_seed_is_another_run_of_the_same_study():
    first, second = planned(), planned("--seed", "1")
    assert [run[:2] for run in first] == [run[:2] for run in second]
    assert {run[2].out for run in first}.isdisjoint(run[2].out for run in second)


def test_the_loss_has_the_weight_of_the_training():
    errors = {-2.0: 0.5, 0.0: 0.1, 2.0: 0.01}
    losses = {f"{level}": min(math.exp(level), 5) * error for level, error in errors.items()}
    expected = sum(min(math.exp(level), 0.2) * error for level, error in errors.items()) / 3
    assert scaling.trained_loss(losses, 0.2) == pytest.approx(expected)
    assert scaling.trained_loss(losses, 5) == pytest.approx(sum(losses.values()) / 3)


def test_other_speech_is_judged_from_its_sound(monkeypatch, small):
    seen = []
    monkeypatch.setattr(scaling.eval_pjsd, "recogniser", seen.append)
    monkeypatch.setattr(
        scaling.eval_pjsd, "judge_run", lambda words: seen.append((words.run, words.minutes))
        or {"pjsd": [0.1], "floor": [0.0], "phones": {}}
    )
    config = small(data="somewhere")
    found = scaling.make_judge(config, None, None, None, 2.5)(
        type("Trainer", (), {"config": config})
    )
    assert found == {"pjsd": [0.1], "floor": [0.0]}
    assert seen == ["hama", (config.out, 2.5)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--budgets", "1e6"], "suit none of --sizes"),
        (["--budgets", "-1"], "invalid numbers value"),
        (["--budgets", "1e9,many"], "invalid numbers value"),
        (["--sizes", "2"], "invalid shapes value"),
        (["--sizes", "1x100"], "multiple of 64"),
        (["--each", "0"], "--each must be at least 1"),
        (["--minutes", "nan"], "--minutes more than 0"),
        (["--only", "9x9"], "--only must be some of --sizes"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(go, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        go("--out", tmp_path / "runs", *words)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_how_long_and_does_nothing(go, tmp_path, capsys):
    go("--out", tmp_path / "runs", "--dry-run")
    assert (
        "4 of 4 runs to do: about 0 min" in capsys.readouterr().out
        and not (tmp_path / "runs").exists()
    )


def test_torchrun_is_for_cdslm(go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for name, value in dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="here", MASTER_PORT=1).items():
            patch.setenv(name, str(value))
        with pytest.raises(UserError, match="torchrun cdslm.py"):
            go("--out", tmp_path / "runs")
    with pytest.raises(UserError, match="torchrun cdslm.py"):
        go("--out", tmp_path / "runs", "--parallel", "fsdp")
