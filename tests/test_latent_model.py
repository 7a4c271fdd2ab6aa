"""The latent world model of latent_world_model.py: losses, targets and planner, each by a slow
way to the same; and training from a file of recorded play."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import offline
from conftest import HUNT, small_args
from run_tools import assert_same_run, broken_run, generator_of, networks, run, situations

pytestmark = pytest.mark.only("latent_world_model")
ALONE = "msh-3x3-1p-2h1s"
LEAVING = "test_pettingzoo_game:Leaving"
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def plain_terms(agent, row):
    """The four terms of one row."""
    model = agent.model
    goals = row["others"][:, model.other_size :]
    zs = model.encode(row["own"], row["others"])
    after = model.encode(row["next_own"], torch.cat([row["next_views"], goals], 1))
    *ahead, reward = model(*zs, row["action"], row["other_actions"])
    own, views, plays_on = model.decode(*ahead)
    now, then, planned = (model.value(*latents, goals.sum(0))[0] for latents in (zs, after, ahead))
    target = row["reward"] + row["shift"]
    observation = consistency = following = torch.zeros(())
    if not row["terminated"]:
        coming = then if agent.args.td_target == "observed" else planned
        target = target + agent.args.gamma * coming
        following = (planned - then.detach()) ** 2
        pairs = [(own, row["next_own"]), (views, row["next_views"])]
        observation = sum(((x - y) ** 2).sum() for x, y in pairs)
        consistency = sum(((x - y) ** 2).sum() for x, y in zip(ahead, after, strict=True))
    return {
        "observation": observation + (plays_on - (~row["terminated"]).float()) ** 2,
        "reward": (reward - row["reward"]) ** 2,
        "value": following + row["valued"] * (now - target.detach()) ** 2,
        "consistency": consistency,
    }


@pytest.mark.parametrize("env_id, td_target", [(HUNT, "observed"), (ALONE, "model")])
def test_losses_row_by_row(script, record, monkeypatch, env_id, td_target):
    """Terms, their weighted sum, and its gradient, on rows with ends and rows without a value."""
    coefs = {"observation": 0.5, "reward": 2.0, "value": 0.3, "consistency": 0.7}
    monkeypatch.setattr(script, "MODEL_COEFS", coefs)
    options = {"plan_update": "offset", "plan_until": 1.0, "num_steps": 40, "td_target": td_target}
    _, iterations = record(**options, env_id=env_id, total_timesteps=240)
    agent, rows = iterations[-1].agent, iterations[-1].moves
    rows["valued"] = torch.rand(rows["reward"].shape, generator=generator_of(3)) < 0.6
    some = torch.arange(0, len(rows["reward"]), len(rows["reward"]) // 120)
    rows = {name: value[some] for name, value in rows.items()}
    assert len(set(zip(rows["terminated"].tolist(), rows["valued"].tolist(), strict=True))) == 4
    by_row = []
    for r in range(len(some)):
        by_row.append(plain_terms(agent, {name: value[r] for name, value in rows.items()}))
    expected = {name: sum(row[name] for row in by_row) / len(some) for name in coefs}
    loss, terms = script.model_loss(agent, rows)
    named = {f"model/{name}": term for name, term in expected.items()}
    torch.testing.assert_close(terms, named, **CLOSE)
    whole = sum(coefs[name] * expected[name] for name in coefs)
    torch.testing.assert_close(loss, whole, **CLOSE)
    parameters = [*agent.model.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = (torch.autograd.grad(x, parameters, **options) for x in (loss, whole))
    torch.testing.assert_close(*gradients, **CLOSE)


def plain_step(model, own, others, action, other_actions):
    """Latents after one joint action, one player at a time, and the reward."""

    def block(layer, zs, action):
        return layer(zs).view(model.num_actions, 2, model.size)[action]

    step, pushed = block(model.own_blocks, own, action)
    pairs = [block(model.other_blocks, zs, a) for zs, a in zip(others, other_actions, strict=True)]
    heard = torch.stack([pair[1] for pair in pairs])
    choice = torch.eye(model.num_actions)[action]
    change, told, reward = model.whole(own, heard, choice).split([model.size, model.size, 1])
    ahead = []
    for zs, (theirs, said) in zip(others, pairs, strict=True):
        *changed, stays = model.change((said + told).relu())
        moved = zs + theirs + pushed + torch.stack(changed)
        ahead.append(moved / (1.0 + (-3.0 - stays).exp()))  # fades out who leaves
    return own + step + change, torch.stack(ahead), reward[0]


@torch.no_grad()
@pytest.mark.parametrize("co_player_model", ["moa", "nh"])
def test_scores_equal_a_plain_loop(script, lively, monkeypatch, co_player_model):
    """Over decisions, samples and own actions, with the same draws and only the observer's view."""
    name = "sample_joint_actions" if co_player_model == "moa" else "rule_actions"
    drawn = []
    draw = getattr(script, name)
    monkeypatch.setattr(script, name, lambda *inputs: drawn.append(draw(*inputs)) or drawn[0])
    game, agent = lively(co_player_model=co_player_model)
    agent.args.reward_scale = 7.0  # is in the rewards that are learnt, and not applied twice
    state = situations(script, game, batch=12)
    own, views = game.features(state)
    goals = torch.randn(12, 3, agent.moa.goal_size, generator=generator_of(5))
    chosen = game.alive(state).nonzero(as_tuple=True)
    seen = (own, views, goals, torch.full_like(goals, -0.5))
    q = script.scores(agent, state, seen, chosen, generator_of(1))
    (joint,) = drawn
    model = agent.model
    for d, (b, i) in enumerate(zip(*(x.tolist() for x in chosen), strict=True)):
        company = [(i + k) % 3 for k in (1, 2)]
        zs = model.encode(own[b, i], torch.cat([views[b, i], goals[b, company]], 1))
        for a in range(game.num_actions):
            expected = 0.0
            for k in range(4):
                *ahead, reward = plain_step(model, *zs, a, joint[b, k, company].tolist())
                plays_on = model.own_decoder(ahead[0])[-1].clamp(0.0, 1.0)
                value = model.value(*ahead, goals[b, company].sum(0))[0]
                expected += float(reward + agent.args.gamma * plays_on * value) / 4
            assert float(q[d, a]) == pytest.approx(expected, abs=1e-4)
    assert len(q) > 20 and q.std(1).min() > 0.01


def test_a_rule_acts_as_the_scripted_kind(script, lively):
    """Without noise or a target that it had before; with the same draws."""
    for number, kind in enumerate(script.GridGame(HUNT).kinds):
        game, agent = lively(co_player_model=kind, plan_samples=30)
        state = situations(script, game, batch=12)
        joint = script.rule_actions(agent, state, generator_of(1))
        copies = type(state)(*(field.repeat_interleave(30, 0) for field in state))
        kinds = torch.full_like(copies.players, number)
        told = (game.action_mask(copies), kinds, kinds < 0, torch.full_like(kinds, -1))
        expected, _ = game.scripted_actions(copies, *told, generator_of(1))
        assert torch.equal(joint, expected.view(12, 30, 3))


@pytest.mark.parametrize("plan, anneal", [("offset", False), ("hop", True)])
def test_rows_are_what_the_game_did(script, record, monkeypatch, plan, anneal):
    """Of all who are there, with features of the step's next state; the learning rate may fall."""
    monkeypatch.setattr(script, "REPLAY", 300)
    options = {"co_players": "self,random", "prosocial": 0.3, "num_steps": 16, "anneal": anneal}
    options |= {"plan_update": plan, "plan_until": 1.0, "plan_beta": 2.0, "total_timesteps": 192}
    steps, iterations = record(**options)
    for k, one in enumerate(iterations):
        state, after = [], []
        for step in steps[16 * k : 16 * k + 16]:
            state.append(step["state"])
            after.append(one.game.step(state[-1], step["action"])[0])
        state, after = (type(x[0])(*map(torch.cat, zip(*x))) for x in (state, after))
        kept = {name: torch.cat(x) for name, x in one.storage.items()}
        action, reward, alive = (kept[name] for name in ("action", "reward", "alive"))
        own, views = one.game.features(state)
        row = {"own": own, "others": torch.cat([views, kept["goals"][:, one.game.others]], 3)}
        row |= dict(zip(["next_own", "next_views"], one.game.features(after), strict=True))
        row |= {"action": action, "other_actions": action[:, one.game.others]}
        row["reward"] = one.args.reward_scale * (0.7 * reward + 0.3 * reward.mean(1, keepdim=True))
        row["shift"] = kept["expected"] - kept["q_plan"].gather(2, action[..., None])[..., 0]
        row["shift"] -= (plan == "hop") * (1 - k / 2) / 2.0 * kept["log_prob"]
        row |= {"valued": kept["learner"], "terminated": kept["terminated"]}
        assert set(row) == set(script.TRANSITION)
        torch.testing.assert_close(one.moves, {name: x[alive] for name, x in row.items()})
        assert not alive.all() and one.moves["terminated"].any() and one.moves["reward"].any()
        assert 0 < one.moves["valued"].sum() < len(one.moves["valued"])
        assert len(one.sums["model/reward"]) == script.MODEL_UPDATES
    assert kept["offset"].abs().max() > 0.0 and row["shift"].std() > 0.0
    for name, value in one.recent.items():
        assert torch.equal(value, torch.cat([past.moves[name] for past in iterations])[-300:])
    rate = one.optimizer.param_groups[2]["lr"] / script.MODEL_LEARNING_RATE
    assert rate == (0.5 if anneal else 1.0)


def test_a_batch_is_of_late_and_of_surprising_rows(script, record):
    """Whole rows; V does not learn from the surprising ones."""
    _, iterations = record(plan_update="offset", plan_until=1.0, total_timesteps=96)
    rows = iterations[-1].moves
    rows["shift"] = torch.arange(len(rows["shift"]))
    rows["valued"][:] = True
    recent = {name: value[:100] for name, value in rows.items()}
    reservoir = {name: value[100:130] for name, value in rows.items()}
    batch = script.model_batch(recent, reservoir, generator_of(0))
    place = batch["shift"]
    late = torch.arange(script.MODEL_BATCH) < 0.75 * script.MODEL_BATCH
    assert torch.equal(place < 100, late) and place.max() < 130
    expected = {name: rows[name][place] for name in script.TRANSITION} | {"valued": late}
    torch.testing.assert_close(batch, expected, rtol=0, atol=0)
    assert reservoir["valued"].all()


@pytest.fixture(scope="module")
def play(script, tmp_path_factory):
    """Of a game of each sort a file of recorded play of 50 steps of 3 games, and what is in it."""
    files = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline, "GAMES", 3)
        patch.setattr(offline, "EPISODES", 2)
        for env_id, pool in {HUNT: "nh,random", LEAVING: "random"}.items():
            path = tmp_path_factory.mktemp("play") / "play.npz"
            words = f"collect --env-id {env_id} --co-players {pool} --steps 150 --horizon 6 --file"
            offline.main([*words.split(), str(path)])
            files[env_id] = (path, dict(np.load(path)))
    return files


def offline_args(script, path, **options):
    """Of 80 steps of three games, which is more than a file has."""
    options = {"env_id": HUNT, "horizon": 6, "num_steps": 20, "moa_updates": 2, **options}
    return small_args(script, **options, offline=str(path), total_timesteps=240)


@pytest.mark.parametrize("env_id", [HUNT, LEAVING])
def test_recorded_play_is_learnt_from_as_it_was(script, play, monkeypatch, env_id):
    """No game is stepped; matches end where they did, and with the last row. Every player's rows
    are learnt from, by the model and the MOA alone."""
    for game in (script.GridGame, script.PettingZooGame):
        monkeypatch.setattr(game, "step", None)
    path, arrays = play[env_id]
    index = torch.arange(80) % 50
    data = {}
    for name, x in arrays.items():
        if x.ndim:
            data[name] = torch.from_numpy(x.astype(int) if x.dtype.kind in "iu" else x)[index]
    data["truncated"][49] = ~data["terminated"][49]
    data["match_ended"][49] = True
    seen = []

    def watch(**names):
        kept = {k: torch.stack(v) for k, v in names["storage"].items()}
        weights = networks(names["agent"])
        seen.append({**names, "kept": kept, "weights": weights, "memory": names["player"].memory})

    run(script, offline_args(script, path, env_id=env_id, num_steps=5), watch)
    last = seen[-1]
    game = last["game"]
    assert game.defaults["plan_update"] != "none"  # a planner is on by default on any game
    kept = {k: torch.cat([names["kept"][k] for names in seen]) for k in last["kept"]}
    over = data["terminated"] | data["truncated"]
    data["goes_on"] = ~over
    for prefix in ("", "next_"):
        fields = (data[prefix + name].flatten(0, 1) for name in game.state_type._fields)
        own, views = game.features(game.state_type(*fields))
        data[f"{prefix}own"] = own.view(80, 3, 3, -1)
        data[f"{prefix}views"] = views.view(80, 3, 3, 2, -1)
    for name in "own views next_own next_views goes_on action reward terminated".split():
        assert torch.equal(kept[name], data[name]), name
    begun = torch.zeros(2, 3).long()  # matches and episodes, by step
    for t in range(80):
        assert torch.equal(last["buffer"].ring["match"][t], begun[0])
        assert torch.equal(last["buffer"].ring["episode"][t], begun[1])
        begun[0][data["match_ended"][t]] = t + 1
        begun[1][over[t].all(1)] = t + 1
        if t % 5 == 4:  # something is remembered of the match, and of the episode
            memory = seen[t // 5]["memory"][..., -1].amax(1)
            assert torch.equal(memory > 0, (begun <= t).T), t
    shift = kept["expected"] - kept["q_plan"].gather(3, kept["action"][..., None])[..., 0]
    moves = {k: torch.cat([names["moves"][k] for names in seen]) for k in ("shift", "valued")}
    torch.testing.assert_close(moves["shift"], shift[kept["alive"]])
    assert moves["valued"].all() and not kept["learner"].any()
    for name, learns in {"model": True, "moa": True, "actor": False, "critic": False}.items():
        assert torch.equal(seen[0]["weights"][name], last["weights"][name]) != learns, name


def test_as_many_games_as_in_the_file(script, play, typed):
    """96 steps are one iteration of three games; of 64, the default elsewhere, they are none."""
    args = typed(env_id=HUNT, horizon=6, offline=play[HUNT][0], total_timesteps=96)
    content = script.load_checkpoint(run(script, args).path)
    assert content["progress"][0] == 96 and content["args"]["num_envs"] == 3


def test_an_offline_run_goes_on_to_the_bit(script, play, typed, refuse):
    """And not if its file has become shorter."""
    _, arrays = play[LEAVING]
    np.savez("cut.npz", **arrays)
    args = offline_args(script, "cut.npz", env_id=LEAVING, checkpoint_every=1)
    unbroken = run(script, args)
    broken = broken_run(script, args, 3)
    np.savez("cut.npz", **{k: x[:3] if x.ndim else x for k, x in arrays.items()})
    assert "does not fit this run" in refuse("--resume", broken)
    np.savez("cut.npz", **arrays)
    run(script, typed(resume=broken))
    assert_same_run(script, unbroken.path, broken)


def test_an_offline_run_plays_by_planning_and_games_go_on_from_it(script, play, typed):
    """The planner is trusted in full; `--init` takes all options but the file."""
    path = run(script, offline_args(script, play[HUNT][0])).path
    agent = script.load_player(path, script.GridGame(HUNT), 2).agent
    assert agent.plan_mode == "hop" and float(agent.plan_slope) == 1.0
    result = script.evaluate(path, "nh,random", episodes=6, match_episodes=2)
    assert all(map(math.isfinite, result["focal_returns"]))
    seen = []
    args = typed(init=path, co_players="self,nh", total_timesteps=100)
    run(script, args, lambda storage, **others: seen.extend(storage["offset"]))
    assert torch.stack(seen).abs().max() > 0.0


def test_what_cannot_be_learnt_from(play, refuse):
    path, arrays = play[HUNT]
    words = f"--env-id {HUNT} --horizon 6 --offline"

    def edited(name, place, value):
        array = arrays[name].astype(float)
        array[place] = value
        return {name: array}

    top = np.where(arrays["players"][0, 0, 0] == 0, 2, 0)  # UP or LEFT of cell 0
    changes = {
        "env": {"env_id": "msh"},
        "negative": edited("action", (3, 1, 2), -1),
        "illegal": edited("players", (0, 0, 0), 0) | edited("action", (0, 0, 0), top),
        "nan": edited("reward", (9, 0, 1), math.nan),
        "thinned": {k: x[::2] for k, x in arrays.items() if x.ndim},
        "untold": {k: arrays[k] & False for k in ("terminated", "truncated")},
        "seats": {"action": arrays["action"][:, :, :2]},
        "cells": {"next_players": arrays["next_players"] + 50},
    }
    Path("text.npz").write_text("text")
    for name in [*changes, "text", "missing"]:
        if name in changes:
            np.savez(f"{name}.npz", **{**arrays, **changes[name]})
        assert f"{name}.npz" in refuse(f"{words} {name}.npz"), name
    for wrong in ("--plan-update none", "--goal oracle", "--plan-until 0.5"):
        assert "--offline" in refuse(f"{words} {path} {wrong}")
    for short in ("--num-envs 1 --num-steps 100 --total-timesteps 299", "--total-timesteps 95"):
        assert "--total-timesteps" in refuse(f"{words} {path} {short}")  # of three games
    assert "--co-player-model" in refuse("--co-player-model self")
