"""What each process of a run holds, in bytes, from the configuration and the model's shape alone.

    learner rank      weights, float32 masters and Adam's moments (held); a pass, or a step (at the peak)
    rollout worker    weights, adapter slots, key-value cache (held); a step of the engine, or a write
    object store      the weights of two versions, the B of the episodes that wait for the learner

The formulas follow DeepSpeed 0.19 (ZeRO 0 to 3), torch's AdamW and vLLM 0.32, as this code calls them. What
they leave out: the libraries themselves (``EMPTY_GIB`` of a process, ``CONTEXT_GIB`` of a GPU), and the
allocators' waste. Checked: tests/unit/test_sizing.py (DeepSpeed's own estimators, autograd's own count of
what it keeps) and tests/integration/test_sizing_measured.py (the growth of a real process).
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.schema import CPU_KV_CACHE_GIB, EngineConfig, FastWeightsConfig, LearnerConfig, RunConfig
from configs.shapes import ModelShape

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}
EMPTY_GIB = 1.0  # resident in a process that has imported torch and vLLM or DeepSpeed, and done nothing
CONTEXT_GIB = 0.6  # CUDA's own, of each process on a GPU, with NCCL's buffers
GRAPHS_GIB = 0.6  # of vLLM's CUDA graphs
WRITES = 4  # of one episode: a guess, as it depends on the task
REFRESH_BYTES_S = 1.2e9  # through Ray's object store into an engine: an estimate, see cluster/README.md
_BUCKET = 2**25  # numbers that DeepSpeed reduces at a time (learner/engine.py)
_SUBGROUP = 10**9  # numbers that ZeRO-3 steps at a time
_HEAD_CHUNK = {"cpu": 2**23, "gpu": 2**26}  # logits at a time (learner/head.py)
_GPU_STEP_TOKENS = 8192  # actors/engine/start.py
_CPU_STEP_TOKENS = 64
_WRITTEN_TOKENS = 8192  # of the cards that are written at once
_SLOT_WIDTHS = (1, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes that a process holds for one purpose. ``passing``: only at its peak, not all the time."""

    name: str
    bytes: float
    passing: bool = False


def held(parts: tuple[Part, ...]) -> float:
    """Bytes held all the time."""
    return sum(part.bytes for part in parts if not part.passing)


def peak(parts: tuple[Part, ...]) -> float:
    """Bytes at the peak. What is passing does not come together: the largest counts."""
    return held(parts) + max((part.bytes for part in parts if part.passing), default=0.0)


# --- the learner ------------------------------------------------------------------------------------------


def trained_parameters(shape: ModelShape, config: LearnerConfig) -> int:
    """Numbers that the learner trains."""
    if config.trainable == "full":
        return shape.parameters
    if config.trainable == "lora":
        return _factors(shape, config)
    return min(config.trainable_layers, shape.num_layers) * shape.layer_parameters + shape.hidden_size


def _factors(shape: ModelShape, config: LearnerConfig) -> int:
    """Numbers in the factors of a LoRA: A [rank, d_in] and B [d_out, rank] of each matrix."""
    hidden, inner, query, key = shape.hidden_size, shape.intermediate_size, shape.query_width, shape.key_width
    attention = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query}
    widths = (hidden + attention.get(name, inner) for name in config.lora_targets)
    return config.lora_rank * shape.num_layers * sum(widths)


def learner_parts(shape: ModelShape, config: LearnerConfig, reference: bool) -> tuple[Part, ...]:
    """Of one rank. ``reference``: with the second model of a KL term."""
    width, ranks, stage = BYTES[config.dtype], config.workers, config.zero_stage
    total, trained = shape.parameters, trained_parameters(shape, config)
    if config.trainable == "lora":
        total += trained  # the factors stand beside the weights
    share = trained / ranks if stage else trained
    weights = total * width / (ranks if stage == 3 else 1)
    if config.gpus_per_worker == 0 and config.trainable == "last_layers":
        weights += trained * width  # the model's file stays mapped, beside DeepSpeed's own trained weights
    masters = 0 if stage == 0 else 4 * share
    return (
        Part("weights", weights + (total * width if reference else 0)),
        Part("optimizer", masters + 8 * share),
        Part("activations", _pass_bytes(shape, config) + _gradients(config, trained, share), passing=True),
        Part("gradients, step", _step_bytes(config, trained, share), passing=True),
    )


def _gradients(config: LearnerConfig, trained: int, share: float) -> float:
    """Gradients as a backward pass leaves them, with the bucket that is being reduced."""
    width = BYTES[config.dtype]
    kept = share if config.zero_stage >= 2 else trained
    return kept * width + _buckets(config, trained)


def _buckets(config: LearnerConfig, trained: int) -> float:
    """What DeepSpeed reduces in; it stays over the step."""
    return 2 * min(_BUCKET, trained) * BYTES[config.dtype] if config.zero_stage else 0


def _step_bytes(config: LearnerConfig, trained: int, share: float) -> float:
    """The most that an optimizer step adds: the gradients as float32, then Adam's temporaries.

    On a GPU the step is fused and has none. ZeRO-3 steps a part at a time.
    """
    width, on_gpu = BYTES[config.dtype], config.gpus_per_worker > 0
    if config.zero_stage == 0:
        return trained * width + (0 if on_gpu else 8 * trained)
    kept = _gradients(config, trained, share)
    part = min(share, _SUBGROUP) if config.zero_stage == 3 else share
    flat = part * width
    as_float = 4 * part if width < 4 else 0
    before = kept + flat + as_float
    # On a CPU the allocator keeps what it gave to small gradients: they are gone, their pages are not.
    left = _buckets(config, trained) if on_gpu and config.zero_stage < 3 else kept
    after = left + 4 * part + (0 if on_gpu else 8 * part)
    return max(before, after)


def _pass_bytes(shape: ModelShape, config: LearnerConfig) -> float:
    """What a forward and backward pass of one microbatch keeps, up to its head."""
    tokens, width = config.microbatch_tokens, BYTES[config.dtype]
    layers = shape.num_layers
    if config.trainable == "last_layers":
        layers = min(config.trainable_layers, layers)
    stream = tokens * shape.hidden_size * width
    layer = tokens * layer_activations(shape, width)
    layers_kept = layers * stream + layer if config.gradient_checkpointing else layers * layer
    gathered = 2 * shape.layer_parameters * width if config.zero_stage == 3 else 0
    place = "gpu" if config.gpus_per_worker > 0 else "cpu"
    head = 3 * 4 * max(_HEAD_CHUNK[place], shape.vocab_size) + 2 * stream
    if config.trainable == "full":  # the gradient of the embedding, summed in float32
        head += 4 * shape.embedding_parameters
    return layers_kept + gathered + head


def layer_activations(shape: ModelShape, width: int) -> float:
    """Bytes a token that autograd keeps of one decoder layer of transformers, with SDPA.

    Norms are computed in float32: the stream as float32, normed as float32, and its product.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.query_width, shape.key_width
    norms = 2 * (hidden * (4 + width + width) if width < 4 else 2 * hidden * 4)
    if shape.normed:
        norms += (query + key) * (4 + 2 * width if width < 4 else 8)
    attention = (2 * query + 2 * key + query) * width
    return norms + attention + 4 * inner * width


# --- a rollout worker -------------------------------------------------------------------------------------


def slot_bytes(shape: ModelShape, fast: FastWeightsConfig, engine: EngineConfig, width: int) -> float:
    """All adapter slots of an engine. A and B are stored once a slot, padded to vLLM's width."""
    rank = next(wide for wide in _SLOT_WIDTHS if wide >= fast.rank)
    hidden, inner = shape.hidden_size, shape.intermediate_size
    # vLLM wraps gate and up together, and each has slots of its own
    projections = {"gate_proj", "up_proj"} if {"gate_proj", "up_proj"} & set(fast.projections) else set()
    matrices = len(projections) + ("down_proj" in fast.projections)
    return engine.slots * fast.last_layers * matrices * rank * (hidden + inner) * width


def snapshot_numbers(shape: ModelShape, fast: FastWeightsConfig) -> int:
    """Numbers of B in one revision."""
    rows = {"gate_proj": shape.intermediate_size, "up_proj": shape.intermediate_size}
    each = sum(rows.get(name, shape.hidden_size) for name in fast.projections)
    return fast.rank * fast.last_layers * each


def worker_parts(shape: ModelShape, config: RunConfig, gpu_gib: float) -> tuple[Part, ...]:
    """Of one rollout worker: engine and writer. ``gpu_gib``: of its GPU, 0 on a CPU.

    Without ``engine.kv_cache_gib`` vLLM fills its share of the GPU with the cache.
    """
    engine, width = config.engine, BYTES[config.model.dtype]
    weights = shape.parameters * width
    slots = slot_bytes(shape, config.fast_weights, engine, width)
    step = _engine_step(shape, config, width, on_gpu=gpu_gib > 0)
    write = _write_bytes(shape, config, width)
    graphs = GRAPHS_GIB * GIB if gpu_gib and not engine.enforce_eager else 0.0
    if gpu_gib and engine.kv_cache_gib is None:
        cache = engine.gpu_memory_utilization * gpu_gib * GIB - weights - slots - step - graphs
    else:
        cache = GIB * (CPU_KV_CACHE_GIB if engine.kv_cache_gib is None else engine.kv_cache_gib)
    if not gpu_gib:  # packed for vLLM's matmuls: the layers under Delta are there twice, and so is the head
        weights += (config.fast_weights.last_layers * shape.layer_parameters) * width
        weights += shape.embedding_parameters * width if shape.tied_embeddings else 0
    return (
        Part("weights", weights),
        Part("adapter slots", slots),
        Part("kv cache", cache),
        Part("graphs", graphs),
        Part("engine step", step, passing=True),
        Part("write", write, passing=True),
    )


def _engine_step(shape: ModelShape, config: RunConfig, width: int, on_gpu: bool) -> float:
    """Activations of one step of the engine, and the sampler's logits."""
    engine = config.engine
    if on_gpu:
        tokens = max(_GPU_STEP_TOKENS, engine.slots)
    else:
        tokens = max(engine.max_model_tokens, _CPU_STEP_TOKENS * engine.slots)
    layer = 3 * shape.hidden_size + shape.query_width + 2 * shape.key_width + 3 * shape.intermediate_size
    return tokens * layer * width + 3 * 4 * engine.slots * shape.vocab_size


def _write_bytes(shape: ModelShape, config: RunConfig, width: int) -> float:
    """A write of several episodes at once: a pass through the layers under Delta, and kept first inputs."""
    fast, write = config.fast_weights, config.write
    chunk = write.chunk_tokens * (fast.last_layers * layer_activations(shape, width))
    first = _WRITTEN_TOKENS * (2 * shape.intermediate_size + shape.hidden_size) * width
    head = 3 * 4 * max(_HEAD_CHUNK["cpu"], shape.vocab_size)
    return chunk + first + head


# --- what all share ---------------------------------------------------------------------------------------


def published_bytes(shape: ModelShape, config: LearnerConfig) -> float:
    """The weights that a version is published as."""
    changed = shape.parameters if config.trainable == "full" else trained_parameters(shape, config)
    return changed * BYTES[config.dtype]


def store_bytes(shape: ModelShape, config: RunConfig) -> tuple[float, float]:
    """The object store's weights, and its episodes.

    Two versions: workers still read one while the next is published. Of the episodes the B of each write
    counts, float32; those of a step wait for the learner while the next ones arrive.
    """
    train = config.train
    revision = 4 * snapshot_numbers(shape, config.fast_weights)
    episodes = train.tasks_per_step * train.group_size * (1 + min(1, train.max_staleness))
    return 2 * published_bytes(shape, config.learner), WRITES * revision * episodes


def object_store_gib(config: RunConfig, shape: ModelShape) -> float:
    """``ray.object_store_gib``, or what this run needs of it, at least 2."""
    if config.ray.object_store_gib is not None:
        return config.ray.object_store_gib
    return max(2.0, round(1.1 * sum(store_bytes(shape, config)) / GIB, 1))


def cache_tokens(shape: ModelShape, config: RunConfig, cache: float) -> int:
    """Tokens whose keys and values a cache of so many bytes holds."""
    return max(0, int(cache / (shape.cache_numbers * BYTES[config.model.dtype])))


def refresh_seconds(shape: ModelShape, config: RunConfig) -> float:
    """An estimate of how long new weights take into a worker. It forms all matrices of a LoRA anew."""
    learner = config.learner
    formed = shape.parameters * BYTES[learner.dtype] if learner.trainable == "lora" else 0
    return max(formed, published_bytes(shape, learner)) / REFRESH_BYTES_S
