"""Is a rightly predicted goal used? Every script without goals, with inferred and with true ones, in two games.

    python benchmarks/goals.py                        # everything that is not there yet, at most two hours
    python benchmarks/goals.py --only hop_mcts        # one script; or one game, or --only "msg | hop_onestep"
    python benchmarks/goals.py --report               # tables and docs/goals.png of the results so far

A learner is trained once among a mixture of scripted co-players, with the script's defaults and `--goal` none, inferred
or oracle, and is then judged among three of each kind and at a mixed table, one of each. What true goals are worth is
`oracle` - `none`; the share of it that inferred goals bring is (`inferred` - `none`) / (`oracle` - `none`). Noise is
the standard deviation between seeds, pooled over the three goals of a script in one company; the gap counts as real,
and only then a share is given, if its 95 % interval by Student's t lies above 0. `+-` is half such an interval; the
share's is by the delta method. All of this takes two seeds at least; where true goals are worth nothing, one gap in
forty still counts as real. The share is given over all episodes of a match, and over its second half, when co-players
have shown what they are. Then, to tell goals that are not predicted from goals that are not used: how well the opponent
model predicts actions in training with each of the three (`hop_ppo_gumbel.py` has one for inferred ones only).
"""

import dataclasses
import itertools
import math
import statistics

import matplotlib
import numpy as np
import scipy.stats
import tyro

from runs import ROOT, Running, benchmark, by_setting, work

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GOALS = {"none": "#D55E00", "inferred": "#0072B2", "oracle": "#555555"}  # colours (Okabe and Ito)
SCRIPTS = ("hop_onestep", "hop_mcts", "latent_world_model", "hop_ppo_gumbel")
STEPS = {"msh-4x4-4h1s": 250_000, "msg": 200_000}  # game steps of training
KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
EPISODES = {"msh-4x4-4h1s": 2000, "msg": 500}  # of the evaluation, in each company


def companies(game: str) -> dict[str, str]:
    """Co-players that a learner is judged among, by a name for them."""
    return {**{f"3 {kind}": kind for kind in KINDS[game].split(",")}, "one of each": KINDS[game]}


def all_jobs(options: Running) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    jobs = []
    seeds = options.seeds[: 1 if options.quick else None]
    for seed, game, script, goal in itertools.product(seeds, STEPS, SCRIPTS, GOALS):
        steps, episodes = (4096, 20) if options.quick else (STEPS[game], EPISODES[game])
        words = f"--env-id {game} --co-players {KINDS[game]} --goal {goal} --total-timesteps {steps} --seed {seed}"
        job = {"script": script, "setting": f"{game} | {script} | {goal}", "seed": seed, "options": words}
        jobs.append({**job, "episodes": episodes, "kinds": companies(game), "curves": ["moa/nll"]})
    return jobs


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Comparison:
    """Returns of one script in one company with each goal, a list of seeds."""

    none: list[float]
    inferred: list[float]
    oracle: list[float]

    def __post_init__(self):
        groups = [getattr(self, goal) for goal in GOALS]
        self.freedom = sum(len(group) - 1 for group in groups)
        squares = sum((value - statistics.mean(group)) ** 2 for group in groups for value in group)
        noise = math.sqrt(squares / self.freedom) if self.freedom else math.nan
        quantile = scipy.stats.t.ppf(0.975, self.freedom) if self.freedom else math.nan
        self.mean = {goal: statistics.mean(group) for goal, group in zip(GOALS, groups, strict=True)}
        self.half = {goal: quantile * noise / math.sqrt(len(g)) for goal, g in zip(GOALS, groups, strict=True)}

    def gap(self) -> tuple[float, float]:
        """What true goals are worth, and half its 95 % interval."""
        return self.mean["oracle"] - self.mean["none"], math.hypot(self.half["oracle"], self.half["none"])

    def share(self) -> tuple[float, float] | None:
        """Share of the gap that inferred goals bring, and half its 95 % interval; None if the gap may be noise."""
        gap, half = self.gap()
        if not gap > half:  # nan as well
            return None
        share = (self.mean["inferred"] - self.mean["none"]) / gap
        slopes = {"inferred": 1.0, "oracle": share, "none": 1.0 - share}
        return share, math.hypot(*(slope * self.half[goal] for goal, slope in slopes.items())) / gap


def comparisons(runs_of: dict[str, list[dict]]) -> dict[tuple[str, str, str], tuple[Comparison, Comparison]]:
    """By game, company and script, those that have results with all goals: of all episodes, of the later half."""
    found = {}
    for game, script in itertools.product(STEPS, SCRIPTS):
        runs = [runs_of.get(f"{game} | {script} | {goal}", []) for goal in GOALS]
        for company in companies(game) if all(runs) else ():
            later = [[statistics.mean(r["by_episode"][company][5:]) for r in some] for some in runs]
            whole = [[r["returns"][company] for r in some] for some in runs]
            found[game, company, script] = Comparison(*whole), Comparison(*later)
    return found


def within(value: float, half: float) -> str:
    """Mean and half its interval, which one seed does not have."""
    return f"{value:.2f}" if math.isnan(half) else f"{value:.2f} +- {half:.2f}"


def plot(runs_of: dict[str, list[dict]]) -> None:
    """docs/goals.png: return by episode of the match with the three goals, a row a script, a column a company; mean
    over seeds, and the range of the seeds."""
    columns = [(game, company) for game in STEPS for company in companies(game)]
    scripts = [s for s in SCRIPTS if any(f" | {s} | " in setting for setting in runs_of)]
    size = (1.75 * len(columns), 0.5 + 1.6 * len(scripts))
    figure, axes = plt.subplots(len(scripts), len(columns), figsize=size, sharex=True, sharey="col", squeeze=False)
    for (row, script), (column, (game, company)) in itertools.product(enumerate(scripts), enumerate(columns)):
        axis = axes[row, column]
        for goal, colour in GOALS.items():
            if runs := runs_of.get(f"{game} | {script} | {goal}"):
                returns = np.array([run["by_episode"][company] for run in runs])  # [seeds, episodes of a match]
                episodes = 1 + np.arange(returns.shape[1])
                axis.plot(episodes, returns.mean(0), color=colour, lw=1.2, label=goal)
                axis.fill_between(episodes, returns.min(0), returns.max(0), color=colour, alpha=0.15, lw=0)
        axis.grid(alpha=0.3)
        axis.set_xticks([1, 4, 7, 10])
        axis.tick_params(labelsize=7)
        if row == 0:
            axis.set_title(f"{game}\n{company}", fontsize=8)
        if column == 0:
            axis.set_ylabel(script, fontsize=8)
    axes[0, 0].legend(fontsize=6)
    figure.supxlabel("episode of the match", fontsize=8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "goals.png", dpi=90)
    plt.close(figure)


def nll(runs: list[dict]) -> float:
    """Nats an action in the last fifth of the runs, over all seats; nan where no opponent model was trained."""
    ends = [[p[2] for p in r["curves"]["moa/nll"] if p[0] > 0.8 * r["curve"][-1][0]] for r in runs]
    return statistics.mean(map(statistics.mean, ends)) if ends and all(ends) else math.nan


def report(runs_of: dict[str, list[dict]], picture: bool) -> None:
    """Markdown tables of the results, and the picture."""
    found = comparisons(runs_of)
    print("\n| game, company | script | none | inferred | oracle | oracle - none | share inferred | episodes 6 to 10 |")
    print("|-|-|-|-|-|-|-|-|")
    behind = []
    for game, script in itertools.product(STEPS, SCRIPTS):
        for company in companies(game) if (game, "one of each", script) in found else ():
            one, later = found[game, company, script]
            cells = [within(one.mean[goal], one.half[goal]) for goal in GOALS] + [within(*one.gap())]
            shares = [one.share(), later.share()]
            told = [f"{share[0]:.0%} +- {share[1]:.0%}" if share else "-" for share in shares]
            print(f"| {game}, {company} | {script} | {' | '.join(cells + told)} |")
            if shares[0] and sum(shares[0]) < 1.0:
                behind.append(f"- {script} on {game}, {company}: {told[0]}")
    print("\nTrue goals are worth something, and inferred ones clearly less:\n")
    known = any(not math.isnan(one.gap()[1]) for one, _ in found.values())
    print("\n".join(behind) or ("- nowhere" if known else "- (not known: one seed has no interval)"))
    print("\n| nats an action, in training | " + " | ".join(f"{game}, {g}" for game in STEPS for g in GOALS) + " |")
    print("|-|" + "-|" * len(STEPS) * len(GOALS))
    for script in SCRIPTS:
        values = [nll(runs_of.get(f"{game} | {script} | {goal}", [])) for game in STEPS for goal in GOALS]
        print(f"| {script} | {' | '.join('-' if math.isnan(v) else f'{v:.3f}' for v in values)} |")
    print("\n| CPU seconds of training | " + " | ".join(f"{game}, {g}" for game in STEPS for g in GOALS) + " |")
    print("|-|" + "-|" * len(STEPS) * len(GOALS))
    for script in SCRIPTS:
        runs = [runs_of.get(f"{game} | {script} | {goal}", []) for game in STEPS for goal in GOALS]
        cells = [f"{statistics.mean(r['train_cpu_seconds'] for r in some):.0f}" if some else "-" for some in runs]
        print(f"| {script} | {' | '.join(cells)} |")
    if picture and runs_of:
        plot(runs_of)


def main(options: Running) -> None:
    file = options.results("goals")
    if benchmark(__file__, options, all_jobs(options), work, file):
        report(by_setting(file), picture=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Running, description=__doc__))
