"""A co-player for rock, paper, scissors with a goal to infer: the move that it prefers.

    python hop_onestep.py --env-id pettingzoo.classic.rps_v2 \\
        --co-players benchmarks.biased_rps:Biased
"""

import torch
from torch import Generator, Tensor

PREFERENCE = 0.5  # probability of the preferred move; else any move, uniformly


class Biased:
    """Each of R rows prefers one of A moves for a match, drawn at the first step of the match."""

    preferred = 0  # int64 [R]
    begins = torch.tensor(True)  # bool [R] a match has started, and nothing is drawn for it yet

    def start_match(self, which: Tensor) -> None:
        """Takes bool [R]: rows whose match starts. The next call draws for them."""
        self.begins = which | self.begins

    def __call__(self, observation, action_mask: Tensor, clock, generator: Generator) -> Tensor:
        """Actions int64 [R], for bool [R, A] `action_mask`; observation and clock are not read."""
        rows, moves = action_mask.shape
        device = action_mask.device
        drawn = torch.randint(moves, (rows,), generator=generator, device=device)
        self.preferred = torch.where(self.begins, drawn, self.preferred)
        self.begins = torch.zeros_like(self.begins)
        anything = torch.randint(moves, (rows,), generator=generator, device=device)
        follows = torch.rand(rows, generator=generator, device=device) < PREFERENCE
        return torch.where(follows, self.preferred, anything)
