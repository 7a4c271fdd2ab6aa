"""benchmarks/experiments/limited_view.py: what players see of each other, and walls."""

import re
from collections import deque

import pytest
import torch

import hop_onestep
from conftest import SMALL, load_script
from run_tools import (
    assert_same_run,
    broken_run,
    generator_of,
    parsed,
    refused,
    run,
    shake,
    weights_of,
)

script = load_script("limited_view")


SAME = [  # one learner a game, which stays: then the planner draws the same numbers
    dict(env_id="msg-4x4", co_players="cleaner,exploiter,random"),
    dict(env_id="msg-4x4", co_players="cleaner,exploiter,random", goal="oracle"),
    dict(env_id="msh-4x4-4h1s", plan_update="none"),
]


@pytest.mark.parametrize("options", SAME)
def test_who_sees_all_is_the_base_script(options):
    """The same actions and losses from the same seed, all seen or a view that covers the world."""
    options = {**SMALL, **options, "total_timesteps": 384, "num_envs": 8, "num_steps": 24}
    base = run(load_script("hop_onestep"), hop_onestep.Args(**options))
    del base.metrics["charts/SPS"]
    for view in (0, 3):
        same = run(script, script.Args(**options, view=view))
        del same.metrics["charts/SPS"]
        assert same.metrics == pytest.approx(base.metrics, abs=1e-4)
        for network, weights in weights_of(script, same.path).items():
            torch.testing.assert_close(weights, weights_of(script, base.path)[network])


def lively(env_id, view, batch, **options):
    """A game, a Player with networks that say something, and co-players of all kinds."""
    options = {**SMALL, **options, "num_envs": batch, "total_timesteps": 10**6}
    args = script.Args(**options, env_id=env_id, view=view)
    game = script.make_game(args, "cpu")
    agent = shake(script.Agent(game, script.checked(args, game)))
    pool = ["self", *game.kinds]
    players = script.CoPlayers(game, pool, batch, args.match_episodes, generator_of(1))
    players.agents[0] = script.Player(agent, batch)
    return game, players.agents[0], players, script.MatchBuffer(game, agent.args)


@torch.no_grad()
def steps_of(game, player, players, buffer, state, count):
    """Plays, and yields of every step what was before it, and what was played."""
    for _ in range(count):
        memory = player.memory.clone()
        actions = players.act(state, game.action_mask(state))
        after, reward, *ends = game.step(state, actions)
        reached = game.reached(state, actions, after)
        step = {**player.decision, "action": actions, "reward": reward, "reached": reached}
        ended = (ends[0] | ends[1]).all(1)
        match_ended = players.advance(ended)
        buffer.add(state, step, ended, match_ended)
        yield {**step, "state": state, "memory": memory, "seen": player.seen, "sees": player.sees}
        state = game.restart(after, ended, generator_of(buffer.now))


@pytest.mark.parametrize("view", [1, 2])
def test_a_view_is_a_square_window(view):
    game = script.GridGame("msh-4x5-3p-2h1s", view=view)
    state = game.start(200, generator_of(0))
    players = state.players.masked_fill(torch.rand(200, 3, generator=generator_of(1)) < 0.2, -1)
    state = state._replace(players=players)
    seen = script.views_of(game, state)
    assert torch.equal(seen.time, state.time.repeat_interleave(3))
    for b in range(200):
        for i, here in enumerate(players[b].tolist()):
            pairs = [(players[b], seen.players[3 * b + i]), (state.items[b], seen.items[3 * b + i])]
            for true, got in pairs:
                near = [c for c in range(20) if abs(c // 5 - here // 5) <= view]
                near = [c for c in near if here >= 0 and abs(c % 5 - here % 5) <= view]
                assert got.tolist() == [c if c in near else -1 for c in true.tolist()]


@torch.no_grad()
@pytest.mark.parametrize("env_id", ["msh-4x5-4h2s-3w", "msg-4x5-3p"])
def test_what_is_out_of_view_changes_nothing(env_id):
    """Neither what an observer knows and does, nor what it remembers; and no seat is special."""
    game, player, players, buffer = lively(env_id, 1, 60, plan_update="offset")
    player.agent.plan_slope.fill_(1.0)
    n = game.num_players
    *_, last = steps_of(game, player, players, buffer, game.start(60, generator_of(2)), 5)
    state = last["state"]
    for i in range(n):
        views = game.seen_by(state, torch.full((60,), i))
        turned = [(k + i) % n for k in range(n)]  # new seat k is old seat turned[k]
        known = []
        for world, order in ((state, [*range(n)]), (views, [*range(n)]), (views, turned)):
            world = world._replace(players=world.players[:, order])
            mine = order.index(i)
            player.memory = last["memory"][:, order][:, :, order]
            players.generator.manual_seed(3)
            seats = torch.eye(n).bool()[mine].expand(60, -1)
            chosen = player.act(world, game.action_mask(world), seats, players)
            unlike = world.players % 5  # what is played out of view
            actions = torch.where(player.sees[:, mine], last["action"][:, order], unlike)
            player.remember(actions)
            others = [(mine + k) % n for k in range(n)]
            known.append([chosen[name][:, mine] for name in "own others goal value prior".split()])
            known[-1] += [player.memory[:, mine, others], player.seen_actions(actions)[:, mine]]
            known[-1] += [chosen["q_plan"][:, mine]] if order[0] == 0 else []  # by other draws
        assert not torch.equal(state.players, views.players)
        assert known[0][-1].std() > 0.01
        for values in known[1:]:
            for value, expected in zip(values, known[0]):
                torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_read_match_is_what_its_observer_saw(monkeypatch):
    """Features, who is seen, subgoals by a loop, and sums of features as in the player's memory;
    any observer of any game is drawn."""
    game, player, players, buffer = lively("msg-4x4-3p-5d", 1, 6)
    steps = [*steps_of(game, player, players, buffer, game.start(6, generator_of(2)), 90)]
    number, observer = torch.arange(12) % 6, torch.arange(12) % 3
    batch = buffer.read(number, observer, torch.zeros(12).long())
    feature = player.agent.moa.step_features(*map(batch.get, "own views action active".split()))
    before = feature.cumsum(1) - feature
    within = before - before.take_along_dim(batch["first"][..., None], 1)
    memory = torch.stack([before, within], 3)
    episodes = buffer.ring["episode"].T.tolist()  # by game and step
    found = 0
    for r, (b, i) in enumerate(zip(number.tolist(), observer.tolist())):
        length = int((buffer.ring["match"][:90, b] == 0).sum())
        assert not batch["active"][r, length:].any()
        for t in range(length):
            state = script.GridState(*(field[b, None] for field in steps[t]["state"]))
            view = game.seen_by(state, observer[r, None])
            own, views = game.features(view)
            assert torch.equal(batch["own"][r, t], own[0])
            assert torch.equal(batch["views"][r, t], views[0])
            assert torch.equal(batch["active"][r, t], steps[t]["sees"][b, i])
            kept = steps[t]["memory"][b, i]
            torch.testing.assert_close(memory[r, t], kept, atol=1e-4, rtol=1e-4)
            later = [s for s in range(t, length) if episodes[b][s] == episodes[b][t]]
            for j in range(3):
                taken = [int(steps[s]["reached"][b, j]) for s in later if steps[s]["sees"][b, i, j]]
                item = next((m for m in taken if m >= 0), -1)
                item = item if view.items[0, item] >= 0 else -1
                assert batch["subgoal"][r, t, j] == item
                found += item >= 0
    assert found > 50
    monkeypatch.setattr(buffer, "read", lambda number, observer, start: 3 * number + observer)
    counts = buffer.sample(18000, generator_of(0)).bincount(minlength=18)
    assert len(counts) == 18 and (counts - 1000).abs().max() < 150


def paths(game, cell):
    """Lengths of the shortest paths from a cell, by breadth first."""
    found, queue = {cell: 0}, deque([cell])
    while queue:
        here = queue.popleft()
        row, col = divmod(here, game.width)
        for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
            there = r * game.width + c
            if 0 <= r < game.height and 0 <= c < game.width and there not in {*game.walls, *found}:
                found[there] = found[here] + 1
                queue.append(there)
    return found


@pytest.mark.parametrize("env_id", ["msh-2x2-1h1s-2w", "msg-5x7-20w", "msh-8w", "msh-9x3-4h1s-12w"])
def test_walls_of_an_id(env_id):
    """Always the same, no free cell cut off, ways are the shortest; nothing is on a wall."""
    game = script.GridGame(env_id)
    count = int(re.search("([0-9]+)w", env_id)[1])
    assert game.walls == script.GridGame(env_id).walls
    assert len(set(game.walls)) == count
    free = game.free.tolist()
    assert set(free) == {*range(game.num_cells)} - {*game.walls}
    for cell in free:
        lengths = paths(game, cell)
        assert game.distance[cell, free].tolist() == [lengths[there] for there in free]
    state = game.start(2000, generator_of(0))
    assert set(state.players.flatten().tolist()) == set(state.items.flatten().tolist()) == set(free)


def test_a_scene_with_walls(monkeypatch):
    """. P # h    The hare h is two cells off and six moves away. The other one, three cells below
    . . # .    P, is nearer. A move into a wall is illegal and counts as STAY."""
    monkeypatch.setattr(script, "wall_cells", lambda *sizes: [2, 6])
    game = script.GridGame("msh-4x4-2p-2h1s-2w")
    time = torch.zeros(1).long()
    state = script.GridState(torch.tensor([[1, 5]]), torch.tensor([[15, 3, 13]]), time, time)
    moves = [[0, 1, 1, 0, 1], [1, 1, 1, 0, 1]]
    assert game.action_mask(state)[0, :, :5].int().tolist() == moves
    after, *_ = game.step(state, torch.tensor([[3, 3]]))
    assert torch.equal(after.players, state.players)
    assert game.distance[1, [3, 13, 0, 7]].tolist() == [6, 3, 1, 5]
    relative = game.relative[1, 3]
    assert relative[8:13].tolist() == [0, 2 / 4, 0, 2 / 4, 6 / 4]  # offsets, and the way
    first = relative[13:].unflatten(0, (4, 2))[:, 0] > 0
    assert first.tolist() == [False, True, False, False]  # down, round the wall
    kind = torch.tensor([[1, 1]])  # nh
    told = (game.action_mask(state), kind, kind == 0, kind - 2, generator_of(0))
    assert game.scripted_actions(state, *told)[1].tolist() == [[2, 2]]
    state = state._replace(players=torch.tensor([[1, -1]]), items=torch.tensor([[15, 3, -1]]))
    for t in range(7):
        told = (game.action_mask(state), kind, kind == 0, kind - 2, generator_of(t))
        actions, _ = game.scripted_actions(state, *told)
        assert (int(actions[0, 0]) == 6) == (t == 6)
        state, reward, *_ = game.step(state, actions)
    assert reward[0, 0] == 1.0


REFUSED = {  # what is typed, and what the message names
    "--view -1": "--view",
    "--view 1 --env-id mpe2.simple_v3": "--view",
    "--env-id msh-0w": "msh-0w",
    "--env-id msh-8w-4h1s": "msh-8w-4h1s",
    "--env-id msh-2x2-1h1s-3w": "or an item",
    "--env-id msg-3x3-9w": "or an item",
}


@pytest.mark.parametrize("words", REFUSED)
def test_refused_in_one_line(words, monkeypatch, capsys):
    assert REFUSED[words] in refused(script, monkeypatch, capsys, *words.split())


def test_a_run_goes_on_and_is_played():
    """Resumed bit for bit, started from, evaluated with another view, filmed."""
    options = {**SMALL, "env_id": "msh-4x4-4h1s-4w", "view": 1, "checkpoint_every": 1}
    args = script.Args(**options, co_players="self,ns,nh", plan_update="offset")
    whole = run(script, args).path
    part = broken_run(script, args, 2)
    assert run(script, parsed(script, "--resume", part)).path == part
    assert_same_run(script, whole, part)
    words = ["--init", whole, "--co-players", "nh", "--total-timesteps", 200]
    assert run(script, parsed(script, *words)).metrics
    script.record_video(str(whole), "nh", 2)
    assert (whole / "episode.gif").exists()
    views = [parsed(script, "--evaluate", whole, *w).view for w in ([], ["--view", 3])]
    assert views == [1, 3] and "view" in script.EVALUATED
    returns = [script.evaluate(str(whole), "ns", episodes=40, view=v) for v in (1, 3)]
    assert returns[0]["focal_returns"] != returns[1]["focal_returns"]
    with pytest.raises(hop_onestep.UsageError, match="limited_view.py alone"):
        hop_onestep.load_player(str(whole), hop_onestep.GridGame("msh-4x4-4h1s"), 2)
