"""The search of hop_mcts.py one tree, one node and one network call at a time: the reference for its batched search.

Written to be read, and as fast as this way of searching allows without losing that: the game is stepped on plain lists,
only nodes that are reached a second time get a prior and co-players' actions, and nothing that is known is computed
again. Fed the same random numbers it makes the same visits as Agent.plan (tests/test_sequential_search.py); it takes
Agent.plan's arguments, so that `agent.plan = functools.partial(sequential_search.plan, agent)` puts it in its place.
Shapes in comments: B games, N seats, A actions, K goal samples, Z goal, X and Y features, E memory, S simulations."""

import itertools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hop_mcts as script


class Position(NamedTuple):
    """The state of one game as plain numbers; the fields are those of GameState."""

    players: list[int]  # N cells, -1 once left
    items: list[int]  # M cells, -1 once gone
    time: int
    first_hunt: int


class PlainGame:
    """The rules of a GridGame for one Position at a time."""

    def __init__(self, game: script.GridGame):
        self.game, self.msh = game, game.family == "msh"
        self.next_cell, self.legal_moves = game.next_cell.tolist(), game.legal_moves.tolist()
        self.item_kind, self.item_action = game.item_kind.tolist(), game.item_action.tolist()
        self.quota, self.share = game.quota.tolist(), game.share.tolist()

    def position(self, state: script.GameState) -> Position:
        """The one game of `state`."""
        return Position(*(field[0].tolist() for field in state))

    def state(self, position: Position) -> script.GameState:
        """`position` as a state of one game."""
        return script.GameState(*(torch.tensor([field]) for field in position))

    def step(self, position: Position, actions: list[int]) -> tuple[Position, list[float], bool, bool]:
        """Next position, the N rewards, terminated and truncated."""
        players, items, time, first_hunt = position
        rewards, after = [0.0] * len(players), [self.next_cell[c][a] for c, a in zip(players, actions, strict=True)]
        items, time = items[:], time + 1
        for m, cell in enumerate(items):
            if cell < 0:
                continue
            takers = [i for i, a in enumerate(actions) if players[i] == cell and a == self.item_action[m]]
            if len(takers) < self.quota[m]:
                continue
            items[m] = -1
            rewards = [reward + self.game.bonus for reward in rewards]
            for i in takers:
                rewards[i] += self.share[m] / len(takers)
            if self.msh:
                first_hunt = first_hunt or time
                for i in takers:
                    after[i] = -1
        terminated = max(items) < 0
        if self.msh:
            over = first_hunt > 0 and time >= first_hunt + script.COUNTDOWN
            terminated = terminated or max(after) < 0 or over
        return (
            Position(after, items, time, first_hunt),
            rewards,
            terminated,
            time >= self.game.horizon and not terminated,
        )

    def mask(self, position: Position) -> list[list[bool]]:
        """N times A: which actions are legal."""
        kinds, masks = range(len(self.game.item_names)), []
        for cell in position.players:
            here = {kind for kind, c in zip(self.item_kind, position.items, strict=True) if c == cell >= 0}
            masks.append(self.legal_moves[cell] + [kind in here for kind in kinds])
        return masks


class Node:
    """A position in the tree: how it was reached, and, once it was expanded, what was tried there."""

    def __init__(self, number: int, depth: int, position: Position, reward: float):
        self.number, self.depth, self.position, self.reward = number, depth, position, reward
        self.value, self.goes_on = 0.0, True
        self.goals = self.memory = None  # Goals; Memory [1, N, E + 1], if goals are inferred again within the search
        self.own = self.others = None  # features [N, X] and [N, N-1, Y] of every seat
        self.prior = None  # A numbers, -1 where illegal; None until the node is expanded
        self.joint = None  # N actions, the focal player's left open

    def expand(self, prior: list[float], joint: list[int]) -> None:
        self.prior, self.joint, self.children = prior, joint, [None] * len(prior)
        self.visits, self.total = [0] * len(prior), [0.0] * len(prior)


class Goals(NamedTuple):
    """What is believed of the seats' goals."""

    theirs: Tensor  # [N-1, Z] means of the co-players, as policy and value are told them
    total: Tensor  # [Z] their sum
    drawn: Tensor  # [N, Z] what the MOA plays


class SequentialSearch:
    """One tree for one player of one game."""

    def __init__(self, agent: script.Agent, plain: PlainGame, state: script.GameState, seat: int, draws: Tensor):
        """`state` is of one game; `draws` [S + 1, N] in 0..1 decide what co-players do: row s in the node that
        simulation s makes (0: the root), column k what the co-player k seats after `seat` does there."""
        self.agent, self.args, self.plain, self.draws = agent, agent.args, plain, draws.tolist()
        self.seat, self.co_players = seat, agent.relative.others[seat]  # [N-1] the seats after `seat`, in order
        self.root = Node(0, 0, plain.position(state), 0.0)
        self.refresh = self.args.goal_refresh if self.args.goal == "inferred" else 0

    def run(self, mean: Tensor, log_std: Tensor, drawn: Tensor, memory: script.Memory, prior: list, value: float):
        """A mean returns (an untried action counts as the root's mean), and A visits, of the root's actions. At the
        root: goals `mean`, `log_std`, `drawn` [N, Z], `memory` [1, N, E + 1], `prior` (A numbers) and `value`."""
        root, self.noise = self.root, (drawn - mean) / log_std.exp() if self.refresh else None
        root.goals, root.memory, root.value = self.goals(mean, drawn), memory, value
        self.look(root)
        self.expand(root)
        root.prior = prior
        for simulation in range(1, self.args.num_simulations + 1):
            self.simulate(simulation)
        mean = (root.value + sum(root.total)) / (1 + self.args.num_simulations)
        return [t / n if n else mean for t, n in zip(root.total, root.visits, strict=True)], root.visits

    def simulate(self, number: int) -> None:
        """Down from the root to an action that was not tried before, or after which nothing follows; and back up."""
        node, path = self.root, []
        while True:
            if node.prior is None:
                self.expand(node)
            action = self.choose(node)
            path.append((node, action))
            child = node.children[action]
            if child is None:
                child = node.children[action] = self.step(node, action, number)
                break
            if not child.goes_on:
                break
            node = child
        future = child.value
        for node, action in reversed(path):
            future = node.children[action].reward + self.args.gamma * future
            node.visits[action] += 1
            node.total[action] += future

    def choose(self, node: Node) -> int:
        """The action to try next: the prior's at first, then PUCT's; at the root everything legal once before."""
        count, legal = sum(node.visits), [a for a, p in enumerate(node.prior) if p >= 0]
        if count == 0:
            return max(legal, key=node.prior.__getitem__)
        mean = (node.value + sum(node.total)) / (1 + count)
        q = [t / n if n else mean for t, n in zip(node.total, node.visits, strict=True)]
        low, weight = min(q), self.args.puct_c * count**0.5
        span = max(max(q) - low, 1e-8)
        scores = [(x - low) / span + weight * p / (1 + n) for x, p, n in zip(q, node.prior, node.visits, strict=True)]
        untried = [a for a in legal if not node.visits[a]] if node is self.root else []
        return max(untried or legal, key=scores.__getitem__)

    def goals(self, mean: Tensor, drawn: Tensor) -> Goals:
        """Goals of means and draws [N, Z]."""
        theirs = mean[self.co_players]
        return Goals(theirs, theirs.sum(0), drawn)

    def look(self, node: Node) -> None:
        """What the networks read of the node's position."""
        own, others = self.agent.relative(self.plain.state(node.position))
        node.own, node.others = own[0], others[0]

    def expand(self, node: Node) -> None:
        """The focal player's prior, and what the co-players do, once and for all of the focal player's actions."""
        mask, goals = self.plain.mask(node.position), node.goals
        joint, seats = [script.STAY] * len(mask), self.co_players.tolist()
        probs = self.probabilities(self.evaluate(self.agent.actor, node), mask[self.seat])
        for j, u in zip(seats, self.draws[node.number][1:], strict=True):
            if self.args.co_player_model == "uniform":
                chance = [float(legal) for legal in mask[j]]
            else:
                logits = self.agent.moa.decoder(node.own[j], node.others[j], goals.drawn[j])
                chance = self.probabilities(logits, mask[j])
            upto = list(itertools.accumulate(chance))
            joint[j] = next(a for a, sum_of_chances in enumerate(upto) if sum_of_chances > u * upto[-1])
        node.expand([p if legal else -1.0 for p, legal in zip(probs, mask[self.seat], strict=True)], joint)

    def probabilities(self, logits: Tensor, mask: list[bool]) -> list[float]:
        """softmax of `logits` [A] over the legal actions."""
        return script.masked(logits, torch.tensor(mask)).softmax(0).tolist()

    def evaluate(self, network: script.RelativeNetwork, node: Node) -> Tensor:
        """[outputs] of the focal player's policy or value network."""
        others = torch.cat([node.others[self.seat], node.goals.theirs], 1)
        return network(node.own[self.seat], others, node.goals.total)

    def step(self, node: Node, action: int, number: int) -> Node:
        """The node that the focal player's `action` leads to, with its value."""
        args, joint = self.args, node.joint[:]
        joint[self.seat] = action
        position, rewards, terminated, truncated = self.plain.step(node.position, joint)
        reward = (1.0 - args.prosocial) * rewards[self.seat] + args.prosocial * sum(rewards) / len(rewards)
        child = Node(number, node.depth + 1, position, reward * args.reward_scale)
        child.goals, child.memory = node.goals, node.memory
        lives = position.players[self.seat] >= 0 and not terminated
        child.goes_on = lives and not truncated and child.depth < args.max_depth
        if lives:
            self.look(child)
            if self.refresh:
                self.infer(node, joint, child)
            child.value = self.evaluate(self.agent.critic, child).item()
        return child

    def infer(self, node: Node, joint: list[int], child: Node) -> None:
        """The memory along the simulated path, and every `--goal-refresh` steps the goals again."""
        agent, no = self.agent, torch.tensor([False])
        child.memory = agent.remember(node.memory, self.plain.state(node.position), torch.tensor([joint]), no, no)
        if child.depth % self.refresh == 0:
            mean, log_std = (x[0] for x in agent.infer(child.memory, child.own[None], child.others[None], None))
            child.goals = self.goals(mean, mean + self.noise * log_std.exp())


@torch.inference_mode()
def plan(agent, state, mask, memory, seats, goals, prior, value, generator) -> tuple[Tensor, Tensor]:
    """Agent.plan, its arguments and results, by one search after another; it draws the same random numbers."""
    args, n, k, plain = agent.args, agent.game.num_players, agent.args.num_goal_samples, PlainGame(agent.game)
    drawn = agent.sample_goals(*goals, k, generator)  # [B, N, K, Z]
    decisions = seats.nonzero().tolist()
    games, seat = seats.nonzero(as_tuple=True)
    legal = mask[games, seat].repeat_interleave(k, 0)
    root = script.masked(prior, mask).softmax(2)[games, seat].repeat_interleave(k, 0)  # [D * K, A]
    if agent.training and args.dirichlet_fraction:
        noise = torch._standard_gamma(torch.full_like(root, args.dirichlet_alpha), generator) * legal + 1e-30 * legal
        root = torch.lerp(root, noise / noise.sum(1, keepdim=True), args.dirichlet_fraction)
    draws = torch.rand(len(root), args.num_simulations + 1, n, generator=generator)
    root = root.masked_fill(~legal, -1.0).tolist()
    q_plan, visits = prior.new_zeros(2, *mask.shape)
    for tree, ((game, me), sample) in enumerate(itertools.product(decisions, range(k))):
        search = SequentialSearch(agent, plain, state.rows(slice(game, game + 1)), me, draws[tree])
        beliefs = goals[0][game], goals[1][game], drawn[game, :, sample]
        remembered = script.Memory(*(total[game : game + 1] for total in memory))
        q, tried = search.run(*beliefs, remembered, root[tree], value[game, me].item())
        q_plan[game, me] += torch.tensor(q) / k
        visits[game, me] += torch.tensor(tried)
    return q_plan * mask, visits * mask
