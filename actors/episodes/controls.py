"""From ``memory.control`` to the control of one episode's write: what it needs of the environment."""

from __future__ import annotations

from collections.abc import Mapping

from actors.environments.base import Demonstrator, Environment, Questioner
from actors.episodes.demonstration import gold_flashcards
from actors.memory.controls import OWN_CARDS, GoldCards, OtherQuestions, WriteControl
from actors.protocols import TaskError
from actors.text.plain_text import encodable
from actors.types import Task
from configs.schema import MemoryConfig
from configs.user_code import owned

_MOST_QUESTIONS = 512  # that an episode draws from; if its cards need more, they are used again

_NEEDS: Mapping[str, tuple[type, ...]] = {
    "oracle": (Demonstrator,),
    "other_cards": (Questioner,),
    "oracle_other_cards": (Demonstrator, Questioner),
}
_PARTS: Mapping[type, str] = {
    Demonstrator: "gold flashcards (Demonstrator in actors/environments/base.py)",
    Questioner: "questions about others (Questioner in actors/environments/base.py)",
}


def write_control(config: MemoryConfig, task: Task, environment: Environment) -> WriteControl:
    """Build the control of one episode. Raises TaskError."""
    if config.control == "none":
        return OWN_CARDS
    require_control(config, environment)
    control: WriteControl = OWN_CARDS
    if config.control != "other_cards":
        assert isinstance(environment, Demonstrator)
        control = GoldCards(lambda text: gold_flashcards(environment, task, text, config))
    if config.control == "oracle":
        return control
    assert isinstance(environment, Questioner)
    ask = environment.other_questions
    with owned(f"task {task.id}: the environment {task.environment}'s other_questions", TaskError, ask):
        questions = tuple(encodable(question) for question in ask(_MOST_QUESTIONS, task.seed))
    if not questions:
        raise TaskError(f"task {task.id}: {environment.name} gave no question about others")
    return OtherQuestions(control, questions)


def require_control(config: MemoryConfig, environment: Environment) -> None:
    """Raise TaskError, one line, when the environment cannot do what ``memory.control`` needs."""
    if missing := missing_for_control(config, environment):
        raise TaskError(
            f"memory.control={config.control} is not possible: the environment {environment.name} has no "
            f"{missing}; leave this row out"
        )


def missing_for_control(config: MemoryConfig, environment: Environment) -> str:
    """Name the first part that ``memory.control`` needs and the environment does not have, else ""."""
    needs = _NEEDS.get(config.control, ())
    return next((_PARTS[part] for part in needs if not isinstance(environment, part)), "")
