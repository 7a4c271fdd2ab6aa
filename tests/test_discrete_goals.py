"""The discrete goals of hop_ppo_gumbel.py: likelihoods, beliefs, assignment and losses, each by
a slow way to the same, and what is learnt of two kinds of players."""

import itertools
import math
import types
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from conftest import SMALL, load_script
from run_tools import shake

HUNT = "msh-3x3-3p-2h1s"
DRIFTS = "msg-2x3-3p-3d"
FOUR = "msh-3x3-4p-3h1s"
STAY = 4
ORDER = torch.tensor([2, 0, 3, 1])  # of four seats, no rotation


@pytest.fixture(scope="module")
def script():
    return load_script("hop_ppo_gumbel")


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def lively(script):
    """Makes a game and an agent whose every network says something, with the options given."""

    def make(seed=0, **options):
        args = script.Args(**{**SMALL, "env_id": HUNT, "horizon": 9, "goals": 3, **options})
        game = script.make_game(args, "cpu")
        agent = script.Agent(game, script.checked(args, game))
        return game, shake(agent, seed)

    return make


def some_actions(mask, generator):
    """Legal actions [..], the interactions five times as often as moves."""
    weights = mask.float()
    weights[..., STAY + 1 :] *= 5.0
    return weights.flatten(0, -2).multinomial(1, generator=generator).view(mask.shape[:-1])


@torch.no_grad()
def recall(player, state, actions, ended, match_ended):
    """What a player remembers of a step, whose end is told by bools [B]."""
    game = player.agent.game
    own, views = game.features(state)
    seen = {"own": own, "views": views, "mask": game.action_mask(state), "alive": game.alive(state)}
    player.decision = seen
    player.remember(actions)
    player.forget(ended, match_ended)


class Match:
    """Games of random players. `history` has a dict for every step: the state, action, alive, the
    memory before it, and which episodes and matches ended with it."""

    def __init__(self, script, agent, batch=5, steps=60, match_episodes=3, seed=3):
        self.agent = agent
        self.game = game = agent.game
        self.player = script.Player(agent, batch)
        self.history = []
        options = {**vars(agent.args), "num_envs": batch}
        self.buffer = script.MatchBuffer(game, types.SimpleNamespace(**options))
        generator = generator_of(seed)
        state = game.start(batch, generator)
        episode = torch.zeros(batch).long()
        for _ in range(steps):
            action = some_actions(game.action_mask(state), generator)
            after, reward, terminated, truncated = game.step(state, action)
            ended = (terminated | truncated).all(1)
            episode += ended
            match_ended = ended & (episode % match_episodes == 0)
            step = {"state": state, "action": action, "alive": game.alive(state), "ended": ended}
            step |= {"match_ended": match_ended, "memory": self.player.memory}
            self.history.append(step)
            recall(self.player, state, action, ended, match_ended)
            reached = game.reached(state, action, after, reward)
            self.buffer.add(
                state, {**step, "reward": reward, "reached": reached}, ended, match_ended
            )
            state = game.restart(after, ended, generator)

    def spans(self):
        """[R] numbers of games and [R] first steps of all matches."""
        found = []
        for b in range(len(self.history[0]["ended"])):
            starts = [0] + [t + 1 for t, x in enumerate(self.history) if x["match_ended"][b]]
            found += [(b, start) for start in starts if start < len(self.history)]
        return torch.tensor(found).unbind(1)

    def read(self):
        """All matches as the buffer reads them, real numbers in float64."""
        batch = self.buffer.read(*self.spans())
        return {k: x.double() if x.is_floating_point() else x for k, x in batch.items()}


def in_order(shape, generator):
    """In place of uniform random numbers by which rows are ordered: leaves them as they are."""
    return torch.arange(shape[0]).float()


# ------------------------------------------------------------------------------------------------
# Likelihood
# ------------------------------------------------------------------------------------------------
def plain_log_probs(moa, own, others, mask, goal):
    """Log-probabilities of the legal actions of one row under one goal, by number, by a forward
    pass in plain matrices."""
    net = moa.decoder

    def through(part, x):
        return part.weight @ x + part.bias

    theirs = sum(through(net.other, view).clamp(min=0.0) for view in others)
    x = through(net.own, own) + through(net.mix, theirs) + net.goal.bias
    heads = through(net.out, through(net.hidden, x.clamp(min=0.0)).clamp(min=0.0))
    size = len(mask)
    embedding = moa.table[goal]
    logits = {}
    for action in mask.nonzero()[:, 0].tolist():
        logit = heads[len(embedding) * size + action]  # of no goal
        for z, entry in enumerate(embedding):
            logit = logit + entry * heads[z * size + action]
        logits[action] = logit
    total = torch.stack([*logits.values()]).logsumexp(0)
    return {action: logit - total for action, logit in logits.items()}


@pytest.mark.parametrize("env_id", [HUNT, DRIFTS])
def test_log_likelihood_equals_a_plain_loop(script, lively, env_id):
    """Over goals, actions and rows; the legal actions alone have probabilities, that sum to 1."""
    game, agent = lively(env_id=env_id)
    state = Match(script, agent, batch=4, steps=6).history[-1]["state"]
    agent.double()
    own, others = (x.double() for x in game.features(state))
    mask = game.action_mask(state)
    with torch.no_grad():
        everything = []
        for action in range(game.num_actions):
            actions = torch.full(mask.shape[:2], action)
            everything.append(agent.moa.log_likelihood(own, others, mask, actions))
        table = torch.stack(everything, 2)  # [B, N, A, G]
        differences = []
        for b, i in itertools.product(range(4), range(game.num_players)):
            for g in range(3):
                row = (own[b, i], others[b, i], mask[b, i])
                expected = plain_log_probs(agent.moa, *row, g)
                for action in range(game.num_actions):
                    got = float(table[b, i, action, g])
                    if action in expected:
                        assert got == pytest.approx(float(expected[action]), abs=1e-8)
                    else:
                        assert got < -1e8
            differences.append(table[b, i][mask[b, i]].std(1).max())
    assert not mask.all()
    torch.testing.assert_close(table.exp().sum(2), torch.ones(4, game.num_players, 3).double())
    assert max(differences) > 0.1  # goals differ


# ------------------------------------------------------------------------------------------------
# Beliefs
# ------------------------------------------------------------------------------------------------
RULES = [("posterior", 0.0), ("posterior", 0.3), ("posterior", 1.0)]
RULES += [("count", 0.0), ("count", 0.3), ("count", 1.0)]


def updated(prior, posterior, rule, alpha):
    """The prior of the next episode, in plain numbers: HOP's equation 2, and the uniform share."""
    goals = len(prior)
    new = posterior
    if rule == "count":
        likeliest = max(range(goals), key=posterior.__getitem__)
        new = [float(g == likeliest) for g in range(goals)]
    mixed = [alpha * p + (1 - alpha) * x for p, x in zip(prior, new)]
    return [0.999 * p + 0.001 / goals for p in mixed]


@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_beliefs_are_exact_bayes(script, lively, rule, alpha):
    """Before every step of matches with several episodes, from which players leave early."""
    game, agent = lively(inter_om=rule, inter_om_alpha=alpha)
    match = Match(script, agent)
    n = game.num_players
    seen = Counter()
    with torch.no_grad():
        for b, i in itertools.product(range(5), range(n)):
            prior = [1 / 3] * 3
            belief = prior
            for step in match.history:
                told = agent.moa.belief(step["memory"])[b, i].tolist()
                assert told == pytest.approx(belief, abs=2e-5)
                seen["sure"] += max(belief) > 0.9
                if step["alive"][b, i]:
                    own, others = game.features(step["state"])
                    mask = game.action_mask(step["state"])
                    given = own[b, i], others[b, i], mask[b, i], step["action"][b, i]
                    log_probs = agent.moa.log_likelihood(*given).double()
                    joint = [p * math.exp(x) for p, x in zip(belief, log_probs)]
                    belief = [p / sum(joint) for p in joint]
                elif not step["ended"][b]:
                    seen["away"] += 1
                if step["ended"][b]:
                    prior = updated(prior, belief, rule, alpha)
                    seen["episodes"] += 1
                    if step["match_ended"][b]:
                        prior = [1 / 3] * 3
                        seen["matches"] += 1
                    belief = prior
    assert min(seen["away"], seen["matches"]) > 5, seen
    assert seen["episodes"] > 2 * seen["matches"]
    assert seen["sure"] > 0


def test_who_has_left_is_not_judged(script, lively):
    """Whatever is said to be played at a seat whose player has left: the memory is the same."""
    _, agent = lively()
    match = Match(script, agent)
    compared = 0
    for now, after in itertools.pairwise(match.history):
        for action in range(agent.game.num_actions):
            player = script.Player(agent, 5)
            player.memory = now["memory"]
            actions = now["action"].where(now["alive"], torch.tensor(action))
            recall(player, now["state"], actions, now["ended"], now["match_ended"])
            assert torch.equal(player.memory, after["memory"])
        gone = ~now["alive"] & ~now["ended"][:, None]
        assert torch.equal(after["memory"][gone], now["memory"][gone])
        playing = now["alive"] & ~now["ended"][:, None]
        assert (after["memory"][playing] != now["memory"][playing]).any(1).any(1).all()
        compared += int(gone.sum())
    assert compared > 20


def test_the_end_of_a_match_empties_the_memory(script, lively):
    """Of that game alone; the end of an episode leaves a prior, and no likelihood."""
    _, agent = lively()
    match = Match(script, agent)
    seen = Counter()
    for now, after in itertools.pairwise(match.history):
        for b in range(5):
            memory = after["memory"][b]
            if now["match_ended"][b]:
                assert not memory.any()
            elif now["ended"][b]:
                assert not memory[:, 1].any()
                prior = memory[:, 0].exp()
                torch.testing.assert_close(prior.sum(1), torch.ones(3))
                assert (prior.std(1) > 1e-3).any()
            else:
                assert torch.equal(memory[:, 0], now["memory"][b, :, 0])
            seen[bool(now["match_ended"][b]), bool(now["ended"][b])] += 1
    assert len(seen) == 3 and min(seen.values()) > 3, seen


def test_games_are_independent(script, lively):
    """The memory of a game, whatever the others play and however many there are."""
    _, agent = lively()
    match = Match(script, agent)
    for which in ([3], [4, 0, 0]):
        player = script.Player(agent, len(which))
        for step in match.history:
            expected = step["memory"][which]
            torch.testing.assert_close(player.memory, expected, rtol=1e-4, atol=1e-4)
            state = type(step["state"])(*(field[which] for field in step["state"]))
            rest = (step[name][which] for name in ("action", "ended", "match_ended"))
            recall(player, state, *rest)


def test_beliefs_know_no_seats(script, lively):
    """A played match with its seats relabelled: the same beliefs at other seats."""
    _, agent = lively(env_id=FOUR, goals=4)
    match = Match(script, agent, steps=40)
    player = script.Player(agent, 5)
    for step in match.history:
        belief = agent.moa.belief(step["memory"])[:, ORDER]
        torch.testing.assert_close(agent.moa.belief(player.memory), belief, atol=1e-4, rtol=1e-4)
        state = step["state"]._replace(players=step["state"].players[:, ORDER])
        recall(player, state, step["action"][:, ORDER], step["ended"], step["match_ended"])
    assert agent.moa.belief(player.memory).std() > 0.05


@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_next_prior_by_hand(lively, rule, alpha):
    """p = 0.5, 0.3, 0.2 and likelihoods 0.1, 0.5, 0.2: the posterior is 5/24, 15/24, 4/24."""
    _, agent = lively(inter_om=rule, inter_om_alpha=alpha)
    memory = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.5, 0.2]]).log()
    posterior = torch.tensor([5.0, 15.0, 4.0]) / 24
    torch.testing.assert_close(agent.moa.belief(memory), posterior)
    new = {
        ("posterior", 0.0): [5 / 24, 15 / 24, 4 / 24],
        ("posterior", 0.3): [0.15 + 3.5 / 24, 0.09 + 10.5 / 24, 0.06 + 2.8 / 24],
        ("count", 0.0): [0.0, 1.0, 0.0],
        ("count", 0.3): [0.15, 0.79, 0.06],
    }.get((rule, alpha), [0.5, 0.3, 0.2])
    expected = 0.999 * torch.tensor(new) + 0.001 / 3
    torch.testing.assert_close(agent.moa.next_prior(memory).exp(), expected)
    shifted = memory + torch.tensor([[7.0], [-90.0]])  # likelihoods up to a factor
    torch.testing.assert_close(agent.moa.next_prior(shifted).exp(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_no_goal_is_ruled_out(script, lively, rule, alpha):
    """After 400 steps of likelihoods up to e^-80 for one goal, the next episode begins with at
    least a share of 0.001 for all; as many steps of the contrary turn beliefs round."""
    game, agent = lively(inter_om=rule, inter_om_alpha=alpha)
    with torch.no_grad():
        agent.moa.table.mul_(300.0)
    state = game.start(5, generator_of(0))
    action = some_actions(game.action_mask(state), generator_of(1))
    player = script.Player(agent, 5)
    nobody = torch.zeros(5).bool()
    for _ in range(400):
        recall(player, state, action, nobody, nobody)
    assert player.memory[:, :, 1].min() < -8000
    assert player.memory.isfinite().all()
    posterior = agent.moa.belief(player.memory)
    assert posterior.isfinite().all()
    torch.testing.assert_close(posterior.sum(2), torch.ones(5, 3))
    player.forget(~nobody, nobody)
    prior = agent.moa.belief(player.memory)
    assert prior.isfinite().all()
    assert player.memory.isfinite().all()
    assert prior.min() >= 0.001 / 3 * 0.999
    torch.testing.assert_close(prior.sum(2), torch.ones(5, 3))
    if alpha < 1.0:
        assert prior.max() > 0.65
    if alpha == 0.0:
        assert prior.min() < 0.001
    likeliest = prior.argmax(2)
    player.memory[:, :, 1] -= 50.0 * torch.nn.functional.one_hot(likeliest, 3)
    turned = agent.moa.belief(player.memory)
    assert (turned.argmax(2) != likeliest).all()


# ------------------------------------------------------------------------------------------------
# Assignment
# ------------------------------------------------------------------------------------------------
def beliefs_of(agent, batch, seed=0, scale=1.5):
    """Memories [B, N, 2, G] and the beliefs [B, N, G] that they stand for."""
    shape = (batch, agent.game.num_players, 2, agent.moa.memory_size)
    memory = scale * torch.randn(shape, generator=generator_of(seed))
    return memory, (memory[:, :, 0] + memory[:, :, 1]).softmax(2)


def shares_of(agent, memory):
    """What `encode` assigns, after a look at the embeddings."""
    with torch.no_grad():
        goals, shares = agent.moa.encode(memory, None, None)
        torch.testing.assert_close(goals, shares @ agent.moa.table)
        torch.testing.assert_close(shares.sum(2), torch.ones(shares.shape[:2]))
    return shares


def test_soft_and_hard_assignment(lively):
    _, agent = lively(goals=4)
    memory, belief = beliefs_of(agent, 30)
    torch.testing.assert_close(shares_of(agent, memory), belief)
    _, agent = lively(goals=4, assignment="hard")
    shares = shares_of(agent, memory)
    for b, i in itertools.product(range(30), range(3)):
        likeliest = max(range(4), key=belief[b, i].tolist().__getitem__)
        assert shares[b, i].tolist() == [float(g == likeliest) for g in range(4)]


@pytest.mark.parametrize(
    ("env_id", "goals"), [(HUNT, 3), (HUNT, 5), (FOUR, 4), (FOUR, 6), ("msh-2x2-1p-1h1s", 2)]
)
def test_exclusive_assignment_is_optimal(lively, env_id, goals):
    """One-to-one, and of the largest joint probability, by the Hungarian method."""
    game, agent = lively(env_id=env_id, goals=goals, assignment="exclusive")
    memory, belief = beliefs_of(agent, 60)
    shares = shares_of(agent, memory)
    assert ((shares == 0) | (shares == 1)).all()
    assert (shares.sum(1) <= 1).all()
    moved = 0
    for b in range(60):
        best = linear_sum_assignment(belief[b].double().log().numpy(), maximize=True)[1]
        assert shares[b].argmax(1).tolist() == best.tolist()
        moved += best.tolist() != belief[b].argmax(1).tolist()
    assert moved > 10 or game.num_players == 1


def mean_of_the_best(logits):
    """Shares [N, G]: the mean of the best one-to-one assignments, by a loop over all of them."""
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


def test_ties_of_exclusive_assignments(lively):
    """The mean of the best ones; no seat comes first, whatever the seats are called."""
    _, agent = lively(env_id=FOUR, goals=4, assignment="exclusive")
    memory, _ = beliefs_of(agent, 40)
    memory[:10] = 0.0  # nothing known
    memory[10:20, 3] = memory[10:20, 1]  # two of one belief
    memory[20:30, 1:] = memory[20:30, :1]  # all of one belief
    memory[20:25, :, 1, 0] += 12.0  # and sure of it
    shares = shares_of(agent, memory)
    ties = Counter()
    for b in range(40):
        expected, count = mean_of_the_best(memory[b].sum(1))
        torch.testing.assert_close(shares[b], expected, atol=1e-5, rtol=0)
        ties[count] += 1
    assert ties[24] == 20 and ties[1] >= 10 and ties[2] >= 5, ties
    for order in itertools.permutations(range(4)):
        moved = shares_of(agent, memory[:, order])
        torch.testing.assert_close(moved, shares[:, order], atol=1e-5, rtol=0)
    torch.testing.assert_close(shares[:10], torch.full((10, 4, 4), 0.25))


def test_exclusive_assignment_of_sharp_beliefs(lively):
    """Beliefs down to e^-300, as after many steps, ties among them: nothing is lost by rounding."""
    _, agent = lively(env_id=FOUR, goals=4, assignment="exclusive")
    memory, _ = beliefs_of(agent, 200, scale=30.0)
    memory[:, :, 1, 0] += 100.0  # all players seem to have the same goal
    memory[:100, 3] = memory[:100, 0]
    shares = shares_of(agent, memory)
    wrong = []
    for b in range(200):
        expected, _ = mean_of_the_best(memory[b].sum(1))
        if not torch.allclose(shares[b], expected, atol=1e-5):
            wrong.append(b)
    assert not wrong, f"{len(wrong)} of 200"


@pytest.mark.parametrize("goals", [2, 7])
def test_exclusive_assignment_needs_a_goal_for_each(script, lively, tmp_path, monkeypatch, goals):
    """Too few or too many goals are refused before anything is written."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(script.UsageError, match="--assignment exclusive"):
        lively(goals=goals, assignment="exclusive")
    lively(goals=goals)
    options = {"env_id": HUNT, "goals": goals, "assignment": "exclusive"}
    with pytest.raises(script.UsageError, match="--assignment exclusive"):
        script.train(script.Args(**{**SMALL, **options}))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("assignment", ["soft", "hard", "exclusive"])
def test_the_policy_reads_the_assigned_embeddings(script, lively, assignment):
    """Goals, and what policy and value read of them, are of the beliefs before the step."""
    game, agent = lively(env_id=FOUR, goals=5, assignment=assignment)
    memory, _ = beliefs_of(agent, 6, scale=0.7)
    state = game.start(6, generator_of(2))
    decision = decision_of(script, agent, state, memory)
    shares = shares_of(agent, memory)
    with torch.no_grad():
        goals = shares @ agent.moa.table
        torch.testing.assert_close(decision["goals"], goals)
        assert goals.std() > 0.1
        own, views = game.features(state)
        for b, i in itertools.product(range(6), range(4)):
            theirs = [(i + k) % 4 for k in range(1, 4)]
            goal = sum(goals[b, j] for j in theirs)
            torch.testing.assert_close(decision["goal"][b, i], goal)
            seen = torch.stack(
                [torch.cat([views[b, i, k], goals[b, j]]) for k, j in enumerate(theirs)]
            )
            torch.testing.assert_close(decision["others"][b, i], seen)
            logits = agent.actor(own[b, i], seen, goal)
            legal = decision["mask"][b, i]
            action = decision["action"][b, i]
            log_prob = logits[action] - logits[legal].logsumexp(0)
            torch.testing.assert_close(decision["log_prob"][b, i], log_prob)
            torch.testing.assert_close(
                decision["value"][b, i], agent.critic(own[b, i], seen, goal)[0]
            )


def decision_of(script, agent, state, memory):
    """What a Player with this memory decides, by name."""
    players = script.CoPlayers(agent.game, ["self"], len(memory), 1, generator_of(0))
    player = script.Player(agent, len(memory))
    player.memory = memory
    mask = agent.game.action_mask(state)
    with torch.no_grad():
        return player.act(state, mask, torch.ones_like(mask[..., 0]), players)


def test_no_goals_are_zeros(script, lively):
    game, agent = lively(goal="none")
    memory, _ = beliefs_of(agent, 6)
    state = game.start(6, generator_of(2))
    decision = decision_of(script, agent, state, memory)
    assert decision["goals"].shape == (6, 3, 3)
    assert not decision["goals"].any()
    assert not decision["goal"].any()


# ------------------------------------------------------------------------------------------------
# Loss of the MOA
# ------------------------------------------------------------------------------------------------
def gradient(module):
    """The gradient as one vector, which is emptied."""
    parts = []
    for parameter in module.parameters():
        given = parameter.grad
        parts.append((torch.zeros_like(parameter) if given is None else given).flatten())
        parameter.grad = None
    return torch.cat(parts)


def seats_of(agent, batch, limit=10**9):
    """For each match and seat the sums [G] of log-likelihoods over its first steps that count, and
    how many there are in all; at most `limit` rows, in the order of the batch."""
    matches, length, players = batch["weight"].shape
    sums = {}
    count = 0
    for m, t, i in itertools.product(range(matches), range(length), range(players)):
        if not batch["weight"][m, t, i] or count == limit:
            continue
        count += 1
        row = [batch[name][m, t, i] for name in ("own", "others", "mask", "action")]
        sums[m, i] = sums.get((m, i), 0.0) + agent.moa.log_likelihood(*row)
    return sums, count


def loss_of(script, agent, batch, seed=0):
    """Loss and terms of moa_loss."""
    torch.manual_seed(seed)
    return script.moa_loss(agent, batch, False, generator_of(seed))


@pytest.fixture
def scene(script, lively, monkeypatch):
    """Makes an agent in float64, and matches of its game as the buffer has them."""

    def make(training, rule="all", steps=40, subgoal_coef=0.0, **options):
        monkeypatch.setattr(script, "SUBGOAL_COEF", subgoal_coef)
        _, agent = lively(goal_training=training, moa_buffer=rule, **options)
        match = Match(script, agent, steps=steps, match_episodes=2)
        return agent.double(), match.read()

    return make


@pytest.mark.parametrize("rule", ["all", "positive"])
@pytest.mark.parametrize("limit", [4096, 101])
def test_em_is_the_marginal_likelihood(script, scene, monkeypatch, rule, limit):
    """Minus its logarithm a step, goals uniform, by a loop over what is read; and its gradient."""
    agent, batch = scene("em", rule)
    monkeypatch.setattr(script, "MOA_ROWS", limit)
    monkeypatch.setattr(script, "uniform", in_order)
    loss, terms = loss_of(script, agent, batch)
    loss.backward()
    got = gradient(agent.moa)
    sums, count = seats_of(agent, batch, limit)
    assert count == min(limit, int(batch["weight"].sum()))
    assert not batch["weight"].all()
    expected = -sum((total.exp() / 3).sum().log() for total in sums.values()) / count
    value = expected.item()
    bound = terms["moa/nll"] + terms["moa/kl"] * len(sums) / count
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-10)
    assert loss.item() == pytest.approx(value, abs=1e-10)
    kl = 0.0
    for total in sums.values():
        for q in total.softmax(0).tolist():
            kl += q * math.log(3 * q) / len(sums)
    assert terms["moa/kl"].item() == pytest.approx(kl, abs=1e-10)
    assert 0.05 < kl < math.log(3)
    expected.backward()
    exact = gradient(agent.moa)
    torch.testing.assert_close(got, exact, rtol=1e-7, atol=1e-10)
    assert exact.norm() > 0.01


class Captured(Exception):  # noqa: N818
    pass


def logits_of(script, agent, batch, monkeypatch):
    """[matches, N, G]: log-likelihoods by which moa_loss draws goals."""
    found = []

    def capture(logits, *given, **more):
        found.append(logits.detach())
        raise Captured

    with monkeypatch.context() as patch:
        patch.setattr(script.F, "gumbel_softmax", capture)
        with pytest.raises(Captured):
            loss_of(script, agent, batch)
    matches, _, players = batch["weight"].shape
    return found[0].view(matches, players, -1)


@pytest.mark.parametrize("rule", ["all", "positive"])
def test_responsibilities_are_of_a_seat_and_a_match(script, scene, monkeypatch, rule):
    """Logits of q equal sums by a loop; the actions of other matches, other seats, of who has left
    and of rows with weight 0 change nothing in them."""
    agent, batch = scene("gumbel", rule)
    plain = logits_of(script, agent, batch, monkeypatch)
    matches, length, players = batch["weight"].shape
    sums, _ = seats_of(agent, batch)
    for m, i in itertools.product(range(matches), range(players)):
        expected = sums.get((m, i), torch.zeros(3).double()).detach()
        torch.testing.assert_close(plain[m, i], expected, atol=1e-9, rtol=0)
    assert len({tuple(row) for row in plain.flatten(0, 1).tolist()}) > matches
    legal = batch["mask"].int().cumsum(-1)
    other = (legal == legal[..., -1:]).int().argmax(-1)  # the last legal action
    where = torch.zeros_like(batch["weight"])
    match, _, seat = batch["weight"].nonzero()[30].tolist()
    where[match, :, seat] = True
    changed = {**batch, "action": other.where(where, batch["action"])}
    apart = logits_of(script, agent, changed, monkeypatch) - plain
    assert apart[match, seat].abs().max() > 0.01
    apart[match, seat] = 0.0
    assert apart.abs().max() < 1e-9
    changed = {**batch, "action": batch["action"].where(batch["weight"], other)}
    torch.testing.assert_close(logits_of(script, agent, changed, monkeypatch), plain)


@pytest.mark.parametrize("training", ["em", "gumbel"])
@pytest.mark.parametrize("rule", ["all", "positive"])
def test_rows_that_do_not_count(script, scene, monkeypatch, training, rule):
    """Of who has left, past the end, or with weight 0: no field of theirs is read."""
    agent, batch = scene(training, rule, subgoal_coef=0.5)
    monkeypatch.setattr(script, "uniform", in_order)
    results = []
    spoilt = {}
    for name, value in batch.items():
        away = ~batch["weight"].view(*batch["weight"].shape, *[1] * (value.dim() - 3))
        noise = torch.randint(0, 2, value.shape, generator=generator_of(1)).to(value.dtype)
        spoilt[name] = value if name == "weight" else noise.where(away, value)
    for one in (batch, spoilt):
        loss, _ = loss_of(script, agent, one)
        loss.backward()
        results.append([loss.detach(), gradient(agent.moa)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-12)
    if rule == "positive":
        assert (batch["active"] & ~batch["weight"]).sum() > 20


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_one_draw_by_straight_through(script, scene, temperature):
    """Loss and gradient by a loop with the same noise: one goal for a seat and match, the gradient
    that of the relaxed draw; and the subgoal's term with that goal's embedding."""
    agent, batch = scene("gumbel", subgoal_coef=0.5)
    agent.temperature = temperature
    loss, terms = loss_of(script, agent, batch, seed=5)
    loss.backward()
    got = gradient(agent.moa)
    sums, count = seats_of(agent, batch)
    matches, length, players = batch["weight"].shape
    torch.manual_seed(5)
    noise = -torch.empty(matches * players, 3).double().exponential_().log()
    total = 0.0
    drawn = {}
    for (m, i), logits in sums.items():
        relaxed = ((logits + noise[m * players + i]) / temperature).softmax(0)
        choice = int(relaxed.argmax())
        goal = torch.eye(3).double()[choice] + relaxed - relaxed.detach()
        drawn[m, i] = goal
        q = logits.softmax(0)
        total = total - goal @ logits + q @ (3 * q).log()
    recon = 0.0
    for m, t, i in itertools.product(range(matches), range(length), range(players)):
        if batch["weight"][m, t, i] and batch["ended"][m, t, i]:
            names = ("own", "others", "features", "present", "subgoal")
            own, others, features, present, subgoal = (batch[name][m, t, i] for name in names)
            given = (own, others, drawn[m, i] @ agent.moa.table, features, present)
            recon = recon - agent.moa.subgoal_logits(*given).log_softmax(0)[subgoal]
    expected = (total + 0.5 * recon) / count
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    assert terms["moa/recon"].item() == pytest.approx(recon.item() / count, abs=1e-9)
    expected.backward()
    torch.testing.assert_close(got, gradient(agent.moa), rtol=1e-6, atol=1e-9)
    assert len({int(goal.argmax()) for goal in drawn.values()}) > 1


def test_many_draws_have_the_mean_of_the_responsibilities(script, scene):
    """The mean of nll is the sum over q, that of the gradient is, with two goals, the integral over
    the difference of the Gumbel noise, which is logistic; all within sampling error."""
    agent, batch = scene("gumbel", goals=2, steps=12)
    agent.temperature = 0.8
    with torch.no_grad():
        agent.moa.table.mul_(0.5)
    sums, count = seats_of(agent, batch)
    u = (torch.arange(20000).double() + 0.5) / 20000
    noise = u.log() - (-u).log1p()  # logistic, by quantiles
    nll = 0.0
    loss = 0.0
    for logits in sums.values():
        fixed = logits.detach()
        q = fixed.softmax(0)
        nll = nll - q @ fixed / count
        first = ((logits[0] - logits[1] + noise) / agent.temperature).sigmoid().mean()
        relaxed = torch.stack([first, 1 - first])
        free = logits.softmax(0)
        loss = loss + (free @ (2 * free).log() - q @ logits - relaxed @ fixed) / count
    loss.backward()
    exact = gradient(agent.moa)
    draws = []
    slopes = []
    for seed in range(600):
        loss, terms = loss_of(script, agent, batch, seed)
        loss.backward()
        draws.append(terms["moa/nll"].item())
        slopes.append(gradient(agent.moa))
    error = np.std(draws) / len(draws) ** 0.5
    assert abs(np.mean(draws) - float(nll)) < 4 * error
    assert error < 0.02 * float(nll)
    slopes = torch.stack(slopes)
    direction = exact / exact.norm()
    along = slopes @ direction
    error = along.std() / len(slopes) ** 0.5
    assert abs(along.mean() - exact.norm()) < 4 * error
    assert error < 0.2 * exact.norm()
    errors = slopes.std(0) / len(slopes) ** 0.5
    score = (slopes.mean(0) - exact) / errors.clamp(min=1e-9)
    assert score.abs().max() < 6
    assert score.square().mean() < 3


# ------------------------------------------------------------------------------------------------
# What is learnt
# ------------------------------------------------------------------------------------------------
@torch.no_grad()
def held_out_votes(script, run, batch=64, steps=110):
    """int64 [R, 3]: game, likeliest goal and kind of scripted players at every step from the second
    episode on of matches that were not trained on."""
    game = script.GridGame("msh-4x4-4h1s")
    generator = generator_of(99)
    players = script.CoPlayers(game, ["ns", "nh"], batch, 4, generator)
    player = players.agents[0] = script.load_player(run, game, batch)
    state = game.start(batch, generator)
    votes = []
    for _ in range(steps):
        known = (players.kind > 0) & (players.episode > 0)[:, None]
        goal = player.agent.moa.belief(player.memory).argmax(2)
        votes.append(torch.stack([known.nonzero()[:, 0], goal[known], players.kind[known]], 1))
        actions = players.act(state, game.action_mask(state))
        state, _, terminated, truncated = game.step(state, actions)
        ended = (terminated | truncated).all(1)
        players.observe(ended)
        state = game.restart(state, ended, generator)
    return torch.cat(votes)


@pytest.mark.parametrize("training", ["gumbel", "em"])
def test_two_kinds_are_told_apart(script, tmp_path, monkeypatch, training):
    """Hunters of stags and of hares, the MOA alone trained on 32,768 steps: goals are used, tell of
    the kind and not of the seat; kinds are named by the majority in other matches."""
    monkeypatch.chdir(tmp_path)
    shown = []
    options = {"co_players": "ns,nh", "total_timesteps": 32768, "pretrain_moa_steps": 32768}
    metrics = script.train(
        script.Args(goal_training=training, **options), lambda agent, **rest: shown.append(agent)
    )
    assert metrics["moa/kl"] > 0.5
    assert metrics["moa/usage_entropy"] > 0.5
    assert metrics["moa/kind_information"] > 0.4  # of log 2 = 0.69
    assert metrics["moa/seat_information"] < 0.1
    assert shown[0].temperature == pytest.approx(0.1, abs=0.05)  # annealed
    votes = held_out_votes(script, metrics["run"])
    first = votes[:, 0] < 32
    table = torch.zeros(4, 3)
    for _, goal, kind in votes[first].tolist():
        table[goal, kind] += 1
    named = table.argmax(1)[votes[~first, 1]]
    right = named == votes[~first, 2]
    assert len(right) > 3000
    for kind in (1, 2):
        assert right[votes[~first, 2] == kind].float().mean() > 0.9


# ------------------------------------------------------------------------------------------------
# What is logged
# ------------------------------------------------------------------------------------------------
def company(script, batch, episode=1, pool=("ns", "nh")):
    """CoPlayers of the four-seat game, every seat scripted, kinds and seats independent."""
    players = script.CoPlayers(script.GridGame(FOUR), ["self", *pool], batch, 9, generator_of(0))
    players.kind = (torch.arange(4) + torch.arange(batch)[:, None]) % len(pool) + 1
    players.episode = torch.full((batch,), episode)
    return players


def metrics_of(script, belief, co_players):
    """`goal_metrics` of a player whose memory is read as these beliefs."""
    moa = SimpleNamespace(belief=lambda memory: memory)
    player = SimpleNamespace(memory=belief, agent=SimpleNamespace(moa=moa))
    return script.goal_metrics(player, co_players)


def test_goal_metrics_of_perfect_and_independent_beliefs(script):
    """Information about the kind: the logarithm of the number of kinds, and 0."""
    players = company(script, 6, pool=("ns", "nh", "random"))
    perfect = torch.nn.functional.one_hot(4 - players.kind, 5).float()
    metrics = metrics_of(script, perfect, players)
    assert float(metrics["moa/kind_information"]) == pytest.approx(math.log(3), abs=1e-5)
    assert float(metrics["moa/usage_entropy"]) == pytest.approx(math.log(3), abs=1e-5)
    assert float(metrics["moa/seat_information"]) == pytest.approx(0.0, abs=1e-5)
    share = [0.5, 0.25, 0.25, 0.0]
    metrics = metrics_of(script, torch.tensor(share).expand(6, 4, 4), players)
    assert float(metrics["moa/kind_information"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["moa/seat_information"]) == pytest.approx(0.0, abs=1e-5)
    assert float(metrics["moa/usage_entropy"]) == pytest.approx(1.5 * math.log(2), abs=1e-5)
    metrics = metrics_of(script, torch.eye(4).expand(6, 4, 4), players)  # seats alone
    assert float(metrics["moa/seat_information"]) == pytest.approx(math.log(4), abs=1e-5)
    assert float(metrics["moa/kind_information"]) == pytest.approx(0.0, abs=1e-5)


def test_goal_metrics_of_a_noisy_channel(script):
    """Beliefs of 0.9 in the goal of the kind: log 2 less the entropy of 0.9 and 0.1."""
    players = company(script, 4)
    belief = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.1, 0.9]])[players.kind]
    metrics = metrics_of(script, belief, players)
    noise = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert float(metrics["moa/kind_information"]) == pytest.approx(math.log(2) - noise, abs=1e-5)


def test_goal_metrics_read_scripted_players_from_the_second_episode(script):
    """Beliefs about others, and in the first episode of a match, do not count."""
    players = company(script, 8)
    players.kind[:, 0] = 0
    players.episode[4:] = 0
    belief = torch.nn.functional.one_hot(players.kind, 3).float()
    counted = (players.kind > 0) & (players.episode > 0)[:, None]
    spoilt = torch.tensor([0.2, 0.3, 0.5]).where(~counted[..., None], belief)
    metrics = metrics_of(script, belief, players)
    again = metrics_of(script, spoilt, players)
    assert set(metrics) == {"moa/usage_entropy", "moa/kind_information", "moa/seat_information"}
    for name, value in metrics.items():
        assert torch.equal(again[name], value)
    assert float(metrics["moa/kind_information"]) == pytest.approx(math.log(2), abs=1e-5)
    assert metrics_of(script, belief, company(script, 8, episode=0)) == {}
    players.kind[:] = 0
    assert metrics_of(script, belief, players) == {}


# ------------------------------------------------------------------------------------------------
# PPO and plain policy gradient
# ------------------------------------------------------------------------------------------------
def some_rows(script, agent, ratio=False):
    """Rows as the learner reads them, by name; probabilities as they were, or shifted."""
    match = Match(script, agent.float(), batch=6, steps=5)
    state = match.history[-1]["state"]
    game = agent.game
    agent.double()
    own, views = (x.double().flatten(0, 1) for x in game.features(state))
    mask = game.action_mask(state).flatten(0, 1)
    generator = generator_of(8)
    goals = torch.randn(len(own), 2, agent.moa.goal_size, generator=generator).double()
    rows = {"own": own, "others": torch.cat([views, goals], 2), "goal": goals.sum(1), "mask": mask}
    rows["action"] = some_actions(mask, generator)
    inputs = [rows[name] for name in ("own", "others", "goal")]
    with torch.no_grad():
        logits = agent.actor(*inputs).masked_fill(~mask, -torch.inf)
        rows["log_prob"] = logits.log_softmax(1).gather(1, rows["action"][:, None])[:, 0]
    if ratio:
        rows["log_prob"] += 0.5 * torch.randn(len(own), generator=generator).double()
    rows["advantage"] = 3.0 + 2.0 * torch.randn(len(own), generator=generator).double()
    rows["return"] = torch.randn(len(own), generator=generator).double()
    return rows


@pytest.mark.parametrize("ratio", [False, True], ids=["ratio 1", "other ratios"])
def test_policy_gradient_by_a_plain_loop(script, lively, ratio):
    """-mean(A log pi), advantages normalised, 0.7 of the value's loss and 0.05 of the entropy; what
    the policy was when it acted is not read."""
    _, agent = lively(pg=True, vf_coef=0.7)
    rows = some_rows(script, agent, ratio)
    loss, terms = script.ppo_loss(agent, rows, torch.tensor(0.05))
    loss.backward()
    got = gradient(agent)
    count = len(rows["own"])
    advantages = rows["advantage"].tolist()
    mean = sum(advantages) / count
    spread = math.sqrt(sum((a - mean) ** 2 for a in advantages) / count)
    policy = value = entropy = 0.0
    for r in range(count):
        given = [rows[name][r] for name in ("own", "others", "goal")]
        logits = agent.actor(*given)
        legal = rows["mask"][r].nonzero()[:, 0].tolist()
        log_pi = {a: logits[a] - logits[legal].logsumexp(0) for a in legal}
        advantage = (advantages[r] - mean) / spread
        policy = policy - advantage * log_pi[int(rows["action"][r])] / count
        value = value + 0.5 * (agent.critic(*given)[0] - rows["return"][r]) ** 2 / count
        entropy = entropy - sum(x.exp() * x for x in log_pi.values()) / count
    expected = policy + 0.7 * value - 0.05 * entropy
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    parts = {"policy": policy, "value": value, "entropy": entropy}
    for name, part in parts.items():
        assert terms[f"losses/{name}"].item() == pytest.approx(part.item(), abs=1e-6)
    expected.backward()
    torch.testing.assert_close(got, gradient(agent), rtol=1e-5, atol=1e-8)
    assert not any(parameter.grad is not None for parameter in agent.moa.parameters())


def test_at_ratio_one_both_gradients_are_the_same(script, lively):
    """Of PPO and of plain policy gradient; at other ratios they are not."""
    _, plain = lively(pg=True)
    _, clipped = lively(pg=False)
    for ratio in (False, True):
        slopes = []
        for agent in (plain, clipped):
            rows = some_rows(script, agent, ratio)
            loss, _ = script.ppo_loss(agent, rows, torch.tensor(0.05))
            loss.backward()
            slopes.append(gradient(agent))
        apart = (slopes[0] - slopes[1]).norm() / slopes[0].norm()
        assert apart > 0.1 if ratio else apart < 1e-6


@pytest.mark.parametrize("anneal", [True, False])
def test_entropy_bonus_in_the_rewards(script, tmp_path, monkeypatch, anneal):
    """Reward minus the temperature times log pi of what was played; 0 from half of the run on."""
    monkeypatch.chdir(tmp_path)
    rewards = []
    steps = []
    advantages = script.generalised_advantages

    def noted(reward, *others):
        rewards.append(reward.clone())
        return advantages(reward, *others)

    monkeypatch.setattr(script, "generalised_advantages", noted)
    options = {"env_id": HUNT, "co_players": "self", "total_timesteps": 256, "soft_coef": 0.4}
    args = script.Args(**{**SMALL, **options, "reward_scale": 0.5, "anneal": anneal})
    script.train(args, lambda storage, **rest: steps.append(storage))
    for reward, storage, share in zip(rewards, steps, [1.0, 0.5, 0.0, 0.0], strict=True):
        log_prob = torch.stack(storage["log_prob"])
        wanted = 0.5 * torch.stack(storage["reward"]) - 0.4 * share * anneal * log_prob
        torch.testing.assert_close(reward, wanted)
        assert (log_prob < -0.1).any()
