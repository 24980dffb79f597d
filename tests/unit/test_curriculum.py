"""Stages of training tasks: read from the configuration, moved on by a figure or by steps, and resumed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from actors.environments.recall import RecallEnvironment
from actors.episodes.rollout import Rollout, RolloutRequest
from actors.protocols import TaskError
from actors.text.chat_template import ChatFormat
from actors.types import AdapterKey, Generation, Sampling, Task
from cluster.common.errors import CheckpointError
from cluster.fleet.fleet import FleetPlan
from cluster.fleet.ledger import Ledger
from cluster.runs.checkpoint import START, StageProgress, TrainState, load_checkpoint, save_checkpoint
from cluster.train.build import build_curriculum
from cluster.train.curriculum import Curriculum
from cluster.train.loop import run_loop
from cluster.train.prepare import prepare_training
from configs.curriculum import stages
from configs.load import ConfigError, load_config, to_yaml
from configs.schema import MemoryConfig, RecallConfig, RolloutConfig, RunConfig, TrainConfig, WriteConfig
from tests.unit.cluster_cases import task_at
from tests.unit.loop_cases import Recorder, Trainer, Worker, wire
from tests.unit.rollout_fakes import SURROUNDINGS, ScriptedPolicy, ScriptedWriter, sampled

STAGES = """
curriculum:
  stages:
    - environment: {recall: {sessions: 1, questions: 1}}
      metric: reward/mean
      at_least: 0.5
      window: 2
      steps: 9
    - {environment: {recall.sessions: 1}, steps: 2}
    - {}
"""


def loaded(folder: Path, text: str = STAGES, *settings: str) -> RunConfig:
    (folder / "c.yaml").write_text(text)
    return load_config(folder / "c.yaml", ["environment.recall.filler_sentences=2", *settings])


# --- the configuration -------------------------------------------------------------------------------------


def test_a_stage_is_the_runs_environment_with_settings_of_its_own(tmp_path: Path) -> None:
    config = loaded(tmp_path)
    first, second, last = stages(config)
    assert first.environment.recall == replace(config.environment.recall, sessions=1, questions=1)
    assert (first.metric, first.at_least, first.window, first.steps) == ("reward/mean", 0.5, 2, 9)
    assert first.changes == "recall.sessions=1 recall.questions=1"
    assert second.environment.recall.sessions == 1 and second.environment.recall.filler_sentences == 2
    assert last.environment == config.environment
    assert first.is_reached(0.5) and not first.is_reached(0.49)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml", []) == config
    assert stages(RunConfig()) == ()


def test_a_custom_environments_options_are_merged(tmp_path: Path) -> None:
    text = "curriculum: {stages: [{environment: {options: {days: 1}}}]}"
    custom = ("environment.name=custom", "environment.custom=a:B", "environment.options.shop=x")
    (stage,) = stages(loaded(tmp_path, text, *custom, "environment.options.days=5"))
    assert stage.environment.options == {"shop": "x", "days": 1}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("{environmnt: {}}", r"stages\[0\]: 'environmnt' is no key of a stage; did you mean environment\?"),
        ("{zzz: 1}", "it may have environment, metric, at_least, at_most, window, steps"),
        ("{environment: {recall: {sesions: 1}}}", "did you mean environment.recall.sessions"),
        ("{environment: {recall: {sessions: 0}}}", "recall.sessions=0 is not allowed: it must be greater"),
        (
            "{environment: {recall: {questions: 9}}}",
            "questions=9 is not allowed: it must be at most sessions",
        ),
        ("{environment: {recall: {sessions: x}}}", "'x' is not allowed: it must be a whole number"),
        ("{environment: 3}", "environment=3 is not allowed: it must be a mapping of settings"),
        ("{metric: reward/mean}", "a metric needs at_least or at_most"),
        ("{at_most: 3}", "at_most needs a metric"),
        ("{window: 3}", "window needs a metric"),
        ("{metric: eval/held_out/f1, at_least: 1}", "it must be the name of a figure of training steps"),
        ("{metric: a/b, at_least: high}", "at_least='high' is not allowed: it must be a number"),
        (
            "{metric: a/b, at_least: 2, at_most: 1}",
            "at_least=2.0 is not allowed: it must be at most at_most=1",
        ),
        ("{steps: -1}", "steps=-1 is not allowed: it must be a whole number, 0 or more"),
        ("{metric: a/b, at_least: 1, window: 0}", "window=0 is not allowed: it must be a whole number, 1"),
        ("{}, {}", r"stages\[0\] never ends, so the next one never begins; give it steps"),
        ("3", "curriculum.stages=.* is not allowed: it must be a list"),
    ],
)
def test_a_stage_that_cannot_be_is_one_line(tmp_path: Path, stage: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        loaded(tmp_path, f"curriculum: {{stages: [{stage}]}}")
    assert "\n" not in str(error.value)


def test_a_stage_whose_episodes_are_longer_than_the_run_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"stages\[0\].*questions=4 is not allowed.*rollout\.max_turns=2"):
        loaded(
            tmp_path,
            "curriculum: {stages: [{environment: {recall: {questions: 4}}}]}",
            "rollout.max_turns=2",
        )


def test_a_stage_that_only_its_environment_can_refuse_is_refused_before_a_run(
    tmp_path: Path, tiny_model_path: Path
) -> None:
    settings = (f"model.name={tiny_model_path}", "fast_weights.basis=random", f"output_dir={tmp_path / 'r'}")
    quickstart = Path("tests/quickstart.yaml").read_text()

    def prepared(*more: str) -> Curriculum:
        (tmp_path / "q.yaml").write_text(quickstart)
        config = load_config(tmp_path / "q.yaml", [*settings, *more])
        spec, _, start = prepare_training(config)
        return build_curriculum(spec, start.state, lambda text: None)

    whole = prepared("curriculum.stages=[{environment: {recall: {sessions: 1, questions: 1}}}]")
    task = whole.task_at(3)
    assert (len(task.payload["sessions"]), len(task.payload["questions"]), task.stage) == (1, 1, 1)
    assert prepared().task_at(3).stage == 0
    with pytest.raises(TaskError, match=r"^curriculum\.stages\[0\]: recall\.filler_sentences=999"):
        prepared("curriculum.stages=[{environment: {recall: {filler_sentences: 999}}}]")


# --- moving on ---------------------------------------------------------------------------------------------


def curriculum_of(config: RunConfig, progress: StageProgress, said: list[str]) -> Curriculum:
    places = [
        lambda position, n=n: replace(task_at(position), id=f"s{n}-t{position}")  # type: ignore[misc]
        for n in (1, 2, 3)
    ]
    return Curriculum(task_at, stages(config), places, progress, said.append)


def test_a_stage_ends_when_the_mean_of_its_metric_is_in_bounds_over_a_whole_window(tmp_path: Path) -> None:
    said: list[str] = []
    made = curriculum_of(loaded(tmp_path), StageProgress(), said)
    for step, reward in enumerate((0.9, 0.0, 0.4, 0.6), 1):
        assert made.progress.stage == 0
        assert made.task_at(step).id == f"s1-t{step}" and made.task_at(step).stage == 1
        figures = made.after_step(step, {"reward/mean": reward}, [step])
        assert figures == {"curriculum/stage": 1, "curriculum/steps": step, "curriculum/tasks_of_stage": 1}
    assert made.progress == StageProgress(1)
    assert said == [
        "curriculum: stage 1 of 3 (recall.sessions=1 recall.questions=1), after 0 of its steps",
        "curriculum: stage 2 of 3 (recall.sessions=1) from step 5 on: "
        "reward/mean was 0.5 over its last 2 step(s)",
    ]
    for step in (5, 6):
        made.task_at(step)
        made.after_step(step, {"reward/mean": 1.0}, [step])
    assert said[-1] == "curriculum: stage 3 of 3 (environment.*) from step 7 on: it had its 2 steps"
    for step in (7, 8, 9):
        assert made.task_at(step).stage == 3
        assert made.after_step(step, {"reward/mean": 1.0}, [step])["curriculum/stage"] == 3


def test_a_stage_ends_by_its_steps_where_its_metric_never_says_so_and_a_missing_figure_is_said(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    made = curriculum_of(loaded(tmp_path), StageProgress(), said)
    for step in range(1, 10):
        made.task_at(step)
        made.after_step(step, {"reward/man": 0.9}, [step])
    assert made.progress.stage == 1
    warning = (
        "curriculum: this step has no figure reward/mean, so it cannot end the stage; similar are reward/man"
    )
    assert said.count(warning) == 1


def test_groups_of_an_earlier_stage_do_not_count_for_the_present_one(tmp_path: Path) -> None:
    made = curriculum_of(loaded(tmp_path), StageProgress(0, 8, (0.0, 0.0)), [])
    for position in (1, 2, 3):
        made.task_at(position)
    made.after_step(1, {"reward/mean": 0.1}, [1])  # the ninth step: on to the next stage
    assert made.progress == StageProgress(1)
    made.task_at(4)
    figures = made.after_step(2, {"reward/mean": 0.9}, [2, 4])
    assert figures == {"curriculum/stage": 2, "curriculum/steps": 1, "curriculum/tasks_of_stage": 1}
    watched = "{environment: {recall.sessions: 1}, metric: reward/mean, at_least: 0.5}"
    text = f"curriculum: {{stages: [{{steps: 1}}, {watched}, {{}}]}}"
    mixed = curriculum_of(loaded(tmp_path, text), StageProgress(), [])
    mixed.task_at(1)
    mixed.progress = StageProgress(1)
    mixed.task_at(2)
    mixed.after_step(2, {"reward/mean": 0.9}, [1, 2])
    assert mixed.progress == StageProgress(1, 1), "half of the reward is of the stage before"
    mixed.task_at(3)
    mixed.after_step(3, {"reward/mean": 0.9}, [3])
    assert mixed.progress == StageProgress(2)
    stale = curriculum_of(loaded(tmp_path), StageProgress(), [])
    stale.task_at(1)
    stale.progress = StageProgress(1)
    stale.after_step(1, {"reward/mean": 0.9}, [1])
    assert stale.progress == StageProgress(1, 1)


def test_without_stages_all_tasks_are_the_runs_and_there_are_no_figures() -> None:
    made = Curriculum(task_at)
    assert made.task_at(3) == task_at(3) and made.after_step(1, {}, [3]) == {}


# --- in the loop, and resumed ------------------------------------------------------------------------------


def run(config: RunConfig, steps: int, state: TrainState, played: list[str]) -> TrainState:
    plan = TrainConfig(steps=steps, tasks_per_step=2, group_size=2, max_staleness=0)
    trainer, ledger = Trainer(state.version), Ledger(state.ledger)
    curriculum = curriculum_of(config, state.curriculum, [])

    async def nothing(state: TrainState) -> None: ...

    async def body() -> TrainState:
        workers = [Worker("worker-0", state.version)]
        fleet_plan: FleetPlan[Worker] = FleetPlan(
            None, lambda: 1, state.version, 1, 60.0, lambda text: None, in_flight=False
        )
        parts = wire(
            workers,
            fleet_plan,
            trainer,
            Recorder(),
            ledger,
            plan,
            state,
            lambda *_: None,
            nothing,
            curriculum,
        )
        return await asyncio.wait_for(run_loop(parts, plan, state), 20)

    end = asyncio.run(body())
    played += [task for batch in trainer.batches for task in batch]
    return end


def test_a_resumed_run_goes_on_in_its_stage(tmp_path: Path) -> None:
    config = loaded(tmp_path, STAGES.replace("steps: 9", "steps: 3").replace("0.5", "99"))
    whole: list[str] = []
    end = run(config, 8, START, whole)
    assert [task[:2] for task in whole[::2]] == ["s1", "s1", "s1", "s2", "s2", "s3", "s3", "s3"]
    assert end.curriculum == StageProgress(2, 3)
    parts: list[str] = []
    middle = run(config, 4, START, parts)
    assert middle.curriculum == StageProgress(1, 1)
    assert run(config, 8, middle, parts).curriculum == end.curriculum
    assert parts == whole


def test_the_stage_stands_in_the_checkpoint_and_an_older_checkpoint_has_none(tmp_path: Path) -> None:
    state = replace(START, step=3, curriculum=StageProgress(1, 2, (0.25, 0.5)))

    async def write(target: Path) -> None:
        target.mkdir()

    folder = asyncio.run(save_checkpoint(tmp_path, state, "name: x\n", write, 2)).folder
    assert load_checkpoint(folder).state == state
    content = json.loads((folder / "state.json").read_text())
    del content["curriculum"]
    (folder / "state.json").write_text(json.dumps(content))
    assert load_checkpoint(folder).state == replace(state, curriculum=StageProgress())


def test_a_checkpoint_needs_the_stage_that_it_stands_in(tmp_path: Path, tiny_model_path: Path) -> None:
    settings = [f"model.name={tiny_model_path}", "fast_weights.basis=random", f"output_dir={tmp_path / 'r'}"]
    config = load_config(Path("tests/quickstart.yaml"), settings)
    said: list[str] = []
    _, folder, _ = prepare_training(config, say=said.append)
    assert [line.partition(":")[0] for line in said] == [
        "computing the basis of the fast weights from the policy"
    ]

    async def write(target: Path) -> None:
        (target / "model").mkdir(parents=True)

    state = replace(START, step=3, curriculum=StageProgress(2))
    saved = asyncio.run(save_checkpoint(folder.path, state, to_yaml(config), write, 2)).folder
    with pytest.raises(
        CheckpointError, match=r"stands in stage 3 of its curriculum, and curriculum.stages has 0"
    ):
        prepare_training(replace(config, resume=str(saved)))


# --- in a rollout worker -----------------------------------------------------------------------------------


def test_a_task_is_played_by_the_environment_of_its_stage(chat: ChatFormat) -> None:
    class Other(RecallEnvironment):
        system_prompt = "Say yes."

    def script(prompt_ids: Sequence[int], sampling: Sampling, adapter: AdapterKey) -> Generation:
        return sampled(chat.reply("yes" if sampling.kind == "act" else "[]"))

    plain, other = (kind(RecallConfig(sessions=1, questions=1)) for kind in (RecallEnvironment, Other))
    task: Task = next(plain.tasks("train", 0, 0))
    policy = ScriptedPolicy(script)
    rollout = Rollout(
        policy,
        ScriptedWriter(),
        plain,
        chat,
        WriteConfig(),
        RolloutConfig(),
        8,
        SURROUNDINGS,
        "basis",
        "worker-0",
        stages=(plain, other),
    )
    for stage in (0, 1, 2):
        request = RolloutRequest(replace(task, stage=stage), f"g{stage}", 1, MemoryConfig(), 1.0, 8, 1)
        (episode,) = asyncio.run(rollout.group(request)).trajectories
        assert ("Say yes." in chat.decode(episode.segments[0].token_ids)) is (stage == 2)
