"""The latent world model: its loss terms, targets, planner, data sets, offline training and diagnostics."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from siblings.conftest import shake
from siblings.test_planner import decisions, joint_actions, situations, some_goals

GAMMA = 0.9
GAMES = ["msh-3x3-3p-2h1s", "msh-2x3-4p-2h2s", "msg-2x3-3p-3d"]


def steps_of(script, env_id, batch=40, steps=8, seed=0):
    """Transitions [G, ..] of players that like to interact, with ends, leaves and truncations, each as STORED."""
    game, state = situations(script, env_id, batch=batch, steps=steps, seed=seed)
    actions = joint_actions(script, game, state, 1, seed=seed)[:, 0]
    after, reward, terminated, truncated = game.step(state, actions)
    return game, script.transition_of(state, actions, reward, after, terminated), truncated


def model_of(script, lively, env_id, **options):
    agent = lively(env_id=env_id, gamma=GAMMA, **options)
    return agent, agent.model


# ---------------------------------------------------------------------------------------------------------------------
# Loss terms and targets
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def by_hand(script, agent, data, target):
    """The five sums of the loss over single rows of single players, and how many rows each has."""
    game, model, sums = (
        agent.game,
        agent.model,
        {name: [] for name in "observation reward value ahead consistency".split()},
    )
    (state, after), args = script.states_of(data), agent.args
    here = model.encode(state, *model.relative(state))
    there = model.encode(after, *model.relative(after))
    for g, i in itertools.product(range(len(state.time)), range(game.num_players)):
        if state.players[g, i] < 0:
            continue
        company = [(i + k) % game.num_players for k in range(1, game.num_players)]
        actions = data["actions"][g].long()
        zs, following = (script.Latent(*(token[g, i] for token in tokens)) for tokens in (here, there))
        predicted, reward_hat = model(zs, actions[i], actions[company])
        own, others, items = model.decode(predicted)
        done, left = bool(data["done"][g, i]), bool(after.players[g, i] < 0)
        square = (float(own[0]) - (not done)) ** 2
        if not left:
            row, column = divmod(int(after.players[g, i]), game.width)
            clock = [float(x) / game.horizon for x in game.clock(after)[g]]
            walls = [row / 4, (game.height - 1 - row) / 4, column / 4, (game.width - 1 - column) / 4]
            square += sum((float(a) - b) ** 2 for a, b in zip(own[1:], walls + clock, strict=True))
            cells = [int(after.players[g, j]) for j in company] + after.items[g].tolist()
            for shown, cell in zip([*others, *items], cells, strict=True):
                square += (float(shown[0]) - (cell >= 0)) ** 2
                if cell >= 0:
                    away = (cell // game.width - row) / 4, (cell % game.width - column) / 4
                    square += sum((float(a) - b) ** 2 for a, b in zip(shown[1:], away, strict=True))
            pairs = zip(predicted, following, strict=True)
            sums["consistency"].append(
                sum(
                    float((a - b).square().mean(-1).mean()) if a.dim() == 1 else float((a - b).square().mean())
                    for a, b in pairs
                )
            )
        sums["observation"].append(square)
        reward = float((1 - args.prosocial) * data["reward"][g, i] + args.prosocial * data["reward"][g].mean())
        sums["reward"].append((float(reward_hat) - reward * args.reward_scale) ** 2)
        if data["recent"][g]:
            next_value = float(model.value(following if target == "observed" else predicted))
            y = reward * args.reward_scale + (0.0 if done else GAMMA * next_value)
            sums["value"].append((float(model.value(zs)) - y) ** 2)
            ahead = 0.0 if done else (float(model.value(predicted)) - float(model.value(following))) ** 2
            sums["ahead"].append(ahead)
    return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("target", ["observed", "model"])
@pytest.mark.parametrize("env_id", GAMES)
def test_every_term_of_the_loss_by_hand(script, lively, env_id, target):
    """Observation, reward, value at the target chosen and ahead, consistency: row by row, player by player."""
    options = {"prosocial": 0.3, "reward_scale": 0.4, "td_target": target, "hidden_size": 16}
    agent, model = model_of(script, lively, env_id, **options)
    game, data, truncated = steps_of(script, env_id)
    here, left = data["players"] >= 0, data["next_players"] < 0
    generator = torch.Generator().manual_seed(0)
    data["recent"] = torch.rand(len(here), generator=generator) < 0.7
    assert (
        (data["done"] & ~left & here).sum() > 5
        and truncated.sum() > 5
        and not (truncated.unsqueeze(1) & ~left & data["done"]).any()
    )
    assert game.family == "msg" or ((here & left).sum() > 5 and (~here).sum() > 5)
    names = "observation_coef", "reward_coef", "value_coef", "consistency_coef"
    expected = by_hand(script, agent, data, target)
    total = 0.0
    for k, name in enumerate(names):
        weights = {other: 0.0 for other in names} | {name: 1.5 + k}
        loss, terms = script.model_loss(model, data, dataclasses.replace(agent.args, **weights))
        term = expected[name.removesuffix("_coef")] + (expected["ahead"] if name == "value_coef" else 0.0)
        assert float(terms[f"model/{name.removesuffix('_coef')}_loss"]) == pytest.approx(term, rel=1e-4)
        assert float(loss.detach()) == pytest.approx((1.5 + k) * term, rel=1e-4) and term > 1e-3
        total += float(loss.detach())
    loss, _ = script.model_loss(
        model, data, dataclasses.replace(agent.args, **{n: 1.5 + k for k, n in enumerate(names)})
    )
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)


def test_where_gradients_stop(script, lively):
    """The value's target and the value ahead are constants; nothing else is: both sides of the consistency learn."""
    agent, model = model_of(script, lively, "msh-3x3-3p-2h1s", td_target="observed")
    _, data, _ = steps_of(script, "msh-3x3-3p-2h1s")
    data["recent"] = torch.ones(len(data["time"]), dtype=torch.bool)
    seen, value = [], model.value
    model.value = lambda zs: seen.append((zs, value(zs))) or seen[-1][1]
    zero = dict.fromkeys(("observation_coef", "reward_coef", "consistency_coef"), 0.0)
    loss, _ = script.model_loss(model, data, dataclasses.replace(agent.args, **zero, value_coef=1.0))
    outputs = [v for _, v in seen]
    grads = torch.autograd.grad(loss, outputs, allow_unused=True)
    used = [g is not None and bool(g.any()) for g in grads]
    assert used.count(True) == 2 and used[0]  # V(zs) and V(f(zs, a_i, a_-i)); not V(enc(o'))
    model.value = value
    for name in ("observation_coef", "reward_coef", "value_coef", "consistency_coef"):
        alone = dict.fromkeys(("observation_coef", "reward_coef", "value_coef", "consistency_coef"), 0.0) | {name: 1.0}
        model.zero_grad()
        script.model_loss(model, data, dataclasses.replace(agent.args, **alone))[0].backward()
        assert all(any(p.grad is not None and p.grad.any() for p in e.parameters()) for e in model.encoders), name


@pytest.mark.parametrize("name", ["left", "everything"])
def test_rows_of_players_that_have_left_carry_nothing(script, lively, name):
    """Whatever is claimed of them changes no loss."""
    agent, model = model_of(script, lively, "msh-2x3-4p-2h2s")
    _, data, _ = steps_of(script, "msh-2x3-4p-2h2s")
    data["recent"] = torch.ones(len(data["time"]), dtype=torch.bool)
    change = data["players"] < 0 if name == "left" else torch.ones_like(data["done"])
    other = {**data, "reward": data["reward"] + 7.0 * change}
    terms = [script.model_loss(model, rows, agent.args)[1] for rows in (data, other)]
    assert change.sum() > 10
    for term in ("model/reward_loss", "model/value_loss", "model/observation_loss"):
        same = bool(terms[0][term] == terms[1][term])
        assert same == (name == "left" or term == "model/observation_loss"), term


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("env_id", GAMES)
@torch.no_grad()
def test_no_seat_is_special(script, lively, env_id):
    """Players relabelled: latents, predictions, rewards and values move with them."""
    agent, model = model_of(script, lively, env_id)
    game, data, _ = steps_of(script, env_id)
    (state, _), actions = script.states_of(data), data["actions"].long()
    order = torch.tensor([2, 0, 1] + list(range(3, game.num_players)))
    moved = state._replace(players=state.players[:, order])

    def outputs(state, actions):
        zs = model.encode(state, *model.relative(state))
        following, reward = model(zs, actions, actions[:, model.relative.others])
        return (
            reward,
            model.value(zs),
            model.value(following),
            model.goes_on(following),
            following.own,
            model.decode(following).items,
        )

    for a, b in zip(outputs(state, actions), outputs(moved, actions[:, order]), strict=True):
        torch.testing.assert_close(a[:, order], b, rtol=1e-4, atol=1e-5)
        assert a.std() > 1e-3


@torch.no_grad()
def test_dynamics_read_every_action(script, lively):
    """zs' and reward depend on the own action and on every co-player's."""
    agent, model = model_of(script, lively, "msh-3x3-4p-2h1s")
    game, state = situations(script, "msh-3x3-4p-2h1s")
    state = state.rows((state.players >= 0).all(1))
    zs, actions = model.encode(state, *model.relative(state)), joint_actions(script, game, state, 1)[:, 0]
    plain = model(zs, actions, actions[:, model.relative.others])
    for k in range(4):
        company = actions[:, model.relative.others].clone()
        own = (actions + 1) % 7 if k == 3 else actions
        if k < 3:
            company[..., k] = (company[..., k] + 1) % 7
        following, reward = model(zs, own, company)
        assert ((reward - plain[1]).abs() > 1e-5).float().mean() > 0.9
        for a, b in zip(following, plain[0], strict=True):
            assert ((a - b).abs().flatten(2).sum(2) > 1e-5).float().mean() > 0.9


@pytest.mark.parametrize("env_id", GAMES)
def test_view_and_cells_are_inverse(script, lively, env_id):
    """What the decoder is asked for tells every cell and the clock: read back, it is the state."""
    agent, model = model_of(script, lively, env_id)
    game, data, _ = steps_of(script, env_id)
    state, after = script.states_of(data)
    view = model.view(after, ~data["done"])
    players, items = model.cells(view)
    expected = script.in_view(agent, after.players, after.items)
    stays = after.players >= 0
    assert torch.equal(torch.cat([players, items], 2)[stays], expected[stays]) and stays.sum() > 50
    agent.model.decode = lambda flat: script.View(*(part[stays] for part in view))
    shown = agent.decoded(None)
    rows = stays.nonzero()[:, 0]
    assert torch.equal(shown.time, after.time[rows]) and torch.equal(shown.items, after.items[rows])
    assert torch.equal(game.clock(shown), game.clock(after.rows(rows)))
    assert torch.equal(shown.players, expected[stays][:, : game.num_players])


# ---------------------------------------------------------------------------------------------------------------------
# Planner
# ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def plain_scores(agent, state, joint, games, seats):
    """float32 [D, A]: each decision, own action and sampled joint action by itself."""
    model, n = agent.model, agent.game.num_players
    scores, mask = torch.zeros(len(games), agent.game.num_actions), agent.game.action_mask(state)
    tokens = model.encode(state, *agent.relative(state))
    for d, (b, i) in enumerate(zip(games.tolist(), seats.tolist(), strict=True)):
        company, zs = [(i + k) % n for k in range(1, n)], tokens.at(b, i)
        for action in mask[b, i].nonzero().flatten().tolist():
            for played in joint[b]:
                following, reward = model(zs, torch.tensor(action), played[company])
                flag = float(model.decode(following).own[0])
                value = float(model.value(following)) * min(max(flag, 0.0), 1.0)
                scores[d, action] += (float(reward) + GAMMA * value) / len(joint[b])
    return scores


def scores_of(script, agent, state, joint, games, seats, goal=None):
    mask, generator = agent.game.action_mask(state), torch.Generator().manual_seed(0)
    goal = some_goals(agent, state) if goal is None else goal
    with torch.no_grad():
        tokens = agent.model.encode(state, *agent.relative(state))
        return agent.score_latent(tokens, mask, goal, joint, games, seats, generator)


@pytest.mark.parametrize("env_id", GAMES)
def test_scores_equal_a_plain_loop_over_the_model(script, lively, env_id):
    agent, _ = model_of(script, lively, env_id)
    game, state = situations(script, env_id, batch=5)
    joint, (games, seats) = joint_actions(script, game, state, 3), decisions(game, state)
    scores, expected = (
        scores_of(script, agent, state, joint, games, seats),
        plain_scores(agent, state, joint, games, seats),
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    mask = game.action_mask(state)[games, seats]
    best = expected.masked_fill(~mask, -math.inf).argmax(1)
    assert torch.equal(scores.masked_fill(~mask, -math.inf).argmax(1), best) and expected[mask].std() > 0.05
    few = torch.arange(0, len(games), 3)  # whatever else is in the batch
    torch.testing.assert_close(
        scores_of(script, agent, state, joint, games[few], seats[few]), scores[few], rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_two_steps_ahead_by_a_plain_loop(script, lively):
    """Depth 2: the latent rolls on, co-players act in what it shows, and the best legal own action counts."""
    agent, model = model_of(script, lively, "msh-3x3-3p-2h1s", plan_depth=2)
    shake(model, 3)
    game, state = situations(script, "msh-3x3-3p-2h1s", batch=2)
    joint, (games, seats) = joint_actions(script, game, state, 2), decisions(game, state)
    agent.moa.decoder.forward = lambda own, *_: (own[..., :7] * 0).index_fill(-1, torch.tensor([4]), 1e6)  # all STAY
    scores, mask = scores_of(script, agent, state, joint, games, seats), game.action_mask(state)
    expected, tokens, counts = torch.zeros_like(scores), model.encode(state, *agent.relative(state)), set()
    for d, (b, i) in enumerate(zip(games.tolist(), seats.tolist(), strict=True)):
        company = [(i + k) % 3 for k in range(1, 3)]
        for action in mask[b, i].nonzero().flatten().tolist():
            for played in joint[b]:
                following, reward = model(tokens.at(b, i), torch.tensor(action), played[company])
                shown = agent.decoded(script.Latent(*(token.unsqueeze(0) for token in following)))
                legal = game.action_mask(shown)[0, 0].nonzero().flatten().tolist()
                counts.add(len(legal))
                best = -math.inf
                for own in legal:
                    last, more = model(following, torch.tensor(own), torch.tensor([4, 4]))
                    best = max(best, float(more) + GAMMA * float(model.goes_on(last) * model.value(last)))
                scores_here = float(reward) + GAMMA * float(model.goes_on(following)) * best
                expected[d, action] += scores_here / 2
    torch.testing.assert_close(scores, expected, rtol=1e-3, atol=1e-4)
    assert len(counts) > 1


def test_greedy_plays_the_best_score(script, lively):
    """--plan-greedy is the argmax; without, --plan-beta makes it soft."""
    for greedy in (True, False):
        agent = lively(env_id="msh-3x3-3p-2h1s", plan_update="hop", plan_greedy=greedy)
        agent.plan_slope.fill_(1.0)
        game, state = situations(script, "msh-3x3-3p-2h1s", batch=30)
        mask, everyone = game.action_mask(state), torch.ones_like(state.players, dtype=torch.bool)
        memory = agent.moa.initial_memory(len(mask))
        d = agent.act(state, mask, memory, everyone, torch.Generator().manual_seed(0), None)
        best = d.q_plan.masked_fill(~mask, -math.inf).argmax(2)
        free = (mask.sum(2) > 1) & (state.players >= 0)
        assert (d.action == best)[free].all() == greedy


@pytest.mark.parametrize("rule", ["ns", "nh", "random"])
def test_co_players_by_a_rule(script, lively, rule):
    """--plan-company: the sampled actions are that kind's, and the MOA is not asked."""
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_company=rule)
    game, state = situations(script, "msh-3x3-3p-2h1s", batch=10)
    mask, generator = game.action_mask(state), torch.Generator().manual_seed(0)
    joint = agent.rule_actions(state, mask, 400, generator)
    assert (
        joint.shape == (len(mask), 400, 3)
        and mask.unsqueeze(1).expand(-1, 400, -1, -1).gather(3, joint.unsqueeze(3)).all()
    )
    kind = torch.full_like(state.players, script.SCRIPTED.index(rule))
    blank, share = torch.full_like(kind, -1), torch.nn.functional.one_hot(joint, 7).float().mean(1)
    counts = torch.zeros_like(share)
    for _ in range(400):
        drawn, _ = script.scripted_actions(game, state, mask, kind, kind < 0, blank, generator)
        counts += torch.nn.functional.one_hot(drawn, 7) / 400
    assert (counts - share).abs().max() < 0.17 and share.max() > 0.4
    agent.sample_joint_actions = None
    agent.act(state, mask, agent.moa.initial_memory(len(mask)), torch.ones_like(mask[..., 0]), generator, None)


def test_planning_steps_no_game(script, lively, monkeypatch):
    agent = lively(env_id="msh-3x3-3p-2h1s", plan_depth=2)
    game, state = situations(script, "msh-3x3-3p-2h1s", batch=4)
    monkeypatch.setattr(script.GridGame, "step", None)
    mask = game.action_mask(state)
    everyone, generator = torch.ones_like(mask[..., 0]), torch.Generator().manual_seed(0)
    assert agent.act(state, mask, agent.moa.initial_memory(len(mask)), everyone, generator, None).q_plan.any()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("options", [{"env_id": "msg-3x3-1p-2d"}, {"hidden_size": 1}, {"hidden_size": 17}])
def test_a_player_alone_and_odd_sizes(script, small, options):
    """Without co-players, and whatever the width: the model learns, and every figure is finite."""
    trainer = script.Trainer(small(plan_update="offset", plan_until=1.0, **options))
    before = [p.clone() for p in trainer.agent.model.parameters()]
    for _ in range(2):
        metrics = trainer.iterate()
        assert all(math.isfinite(value) for value in metrics.values()) and metrics["model/consistency_loss"] > 0
    changed = [not torch.equal(a, b) for a, b in zip(before, trainer.agent.model.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------
COLLECT = {"env_id": "msh-3x3-3p-2h1s", "num_envs": 4, "match_episodes": 2, "collect": 800, "seed": 3}


def collect(script, path, **options):
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.redirect_stderr(io.StringIO()):
        script.collect(script.Args(**{**COLLECT, "dataset": str(path), **options}))
    return printed.getvalue()


@pytest.fixture(scope="module")
def dataset(script, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.npz"
    collect(script, path, co_players="ns,nh,random")
    return path


def test_a_data_set_holds_the_games_that_were_played(script, dataset):
    """Every step follows the rules and the step before; kinds play as they do; each is at every seat."""
    game = script.GridGame(COLLECT["env_id"])
    header, data = script.load_dataset(dataset, game)
    assert data["time"].shape == (200, 4) and header["kinds"][1:] == ["ns", "nh", "random"] and header["seed"] == 3
    assert set(np.load(dataset, allow_pickle=False)) == {*script.STORED, "header"}
    ended, before = torch.zeros(4, dtype=torch.bool), None
    for t in range(200):
        state, after = script.states_of({name: value[t] for name, value in data.items()})
        played, reward, terminated, truncated = game.step(state, data["actions"][t].long())
        for a, b in zip(played, after, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(reward, data["reward"][t])
        assert torch.equal(data["done"][t], terminated.unsqueeze(1) | (after.players < 0))
        assert (state.time[ended] == 0).all()
        if t:
            going = ~ended
            assert all(torch.equal(a[going], b[going]) for a, b in zip(state, before, strict=True))
        ended, before = terminated | truncated, after
        assert not (data["match_ended"][t] & ~ended).any() and (data["episode"][t] <= 1).all()
        hunts = (data["actions"][t] == 6) & (state.players >= 0)
        assert not hunts[data["kind"][t] == 1].any() or (state.items[:, 0] < 0).any()
    for kind in (1, 2, 3):
        assert (data["kind"] == kind).any(0).any(0).all() and not (data["kind"] == 0).any()
    assert dataset.stat().st_size < 800 * 3 * 20


def test_round_trip(script, dataset, tmp_path):
    game = script.GridGame(COLLECT["env_id"])
    header, data = script.load_dataset(dataset, game)
    script.save_dataset(tmp_path / "again.npz", header, data)
    again, copy = script.load_dataset(tmp_path / "again.npz", game)
    assert again == header and all(torch.equal(data[name], copy[name]) for name in data) and list(copy) == list(data)
    assert [path.name for path in tmp_path.iterdir()] == ["again.npz"]
    for env_id in (*GAMES, "msg-3x3-1p-2d"):
        collect(script, tmp_path / "more.npz", env_id=env_id, num_envs=7, match_episodes=3, collect=1400)
        header, data = script.load_dataset(tmp_path / "more.npz", script.GridGame(env_id))
        assert header["match_episodes"] == 3 and data["match_ended"].any() and data["time"].shape == (200, 7)


def test_collecting_is_determined_by_its_seed_and_tells_what_it_covers(script, dataset, tmp_path):
    game = script.GridGame(COLLECT["env_id"])
    printed = collect(script, tmp_path / "a.npz", co_players="ns,nh,random")
    assert "2,400 transitions" in printed and "data/ns" in printed
    collect(script, tmp_path / "b.npz", co_players="ns,nh,random", seed=4)
    first, same, other = (
        script.load_dataset(path, game)[1] for path in (dataset, tmp_path / "a.npz", tmp_path / "b.npz")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["actions"], other["actions"])
    covered = script.coverage({"kinds": ["self", "ns", "nh", "random"]}, first, game)
    here = first["players"] >= 0
    assert covered["data/nh"] == pytest.approx(int((first["kind"][here] == 2).sum()) / int(here.sum()))
    assert covered["data/rewarded"] == pytest.approx(int((first["reward"][here] > 0).sum()) / int(here.sum()))
    assert sum(covered[f"data/{name}"] for name in ("ns", "nh", "random")) == pytest.approx(1.0, abs=1e-5)
    assert sum(covered[f"data/{name}"] for name in game.action_names) == pytest.approx(1.0, abs=1e-5)


def test_files_that_do_not_fit(script, dataset, tmp_path, monkeypatch, capsys):
    """Damaged, mismatched or foreign: one line, status 2, nothing written."""
    whole, arrays = dataset.read_bytes(), dict(np.load(dataset))
    header = json.loads(str(arrays["header"]))

    def variant(name, **changed):
        np.savez(tmp_path / f"{name}.npz", **{k: v for k, v in {**arrays, **changed}.items() if v is not None})

    for name, data in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"a,b\n"}.items():
        (tmp_path / f"{name}.npz").write_bytes(data)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    variant("lacks", done=None)
    variant("pickle", header=np.array({"a": 1}, dtype=object))
    variant("format", header=np.array(json.dumps({**header, "format": "other"})))
    variant("bare", header=np.array("{}"))
    variant("game", header=np.array(json.dumps({**header, "game": "msh-4x4-4p-4h1s"})))
    variant("games", header=np.array(json.dumps({**header, "num_envs": 5})))
    variant("wide", players=arrays["players"].astype(np.int64))
    variant("shape", reward=arrays["reward"][:, :, :2])
    variant("short", **{name: arrays[name][:5] for name in script.STORED})
    variant("length", time=arrays["time"][:-1])
    for name, value in {"actions": 7, "players": 9, "items": -2, "reward": np.nan, "kind": 9, "time": 36}.items():
        bad = arrays[name].copy()
        bad.flat[7] = value
        variant(f"bad_{name}", **{name: bad})
    entries = {"time": (-1, 20, 35), "first_hunt": (-1, 1, 35), "next_first_hunt": (-1, 36), "episode": (-1, 1, 2)}
    for name, value in ((name, value) for name, values in {**entries, "match_ended": (1,)}.items() for value in values):
        bad = arrays[name].copy()
        bad.flat[7] = value
        variant(f"bad_{name}_{value}", **{name: bad})
    late = {name: arrays[name] + (arrays["time"] == 8) for name in ("first_hunt", "next_first_hunt")}
    variant("early_hunt", **{name: value.astype(np.int16) for name, value in late.items()})
    variant("no_ends", match_ended=np.zeros_like(arrays["match_ended"]))
    variant("long", match_ended=arrays["match_ended"] & False, episode=arrays["episode"] * 0)
    variant("more_episodes", header=np.array(json.dumps({**header, "match_episodes": 3})))
    for path in tmp_path.glob("*.npz"):
        with pytest.raises(script.UsageError):
            print(path, script.load_dataset(path, script.GridGame(COLLECT["env_id"]))[0])
    monkeypatch.chdir(tmp_path)
    words = ["--env-id", COLLECT["env_id"], "--num-envs", "4", "--match-episodes", "2", "--total-timesteps", "640"]
    before, cases = sorted(tmp_path.rglob("*")), [[str(path)] for path in tmp_path.glob("*.npz")] + [["nowhere.npz"]]
    cases += [[str(dataset), *more] for more in (["--goal", "oracle"], ["--plan-update", "none"], ["--num-envs", "8"])]
    cases += [[str(dataset), *more] for more in (["--match-episodes", "3"], ["--env-id", "msh-3x3-3p-3h1s"])]
    cases += [[str(dataset), *more] for more in (["--pretrain-moa-steps", "64"], ["--plan-company", "moa-noisy"])]
    cases += [[str(dataset), "--co-players", names] for names in ("ns,nh,ns", "nobody")]  # for afterwards
    for case in cases:
        monkeypatch.setattr("sys.argv", ["latent_world_model.py", *words, "--offline", *case])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.count("latent_world_model.py: error: ") == 1, (case, error)
        assert len(error.splitlines()[-1]) > 40
    assert sorted(tmp_path.rglob("*")) == before and len(cases) > 20
    for case in (
        ["--collect", "99"],
        ["--collect", "99", "--dataset", "no/where.npz"],
        ["--collect", "9", "--dataset", "."],
        ["--total-timesteps", "4096", "--dataset", str(dataset)],
    ):
        monkeypatch.setattr("sys.argv", ["latent_world_model.py", *case])
        with pytest.raises(SystemExit):
            script.main()
        assert "dataset" in capsys.readouterr().err
    callables = {"co_players": "ns,builtins:len"}, {"co_players": "builtins:len", "env_id": "msg-3x3-1p-2d"}
    for options in ({"co_players": "self,ns"}, {"co_players": "cleaner"}, *callables):
        with pytest.raises(script.UsageError):
            collect(script, tmp_path / "no.npz", **options)
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Replay
# ---------------------------------------------------------------------------------------------------------------------
def test_the_replay_holds_the_last_steps_and_the_surprising_ones(script, small):
    """What was played is what is stored; the newest steps stay, and those whose rewards were predicted worst."""
    options = {"env_id": "msh-3x3-3p-2h1s", "co_players": "nh,ns", "replay_size": 90, "replay_surprising": 20}
    trainer = script.Trainer(small(**options, model_updates=1, total_timesteps=512))
    played, judge, errors = [], script.judge, []
    for _ in range(3):
        trainer.iterate()
        played += [{name: value.clone() for name, value in row.items()} for row in trainer.fresh]
        for row in trainer.fresh:
            state, after = script.states_of(row)
            stepped, reward, terminated, _ = trainer.game.step(state, row["actions"].long())
            assert all(torch.equal(a, b) for a, b in zip(stepped, after, strict=True))
            assert torch.equal(reward, row["reward"])
            assert torch.equal(row["done"], terminated.unsqueeze(1) | (after.players < 0))
    whole = {name: torch.cat([row[name] for row in played]) for name in script.LEARNT_FROM}
    assert len(whole["time"]) == 192
    for name in script.LEARNT_FROM:
        assert torch.equal(trainer.recent[name], whole[name][-90:]) and len(trainer.surprising[name]) == 20
    # each new step with a chance in proportion to its squared error, by a model that errs on rewarded steps alone
    fresh = {name: value[:100] for name, value in whole.items()}
    paid = torch.arange(100) < 15
    script.judge = lambda *_: errors.append(1) or {"error": torch.where(paid, 25.0, 1e-6)}
    try:
        trainer.surprising = {}
        trainer.update_model({**fresh, "time": torch.arange(100).short() % 30})
    finally:
        script.judge = judge
    kept = (trainer.surprising["players"].unsqueeze(1) == fresh["players"][:15]).all(2).any(1)
    assert errors and kept.sum() >= 15


# ---------------------------------------------------------------------------------------------------------------------
# Offline training and diagnostics
# ---------------------------------------------------------------------------------------------------------------------
OFFLINE = {"num_envs": 4, "match_episodes": 2, "num_steps": 16, "total_timesteps": 192, "hidden_size": 16}
OFFLINE |= {"env_id": COLLECT["env_id"], "moa_hidden_size": 8, "goal_size": 3, "moa_matches": 4, "model_updates": 4}


def test_offline_training_steps_no_game_and_resumes(script, dataset, tmp_path, monkeypatch):
    """From the file alone, to a checkpoint that plays; a run that goes on from a checkpoint ends the same."""
    options = {**OFFLINE, "offline": str(dataset), "checkpoint_every": 2}
    with monkeypatch.context() as patch, contextlib.chdir(tmp_path), contextlib.redirect_stderr(io.StringIO()):
        patch.setattr(script.GridGame, "step", None)
        metrics = script.train(script.Args(**options))
        content = script.load_checkpoint(metrics["run"])
        first = script.Trainer(script.resolved(script.Args(**options)))
        first.iterate()
        kept = {"content": io.BytesIO()}
        torch.save(first.content(), kept["content"])
        kept["content"].seek(0)
        second = script.Trainer(script.resolved(script.Args(**options)))
        second.load(torch.load(kept["content"], weights_only=True))
        for _ in range(2):
            second.iterate()
    for name, value in second.agent.state_dict().items():
        assert torch.equal(value, content["agent"][name]), name
    begun = script.Trainer(script.resolved(script.Args(**options))).agent
    changed = {k.split(".")[0] for k, v in begun.state_dict().items() if not torch.equal(v, content["agent"][k])}
    assert changed == {"model", "moa", "plan_rms", *(() if begun.plan_slope == 1 else ("plan_slope",))}
    for name in ("model/loss", "moa/nll", "data/ns", "data/cells_visited", "held_out/cells", "held_out/reward_error"):
        assert math.isfinite(metrics[name])
    result = script.evaluate(tmp_path / metrics["run"], "ns", episodes=4)
    assert math.isfinite(result["focal_return"])


def test_offline_data_without_a_whole_match_are_refused(script, tmp_path):
    """The MOA would have nothing to learn from."""
    collect(script, tmp_path / "short.npz", co_players="random", match_episodes=50, collect=100)
    options = {**OFFLINE, "match_episodes": 50, "offline": str(tmp_path / "short.npz")}
    with pytest.raises(script.UsageError, match="no match ends"):
        script.Trainer(script.resolved(script.Args(**options)))
    script.Trainer(script.resolved(script.Args(**options, freeze_moa=True)))


def test_held_out_steps_are_not_learnt_from(script, dataset):
    trainer = script.Trainer(script.resolved(script.Args(**OFFLINE, offline=str(dataset))))
    _, data = script.load_dataset(dataset, trainer.game)
    trainer.iterate()
    assert len(trainer.recent["time"]) == 180 * 4 and len(trainer.held_out["time"]) == 20
    assert torch.equal(trainer.recent["players"], data["players"][:180].flatten(0, 1))
    assert torch.equal(trainer.held_out["players"], data["players"][180:])
    assert len(trainer.buffer) == int(data["match_ended"][:180].sum()) > 5
    batch = trainer.buffer.batch_of(4 + torch.arange(len(trainer.buffer)), trainer.agent.relative)
    assert int(batch.active.sum()) > 200 and (batch.start <= 70).all()


def test_command_line_of_offline_training(script, dataset, tmp_path, monkeypatch, capsys):
    """Trains, plays with the co-players named, judges the model and draws a picture of a prediction."""
    monkeypatch.chdir(tmp_path)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OFFLINE.items()]
    words += ["--offline", str(dataset), "--co-players", "ns", "--eval-episodes", "8"]
    monkeypatch.setattr("sys.argv", ["latent_world_model.py", *words])
    script.main()
    printed = capsys.readouterr().out
    assert "focal return" in printed and "with ns" in printed and "held_out/five_steps_cells" in printed
    (run,) = tmp_path.glob("runs/*")
    picture = np.array(Image.open(run / "prediction.png"))
    third = picture.shape[1] // 3
    frames = picture[:, :third], picture[:, third : 2 * third], picture[:, 2 * third :]
    assert (frames[0] != frames[1]).any() and (frames[1] != frames[2]).any()
    (run / "prediction.png").unlink()
    words = ["--evaluate", str(run), "--dataset", str(dataset), "--co-players", "nh", "--capture-video"]
    monkeypatch.setattr("sys.argv", ["latent_world_model.py", *words])
    script.main()
    assert "held_out/cells" in capsys.readouterr().out and (run / "prediction.png").is_file()


def test_offline_training_that_is_stopped_is_not_played(script, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    update = script.Trainer.iterate_offline
    stop = lambda trainer: (os.kill(os.getpid(), signal.SIGINT), update(trainer))[1]  # noqa: E731
    monkeypatch.setattr(script.Trainer, "iterate_offline", stop)
    monkeypatch.setattr(script, "evaluate", None)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in OFFLINE.items()]
    words += ["--eval-episodes=8", f"--offline={dataset}"]
    monkeypatch.setattr("sys.argv", ["latent_world_model.py", *words])
    script.main()
    assert "stopped at step 64" in capsys.readouterr().out
    monkeypatch.undo()  # and goes on
    (run,) = tmp_path.glob("runs/*")
    with contextlib.chdir(tmp_path), monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["latent_world_model.py", "--resume", str(run)])
        script.main()
    printed = capsys.readouterr().out
    assert "done at step 192" in printed and "with self" in printed


@torch.no_grad()
def test_figures_of_a_perfect_and_of_a_broken_model(script, lively, dataset):
    """`judge` of a model that knows the file by heart is perfect; each fault shows in its own figure."""
    agent, model = model_of(script, lively, COLLECT["env_id"], reward_scale=0.5)
    _, data = script.load_dataset(dataset, agent.game)
    flat = {name: data[name].flatten(0, 1) for name in script.LEARNT_FROM}
    state, after = script.states_of(flat)
    true = model.view(after, ~flat["done"]), script.learnt_reward(flat, agent.args)

    def figures(change=lambda view, reward: (view, reward)):
        view, reward = change(
            *(x if isinstance(x, torch.Tensor) else script.View(*(p.clone() for p in x)) for x in true)
        )
        parts = iter(torch.arange(len(reward)).split(1024))
        model.forward = lambda zs, *_: (here.append(next(parts)) or zs, reward[here[-1]])
        model.decode = lambda zs: script.View(*(part[here[-1]] for part in view))
        model.goes_on = lambda zs: view.own[here[-1]][..., 0]
        here = []
        return {k.removeprefix("model/"): float(v) for k, v in script.summary(script.judge(agent, flat)).items()}

    perfect = figures()
    assert perfect.pop("reward_error") == 0.0 and set(perfect.values()) == {1.0} and len(perfect) == 6
    here, paid = flat["players"] >= 0, (flat["reward"] != 0) & (flat["players"] >= 0)
    off = figures(lambda view, reward: (view, reward + 0.25))
    assert off["reward_error"] == pytest.approx(0.5) and off["cells"] == 1.0
    blind = figures(lambda view, reward: (view, reward * 0))
    assert blind["reward_recall"] == 0.0 and blind["no_reward_recall"] == 1.0
    assert blind["reward_error"] == pytest.approx(float(flat["reward"].abs()[here].mean()), rel=1e-4)

    def elsewhere(view, reward):
        view.others[:, 0, 0, 2] += 0.25  # the first co-player of seat 0, one column off
        return view, reward

    stays = here & (flat["next_players"] >= 0)
    shown, one = figures(elsewhere), agent.relative.others[0, 0]
    wrong = (stays[:, 0] & (flat["next_players"][:, one] >= 0)).sum()
    edge = (flat["next_players"][:, one] % 3 == 2) & stays[:, 0] & (flat["next_players"][:, one] >= 0)
    counted = (script.in_view(agent, state.players, state.items) >= 0) & stays.unsqueeze(2)
    assert shown["cells"] == pytest.approx(1 - float(wrong - edge.sum()) / float(counted.sum()), abs=1e-4)
    immortal = figures(lambda view, reward: (view._replace(own=view.own.index_fill(2, torch.tensor(0), 1.0)), reward))
    assert immortal["ends_recall"] == 0.0 and immortal["goes_on_recall"] == 1.0
    assert paid.any()


@torch.no_grad()
def test_value_figures(script, lively, dataset):
    """V against discounted returns by hand, of episodes that were seen to their end."""
    agent, model = model_of(script, lively, COLLECT["env_id"], reward_scale=0.5)
    _, data = script.load_dataset(dataset, agent.game)
    returns, last = {}, data["next_players"].shape[0] - 1
    for t, b, i in itertools.product(range(60), range(4), range(3)):
        total, k = 0.0, t
        if data["players"][t, b, i] < 0:
            continue
        while True:
            total += GAMMA ** (k - t) * float(data["reward"][k, b, i])
            if data["done"][k, b, i]:
                returns[t, b, i] = total
                break
            if k == 59 or data["time"][k + 1, b] == 0:  # not seen to its end, or truncated
                break
            k += 1
    part = {name: value[:60] for name, value in data.items()}
    state = script.states_of({name: value.flatten(0, 1) for name, value in part.items()})[0]
    value = model.value(model.encode(state, *agent.relative(state))).unflatten(0, (60, 4)) / 0.5
    pairs = torch.tensor([[float(value[key]), total] for key, total in returns.items()])
    v, g = pairs[:, 0], pairs[:, 1]
    figures = script.diagnose(agent, part)
    assert last == 199 and len(pairs) > 50 and g.std() > 0.2
    assert figures["held_out/value_bias"] == pytest.approx(float((v - g).mean()), abs=1e-4)
    assert figures["held_out/value_explained"] == pytest.approx(
        float(1 - (g - v).var(correction=0) / g.var(correction=0)), abs=1e-4
    )
    slope = float(((v - v.mean()) * (g - g.mean())).sum() / (v - v.mean()).square().sum())
    assert figures["held_out/value_slope"] == pytest.approx(slope, rel=1e-3)


def test_the_model_learns_a_tiny_game_exactly(script):
    """Two players, one stag and one hare on 2x2: after enough updates every reward, cell and end is right."""
    args = script.resolved(script.Args(env_id="msh-2x2-2p-1h1s", latent_size=16))
    torch.manual_seed(0)
    game, generator, rows = script.GridGame(args.env_id), torch.Generator().manual_seed(1), []
    agent, state = script.Agent(game, args), game.initial_state(100, generator)
    for _ in range(40):
        actions = script.sample(game.action_mask(state).float().log(), generator)
        after, reward, terminated, truncated = game.step(state, actions)
        rows.append(script.transition_of(state, actions, reward, after, terminated))
        state = after.replaced(terminated | truncated, game.initial_state(100, generator))
    data = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    optimizer = torch.optim.Adam(agent.model.parameters())
    for k in range(600):
        some = torch.randint(4000, (128,), generator=generator)
        batch = {name: value[some] for name, value in data.items()} | {"recent": torch.ones(128, dtype=torch.bool)}
        loss, _ = script.model_loss(agent.model, batch, args)
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - k / 600)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figures = {k.removeprefix("model/"): float(v) for k, v in script.summary(script.judge(agent, data)).items()}
    assert figures["cells"] >= 0.999 and figures["views"] >= 0.998 and figures["reward_error"] < 0.02
    assert min(figures[f"{name}_recall"] for name in ("reward", "no_reward", "ends", "goes_on")) >= 0.999
