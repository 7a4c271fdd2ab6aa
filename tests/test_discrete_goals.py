"""The discrete goals of hop_ppo_gumbel.py: likelihoods, beliefs, assignment and losses, each by
a slow way to the same, and what is learnt of two kinds of players."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import one_hot

from conftest import HUNT
from run_tools import PLAYED, History, generator_of, run, situations, stacked

pytestmark = pytest.mark.only("hop_ppo_gumbel")
FOUR = "msh-3x3-4p-3h1s"
ALONE = "msh-2x2-1p-1h1s"
LOSSES = [("em", "all", 4096, 1.0), ("em", "positive", 101, 1.0)]
LOSSES += [("gumbel", "all", 101, 1.0), ("gumbel", "positive", 4096, 0.3)]
LOG2 = math.log(2)
CHANNELS = {  # beliefs by kind; entropy of goals, information about the kind
    "perfect": ([[0.0, 1.0], [1.0, 0.0]], LOG2, LOG2),
    "noisy": ([[0.75, 0.25], [0.25, 0.75]], LOG2, 0.75 * math.log(3) - LOG2),
    "nothing": ([[0.75, 0.25], [0.75, 0.25]], 2 * LOG2 - 0.75 * math.log(3), 0.0),
}


@torch.no_grad()
def test_log_likelihood_is_a_softmax_over_legal_actions(script, lively):
    """Of logits that are linear in the goal's embedding."""
    game, agent = lively()
    moa = agent.moa
    state = situations(script, game)
    own, others = game.features(state)
    mask = game.action_mask(state)
    heads = moa.decoder(own, others, torch.zeros(1)).unflatten(2, (moa.goal_size + 1, -1))
    for g in range(3):
        logits = heads[:, :, -1]  # of no goal
        for z in range(moa.goal_size):
            logits = logits + moa.table[g, z] * heads[:, :, z]
        expected = logits.masked_fill(~mask, -math.inf).log_softmax(2)
        for action in range(game.num_actions):
            actions = torch.full(mask.shape[:2], action)
            got = moa.log_likelihood(own, others, mask, actions)[..., g]
            legal = mask[..., action]
            torch.testing.assert_close(got[legal], expected[..., action][legal])
            assert (got[~legal] < -1e8).all()


@pytest.mark.parametrize("rule, alpha", [("posterior", 0.0), ("posterior", 0.3), ("count", 0.3)])
def test_beliefs_are_exact_bayes(record, rule, alpha):
    """Before every step of matches of several episodes, from which players leave early; between
    episodes by HOP's equation 2; nothing is kept of another match."""
    options = {"inter_om": rule, "inter_om_alpha": alpha, "match_episodes": 3}
    steps, iterations = record(**PLAYED, **options, total_timesteps=60 * 8)
    game, moa = iterations[-1].game, iterations[-1].agent.moa
    uniform = torch.full((6, 3, 3), 1 / 3).double()
    prior = belief = uniform
    for step, coming in itertools.pairwise(steps):
        told = moa.belief(step["memory"]).double()
        torch.testing.assert_close(told, belief, atol=2e-5, rtol=1e-4)
        seen = (*game.features(step["state"]), game.action_mask(step["state"]))
        posterior = belief * moa.log_likelihood(*seen, step["action"]).double().exp()
        posterior = posterior / posterior.sum(2, keepdim=True)
        belief = posterior.where(step["alive"][..., None], belief)  # who has left is not judged
        new = one_hot(belief.argmax(2), 3) if rule == "count" else belief
        mixed = 0.999 * (alpha * prior + (1 - alpha) * new) + 0.001 / 3
        prior = mixed.where(step["ended"][:, None, None], prior)
        prior = uniform.where((coming["match"] > step["match"])[:, None, None], prior)
        belief = prior.where(step["ended"][:, None, None], belief)
    assert not stacked(steps, "alive").all() and steps[-1]["match"].min() > 0
    assert belief.max() > 0.6


def memory_of(agent, batch):
    shape = (batch, agent.game.num_players, 2, agent.moa.memory_size)
    return 1.5 * torch.randn(shape, generator=generator_of(0))


@torch.no_grad()
def shares_of(agent, memory):
    """What `encode` assigns, after a look at the embeddings."""
    goals, shares = agent.moa.encode(memory, None, None)
    torch.testing.assert_close(goals, shares @ agent.moa.table)
    return shares


def test_soft_and_hard_assignment(lively):
    _, agent = lively(goals=4)
    memory = memory_of(agent, 30)
    belief = memory.sum(2).softmax(2)
    torch.testing.assert_close(shares_of(agent, memory), belief)
    _, agent = lively(goals=4, assignment="hard")
    assert torch.equal(shares_of(agent, memory), one_hot(belief.argmax(2), 4).float())


def mean_of_the_best(logits):
    """Shares [N, G], the mean of the best one-to-one assignments by a loop; how many are best."""
    players, goals = logits.shape
    values = logits.double().tolist()
    totals = {}
    for order in itertools.permutations(range(goals), players):
        totals[order] = sum(values[i][g] for i, g in enumerate(order))
    best = [order for order, total in totals.items() if total > max(totals.values()) - 1e-6]
    shares = torch.zeros(players, goals)
    for order in best:
        for i, g in enumerate(order):
            shares[i, g] += 1 / len(best)
    return shares, len(best)


@pytest.mark.parametrize("env_id, goals", [(FOUR, 4), (HUNT, 5), (ALONE, 2)])
def test_exclusive_assignment_is_optimal(lively, env_id, goals):
    """One-to-one, of the largest joint probability, the mean of the best if there are several, so
    that no seat comes first; also with beliefs down to e^-300, as after many steps."""
    _, agent = lively(env_id=env_id, goals=goals, assignment="exclusive")
    memory = memory_of(agent, 150)
    memory[:5] = 0.0  # nothing known
    memory[5:15, -1] = memory[5:15, 0]  # two of one belief
    memory[15:25] = memory[15:25, :1]  # all of one belief
    memory[50:] *= 20.0
    memory[50:, :, 1, 0] += 100.0  # all players seem to have the same goal
    memory[50:100, -1] = memory[50:100, 0]
    ties = set()
    for b, shares in enumerate(shares_of(agent, memory)):
        expected, count = mean_of_the_best(memory[b].sum(1))
        torch.testing.assert_close(shares, expected, atol=1e-5, rtol=0)
        ties.add(count)
    assert env_id == ALONE or {1, 2} < ties


@pytest.mark.parametrize("training, rule, limit, temperature", LOSSES)
def test_moa_loss_by_a_loop(script, record, monkeypatch, training, rule, limit, temperature):
    """Value and gradient. One goal for a seat and match, of the likelihood of all that counts
    there: `gumbel` draws it, with the gradient of the relaxed draw; `em` is the marginal
    likelihood. Who has left, and episodes without a reward if so told, count nowhere."""
    options = {"goal_training": training, "moa_buffer": rule, "total_timesteps": 60 * 4}
    steps, iterations = record(**PLAYED, **options)
    agent = iterations[-1].agent.double()
    moa = agent.moa
    _, batch = History(script, steps, iterations[-1].buffer).read()
    batch = {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}
    monkeypatch.setattr(script, "SUBGOAL_COEF", 0.5)
    monkeypatch.setattr(script, "MOA_ROWS", limit)
    monkeypatch.setattr(script, "uniform", lambda shape, _: torch.arange(*shape).float())
    agent.temperature = temperature
    torch.manual_seed(5)
    loss, terms = script.moa_loss(agent, batch, False, generator_of(0))
    matches, _, players = batch["weight"].shape
    rows = batch["weight"].nonzero()[:limit].tolist()
    sums = {}  # by match and seat [G]
    for m, t, i in rows:
        row = [batch[name][m, t, i] for name in ("own", "views", "mask", "action")]
        sums[m, i] = sums.get((m, i), 0.0) + moa.log_likelihood(*row)
    torch.manual_seed(5)
    noise = -torch.empty(matches * players, 3).double().exponential_().log()
    goals = {}
    nll = kl = marginal = recon = 0.0
    for (m, i), logits in sums.items():
        q = goal = logits.softmax(0)
        if training == "gumbel":
            relaxed = ((logits + noise[m * players + i]) / temperature).softmax(0)
            goal = torch.eye(3).double()[relaxed.argmax()] + relaxed - relaxed.detach()
        goals[m, i] = goal
        nll = nll - goal @ logits / len(rows)
        kl = kl + q @ (3 * q).log() / len(sums)
        marginal = marginal - (logits.exp() / 3).sum().log() / len(rows)
    for m, t, i in rows:
        if batch["ended"][m, t, i]:
            names = ("own", "views", "features", "present", "subgoal")
            own, views, features, present, subgoal = (batch[name][m, t, i] for name in names)
            logits = moa.subgoal_logits(own, views, goals[m, i] @ moa.table, features, present)
            recon = recon - logits.log_softmax(0)[subgoal] / len(rows)
    expected = 0.5 * recon + (marginal if training == "em" else nll + kl * len(sums) / len(rows))
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    for name, value in {"nll": nll, "kl": kl, "recon": recon}.items():
        assert terms[f"moa/{name}"].item() == pytest.approx(value.item(), abs=1e-9)
    read = [*moa.parameters()]
    options = {"allow_unused": True, "materialize_grads": True}
    gradients = (torch.autograd.grad(x, read, **options) for x in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9)
    assert 0.05 < kl < math.log(3)
    assert batch["active"].sum() > batch["weight"].sum() or rule == "all"


@pytest.mark.parametrize("training", ["gumbel", "em"])
def test_two_kinds_are_told_apart(script, training):
    """Hunters of stags and of hares: goals tell of the kind, and not of the seat."""
    options = {"co_players": "ns,nh", "total_timesteps": 24576, "pretrain_moa_steps": 24576}
    metrics = run(script, script.Args(goal_training=training, **options)).metrics
    assert metrics["moa/kind_information"] > 0.4  # of log 2 = 0.69
    assert metrics["moa/seat_information"] < 0.1


@pytest.mark.parametrize("channel", CHANNELS)
def test_goal_metrics(script, channel):
    """In closed form, of scripted players from the second episode of a match on."""
    table, entropy, information = CHANNELS[channel]
    players = script.CoPlayers(script.GridGame(FOUR), ["self", "ns", "nh"], 8, 9, generator_of(0))
    kind = (torch.arange(4) + torch.arange(8)[:, None]) % 2 + 1  # as often at every seat
    players.kind = kind * (torch.arange(8) % 4 > 1)[:, None]  # in half of the matches the learner
    players.episode = torch.arange(8) // 4  # half of the matches are in their first episode
    belief = torch.tensor([[0.5, 0.5], *table])[kind]
    belief[(players.kind == 0) | (players.episode == 0)[:, None]] = torch.tensor([0.2, 0.8])
    moa = SimpleNamespace(belief=lambda memory: memory)
    player = SimpleNamespace(memory=belief, agent=SimpleNamespace(moa=moa))
    metrics = script.goal_metrics(player, players)
    expected = {"usage_entropy": entropy, "kind_information": information, "seat_information": 0.0}
    expected = {f"moa/{name}": value for name, value in expected.items()}
    assert {k: float(x) for k, x in metrics.items()} == pytest.approx(expected, abs=1e-5)
    player.memory = torch.eye(4).expand(8, 4, 4)  # tells of the seat alone
    metrics = script.goal_metrics(player, players)
    assert float(metrics["moa/seat_information"]) == pytest.approx(math.log(4), abs=1e-5)
    players.episode[:] = 0
    assert script.goal_metrics(player, players) == {}


@pytest.mark.parametrize("anneal", [True, False])
def test_entropy_bonus(script, small, monkeypatch, anneal):
    """Reward minus a temperature times log pi of what was played, 0 from half of the run on."""
    rewards = []
    advantages = script.generalised_advantages

    def noted(reward, *others):
        rewards.append(reward.clone())
        return advantages(reward, *others)

    monkeypatch.setattr(script, "generalised_advantages", noted)
    storages = []
    options = {"env_id": HUNT, "co_players": "self", "total_timesteps": 256, "soft_coef": 0.4}
    args = small(**options, reward_scale=0.5, anneal=anneal)
    run(script, args, lambda storage, **names: storages.append(storage))
    for k, (reward, storage) in enumerate(zip(rewards, storages, strict=True)):
        bonus = 0.4 * max(0.0, 1 - k / 2) * anneal
        log_prob = torch.stack(storage["log_prob"])
        torch.testing.assert_close(reward, 0.5 * torch.stack(storage["reward"]) - bonus * log_prob)
