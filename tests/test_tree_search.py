"""The tree search of hop_mcts.py: against a sequential one, in closed form, and batched."""

import pytest
import torch

from benchmarks import planner_speed
from conftest import load_script

GAMES = {  # options of the game
    "msh-4x4-4h1s": {},
    "msg-4x4-3p-2d": {"prosocial": 0.3},
    "msh-3x3-2p-1h2s": {"max_depth": 2},
    "msh-3x2-6p-2h2s": {"max_depth": 1},
    "msh-1x1-2p-0h1s": {},
    "msh-4x4-1p-4h1s": {},
}
SIMULATIONS = 30
TREES = 12


@pytest.fixture(scope="module")
def script():
    return load_script("hop_mcts")


class Scene:
    """TREES trees of one game, some steps after its start, with networks in float64."""

    def __init__(self, script, monkeypatch, env_id, simulations=SIMULATIONS, **options):
        plain = script.clock_features
        monkeypatch.setattr(script, "clock_features", lambda *given: plain(*given).double())
        self.script = script
        game = script.GridGame(env_id, horizon=6)
        game.relative = game.relative.double()
        options = {"env_id": env_id, "horizon": 6, "num_simulations": simulations, **options}
        self.args = script.checked(script.Args(**options), game)
        torch.manual_seed(3)
        self.agent = script.Agent(game, self.args).double()
        for weight in self.agent.parameters():
            torch.nn.init.normal_(weight, std=0.3)
        generator = torch.Generator().manual_seed(5)
        state = game.start(200, generator)
        for _ in range(2):
            actions = script.random_actions(game.action_mask(state), generator)
            state, _, terminated, truncated = game.step(state, actions)
        plays = (~terminated & ~truncated)[:, 0].nonzero()[:TREES, 0]
        self.state = type(state)(*(field[plays] for field in state))
        sizes = (len(plays), game.num_players, self.agent.moa.goal_size)
        self.goals = torch.randn(sizes, generator=generator, dtype=torch.float64)
        self.drawn = torch.randn(sizes, generator=generator, dtype=torch.float64)
        sizes = (simulations + 1, len(plays), game.num_players)
        self.draws = torch.rand(sizes, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def search(self, which=slice(None), sequential=False):
        """Q and visits of the trees `which`."""
        agent = self.agent
        state = type(self.state)(*(field[which] for field in self.state))
        goals = self.goals[which]
        draws = self.draws[:, which].flatten(0, 1)
        own, views = agent.game.features(state)
        others, goal = agent.inputs(views.double(), goals)
        value = agent.critic(own.double(), others, goal)[:, 0, 0]
        given = (agent, state, goals, self.drawn[which], draws)
        if sequential:
            return planner_speed.sequential_search(given, value, self.args)
        return self.script.search(self.script.Model(*given), value, self.args)


@pytest.mark.parametrize("env_id", GAMES)
def test_search_equals_a_sequential_one(script, monkeypatch, env_id):
    """Visit counts in every tree, and means of returns but for rounding."""
    scene = Scene(script, monkeypatch, env_id, **GAMES[env_id])
    q, visits = scene.search()
    assert len(visits) >= 4
    assert (visits.sum(1) == SIMULATIONS).all()
    expected, counts = scene.search(sequential=True)
    assert torch.equal(visits, counts)
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=0)


def test_a_tree_does_not_depend_on_the_batch(script, monkeypatch):
    """Not on its place, nor on which other trees there are, nor on how many."""
    scene = Scene(script, monkeypatch, "msh-4x4-4h1s")
    q, visits = scene.search()
    order = torch.randperm(len(q), generator=torch.Generator().manual_seed(1))
    for which in (order, order[:3], torch.cat([order, order, order])):
        again = scene.search(which)
        assert torch.equal(again[1], visits[which])
        torch.testing.assert_close(again[0], q[which], atol=1e-9, rtol=0)


def test_depth_limit_is_one_step_of_exact_planning(script, monkeypatch):
    """At depth 1 an action's Q is r + gamma V', the same at every visit."""
    scene = Scene(script, monkeypatch, "msh-3x2-6p-2h2s", simulations=9, max_depth=1)
    q, _ = scene.search()
    game = scene.agent.game
    mask = game.action_mask(scene.state)[:, 0]
    compared = 0
    for tree in range(len(q)):
        root = type(scene.state)(*(field[tree].tolist() for field in scene.state))
        given = (root, 0.0, scene.goals[tree], scene.drawn[tree], scene.draws[:, tree])
        with torch.no_grad():
            plain = planner_speed.PlainTree(scene.agent, planner_speed.PlainGame(game), *given)
            plain.expand(plain.root)
            for action in mask[tree].nonzero()[:, 0].tolist():
                child = plain.step(plain.root, action, 1)
                expected = child.reward + scene.args.gamma * child.value
                assert q[tree, action] == pytest.approx(expected, abs=1e-6)
                compared += 1
    assert compared > 20


class Bandit:
    """A model without state: each action pays what `payoffs` [T, A] say, and nothing follows."""

    def __init__(self, payoffs, prior):
        self.payoffs = payoffs
        self.prior = prior
        self.num_actions = payoffs.shape[1]

    def expand(self, nodes):
        return self.prior[nodes % len(self.prior)]

    def step(self, nodes, actions, new):
        reward = self.payoffs.gather(1, actions[:, None])[:, 0]
        return reward, torch.zeros_like(reward), torch.zeros_like(actions) > 0


def bandit_search(script, payoffs, prior, simulations, constant=1.25):
    payoffs = torch.tensor([payoffs], dtype=torch.float64)
    prior = torch.tensor([prior], dtype=torch.float64)
    args = script.Args(num_simulations=simulations, puct_c=constant, gamma=0.9)
    q, visits = script.search(Bandit(payoffs, prior), payoffs.new_zeros(1), args)
    return q[0].tolist(), visits[0].tolist()


def test_bandit(script):
    """Every legal action once; then, without a bonus, the best one."""
    q, visits = bandit_search(script, [1.0, 3.0, 2.0, 9.0], [0.5, 0.2, 0.3, -1.0], 10, 0.0)
    assert visits == [1, 8, 1, 0]
    assert q == pytest.approx([1.0, 3.0, 2.0, 27 / 11])  # not tried: the mean of 11, V = 0 of them


def test_bandit_without_time_for_all(script):
    """First the best prior, then the next one by PUCT among those that were not tried."""
    _, visits = bandit_search(script, [1.0, 3.0, 2.0], [0.5, 0.2, 0.3], 2)
    assert visits == [1, 0, 1]


def test_equal_payoffs_are_visited_by_the_prior(script):
    """With the same Q everywhere visits go as the prior."""
    _, visits = bandit_search(script, [0.0, 0.0, 0.0], [0.6, 0.3, 0.1], 1000)
    assert visits == pytest.approx([600, 300, 100], abs=3)


def test_illegal_actions_are_never_tried(script, monkeypatch):
    scene = Scene(script, monkeypatch, "msh-4x4-4h1s", simulations=60)
    _, visits = scene.search()
    mask = scene.agent.game.action_mask(scene.state)[:, 0]
    assert (visits[~mask] == 0).all()
    assert (visits[mask] > 0).all()


def test_scores_of_any_seat(script, monkeypatch):
    """Relabelling the seats of a game changes no scores: the order of co-players is cyclic."""
    scene = Scene(script, monkeypatch, "msh-4x4-4h1s", simulations=12, num_goal_samples=2)
    game = scene.agent.game
    goals = scene.goals
    log_std = torch.full_like(goals, -30.0)
    shown = []
    plain = script.uniform
    monkeypatch.setattr(
        script, "uniform", lambda shape, generator: plain(shape, generator).double()
    )
    for shift in range(game.num_players):
        state = scene.state._replace(players=scene.state.players.roll(shift, 1))
        games = torch.arange(len(goals))
        chosen = (games, torch.full_like(games, shift % game.num_players))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            features = (x.double() for x in game.features(state))
            seen = (*features, goals.roll(shift, 1), log_std)
            shown.append(script.scores(scene.agent, state, seen, chosen, generator))
    for q in shown[1:]:
        torch.testing.assert_close(q, shown[0], atol=1e-9, rtol=0)
    assert shown[0].std() > 0.01


def test_environments_without_a_simulator_are_refused(script):
    with pytest.raises(script.UsageError, match="hop_onestep.py"):
        script.train(script.Args(env_id="mpe2.simple_tag_v3", plan_update="hop"))


def test_learns_the_small_stag_hunt(script, tmp_path, monkeypatch):
    """Self-play leaves the hares (1 for each) within 30,000 steps."""
    monkeypatch.chdir(tmp_path)
    args = script.Args(co_players="self", total_timesteps=32768, num_simulations=8)
    metrics = script.train(args)
    assert metrics["charts/episodic_return"] > 1.8


def test_v_learns_from_the_whole_match(script):
    """Lambda-returns (lambda 0.8) of every seat by V as it is now, backwards step by step."""
    generator = torch.Generator().manual_seed(1)
    steps, games, seats = 7, 2, 3
    game = script.GridGame(f"msh-3x3-{seats}p-2h1s")
    agent = script.Agent(game, script.checked(script.Args(env_id="msh-3x3-3p-2h1s"), game))
    state = game.start(steps * games, generator)
    own, views = game.features(state)
    others, goal = agent.inputs(views, torch.randn(len(own), seats, 8, generator=generator))
    shape = (steps, games)
    rows = {"own": own, "others": others, "goal": goal}
    match = {name: x.unflatten(0, shape) for name, x in rows.items()}
    for name in ("reward", "final_value"):
        match[name] = torch.randn(steps, games, seats, generator=generator)
    match["goes_on"] = torch.rand(steps, games, seats, generator=generator) < 0.7
    match["learner"] = torch.rand(steps, games, seats, generator=generator) < 0.6
    last = torch.randn(games, seats, generator=generator)
    for name in script.LEARNT[3:]:
        match.setdefault(name, match["reward"])
    value = agent.critic(*(match[name] for name in ("own", "others", "goal")))[..., 0]
    coming = last  # lambda-return of the next step, which at the end is V
    expected = torch.zeros(steps, games, seats)
    for t in reversed(range(steps)):
        following = value[t + 1] if t + 1 < steps else last
        mixed = 0.2 * following + 0.8 * coming
        after = torch.where(match["goes_on"][t], mixed, match["final_value"][t])
        coming = expected[t] = match["reward"][t] + 0.99 * after
    found = script.match_rows(agent, match, last)
    torch.testing.assert_close(found["return"], expected[match["learner"]])
    assert found["own"].equal(match["own"][match["learner"]])


@pytest.mark.parametrize("init", [True, False])
def test_a_search_is_trusted_within_a_match(script, init, tmp_path, monkeypatch):
    """With --init it acts alone, trusted; V learns from all steps since the match began."""
    monkeypatch.chdir(tmp_path)
    small = {"env_id": "msh-2x2-2p-2h1s", "hidden_size": 8, "num_simulations": 4}
    args = script.Args(**small, num_envs=2, num_steps=4, total_timesteps=16, co_players="self")
    run = script.train(args)["run"]
    seen = []

    def watch(agent, reservoir, **names):
        kept = len(reservoir["reward"]) if reservoir else 0
        seen.append((agent.plan_mode, float(agent.plan_slope), kept))

    words = ["--init", run, "--num-steps", "8", "--total-timesteps", "24"]
    script.train(script.parse_arguments(words) if init else args, watch)
    if init:
        assert seen == [("hop", 1.0, 8), ("hop", 1.0, 16), ("hop", 1.0, 24)]
    else:
        assert all(slope != 1.0 and not kept for _, slope, kept in seen)
