"""Who learns how fast, and how well? Seven methods, four games, in self-play and among a mixture.

Methods are the four scripts with their defaults; plain PPO (no goals, no planner); prosocial PPO
(the same, for the mean reward of all); Direct-OM (one step of planning on co-players predicted
without goals). The mixture is the default one: `self`, the game's scripted kinds and their noisy
forms. Judged after training by `evaluate`: self-play by the mean of all seats, the mixture by the
learner's mean with three of each kind. For equal time, runs among the mixture with more game steps
come on top (`longer`). On the 8x8 stag hunts, where a method can be trapped by the hares, self-play
has five seeds to run, else there are three.
"""

import itertools
import statistics
from collections import defaultdict

from figures import by_setting, curves, draw_panels, figure, random_return, table
from hop_onestep import GridGame
from run import training

METHODS = {  # name: script, options
    "tree search": ("hop_mcts", ""),
    "one step": ("hop_onestep", ""),
    "discrete goals": ("hop_ppo_gumbel", ""),
    "latent model": ("latent_world_model", ""),
    "Direct-OM": ("hop_onestep", "--goal none"),
    "plain PPO": ("hop_onestep", "--goal none --plan-update none"),
    "prosocial PPO": ("hop_onestep", "--goal none --plan-update none --prosocial 1"),
}
COMPANIES = ("self-play", "mixture")
STEPS = {  # game steps in self-play, and among the mixture, where fewer seats learn
    "msh-4x4-4h1s": (150_000, 200_000),
    "msh-4h1s": (300_000, 300_000),
    "msh-4h2s": (300_000, 300_000),
    "msg": (150_000, 200_000),
}
TRAPS = ("msh-4h1s", "msh-4h2s")  # games with five seeds of self-play
LONGER = {"plain PPO": 5, "discrete goals": 5}  # how many times the game steps, of two games
LONGER |= dict.fromkeys(("tree search", "one step", "latent model", "Direct-OM"), 2)
LONGER_GAMES = ("msh-4h1s", "msg")
KINDS = {
    "msh": ("self", "ns", "nh", "random", "ns-noisy", "nh-noisy"),
    "msg": ("self", "cleaner", "exploiter", "random", "cleaner-noisy", "exploiter-noisy"),
}


def kinds_of(game: str, company: str) -> tuple[str, ...]:
    """Kinds of co-players to be judged with."""
    return ("self",) if company == "self-play" else KINDS[game[:3]]


def jobs(seeds: tuple[int, ...], quick: bool):
    """Seeds outermost: everything has one seed before anything has two."""
    for seed in (1,) if quick else seeds or (1, 2, 3, 4, 5):
        parts = [(*part, 1) for part in itertools.product(STEPS, METHODS, COMPANIES)]
        for game in LONGER_GAMES:
            parts += [(game, name, "mixture, longer", times) for name, times in LONGER.items()]
        for game, method, company, times in parts:
            alone = company == "self-play"
            if seeds or seed <= 3 or alone and game in TRAPS:
                script, words = METHODS[method]
                words = f"--env-id {game} {'--co-players self' * alone} {words}"
                steps = 4096 if quick else times * STEPS[game][not alone]
                job = training(f"{game} | {company} | {method}", seed, script, words, steps)
                job |= {"steps": steps, "kinds": {kind: kind for kind in kinds_of(game, company)}}
                yield {**job, "episodes": 20 if quick else 500}


def returns_of(result: dict) -> dict[str, float]:
    """Return by kind of co-players: of all seats with `self`, else of the learner."""
    return {k: result["all_seats" if k == "self" else "returns"][k] for k in result["returns"]}


def mean_return(result: dict) -> float:
    """Mean over the kinds of co-players."""
    return statistics.mean(returns_of(result).values())


def report(results: list[dict]) -> str:
    """Tables: self-play and mixture by game; the mixture by kind and by time."""
    runs = by_setting(results)
    parts = []
    for company in COMPANIES:
        rows = []
        for method in METHODS:
            each = [runs[f"{game} | {company} | {method}"] for game in STEPS]
            if any(each):
                cells = [figure([*map(mean_return, of)]) for of in each]
                rows.append([method, *cells, pace(runs, method)])
        random = [[random_return(game, k) for k in kinds_of(game, company)] for game in STEPS]
        rows.append(["random play", *(f"{statistics.mean(x):.2f}" for x in random), ""])
        if company == "self-play":
            best = [f"{GridGame(game).best_return:.2f}" for game in STEPS]
            rows.append(["upper bound", *best, ""])
        parts.append(table([f"{company}: mean return", *STEPS, "CPU time, plain PPO = 1"], rows))
    for game in STEPS:
        kinds = KINDS[game[:3]]
        rows = []
        for company, method in itertools.product(("mixture", "mixture, longer"), METHODS):
            of = runs[f"{game} | {company} | {method}"]
            if of:
                each = [statistics.mean(returns_of(run)[kind] for run in of) for kind in kinds]
                seconds = statistics.mean(run["train_cpu_seconds"] for run in of)
                cells = [f"{of[0]['steps']:,}", *(f"{x:.2f}" for x in each)]
                rows.append([method, *cells, figure([*map(mean_return, of)]), f"{seconds:.0f}"])
        random = [f"{random_return(game, kind):.2f}" for kind in kinds]
        rows.append(["random play", "", *random, "", ""])
        head = [f"{game}, mixture", "game steps", *kinds, "mean", "CPU seconds"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def pace(runs: dict[str, list[dict]], method: str) -> str:
    """Least and greatest CPU time of a method's runs, in that of plain PPO's run of the same game,
    company and seed, of the same commit on the same machine: not of another day, as a rule. The
    games are named if not all of them have such runs."""
    seconds = defaultdict(dict)  # by method
    for game, company, name in itertools.product(STEPS, COMPANIES, (method, "plain PPO")):
        for run in runs.get(f"{game} | {company} | {name}", []):
            key = (game, company, run["seed"], run["machine"], run["commit"])
            seconds[name][key] = run["train_cpu_seconds"]
    own, plain = seconds[method], seconds["plain PPO"]
    ratios = {key: own[key] / plain[key] for key in own.keys() & plain.keys()}
    if not ratios:
        return ""
    games = [game for game in STEPS if any(game in key for key in ratios)]
    where = f" ({', '.join(games)})" if len(games) < len(STEPS) else ""
    return f"{min(ratios.values()):.1f} to {max(ratios.values()):.1f}{where}"


def draw(results: list[dict]) -> None:
    """learning_self-play.png by game steps, learning_mixture.png by time."""
    runs = by_setting(results)
    for company, column in (("self-play", 0), ("mixture", 1)):
        panels = defaultdict(dict)
        for game, method in itertools.product(STEPS, METHODS):
            of = runs[f"{game} | {company} | {method}"]
            if of:
                places, values = curves(of, column)
                panels[game][method] = (places if column else places / 1000, values)
        x = "CPU seconds" if column else "thousand game steps"
        draw_panels(f"learning_{company}", panels, x, "mean return of the learner's seats")
