"""Rows x benchmarks x seeds: the cells, the configuration of each, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.evaluation.command import save_request, saved_request
from cluster.evaluation.plan import Request, plan_cells
from cluster.evaluation.run import batches
from configs.load import ConfigError
from configs.shipped import shipped

QUICKSTART = Path("tests/quickstart.yaml")
SHIPPED_ROWS = (
    "full_context",
    "truncation",
    "memgpt",
    "memagent",
    "mem1",
    "amem",
    "raw",
    "summary_sft",
    "seal",
    "tmem",
    "tmem_blind",
    "tmem_natural",
    "hybrid",
    "oracle",
    "other_cards",
    "oracle_other_cards",
)


def request(
    *overrides: str,
    rows: tuple[str, ...] = (),
    benchmarks: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    sweep: tuple[str, ...] = (),
    baseline: str = "",
    config: Path = QUICKSTART,
) -> Request:
    return Request(config, overrides, None, rows, benchmarks, seeds, baseline, sweep, "")


def labels(asked: Request) -> list[str]:
    return list(plan_cells(asked).labels)


def refused(asked: Request) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_cells(asked)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_rows_it_is_truncation_and_the_configurations_own() -> None:
    plan = plan_cells(request())
    assert [(cell.benchmark, cell.variant.label, cell.config.seed) for cell in plan.cells] == [
        ("recall", "truncation", 0),
        ("recall", "parametric", 0),
    ]
    assert [cell.config.memory.policy for cell in plan.cells] == ["truncation", "parametric"]
    assert plan.cells[1].config == plan.base
    assert plan.baselines == (("parametric", "truncation"),)
    assert labels(request("evaluation.memory_off_row=false")) == ["parametric"]
    assert labels(request("memory.policy=truncation")) == ["truncation"]


@pytest.mark.parametrize("row", SHIPPED_ROWS)
def test_every_shipped_row_is_a_memory_at_the_scale_of_the_base(row: str) -> None:
    """L_max and token limits are the base's in every row, and so is T, except in rows that are another T.

    Else rows would differ in more than their name says.
    """
    plan = plan_cells(request(rows=("truncation", row) if row != "truncation" else (row,)))
    base, config = plan.base, plan.cells[-1].config
    limits = ("max_context_tokens", "max_extract_tokens", "max_summary_tokens")
    assert [getattr(config.memory, name) for name in limits] == [
        getattr(base.memory, name) for name in limits
    ]
    if row == "seal":
        assert (config.fast_weights.rank, config.write.learning_rate, config.write.epochs) == (32, 1e-3, 10)
    elif row == "tmem_natural":
        assert (config.fast_weights.rank, config.write.optimizer, config.write.epochs) == (
            base.fast_weights.rank,
            "natural",
            15,
        )
        assert config.write.rehearsal == 32
        assert config.write.preserve.weight > 0 and config.write.depths == (1,)
    else:
        assert config.write == base.write
        assert config.fast_weights.rank == base.fast_weights.rank
    assert (config.environment, config.sampling, config.engine, config.model) == (
        base.environment,
        base.sampling,
        base.engine,
        base.model,
    )


def test_the_shipped_rows_are_the_papers_table_and_engrams_own_write() -> None:
    assert set(shipped("rows")) == set(SHIPPED_ROWS)
    plan = plan_cells(request(rows=SHIPPED_ROWS))
    memories = [
        (
            cell.config.memory.policy,
            cell.config.memory.question_blind,
            cell.config.write.optimizer == "natural",
            cell.config.memory.control,
        )
        for cell in plan.cells
    ]
    assert len(set(memories)) == len(SHIPPED_ROWS)


def test_cells_are_benchmarks_by_rows_by_seeds(tmp_path: Path) -> None:
    harder = tmp_path / "harder.yaml"
    harder.write_text(
        "environment: {name: recall, recall: {sessions: 4}}\nmemory: {max_context_tokens: 60}\n"
    )
    plan = plan_cells(request(rows=("truncation", "tmem"), benchmarks=("recall", str(harder)), seeds=(3, 5)))
    assert [cell.key for cell in plan.cells] == [
        "recall--truncation--seed3",
        "recall--truncation--seed5",
        "recall--tmem--seed3",
        "recall--tmem--seed5",
        "harder--truncation--seed3",
        "harder--truncation--seed5",
        "harder--tmem--seed3",
        "harder--tmem--seed5",
    ]
    last = plan.cells[-1].config
    assert (
        last.environment.recall.sessions,
        last.memory.max_context_tokens,
        last.memory.policy,
        last.seed,
    ) == (4, 60, "parametric", 5)


def test_later_files_win_and_arguments_win_over_all(tmp_path: Path) -> None:
    row, benchmark = tmp_path / "mine.yaml", tmp_path / "bench.yaml"
    benchmark.write_text(
        "environment: {name: recall}\nmemory: {max_context_tokens: 70, max_extract_tokens: 50}\n"
    )
    row.write_text("memory: {policy: parametric, max_context_tokens: 80}\nwrite: {epochs: 7}\n")
    asked = request("write.epochs=9", rows=(str(row),), benchmarks=(str(benchmark),))
    config = plan_cells(asked).cells[0].config
    assert (config.memory.max_context_tokens, config.memory.max_extract_tokens, config.write.epochs) == (
        80,
        50,
        9,
    )
    assert config.write.rehearsal == 4  # quickstart's, which nothing overrides
    swept = plan_cells(request(rows=(str(row),), sweep=("write.epochs=1,2",)))
    assert [cell.config.write.epochs for cell in swept.cells] == [1, 2]


def test_a_sweep_multiplies_the_rows_that_it_matters_to() -> None:
    asked = request(
        rows=("full_context", "truncation", "tmem"),
        sweep=("fast_weights.basis=svd,random", "memory.max_context_tokens=54,100", "write.epochs=1,5"),
    )
    found = labels(asked)
    assert found[:3] == ["full_context", "truncation L_max=54", "truncation L_max=100"]
    assert len(found) == 3 + 8
    assert "tmem basis=random L_max=100 epochs=5" in found
    pairs = dict(plan_cells(asked).baselines)
    assert pairs["tmem basis=random L_max=100 epochs=5"] == "truncation L_max=100"
    assert "full_context" not in pairs  # two truncations, and no reason to take one of them


def test_a_list_is_one_value_of_a_sweep() -> None:
    sweep = ("fast_weights.projections=[gate_proj,up_proj],[down_proj]",)
    plan = plan_cells(request(rows=("tmem",), sweep=sweep))
    assert [cell.config.fast_weights.projections for cell in plan.cells] == [
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert len({cell.key for cell in plan.cells}) == 2


def test_a_chosen_baseline_may_be_one_variant() -> None:
    plan = plan_cells(
        request(rows=("tmem",), sweep=("fast_weights.basis=svd,random,unit_svd",), baseline="tmem basis=svd")
    )
    assert plan.baselines == (
        ("tmem basis=random", "tmem basis=svd"),
        ("tmem basis=unit_svd", "tmem basis=svd"),
    )
    assert plan_cells(request(rows=("tmem", "hybrid"))).baselines == ()


def test_cells_of_one_worker_configuration_share_workers() -> None:
    """Memory and seed come with the episode; T, fast weights and the environment are the worker's."""
    rows = ("truncation", "tmem", "full_context", "seal", "tmem_blind")
    plan = plan_cells(request(rows=rows, seeds=(0, 1)))
    shared = batches(plan.cells, lambda cell: cell.config.fast_weights)
    assert [len(batch) for batch in shared] == [8, 2]
    assert {cell.variant.label for cell in shared[1]} == {"seal"}
    assert (
        sum(
            len(batch)
            for batch in batches(plan.cells, lambda cell: (cell.config.fast_weights, cell.config.seed))
        )
        == 10
    )


def test_benchmarks_of_two_temperatures_share_no_workers(tmp_path: Path) -> None:
    """A worker samples at the temperature of its own configuration."""
    for name, temperature in (("cold", 0.0), ("hot", 1.0)):
        (tmp_path / f"{name}.yaml").write_text(
            f"environment: {{name: recall}}\nevaluation: {{temperature: {temperature}}}\n"
        )
    plan = plan_cells(
        request(
            rows=("truncation", "tmem"), benchmarks=(str(tmp_path / "cold.yaml"), str(tmp_path / "hot.yaml"))
        )
    )
    found = batches(plan.cells, lambda cell: "one basis")
    assert [[cell.benchmark for cell in batch] for batch in found] == [["cold", "cold"], ["hot", "hot"]]


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ("locomo", ("environment.conversation.path=talks.json",)),
        ("longmemeval", ("environment.conversation.path=talks.json",)),
        (
            "search",
            (
                "environment.search.questions_path=questions.json",
                "environment.search.corpus_path=corpus.json",
            ),
        ),
        ("rubric", ("environment.rubric.path=items.jsonl",)),
    ],
)
def test_every_row_can_be_asked_for_on_every_benchmarks_configuration(
    config: str, files: tuple[str, ...]
) -> None:
    assert len(
        plan_cells(request(*files, rows=SHIPPED_ROWS, config=Path(f"configs/{config}.yaml"))).cells
    ) == len(SHIPPED_ROWS)


def test_a_custom_memory_may_use_every_setting(tmp_path: Path) -> None:
    row = tmp_path / "mine.yaml"
    row.write_text("memory: {policy: custom, custom: 'my_parts:build'}\n")
    sweep = ("write.epochs=1,5", "memory.max_summary_tokens=20,30")
    assert len(labels(request(rows=(str(row),), sweep=sweep))) == 4


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (request(rows=("tmen",)), "--rows tmen: no such row; shipped are amem"),
        (request(benchmarks=("locomoo",)), "--benchmarks locomoo: no such benchmark; shipped are beam"),
        (request(benchmarks=("locomo",)), "environment.conversation.path"),
        (
            request("memory.policy=full", rows=("tmem", "truncation")),
            "with --rows it would turn every row into the same memory",
        ),
        (
            request("environment.name=recall", benchmarks=("recall", "search")),
            "with --benchmarks it would turn every benchmark into the same tasks",
        ),
        (
            request("environment.conversation.format=locomo", benchmarks=("longmemeval",)),
            "with --benchmarks it would turn every benchmark into",
        ),
        (request("seed=2", seeds=(0, 1)), "--seeds is given too"),
        (request(rows=("tmem", "tmem")), "name 'tmem' twice"),
        (request(seeds=(1, 1)), "twice"),
        (request(rows=("tmem",), baseline="raw"), "--baseline raw: no such row here; there are tmem"),
        (request(sweep=("write.epochs",)), "--sweep write.epochs: write key=value,value"),
        (
            request(sweep=("write.epochs=1", "write.epochs=2,3")),
            "--sweep write.epochs is given twice: write write.epochs=1,2,3",
        ),
        (request(sweep=("write.epochs=1,,2",)), "write key=value,value"),
        (request(sweep=("write.epoch=1,2",)), "did you mean write.epochs?"),
        (request(sweep=("engine.slots=1,2",)), "engine.slots cannot be swept"),
        (request(sweep=("memory.policy=full,raw",)), "memory.policy cannot be swept"),
        (request("write.epochs=3", sweep=("write.epochs=1,2",)), "write.epochs is also given as an argument"),
        (
            request(rows=("tmem",), sweep=("fast_weights.basis=svd,best",)),
            "fast_weights.basis='best' is not allowed",
        ),
        (
            request("memory.max_summary_tokens=54", rows=("hybrid",)),
            "'memory.max_summary_tokens=54': memory.max_summary_tokens=54 is not allowed",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_mistake_is_one_line(asked: Request, said: str) -> None:
    assert said in refused(asked)


def test_a_row_may_set_its_memory_only(tmp_path: Path) -> None:
    row = tmp_path / "mine.yaml"
    row.write_text("memory: {policy: full}\ntrain: {steps: 3}\n")
    message = refused(request(rows=(str(row),)))
    allowed = "which may set memory.*, write.*, fast_weights.* only"
    assert message == f"{row}: train.steps is not a setting of a row, {allowed}"
    assert "no such file" in refused(request(rows=(str(tmp_path / "gone.yaml"),)))
    benchmark = tmp_path / "bench.yaml"
    benchmark.write_text("memory: {policy: full}\n")
    assert "memory.policy is not a setting of a benchmark, which may set environment.*" in refused(
        request(benchmarks=(str(benchmark),))
    )


def test_the_baseline_has_the_name_that_rows_give_it() -> None:
    """``config`` is the configuration's own memory; the tables have the name of its policy."""
    rows = ("truncation", "config")
    assert plan_cells(request(rows=rows, baseline="config")).baselines == (("truncation", "parametric"),)
    assert plan_cells(request(baseline="config")).baselines == (("truncation", "parametric"),)
    said = refused(request(rows=("truncation", "tmem"), baseline="config"))
    assert said == "--baseline config: no such row here; there are truncation, tmem"


def test_a_request_survives_its_file(tmp_path: Path) -> None:
    asked = request(
        "write.epochs=3",
        rows=("tmem",),
        seeds=(1, 2),
        sweep=("fast_weights.rank=2,4",),
        config=QUICKSTART.absolute(),
    )
    save_request(asked, tmp_path)
    assert saved_request(tmp_path) == asked
    with pytest.raises(ConfigError, match=r"is no folder of an evaluation \(it has no request.json\)"):
        saved_request(tmp_path / "gone")
    (tmp_path / "request.json").write_text('{"config": 1}')
    with pytest.raises(ConfigError, match="give the whole command with --resume"):
        saved_request(tmp_path)
