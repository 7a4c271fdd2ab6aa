"""What is lost when players see only what is near, and do worlds with walls change anything?

`experiments/limited_view.py` is trained among scripted stag hunters, hare hunters and random
players, with a view of R cells or of all, and with `--goal` none, inferred or oracle. Its opponent
model is judged as an observer of matches that none has seen and that are the same for every model
of a game: three scripted players and one at random, five episodes, all four as observers of the
others. Negative log-likelihood, in nats, of the actions that the observer sees, while it is in the
game itself; the share of the gap from none to oracle that inferring closes; and how often a linear
probe (least squares on half of the matches, judged on the others) reads a player's kind off the
goal that an observer infers of it at the start of an episode, in or out of view. The learner is
judged by its return among three of each kind, and at a table with one of each.

With walls: inferred goals and none, among the same co-players and in self-play.
"""

import numpy as np
import torch

from figures import by_setting, figure, table
from moa_data import gaps
from run import train_and_judge

GOALS = ("none", "inferred", "oracle")
STEPS = {"msh-4x4-4h1s": 120_000, "msh-4h1s": 150_000, "self": 300_000}  # game steps of training
VIEWS = {"msh-4x4-4h1s": (0, 1, 2), "msh-4h1s": (0, 1, 2, 3)}  # 0: all
WALLS = "msh-4h1s-16w"  # the way is longer for half of all pairs of cells
MIXTURE = "ns,nh,random"
COMPANIES = {"3 ns": "ns", "3 nh": "nh", "3 random": "random", "one of each": MIXTURE}
EPISODES = 5
MATCHES = 300


def jobs(seeds: tuple[int, ...], quick: bool) -> list[dict]:
    """Seeds outermost."""
    found = []
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for game, views in VIEWS.items():
            for view in views:
                for goal in GOALS:
                    setting = f"{game}, view {view or 'all'} | {goal}"
                    found.append(job_of(setting, game, view, goal, MIXTURE, COMPANIES, seed, quick))
        for pool, kinds in {MIXTURE: COMPANIES, "self": {"self": "self"}}.items():
            for goal in GOALS[:2]:
                setting = f"{WALLS}, {pool} | {goal}"
                found.append(job_of(setting, WALLS, 0, goal, pool, kinds, seed, quick))
    return found[3:6] + found[-1:] if quick else found


def job_of(setting, game, view, goal, pool, kinds, seed, quick):
    """A training, and what it is judged with."""
    steps = STEPS.get(game) or STEPS.get(pool) or STEPS["msh-4h1s"]
    steps = 4096 if quick else steps
    words = f"--env-id {game} --view {view} --goal {goal} --co-players {pool}"
    words += f" --total-timesteps {steps} --seed {seed}"
    job = {"setting": setting, "seed": seed, "script": "limited_view", "options": words}
    return {**job, "kinds": kinds, "episodes": 20 if quick else 2000}


def work(job: dict) -> dict:
    """Returns, and what its opponent model knows."""
    import limited_view as script

    result = train_and_judge(job)
    result["command"] = f"python benchmarks/experiments/limited_view.py {job['options']}"
    return result | watch(script, result["folder"], 1000 + job["seed"])


@torch.no_grad()
def watch(script, run, seed):
    """What the opponent model of a run knows of scripted players, by episode: `nll`; share of the
    steps that are `seen`; how often the kind is known of those in view (`near`) and out (`far`)."""
    generator = torch.Generator().manual_seed(seed)
    args = script.Args(**script.load_checkpoint(run)["args"])
    game = script.make_game(args, "cpu")
    players = script.CoPlayers(game, MIXTURE.split(","), MATCHES, EPISODES, generator)
    player = script.load_player(run, game, MATCHES)  # watches; its seat plays at random
    nobody = torch.zeros_like(players.kind).bool()
    others = ~torch.eye(game.num_players).bool()
    state = game.start(MATCHES, generator)
    sums = torch.zeros(EPISODES, 3)  # nats, steps that are seen, steps
    starts = [[] for _ in range(EPISODES)]  # (match, in view, kind), goal
    fresh = ~nobody[:, 0]
    done = ~fresh
    while not done.all():
        mask = game.action_mask(state)
        player.act(state, mask, nobody, players)
        actions = players.act(state, mask)
        own, views, goals, _ = player.infer(state, players)  # oracle: with the target of this step
        seen_mask = game.action_mask(player.views).view(*goals.shape[:3], -1)
        guess = script.masked(player.agent.moa.decoder(own, views, goals), seen_mask)
        nll = -script.pick(guess.log_softmax(3), actions[:, None].expand(player.sees.shape))
        alive = game.alive(state)
        scripted = others & (players.kind > 0)[:, None] & ~done[:, None, None]  # [B, N, N]
        there = scripted & alive[:, None] & alive[:, :, None]
        for k in range(EPISODES):
            now = (players.episode == k)[:, None, None]
            counted = there & player.sees & now
            sums[k] += torch.stack([nll[counted].sum(), counted.sum(), (there & now).sum()])
            which = (scripted & now & fresh[:, None, None]).nonzero(as_tuple=True)
            kind = players.kind[which[0], which[2]]
            rows = torch.stack([which[0], player.sees[which].long(), kind], 1)
            starts[k].append(torch.cat([rows, goals[which]], 1))
        state, _, terminated, truncated = game.step(state, actions)
        fresh = (terminated | truncated).all(1)
        player.remember(actions)
        match_ended = players.advance(fresh)
        player.forget(fresh, match_ended)
        done = done | match_ended
        state = game.restart(state, fresh, generator)
    known = [probe(torch.cat(parts)) for parts in starts]
    nll, seen = (sums[:, 0] / sums[:, 1]).tolist(), (sums[:, 1] / sums[:, 2]).tolist()
    return {"nll": nll, "seen": seen, "near": [x[0] for x in known], "far": [x[1] for x in known]}


def probe(rows):
    """Shares of players in view and of those out of view whose kind a linear probe tells, of rows
    [R, 3 + Z] (match, in view, kind, goal); None where there are none."""
    match, near, kind = rows[:, :3].long().T
    goals = torch.cat([rows[:, 3:], torch.ones(len(rows), 1)], 1).double()
    fit = match < MATCHES // 2
    truth = torch.nn.functional.one_hot(kind).double()
    weights = torch.linalg.lstsq(goals[fit], truth[fit], driver="gelsd").solution
    right = ((goals @ weights).argmax(1) == kind).double()
    parts = [right[~fit & (near == value)] for value in (1, 0)]
    return [float(part.mean()) if len(part) else None for part in parts]


def report(results: list[dict]) -> str:
    """What is known by view, what it is worth, and walls."""
    runs = by_setting(results)
    known, returns, walls = [], [], []
    for game, views in VIEWS.items():
        for view in views:
            name = f"{game}, view {view or 'all'}"
            each = {goal: runs.get(f"{name} | {goal}", []) for goal in GOALS}
            if not all(each.values()):
                continue
            cells = [figure([np.mean(r["seen"]) for r in each["inferred"]])]
            cells += [figure([np.mean(r["nll"]) for r in of], 3) for of in each.values()]
            closed = gaps(each, "inferred", "nll")
            cells += [figure([by_episode[k] for by_episode in closed]) for k in (0, EPISODES - 1)]
            for place in ("near", "far"):
                cells.append(figure([r[place][-1] for r in each["inferred"]]))
            known.append([name, *cells])
            for company in COMPANIES:
                of = [figure([r["returns"][company] for r in each[goal]]) for goal in GOALS]
                returns.append([name, company, *of])
    for setting, of in runs.items():
        if setting.startswith(WALLS) or "msh-4h1s, view all" in setting:
            cells = [figure([r["returns"].get(c) for r in of]) for c in [*COMPANIES, "self"]]
            points = [np.array(r["curve"])[:, 2] for r in of]
            parts = [np.array_split(values, 4) for values in points]
            curve = [figure([part[k].mean() for part in parts if len(part[k])]) for k in range(4)]
            walls.append([setting.replace(" | ", ", "), *cells, *curve])
    head = ["game and view", "share of steps seen", *(f"nats an action, {g}" for g in GOALS)]
    head += ["gap closed, episode 1", f"episode {EPISODES}"]
    head += [f"kind known, episode {EPISODES}, in view", "out of view"]
    tables = [table(head, known), table(["game and view", "return among", *GOALS], returns)]
    quarters = [f"{k}. quarter of training" for k in (1, 2, 3, 4)]
    tables.append(table(["walls", *COMPANIES, "self", *quarters], walls))
    return "\n\n".join(tables)
