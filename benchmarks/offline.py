"""Recorded play to learn from, and how right a latent model is on play that it has not seen.

    python benchmarks/offline.py collect --co-players ns,nh,random --steps 75000 --file play.npz
    python benchmarks/offline.py judge runs/NAME --file held_out.npz
    python benchmarks/offline.py judge runs/NAME --co-players self

`collect` plays 64 games at once in matches of ten episodes, all seats drawn from a list: scripted
names, runs, `package.module:name`; on PettingZoo environments too (`--env-id`, `--env-kwargs`).

`judge` tells the model of a run the joint action, and compares what it predicts with what followed,
after one step and after five, in which latents roll on by themselves with the recorded actions.
Shares that are right: relative `cells` of co-players that are still `there` (rows and columns
within half a cell), and whether they are; `rewarded` steps (within half the reward) and
`unrewarded` ones (below 0.5); whether the player's episode `ends` in termination or `goes_on`. On
PettingZoo environments co-players' `features` (within a tenth of their spread), and their R^2. The
`reward_error` is absolute. V(enc(o)) is compared with the discounted return that followed, where
the record has the episode's end; it is the value of the planner's policy, so that other players'
returns may differ. Goals are inferred along the matches. Who has left counts nowhere."""

import contextlib
import dataclasses
import os
import sys
import tempfile
from collections import defaultdict
from math import ceil
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Generator, linspace, no_grad, stack, tensor, where, zeros_like
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import figures  # noqa: E402
import latent_world_model as script  # noqa: E402
import run  # noqa: E402

GAMES = 64  # at once
EPISODES = 10  # of a match
STEPS = 5  # that latents roll on by themselves
EVERY = 3  # they begin to at every third step, so as to save time


@dataclasses.dataclass
class Collect:
    file: str  # to write, .npz
    co_players: str  # comma list that all seats are drawn from, without `self`
    steps: int = 75_000  # game steps, over all games
    seed: int = 1  # of the play
    env_id: str = "msh-4x4-4h1s"  # game
    env_kwargs: str = "{}"  # arguments of a PettingZoo environment, as JSON
    horizon: int | None = None  # most steps of an episode (default: by game)


@dataclasses.dataclass
class Judge:
    run: tyro.conf.Positional[str]  # folder or checkpoint
    file: str | None = None  # recorded play; without it, play as follows
    co_players: str = "self"  # comma list that all seats are drawn from; `self` is the run
    steps: int = 12_800  # game steps to play
    seed: int = 1001  # of the play, another than that of the run


class Company(script.CoPlayers):
    """Co-players at all seats: that of the learner is given to a kind of the pool as well."""

    def start_matches(self, which):
        super().start_matches(which)
        drawn = (script.uniform(self.kind.shape, self.generator) * len(self.pool)).long()
        focal = self.kind == 0
        self.kind = where(focal, self.pool[drawn], self.kind)
        for k, player in self.callables.items():  # the others' seats were told already
            if hasattr(player, "start_match"):
                player.start_match((focal & (self.kind == k)).flatten())


@no_grad()
def collect(options):
    """Writes a data set of games that listed players play at all seats. Raises UsageError."""
    pool = options.co_players.split(",")
    if "self" in pool:
        raise script.UsageError("--co-players: there is no self here, give a run by its path")
    if options.steps < 1:
        raise script.UsageError("--steps: at least 1")
    if not os.access(Path(options.file).parent, os.W_OK) or os.path.isdir(options.file):
        raise script.UsageError(f"cannot write {options.file}")
    about = {"env_id": options.env_id, "env_kwargs": options.env_kwargs}
    game = script.make_game(script.Args(**about, horizon=options.horizon), "cpu")
    generator = Generator().manual_seed(options.seed)
    players = Company(game, pool, GAMES, EPISODES, generator)
    state = game.start(GAMES, generator)
    steps = []
    for _ in tqdm(range(ceil(options.steps / GAMES)), "play", unit_scale=GAMES, unit="step"):
        actions = players.act(state, game.action_mask(state))
        after, reward, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        step = state._asdict() | {f"next_{k}": x for k, x in after._asdict().items()}
        step |= {"action": actions, "reward": reward, "terminated": terminated}
        steps.append({**step, "truncated": truncated, "match_ended": players.advance(ended)})
        state = game.restart(after, ended, generator) if ended.any() else after
    arrays = {name: stack([step[name] for step in steps]).numpy() for name in steps[0]}
    for name, values in arrays.items():
        if values.dtype == np.int64:  # in the smallest signed type that holds them
            arrays[name] = values.astype(np.min_scalar_type(min(values.min(), ~values.max())))
    with script.refused(f"cannot write {options.file}"), open(options.file, "wb") as file:
        np.savez_compressed(file, env_id=options.env_id, horizon=game.horizon, **arrays)


def load(path, game, env_id):
    """Recorded of a data set, which must fit the game. Raises UsageError."""
    generator = Generator().manual_seed(1)
    with script.refused(f"cannot read {path}"), np.load(path) as file:
        recorded = script.Recorded(game, script.Args(env_id=env_id, offline=str(path)), generator)
        for name in ("truncated", "match_ended"):  # Recorded ends every match with the file
            recorded.data[name][-1] = tensor(file[name][-1])
    return recorded


def mean(values):
    """Mean of a tensor, to four decimals; None if it has none."""
    average = values.double().mean()
    return round(float(average), 4) if average.isfinite() else None


@no_grad()
def judged(recorded, player, args):
    """Of a run with `args`: sums and counts [STEPS, 2] by figure; V [R]; what followed it [R]."""
    game, model, data = recorded.game, player.agent.model, recorded.data
    recorded.agents[0] = player
    reward = data["reward"].lerp(data["reward"].mean(2, keepdim=True), args.prosocial)
    over = data["terminated"] | data["truncated"]
    state = game.state_type._make(data[k].flatten(0, 1) for k in game.state_type._fields)
    alive = game.alive(state).view(over.shape)
    values = zeros_like(reward)
    some = linspace(0, len(state.time) - 1, 4096, dtype=torch.double).long()
    views = game.features(state._make(field[some] for field in state))[1]
    there = alive.flatten(0, 1)[some]
    spread = views[there[:, :, None] & there[:, game.others]].std(0, correction=0)  # [Y]
    sums = defaultdict(lambda: torch.zeros(STEPS, 2).double())
    rolling = []  # step when it began, latents, players and co-players that were there

    def add(name, k, figure, counted):
        sums[name][k] += stack([figure[counted].double().sum(), counted.sum()])

    for t in tqdm(range(len(reward)), desc="judge", unit="step"):
        state = recorded.start(len(recorded.kind), None)
        actions = recorded.act(state, game.action_mask(state))
        seen = player.decision
        latents = model.encode(seen["own"], seen["others"])
        values[t] = model.value(*latents, seen["goal"]).squeeze(-1) / args.reward_scale
        rolling.append((t, latents, alive[t], alive[t][:, game.others]))
        after, _, terminated, _ = recorded.step(state, actions)
        views = game.features(after)[1]
        there = (alive[t] & ~terminated)[:, game.others]
        following = []
        for start, latents, on, others in rolling:
            *ahead, paid = model(*latents, actions, actions[:, game.others])
            _, predicted, plays_on = model.decode(*ahead)
            k = t - start
            error = (paid / args.reward_scale - reward[t]).abs()
            add("reward_error", k, error, on)
            add("rewarded", k, error < 0.5 * reward[t].abs(), on & (reward[t] != 0))
            add("unrewarded", k, error < 0.5, on & (reward[t] == 0))
            add("ends", k, plays_on < 0.5, on & terminated)
            add("goes_on", k, plays_on > 0.5, on & ~terminated)
            both = (on & ~terminated)[:, :, None] & others
            apart = predicted - views
            if game.simulates:
                apart = apart[..., 8:10].abs() * max(game.height, game.width)  # rows, columns away
                add("cells", k, (apart < 0.5).all(-1), both & there)
                add("there", k, (predicted[..., 0] > 0.5) == there, both)
            else:
                apart = (apart / spread)[..., spread > 1e-4]
                add("features", k, (apart.abs() < 0.1).float().mean(-1), both & there)
                add("features_r2", k, 1.0 - apart.square().mean(-1), both & there)
            if start % EVERY == 0 and k < STEPS - 1:
                following.append((start, ahead, on & ~over[t], others))
        rolling = following
        recorded.advance(over[t].all(1))
    known = over.clone()
    for t in reversed(range(len(reward) - 1)):
        reward[t] += args.gamma * ~over[t] * reward[t + 1]
        known[t] |= known[t + 1]
    return sums, values[known & alive], reward[known & alive]


def judge(options):
    """Figures of a run's model by name: shares and errors after 1 .. STEPS steps; V's slope and
    explained variance. Raises UsageError."""
    content = script.load_checkpoint(options.run)
    with script.refused(f"{options.run} is no run of {script.SCRIPT}.py"):
        args = script.Args(**content["args"])
    if args.plan_update == "none" or args.goal == "oracle":
        raise script.UsageError(f"{options.run} learnt no model, or with goals that no file tells")
    game = script.make_game(args, "cpu")
    agent = script.load_player(options.run, game, 1, plan_update="none").agent
    with tempfile.TemporaryDirectory() as folder:
        file = options.file or f"{folder}/play.npz"
        if options.file is None:
            pool = [options.run if x == "self" else x for x in options.co_players.split(",")]
            about = (args.env_id, args.env_kwargs, args.horizon)
            collect(Collect(file, ",".join(pool), options.steps, options.seed, *about))
        recorded = load(file, game, args.env_id)
    player = script.Player(agent, len(recorded.kind))
    sums, value, following = judged(recorded, player, args)
    found = {k: [mean(total / count) for total, count in x] for k, x in sums.items()}
    if len(value):  # some episode ended
        slope = ((value - value.mean()) * following).mean() / value.var(correction=0)
        explained = 1.0 - (following - value).var(correction=0) / following.var(correction=0)
        found |= {"value_slope": [mean(slope)], "value_explained": [mean(explained)]}
    return {name: by_steps for name, by_steps in found.items() if by_steps[0] is not None}


def main(words=None):
    torch.set_num_threads(1)
    options = tyro.cli(Collect | Judge, args=words, description=__doc__)
    try:
        if isinstance(options, Collect):
            return collect(options)
        rows = []
        for name, by_steps in judge(options).items():
            rows.append([name, *("" if figure is None else f"{figure}" for figure in by_steps)])
        print(figures.table(["steps", *(str(k + 1) for k in range(STEPS))], rows))
    except script.UsageError as error:
        print(f"{Path(__file__).name}: error: {error}", file=sys.stderr)
        sys.exit(2)


# ---- Benchmark: learning from a file alone, beside learning online among the same kinds ----------
GAME, KINDS = "msh-4x4-4h1s", "ns,nh,random"
FILE_STEPS, TRAINING = 75_000, 200_000  # game steps
WAYS = {"offline": "--offline {file}", "online": f"--co-players {KINDS}"}


def jobs(seeds, quick):
    """A file for each seed, and both ways to learn."""
    steps, recorded, episodes = (4096, 4096, 20) if quick else (TRAINING, FILE_STEPS, 640)
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for way, words in WAYS.items():
            job = run.training(way, seed, script.SCRIPT, f"--env-id {GAME} {words}", steps)
            job |= {"kinds": {kind: kind for kind in KINDS.split(",")}, "recorded": recorded}
            yield {**job, "episodes": episodes}


def work(job):
    """Trains, from a file that is recorded first, or online; what the model knows of other play."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        collect(Collect("play.npz", KINDS, job["recorded"], job["seed"]))
        words = job["options"].format(file="play.npz")
        result = run.train_and_judge({**job, "options": words})
        collect(Collect("unseen.npz", KINDS, job["recorded"] // 6, 1000 + job["seed"]))
        model = judge(Judge(result.pop("folder"), "unseen.npz"))
    return {**result, "options": job["options"], "model": model}


def report(results):
    """Returns with three of each kind (what learnt offline plans, what learnt online plays without
    its planner); and of the model offline, on play that it has not seen."""
    runs = figures.by_setting(results)
    rows = []
    for way, of in runs.items():
        returns = [figures.figure([r["returns"][kind] for r in of]) for kind in KINDS.split(",")]
        rows.append([way, *returns])
    returns = figures.table([f"{GAME}: learner with three", *KINDS.split(",")], rows)
    models = [r["model"] for r in runs["offline"]]
    rows = []
    for name in models[0] if models else ():
        ends = [(model[name][0], *model[name][STEPS - 1 :]) for model in models]  # of V one figure
        cells = [figures.figure(list(values), 3) for values in zip(*ends)]
        rows.append([name, *cells, *[""] * (2 - len(cells))])
    known = figures.table(["model, offline", "1 step", f"{STEPS} steps"], rows)
    return f"{returns}\n\n{known}" if models else returns


if __name__ == "__main__":
    main()
