"""laws: what a grid of runs shows of L(N, D) = E + A / N^alpha + B / D^beta, and what follows.

The fit is that of Hoffmann et al. (2022, approach 3): the Huber loss of log L, which is the log of
a sum of exponentials, minimised by L-BFGS from the best of many starts. Their published fit stopped
too early (Besiroglu et al. 2024); here L-BFGS runs until nothing changes. Inside, all values are
natural logarithms, and N and D are measured from the middle of the runs, so that a change of the
exponents does not change A and B as well.

Runs of one size share a trunk (see scaling.py), so they are not independent: the bootstrap
resamples sizes, and the intervals hold what one size has in common beyond the law. Of 25 simulated
studies of 9 sizes, in which sizes share an error of 3 %, all intervals of N*'s exponent held the
truth; of those that resample runs, 19 did.

    report = study(*read("runs/iso"))     # or any CSV or JSONL with columns loss and two of N, D, C
"""
import csv
import itertools
import json
import math
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch

from cdslm import UserError, reason

DELTA = 1e-3       # where Huber's loss turns from square to straight, in log L
EPSILON = 0.01     # N and D may lie where the loss is at most this share above its best
SAMPLES = 200      # of the bootstrap
LEVEL = 0.05       # tests reject below this p
STEEPEST = 10.0    # the largest exponent: steeper fits, of runs that follow no law, overflow


# --------------------------------------------------------------------------------------------------
# The table of runs.

def read(path):
    """A folder of `lab.scaling run`, a CSV or a JSONL -> runs, notes on what was left out.

    Runs are sorted by C and N: {N, D, C, loss: (n,), group: (n,), the number of the budget} and, if
    they are there, pjsd and pjsd_floor (n, K), word_rate (n,). A missing N, D or C follows from
    C = 6ND."""
    path = Path(path)
    if path.is_dir():
        path = path / "runs.jsonl"
    rows, columns = read_rows(path)
    if "loss" not in columns or len({"N", "D", "C"} & columns) < 2:
        has = ", ".join(sorted(columns)) or "none"
        raise UserError(f"{path}: needs columns loss and two of N, D, C; has {has}")

    values = [[number(row.get(name)) for name in ("N", "D", "C", "loss")] for row in rows]
    N, D, C, loss = np.array(values).T
    with np.errstate(all="ignore"):
        N = np.where(np.isnan(N), C / (6 * D), N)
        D = np.where(np.isnan(D), C / (6 * N), D)
        C = np.where(np.isnan(C), 6 * N * D, C)
        values = np.stack([N, D, C, loss], axis=1)                            # (n, 4)
        good = np.isfinite(values).all(1) & (values > 0).all(1)
    kept, notes = choose(rows, values, good)
    order = sorted(kept, key=lambda i: (C[i], N[i]))
    runs = dict(zip(("N", "D", "C", "loss"), values[order].T))

    # A tenth more compute than the run before is another budget.
    runs["group"] = np.cumsum(np.diff(np.log(runs["C"]), prepend=math.inf) > 0.1)
    sizes, budgets = len(np.unique(runs["N"])), len(np.unique(runs["group"]))
    if min(sizes, budgets) < 2 or len(order) < 6:
        left_out = "".join(f"; {note}" for note in notes)
        raise UserError(f"{path}: a law takes two sizes, two budgets and six runs; here are "
                        f"{sizes}, {budgets} and {len(order)} to be used{left_out}")

    if {"pjsd", "pjsd_floor"} <= columns:
        for name in ("pjsd", "pjsd_floor"):
            runs[name] = read_metric(path, [rows[i] for i in order], name)
    if "word_rate" in columns:
        runs["word_rate"] = np.array([number(rows[i].get("word_rate")) for i in order])
    return runs, notes


def read_rows(path):
    """A CSV or JSONL -> list of dictionaries, the set of their keys."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()             # Excel writes a BOM
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in lines]
        else:
            rows = list(csv.DictReader(lines))
        return rows, set().union(*(row.keys() for row in rows)) - {None}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: neither CSV nor JSONL ({reason(error)})") from None


def read_metric(path, rows, name):
    """A column of lists, which a CSV holds as text -> (n, K)."""
    try:
        cells = [row[name] if isinstance(row[name], list) else json.loads(row[name])
                 for row in rows]
        return np.array(cells, float).reshape(len(rows), -1)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: pjsd and pjsd_floor must be lists of numbers, as long in every "
                        "row") from None


def number(cell):
    """A cell as a number; NaN if it is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def choose(rows, values, good):
    """Numbers of the rows that count, and notes on the others. A run with several rows counts as in
    the last of them."""
    names = "size", "budget", "seed"                          # of a run of `lab.scaling run`
    named = all(name in row for name in names for row in rows)
    last = {}
    for i, row in enumerate(rows):
        if named:
            key = tuple(row[name] for name in names)
        else:
            key = tuple(map(str, values[i]))
        last[key] = i

    kept, notes = [], []
    if len(last) < len(rows):
        notes.append(f"{len(rows) - len(last)} rows for runs that have a later row")
    for i in last.values():
        if good[i]:
            kept.append(i)
            continue
        name = f"row {i + 1}"
        if named:
            name = f"{rows[i]['size']} at {number(rows[i]['budget']):g} FLOPs"
        why = rows[i].get("error") or "N, D, C or its loss is not a positive number"
        notes.append(f"{name}: {why}")
    return kept, notes


# --------------------------------------------------------------------------------------------------
# The law, and its fit.

@dataclass
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def __call__(self, N, D):
        of_size = self.A / N ** self.alpha
        of_data = self.B / D ** self.beta
        return self.E + of_size + of_data

    def pack(self, x0, y0):
        """theta (5,): the logs of E, of the other two terms at log N = x0 and log D = y0, and of
        the exponents."""
        e, a, b, alpha, beta = np.log(astuple(self))
        return torch.tensor([e, a - self.alpha * x0, b - self.beta * y0, alpha, beta])

    @classmethod
    def unpack(cls, theta, x0, y0):
        """The inverse of `pack`."""
        e, a, b, alpha = theta[:4].tolist()
        beta = theta[-1].item()
        alpha = min(math.exp(alpha), STEEPEST)
        beta = min(math.exp(beta), STEEPEST)
        return cls(math.exp(e), math.exp(a + alpha * x0), math.exp(b + beta * y0), alpha, beta)


def terms(theta, x, y):
    """Logs (3, ..., n) of the law's three terms, for theta (..., 5), or (..., 4) where beta is
    alpha, at x = log N - x0 (n,) and y = log D - y0 (n,)."""
    e, a, b, alpha = theta[..., :4, None].unbind(-2)          # (..., 1) each
    beta = theta[..., -1:]
    of_size = a - alpha.exp().clamp(max=STEEPEST) * x
    of_data = b - beta.exp().clamp(max=STEEPEST) * y
    return torch.stack(torch.broadcast_tensors(e, of_size, of_data))


def huber(residual, delta=DELTA):
    """Huber's loss over DELTA: far from 0, about the absolute value; with a delta larger than all
    residuals, the square."""
    zeros = torch.zeros_like(residual)
    loss = torch.nn.functional.huber_loss(residual, zeros, reduction="none", delta=delta)
    return loss / DELTA


def minimise(objective, starts):
    """The best theta (n,) that L-BFGS finds from the starts (S, n)."""
    best, least = None, math.inf
    for start in starts:
        theta = start.clone().requires_grad_()
        solver = torch.optim.LBFGS(
            [theta],
            max_iter=1000,
            max_eval=2000,
            tolerance_grad=1e-9,
            tolerance_change=1e-10,
            history_size=20,
            line_search_fn="strong_wolfe")

        def closure(theta=theta, solver=solver):
            solver.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        solver.step(closure)
        value = objective(theta).nan_to_num(math.inf).item()
        if best is None or value < least:
            best, least = theta.detach(), value
    return best


def middle(N, D):
    """log N and log D (n,) minus their means; the means."""
    x, y = torch.tensor(np.log(N)), torch.tensor(np.log(D))
    return x - x.mean(), y - y.mean(), (float(x.mean()), float(y.mean()))


def fit(N, D, loss, weight=None, start=None, delta=DELTA, tied=False):
    """The Law of runs (n,), each counted `weight` times; with beta = alpha if `tied`. L-BFGS begins
    at the 8 best of 1,600 starts, or at `start`, a Law near the result."""
    x, y, centre = middle(N, D)
    z = torch.tensor(np.log(loss))
    if weight is None:
        weight = np.ones(len(z))
    weight = torch.tensor(weight, dtype=torch.float64)

    def objective(theta):
        residual = terms(theta, x, y).logsumexp(0) - z
        return (weight * huber(residual, delta)).sum(-1) / weight.sum()

    if start is None:
        shares = np.log([0.03, 0.1, 0.3, 0.8])
        exponents = np.log([0.1, 0.2, 0.35, 0.6, 1.0])
        corners = itertools.product(shares, shares, shares, exponents, exponents)
        corners = torch.tensor(list(corners))                                 # (1600, 5)
        if tied:
            corners = corners[::5, :4]                        # each once without its beta
        corners[:, :3] += z.mean()
        starts = corners[objective(corners).argsort()[:8]]
    else:
        starts = start.pack(*centre)[None]
    return Law.unpack(minimise(objective, starts), *centre)


def members(runs):
    """The numbers of the runs of each budget."""
    group = runs["group"]
    return [np.flatnonzero(group == budget) for budget in np.unique(group)]


def draws(clusters):
    """Weights (n,) of the runs in each bootstrap sample: as many clusters (n,) as there are, drawn
    with replacement. Fewer than three different sizes make no law: such a sample is drawn again,
    and of fewer than four there are no samples."""
    rng = np.random.default_rng(0)
    names, number = np.unique(clusters, return_inverse=True)
    for _ in range(SAMPLES if len(names) > 3 else 0):
        drawn = []
        while len(set(drawn)) < 3:
            drawn = rng.integers(len(names), size=len(names)).tolist()
        yield np.bincount(drawn, minlength=len(names))[number]


# --------------------------------------------------------------------------------------------------
# What follows: the best use of a budget.

def cost(N, D, C):
    """(k, p) of C = k N^p D, by least squares of the logs: (6, 1) where C is 6ND; exact FLOPs
    differ a little."""
    p, k = np.polyfit(np.log(N), np.log(C / D), 1)
    return math.exp(k), float(p)


def optimum(law, C, k=6.0, p=1.0):
    """The best use of C FLOPs = k N^p D: N, D, r = D/N, the loss there, kappa = d2 ln L / d(ln N)2
    along the isoFLOP curve, and the ranges of N and D in which the loss is at most EPSILON above
    its best."""
    b = p * law.beta                                          # along the curve, D falls as N^-p
    ratio = law.alpha * law.A / (b * law.B)
    N = float(ratio * (C / k) ** law.beta) ** (1 / (law.alpha + b))
    D = C / (k * N ** p)

    # Where one term falls as fast as the other rises. `slope` is the fall over ln N.
    best = law(N, D)
    slope = law.alpha * law.A / N ** law.alpha
    kappa = slope * (law.alpha + b) / best

    u = np.linspace(-20, 20, 20_001)
    with np.errstate(over="ignore"):
        loss = law(N * np.exp(u), D * np.exp(-p * u))
    flat = u[loss <= (1 + EPSILON) * best][[0, -1]]           # the ends, (2,)
    return {
        "C": C,
        "N": N,
        "D": D,
        "r": D / N,
        "loss": best,
        "kappa": kappa,
        "N_range": (N * np.exp(flat)).tolist(),
        "D_range": (D * np.exp(-p * flat[::-1])).tolist(),
    }


def trends(law, first, last, k, p):
    """Exponents in C: of N*, D* and r* = D*/N* for exact FLOPs, of N* for C = 6ND, and of kappa
    between two budgets."""
    total = law.alpha + p * law.beta
    before = optimum(law, first, k, p)["kappa"]
    after = optimum(law, last, k, p)["kappa"]
    return {
        "N_exponent": law.beta / total,
        "D_exponent": law.alpha / total,
        "r_exponent": (law.alpha - law.beta) / total,
        "N_exponent_6ND": law.beta / (law.alpha + law.beta),
        "kappa_exponent": math.log(after / before) / math.log(last / first),
    }


def parabola(N, loss):
    """A check of the law: N and kappa of the parabola through one budget's ln L over ln N; N is NaN
    where the parabola has no lowest point."""
    x = np.log(N)
    if len(np.unique(N)) < 3:
        return {"N": math.nan, "kappa": math.nan}
    a, b, _ = np.polyfit(x - x.mean(), np.log(loss), 2)
    lowest = math.exp(x.mean() - b / (2 * a)) if a > 0 else math.nan
    return {"N": lowest, "kappa": float(2 * a)}


def edge(N, loss, best, sizes):
    """Why the optimum `best` of a budget is only a bound: "low" or "high", the end of its sizes at
    which it lies; or None. The optimum of the law must lie between the sizes, and neither end may
    have the lowest loss. A budget of one run has no ends: there the `sizes` of all runs count."""
    lowest = N[loss.argmin()]
    if len(np.unique(N)) == 1:
        N, lowest = sizes, best
    if best <= N.min() or lowest == N.min():
        return "low"
    return "high" if best >= N.max() or lowest == N.max() else None


# --------------------------------------------------------------------------------------------------
# A metric that follows the loss.

def metric_terms(theta, x, y, floor):
    """log L (n,) and the metrics (n, K) as in `fuse`, for theta (5 + 2K,), floor (n, K)."""
    logs = terms(theta[:5], x, y)                                             # (3, n)
    a, b = theta[5:].reshape(2, -1)                                           # (K,) each
    excess = logs[1:].logsumexp(0)[:, None]                                   # log (L - E), (n, 1)
    share = -torch.expm1(-torch.exp(a + b.exp() * excess))
    return logs.logsumexp(0), floor + (1 - floor) * share


def fuse(law, runs):
    """Fit the law together with the metrics that follow its loss:
    metric = floor + (1 - floor) (1 - exp(-a x^b)) with x = L - E. Near the floor this is
    floor + a x^b, and it ends at 1 as any divergence does.

    Each output has its own noise of unknown size, so the objective is the sum of the logs of the
    mean Huber losses: the likelihood of Laplace noise whose size is fitted as well. Returns
    predict(N, D) -> loss (n,), metrics (n, K) at the mean floor; and a, b (K,)."""
    x, y, centre = middle(runs["N"], runs["D"])
    z = torch.tensor(np.log(runs["loss"]))
    metric = torch.tensor(runs["pjsd"])
    floor = torch.tensor(runs["pjsd_floor"]).nan_to_num(0)
    known = metric.isfinite()                                 # too little speech has no pJSD

    def objective(theta):
        loss, predicted = metric_terms(theta, x, y, floor)
        residual = (predicted / metric.nan_to_num(1)).log()                   # (n, K)
        off = torch.where(known, huber(residual), 0)
        off = off.sum(0) / known.sum(0).clamp(min=1)                          # (K,)
        means = torch.cat([huber(loss - z).mean()[None], off])
        return (means + 1e-4).log().mean()                    # an error of 1e-4 is small enough

    # Starts: several b, each with the a that fits the runs best.
    excess = np.log(law(runs["N"], runs["D"]) - law.E)
    excess = torch.tensor(excess)[:, None]                                    # (n, 1)
    share = (metric - floor) / (1 - floor)
    share = share.clamp(1e-3, 1 - 1e-3)                                       # (n, K)
    starts = []
    for b in (0.3, 0.6, 1.0, 1.6):
        a = (-torch.log1p(-share)).log() - b * excess
        a = a.nanmedian(0).values.nan_to_num(0)
        exponents = torch.full_like(a, math.log(b))
        starts.append(torch.cat([law.pack(*centre), a, exponents]))
    theta = minimise(objective, starts)

    def predict(N, D):
        x = torch.tensor(np.log(N) - centre[0])
        y = torch.tensor(np.log(D) - centre[1])
        loss, predicted = metric_terms(theta, x, y, floor.mean(0))
        return loss.exp().numpy(), predicted.numpy()
    return predict, theta[5:].exp().reshape(2, -1).tolist()


# --------------------------------------------------------------------------------------------------
# Tests: does the law hold, is r* constant, do metrics follow the loss?

def cells(runs):
    """The number (n,) of each run's cell. Runs of a cell differ in nothing but their seed."""
    pairs = np.stack([runs["N"], runs["D"]])
    _, cell = np.unique(pairs, axis=1, return_inverse=True)
    return cell.ravel()


def seed_means(runs):
    """The table with one row per cell, the mean over its seeds."""
    cell = cells(runs)
    groups = [cell == i for i in range(cell.max() + 1)]
    return {name: np.array([x[group].mean(0) for group in groups])
            for name, x in runs.items()}


def seeds(runs):
    """Standard deviation between seeds of ln L and of the metrics (K,), pooled over the cells with
    several; df, its degrees of freedom; None without such runs. All budgets of a size branch from
    the same trunks, so a second seed counts once per size."""
    cell = cells(runs)
    more = np.bincount(cell) - 1                              # seeds beyond the first of each cell
    if not more.any():
        return None
    df = 0
    for N in np.unique(runs["N"]):
        df += int(more[cell[runs["N"] == N]].max())

    found = {"df": df}
    values = runs | {"log_loss": np.log(runs["loss"])}
    means = seed_means(values)
    for name in ("log_loss", "pjsd", "word_rate"):
        if name in values:
            off = values[name] - means[name][cell]
            found[name] = np.sqrt(np.square(off).sum(0) / more.sum()).tolist()
    return found


def f_test(tested, noise, df):
    """An F test of two mean squares; p by a million draws."""
    F = max(0.0, float(tested / noise))
    drawn = np.random.default_rng(0).f(*df, 1_000_000)
    p = (1 + np.count_nonzero(drawn >= F)) / 1_000_001
    return {"F": F, "df": df, "p": p, "rejected": p < LEVEL}


def squares(law, runs):
    """The sum of the squares of the law's residuals in ln L."""
    ratio = runs["loss"] / law(runs["N"], runs["D"])
    return np.square(np.log(ratio)).sum()


def lack_of_fit(law, runs, between):
    """Tests the residuals of the least-squares law, of the seeds' means, against the noise
    `between` seeds. None without two seeds, or without more cells than parameters."""
    count = len(np.unique(cells(runs)))
    if not between or not between["log_loss"] or count < 6:
        return None
    noise = between["log_loss"] ** 2
    pure = noise * (len(runs["N"]) - count)
    mean = (squares(law, runs) - pure) / (count - 5)
    return f_test(mean, noise, [count - 5, between["df"]])


def constant_ratio(law, tied, runs, interval):
    """Tests `tied`, the least-squares law with alpha = beta, whose r* is constant, against `law`.
    The test takes runs to be independent; so r* is said to vary only if the `interval` of its
    exponent, over sizes, excludes 0 as well."""
    free, spare = squares(law, runs), len(runs["N"]) - 5
    found = f_test(squares(tied, runs) - free, free / spare, [1, spare])
    low, high = interval
    if low <= 0 <= high:
        found["rejected"] = False
    return found


def rank_correlation(x, y):
    """Spearman's, of x and y (n,); NaN of fewer than three, or if all are equal."""
    known = np.isfinite(y)
    ranks = [np.sign(v[:, None] - v).sum(1) for v in (x[known], y[known])]
    if known.sum() < 3 or not all(map(np.any, ranks)):
        return math.nan
    return float(np.corrcoef(ranks)[0, 1])


def at_equal_loss(metric, runs, weight):
    """The change of a metric (n,) per doubling of N at equal loss: the last coefficient of
    metric = c0 + c1 ln L + c2 (ln L)^2 + c3 log2 N, by least squares."""
    z = np.log(runs["loss"])
    z = z - z.mean()
    columns = np.stack([z ** 0, z, z ** 2, np.log2(runs["N"])])               # (4, n)
    root = np.sqrt(weight * np.isfinite(metric))
    target = np.nan_to_num(metric) * root
    coefficients, *_ = np.linalg.lstsq((columns * root).T, target)
    return float(coefficients[-1])


def followers(runs):
    """Do metrics follow the loss, whatever the shape of the model? Of the seeds' means: the rank
    correlation with the loss in each budget, and the change per doubling of N at equal loss.

    Of 100 simulated studies of 8 sizes without such a change, 88 had an interval that held 0, and
    85 where sizes share an error. Of few sizes, an interval that barely excludes 0 says little."""
    means, metrics = seed_means(runs), {}
    if "pjsd" in means:
        metrics = {f"pJSD, n = {n}": x for n, x in enumerate(means["pjsd"].T, 1)}
    if "word_rate" in means:
        metrics["word rate"] = means["word_rate"]

    found = {}
    for name, x in metrics.items():
        if np.isfinite(x).sum() < 6:                          # too little speech has no pJSD
            continue
        slopes = [at_equal_loss(x, means, weight) for weight in draws(means["N"])]
        found[name] = {
            "spearman": [rank_correlation(means["loss"][i], x[i]) for i in members(means)],
            "slope": at_equal_loss(x, means, np.ones(len(x))),
            "interval": quantiles(slopes),
        }
    return found


# --------------------------------------------------------------------------------------------------
# The report.

def quantiles(values):
    """The 95 % interval of bootstrap samples; of none, NaN."""
    if not values:
        return [math.nan, math.nan]
    return np.nanquantile(values, [0.025, 0.975]).tolist()


def intervals(best, samples):
    """A dictionary of figures and those of the bootstrap samples -> {name: 95 % interval}."""
    return {name: quantiles([sample[name] for sample in samples])
            for name, value in best.items()
            if isinstance(value, float) and name != "C"}


def held_out(runs):
    """The largest budget predicted from the others: mean relative error of the loss by the law
    with alpha = beta, by the law, and by the law fused with pJSD; mean error of the metrics."""
    names = "heldout_error_constant_r", "heldout_error", "heldout_error_fused"
    report = dict.fromkeys(names, math.nan) | {"heldout_pjsd": [math.nan] * 5}
    last = runs["group"] == runs["group"][-1]
    early = {name: values[~last] for name, values in runs.items()}
    late = {name: values[last] for name, values in runs.items()}
    sizes, budgets = len(np.unique(early["N"])), len(np.unique(early["group"]))
    if min(sizes, budgets) < 2 or len(early["N"]) < 6:
        return report

    predicted = []
    for tied in (True, False):                                # the last is where `fuse` starts
        law = fit(early["N"], early["D"], early["loss"], tied=tied)
        predicted.append(law(late["N"], late["D"]))
    if "pjsd" in runs:
        predict, _ = fuse(law, early)
        loss, metric = predict(late["N"], late["D"])
        predicted.append(loss)
        errors = torch.tensor(metric - late["pjsd"]).abs()
        report["heldout_pjsd"] = errors.nanmean(0).tolist()

    for name, loss in zip(names, predicted):
        report[name] = float(np.abs(loss / late["loss"] - 1).mean())
    return report


def study(runs, notes):
    """All that the runs show, as `lab.scaling fit --json` writes it."""
    N, D, C, loss = (runs[name] for name in ("N", "D", "C", "loss"))
    groups = members(runs)
    budgets = [float(np.exp(np.log(C[group]).mean())) for group in groups]
    k, p = cost(N, D, C)
    law = fit(N, D, loss)
    laws = [law]
    for weight in draws(N):
        laws.append(fit(N, D, loss, weight, start=law))

    found, *samples = [vars(one) | trends(one, budgets[0], budgets[-1], k, p) for one in laws]
    interval = intervals(found, samples)
    between = seeds(runs)
    free = fit(N, D, loss, delta=math.inf)
    tied = fit(N, D, loss, delta=math.inf, tied=True)
    report = found | {
        "interval": interval,
        "runs": len(N),
        "sizes": len(np.unique(N)),
        "epsilon": EPSILON,
        "cost": {"k": k, "p": p},
        "seeds": between,
        "lack_of_fit": lack_of_fit(free, runs, between),
        "constant_r": constant_ratio(free, tied, runs, interval["r_exponent"]),
        "followers": followers(runs),
        "excluded": notes,
        "warnings": [],
        "budgets": [],
    }
    if report["sizes"] < 4:
        report["warnings"].append("fewer than four sizes: too few for intervals")
    for budget, group in zip(budgets, groups):
        best, *samples = [optimum(one, budget, k, p) for one in laws]
        end = edge(N[group], loss[group], best["N"], N)
        best["interval"] = intervals(best, samples)
        best["parabola"] = parabola(N[group], loss[group])
        best["edge"] = end
        report["budgets"].append(best)
        if end:
            side, bound = {"low": ("smallest", "most"), "high": ("largest", "least")}[end]
            report["warnings"].append(
                f"at {budget:.3g} FLOPs the optimum lies at the {side} size: N* is at {bound} "
                "that, and r* is a bound too, no finding; train more sizes there")

    if "pjsd" in runs:
        predict, (a, b) = fuse(law, runs)
        report["pjsd"] = {"a": a, "b": b}
        for row in report["budgets"]:
            _, metric = predict(np.array([row["N"]]), np.array([row["D"]]))
            row["pjsd"] = metric[0].tolist()
    return report | held_out(runs)


def within(row, name, form=".3g"):
    """A figure with its interval, as text."""
    low, high = row["interval"][name]
    return f"{row[name]:{form}} [{low:.2g}, {high:.2g}]"


def page(report):
    """Print a report."""
    print(f"L = E + A / N^alpha + B / D^beta of {report['runs']} runs\n"
          f"[in brackets: 95 % of {SAMPLES} bootstrap samples over the {report['sizes']} sizes]")
    for name in ("E", "A", "B", "alpha", "beta"):
        print(f"{name:>6}  {within(report, name, '.4g')}")
    print("along C = {k:.3g} N^{p:.3f} D, the compute of these runs, the exponents of C are"
          .format(**report["cost"]))
    for title, name in (("N*", "N"), ("D*", "D"), ("r*", "r"), ("kappa ", "kappa")):
        print(f"{title:>7} {within(report, name + '_exponent')}")
    print(f"and along C = 6ND, of N*, {within(report, 'N_exponent_6ND')}\n")

    page_of_budgets(report["budgets"], report["epsilon"])
    page_of_tests(report)
    page_of_metrics(report)
    for note in report["excluded"] + report["warnings"]:
        print(note)


def page_of_budgets(budgets, epsilon):
    """Print the optimum of each budget, a line each."""
    print("C, FLOPs   N*                           D*, tokens                   r* = D*/N*")
    for row in budgets:
        N, D, r = (within(row, name) for name in "NDr")
        print(f"{row['C']:<10.3g} {N:<28} {D:<28} {r}")

    print(f"\nC, FLOPs   N within {epsilon:.0%}            D within {epsilon:.0%}            "
          "kappa                parabola: N, kappa")
    for row in budgets:
        N, D = ("{:.3g} to {:.3g}".format(*row[name]) for name in ("N_range", "D_range"))
        kappa, parabola = within(row, "kappa"), "{N:.3g}, {kappa:.3g}".format(**row["parabola"])
        print(f"{row['C']:<10.3g} {N:<22} {D:<22} {kappa:<20} {parabola}")
    print("kappa: d2 ln L / d(ln N)2 along the isoFLOP curve; N and D: where the loss is within so "
          "much of its lowest\n")


def page_of_tests(report):
    """Print whether the law holds, and whether r* is constant."""
    between, test, ratio = (report[name] for name in ("seeds", "lack_of_fit", "constant_r"))
    form = "F({df[0]}, {df[1]}) = {F:.3g}, p = {p:.2g}: "
    if between:
        pjsd = ", ".join(f"{x:.4f}" for x in between.get("pjsd", ()))
        print(f"two seeds differ: standard deviation of ln L {between['log_loss']:.4f}, of pJSD "
              f"{pjsd or 'nan'}")
    if test:
        print("does the law hold? " + form.format(**test)
              + ("NO, these runs reject it" if test["rejected"] else "they do not reject it"))
        print(f"  they lie {math.sqrt(test['F']) * between['log_loss']:.2%} off it, two seeds "
              f"{between['log_loss']:.2%} apart ({between['df']} seeds beyond the first of a size)")
    else:
        print("does the law hold? not known: that takes two seeds of some runs, and six cells")
    print("is r* constant (alpha = beta)? " + form.format(**ratio)
          + ("no" if ratio["rejected"] else "it may be")
          + f"; it goes as C to the {within(report, 'r_exponent')}")


def page_of_metrics(report):
    """Print how well the largest budget was predicted, and whether metrics follow the loss."""
    print("\nthe largest budget, predicted from the others (nan: too few):")
    print(f"  law of the loss alone:    loss {report['heldout_error']:.2%} off")
    print(f"  the same, alpha = beta:   loss {report['heldout_error_constant_r']:.2%} off")
    if "pjsd" in report:
        print(f"  law fused with the pJSD:  loss {report['heldout_error_fused']:.2%} off, and")
        print("  pJSD = floor + (1 - floor) (1 - exp(-a (L - E)^b)):")
        rows = zip(report["pjsd"]["a"], report["pjsd"]["b"], report["heldout_pjsd"])
        for n, (a, b, error) in enumerate(rows, 1):
            print(f"    n = {n}: a {a:.3g}, b {b:.3g}; predicted {error:.3f} bits off")

    if report["followers"]:
        print("\ndo metrics follow the loss alone? Spearman's correlation with it in each budget;\n"
              "change per doubling of N at equal loss (0 if they do; of few sizes, intervals are "
              "narrow)")
    for name, row in report["followers"].items():
        low, high = row["interval"]
        ranks = " ".join(f"{rho:5.2f}" for rho in row["spearman"])
        verdict = "; 0 is outside" if low > 0 or high < 0 else ""
        print(f"  {name:<12}{ranks}   {row['slope']:+.4f} [{low:.4f}, {high:.4f}]{verdict}")
