"""Which neurons stay at the base station, and which go together into an expert."""

from __future__ import annotations

import torch
from torch.nn import functional

from wdmoe.backbone.split.router import RidgeSolver, kept_mask

_ROUNDS = 12


def strongest(
    acts: torch.Tensor, down: torch.Tensor, weight: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split neurons by the mean square of what they add to the hidden state.

    Args:
        acts: (tokens, neurons) activations.
        down: (width, neurons).
        weight: (tokens,).
        count: neurons to pick.
    Returns:
        (count,) the strongest and (neurons - count,) the others, both ascending indices.
    """
    strength = (weight[:, None] * acts.square()).sum(0) * down.square().sum(0)
    order = strength.argsort(descending=True, stable=True)
    return order[:count].sort().values, order[count:].sort().values


def co_activation_clusters(acts: torch.Tensor, clusters: int, seed: int, sample: int) -> torch.Tensor:
    """Balanced spherical k-means of neurons by their activations over tokens.

    Args:
        acts: (tokens, neurons); `clusters` divides neurons.
        seed: the same seed gives the same clusters.
        sample: tokens looked at, at most.
    Returns:
        (neurons,) cluster of each; every cluster has the same size.
    """
    chooser = torch.Generator().manual_seed(seed)
    chosen = acts[torch.randperm(len(acts), generator=chooser)[:sample]]
    points = functional.normalize(chosen.abs().T, dim=1)  # the sign says nothing about when a neuron matters
    centres = _spread_centres(points, clusters, chooser)
    owner = torch.full((len(points),), -1)
    for _ in range(_ROUNDS):
        previous, owner = owner, balanced_assignment(points @ centres.T)
        if torch.equal(previous, owner):
            break
        centres = functional.normalize(torch.stack([points[owner == c].mean(0) for c in range(clusters)]), dim=1)
    return owner


def routed_clusters(
    acts: torch.Tensor, down: torch.Tensor, hidden: torch.Tensor, owner: torch.Tensor, top_k: int, rounds: int
) -> torch.Tensor:
    """Better clusters for a linear router: fit it, then give each neuron the expert that is kept when it matters.

    The two steps alternate, as in k-means; clusters stay balanced.

    Args:
        acts: (tokens, neurons), weighted by token.
        down: (width, neurons).
        hidden: (tokens, width), what the router sees.
        owner: (neurons,) clusters to start from.
        rounds: how often.
    Returns:
        (neurons,) cluster of each.
    """
    clusters = int(owner.max()) + 1
    router = RidgeSolver(hidden)
    energy = acts.square().mul_(down.square().sum(0))
    fair = energy.sum(0).clamp_min(1e-20).rsqrt()  # between counting neurons and counting energy
    for _ in range(rounds):
        members = owner.argsort(stable=True).view(clusters, -1)
        norms = expert_energy(acts, down, members).sqrt()
        kept = kept_mask(hidden @ router.solve(norms), top_k)
        owner = balanced_assignment((energy.T @ kept) * fair[:, None])
    return owner


def expert_energy(acts: torch.Tensor, down: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Squared norm of each expert's output.

    Args:
        acts: (tokens, neurons).
        down: (width, neurons).
        members: (experts, size) neurons of each expert.
    Returns:
        (tokens, experts).
    """
    outputs = (acts[:, neurons] @ down[:, neurons].T for neurons in members)
    return torch.stack([output.square().sum(1) for output in outputs], dim=1)


def balanced_assignment(score: torch.Tensor) -> torch.Tensor:
    """Give every row one column, all columns equally often, for a high total score: greedy, then by swaps.

    Within about 1 % of the optimal assignment on co-activations, without a dependency for it.

    Args:
        score: (rows, columns); columns divide rows.
    Returns:
        (rows,) column of each row.
    """
    rows, columns = score.shape
    owner = _greedy(score)
    everyone = torch.arange(rows)
    for _ in range(_ROUNDS):
        swapped = False
        for one in range(columns):
            for other in range(one + 1, columns):
                gain = score - score[everyone, owner][:, None]
                swapped |= _swap(owner, gain, one, other)
        if not swapped:
            break
    return owner


def _greedy(score: torch.Tensor) -> torch.Tensor:
    rows, columns = score.shape
    room = [rows // columns] * columns
    owner = [-1] * rows
    for flat in score.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(flat, columns)
        if owner[row] < 0 and room[column]:
            owner[row] = column
            room[column] -= 1
    return torch.tensor(owner)


def _swap(owner: torch.Tensor, gain: torch.Tensor, one: int, other: int) -> bool:
    """Exchange as many pairs between two columns as raises the total; changes `owner`."""
    ours, theirs = (owner == one).nonzero()[:, 0], (owner == other).nonzero()[:, 0]
    up = gain[ours, other].sort(descending=True, stable=True)
    down = gain[theirs, one].sort(descending=True, stable=True)
    count = int((up.values + down.values > 1e-6).sum())
    owner[ours[up.indices[:count]]] = other
    owner[theirs[down.indices[:count]]] = one
    return count > 0


def _spread_centres(points: torch.Tensor, clusters: int, chooser: torch.Generator) -> torch.Tensor:
    """Start points far from each other (k-means++)."""
    chosen = [int(torch.randint(len(points), (1,), generator=chooser))]
    while len(chosen) < clusters:
        distance = (1 - (points @ points[chosen].T).amax(1)).clamp_min(1e-6).square()
        chosen.append(int(torch.multinomial(distance, 1, generator=chooser)))
    return points[chosen]
