"""The latent world model: its loss terms, targets, planner, data sets, offline training and diagnostics."""

import contextlib
import dataclasses
import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import load_script, shake
from PIL import Image
from test_planner import decisions, joint_actions, situations, some_goals

GAMMA = 0.9
GAMES = ["msh-3x3-3p-2h1s", "msh-2x3-4p-2h2s", "msg-2x3-3p-3d"]


@pytest.fixture(scope="module")
def latent(script):
    """The script with a latent model."""
    if not hasattr(script, "LatentModel"):
        assert script.__name__ != "latent_world_model"
        pytest.skip("no latent model")
    return script


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
    game, model, sums = agent.game, agent.model, {name: [] for name in "observation reward value ahead consistency".split()}
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
            sums["consistency"].append(sum(float((a - b).square().mean(-1).mean()) if a.dim() == 1 else float((a - b).square().mean()) for a, b in pairs))
        sums["observation"].append(square)
        reward = float((1 - args.prosocial) * data["reward"][g, i] + args.prosocial * data["reward"][g].mean())
        sums["reward"].append((float(reward_hat) - reward * args.reward_scale) ** 2)
        if data["recent"][g]:
            next_value = float(model.value(following if target == "observed" else predicted))
            y = reward * args.reward_scale + (0.0 if done else GAMMA * next_value)
            y = float(data["return"][g, i]) if target == "return" else y
            sums["value"].append((float(model.value(zs)) - y) ** 2)
            ahead = 0.0 if done else (float(model.value(predicted)) - float(model.value(following))) ** 2
            sums["ahead"].append(ahead)
    return {name: sum(values) / len(values) for name, values in sums.items()}


@pytest.mark.parametrize("target", ["observed", "model", "return"])
@pytest.mark.parametrize("env_id", GAMES)
def test_every_term_of_the_loss_by_hand(latent, lively, env_id, target):
    """Observation, reward, value at the target chosen and ahead, consistency: row by row, player by player."""
    options = {"prosocial": 0.3, "reward_scale": 0.4, "td_target": target, "hidden_size": 16}
    agent, model = model_of(latent, lively, env_id, **options)
    game, data, truncated = steps_of(latent, env_id)
    here, left = data["players"] >= 0, data["next_players"] < 0
    generator = torch.Generator().manual_seed(0)
    data["recent"] = torch.rand(len(here), generator=generator) < 0.7
    data["return"] = torch.randn(here.shape, generator=generator)
    assert (data["done"] & ~left & here).sum() > 5 and truncated.sum() > 5 and not (truncated.unsqueeze(1) & ~left & data["done"]).any()
    assert game.family == "msg" or ((here & left).sum() > 5 and (~here).sum() > 5)
    names = "observation_coef", "reward_coef", "value_coef", "consistency_coef"
    expected = by_hand(latent, agent, data, target)
    total = 0.0
    for k, name in enumerate(names):
        weights = {other: 0.0 for other in names} | {name: 1.5 + k}
        loss, terms = latent.model_loss(model, data, dataclasses.replace(agent.args, **weights))
        term = expected[name.removesuffix("_coef")] + (expected["ahead"] if name == "value_coef" else 0.0)
        assert float(terms[f"model/{name.removesuffix('_coef')}_loss"]) == pytest.approx(term, rel=1e-4)
        assert float(loss.detach()) == pytest.approx((1.5 + k) * term, rel=1e-4) and term > 1e-3
        total += float(loss.detach())
    loss, _ = latent.model_loss(model, data, dataclasses.replace(agent.args, **{n: 1.5 + k for k, n in enumerate(names)}))
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
