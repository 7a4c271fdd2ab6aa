"""Few-shot adaptation of trained players to unseen co-players, and the cross-play of all methods.

    python benchmarks/learning.py                     # first: the trained players
    python benchmarks/adaptation.py                   # everything that is not there yet, at most two hours
    python benchmarks/adaptation.py --part adaptation --only "msg | self-play"    # one part, one game, one group
    python benchmarks/adaptation.py --report          # tables, docs/adaptation.png and docs/cross_play.png

Adaptation (protocol of HOP, Huang et al. 2024, arXiv 2406.08002): one trained learner plays 2,400 steps with the same
three unseen co-players of one kind, in the same seats: one match, its history carried on from episode to episode. The
figure is the learner's mean return over all episodes that end in the last 600 steps (an episode under way when they
begin counts as a whole, one under way at the end does not), pooled over all matches. HOP's own learner goes on
learning meanwhile. Here no weight changes: nothing but what is inferred of the co-players adapts, so inference is
measured, not learning; methods without goals cannot adapt at all. Matches are far longer than the ten episodes of
training; the mean of its first ten episodes is reported beside that of the last 600 steps.

Learners: the seven methods of `learning.py`, trained in self-play (HOP's protocol: every kind here is unseen), or among
its mixture (scripted and noisy kinds are seen then; the report marks what the checkpoint says it was trained with).
Kinds: scripted, noisy; frozen, the self-play players of the four scripts and prosocial PPO, of another seed (of the
same seed only where no other is there, and then never the learner itself). Frozen players play by their policies
alone, on `msh` as they were at the end of training; on `msg`, where they plan at every step, because playing so for all
learners would take hours.

Scores: 0 is a uniformly random learner in the same company; 1 is plain PPO trained on exactly these co-players, and
measured in the same way; it is trained by few steps, so above 1 is possible. There is no score where both are nearly
the same: beside three `cleaner`s on `msg` a random learner gets nearly the most there is, and only helping costs.
Kinds are averaged first, so that none is trimmed; interquartile means are over games and seeds, as in `learning.py`.

Players that hop_onestep.py cannot load are left out.

Cross-play: one player of each method with three of each method, all trained in self-play, of different seeds where
there are several, all with their planners: mean return of the one, in matches of ten episodes.
"""

import dataclasses
import hashlib
import importlib
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import matplotlib
import numpy as np
import tyro

import runs
from learning import METHODS
from runs import (
    CHECKPOINTS,
    ROOT,
    Running,
    about,
    benchmark,
    best_return,
    checkpoint_of,
    head,
    interquartile_mean,
    interval,
    random_return,
    results_in,
    row,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GAMES = ("msh-4x4-4h1s", "msh-4h1s", "msg")
GROUPS = ("self-play", "mixture")
SCRIPTED = {
    "msh": ("ns", "nh", "random", "ns-noisy", "nh-noisy"),
    "msg": ("cleaner", "exploiter", "random", "cleaner-noisy", "exploiter-noisy"),
}
FROZEN = ("tree search", "one step", "discrete goals", "latent model", "prosocial PPO")
GOAL_METHODS, CONTROLS = ("tree search", "one step", "discrete goals", "latent model"), ("Direct-OM", "plain PPO")
HUNTS = ("msh-4x4-4h1s", "msh-4h1s")
CHANGES = {  # what change within the match is averaged over, by a name: games, kinds
    "nh, nh-noisy": (HUNTS, ("nh", "nh-noisy")),
    "ns, ns-noisy": (HUNTS, ("ns", "ns-noisy")),
    "random on msh": (HUNTS, ("random",)),
    "frozen prosocial PPO on msh": (HUNTS, ("frozen prosocial PPO",)),
    "frozen others on msh": (HUNTS, tuple(f"frozen {name}" for name in FROZEN[:-1])),
    "exploiter, exploiter-noisy": (("msg",), ("exploiter", "exploiter-noisy")),
}
SHOWN = {"msh": "nh", "msg": "exploiter"}  # in the picture
CROSS_PLAY = ("msh-4x4-4h1s", "msg")
FIRST = 10  # episodes at the start of a match, as many as training has
WINDOWS = 8  # parts of a match, of 300 steps each
LONGEST = 50  # steps of the longest episode; shorter windows may have no end of an episode
LEAST_RANGE = 0.05  # of the game's best mean return, from score 0 to 1; with less there is no score
EPISODES = 20  # first episodes of a match that are kept one by one


@dataclasses.dataclass
class Options(Running):
    part: Literal["all", "reference", "adaptation", "cross-play"] = "all"  # what to run
    games: int = 20  # matches with each kind, side by side; half as many on msg, which is slower
    steps: int = 2400  # steps of a match
    last: int = 600  # steps at its end whose episodes count
    reference_steps: int = 200_000  # game steps of each reference's training
    episodes: int = 200  # of each pair in cross-play; half as many on msg


def quickly(options: Options) -> Options:
    """Sizes that show that all works."""
    sizes = {"games": 4, "steps": 480, "last": 120, "reference_steps": 8192, "episodes": 20}
    return dataclasses.replace(options, **sizes, seeds=options.seeds[:1]) if options.quick else options


# ---------------------------------------------------------------------------------------------------------------------
# Long matches
# ---------------------------------------------------------------------------------------------------------------------
def company(game, entries: list[str], matches: int, steps: int, generator):
    """CoPlayers of `matches` matches with three of each of `entries`, one kind after the other, that end after `steps`
    steps or later."""
    script = importlib.import_module("hop_onestep")
    players = script.CoPlayers(game, entries, matches * len(entries), steps + 1, generator)
    of_match = players.pool.repeat_interleave(matches).unsqueeze(1).expand(-1, game.num_players)
    players.kind = of_match.scatter(1, players.focal.unsqueeze(1), 0)
    return players


def long_match(game, player, companies: list, steps: int, generator) -> tuple[np.ndarray, np.ndarray]:
    """One match of the focal `player` in each game of all `companies` (CoPlayers), whose games are played side by
    side. Returns its rewards, float [steps, B], and whether the step was an episode's last, bool [steps, B]."""
    import torch

    ends = list(itertools.accumulate(len(players.focal) for players in companies))
    parts = [slice(end - len(players.focal), end) for players, end in zip(companies, ends, strict=True)]
    for players in companies:
        players.agents[0] = type(player)(player.agent, len(players.focal))
    state = game.start(ends[-1], generator)
    seat = torch.cat([players.focal for players in companies]).unsqueeze(1)
    rewards, lasts = [], []
    with torch.no_grad():
        for _ in range(steps):
            mask = game.action_mask(state)
            actions = []
            for players, p in zip(companies, parts, strict=True):
                actions.append(players.act(type(state)(*(field[p] for field in state)), mask[p]))
            after, reward, terminated, truncated = game.step(state, torch.cat(actions))
            ended = (terminated | truncated).all(1)
            for players, p in zip(companies, parts, strict=True):
                players.observe(ended[p])
            state = game.restart(after, ended, generator)
            rewards.append(reward.gather(1, seat).squeeze(1))
            lasts.append(ended)
    return torch.stack(rewards).numpy(), torch.stack(lasts).numpy()


def episodes_of(rewards: np.ndarray, last: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each match the steps [E] with which its episodes end, counted from 1, and their returns [E]. `rewards` and
    `last` are [steps, B]; what follows the last end is left out."""
    ends = [np.flatnonzero(column) + 1 for column in last.T]
    sums = np.pad(np.cumsum(rewards, 0, dtype=float), ((1, 0), (0, 0)))  # [steps + 1, B] before each step
    return [(e, np.diff(sums[e, b], prepend=0.0)) for b, e in enumerate(ends)]


def mean_ending(episodes: list[tuple[np.ndarray, np.ndarray]], after: int, until: int) -> float:
    """Mean return over the episodes of all matches that end after step `after` and not after step `until`."""
    return float(np.mean(np.concatenate([values[(e > after) & (e <= until)] for e, values in episodes])))


def figures(rewards: np.ndarray, last: np.ndarray, final: int) -> dict:
    """What is kept of the matches with one kind: `late`, the mean return of the last `final` steps, `by_time`, that of
    WINDOWS equal parts, `by_episode`, the mean of the first EPISODES ones, and `ended`, how many make up `late`."""
    episodes, steps = episodes_of(rewards, last), len(rewards)
    edges = np.linspace(0, steps, WINDOWS + 1).astype(int).tolist()
    count = min(EPISODES, *(len(e) for e, _ in episodes))
    return {
        "late": round(mean_ending(episodes, steps - final, steps), 4),
        "by_time": [round(mean_ending(episodes, *edge), 4) for edge in itertools.pairwise(edges)],
        "by_episode": np.mean([values[:count] for _, values in episodes], 0).round(4).tolist(),
        "ended": sum(int((e > steps - final).sum()) for e, _ in episodes),
    }


def adapted(path: str, kinds: dict[str, str], job: dict) -> dict:
    """`figures` by kind, for the player at `path` and the co-players `kinds` (entries by name). Scripted ones are
    played together, since one call plays them all; a frozen player plays only in its own games."""
    import torch

    script = importlib.import_module("hop_onestep")
    game, generator = script.GridGame(job["game"]), torch.Generator().manual_seed(1000 + job["seed"])
    scripted = [entry for entry in kinds.values() if not entry.endswith(".pt")]
    frozen = [entry for entry in kinds.values() if entry.endswith(".pt")]
    together = [entries for entries in (scripted, *([entry] for entry in frozen)) if entries]
    companies = [company(game, entries, job["games"], job["steps"], generator) for entries in together]
    player = script.load_player(path, game, job["games"] * len(kinds))
    rewards, last = long_match(game, player, companies, job["steps"], generator)
    names, found = {entry: name for name, entry in kinds.items()}, {}
    for k, entry in enumerate([*scripted, *frozen]):
        of_kind = slice(k * job["games"], (k + 1) * job["games"])
        found[names[entry]] = figures(rewards[:, of_kind], last[:, of_kind], job["last"])
    return {name: {kind: found[kind][name] for kind in kinds} for name in ("late", "by_time", "by_episode", "ended")}


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------
def setting_of(game: str, group: str, method: str) -> str:
    """A setting of `learning.py`."""
    return f"{game} | {group} | {method}"


def trained(game: str, group: str, method: str, seed: int, quick: bool) -> str | None:
    """Path from ROOT of a trained player of `learning.py`, if it is there."""
    path = checkpoint_of("learning", setting_of(game, group, method), seed, quick)
    return path if (ROOT / path).is_file() else None


def partner(game: str, method: str, seed: int, quick: bool, but: str | None = None) -> tuple[str, int] | None:
    """A self-play player for a learner of `seed`, and its seed: of the next seed, or the one after it, or of the same
    one if it is not the learner itself, `but`."""
    others = [(trained(game, "self-play", method, s, quick), s) for s in (seed % 3 + 1, (seed + 1) % 3 + 1, seed)]
    return next(((path, s) for path, s in others if path and path != but), None)


def policy_alone(path: str) -> str:
    """Path from ROOT of the player at `path` without its planner, and without what only training needs."""
    import torch

    kept = str(CHECKPOINTS / "adaptation" / f"policy_of_{Path(path).name}")
    if not (ROOT / kept).is_file() or (ROOT / kept).stat().st_mtime < (ROOT / path).stat().st_mtime:
        content = torch.load(ROOT / path, map_location="cpu", weights_only=True)
        content = {name: content[name] for name in ("script", "args", "agent")}
        content["played"] = {"plan_update": "none"} if "plan_update" in content["args"] else {}
        runs.save(content, ROOT / kept)
    return kept


def players_of(job: dict) -> dict[str, str]:
    """A hash of each trained player's file in a job, so that results are known to be of other players than those that
    are there now."""
    entries = [*job.get("kinds", {}).values(), *job.get("partners", {}).values(), job.get("learner", "")]
    paths = [entry for entry in entries if entry.endswith(".pt")]
    return {path: hashlib.sha256((ROOT / path).read_bytes()).hexdigest()[:12] for path in paths}


def all_jobs(options: Options) -> list[dict]:
    """Seeds outermost within a part: everything has one seed before anything has two."""
    quick, jobs, references, missing = options.quick, [], {}, []
    scripts = {name: importlib.import_module(script) for name, (script, *_) in METHODS.items()}
    methods = [name for name, script in scripts.items() if hasattr(script, "load_player")]
    methods = methods[::2] if quick else methods
    for seed, game, group, method in itertools.product(options.seeds, GAMES, GROUPS, methods):
        if quick and game == "msh-4h1s":
            continue
        path = trained(game, group, method, seed, quick)
        if not path:
            missing.append((setting_of(game, group, method), seed))
            continue
        names = SCRIPTED[game[:3]][: 2 if quick else None]
        kinds, seeds = {name: name for name in names}, dict.fromkeys(names, 1)
        for name in [name for name in FROZEN if name in methods]:
            if found := partner(game, name, seed, quick, but=path):
                kinds[f"frozen {name}"], seeds[f"frozen {name}"] = policy_alone(found[0]), found[1]
        for kind, entry in kinds.items():
            setting = f"reference | {game} | {kind}"
            words = f"--env-id {game} --co-players {entry} --goal none --plan-update none"
            words += f" --total-timesteps {options.reference_steps} --seed {100 + seeds[kind]}"
            job = {"part": "reference", "setting": setting, "seed": seeds[kind], "game": game, "kind": kind}
            job |= {"script": "hop_onestep", "options": words, "kinds": {kind: entry}, "episodes": 20}
            keep = checkpoint_of("adaptation", setting, seeds[kind], quick)
            references[setting, seeds[kind]] = {**job, "keep": keep}
        job = {"part": "adaptation", "setting": f"adaptation | {setting_of(game, group, method)}", "seed": seed}
        job |= {"game": game, "group": group, "method": method, "learner": path, "kinds": kinds, "kind_seeds": seeds}
        jobs.append(job)
        if group == "self-play" and game in CROSS_PLAY:
            job = {"part": "cross-play", "setting": f"cross-play | {game} | {method}", "seed": seed, "game": game}
            job |= {"method": method, "learner": path, "episodes": max(1, options.episodes // (1 + (game == "msg")))}
            found = {name: partner(game, name, seed, quick) for name in methods}
            job["partners"] = {name: entry[0] for name, entry in found.items() if entry}
            jobs.append(job | {"partner_seeds": {name: entry[1] for name, entry in found.items() if entry}})
    tell(missing, bool(jobs), options)
    jobs = [*references.values(), *jobs]
    order = {"reference": 0, "adaptation": 1, "cross-play": 2}
    jobs = [job for job in jobs if options.part in ("all", job["part"])]
    sizes = ["games", "steps", "last", "episodes"]
    changed = [n for n in sizes if getattr(options, n) != getattr(Options, n) and not quick]
    words = "".join(f" --{name} {getattr(options, name)}" for name in changed) + " --quick" * quick
    for job in jobs:
        if job["part"] != "reference":
            only = f"--part {job['part']} --only '{job['setting']}' --seeds {job['seed']}"
            job["command"] = f"python benchmarks/adaptation.py {only}{words}"
        job["players"] = players_of(job)
        games = max(1, options.games // 2) if job["game"] == "msg" else options.games
        job |= {"games": games, "steps": options.steps, "last": options.last} if job["part"] != "cross-play" else {}
    return sorted(jobs, key=lambda job: (order[job["part"]], job["seed"]))


def tell(missing: list[tuple[str, int]], some: bool, options: Options) -> None:
    """One line about trained players that are not there; exits with status 2 if none is there at all."""
    parts = options.only.split(",")
    missing = [m for m in missing if not some or any(part in f"adaptation | {m[0]}" for part in parts)]
    if not missing:
        return
    seeds = " ".join(map(str, sorted({seed for _, seed in missing})))
    makes = f"python benchmarks/learning.py --again{' --quick' * options.quick} --seeds {seeds}"
    what = f"{len(missing)} trained players are missing" if some else "no trained player is there"
    setting, seed = missing[0]
    print(f"adaptation.py: {what} ({setting}, seed {seed}, ...): {makes} makes them", file=sys.stderr)
    if not some:
        sys.exit(2)


def work(job: dict) -> dict:
    """The result of one job, in this process."""
    import torch

    script = importlib.import_module("hop_onestep")
    torch.set_num_threads(1)
    start, seed = time.time(), job["seed"]
    if job["part"] == "reference":
        (kind, entry) = next(iter(job["kinds"].items()))
        result = runs.work(job) | adapted(job["keep"], job["kinds"], job)
        result |= {"returns": result["late"], "random": {kind: round(random_return(job["game"], entry), 4)}}
        return result | about(start)
    content = script.load_checkpoint(ROOT / job["learner"])
    result = {**job, "trained_with": content["args"]["co_players"]}
    if job["part"] == "adaptation":
        result |= adapted(job["learner"], job["kinds"], job)
        return result | {"returns": result["late"]} | about(start)
    result["returns"], script = {}, importlib.import_module(content["script"])
    for name, path in job["partners"].items():
        played = script.evaluate(job["learner"], path, episodes=job["episodes"], seed=1000 + seed)
        result["returns"][name] = round(played["focal_return"], 4)
    return result | about(start)


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------
def is_seen(kind: str, trained_with: str) -> bool:
    """Whether co-players of a kind were in training: `trained_with` is the --co-players of the learner's run. A frozen
    player never was: it is of another run."""
    return kind in trained_with.split(",")


class Scores:
    """Normalised returns of the results of a file."""

    def __init__(self, results: list[dict]):
        self.references = {(r["game"], r["kind"], r["seed"]): r for r in results if r["part"] == "reference"}
        self.learners = [r for r in results if r["part"] == "adaptation"]

    def scale(self, result: dict, kind: str) -> tuple[float, float] | None:
        """Returns of score 0 and 1; None without a reference, or where nothing can be told apart by it."""
        reference = self.references.get((result["game"], kind, result["kind_seeds"][kind]))
        if reference is None:
            return None
        low, high = reference["random"][kind], reference["late"][kind]
        return (low, high) if high - low >= LEAST_RANGE * best_return(result["game"]) else None

    def of(self, result: dict, kind: str, name: str = "late") -> np.ndarray | None:
        """Score of the figure `name` of a result; of the mean of its FIRST episodes with the name `first`."""
        scale = self.scale(result, kind)
        value = np.mean(result["by_episode"][kind][:FIRST]) if name == "first" else result[name][kind]
        return None if scale is None else (value - scale[0]) / (scale[1] - scale[0])

    def chosen(self, method: str, group: str, games: tuple = GAMES) -> list[dict]:
        return [r for r in self.learners if (r["method"], r["group"]) == (method, group) and r["game"] in games]

    def middle(self, results: list[dict], seen: bool, name: str = "late") -> str:
        """Interquartile mean over games and seeds of the mean score over the kinds that were, or were not, in training,
        with its interval where there are two seeds of each game."""
        tasks: dict[str, list[float]] = {}
        for result in results:
            kinds = [kind for kind in result["kinds"] if is_seen(kind, result["trained_with"]) == seen]
            values = [value for kind in kinds if (value := self.of(result, kind, name)) is not None]
            if values:
                tasks.setdefault(result["game"], []).append(statistics.mean(values))
        if not tasks:
            return ""
        middle, low, high = interquartile_mean(list(tasks.values()))
        return f"{middle:.2f}" + ("" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]")


def report_references(scores: Scores) -> None:
    """Returns of score 0 and 1, and the highest return of any learner; which references are beaten."""
    head("game", "three", "random learner (0)", "PPO trained on these (1)", "best learner, its score")
    beaten = []
    for (game, kind, seed), reference in sorted(scores.references.items()):
        met = [r for r in scores.learners if r["game"] == game and r["kind_seeds"].get(kind) == seed]
        best = max(met, key=lambda r: r["late"][kind], default=None)
        value = None if best is None else scores.of(best, kind)
        label, cell = f"{kind}, seed {seed}" if kind.startswith("frozen") else kind, ""
        if best:
            score = "no score" if value is None else f"{value:.2f}"
            cell = f"{best['late'][kind]:.2f}: {score} ({best['method']}, {best['group']}, seed {best['seed']})"
            beaten += [f"{game} with {label}"] if value is not None and value > 1 else []
        row(game, label, f"{reference['random'][kind]:.2f}", f"{reference['late'][kind]:.2f}", cell)
    if beaten:
        print(f"\nReferences that a learner beats (score above 1): {'; '.join(beaten)}.")


def report_adaptation(scores: Scores) -> None:
    """Scores by kind, mean over seeds, of a match's first episodes and of its end; and over all kinds and games."""
    for game, group in itertools.product(GAMES, GROUPS):
        of_method = {method: scores.chosen(method, group, (game,)) for method in METHODS}
        found = list(itertools.chain(*of_method.values()))
        if not found:
            continue
        kinds = list(dict.fromkeys(kind for r in found for kind in r["kinds"]))
        kinds = [kind for kind in kinds if any(scores.scale(r, kind) for r in found if kind in r["kinds"])]
        seen = {kind for r in found for kind in r["kinds"] if is_seen(kind, r["trained_with"])}
        titles = [f"{kind} (seen)" if kind in seen else kind for kind in kinds]
        head(f"{game}, {group}: score, first {FIRST} episodes → end", *titles)
        for method, results in of_method.items():
            cells = []
            for kind in kinds if results else ():
                pair = [[scores.of(r, kind, name) for r in results if kind in r["kinds"]] for name in ("first", "late")]
                pair = [[float(v) for v in values if v is not None] for values in pair]
                cells.append(" → ".join(f"{statistics.mean(values):.2f}" for values in pair if values))
            if results:
                row(f"{method} ({len(results)})", *cells)
    report_changes(scores)
    columns = [(group, seen) for group in GROUPS for seen in (False, True)[: 1 + (group == "mixture")]]
    names = [f"learners from {group}, {'seen' if seen else 'unseen'} kinds" for group, seen in columns]
    head("all games: score, interquartile mean [95 %]", *(f"{n}: {p}" for n in names for p in ("first", "end")))
    for method in METHODS:
        cells = []
        for group, seen in columns:
            results = scores.chosen(method, group)
            cells += [scores.middle(results, seen, name) for name in ("first", "late")]
        if any(cells):
            row(method, *cells)


def report_changes(scores: Scores) -> None:
    """What a match teaches: how much scores of learners from the mixture change from its first episodes to its end,
    beyond what those of the selfish methods without goals do, which cannot adapt, with the same co-players and seed.
    Mean over games and kinds, then over seeds, with half its 95 % interval by Student's t."""
    change = {
        (r["method"], r["seed"], r["game"], kind): float(scores.of(r, kind) - scores.of(r, kind, "first"))
        for r in scores.learners
        for kind in r["kinds"]
        if r["group"] == "mixture" and scores.scale(r, kind)
    }
    head("from the mixture: net change of the score within the match", *CHANGES)
    for method in GOAL_METHODS:
        cells = []
        for games, kinds in CHANGES.values():
            of_seed: dict[int, list[float]] = {}
            for (name, seed, game, kind), value in change.items():
                others = [change.get((other, seed, game, kind)) for other in CONTROLS]
                if name == method and game in games and kind in kinds and None not in others:
                    of_seed.setdefault(seed, []).append(value - statistics.mean(others))
            mean, low, _ = interval([statistics.mean(v) for v in of_seed.values()]) if of_seed else (np.nan,) * 3
            cells.append("" if np.isnan(mean) else f"{mean:+.2f}" + (f" +- {mean - low:.2f}" if low == low else ""))
        if any(cells):
            row(method, *cells)


def plot_adaptation(scores: Scores) -> None:
    """docs/adaptation.png: return along the match with the three co-players in whose company it pays most to know them,
    mean over seeds and their range; games by groups. Lines: a random learner, and PPO trained on exactly these."""
    games = [game for game in GAMES if any(scores.chosen(m, g, (game,)) for m in METHODS for g in GROUPS)]
    if not games:
        return
    size = (1.5 + 4.0 * len(games), 3.0 * len(GROUPS))
    figure, axes = plt.subplots(len(GROUPS), len(games), figsize=size, squeeze=False)
    for (i, group), (j, game) in itertools.product(enumerate(GROUPS), enumerate(games)):
        kind, axis = SHOWN[game[:3]], axes[i, j]
        for method, (_, _, colour) in METHODS.items():
            results = scores.chosen(method, group, (game,))
            if results:
                curves = np.array([r["by_time"][kind] for r in results])  # [seeds, WINDOWS]
                steps = results[0]["steps"] * (0.5 + np.arange(WINDOWS)) / WINDOWS
                axis.plot(steps, curves.mean(0), color=colour, lw=1.3, label=f"{method} ({len(curves)})")
                axis.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.12, lw=0)
        if reference := scores.references.get((game, kind, 1)):
            for name, style, label in (("late", "--", "PPO trained on these"), ("random", ":", "random")):
                axis.axhline(reference[name][kind], color="#888888", lw=1.0, ls=style, label=label)
        axis.set(title=f"{game}, learners from {group}")
        axis.grid(alpha=0.3)
        axis.set_ylabel(f"return with three {kind}")
        axes[-1, j].set_xlabel("step of the match")
    handles = {label: h for a in axes.flat for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 1.7 / size[0], 1))
    figure.savefig(ROOT / "docs" / "adaptation.png", dpi=80)
    plt.close(figure)


def cross_play(results: list[dict], game: str) -> tuple[np.ndarray, bool]:
    """Mean returns over seeds, float [focal method, method of the three], nan where there are none; and whether any
    player met three of its own seed."""
    rows = [r for r in results if r["part"] == "cross-play" and r["game"] == game]
    pairs = {
        (i, j): [r["returns"][j] for r in rows if r["method"] == i and j in r["returns"]]
        for i in METHODS
        for j in METHODS
    }
    values = [[statistics.mean(pairs[i, j]) if pairs[i, j] else np.nan for j in METHODS] for i in METHODS]
    return np.array(values), any(seed == r["seed"] for r in rows for seed in r["partner_seeds"].values())


def report_cross_play(results: list[dict]) -> None:
    for game in CROSS_PLAY:
        values, same = cross_play(results, game)
        if np.isnan(values).all():
            continue
        head(f"{game}: return of one ...", *(f"with three of {method}" for method in METHODS))
        for method, line in zip(METHODS, values, strict=True):
            if not np.isnan(line).all():
                row(method, *("" if np.isnan(value) else f"{value:.2f}" for value in line))
        if same:
            print("\nSome co-players have the seed of the focal player, for want of others: the diagonal is self-play.")


def plot_cross_play(results: list[dict]) -> None:
    """docs/cross_play.png: a heatmap for each game."""
    found = {game: values for game in CROSS_PLAY if not np.isnan(values := cross_play(results, game)[0]).all()}
    if not found:
        return
    figure, axes = plt.subplots(1, len(found), figsize=(5.2 * len(found), 4.4), squeeze=False)
    places = range(len(METHODS))
    for axis, (game, values) in zip(axes[0], found.items(), strict=True):
        image = axis.imshow(values, cmap="viridis")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for i, j in zip(*np.nonzero(~np.isnan(values)), strict=True):
            colour = "white" if values[i, j] < middle else "black"
            axis.text(j, i, f"{values[i, j]:.3g}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(places, METHODS, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(places, METHODS, fontsize=8)
        axis.set(title=f"{game}: return of one", xlabel="with three of", ylabel="one of")
        figure.colorbar(image, ax=axis, shrink=0.8)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "cross_play.png", dpi=80)
    plt.close(figure)


def report(file: Path, pictures: bool) -> None:
    """Markdown tables of the results in `file`, and the pictures."""
    results = results_in(file)
    scores = Scores(results)
    report_references(scores)
    report_adaptation(scores)
    report_cross_play(results)
    if pictures and results:
        plot_adaptation(scores)
        plot_cross_play(results)


def main(options: Options) -> None:
    options, file = quickly(options), options.results("adaptation")
    if min(options.steps // WINDOWS, options.last, options.steps - options.last) < LONGEST:
        print(f"adaptation.py: in {LONGEST} steps no episode may end: take more --steps or --last", file=sys.stderr)
        sys.exit(2)
    jobs = [] if options.worker or options.report else all_jobs(options)
    if benchmark(__file__, options, jobs, work, file):
        report(file, pictures=not options.quick)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
