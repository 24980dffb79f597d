"""DeepSpeed behind a few verbs: forward, backward, step, full tensors, and reductions over ranks.

The caller owns the accumulation boundary: any number of forward/backward pairs, then one ``step``. Gradients
are *sums* over microbatches and ranks. (DeepSpeed averages over ranks; ``backward`` undoes that.) So a loss
that is scaled by the global denominator gives the full batch's gradient.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from configs.schema import LearnerConfig
from learner.model import Inputs
from learner.types import LearnerError

_REDUCE_BUCKET = 2**25  # elements; DeepSpeed's default of 5e8 would allocate 2 GB on a CPU machine


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips by the global norm and skips a step whose gradients are not finite.

    It does both only under ZeRO 0, where DeepSpeed does not.
    """

    def __init__(self, params: Iterator[nn.Parameter], config: LearnerConfig) -> None:
        fused = config.gpus_per_worker > 0  # without the temporary copies of all masters, 4 bytes a parameter
        super().__init__(
            params,
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.weight_decay,
            fused=fused or None,
        )
        self.is_fused = fused
        self.guard_norm = config.max_grad_norm if config.zero_stage == 0 else None
        self.grad_norm = math.nan

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self.guard_norm is not None:
            params = [param for group in self.param_groups for param in group["params"]]
            self.grad_norm = float(nn.utils.clip_grad_norm_(params, self.guard_norm))
            if not math.isfinite(self.grad_norm):
                return None
        return super().step(closure)


class TrainingEngine:
    """One rank of a DeepSpeed engine around ``model``.

    Collective: every rank makes the same calls in the same order.
    """

    def __init__(self, model: nn.Module, config: LearnerConfig, rank: int, world_size: int) -> None:
        if config.zero_stage == 0 and config.dtype != "float32":
            raise LearnerError(
                f"learner.zero_stage=0 trains in float32 only, got dtype={config.dtype!r}: "
                "use zero_stage 1 (it keeps float32 masters)"
            )
        self.device = torch.device("cuda", 0) if config.gpus_per_worker > 0 else torch.device("cpu")
        self.rank, self.world_size = rank, world_size
        self.model = model
        self.zero_stage = config.zero_stage
        _join(rank, world_size, self.device)
        self.optimizer = GuardedAdamW((param for param in model.parameters() if param.requires_grad), config)
        self.engine: Any = deepspeed.initialize(
            model=model, optimizer=self.optimizer, config=deepspeed_config(config), dist_init_required=False
        )[0]
        self._materialize()

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """See PolicyModel.forward."""
        logp, entropy = self.engine(*inputs)
        return logp, entropy

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.world_size)

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear the gradients. Return the norm before clipping.

        A norm that is not finite changes nothing and raises LearnerError.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        norm = self.optimizer.grad_norm if self.zero_stage == 0 else float(self.engine.get_global_grad_norm())
        if not math.isfinite(norm):
            raise LearnerError(
                f"the gradient is not finite (norm {norm}) at learning rate {learning_rate}: "
                "the step was skipped, weights and optimizer are as before; look at the rewards and "
                "log-probs of this batch, lower learner.learning_rate, or resume from a checkpoint"
            )
        return norm

    def reset_optimizer(self) -> None:
        """Forget the moments and the step count, as after construction."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def full_tensors(
        self, parameters: list[tuple[str, nn.Parameter]], copy: bool, wanted: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the full values on the CPU, contiguous, in the training dtype; none where not ``wanted``.

        Without ``copy`` they may be the parameters' own memory, which the next step overwrites. Collective
        under ZeRO-3: all ranks iterate to the end, and a rank that wants none copies none.
        """
        for name, tensor in self.full_values(parameters):
            if wanted:
                yield name, tensor.to("cpu", copy=copy or self.zero_stage == 3).contiguous()

    def full_values(self, parameters: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the full values where they are, each to be read before the next is asked for.

        Collective under ZeRO-3: all ranks iterate to the end.
        """
        for name, param in parameters:
            with deepspeed.zero.GatheredParameters([param]) if self.zero_stage == 3 else nullcontext():
                yield name, param.detach()

    @torch.no_grad()
    def load_tensors(self, parameters: list[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]) -> None:
        """Set the parameters that act, not the optimizer's float32 masters. Collective under ZeRO-3."""
        for name, param in parameters:
            if self.zero_stage == 3:
                with deepspeed.zero.GatheredParameters([param], modifier_rank=0):
                    param.data.copy_(tensors[name])
            else:
                param.data.copy_(tensors[name])

    def sums(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def maxima(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _reduce(self, values: tuple[float, ...], operation: dist.ReduceOp.RedOpType) -> tuple[float, ...]:
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=operation)
        return tuple(tensor.tolist())

    def _materialize(self) -> None:
        """Create Adam's state now, in zeros.

        torch and DeepSpeed create it at the first step, and a checkpoint may be saved or loaded before that.
        """
        for flat in self._flat_parameters():
            self.optimizer.state[flat] = {
                # a fused step counts on the parameters' device
                "step": torch.tensor(0.0, device=flat.device if self.optimizer.is_fused else None),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.zero_stage in (1, 2):
            # safe_get and safe_set (checkpoint.py) get their view of the state here (DeepSpeed 0.19.8)
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> list[Tensor]:
        if self.zero_stage == 0:
            return [param for group in self.optimizer.param_groups for param in group["params"]]
        if self.zero_stage == 3:
            return list(self.engine.optimizer.fp32_partitioned_groups_flat)
        return list(self.engine.optimizer.single_partition_of_fp32_groups)


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """Return DeepSpeed's JSON. The caller accumulates gradients, so the batch sizes here mean nothing."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm if config.zero_stage else 0.0,  # ZeRO 0: GuardedAdamW clips
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": _REDUCE_BUCKET,
            "allgather_bucket_size": _REDUCE_BUCKET,
            "stage3_prefetch_bucket_size": _REDUCE_BUCKET,
            "stage3_param_persistence_threshold": 0,
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }


def _join(rank: int, world_size: int, device: torch.device) -> None:
    """Join the process group. MASTER_ADDR and MASTER_PORT name it when there is more than one rank.

    Keeps DeepSpeed from compiling: its shared-memory collective would be built by a C++ compiler at first
    use, for a minute, and gloo does the same work without one.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("LOCAL_RANK", "0")
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        deepspeed.ops.__compatible_ops__[builder.NAME] = False
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if world_size == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend, init_method="env://", rank=rank, world_size=world_size)
    if dist.get_world_size() != world_size:
        raise LearnerError(
            f"this process belongs to a group of {dist.get_world_size()} ranks, "
            f"the learner needs {world_size}: use a fresh process"
        )
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
