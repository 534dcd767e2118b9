"""laws: what a grid of runs says of L(N, D) = E + A / N^alpha + B / D^beta, and what follows from it.

Fitted as by Hoffmann et al. (2022, approach 3): the Huber loss of log L, which is the log of a sum of exponentials, by
L-BFGS from the best of many starts. Their published fit stopped too early (Besiroglu et al. 2024); here L-BFGS goes on
until nothing changes. Inside, all is in natural logarithms, and N and D are measured from the middle of the runs, so
that the exponents do not drag A and B along.

    report = study(*read("runs/iso"))       # or any CSV or JSONL with columns loss and two of N, D, C
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
EPSILON = 0.01     # "flat" is where the loss is at most this share above its best
SAMPLES = 200      # of the bootstrap


# ----------------------------------------------------------------------------------------------------------------------
# The table of runs.

def read(path):
    """A folder of `lab.scaling run`, a CSV or a JSONL -> runs, notes on what was left out. Runs are sorted by C and N:
    {N, D, C, loss: (n,), group: (n,), which isoFLOP} and, if they are there, pjsd and pjsd_floor (n, K). What is not
    given of N, D and C follows from C = 6ND."""
    path = Path(path)
    path = path / "runs.jsonl" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()           # Excel writes a mark first
        rows = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else list(csv.DictReader(lines))
        columns = set().union(*(row.keys() for row in rows)) - {None}
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, AttributeError, csv.Error) as error:
        raise UserError(f"{path}: neither CSV nor JSONL ({reason(error)})") from None
    if "loss" not in columns or len({"N", "D", "C"} & columns) < 2:
        raise UserError(f"{path}: needs columns loss and two of N, D, C; has {', '.join(sorted(columns)) or 'none'}")
    N, D, C, loss = np.array([[number(row.get(name)) for name in ("N", "D", "C", "loss")] for row in rows]).T
    with np.errstate(all="ignore"):
        N, D = (np.where(np.isnan(x), C / (6 * y), x) for x, y in ((N, D), (D, N)))
        C = np.where(np.isnan(C), 6 * N * D, C)
        good = np.isfinite(N * D * C * loss) & (np.minimum.reduce([N, D, C, loss]) > 0)
    kept, notes = choose(rows, np.stack([N, D, C, loss], 1), good)
    order = sorted(kept, key=lambda i: (C[i], N[i]))
    runs = {name: x[order] for name, x in (("N", N), ("D", D), ("C", C), ("loss", loss))}
    runs["group"] = np.cumsum(np.diff(np.log(runs["C"]), prepend=math.inf) > 0.1)      # a tenth more is another budget
    sizes, budgets = len(np.unique(runs["N"])), len(np.unique(runs["group"]))
    if min(sizes, budgets) < 2 or len(order) < 6:
        raise UserError(f"{path}: a law takes two sizes, two budgets and six runs; here are {sizes}, {budgets} and "
                        f"{len(order)} to be used{''.join(f'; {note}' for note in notes)}")
    try:
        for name in ("pjsd", "pjsd_floor") if {"pjsd", "pjsd_floor"} <= columns else ():
            cells = [rows[i][name] if isinstance(rows[i][name], list) else json.loads(rows[i][name]) for i in order]
            runs[name] = np.array(cells, float).reshape(len(order), -1)
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path}: pjsd and pjsd_floor must be lists of numbers, as long in every row") from None
    return runs, notes


def number(cell):
    """A cell as a number, NaN if it is none."""
    try:
        return float(cell)
    except (TypeError, ValueError):
        return math.nan


def choose(rows, values, good):
    """Which of the rows count, and notes on the others: a run that is there twice counts as it is there last."""
    names = "size", "budget", "seed"                              # of a run of `lab.scaling run`
    ours = all(name in row for name in names for row in rows)
    last = {tuple(row[name] for name in names) if ours else tuple(map(str, values[i])): i for i, row in enumerate(rows)}
    notes = [f"{len(rows) - len(last)} rows for runs that have a later row"] * (len(last) < len(rows))
    for i in last.values():
        if not good[i]:
            name = f"{rows[i]['size']} at {number(rows[i]['budget']):g} FLOPs" if ours else f"row {i + 1}"
            notes.append(f"{name}: {rows[i].get('error') or 'N, D, C or its loss is not a positive number'}")
    return [i for i in last.values() if good[i]], notes


# ----------------------------------------------------------------------------------------------------------------------
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
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def pack(self, x0, y0):
        """theta (5,): the logs of E, of the other terms at log N = x0, log D = y0, and of the exponents."""
        e, a, b, alpha, beta = np.log(astuple(self))
        return torch.tensor([e, a - self.alpha * x0, b - self.beta * y0, alpha, beta])

    @classmethod
    def unpack(cls, theta, x0, y0):
        """The inverse of `pack`."""
        e, a, b, alpha, beta = theta[:5].tolist()
        alpha, beta = math.exp(alpha), math.exp(beta)
        return cls(math.exp(e), math.exp(a + alpha * x0), math.exp(b + beta * y0), alpha, beta)


def terms(theta, x, y):
    """Logs (3, ..., n) of the law's terms, by theta (..., 5), at x = log N - x0, y = log D - y0 (n,)."""
    e, a, b, alpha, beta = theta[..., None].unbind(-2)
    return torch.stack(torch.broadcast_tensors(e, a - alpha.exp() * x, b - beta.exp() * y))


def huber(residual):
    """Huber's loss over DELTA: far from 0, about the absolute value."""
    return torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), reduction="none", delta=DELTA) / DELTA


def minimise(objective, starts):
    """The best theta (n,) that L-BFGS finds from the starts (S, n)."""
    found = []
    for start in starts:
        theta = start.clone().requires_grad_()
        solver = torch.optim.LBFGS([theta], max_iter=1000, max_eval=2000, tolerance_grad=1e-9, tolerance_change=1e-10,
                                   history_size=20, line_search_fn="strong_wolfe")

        def closure(theta=theta, solver=solver):
            solver.zero_grad()
            value = objective(theta)
            value.backward()
            return value

        solver.step(closure)
        found.append((objective(theta).nan_to_num(math.inf).item(), theta.detach()))
    return min(found, key=lambda pair: pair[0])[1]


def middle(N, D):
    """log N and log D (n,) from their means; the means."""
    x, y = torch.tensor(np.log(N)), torch.tensor(np.log(D))
    return x - x.mean(), y - y.mean(), (float(x.mean()), float(y.mean()))


def fit(N, D, loss, weight=None, start=None):
    """The Law of runs (n,), each counted `weight` times: from the 8 likeliest of 1600 starts, or from a Law near it."""
    (x, y, centre), z = middle(N, D), torch.tensor(np.log(loss))
    weight = torch.ones_like(z) if weight is None else torch.tensor(weight, dtype=torch.float64)

    def objective(theta):
        return (weight * huber(terms(theta, x, y).logsumexp(0) - z)).sum(-1) / weight.sum()

    if start is None:
        shares, exponents = np.log([0.03, 0.1, 0.3, 0.8]), np.log([0.1, 0.2, 0.35, 0.6, 1.0])
        corners = torch.tensor(list(itertools.product(shares, shares, shares, exponents, exponents)))
        corners[:, :3] += z.mean()
        starts = corners[objective(corners).argsort()[:8]]
    else:
        starts = start.pack(*centre)[None]
    return Law.unpack(minimise(objective, starts), *centre)


def resample(law, runs):
    """Laws of bootstrap samples: of each isoFLOP's runs as many are drawn as it has, with replacement; or of all runs,
    if an isoFLOP has fewer than three."""
    rng, members = np.random.default_rng(0), [np.flatnonzero(runs["group"] == g) for g in np.unique(runs["group"])]
    if min(map(len, members)) < 3:
        members = [np.arange(len(runs["N"]))]
    for _ in range(SAMPLES):
        drawn = np.concatenate([rng.choice(group, len(group)) for group in members])
        yield fit(runs["N"], runs["D"], runs["loss"], np.bincount(drawn, minlength=len(runs["N"])), law)


# ----------------------------------------------------------------------------------------------------------------------
# What follows: the best use of a budget.

def cost(N, D, C):
    """(k, p) of C = k N^p D, by least squares of the logs: (6, 1) where C is 6ND; exact FLOPs differ a little."""
    p, k = np.polyfit(np.log(N), np.log(C / D), 1)
    return math.exp(k), float(p)


def optimum(law, C, k=6.0, p=1.0):
    """The best use of C FLOPs = k N^p D: N, D, r = D/N, the loss there, kappa = d2 ln L / d(ln N)2 along the isoFLOP,
    and the ranges of N and D in which the loss is at most EPSILON above its best."""
    b = p * law.beta                                              # along the isoFLOP, D falls as N^-p
    N = float(law.alpha * law.A / (b * law.B) * (C / k) ** law.beta) ** (1 / (law.alpha + b))
    D = C / (k * N ** p)
    best, slope = law(N, D), law.alpha * law.A / N ** law.alpha   # of L over ln N: one term falls as the other rises
    u = np.linspace(-20, 20, 20_001)
    with np.errstate(over="ignore"):
        flat = u[law(N * np.exp(u), D * np.exp(-p * u)) <= (1 + EPSILON) * best][[0, -1]]
    return {"C": C, "N": N, "D": D, "r": D / N, "loss": best, "kappa": slope * (law.alpha + b) / best,
            "N_range": (N * np.exp(flat)).tolist(), "D_range": (D * np.exp(-p * flat[::-1])).tolist()}


def trends(law, first, last, k, p):
    """Exponents in C: of N*, D* and r* = D*/N* for exact FLOPs, of N* for C = 6ND; of kappa, between two budgets."""
    total, ends = law.alpha + p * law.beta, [optimum(law, C, k, p)["kappa"] for C in (first, last)]
    return {"N_exponent": law.beta / total, "D_exponent": law.alpha / total,
            "r_exponent": (law.alpha - law.beta) / total, "N_exponent_6ND": law.beta / (law.alpha + law.beta),
            "kappa_exponent": math.log(ends[1] / ends[0]) / math.log(last / first)}


def parabola(N, loss):
    """The cross-check: N and kappa of the parabola through one isoFLOP's ln L over ln N; NaN where it has no bottom."""
    x = np.log(N)
    if len(np.unique(N)) < 3:
        return {"N": math.nan, "kappa": math.nan}
    a, b, _ = np.polyfit(x - x.mean(), np.log(loss), 2)
    return {"N": math.exp(x.mean() - b / (2 * a)) if a > 0 else math.nan, "kappa": float(2 * a)}


def edge(N, loss, best, sizes):
    """Why the optimum of an isoFLOP is only a bound: "low" or "high", the end of its sizes at which it lies; or None.
    N*, by the law, must be among the sizes, and no end may have the lowest loss. A lone run has no ends: then N* must
    be among the `sizes` of all runs."""
    lone = len(np.unique(N)) == 1
    N, lowest = (sizes, best) if lone else (N, N[loss.argmin()])
    if best <= N.min() or lowest == N.min():
        return "low"
    return "high" if best >= N.max() or lowest == N.max() else None


# ----------------------------------------------------------------------------------------------------------------------
# A metric that follows the loss.

def metric_terms(theta, x, y, floor):
    """log L (n,) and the metrics (n, K), as `fuse` has them; theta (5 + 2K,), floor (n, K)."""
    log, (a, b) = terms(theta[:5], x, y), theta[5:].reshape(2, -1)
    share = -torch.expm1(-torch.exp(a + b.exp() * log[1:].logsumexp(0)[:, None]))
    return log.logsumexp(0), floor + (1 - floor) * share


def fuse(law, runs):
    """Fit the law and the metrics that follow its loss together: metric = floor + (1 - floor) (1 - exp(-a x^b)) with
    x = L - E: near the floor that is floor + a x^b, and like any divergence it ends at 1. Each output has noise of its
    own, unknown size, so what is least is the sum of the logs of their mean Huber losses: the likelihood of Laplace
    noise, its size profiled out. Returns predict(N, D) -> loss (n,), metrics (n, K), by the mean floor; a, b (K,)."""
    (x, y, centre), z = middle(runs["N"], runs["D"]), torch.tensor(np.log(runs["loss"]))
    metric, floor = torch.tensor(runs["pjsd"]), torch.tensor(runs["pjsd_floor"]).nan_to_num(0)
    known = metric.isfinite()                                     # what said too little was not judged

    def objective(theta):
        loss, guess = metric_terms(theta, x, y, floor)
        left = torch.where(known, huber((guess / metric.nan_to_num(1)).log()), 0).sum(0) / known.sum(0).clamp(min=1)
        return (torch.cat([huber(loss - z).mean()[None], left]) + 1e-4).log().mean()  # a ten-thousandth is good enough

    excess = np.log(law(runs["N"], runs["D"]) - law.E)
    share = ((metric - floor) / (1 - floor)).clamp(1e-3, 1 - 1e-3)
    starts = []
    for b in (0.3, 0.6, 1.0, 1.6):
        a = ((-torch.log1p(-share)).log() - b * torch.tensor(excess)[:, None]).nanmedian(0).values.nan_to_num(0)
        starts.append(torch.cat([law.pack(*centre), a, torch.full_like(a, math.log(b))]))
    theta = minimise(objective, starts)

    def predict(N, D):
        x, y = (torch.tensor(np.log(values) - mean) for values, mean in zip((N, D), centre))
        loss, guess = metric_terms(theta, x, y, floor.mean(0))
        return loss.exp().numpy(), guess.numpy()
    return predict, theta[5:].exp().reshape(2, -1).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# The report.

def spread(figures):
    """Dictionaries of figures, one a bootstrap sample -> {name: its 95 % interval}."""
    return {name: np.nanquantile([row[name] for row in figures], [0.025, 0.975]).tolist()
            for name, value in figures[0].items() if isinstance(value, float) and name != "C"}


def seeds(runs):
    """Deviation of what differs in the seed alone, ln L and the metrics (K,); None if there is no such pair."""
    pairs = [np.flatnonzero((runs["N"] == N) & (runs["D"] == D)) for N, D in {*zip(runs["N"], runs["D"])}]
    pairs = [pair for pair in pairs if len(pair) > 1]
    if not pairs:
        return None
    values = {"log_loss": np.log(runs["loss"])} | {name: runs[name] for name in ("pjsd",) if name in runs}
    return {name: np.sqrt(np.mean([np.var(x[pair], axis=0, ddof=1) for pair in pairs], axis=0)).tolist()
            for name, x in values.items()}


def held_out(runs):
    """The largest budget predicted from the others: mean error of the loss, as a share of it, and of the metrics."""
    last = runs["group"] == runs["group"][-1]
    early, late = ({name: values[which] for name, values in runs.items()} for which in (~last, last))
    report = {"heldout_error": math.nan, "heldout_error_fused": math.nan, "heldout_pjsd": [math.nan] * 5}
    if len(np.unique(early["N"])) < 2 or len(np.unique(early["group"])) < 2 or len(early["N"]) < 6:
        return report
    law = fit(early["N"], early["D"], early["loss"])
    report["heldout_error"] = float(np.abs(law(late["N"], late["D"]) / late["loss"] - 1).mean())
    if "pjsd" in runs:
        loss, metric = fuse(law, early)[0](late["N"], late["D"])
        report["heldout_error_fused"] = float(np.abs(loss / late["loss"] - 1).mean())
        report["heldout_pjsd"] = torch.tensor(metric - late["pjsd"]).abs().nanmean(0).tolist()
    return report


def study(runs, notes):
    """Everything that the runs say, as `lab.scaling fit --json` writes it."""
    N, D, C, loss = (runs[name] for name in ("N", "D", "C", "loss"))
    members = [np.flatnonzero(runs["group"] == group) for group in np.unique(runs["group"])]
    budgets, (k, p), law = [float(np.exp(np.log(C[i]).mean())) for i in members], cost(N, D, C), fit(N, D, loss)
    laws = [law, *resample(law, runs)]
    facts = [vars(one) | trends(one, budgets[0], budgets[-1], k, p) for one in laws]
    report = facts[0] | {"interval": spread(facts[1:]), "runs": len(N), "epsilon": EPSILON, "cost": {"k": k, "p": p},
                         "seeds": seeds(runs), "excluded": notes, "warnings": [], "budgets": []}
    for budget, i in zip(budgets, members):
        best = [optimum(one, budget, k, p) for one in laws]
        report["budgets"].append(best[0] | {"interval": spread(best[1:]), "parabola": parabola(N[i], loss[i]),
                                            "edge": edge(N[i], loss[i], best[0]["N"], N)})
        if end := report["budgets"][-1]["edge"]:
            side, bound = {"low": ("smallest", "most"), "high": ("largest", "least")}[end]
            report["warnings"].append(f"at {budget:.3g} FLOPs the optimum lies at the {side} size: N* is at {bound} "
                                      "that, and r* is a bound too, no finding; train more sizes there")
    if "pjsd" in runs:
        predict, (a, b) = fuse(law, runs)
        report["pjsd"] = {"a": a, "b": b}
        for row in report["budgets"]:
            row["pjsd"] = predict(np.array([row["N"]]), np.array([row["D"]]))[1][0].tolist()
    return report | held_out(runs)


def page(report):
    """Print a report."""
    def within(row, name, form=".3g"):
        low, high = row["interval"][name]
        return f"{row[name]:{form}} [{low:.2g}, {high:.2g}]"

    def line(name, cells):
        print(f"{name:<16}" + "".join(f"{cell:>28}" for cell in cells))

    print(f"L = E + A / N^alpha + B / D^beta of {report['runs']} runs [95 % of {SAMPLES} bootstrap samples]")
    for name in ("E", "A", "B", "alpha", "beta"):
        print(f"{name:>6}  {within(report, name, '.4g')}")
    print("along C = {k:.3g} N^{p:.3f} D, the compute of these runs, the exponents of C are".format(**report["cost"]))
    for name in ("N", "D", "r", "kappa"):
        print(f"{name:>6}{' ' if name == 'kappa' else '*'} {within(report, name + '_exponent')}")
    print(f"and along C = 6ND, of N*, {within(report, 'N_exponent_6ND')}\n")
    rows = report["budgets"]
    line("C, FLOPs", [f"{row['C']:.3g}" for row in rows])
    for name, text in (("N", "N*"), ("D", "D*, tokens"), ("r", "r* = D*/N*"), ("kappa", "kappa")):
        line(text, [within(row, name) for row in rows])
    for name in "ND":
        ranges = ["{:.3g} to {:.3g}".format(*row[f"{name}_range"]) for row in rows]
        line(f"{name} within {report['epsilon']:.0%}", ranges)
    for name in ("N", "kappa"):
        line(f"parabola: {name}", [f"{row['parabola'][name]:.3g}" for row in rows])
    print("kappa: d2 ln L / d(ln N)2 along the isoFLOP; N and D: where the loss is within so much of its lowest\n\n"
          f"the largest budget, predicted from the others (nan: too few): loss {report['heldout_error']:.2%} off")
    if "pjsd" in report:
        print("pJSD = floor + (1 - floor) (1 - exp(-a (L - E)^b)), fitted together with the law; predicted likewise: "
              f"loss {report['heldout_error_fused']:.2%} off")
        for n, row in enumerate(zip(*report["pjsd"].values(), report["heldout_pjsd"]), 1):
            print("  n = {}: a {:.3g}, b {:.3g}; predicted {:.3f} bits off".format(n, *row))
    if report["seeds"]:
        print(f"two seeds differ: deviation of ln L {report['seeds']['log_loss']:.4f}, of pJSD "
              + ", ".join(f"{x:.4f}" for x in report["seeds"].get("pjsd", ())))
    for note in report["excluded"] + report["warnings"]:
        print(note)
