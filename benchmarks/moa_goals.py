"""How much of what perfect goals are worth to the opponent model does the inferred z recover?

Scripted players of five kinds meet in matches of five episodes. Three MOAs learn from the same matches: told nothing
(`none`), with the VAE's z (`inferred`), told every player's kind and target (`oracle`). On held-out matches: negative
log-likelihood of the actions, by episode of the match, and the share of the gap from `none` to `oracle` that `inferred`
closes; and how well a linear probe reads the kind off z at the start of each episode.

    python benchmarks/moa_goals.py --env-id msh-4h1s
    python benchmarks/moa_goals.py --env-id msh-4x4-4h1s --kinds ns,nh,random
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import latent_world_model as script  # for its MOA, a VAE, and the match buffer


@dataclasses.dataclass
class Options:
    env_id: str = "msh-4h1s"  # game
    kinds: str = ""  # scripted co-players (default: the game's, and the noisy ones)
    matches: int = 4000  # matches to learn from
    held_out: int = 600  # matches to measure on
    episodes: int = 5  # episodes of a match
    updates: int = 3000  # minibatches
    minibatch: int = 16  # matches in each
    alpha: float = 0.01  # weight of the KL
    learning_rate: float = 2e-3  # falls to 0
    subgoal_coef: float = 0.1  # weight of the subgoal's reconstruction
    hidden: int = 64  # width
    goals: str = "none,inferred,oracle"  # which to train
    seed: int = 1  # seed
    json: bool = False  # print one JSON line as well


def play(game: script.GridGame, kinds: list[str], matches: int, episodes: int, seed: int) -> script.MOABuffer:
    """A buffer with `matches` matches; the seat without a script plays at random and is left out of what follows."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(matches, 200)
    if matches % batch:
        raise SystemExit("--matches and --held-out must be multiples of 200")
    players = script.CoPlayers(game, kinds, batch, episodes, generator)
    buffer = script.MOABuffer(game, batch, matches, episodes, "all")
    state = game.initial_state(batch, generator)
    done = torch.zeros(batch, dtype=torch.int64)
    while buffer.stored < matches:
        actions = players.act(state, game.action_mask(state))
        after, reward, terminated, truncated = game.step(state, actions)
        ended = terminated | truncated
        buffer.add(state, actions, players, reward, after)
        match_ended = ended & (players.episode + 1 >= episodes)
        # as many matches from every game: long matches are not left out
        buffer.end(match_ended & (done < matches // batch), 0)
        for name in ("length", "episode_reward", "taken"):
            buffer.data[name][:batch][match_ended] = 0
        done += match_ended
        players.observe(state, actions, ended)
        state = after.replaced(ended, game.initial_state(batch, generator))
    return buffer


def batch_of(buffer: script.MOABuffer, rows: torch.Tensor, relative: script.RelativeFeatures) -> script.MatchBatch:
    """The matches at `rows`, without the seat that has no script."""
    batch = buffer.batch_of(rows, relative, oracle=True)
    active = batch.active & (buffer.data["script"][rows] >= 0).unsqueeze(1)
    return batch._replace(active=active, weight=active.float())


def main(options: Options) -> dict:
    torch.manual_seed(options.seed)
    game = script.GridGame(options.env_id)
    scripted = script.SCRIPTED_OF[game.family]
    kinds = (
        options.kinds.split(",") if options.kinds else [*scripted, *(f"{k}-noisy" for k in scripted if k != "random")]
    )
    train, test = (
        play(game, kinds, n, options.episodes, options.seed + s)
        for s, n in enumerate((options.matches, options.held_out))
    )
    relative, generator = script.RelativeFeatures(game), torch.Generator().manual_seed(options.seed)
    nll, result = {}, {"env_id": game.id, "kinds": kinds, **dataclasses.asdict(options)}
    for goal in options.goals.split(","):
        moa = script.MOA(relative, options.hidden, 8, goal)
        optimizer = torch.optim.Adam(moa.parameters(), options.learning_rate, eps=1e-5)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.updates)
        for _ in (bar := tqdm(range(options.updates), desc=goal)):
            rows = train.batch + torch.randint(len(train), (options.minibatch,), generator=generator)
            batch = batch_of(train, rows, relative)
            batch = batch if goal == "oracle" else batch._replace(oracle=None)
            loss, terms = script.moa_loss(moa, batch, options.alpha, options.subgoal_coef, False, generator)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(moa.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(" ".join(f"{k} {float(v):.3f}" for k, v in terms.items()), refresh=False)
        nll[goal] = held_out(moa, goal, test, options)
        result[f"nll_{goal}"] = [round(x, 4) for x in nll[goal].tolist()]
        if goal == "inferred":
            result["kl"] = float(terms["moa/kl"])
            result["probe"] = probe(moa, train, test, options)
    print(f"{game.id}, kinds {', '.join(kinds)}: NLL on {options.held_out} held-out matches; all, then by episode")
    for goal, values in nll.items():
        print(f"  {goal:9}" + " ".join(f"{v:7.3f}" for v in values))
    if {"none", "inferred", "oracle"} <= set(nll):
        closed = (nll["none"] - nll["inferred"]) / (nll["none"] - nll["oracle"])
        result["closed"] = [round(x, 4) for x in closed.tolist()]
        print("  gap closed " + " ".join(f"{v:6.1%}" for v in closed))
    if "probe" in result:
        print("  kind read off z at the start of episode: " + " ".join(f"{v:.3f}" for v in result["probe"]))
    if options.json:
        print(json.dumps(result))
    return result


@torch.no_grad()
def held_out(moa: script.MOA, goal: str, test: script.MOABuffer, options: Options) -> torch.Tensor:
    """Mean NLL per action [1 + episodes]: of all actions, then by episode of the match. z is the posterior mean."""
    sums = torch.zeros(2, options.episodes)
    for rows in torch.arange(len(test)).split(100):
        batch = batch_of(test, test.batch + rows, moa.relative)
        own, others = moa.relative(batch.state)
        if goal == "inferred":
            z = posterior_mean(moa, batch, own, others)
        else:
            z = batch.oracle.flatten(0, 1) if goal == "oracle" else own.new_zeros(*own.shape[:2], moa.goal_size)
        logits = script.masked(moa.decoder(own, others, z), moa.relative.game.action_mask(batch.state))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.actions.flatten(), reduction="none")
        loss = loss.view(batch.actions.shape) * batch.active
        episode = test.data["episode"][test.batch + rows, : loss.shape[1]].long()
        for k in range(options.episodes):
            here = (episode == k).unsqueeze(2) & batch.active
            sums[:, k] += torch.stack([loss[here].sum(), here.sum()])
    return torch.cat([sums[0].sum(0, keepdim=True) / sums[1].sum(), sums[0] / sums[1]])


def posterior_mean(moa, batch, own, others) -> torch.Tensor:
    """Posterior mean of z [S * L, N, Z] at every step, from what was seen strictly before it."""
    seen = moa.seen(own, others)
    step = moa.features(seen, batch.actions.flatten(0, 1), batch.active.flatten(0, 1)).unflatten(0, batch.start.shape)
    before = step.cumsum(1) - step
    within = before - before.gather(1, batch.start[..., None, None].expand_as(before))
    return moa.encode(script.Memory(before.flatten(0, 1), within.flatten(0, 1)), seen)[0]


@torch.no_grad()
def first_goals(
    moa: script.MOA, buffer: script.MOABuffer, episode: int, limit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """z [R, Z] of every scripted player at the first step of an episode of the match, and its kind [R]."""
    goals, kinds = [], []
    for rows in torch.arange(min(len(buffer), limit)).split(100):
        rows = buffer.batch + rows
        batch = batch_of(buffer, rows, moa.relative)
        z = posterior_mean(moa, batch, *moa.relative(batch.state)).unflatten(0, batch.start.shape)
        at = (buffer.data["episode"][rows].long() < episode) & (
            torch.arange(buffer.data["episode"].shape[1]) < buffer.data["length"][rows].unsqueeze(1)
        )
        z = z[torch.arange(len(rows)), at.sum(1)]  # [S, N, Z]
        kind = buffer.data["script"][rows].long()
        goals.append(z[kind >= 0])
        kinds.append(kind[kind >= 0])
    return torch.cat(goals), torch.cat(kinds)


def probe(moa: script.MOA, train: script.MOABuffer, test: script.MOABuffer, options: Options) -> list[float]:
    """Held-out accuracy of a multinomial logistic regression from z to the kind, at the start of every episode."""
    result = []
    for episode in range(options.episodes):
        x, y = first_goals(moa, train, episode, 1000)
        linear = torch.nn.Linear(x.shape[1], 2 * len(script.SCRIPTED))
        optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=200)

        def closure(linear=linear, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(linear(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        x, y = first_goals(moa, test, episode, options.held_out)
        result.append(round(float((linear(x).argmax(1) == y).float().mean()), 4))
    return result


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
