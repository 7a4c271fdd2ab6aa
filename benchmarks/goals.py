"""Is a rightly predicted goal used? Every script without goals, with inferred and with true ones.

A learner is trained among a mixture of scripted co-players with `--goal` none, inferred or oracle,
and judged among three of each kind, and at a table with one of each. What true goals are worth is
oracle - none; of that, inferred ones bring the share (inferred - none) / (oracle - none), which is
given where the worth is more than noise: where its 95 % interval by Student's t, of seeds in pairs,
lies above 0; over all episodes of a match, and over its second half, when co-players have shown
what they are.
"""

import itertools
from collections import defaultdict

import numpy as np

from figures import by_setting, draw_panels, figure, interval, paired, table
from run import training

GOALS = ("none", "inferred", "oracle")
SCRIPTS = ("hop_mcts", "hop_onestep", "hop_ppo_gumbel", "latent_world_model")
STEPS = {"msh-4x4-4h1s": 250_000, "msg": 200_000}  # game steps of training
KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
EPISODES = {"msh-4x4-4h1s": 2000, "msg": 500}  # of the evaluation, in each company
SHOWN = (("msh-4x4-4h1s", "3 nh"), ("msg", "3 cleaner"), ("msg", "3 exploiter"))  # in the picture


def companies(game: str) -> dict[str, str]:
    """Co-players that a learner is judged among, by a name for them."""
    return {f"3 {kind}": kind for kind in KINDS[game].split(",")} | {"one of each": KINDS[game]}


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost: everything has one seed before anything has two."""
    seeds = (1,) if quick else seeds or (1, 2, 3)
    for seed, game, script, goal in itertools.product(seeds, STEPS, SCRIPTS, GOALS):
        words = f"--env-id {game} --co-players {KINDS[game]} --goal {goal}"
        steps = 4096 if quick else STEPS[game]
        job = training(f"{game} | {script} | {goal}", seed, script, words, steps)
        episodes = 20 if quick else EPISODES[game]
        yield {**job, "kinds": companies(game), "episodes": episodes}


def report(results: list[dict]) -> str:
    """A row for each script and company."""
    runs = by_setting(results)
    rows = []
    for game in STEPS:
        for company, script in itertools.product(companies(game), SCRIPTS):
            each = paired(*(runs[f"{game} | {script} | {goal}"] for goal in GOALS))
            if all(each):
                returns = [np.array([r["returns"][company] for r in of]) for of in each]
                halves = [np.array([r["by_episode"][company][5:] for r in of]) for of in each]
                shares = (share(returns), share([half.mean(1) for half in halves]))
                cells = [figure(of.tolist()) for of in (*returns, returns[1] - returns[0])]
                rows.append([f"{game}, {company}", script, *cells, *shares])
    head = ["learner with", "script", *GOALS, "inferred - none"]
    head += ["share inferred", "in episodes 6 to 10"]
    return table(head, rows)


def share(returns: list[np.ndarray]) -> str:
    """Share of the worth of true goals that inferred ones bring; nothing if it may be noise."""
    none, inferred, oracle = returns
    worth, half = interval((oracle - none).tolist())
    return f"{(inferred - none).mean() / worth:.0%}" if worth > half else ""  # half may be nan


def draw(results: list[dict]) -> None:
    """goals.png: return by episode of the match, a row a script, a column a company."""
    runs = by_setting(results)
    panels = defaultdict(dict)
    for script, (game, company), goal in itertools.product(SCRIPTS, SHOWN, GOALS):
        of = runs[f"{game} | {script} | {goal}"]
        if of:
            values = np.array([run["by_episode"][company] for run in of])
            places = np.arange(1, 1 + values.shape[1])
            panels[f"{script}\n{game}, {company}"][goal] = (places, values)
    draw_panels("goals", panels, "episode of the match", "return", columns=len(SHOWN))
