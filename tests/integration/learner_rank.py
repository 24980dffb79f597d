"""One rank of a two-rank learner, as a script: ``learner_rank.py RANK PORT MODEL OUT``.

Trains under each ZeRO stage N, and goes on from the checkpoint of one rank in OUT/one-N. Writes weights and
reports to OUT.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import safetensors.torch
import torch

from actors.fast_weights.basis import compute_basis_from_checkpoint
from configs.schema import FastWeightsConfig
from tests.unit.learner_cases import UNWEIGHTED, free, group, learner


def main() -> None:
    rank, port, model_path, out = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0")
    basis = compute_basis_from_checkpoint(model_path, FastWeightsConfig(rank=3, last_layers=2), 0)
    groups = [group(basis, (1.0, 0.0, 0.25))]
    for zero_stage in (0, 1, 2, 3):
        made = learner(model_path, basis, free(zero_stage=zero_stage), rank=rank, world_size=2)
        reports = [made.step(groups)]
        made.save(out / f"checkpoint-{zero_stage}")
        reports.append(made.step(groups))
        made.load(out / f"checkpoint-{zero_stage}")
        reports.append(made.step(groups))
        safetensors.torch.save_file(
            made.weights(trainable_only=False), out / f"weights-{zero_stage}-{rank}.safetensors"
        )
        (out / f"reports-{zero_stage}-{rank}.json").write_text(
            json.dumps([asdict(report) for report in reports])
        )
        made.load(out / f"one-{zero_stage}")
        made.save(out / f"again-{zero_stage}")
        made.step(groups)
        safetensors.torch.save_file(
            made.weights(trainable_only=False), out / f"grown-{zero_stage}-{rank}.safetensors"
        )
    tied = replace(UNWEIGHTED, kl_coefficient=0.5, minibatches=2)
    made = learner(model_path, basis, free(zero_stage=3), tied, rank=rank, world_size=2)
    made.step(groups)
    made.save(out / "tied")
    made.step([group(basis, (0.5, 0.5))])
    made.save(out / "idle")


if __name__ == "__main__":
    main()
    # No rank leaves while the other still speaks to it, and none lets its threads be torn down as it ends.
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)
