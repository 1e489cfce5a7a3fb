"""Muon: orthogonalised updates for matrices; AdamW for all other parameters.

After Keller Jordan (2024, https://kellerjordan.github.io/posts/muon): Nesterov momentum, then five
Newton-Schulz iterations.

torch.optim.Muon (torch >= 2.9) accepts whole matrices only. A run needs one optimizer that also updates
vectors and works on sharded matrices, so that averages and checkpoints treat it like any other. The tests
compare this implementation with torch's.

Shapes: M rows, N columns of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_gather_into_tensor, get_rank, get_world_size
from torch.distributed.tensor import DTensor

from lit_transdiff.checkpoints.averages import Averaging, flat, loss_of

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of x, x^3 and x^5
ITERATIONS = 5


def orthogonal(matrices: Tensor) -> Tensor:
    """About U V^T of matrices U S V^T [..., M, N]: singular values become 0.7 to 1.2. In bfloat16 on GPUs."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x.mT if tall else x  # makes the product below smaller
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    add_product = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = add_product(x, add_product(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def direction(matrices: Tensor) -> Tensor:
    """Updates of matrices [..., M, N] at learning rate 1, scaled to change outputs alike for any shape."""
    rows, columns = matrices.shape[-2:]
    return orthogonal(matrices) * max(1, rows / columns) ** 0.5


def directions_by_shape(matrices: Sequence[Tensor]) -> list[Tensor]:
    """The update of each matrix [M, N], those of one shape in one product."""
    found: dict[int, Tensor] = {}
    for shape in dict.fromkeys(matrix.shape for matrix in matrices):
        places = [i for i, matrix in enumerate(matrices) if matrix.shape == shape]
        found |= dict(zip(places, direction(torch.stack([matrices[i] for i in places])), strict=True))
    return [found[i] for i in range(len(matrices))]


def direction_of_rows(momentum: DTensor) -> Tensor:
    """This rank's rows of the update of a matrix sharded by FSDP (ceil(M / ranks) rows per rank)."""
    rows = momentum.shape[0]
    each = -(-rows // momentum.device_mesh.size())
    start = min(momentum.device_mesh.get_local_rank() * each, rows)
    return direction(momentum.full_tensor())[start : start + momentum.to_local().shape[0]]


def direction_of_part(momentum: Tensor, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """This rank's part of the updates of matrices that ZeRO 1 has concatenated and split equally.

    Only matrices that overlap this part are computed here.
    """
    length = momentum.numel()
    first = get_rank() * length
    whole = momentum.new_empty(length * get_world_size())
    all_gather_into_tensor(whole, momentum)
    part, start = torch.zeros_like(momentum), 0
    for rows, columns in shapes:
        end = start + rows * columns
        low, high = max(start, first), min(end, first + length)
        if low < high:
            update = direction(whole[start:end].view(rows, columns)).flatten()
            part[low - first : high - first] = update[low - start : high - start]
        start = end
    return part


class Muon(torch.optim.AdamW):
    """Muon for parameter groups with ``shapes`` of matrices, AdamW for the others; settings as in ``AdamW``.

    The tensors of such a group are matrices, their rows on this rank (FSDP), or one flat part of all (ZeRO
    1).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = loss_of(closure)
        groups = self.param_groups
        for group in groups:
            if "shapes" in group:
                self.move(group)
        self.param_groups = [group for group in groups if "shapes" not in group]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def move(self, group: dict[str, Any]) -> None:
        """Update a group of matrices once."""
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if not self.state[p]:
                self.state[p].update(step=torch.zeros((), device=p.device), momentum=torch.zeros_like(p))
        if not params:
            return
        states = [self.state[p] for p in params]
        grads, momenta = [p.grad for p in params], [state["momentum"] for state in states]
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        updates = self.updates(torch._foreach_lerp(grads, momenta, MOMENTUM), group)
        weights = [flat(p) for p in params]
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(weights, [update.flatten() for update in updates], alpha=group["lr"])

    def updates(self, nesterov: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """This rank's updates from the gradients of Nesterov's momentum."""
        if isinstance(nesterov[0], DTensor):
            return [direction_of_rows(one) for one in nesterov if isinstance(one, DTensor)]
        if nesterov[0].ndim == 1:
            return [direction_of_part(one, group["shapes"]) for one in nesterov]
        # On GPUs, small products cost their launch. CPUs keep one by one, with the same rounding as ever.
        return directions_by_shape(nesterov) if nesterov[0].is_cuda else [direction(one) for one in nesterov]


class AveragedMuon(Averaging, Muon):
    """Muon with averaged weights."""
