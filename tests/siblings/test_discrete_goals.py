"""Discrete goals: likelihoods, Bayes' rule, HOP's count, assignment, the ways of training, and goals of one's own."""

import dataclasses
import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from scipy.optimize import linear_sum_assignment

SMALL_HUNT, SMALL_DRIFTS = "msh-3x3-3p-2h1s", "msg-2x2-3p-3d"
pytestmark = pytest.mark.scripts("hop_ppo_gumbel")


def shaken(trainer, scale=0.5):
    """The trainer with parameters that differ from their first values."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.agent.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return trainer


def play(script, small, rollouts=4, prefer=6.0, **options):
    """A trainer whose learner's seats played at random, and what happened: [(state, actions, memory before, ended,
    match ended)] of all games, step by step."""
    trainer = shaken(script.Trainer(small(num_envs=5, num_steps=40, total_timesteps=10**6, **options)))
    act, remember, log = trainer.agent.act, trainer.agent.remember, []
    generator = torch.Generator().manual_seed(3)

    def acting(state, mask, *rest):
        weight = torch.tensor([1.0] * 5 + [prefer] * (trainer.game.num_actions - 5)).log()
        return act(state, mask, *rest)._replace(action=script.sample(weight.masked_fill(~mask, -1e9), generator))

    def remembering(memory, state, actions, ended, match_ended):
        if memory is trainer.memory and not (log and log[-1][0] is state and not ended.any()):
            log.append((state, actions, memory, ended, match_ended))
        return remember(memory, state, actions, ended, match_ended)

    trainer.agent.act, trainer.agent.remember = acting, remembering
    for _ in range(rollouts):
        trainer.rollout()
    return trainer, log


def goal_probabilities(script, agent, state):
    """float64 [B, N, G, A]: pi_hat of every goal, one goal and one softmax at a time."""
    own, others = agent.relative(state)
    mask, result = agent.game.action_mask(state), []
    with torch.no_grad():
        for embedding in agent.moa.table:
            logits = agent.moa.decoder(own, others, embedding.expand(*own.shape[:2], -1)).double()
            weight = logits.exp() * mask
            result.append(weight / weight.sum(2, keepdim=True))
    return torch.stack(result, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Likelihoods and beliefs
# ---------------------------------------------------------------------------------------------------------------------
def test_all_goals_in_one_call(script, lively):
    """`every`, and forward with goals [.., Z] and [.., K, Z], against one goal after the other; no more is read."""
    agent = lively(env_id=SMALL_HUNT)
    state = agent.game.initial_state(6, torch.Generator().manual_seed(0))
    (own, others), decoder, table = agent.relative(state), agent.moa.decoder, agent.moa.table
    with torch.no_grad():
        body = decoder.body(own, others)
        weight = decoder.out(body).view(6, 3, 7, 4)  # Z + 1 = 4
        expected = [(weight[..., :3] * g).sum(3) + weight[..., 3] for g in table]
        every = decoder.every(own, others, table)
        many = decoder(own, others, table.expand(6, 3, -1, -1))
        more = decoder(own, others, torch.cat([table[2], torch.ones(5)]).expand(6, 3, -1))
        rows = decoder(own[0], others[0], table[1].expand(3, -1))
    for g, one in enumerate(expected):
        torch.testing.assert_close(every[..., g], one, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(many[:, :, g], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(more, expected[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, expected[1][0], rtol=1e-4, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


@pytest.mark.parametrize("env_id", [SMALL_HUNT, SMALL_DRIFTS])
@pytest.mark.parametrize("rule", ["posterior", "count"])
def test_beliefs_in_closed_form(script, small, env_id, rule):
    """Prior times the product of the likelihoods of the actions played, over the sum; between episodes HOP's equation
    2; step by step in plain Python, and the same from the buffer."""
    trainer, log = play(script, small, env_id=env_id, co_players="self", match_episodes=3, inter_om=rule,
                        inter_om_alpha=0.3)  # fmt: skip
    agent, batch, n = trainer.agent, 5, trainer.game.num_players
    prior = [[[0.25] * 4 for _ in range(n)] for _ in range(batch)]
    belief, moved, ends = [[list(p) for p in row] for row in prior], 0.0, Counter()
    assert len(log) == 160
    for state, actions, memory, ended, match_ended in log:
        given = agent.moa.log_belief(memory).exp()
        torch.testing.assert_close(given, torch.tensor(belief), rtol=1e-3, atol=1e-5)
        moved = max(moved, float((given - 0.25).abs().max()))
        probs = goal_probabilities(script, agent, state)
        for b, i in itertools.product(range(batch), range(n)):
            if state.players[b, i] >= 0:
                product = [p * float(probs[b, i, g, actions[b, i]]) for g, p in enumerate(belief[b][i])]
                belief[b][i] = [p / sum(product) for p in product]
            if ended[b]:
                last = belief[b][i]
                if rule == "count":
                    last = [float(g == max(range(4), key=lambda g: last[g])) for g in range(4)]
                mixed = [0.3 * p + 0.7 * q for p, q in zip(prior[b][i], last, strict=True)]
                prior[b][i] = [0.999 * p + 0.001 / 4 for p in mixed]
                if match_ended[b]:
                    prior[b][i] = [0.25] * 4
                belief[b][i] = list(prior[b][i])
        ends.update(ended=int(ended.sum()), match_ended=int(match_ended.sum()))
    assert moved > 0.3 and ends["match_ended"] >= 5 and ends["ended"] >= 3 * ends["match_ended"]
    rebuilt = trainer.buffer.memory(agent.moa, trainer.co_players.episode, trainer.memory)
    torch.testing.assert_close(rebuilt.prior, trainer.memory.prior, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rebuilt.likelihood, trainer.memory.likelihood, rtol=1e-4, atol=1e-4)
    assert (trainer.co_players.episode > 0).any() and rebuilt.likelihood.abs().max() > 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.995, 1.0])
def test_count_of_episodes(script, lively, alpha):
    """k episodes with one goal: p_k = alpha^k / G + (1 - alpha^k) onehot, but for the share that no goal loses."""
    agent = lively(inter_om="count", inter_om_alpha=alpha)
    prior, likelihood = torch.full((2, 3, 4), 0.25).log(), torch.tensor([-9.0, -2.0, -8.0, -4.0]).expand(2, 3, -1)
    for k in range(1, 8):
        prior = agent.moa.next_prior(prior, likelihood)
        expected = [alpha**k / 4 + (1 - alpha**k) * (g == 1) for g in range(4)]
        for g in range(4):
            assert float(prior[1, 2, g].exp()) == pytest.approx(expected[g], abs=1.1e-3 * k)
            assert float(prior[0, 0, g].exp()) > 2e-4
    exact = lively(inter_om="posterior", inter_om_alpha=0.0).moa.next_prior(
        torch.full((1, 4), 0.25).log(), likelihood[0, :1]
    )
    torch.testing.assert_close(exact.exp(), 0.999 * likelihood[0, :1].softmax(1) + 0.00025)


@pytest.mark.parametrize("rule", ["posterior", "count"])
def test_beliefs_are_robust(script, lively, rule):
    """Impossible and endless evidence: never all zero, never nan, and a goal once ruled out comes back."""
    agent = lively(inter_om=rule)
    moa, memory = agent.moa, agent.moa.initial_memory(2)
    for worst in (-1e4, -1e9, -3e38):
        hard = torch.tensor([worst, -5.0, worst, worst]).expand(2, 4, 4)
        after = memory._replace(prior=moa.next_prior(memory.prior, hard))
        belief = moa.log_belief(after).exp()
        assert belief.isfinite().all() and torch.allclose(belief.sum(2), torch.ones(2, 4)) and belief.min() > 1e-4
        back = after._replace(likelihood=torch.tensor([-20.0, -40.0, -60.0, -60.0]).expand(2, 4, 4))
        assert (moa.log_belief(back).exp()[..., 0] > 0.99).all()
        all_bad = after._replace(likelihood=torch.full((2, 4, 4), worst))
        assert moa.log_belief(all_bad).exp().isfinite().all()


def test_other_beliefs(script, small):
    """`none` is uniform whatever happens; `encoder` is the encoder's guess from sums that the buffer gives as well."""
    trainer, log = play(script, small, env_id=SMALL_HUNT, co_players="self", belief="none")
    assert torch.allclose(trainer.agent.moa.log_belief(trainer.memory).exp(), torch.tensor(0.25))
    trainer, log = play(script, small, env_id=SMALL_HUNT, co_players="self", belief="encoder", match_episodes=3)
    agent = trainer.agent
    rebuilt = trainer.buffer.memory(agent.moa, trainer.co_players.episode, trainer.memory)
    for now, again in zip(trainer.memory, rebuilt, strict=True):
        torch.testing.assert_close(now, again, rtol=1e-4, atol=1e-4)
    sums = torch.zeros_like(log[0][2].match)
    for state, actions, memory, _, match_ended in log:
        torch.testing.assert_close(memory.match, sums, rtol=1e-4, atol=1e-4)
        seen = agent.moa.seen(*agent.relative(state))
        with torch.no_grad():
            sums = sums + agent.moa.features(seen, actions, state.players >= 0)
        sums = sums.masked_fill(match_ended.view(-1, 1, 1), 0.0)
    assert agent.moa.log_belief(trainer.memory).exp().std(1).max() > 0.01


def test_beliefs_are_computed_anew_after_training(script, small):
    """After the MOA was trained the next rollout starts from beliefs under its new parameters, and only then."""
    trainer = shaken(script.Trainer(small(env_id=SMALL_HUNT, num_steps=60, moa_every=2, total_timesteps=10**5)))
    rebuild, made = trainer.buffer.memory, []
    trainer.buffer.memory = lambda *inputs: made.append(trainer.iteration) or rebuild(*inputs)
    for k in range(5):
        before = trainer.agent.moa.table.clone()
        trainer.iterate()
        assert torch.equal(before, trainer.agent.moa.table) == (k % 2 == 0)
    assert made == [0, 2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Assignment
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("players, goals", [(3, 3), (4, 4), (3, 5)])
def test_exclusive_assignment_is_optimal(script, lively, players, goals):
    """One-to-one, and of the largest joint probability, by scipy's optimal assignment."""
    agent = lively(env_id=f"msh-3x3-{players}p-2h1s", assignment="exclusive", goals=goals)
    belief = (3 * torch.randn(200, players, goals, generator=torch.Generator().manual_seed(0))).log_softmax(2)
    shares = agent.assign(belief)
    assert ((shares == 0) | (shares == 1)).all() and (shares.sum(2) == 1).all() and (shares.sum(1) <= 1).all()
    different = 0
    for b in range(200):
        rows, columns = linear_sum_assignment(-belief[b].numpy())
        assert shares[b].argmax(1).tolist() == columns.tolist()
        different += columns.tolist() != belief[b].argmax(1).tolist()
    assert different > 50


def test_assignments(script, lively):
    """soft: the beliefs; hard: the likeliest goal; exclusive without evidence: no seat before the others."""
    belief = torch.tensor([[[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.4, 0.35, 0.15, 0.1]]]).log()
    expected = {"hard": [0, 2, 0], "exclusive": [0, 2, 1]}
    for name, goals in expected.items():
        agent = lively(env_id=SMALL_HUNT, assignment=name)
        assert agent.assign(belief)[0].argmax(1).tolist() == goals
        order = torch.tensor([2, 0, 1])
        assert torch.equal(agent.assign(belief[:, order]), agent.assign(belief)[:, order])
    torch.testing.assert_close(agent.assign(torch.full((2, 3, 4), 0.25).log()), torch.full((2, 3, 4), 0.25))
    soft = lively(env_id=SMALL_HUNT)
    torch.testing.assert_close(soft.assign(belief), belief.exp())
    memory = soft.moa.initial_memory(1)._replace(likelihood=belief)
    goal, log_belief = soft.infer(memory, *soft.relative(soft.game.initial_state(1)), None)
    torch.testing.assert_close(log_belief, belief)
    torch.testing.assert_close(goal, belief.exp() @ soft.moa.table)


def test_goals_are_drawn_from_the_belief(script, lively):
    agent, samples = lively(env_id=SMALL_HUNT), 8000
    belief = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.6, 0.1], [0.25, 0.25, 0.25, 0.25]]).log().unsqueeze(0)
    drawn = agent.sample_goals(torch.zeros(1, 3, 3), belief, samples, torch.Generator().manual_seed(0))
    assert drawn.shape == (1, 3, samples, 3)
    which = (drawn.unsqueeze(3) - agent.moa.table).abs().sum(4).argmin(3)
    assert torch.equal(drawn, agent.moa.table[which])
    share = torch.nn.functional.one_hot(which, 4).float().mean(2)
    assert (share - belief.exp()).abs().max() < 4.5 * 0.5 / samples**0.5
    oracle = lively(env_id=SMALL_HUNT, goal="oracle")
    truth = torch.randn(1, 3, oracle.moa.goal_size)
    assert torch.equal(oracle.sample_goals(truth, belief, 5, None), truth.unsqueeze(2).expand(-1, -1, 5, -1))


def test_a_player_with_an_encoder_can_be_played_by_bayes_and_not_the_other_way(script, small, tmp_path):
    sizes = {"episodes": 4, "match_episodes": 2, "num_envs": 2}
    for trained, played in (("encoder", "bayes"), ("encoder", "none"), ("bayes", "none"), ("bayes", "encoder")):
        trainer = script.Trainer(small(env_id=SMALL_HUNT, belief=trained))
        script.save_atomically(trainer.model(), tmp_path / "model.pt")
        if played == "encoder":
            with pytest.raises(script.UsageError, match="without an encoder"):
                script.evaluate(tmp_path / "model.pt", "nh", **sizes, belief=played)
            continue
        assert len(script.evaluate(tmp_path / "model.pt", "nh", **sizes, belief=played)["focal_returns"]) == 4
        agent = script.load_agent(tmp_path / "model.pt", options={"belief": played})
        assert agent.args.belief == agent.moa.args.belief == played


@pytest.mark.parametrize(
    "options, fragment",
    [
        ({"env_id": "msh-4x4-5p-2h2s", "assignment": "exclusive"}, "exclusive"),
        ({"env_id": SMALL_HUNT, "assignment": "exclusive", "goals": 2}, "exclusive"),
        ({"own_goal": True, "goal": "none"}, "own-goal"),
        ({"own_goal": True, "goal": "oracle"}, "own-goal"),
        ({"moa_share": 0.0}, "--moa-share must be positive"),
    ],
)
def test_what_does_not_go_together(script, small, options, fragment):
    with pytest.raises(script.UsageError, match=fragment):
        script.Trainer(small(**options))


# ---------------------------------------------------------------------------------------------------------------------
# Training of goals
# ---------------------------------------------------------------------------------------------------------------------
def test_straight_through_draws(script):
    """One-hot, as often as the probabilities say, with the gradient of the exact expectation at a low temperature."""
    logits, cost = torch.tensor([0.5, -1.0, 1.2]), torch.tensor([1.0, -2.0, 0.7])
    many = logits.expand(400_000, 3).clone().requires_grad_()
    drawn = script.straight_through(many, 0.2, torch.Generator().manual_seed(0))
    hard = drawn.detach()
    assert torch.allclose(hard.sum(1), torch.ones(())) and torch.allclose(hard.amax(1), torch.ones(()))
    probs = logits.softmax(0)
    assert (hard.mean(0) - probs).abs().max() < 4.5 * 0.5 / 400_000**0.5
    (gradient,) = torch.autograd.grad((drawn @ cost).sum(), many)
    exact = probs * (cost - (probs * cost).sum())  # of sum_g p_g c_g
    error = gradient.std(0) / 400_000**0.5
    assert ((gradient.mean(0) - exact).abs() < 4.5 * error + 0.02).all() and exact.abs().min() > 0.05
    warm = script.straight_through(many, 5.0, torch.Generator().manual_seed(0))
    (other,) = torch.autograd.grad((warm @ cost).sum(), many)
    assert other.mean(0).abs().max() < 0.6 * exact.abs().max()  # a high temperature is smoother, and biased


def stored(trainer):
    rows = trainer.buffer.batch + torch.arange(len(trainer.buffer))
    return rows, trainer.buffer.batch_of(rows, trainer.agent.relative, trainer.args.goal == "oracle")


def summed(script, trainer, batch):
    """Log-likelihood of whole matches [S, N, G], steps weighted, in plain Python, and each step's [S, L, N, G]."""
    probs = goal_probabilities(script, trainer.agent, batch.state)
    index = batch.actions.flatten(0, 1)[..., None, None].expand(-1, -1, probs.shape[2], 1)
    steps = probs.gather(3, index).squeeze(3).log().unflatten(0, batch.start.shape)
    return torch.where(batch.active.unsqueeze(3), batch.weight.unsqueeze(3) * steps, 0.0).sum(1), steps


@pytest.mark.parametrize("rule", ["all", "positive", "balanced"])
def test_em_is_the_likelihood_of_whole_matches(script, small, rule):
    """The loss is -log of the mean over goals of a match's weighted likelihood, a step; so is its gradient."""
    trainer, _ = play(script, small, env_id=SMALL_HUNT, co_players="self", match_episodes=2, goal_training="em",
                      moa_share=1.0, moa_buffer=rule)  # fmt: skip
    moa, (_, batch) = trainer.agent.moa, stored(trainer)
    loss, terms = script.moa_loss(moa, batch, 0.0, 1.0, torch.Generator().manual_seed(0))
    total, _ = summed(script, trainer, batch)
    seats, steps = (batch.weight > 0).any(1), float(batch.weight.sum())
    assert bool((batch.weight == batch.active).all()) == (rule == "all")
    marginal = -(total.logsumexp(2) - math.log(4))[seats].sum() / steps
    assert float(loss.detach()) == pytest.approx(float(marginal), rel=1e-4) and len(trainer.buffer) >= 3
    kl = (total.softmax(2) * (total.log_softmax(2) + math.log(4))).sum(2)[seats].mean()
    assert float(terms["moa/kl"]) == pytest.approx(float(kl), rel=1e-3) and 0.05 < float(kl) < math.log(4)
    (gradient,) = torch.autograd.grad(loss, moa.table)
    for place in ((0, 0), (1, 2), (3, 1)):
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                moa.table[place] += sign * 1e-2
                moved.append(-float(summed(script, trainer, batch)[0].logsumexp(2)[seats].sum()) / steps)
                moa.table[place] -= sign * 1e-2
        assert float(gradient[place]) == pytest.approx((moved[0] - moved[1]) / 2e-2, rel=0.05, abs=2e-4)


def test_share_of_the_steps(script, small):
    """A share of the steps is read, each time others; the loss is the one of a batch that has only those."""
    trainer, _ = play(script, small, env_id=SMALL_HUNT, co_players="self", match_episodes=2, goal_training="em")
    moa, (_, batch) = trainer.agent.moa, stored(trainer)
    losses = []
    for seed in (0, 1):
        read = torch.rand(batch.start.shape, generator=torch.Generator().manual_seed(seed)) < 0.4
        moa.args.moa_share = 0.4
        some, _ = script.moa_loss(moa, batch, 0.0, 1.0, torch.Generator().manual_seed(seed))
        moa.args.moa_share = 1.0
        part = batch._replace(active=batch.active & read.unsqueeze(2), weight=batch.weight * read.unsqueeze(2))
        same, _ = script.moa_loss(moa, part, 0.0, 1.0, torch.Generator().manual_seed(seed))
        whole, _ = script.moa_loss(moa, batch, 0.0, 1.0, torch.Generator().manual_seed(seed))
        assert float(some.detach()) == pytest.approx(float(same.detach()), rel=1e-5) != float(whole.detach())
        losses.append(float(some.detach()))
    assert 0.2 < float(read[batch.active.any(2)].float().mean()) < 0.6 and losses[0] != losses[1]


@pytest.mark.parametrize("way", ["gumbel", "amortised"])
def test_drawn_goals_are_one_for_a_seat_and_match(script, small, way, monkeypatch):
    """The loss at the goals drawn: each step's -log pi_hat at its seat's and match's goal, the KL once a match, and the
    subgoals' reconstruction; weights as the buffer gives them."""
    options = {"env_id": SMALL_HUNT, "co_players": "self", "moa_buffer": "balanced", "goal_training": way}
    options["moa_share"] = 1.0
    trainer, _ = play(script, small, **options)
    moa, (_, batch) = trainer.agent.moa, stored(trainer)
    shape = batch.actions.shape[0], trainer.game.num_players
    drawn, asked = torch.randint(4, shape, generator=torch.Generator().manual_seed(5)), []

    def dealt(logits, temperature, generator):
        asked.append((logits.detach(), temperature))
        return torch.nn.functional.one_hot(drawn, 4).float()

    monkeypatch.setattr(script, "straight_through", dealt)
    loss, terms = script.moa_loss(moa, batch, 0.7, 0.4, torch.Generator().manual_seed(0))
    total, steps = summed(script, trainer, batch)
    (logits, temperature), weight = asked[0], batch.weight / batch.weight.sum()
    assert temperature == 0.4 and weight[batch.active].std() > 0
    if way == "gumbel":
        torch.testing.assert_close(logits.double(), total, rtol=1e-3, atol=1e-3)
    chosen = steps.gather(3, drawn[:, None, :, None].expand(*steps.shape[:3], 1)).squeeze(3)
    nll = -float((weight * torch.where(batch.active, chosen, 0.0)).sum())
    assert float(terms["moa/nll"]) == pytest.approx(nll, rel=1e-4)
    kl = (logits.softmax(2) * (logits.log_softmax(2) + math.log(4))).sum(2)[(batch.weight > 0).any(1)]
    whole = (
        nll + float(kl.sum() / batch.weight.sum()) + 0.7 * float(terms["moa/recon"]) + float(terms.get("moa/guess", 0))
    )
    assert float(loss.detach()) == pytest.approx(whole, rel=1e-4) and ("moa/guess" in terms) == (way == "amortised")
    with torch.no_grad():
        own, others = trainer.agent.relative(batch.state)
        goal = moa.table[drawn].unsqueeze(1).expand(-1, batch.start.shape[1], -1, -1).flatten(0, 1)
        items = batch.state.items.unsqueeze(1).expand(-1, shape[1], -1)
        subgoals = moa.subgoal_logits(batch.state.players, items, own, others, goal).log_softmax(2)
    picked = subgoals.gather(2, batch.subgoal.flatten(0, 1).unsqueeze(2)).squeeze(2).unflatten(0, batch.start.shape)
    live = batch.active.any(2)  # every fourth step, of all seats
    picked, weight = picked[live][::4], weight[live][::4]
    recon = -float((weight * picked).sum() / weight.sum())
    assert float(terms["moa/recon"]) == pytest.approx(recon, rel=1e-4)


def test_guesses_know_nothing_of_the_future(script, small):
    """The encoder's guess before a step does not read that step; the match's guess reads all of it."""
    options = {"env_id": SMALL_HUNT, "co_players": "self", "goal_training": "amortised", "match_episodes": 2}
    trainer, _ = play(script, small, **options)
    moa, (_, batch) = trainer.agent.moa, stored(trainer)
    with torch.no_grad():
        past, whole = script.guesses(moa, batch)
        past = past[batch.active]
        where = batch.active.nonzero()
        for t in (0, 3, 11):
            changed = batch.actions.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 7
            other, other_whole = script.guesses(moa, batch._replace(actions=changed))
            other = other[batch.active]
            before = where[:, 1] <= t
            torch.testing.assert_close(other[before], past[before], rtol=1e-4, atol=1e-4)
            after = (where[:, 1] == t + 1) & batch.active[where[:, 0], t, where[:, 2]]
            assert ((other[after] - past[after]).abs().amax(1) > 1e-4).float().mean() > 0.9
            assert (other_whole - whole).abs().max() > 1e-3


@pytest.mark.parametrize("way", ["em", "gumbel"])
def test_goals_do_not_collapse(script, small, way):
    """Hunters of stags and hunters of hares, and the learner among them, which plays at random: each kind has goals of
    its own from the second episode on, on matches that were never trained on; goals know nothing of seats."""
    options = {"env_id": "msh-5x5-3p-2h2s", "co_players": "ns,nh", "match_episodes": 3, "total_timesteps": 10**6}
    options |= {"num_envs": 32, "num_steps": 64, "goals": 3, "moa_hidden_size": 32, "moa_learning_rate": 5e-3}
    options["moa_share"] = 1.0
    args = small(seed=1, moa_updates=120, moa_matches=16, goal_training=way, moa_capacity=300, **options)
    trainer = script.Trainer(args)
    for _ in range(4):
        trainer.rollout()
    for temperature in (1.0, 0.5):
        trainer.update_moa(temperature)
    moa, players = trainer.agent.moa, trainer.co_players
    trainer.memory = trainer.buffer.memory(moa, players.episode, trainer.memory)
    for _ in range(2):  # matches that were not in the buffer
        trainer.iteration = 2
        trainer.rollout()
    known = (players.episode > 0).unsqueeze(1) & (players.kind > 0)
    goal, kind = moa.log_belief(trainer.memory).argmax(2)[known], players.kind[known]
    votes = torch.zeros(3, 3).index_put((goal, kind), torch.ones(len(goal)), accumulate=True)
    assert len(goal) > 20 and float(votes.amax(1).sum()) / len(goal) > 0.9, votes
    statistics = {name: float(value) for name, value in trainer.goal_statistics().items()}
    kinds = torch.bincount(kind) / len(kind)
    most = -float((kinds * kinds.clamp(min=1e-9).log()).sum())  # what can be known, by who happens to play
    assert statistics["moa/usage_entropy"] > 0.5 and statistics["moa/kind_information"] > 0.8 * most > 0.2
    assert statistics["moa/seat_information"] < 0.2


def test_goal_statistics_by_hand(script, small):
    """Goals that are the kinds: their use and their information are the entropy of the kinds."""
    trainer = script.Trainer(small(env_id=SMALL_HUNT, co_players="nh,ns,self", num_envs=40, num_steps=1))
    players, count = trainer.co_players, defaultdict(int)
    players.episode = torch.arange(40) % 2
    likelihood = torch.zeros(40, 3, 4)
    for b, i in itertools.product(range(40), range(3)):
        name = players.names[int(players.kind[b, i])]
        likelihood[b, i, {"nh": 1, "ns": 3, "self": 0}[name]] = 500.0
        count[name] += b % 2
    trainer.memory = trainer.memory._replace(likelihood=likelihood)

    def entropy_of(names):
        counts = [count[name] for name in names]
        return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts)

    entropy, use = entropy_of(["nh", "ns"]), entropy_of(["nh", "ns", "self"])
    statistics = trainer.goal_statistics()
    assert float(statistics["moa/usage_entropy"]) == pytest.approx(use, abs=1e-4) and use > entropy > 0.5
    assert float(statistics["moa/kind_information"]) == pytest.approx(entropy, abs=1e-4)
    assert -1e-5 <= float(statistics["moa/seat_information"]) < 0.3
    trainer.memory = trainer.memory._replace(likelihood=torch.zeros(40, 3, 4))
    statistics = trainer.goal_statistics()
    assert float(statistics["moa/usage_entropy"]) == pytest.approx(math.log(4), abs=1e-4)
    assert float(statistics["moa/kind_information"]) == pytest.approx(0.0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Policy
# ---------------------------------------------------------------------------------------------------------------------
def test_plain_policy_gradient(script, lively):
    """`--pg`: the gradient is that of -mean(A log pi), whatever the policy that acted; the value loss is PPO's."""
    agent = lively(env_id=SMALL_HUNT, pg=True, norm_adv=False, vf_coef=0.7)
    state = agent.game.initial_state(30, torch.Generator().manual_seed(0))
    mask, memory = agent.game.action_mask(state), agent.moa.initial_memory(30)
    d = agent.act(state, mask, memory, None, torch.Generator().manual_seed(1), None)
    joined, total = agent.with_goals(d.others, d.goal)
    rows = {"own": d.own, "others": joined, "goal": total, "mask": mask, "action": d.action, "log_prob": d.log_prob - 3}
    rows = {name: value.flatten(0, 1) for name, value in rows.items()}
    rows["advantage"], rows["return"] = torch.randn(90), torch.randn(90)
    loss, terms = script.ppo_loss(agent.actor, agent.critic, rows, agent.args, torch.tensor(0.02))
    logits = agent.actor(rows["own"], rows["others"], rows["goal"]).masked_fill(~rows["mask"], -1e9)
    policy = torch.distributions.Categorical(logits=logits)
    value = agent.critic(rows["own"], rows["others"], rows["goal"]).squeeze(1)
    expected = -(rows["advantage"] * policy.log_prob(rows["action"])).mean() - 0.02 * policy.entropy().mean()
    expected = expected + 0.7 * 0.5 * (value - rows["return"]).square().mean()
    parameters = [*agent.actor.parameters(), *agent.critic.parameters()]
    for a, b in zip(*(torch.autograd.grad(x, parameters) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_own_goals_are_kept_for_a_period(script, small):
    """Drawn at the start of each episode and every third step, by the policy's probabilities; kept in between; and
    after the MOA was trained."""
    options = {"env_id": SMALL_HUNT, "co_players": "self,nh", "own_goal": True, "goal_period": 3, "moa_every": 1}
    trainer = shaken(script.Trainer(small(num_envs=32, num_steps=50, total_timesteps=10**5, **options)), 0.3)
    agent, act, shown = trainer.agent, trainer.agent.act, []

    def acting(state, mask, memory, *rest):
        shown.append((state, memory, act(state, mask, memory, *rest)))
        return shown[-1][2]

    agent.act = acting
    trainer.iterate()
    trainer.rollout()
    started = 0
    for k, (state, memory, d) in enumerate(shown):
        assert (d.chosen.sum(2) == 1).all()
        start = (state.time % 3 == 0).unsqueeze(1).expand_as(d.draws)
        assert torch.equal(d.draws, start) and torch.equal(memory.own.any(2), ~start)
        if k:
            assert torch.equal(d.chosen[~start], shown[k - 1][2].chosen[~start])
            started += int((d.chosen[start] != shown[k - 1][2].chosen[start]).any(1).sum())
    assert started > 500 and len(shown) == 100


def test_own_goals_follow_the_policy_and_nobody_else_sees_them(script, lively):
    agent = lively(env_id=SMALL_HUNT, own_goal=True)
    state = agent.game.initial_state(3000, torch.Generator().manual_seed(0)).rows(torch.zeros(3000, dtype=torch.int64))
    (own, others), memory = agent.relative(state), agent.moa.initial_memory(3000)
    goal, _, chosen, draws, log_prob = agent.infer_all(memory, own, others, None)
    joined, total = agent.with_goals(others, torch.cat([goal[..., :3], torch.zeros(3000, 3, 3)], 2))
    with torch.no_grad():
        probs = agent.actor.chooser(own, joined, total)[0].softmax(1)  # [N, G], the same in all games
    assert draws.all() and (chosen.mean(0) - probs).abs().max() < 4.5 * 0.5 / 3000**0.5
    torch.testing.assert_close(log_prob.exp(), (chosen * probs).sum(2), rtol=1e-4, atol=1e-5)
    both = (chosen[:, 0].argmax(1) == chosen[:, 1].argmax(1)).float().mean()
    assert abs(float(both - (probs[0] * probs[1]).sum())) < 0.05  # seats draw by themselves
    later = agent.remember(memory, state, torch.full((3000, 3), 4), *[torch.zeros(3000, dtype=torch.bool)] * 2)
    assert torch.equal(later.own, chosen)
    torch.testing.assert_close(goal[..., 3:], chosen @ agent.moa.table)
    joined, total = agent.with_goals(others, goal)
    other_goal = torch.cat([goal[..., :3], torch.roll(goal[..., 3:], 1, 0)], 2)
    joined_too, total_too = agent.with_goals(others, other_goal)
    assert torch.equal(joined, joined_too) and torch.equal(total[..., :3], total_too[..., :3])
    torch.testing.assert_close(total[..., 3:], goal[..., 3:])
    value = agent.value(state, memory, None)  # where goals are drawn V does not know them
    assert torch.allclose(value, value[:1], atol=1e-5)
    kept = agent.value(state, memory._replace(own=chosen), None)
    assert kept.std(0).min() > 1e-3
    drawn_later = agent.infer_all(memory._replace(key=memory.key + 1000), own, others, None)[2]
    assert not torch.equal(drawn_later, chosen)


def test_own_goals_are_drawn_anew_in_every_batch_and_seed(script, lively):
    """Memories have random numbers of their own; an agent that is made again, the same ones."""

    def keys(seed):
        agent = script.Agent(script.GridGame(SMALL_HUNT), lively(env_id=SMALL_HUNT, own_goal=True).args)
        agent.moa = script.MOA(agent.relative, dataclasses.replace(agent.args, seed=seed))
        return [agent.moa.initial_memory(50).key.flatten() for _ in range(3)]

    assert all(torch.equal(a, b) for a, b in zip(keys(1), keys(1), strict=True))
    drawn = torch.cat([*keys(1), *keys(2)])
    assert len(drawn) == len(drawn.unique()) == 6 * 50 * 3


def test_uniform_numbers(script):
    """Uniform, different for different counters, uncorrelated between neighbours."""
    numbers = script.uniform_numbers(torch.arange(-50_000, 50_000).unsqueeze(1), 4)
    assert numbers.min() > 0 and numbers.max() < 1 and numbers.shape == (100_000, 4)
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 19 + 5 * (2 * 19) ** 0.5
    centred = numbers - 0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1)):
        assert abs(float((centred * other).mean())) < 5 / 12 / 400_000**0.5


@pytest.mark.parametrize("own_goal", [False, True])
def test_first_ratio_is_one(script, small, own_goal, monkeypatch):
    """Before the first update of the policy the recomputed log-probability is that of the policy that acted, though
    the MOA has been trained in between; own goals count where they were drawn."""
    monkeypatch.setattr(script, "minibatches", lambda rows, epochs, parts, generator: itertools.repeat(rows, epochs))
    args = small(env_id=SMALL_HUNT, own_goal=own_goal, update_epochs=2, goal_period=4, moa_every=1, num_envs=6)
    trainer, calls = shaken(script.Trainer(args), 0.2), []
    loss = trainer.ppo_loss

    def watched(actor, critic, part, *rest):
        result = loss(actor, critic, part, *rest)
        calls.append((part, result[1], critic(part["own"], part["others"], part["goal"]).squeeze(1)))
        return result

    trainer.ppo_loss = watched
    for _ in range(5):
        calls.clear()
        table = trainer.agent.moa.table.clone()
        trainer.iterate()
        part, terms, value = calls[0]
        assert terms["approx_kl"].abs().max() < 1e-6 and len(part["action"]) > 20
        assert torch.allclose(terms["value"], 0.5 * (part["value"] - part["return"]).square(), atol=1e-5)
        assert calls[1][1]["approx_kl"].max() > 1e-6
    assert not torch.equal(table, trainer.agent.moa.table)
    assert (part["draws"].any() and not part["draws"].all()) == own_goal
