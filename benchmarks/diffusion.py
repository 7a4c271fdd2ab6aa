"""Is a diffusion model of all players' futures a better source for the planner than the MOA?

`futures`: a diffusion model and an MOA learn from the same matches of scripted kinds beside a
player that stays as initialised, and tell the co-players' next 1, 2, 4 and 8 actions on matches
that neither has seen. Figure: the energy score 2 E d(X, y) - E d(X, X') of what is drawn, X, and
what followed, y (Gneiting and Raftery 2007, section 4.3), less that of the true players drawn anew
from the same state, whose kinds and targets no observer knows: so much is the energy distance to
them. d is the root of the Hamming distance, which is the Euclidean one of one-hot sequences but for
a factor; of the Hamming distance itself the score is a sum over single actions, blind to how they
depend on each other, and is given as well. `moa in the game` is rolled out in the exact game, which
the diffusion model does without; `moa repeated` draws every step as if it were the first. nats:
negative log-likelihood of a co-player's next action.

`online`, `offline` (from a file alone): returns, with three of each kind, of a learner that plans
with either. `speed`: decisions a second where every seat decides; sources take turns, medians.
"""

import contextlib
import copy
import shlex
import statistics
import tempfile
import time
from collections import defaultdict

import torch
from torch import Generator, no_grad, stack, where, zeros_like

import diffusion_planner as script
import offline
from figures import by_setting, figure, table
from run import train_and_judge

KINDS = {"msh-4x4-4h1s": "ns,nh,random", "msg": "cleaner,exploiter,random"}
LEARNING = {"msh-4x4-4h1s": 150_000, "msg": 100_000}  # game steps of `futures`
UPDATES = (4, 16)  # minibatches for both models every 2048 steps; 4 is the default
ONLINE = {"msh-4x4-4h1s": 100_000, "msg": 40_000}  # of `online`
OFFLINE = {"msh-4x4-4h1s": 80_000}  # of `offline`, from a file of 75,000 game steps
EPISODES = {"msh-4x4-4h1s": 640, "msg": 320}  # of the evaluation with each kind
IDLE = "--learning-rate 0 --plan-update offset --plan-beta 0 --plan-until 1 --plan-samples 1"
LENGTHS = (1, 2, 4, 8)  # of futures, in steps
DENOISING = (1, 2, 4, 8)  # S
GAMES, STEPS, EVERY = 128, 150, 7  # held-out play, and how far apart futures begin in it
SAMPLES = 16  # K
ROUNDS = 30  # of `speed`, after one that does not count


def jobs(seeds, quick):
    """Seeds outermost."""
    found = []
    for seed in (1,) if quick else seeds or (1, 2, 3):
        for game in [*KINDS][:1] if quick else KINDS:
            kinds = KINDS[game]
            job = {"game": game, "seed": seed, "script": script.SCRIPT, "quick": quick}
            about = f"--env-id {game} --seed {seed} --total-timesteps"
            for updates in UPDATES:
                words = f"{about} {2048 if quick else LEARNING[game]} --co-players {kinds} {IDLE}"
                words += f" --future-steps {LENGTHS[-1]} --moa-updates {updates}"
                setting = f"futures | {game} | {updates} updates"
                found.append({**job, "setting": setting, "options": words})
            found.append({**job, "setting": f"speed | {game}", "alone": True, "stage": 1})
            for way, lengths in (("online", ONLINE), ("offline", OFFLINE)):
                for source in ("moa", "diffusion") if game in lengths else ():
                    words = f"{about} {2048 if quick else lengths[game]} "
                    words += f"--co-player-model {source} "
                    words += f"--co-players {kinds}" if way == "online" else "--offline {file}"
                    run = {**job, "setting": f"{way} | {game} | {source}", "options": words}
                    run["kinds"] = {kind: kind for kind in kinds.split(",")}
                    found.append({**run, "episodes": 20 if quick else EPISODES[game]})
    return found


def work(job):
    """Of the setting's first word."""
    what = job["setting"].split(" | ")[0]
    if what == "speed":
        return {"decisions": speeds(job["game"])}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if what == "futures":
            return judged_futures(job)
        file = "play.npz"
        if what == "offline":
            kinds = KINDS[job["game"]]
            play = offline.Collect(file, kinds, seed=job["seed"], env_id=job["game"])
            offline.collect(play)
        result = train_and_judge({**job, "options": job["options"].format(file=file)})
    return {**result, "options": job["options"]}


# ---- Futures -------------------------------------------------------------------------------------
def judged_futures(job):
    """Scores [LENGTHS] by source, nats by model, and how long it learnt."""
    script.MODEL_UPDATES = 1  # the latent model is not what is asked about
    began = time.process_time()
    metrics = script.train(script.parse_arguments(shlex.split(job["options"])))
    result = {"train_cpu_seconds": round(time.process_time() - began, 1)}
    game = script.make_game(script.Args(env_id=job["game"]), "cpu")
    play = {"plan_update": "none", "plan_samples": SAMPLES}
    agent = script.load_player(metrics["run"], game, 1, **play).agent
    kinds = KINDS[job["game"]].split(",")
    steps = 20 if job["quick"] else STEPS
    return result | scores_of_futures(agent, kinds, steps, 1000 + job["seed"])


@no_grad()
def scores_of_futures(agent, kinds, steps, seed):
    """Of held-out play: scores [LENGTHS] by distance and source, and nats by model."""
    game = agent.game
    generator = Generator().manual_seed(seed)
    players = script.CoPlayers(game, kinds, GAMES, 5, generator)
    players.agents[0] = script.Player(agent, GAMES)
    state = game.start(GAMES, generator)
    record = defaultdict(list)  # by name [B, N], by step
    drawn = {}  # by step: by source [B, K, N, H]
    nats = defaultdict(list)  # by model
    episode = players.kind * 0  # number, [B, N]
    for t in range(steps):
        mask = game.action_mask(state)
        seen = players.agents[0].infer(state, players)
        others = (players.kind > 0) & game.alive(state)
        begins = t % EVERY == 0 and t <= steps - LENGTHS[-1]
        if begins:
            drawn[t] = drawn_futures(agent, state, seen, players, generator)
        guesses = next_actions(agent, state, seen, generator) if begins else {}
        actions = players.act(state, mask)
        for name, guess in guesses.items():
            nats[name].append(-guess.gather(2, actions[:, :, None])[others])
        step = {"action": actions, "active": game.alive(state), "first": episode, "others": others}
        for name, value in step.items():
            record[name].append(value)
        state, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        episode = episode + ended[:, None]
        players.advance(ended)
        state = game.restart(state, ended, generator)
    batch = {name: stack(values, 1) for name, values in record.items()}  # [B, T, N]
    batch["ended"] = batch["active"] | True  # no future that is asked for reaches past the record
    actual = script.future_tokens(batch, LENGTHS[-1], game.num_actions)
    result = {"nats": {name: mean(values) for name, values in nats.items()}}
    for distance, power in (("energy", 0.5), ("hamming", 1.0)):
        found = defaultdict(list)
        for t, by_source in drawn.items():
            for source, tokens in by_source.items():
                score = energy_score(tokens, actual[:, t], batch["others"][:, t], power)
                found[source].append(score[batch["others"][:, t].any(1)])
        result[distance] = {}
        for source, scores in found.items():
            result[distance][source] = [mean([x[:, h - 1] for x in scores]) for h in LENGTHS]
    return result


def mean(values):
    """Of tensors."""
    return round(float(torch.cat(values).mean()), 5)


def energy_score(drawn, actual, counted, power):
    """[R, H]: unbiased estimate of 2 E d(X, y) - E d(X, X') for the first 1 .. H steps of what is
    `drawn` [R, K, N, H] and `actual` [R, N, H]; d is the Hamming distance to `power` over the seats
    of bool `counted` [R, N]."""

    def distance(one, other):
        unlike = (one != other) & counted[:, None, None, :, None]
        return unlike.sum(3).cumsum(3).double() ** power  # [R, K, K, H]

    one = drawn[:, :, None]
    samples = drawn.shape[1]
    apart = distance(one, actual[:, None, None]).sum((1, 2)) / samples
    among = distance(one, drawn[:, None]).sum((1, 2)) / (samples * (samples - 1))
    return 2 * apart - among


def drawn_futures(agent, state, seen, players, generator):
    """By source: K futures int64 [B, K, N, H] from the MOA, the diffusion model, true players."""
    game = agent.game
    horizon = LENGTHS[-1]
    goals = script.gaussian(*(x.repeat_interleave(SAMPLES, 0) for x in seen[2:]), generator)

    def predicted(copies, mask):
        logits = agent.moa.decoder(*game.features(copies), goals)
        return script.sample(script.masked(logits, mask), generator)

    true = copy.copy(players)  # its tensors are replaced, never written to
    true.kind = players.kind.repeat_interleave(SAMPLES, 0)
    true.target = players.target.repeat_interleave(SAMPLES, 0)
    true.agents = {0: copy.copy(players.agents[0])}
    true.agents[0].memory = players.agents[0].memory.repeat_interleave(SAMPLES, 0)
    found = {"true players": rolled_out(game, state, true.act)}
    found["moa in the game"] = rolled_out(game, state, predicted)
    alive = game.alive(state)[:, None, :, None]
    steps = []
    for _ in range(horizon):
        joint = script.sample_joint_actions(agent, game.action_mask(state), seen, generator)
        steps.append(joint)
    found["moa repeated"] = where(alive, stack(steps, 3), game.num_actions)
    for steps in DENOISING:
        agent.args.denoising_steps = steps
        tokens = script.sample_futures(agent, state, seen, horizon, generator)
        found[f"diffusion, S = {steps}"] = tokens
    return found


def rolled_out(game, state, act):
    """int64 [B, K, N, H]: tokens of K games that go on from each of `state`, where all seats play
    `act(copies, mask)`."""
    copies = state._make(x.repeat_interleave(SAMPLES, 0) for x in state)
    over = zeros_like(copies.time) > 0
    tokens = []
    for _ in range(LENGTHS[-1]):
        actions = act(copies, game.action_mask(copies))
        gone = ~game.alive(copies) | over[:, None]
        tokens.append(actions.masked_fill(gone, game.num_actions))
        copies, _, terminated, truncated = game.step(copies, actions)
        over = over | (terminated | truncated).all(1)
    return stack(tokens, 2).unflatten(0, (-1, SAMPLES))


def next_actions(agent, state, seen, generator):
    """By model: log probabilities [B, N, A] of every seat's next action by itself."""
    game = agent.game
    mask = game.action_mask(state)
    own, views, mean, log_std = (x[:, None] for x in seen)
    goals = script.gaussian(mean.expand(-1, SAMPLES, -1, -1), log_std, generator)
    logits = script.masked(agent.moa.decoder(own, views, goals), mask[:, None])
    found = {"moa": logits.softmax(3).mean(1).log()}
    others, _ = agent.inputs(seen[1], seen[2])
    alive = game.alive(state)[:, :, None].expand(-1, -1, LENGTHS[-1])
    tokens = where(alive, game.num_actions + 1, game.num_actions)
    logits = script.denoise(agent, seen[0], others, seen[2], tokens)[:, :, 0, :-1]
    found["diffusion"] = script.masked(logits, mask).log_softmax(2)
    return found


# ---- Speed ---------------------------------------------------------------------------------------
def speeds(env_id, games=64):
    """Decisions a second by source: planning as it is trained, without learning."""
    args = script.Args(env_id=env_id, plan_update="offset", denoising_steps=1)
    game = script.make_game(args, "cpu")
    args = script.checked(args, game)
    agent = script.Agent(game, args)
    generator = Generator().manual_seed(1)
    players = script.CoPlayers(game, ["self"], games, 10, generator)
    player = script.Player(agent, games)
    state = game.start(games, generator)
    mask = game.action_mask(state)
    sources = {"moa": ("moa", 1)}
    sources |= {f"diffusion, S = {steps}": ("diffusion", steps) for steps in DENOISING}
    seconds = defaultdict(list)
    for _ in range(ROUNDS + 1):
        for name, (args.co_player_model, args.denoising_steps) in sources.items():
            began = time.process_time()
            with no_grad():
                player.act(state, mask, players.kind == 0, players)
            seconds[name].append(time.process_time() - began)
    decisions = games * game.num_players
    return {k: round(decisions / statistics.median(x[1:]), 1) for k, x in seconds.items()}


# ---- Tables --------------------------------------------------------------------------------------
def report(results):
    """Tables of futures, of speed, and of returns."""
    runs = by_setting(results)
    parts = []
    rows = []
    speeds = []
    for setting, of in runs.items():
        what, _, about = setting.partition(" | ")
        if what == "futures":
            nats = [f"{name} {figure([r['nats'][name] for r in of], 3)}" for name in of[0]["nats"]]
            title = f"{about.replace(' | ', ', ')}; nats an action: {', '.join(nats)}"
            parts.append(f"{title}\n\n{scores_table(of)}")
        elif what == "speed":
            for name in of[0]["decisions"]:
                speeds.append([about, name, figure([r["decisions"][name] for r in of], 0)])
        else:
            kinds = of[0]["returns"]
            returns = [f"{kind} {figure([r['returns'][kind] for r in of])}" for kind in kinds]
            rows.append(
                [
                    setting.replace(" | ", ", "),
                    *returns,
                    figure([r["train_cpu_seconds"] for r in of], 0),
                ]
            )
    if rows:
        parts.append(table(["learner with three", "", "", "", "CPU seconds"], rows))
    if speeds:
        parts.append(table(["game", "source", "decisions a CPU second"], speeds))
    return "\n\n".join(parts)


def scores_table(of):
    """Of the `futures` of several seeds: both scores of every source, less the true players', by
    the length of what is told."""
    rows = []
    for source in list(of[0]["energy"])[1:]:
        cells = []
        for distance in ("energy", "hamming"):
            for k in range(len(LENGTHS)):
                over = [r[distance][source][k] - r[distance]["true players"][k] for r in of]
                cells.append(figure(over, 3))
        rows.append([source, *cells])
    head = [f"{distance}, {length}" for distance in ("energy", "Hamming") for length in LENGTHS]
    return table(["source", *head], rows)
