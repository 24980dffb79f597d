"""The stages of ``smoke`` with an engine: does every adapter act, and what do its parts cost?"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from tests.gpu.parts import Report, make_basis, make_policy, on_gpu, random_cards, write_config

EPISODES = 16  # that write, and decode at once
TOKENS = 256  # that each then samples
ACTIVE = 8  # adapters that decode at once in the stage "slots"


def eager(folder: Path, report: Report) -> None:
    """Receipts: does every written adapter act, and how far are engine and writer apart?"""
    _acts(folder, report, eager=True)


def graphs(folder: Path, report: Report) -> None:
    """The same with compiling and CUDA graphs."""
    _acts(folder, report, eager=False)


def slots(folder: Path, report: Report) -> None:
    """Decode with few adapters in many slots: the grid of vLLM's kernels grows with the slots.

    ``specialize_active_lora`` of vLLM captures graphs by the number of adapters that act.
    """
    for count, specialize in ((ACTIVE, False), (64, False), (64, True)):
        name = f"{count} slots{', specialized' if specialize else ''}"
        report[f"{name}: tokens/s"] = _rate_of(folder, count, specialize)


def _acts(folder: Path, report: Report, eager: bool) -> None:
    began = time.perf_counter()
    basis = make_basis(folder)
    policy = make_policy(folder, basis, EPISODES, eager)
    report["start_s"] = time.perf_counter() - began
    writer, asked = policy.writer(write_config()), random_cards(basis, EPISODES + 1)
    writer.write(asked[EPISODES:])
    began = time.perf_counter()
    results = writer.write(asked[:EPISODES])
    report["writes_per_s"] = EPISODES / (time.perf_counter() - began)
    asyncio.run(_measure(policy, results, folder, report))
    policy.close()


async def _measure(policy: Any, results: Any, folder: Path, report: Report) -> None:
    keys = await _with_receipts(policy, results)
    stats = policy.stats()
    report |= {"receipts_passed": stats.receipts_passed, "receipts_unseen": stats.receipts_unseen}
    apart = []
    for key, result in zip(keys, results, strict=True):
        scored = await policy.score(result.probe.token_ids, key)
        ours = scored[-len(result.probe.after) :]
        apart.append(max(abs(a - b) for a, b in zip(ours, result.probe.after, strict=True)))
    report["apart_largest"] = max(apart)
    await _decode_rates(policy, keys, report)
    await _install_time(policy, keys, results, report)
    await _refreshes(policy, folder, report)


async def _with_receipts(policy: Any, results: Any) -> list[Any]:
    """Install all; raises where a receipt fails."""
    from actors.types import AdapterKey

    keys = [AdapterKey(0, f"e{number}", 1) for number in range(len(results))]
    for key, result in zip(keys, results, strict=True):
        await policy.install(key, result.weights, result.probe)
    return keys


async def _install_time(policy: Any, keys: Any, results: Any, report: Report) -> None:
    """Of installs that are asked for at once, without receipts."""
    from actors.types import AdapterKey

    await policy.release(keys)
    began = time.perf_counter()
    waiting = [
        policy.install(AdapterKey(0, f"i{number}", 1), result.weights, None)
        for number, result in enumerate(results)
    ]
    await asyncio.gather(*waiting)
    report["install_ms"] = (time.perf_counter() - began) / len(results) * 1e3


async def _decode_rates(policy: Any, keys: Any, report: Report) -> None:
    """One adapter a sequence against none, as many sequences."""
    from actors.types import AdapterKey

    rates = []
    for name, names in (("none", [AdapterKey(0, "", 0)] * len(keys)), ("adapters", keys)):
        await _decode(policy, names, 8)
        rates.append(await _decode(policy, names, TOKENS if on_gpu() else 16))
        report[f"decode_{name}_tokens_per_s"] = rates[-1]
    report["decode_adapters_over_none"] = rates[1] / rates[0]


async def _decode(policy: Any, keys: Any, tokens: int) -> float:
    """Tokens a second of one sequence for each of ``keys``, all at once."""
    from actors.types import Sampling

    began = time.perf_counter()
    asked = (
        policy.generate((5, 6, 7 + number), Sampling(1.0, tokens, number, "act"), key)
        for number, key in enumerate(keys)
    )
    sampled = sum(len(reply.token_ids) for reply in await asyncio.gather(*asked))
    return sampled / (time.perf_counter() - began)


async def _refreshes(policy: Any, folder: Path, report: Report) -> None:
    """To other weights and back: the log-probs move, and come back."""
    import torch

    from actors.types import AdapterKey
    from actors.write.frozen_llama import read_tensors

    ids, tensors = tuple(range(5, 105)), read_tensors(folder, "")
    scored, seconds = [torch.tensor(await policy.score(ids, AdapterKey(0, "", 0)))], []
    for version, factor in ((1, 1.5), (2, 1.0)):
        new = {name: tensor * factor if "mlp" in name else tensor for name, tensor in tensors.items()}
        began = time.perf_counter()
        await policy.refresh(version, new, complete=True)
        seconds.append(time.perf_counter() - began)
        scored.append(torch.tensor(await policy.score(ids, AdapterKey(version, "", 0))))
    gigabytes = sum(tensor.nbytes for tensor in tensors.values()) / 1e9
    report |= {"refresh_s": min(seconds), "refresh_gb_per_s": gigabytes / min(seconds)}
    moved, back = (float((scored[0] - now).abs().max()) for now in scored[1:])
    report |= {"refresh_moved": moved, "refresh_back": back}
    if not back < moved / 10:
        raise RuntimeError("the log-probs did not follow the weights of a refresh, and back")


def _rate_of(folder: Path, count: int, specialize: bool) -> float:
    from actors.engine import start

    plain = start.engine_arguments

    def arguments(*words: Any) -> Any:
        made = plain(*words)
        made.specialize_active_lora = specialize
        return made

    start.engine_arguments = arguments
    basis = make_basis(folder)
    policy = make_policy(folder, basis, count, eager=not on_gpu())
    start.engine_arguments = plain
    results = policy.writer(write_config()).write(random_cards(basis, ACTIVE))

    async def rate() -> float:
        keys = await _with_receipts(policy, results)
        await _decode(policy, keys, 8)
        return await _decode(policy, keys, TOKENS if on_gpu() else 16)

    found = asyncio.run(rate())
    policy.close()
    return found
