"""The loss and its classifier for more classes than one device holds: each rank has a block of the classes.

The features of all ranks are gathered, so that every rank has the classes of the global batch as rows of small tables.
What they need of W, b and the state is fetched from the ranks that have it; each rank searches winners among its own
classes, the best of all ranks are fetched, and from there on every rank computes the same loss. A rank keeps the
gradients of its own samples and of its own classes and writes its own part of the state: backward has no collective.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robustfast import checks, collectives, functional, process_groups, steps
from robustfast.backends import ops
from robustfast.cross_entropy import cross_entropy, linear_cross_entropy
from robustfast.gathering import Ranks, gather_batch
from robustfast.global_batch import best_pairs, by_rows, rows_to_search
from robustfast.losses import DiscriminativeLoss
from robustfast.reference import Terms
from robustfast.shards import Block, best_of_ranks


class ShardedLoss(NamedTuple):
    """The loss's ops, of all ranks' batches and all ranks' classes; weight, bias and state are this rank's part."""

    block: Block
    max_batch: int | None
    backend: str

    def discriminative_loss(self, input, input_noise, target, *arguments: Any) -> tuple[Tensor, ...]:
        block, ignore_index = self.block, arguments[-1]
        ranks = Ranks(block.group, "gather", self.max_batch)
        with torch.autocast(input.device.type, enabled=False):
            batch = gather_batch(input, input_noise, target, ranks, block.num_classes, ignore_index)
            winners_of = partial(winners, self.backend, block)
            loss, terms, slot, pull, *rest = by_rows(self.backend, block, winners_of, *batch.tensors, *arguments)
        return loss, terms, slot[batch.mine], pull[:, batch.mine].contiguous(), *rest

    def discriminative_loss_backward(
        self, grad_loss, input, input_noise, slot, pull, tables, classes, boundary_bias, _, weight_dtype, bias_dtype,
        norm, wanted,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        grad_input, grad_input_noise, *_ = steps.of(self.backend).discriminative_loss_backward(
            grad_loss * collectives.size(self.block.group),  # by which DistributedDataParallel divides
            input, input_noise, slot, pull, tables, classes, boundary_bias, self.block.num_classes, weight_dtype,
            bias_dtype, norm, [*wanted[:2], False, False],
        )  # fmt: skip
        of_classes = ((wanted[2], tables[2], weight_dtype), (wanted[3], boundary_bias, bias_dtype))
        grad_weight, grad_bias = (
            block_gradient(self.block, classes, grad_loss * per_row).to(dtype) if want else None
            for want, per_row, dtype in of_classes
        )
        return grad_input, grad_input_noise, grad_weight, grad_bias


def winners(
    backend: str, block: Block, taken: Tensor, classes: Tensor, mu: Tensor, weight_c: Tensor, bias_c: Tensor | None,
    weight: Tensor, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The winner (R,) among the classes of all ranks for each row that is taken, -1 where there is none."""
    score, winner = mu.new_full((len(mu),), -math.inf), mu.new_full((len(mu),), -1, dtype=torch.int32)
    if block.size:
        rows, present = rows_to_search(taken)
        local, mine = block.local(classes)
        place = torch.where(mine, local, -1)
        best = best_pairs(backend, rows, present, place, mu, weight_c, bias_c, weight, bias)
        score, winner = (
            torch.where(taken, none.index_copy(0, rows, of_rows), none)
            for none, of_rows in zip((score, winner), best, strict=True)
        )
    return best_of_ranks(score, winner, block)


def block_gradient(block: Block, classes: Tensor, per_row: Tensor) -> Tensor:
    """(K_r, ...): what the rows (R, ...) give to those winners and, with a minus, to those classes that are here."""
    grad = per_row.new_zeros(block.size, *per_row.shape[1:])
    if not block.size:
        return grad
    own, winner = classes.unbind()
    place, mine = block.local(torch.cat((winner, own)))
    mine = mine & (winner >= 0).repeat(2)
    elsewhere = torch.arange(len(place), device=place.device) % block.size  # zeros, not all of them to one place
    values = torch.cat((per_row, -per_row)).masked_fill(~mine.view(-1, *(1,) * (per_row.dim() - 1)), 0)
    return grad.index_put_((torch.where(mine, place, elsewhere),), values, accumulate=True)  # in a fixed order


class ShardedDiscriminativeLoss(DiscriminativeLoss):
    """DiscriminativeLoss together with its classifier, the classes of both split over the ranks of a group.

    Each rank has torch.chunk's block of the K classes, K_r of them, the last ranks perhaps none: parameters ``weight``
    (K_r, dim) and ``bias`` (K_r,), buffers ``centroids`` (K_r, dim) and ``seen`` (K_r,). What all ranks give it counts
    as one batch, of any number of samples each; every rank makes every call, evaluation's too. docs/scaling.md has
    its memory and its traffic.

    Gradients of the features are right after DistributedDataParallel's averaging; those of ``weight`` and ``bias`` are
    right as they are, so DistributedDataParallel and FSDP must leave this module out.

    ``state_dict()`` has DTensors, Shard(0), of the global shapes (K, dim) and (K,), under the names of an nn.Linear's
    and a DiscriminativeLoss's state together, and ``load_state_dict()`` takes such ones and whole tensors:
    :func:`robustfast.distributed.save_checkpoint` and ``load_checkpoint`` keep and reshard them. In one process
    without a group all tensors are plain and everything equals the plain loss.

    Args:
        num_classes: K >= 2, of all ranks together.
        dim: D, the number of penultimate features.
        arguments, keywords: the other arguments of :class:`~robustfast.DiscriminativeLoss`, but for ``exchange``.
            Without ``max_batch`` the host waits for the size of the largest batch at each step.
        process_group: as DiscriminativeLoss's; it is settled here, since it says which classes a rank has.
        bias: whether there is a bias.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *arguments: Any,
        process_group: Any,
        bias: bool = True,
        **keywords: Any,
    ) -> None:
        if "exchange" in keywords:
            raise TypeError("exchange: ShardedDiscriminativeLoss has one way, which gathers the samples")
        super().__init__(num_classes, dim, *arguments, process_group=process_group, **keywords)
        self.weight = nn.Parameter(torch.empty(self._classes_here(), dim))
        self.register_parameter("bias", nn.Parameter(torch.empty(self._classes_here())) if bias else None)
        self.reset_parameters()

    def forward(  # type: ignore[override]
        self, input: Tensor, input_noise: Tensor | None, target: Tensor
    ) -> Tensor | Terms:
        """The loss of the global batch, the same on every rank.

        Args:
            input: this rank's clean features (N, dim); N may be another on each rank, and 0.
            input_noise: features (N, dim) of the noisy views on all ranks, or None on all of them.
            target: labels (N,) among all K classes.

        Returns:
            The scalar loss, or all of :class:`~robustfast.functional.Terms` where ``return_terms`` holds.

        Raises:
            ValueError: also where some ranks have noisy views and others have none.
        """
        block = self._block()
        alone = block.group is None
        op_of = ops if alone else partial(ShardedLoss, block, self.max_batch)
        return self._loss(input, input_noise, target, self.weight, self.bias, op_of, least=2 if alone else 0)

    def cross_entropy(self, input: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The cross entropy of the logits of all K classes, its mean over the samples of all ranks that count.

        The logits (N, K) never exist; see :func:`robustfast.functional.linear_cross_entropy`, also for the arguments.
        """
        block = self._block()
        options: dict[str, Any] = {"ignore_index": self.ignore_index, "label_smoothing": label_smoothing}
        if block.group is None:
            return linear_cross_entropy(input, self.weight, target, self.bias, **options)
        target = checks.integer_labels(target)
        checks.linear_cross_entropy(input, self.weight, target, self.bias, label_smoothing)
        return cross_entropy(input, target, self.weight, self.bias, block, max_batch=self.max_batch, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bias={self.bias is not None}"

    def reset_parameters(self) -> None:
        """Forgets all centroids and draws weight and bias as nn.Linear does, the same for any number of ranks."""
        super().reset_parameters()
        if self.weight.is_meta:
            return
        block = self._block()
        seed = torch.randint(2**63 - 1, (), device=self.weight.device)
        collectives.all_reduce(seed, "MAX", block.group)
        ids = torch.arange(block.first, block.first + block.size, device=seed.device)
        zero, bound = torch.zeros((), dtype=self.weight.dtype, device=seed.device), 1 / math.sqrt(self.dim)
        for draw, parameter in enumerate(self.parameters()):  # bias has a draw of its own
            table = parameter.detach()
            functional.uniform_noise(
                zero.expand_as(table), bound, seed=seed, sample_ids=ids, draw=draw, clip=None, out=table
            )

    def as_shard(self, local: Tensor) -> Tensor:
        """A tensor (K_r, ...) of this rank's classes as a DTensor (K, ...), Shard(0), that shares its memory.

        In one process without a group the tensor itself. For what belongs to the classes and is kept elsewhere, such
        as an optimizer's momentum of ``weight``.
        """
        block = self._block()
        if block.group is None:
            return local
        from torch.distributed.tensor import DeviceMesh, DTensor, Shard

        mesh = DeviceMesh.from_group(block.group, local.device.type)
        whole = torch.empty(block.num_classes, *local.shape[1:], device="meta")
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())

    def _own(self, whole: Tensor) -> Tensor:
        """This rank's part (K_r, ...) of a tensor (K, ...) of all classes, plain or a DTensor; any other as it is."""
        block = self._block()
        if hasattr(whole, "full_tensor"):
            from torch.distributed.tensor import Shard

            if block.group is not None and whole.device_mesh == self.as_shard(self.seen).device_mesh:  # type: ignore[attr-defined]
                return whole.redistribute(placements=[Shard(0)]).to_local()  # type: ignore[attr-defined]
            whole = whole.full_tensor()
        return whole[block.first : block.first + block.size] if whole.shape[:1] == (block.num_classes,) else whole

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in (*self._parameters, *self._buffers):
            if prefix + name in destination:
                destination[prefix + name] = self.as_shard(destination[prefix + name])

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        names = [prefix + name for name in (*self._parameters, *self._buffers)]
        own = {name: self._own(state_dict[name]) for name in names if name in state_dict}
        super()._load_from_state_dict({**state_dict, **own}, prefix, *rest)

    def _block(self) -> Block:
        block = Block.of(self.num_classes, process_groups.resolve(self.process_group))
        weight = self._parameters.get("weight")
        if weight is not None and weight.shape[0] != block.size:
            raise ValueError(
                f"process_group: expected the ranks over which {self.num_classes} classes were split, {len(weight)} of"
                f" them here, got {collectives.size(block.group)} ranks, with {block.size} here; make the module after"
                " init_process_group"
            )
        return block

    def _classes_here(self) -> int:
        return self._block().size
