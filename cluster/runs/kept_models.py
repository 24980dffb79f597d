"""The checkpoints that a run has kept, as the tracker registers them."""

from __future__ import annotations

import socket
from pathlib import Path

from cluster.common.errors import CheckpointError
from cluster.runs.checkpoint import Checkpoint, best_checkpoint, list_checkpoints, load_checkpoint, score_of
from configs.schema import RunConfig


def kept_models(config: RunConfig, run_dir: Path) -> list[dict[str, str]]:
    """The whole checkpoints that a run has kept, oldest first. The newest and the best (by held-out F1, where it was measured) have these aliases."""
    if config.tracking.models == "off":
        return []
    whole: list[Checkpoint] = []
    for folder in list_checkpoints(run_dir):
        try:
            whole.append(load_checkpoint(folder))
        except CheckpointError:  # who resumes or evaluates it hears why
            continue
    best = best_checkpoint(run_dir)
    models: list[dict[str, str]] = []
    for checkpoint in whole:
        folder, state, score = checkpoint.folder, checkpoint.state, score_of(checkpoint.folder)
        aliases = [
            alias for alias, holder in (("newest", whole[-1].folder), ("best", best)) if holder == folder
        ]
        values = {
            "registered": f"engram-{config.name}",
            "name": f"{run_dir.name}-{folder.name}",
            "folder": str(folder),
            "weights": str(checkpoint.model),
            "host": socket.gethostname(),
            "base": config.model.name,
            "step": str(state.step),
            "policy_version": str(state.version),
            "upload": str(config.tracking.models == "upload"),
            "aliases": " ".join(aliases),
        }
        models.append(values | ({} if score is None else {"held_out_f1": f"{score:.6f}"}))
    return models
