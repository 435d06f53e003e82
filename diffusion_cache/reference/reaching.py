"""A 2-D reaching task with two ways to do it: through either of two gates in a wall, to a goal behind it.

A point starts below the wall and moves towards the position that it is told, by at most SPEED a step. It succeeds
if it comes to the goal within LIMIT steps without touching the wall. The scripted demonstrator takes either gate as
often as the other, however far it is, so that a policy which averages over its demonstrations runs into the wall.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SPEED = 0.12
WALL = 0.1  # half its thickness; it lies along y = 0
GATE = 0.1  # half of each opening
NEAR = 0.1  # of the goal
LIMIT = 40
APPROACH = 0.2  # the demonstrator aims for points so far before and behind the wall
ARRIVED = 0.05
WOBBLE = 0.02  # standard deviation of what throws the demonstrator off
PATH = 26  # steps after which most demonstrations have ended
PARTS = 12  # points of a move at which it is looked whether the wall is touched


class Scene(NamedTuple):
    """Of n episodes: starts, goals [n, 2] and the gates' centres [n, 2] along x."""

    start: Tensor
    goal: Tensor
    gates: Tensor

    def observation(self, before: Tensor, now: Tensor) -> Tensor:
        """What is known at a moment, [n, 5, 2]: the position a step before and now, both gates, the goal."""
        gates = torch.stack([self.gates, torch.zeros_like(self.gates)], dim=-1)  # [n, 2, 2]
        return torch.cat([before[:, None], now[:, None], gates, self.goal[:, None]], dim=1)


def scenes(n: int, generator: torch.Generator) -> Scene:
    """n random scenes in [−1, 1]²."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    start = torch.stack([uniform(-0.7, 0.7), uniform(-0.9, -0.6)], dim=1)
    goal = torch.stack([uniform(-0.7, 0.7), uniform(0.6, 0.9)], dim=1)
    return Scene(start, goal, torch.stack([uniform(-0.85, -0.2), uniform(0.2, 0.85)], dim=1))


def move(position: Tensor, target: Tensor) -> Tensor:
    """Where a step towards the target leads, [n, 2]."""
    way = target - position
    return position + way * (SPEED / way.norm(dim=1, keepdim=True).clamp_min(SPEED))


def touched(scene: Scene, before: Tensor, after: Tensor) -> Tensor:
    """Whether a move in a straight line runs into the wall, bool [n]."""
    share = torch.linspace(0, 1, PARTS)[:, None, None]
    points = before + share * (after - before)  # [parts, n, 2]
    open_here = ((points[..., :1] - scene.gates).abs() < GATE).any(dim=-1)
    return ((points[..., 1].abs() < WALL) & ~open_here).any(dim=0)


def arrived(scene: Scene, position: Tensor) -> Tensor:
    """Whether the goal is reached, bool [n]."""
    return (position - scene.goal).norm(dim=1) < NEAR


class Demonstrator:
    """Goes to a point before a gate, through it, and on to the goal; which gate, is drawn at the start."""

    def __init__(self, scene: Scene, generator: torch.Generator):
        count = len(scene.start)
        gate = scene.gates.gather(1, torch.randint(2, (count, 1), generator=generator))[:, 0]
        before, behind = (torch.stack([gate, torch.full_like(gate, y)], dim=1) for y in (-APPROACH, APPROACH))
        self.waypoints = torch.stack([before, behind, scene.goal], dim=1)  # [n, 3, 2]

    def act(self, position: Tensor, stage: Tensor) -> tuple[Tensor, Tensor]:
        """The next position, [n, 2], and the stage (waypoint) that then is on, int64 [n]."""
        rows = torch.arange(len(position))
        stage = stage + ((position - self.waypoints[rows, stage]).norm(dim=1) < ARRIVED)
        stage = stage.clamp_max(self.waypoints.shape[1] - 1)
        return move(position, self.waypoints[rows, stage]), stage


def demonstrations(n: int, horizon: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Of n demonstrations, what was known at a random step and what was then done.

    Returns: observations [n, 5, 2], actions [n, horizon, 2]. The demonstrator was thrown off a little at each step
    until then, so that ways back are shown too, and not after.
    """
    scene = scenes(n, generator)
    demonstrator = Demonstrator(scene, generator)
    position, stage = scene.start, torch.zeros(n, dtype=torch.long)
    states = [(position, position, stage)]
    for _ in range(PATH - 1):
        wobble = WOBBLE * torch.randn(n, 2, generator=generator)
        target, stage = demonstrator.act(position, stage)
        before, position = position, target + wobble
        states.append((before, position, stage))
    chosen = torch.randint(PATH, (n,), generator=generator)
    before, position, stage = (torch.stack(parts)[chosen, torch.arange(n)] for parts in zip(*states, strict=True))
    observation = scene.observation(before, position)
    actions = []
    for _ in range(horizon):
        position, stage = demonstrator.act(position, stage)
        actions.append(position)
    return observation, torch.stack(actions, dim=1)
