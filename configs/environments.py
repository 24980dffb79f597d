"""Settings of the task sources; `configs.schema` puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from configs.bounds import not_negative, positive, require
from configs.extensions import FORM, is_path


@dataclass(frozen=True)
class RecallConfig:
    """Synthetic facts told over several sessions, then questions. Unlimited tasks; train and eval names never overlap."""

    sessions: int = 2
    facts_per_session: int = 2
    questions: int = 2
    filler_sentences: int = 1  # small talk in each session
    vocabulary: Literal["small", "wide"] = (
        "small"  # of training: small, 11 to 22 answers a relation, can be learnt by heart in a long one
    )

    def __post_init__(self) -> None:
        positive(self, "sessions", "facts_per_session", "questions")
        not_negative(self, "filler_sentences")
        require(
            self.questions <= self.sessions * self.facts_per_session,
            "questions",
            self.questions,
            "at most sessions * facts_per_session",
        )


@dataclass(frozen=True)
class ConversationConfig:
    """Long conversations with questions, read from ``path``. ``scorer`` picks what the reward is (LoCoMo's two are always both reported)."""

    path: str = ""  # required with environment.name=conversation
    format: Literal["locomo", "longmemeval"] = "locomo"  # the file's schema
    scorer: Literal["official", "plain"] = "plain"  # official: LoCoMo's own
    questions_per_episode: int = 1  # asked after all sessions; LongMemEval has one a conversation
    max_sessions: int = 0  # 0: all; otherwise the last n sessions up to the evidence, for quick looks
    categories: tuple[int, ...] = (1, 2, 3, 4, 5)  # of LoCoMo's questions; of no effect on another format
    eval_fraction: float = 0.5  # of the conversations, held out

    def __post_init__(self) -> None:
        positive(self, "questions_per_episode")
        not_negative(self, "max_sessions")
        require(
            0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1, both excluded"
        )
        require(
            set(self.categories) <= {1, 2, 3, 4, 5} and len(self.categories) > 0,
            "categories",
            self.categories,
            "some of 1, 2, 3, 4, 5",
        )
        scored = self.format == "locomo" or self.scorer == "plain"
        require(
            scored,
            "scorer",
            self.scorer,
            f"plain where format is {self.format}",
            "the official rules are LoCoMo's",
        )


@dataclass(frozen=True)
class SearchConfig:
    """Multi-objective search (MEM1, arXiv 2506.15841): ``objectives`` questions joined by "; ", answered with a search tool over ``corpus_path``."""

    questions_path: str = ""  # required with environment.name=search: HotpotQA's JSON list, or JSON lines of question and answer
    corpus_path: str = ""  # required with environment.name=search: a JSON object of title to sentences, or JSON lines of title and text
    objectives: int = 4  # questions of one task
    results: int = 3  # passages that a search shows
    max_turns: int = 10  # searches and the answer of one episode
    retriever: Literal["bm25", "dense"] = "bm25"  # words, or the sentence embedder
    eval_fraction: float = 0.5  # of the tasks, held out

    def __post_init__(self) -> None:
        positive(self, "objectives", "results", "max_turns")
        require(
            0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1, both excluded"
        )


@dataclass(frozen=True)
class JudgeConfig:
    """An LLM behind an OpenAI-compatible endpoint. The key is read from the environment variable ``api_key_env``, and never logged."""

    url: str = ""  # e.g. http://127.0.0.1:8000/v1
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"  # empty: no key is sent
    timeout_s: float = 60  # of one request; a verdict takes at most (retries + 1) times as long
    retries: int = 3
    max_concurrent: int = 8  # requests at once, of each rollout worker
    cache_dir: str = ""  # verdicts are kept here and asked for once; empty: no cache
    usd_per_million_prompt_tokens: float = 0.0  # for the cost column
    usd_per_million_generated_tokens: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "timeout_s", "max_concurrent")
        not_negative(self, "retries", "usd_per_million_prompt_tokens", "usd_per_million_generated_tokens")


@dataclass(frozen=True)
class RubricConfig:
    """Context learning judged by rubrics (CL-Bench, arXiv 2602.03587): all of an item's rubrics met scores 1, anything less 0."""

    path: str = ""  # required with environment.name=rubric: JSON lines of messages, rubrics and metadata
    checker: Literal["judge", "rules"] = (
        "judge"  # an LLM judge, or the rule that each rubric states (a file with another rubric is refused)
    )
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    eval_fraction: float = 0.5  # of the contexts, held out; items that share one stay together

    def __post_init__(self) -> None:
        require(
            0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1, both excluded"
        )


@dataclass(frozen=True)
class RecordsConfig:
    """One task a record of a JSON Lines or Parquet file (the hub's data sets are Parquet): texts to read, then a question."""

    path: str = ""  # required with environment.name=records: a file whose name ends in .jsonl or .parquet
    texts_field: str = "texts"  # a text, or a list of texts that are read one after another
    question_field: str = "question"
    answer_field: str = "answer"  # a text or a number, or a list of them that are all right
    category_field: str = ""  # scores are also shown by its values; empty: all in one
    eval_fraction: float = 0.1  # of the records, held out; records with the same texts stay together

    def __post_init__(self) -> None:
        require(
            0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "between 0 and 1, both excluded"
        )


@dataclass(frozen=True)
class EnvironmentConfig:
    """Where tasks come from."""

    name: Literal["recall", "conversation", "search", "rubric", "records", "custom"] = "recall"
    custom: str = (
        ""  # with environment.name=custom: package.module:name of a function from options to an Environment
    )
    options: dict[str, Any] = field(
        default_factory=dict, hash=False
    )  # what the custom environment is called with
    reward: str = ""  # package.module:name of a function from Task and Outcome to the reward, instead of the environment's own
    recall: RecallConfig = field(default_factory=RecallConfig)
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rubric: RubricConfig = field(default_factory=RubricConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)

    def __post_init__(self) -> None:
        require(
            self.name != "custom" or is_path(self.custom),
            "custom",
            self.custom,
            f"{FORM} where environment.name is custom",
        )
        require(self.reward == "" or is_path(self.reward), "reward", self.reward, f"{FORM}, or empty")
        path = self.records.path
        readable = path.endswith((".jsonl", ".parquet"))
        require(
            self.name != "records" or readable,
            "records.path",
            path,
            "a .jsonl or .parquet file where environment.name is records",
        )
        path = self.conversation.path
        require(
            self.name != "conversation" or path != "",
            "conversation.path",
            path,
            "a file of conversations where environment.name is conversation",
        )
        for key in ("questions_path", "corpus_path"):
            path = getattr(self.search, key)
            require(
                self.name != "search" or path != "",
                f"search.{key}",
                path,
                "a file where environment.name is search",
            )
        path, judge = self.rubric.path, self.rubric.judge
        require(
            self.name != "rubric" or path != "",
            "rubric.path",
            path,
            "a JSON lines file where environment.name is rubric",
        )
        for key, value in (("url", judge.url), ("model", judge.model)):
            judged = self.name == "rubric" and self.rubric.checker == "judge"
            require(
                not judged or value != "",
                f"rubric.judge.{key}",
                value,
                "given where environment.rubric.checker is judge",
                "or checker=rules",
            )

    @property
    def acts(self) -> tuple[str, int]:
        """How often an episode asks for an act at most, and the setting that says so; texts that are only read are none. Unknown of a custom one."""
        if self.name == "recall":
            return "recall.questions", self.recall.questions
        if self.name == "search":
            return "search.max_turns", self.search.max_turns
        if self.name == "conversation" and self.conversation.format == "locomo":
            return "conversation.questions_per_episode", self.conversation.questions_per_episode
        return "name", 1  # LongMemEval, rubric and records ask once
