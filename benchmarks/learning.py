"""Who learns how fast, and how well? Seven methods, four games, in self-play and among a mixture.

Methods are the four scripts with their defaults; plain PPO (no goals, no planner); prosocial PPO
(the same, for the mean reward of all); Direct-OM (one step of planning on co-players predicted
without goals). The mixture is the default one: `self`, the game's scripted kinds and their noisy
forms. Judged after training by `evaluate`: self-play by the mean of all seats, the mixture by the
learner's mean with three of each kind. For equal time, runs among the mixture with more game steps
come on top (`longer`). On the 8x8 stag hunts, where a method can be trapped by the hares, self-play
has five seeds.
"""

import statistics

from figures import best_return, by_setting, curves, figure, random_return, table
from figures import draw as draw_panels
from run import train_and_judge

METHODS = {  # name: script, options
    "tree search": ("hop_mcts", ""),
    "one step": ("hop_onestep", ""),
    "discrete goals": ("hop_ppo_gumbel", ""),
    "latent model": ("latent_world_model", ""),
    "Direct-OM": ("hop_onestep", "--goal none"),
    "plain PPO": ("hop_onestep", "--goal none --plan-update none"),
    "prosocial PPO": ("hop_onestep", "--goal none --plan-update none --prosocial 1"),
}
STEPS = {  # game steps in self-play, and among the mixture, where fewer seats learn
    "msh-4x4-4h1s": (150_000, 200_000),
    "msh-4h1s": (300_000, 300_000),
    "msh-4h2s": (300_000, 300_000),
    "msg": (150_000, 200_000),
}
TRAPS = ("msh-4h1s", "msh-4h2s")  # games with five seeds of self-play
LONGER = {  # how many times the game steps, among the mixture of two of the games
    "plain PPO": 5,
    "discrete goals": 5,
    "tree search": 2,
    "one step": 2,
    "latent model": 2,
    "Direct-OM": 2,
}
LONGER_GAMES = ("msh-4h1s", "msg")
KINDS = {
    "msh": ("self", "ns", "nh", "random", "ns-noisy", "nh-noisy"),
    "msg": ("self", "cleaner", "exploiter", "random", "cleaner-noisy", "exploiter-noisy"),
}

work = train_and_judge


def jobs(seeds: tuple[int, ...], quick: bool) -> list[dict]:
    """Seeds outermost: everything has one seed before anything has two."""
    found = []
    for seed in (1,) if quick else seeds or (1, 2, 3, 4, 5):
        for game in STEPS:
            for method in METHODS:
                if seeds or seed <= 3 or game in TRAPS:
                    found.append(job("self-play", game, method, seed, 1, quick))
                if seeds or seed <= 3:
                    found.append(job("mixture", game, method, seed, 1, quick))
        for game in LONGER_GAMES if seeds or seed <= 3 else ():
            for method, times in LONGER.items():
                found.append(job("mixture, longer", game, method, seed, times, quick))
    return found


def job(company: str, game: str, method: str, seed: int, times: int, quick: bool) -> dict:
    """One run."""
    script, words = METHODS[method]
    alone = company == "self-play"
    steps = 4096 if quick else times * STEPS[game][not alone]
    words = f"--env-id {game} {'--co-players self' * alone} {words}"
    words = f"{words} --total-timesteps {steps} --seed {seed}"
    kinds = ("self",) if alone else KINDS[game[:3]]
    return {
        "setting": f"{game} | {company} | {method}",
        "seed": seed,
        "script": script,
        "options": " ".join(words.split()),
        "steps": steps,
        "kinds": dict(zip(kinds, kinds)),
        "episodes": 20 if quick else 500,
    }


def returns_of(result: dict) -> dict[str, float]:
    """Return by kind of co-players: of all seats with `self`, else of the learner."""
    returns = {**result["returns"]}
    if "self" in returns:
        returns["self"] = result["all_seats"]["self"]
    return returns


def mean_return(result: dict) -> float:
    """Mean over the kinds of co-players."""
    return statistics.mean(returns_of(result).values())


def report(results: list[dict]) -> str:
    """Tables: self-play and mixture by game; the mixture by kind and by time."""
    runs = by_setting(results)
    parts = []
    for company in ("self-play", "mixture"):
        rows = [
            [method, *(figure(list(map(mean_return, of))) for of in each), pace(runs, method)]
            for method in METHODS
            if any(each := [runs.get(f"{game} | {company} | {method}", []) for game in STEPS])
        ]
        kinds = {game: ("self",) if company == "self-play" else KINDS[game[:3]] for game in STEPS}
        random = {
            game: statistics.mean(random_return(game, kind) for kind in kinds[game])
            for game in STEPS
        }
        rows.append(["random play", *(f"{random[game]:.2f}" for game in STEPS), ""])
        if company == "self-play":
            rows.append(["upper bound", *(f"{best_return(game):.2f}" for game in STEPS), ""])
        head = [f"{company}: mean return", *STEPS, "CPU time, plain PPO = 1"]
        parts.append(table(head, rows))
    for game in STEPS:
        rows = []
        for company in ("mixture", "mixture, longer"):
            for method in METHODS:
                of = runs.get(f"{game} | {company} | {method}")
                if of:
                    rows.append([method, *by_kind(of, game)])
        random = [f"{random_return(game, kind):.2f}" for kind in KINDS[game[:3]]]
        rows.append(["random play", "", *random, "", ""])
        head = [f"{game}, mixture", "game steps", *KINDS[game[:3]], "mean", "CPU seconds"]
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def by_kind(runs: list[dict], game: str) -> list[str]:
    """Cells: game steps, mean return with three of each kind, over all, CPU seconds."""
    cells = [f"{runs[0]['steps']:,}"]
    for kind in KINDS[game[:3]]:
        cells.append(f"{statistics.mean(returns_of(run)[kind] for run in runs):.2f}")
    cells.append(figure(list(map(mean_return, runs))))
    return [*cells, f"{statistics.mean(run['train_cpu_seconds'] for run in runs):.0f}"]


def pace(runs: dict[str, list[dict]], method: str) -> str:
    """Least and greatest CPU time of a method's runs, in that of plain PPO's run of the same game,
    company and seed, of the same commit on the same machine: not of another day, as a rule."""
    names = ("seed", "machine", "commit")
    ratios = []
    for game in STEPS:
        for company in ("self-play", "mixture"):
            settings = [f"{game} | {company} | {name}" for name in (method, "plain PPO")]
            own, plain = (
                {tuple(r[name] for name in names): r["train_cpu_seconds"] for r in of}
                for of in (runs.get(setting, []) for setting in settings)
            )
            ratios += [own[key] / plain[key] for key in own.keys() & plain.keys()]
    return f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else ""


def draw(results: list[dict]) -> None:
    """learning_self-play.png by game steps, learning_mixture.png by time."""
    runs = by_setting(results)
    for company, column in (("self-play", 0), ("mixture", 1)):
        panels = {}
        for game in STEPS:
            lines = {}
            for method in METHODS:
                of = runs.get(f"{game} | {company} | {method}")
                if of:
                    places, values = curves(of, column)
                    lines[method] = (places if column else places / 1000, values)
            if lines:
                panels[game] = lines
        if panels:
            x = "CPU seconds" if column else "thousand game steps"
            draw_panels(f"learning_{company}", panels, x, "mean return of the learner's seats")
