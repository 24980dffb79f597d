"""Settings of the task sources. `configs.schema` puts them into a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from configs.bounds import fraction, home_expanded, not_negative, positive, require
from configs.ecosystem import ADAPTERS, GymnasiumConfig, OpenEnvConfig, TextArenaConfig, VerifiersConfig
from configs.services import EndpointConfig
from configs.tool_servers import tool_servers
from configs.user_code import FORM, is_path

REPLACEABLE = ("temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty")
"""Fields of a harness's calls whose place the run's own sampling may take."""

RECALL_RELATIONS = ("home", "job", "pet", "birthday", "instrument", "dish", "purchase", "holiday", "hobby")


@dataclass(frozen=True)
class RecallConfig:
    """Synthetic facts, told over several sessions, then questions about them.

    There are unlimited tasks. Training and evaluation never share a name.
    """

    sessions: int = 2
    facts_per_session: int = 2
    questions: int = 2
    filler_sentences: int = 1  # small talk in each session
    # of training; small has 11 to 22 answers a relation, which a long training learns by heart
    vocabulary: Literal["small", "wide"] = "small"
    # what is told and asked of people: two or more of RECALL_RELATIONS; empty: all nine
    relations: tuple[str, ...] = ()
    # further questions whose answer nobody told: half about strangers, half about told people
    unknown_questions: int = 0
    # of held-out tasks; other: always in a wording that no demonstrated flashcard has
    asked: Literal["written", "other"] = "written"

    def __post_init__(self) -> None:
        positive(self, "sessions", "facts_per_session", "questions")
        not_negative(self, "unknown_questions", "filler_sentences")
        known = len(self.relations) == len(set(self.relations) & set(RECALL_RELATIONS)) != 1
        allowed = f"two or more of {', '.join(RECALL_RELATIONS)}, each once, or none for all"
        require(known, "relations", list(self.relations), allowed)
        asked, told = self.questions, self.sessions * self.facts_per_session
        require(asked <= told, "questions", asked, "at most sessions * facts_per_session")


@dataclass(frozen=True)
class ConversationConfig:
    """Long conversations with questions, read from ``path``.

    ``scorer`` chooses the reward. LoCoMo's reports always show both scores.
    """

    path: str = ""  # required with environment.name=conversation
    format: Literal["locomo", "longmemeval", "memoryagentbench"] = "locomo"  # the file's schema
    scorer: Literal["official", "plain"] = "plain"  # official: LoCoMo's or MemoryAgentBench's own
    questions_per_episode: int = 1  # asked after all sessions; LongMemEval has one a conversation
    max_sessions: int = 0  # 0: all; n: the last n sessions up to the evidence, for quick looks
    categories: tuple[int, ...] = (1, 2, 3, 4, 5)  # of LoCoMo's questions; other formats ignore it
    # keep only questions behind whose newest evidence so many tokens or more are told: the newest L_max
    # tokens do not hold it when they are asked; 0: all. Counted in words, each of which is a token or more:
    # all models get the same questions. Questions without known evidence are left out
    evidence_beyond: int = 0
    eval_fraction: float = 0.5  # of the conversations, held out

    def __post_init__(self) -> None:
        home_expanded(self, "path")
        positive(self, "questions_per_episode")
        not_negative(self, "max_sessions", "evidence_beyond")
        fraction(self, "eval_fraction")
        whole, bound = self.evidence_beyond == 0 or self.max_sessions == 0, "0 with evidence_beyond"
        require(whole, "max_sessions", self.max_sessions, bound, "it ends with the session of the evidence")
        known = len(self.categories) > 0 and set(self.categories) <= {1, 2, 3, 4, 5}
        require(known, "categories", self.categories, "some of 1, 2, 3, 4, 5")
        scored = self.format != "longmemeval" or self.scorer == "plain"
        bound = f"plain where format is {self.format}"
        require(scored, "scorer", self.scorer, bound, "its own rule is a model's judgement")
        known, bound = self.format != "memoryagentbench" or self.evidence_beyond == 0, "0 with this format"
        require(known, "evidence_beyond", self.evidence_beyond, bound, "its evidence is unknown")


@dataclass(frozen=True)
class SearchConfig:
    """Multi-objective search (MEM1, arXiv 2506.15841).

    A task is ``objectives`` questions joined by "; ". The agent answers them with a search tool over
    ``corpus_path``.
    """

    # required with environment.name=search: HotpotQA's JSON list, or JSON lines of question and answer
    questions_path: str = ""
    # required with environment.name=search: a JSON object of title to sentences, or JSON lines of title and
    # text
    corpus_path: str = ""
    objectives: int = 4  # questions of one task
    results: int = 3  # passages that a search shows
    max_turns: int = 10  # searches and the answer of one episode
    retriever: Literal["bm25", "dense"] = "bm25"  # by words, or by the sentence embedder
    eval_fraction: float = 0.5  # of the tasks, held out

    def __post_init__(self) -> None:
        home_expanded(self, "questions_path", "corpus_path")
        positive(self, "objectives", "results", "max_turns")
        fraction(self, "eval_fraction")


@dataclass(frozen=True)
class JudgeConfig(EndpointConfig):
    """An LLM behind an OpenAI-compatible endpoint that decides about rubrics.

    Its key is read from the environment variable ``api_key_env``, and never logged.
    """


@dataclass(frozen=True)
class RubricConfig:
    """Context learning judged by rubrics (CL-Bench, arXiv 2602.03587; BEAM, arXiv 2510.27246)."""

    path: str = ""  # required with environment.name=rubric: JSON lines of messages, rubrics and metadata
    format: Literal["clbench", "beam"] = "clbench"  # the file's schema
    # the reward: 1 where all rubrics are met (CL-Bench), or the share of them (BEAM)
    score: Literal["all", "share"] = "all"
    # an LLM judge, or the rule that each rubric states (then a file with a rubric in prose is refused)
    checker: Literal["judge", "rules"] = "judge"
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    eval_fraction: float = 0.5  # of the contexts, held out; items with the same context stay together

    def __post_init__(self) -> None:
        home_expanded(self, "path")
        fraction(self, "eval_fraction")


@dataclass(frozen=True)
class RecordsConfig:
    """Texts to read, then a question: one task for each record of a JSON Lines or Parquet file.

    A data set of the hub is named hub:org/name, hub:org/name:CONFIG@SPLIT or hub:FOLDER, in every setting
    that names a data file (it needs the extra hub).
    """

    # required with environment.name=records or mcp: a file that ends in .jsonl or .parquet, or hub:org/name
    path: str = ""
    # a text, or a list of texts that are read one after another; chat messages too. A dot goes inside a field
    texts_field: str = "texts"
    question_field: str = "question"  # a text, or chat messages that end with it
    answer_field: str = "answer"  # a text or a number, or a list of them that are all right; or answers.text
    category_field: str = ""  # scores are also shown by its values; empty: all in one
    eval_fraction: float = 0.1  # of the records, held out; records with the same texts stay together

    def __post_init__(self) -> None:
        home_expanded(self, "path")
        fraction(self, "eval_fraction")


@dataclass(frozen=True)
class HarnessConfig:
    """An agent harness of your own: whatever speaks the OpenAI API. It finds the policy on 127.0.0.1.

    One of ``command`` and ``function`` is given. A command gets its endpoint in ``OPENAI_BASE_URL`` and
    ``OPENAI_API_KEY``, and the task as JSON on stdin; the last line of its stdout is its result, in JSON. A
    function gets base_url, api_key and the Task, and returns its result.
    """

    command: tuple[str, ...] = ()  # a program and its arguments, e.g. [python, my_agent.py]
    function: str = ""  # package.module:name of a function of base_url, api_key and task, async or not
    # required with environment.name=harness: a .jsonl file, each line the payload of a task; or hub:org/name;
    # or package.module:name of a function from train or eval to a list of these. A task with an answer is
    # scored by it where the harness gives no reward
    tasks: str = ""
    eval_fraction: float = 0.1  # of the tasks of a file, held out
    # fields of the harness's calls that the run's own sampling replaces, e.g. [temperature, top_p]; others
    # than these may be refused
    ignored_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        home_expanded(self, "tasks")
        fraction(self, "eval_fraction")
        known = set(self.ignored_fields) <= set(REPLACEABLE)
        require(known, "ignored_fields", self.ignored_fields, f"some of {', '.join(REPLACEABLE)}")


def _is_records(path: str) -> bool:
    return path.endswith((".jsonl", ".parquet")) or path.startswith("hub:")


@dataclass(frozen=True)
class McpConfig(RecordsConfig):
    """Questions that are answered with the tools of MCP servers, over stdio or HTTP.

    A task is a record of a question and its right answers, as with environment.name=records; texts are
    optional. Each episode starts servers of its own, and closes them. A server is ``command`` (a list), with
    ``env`` and ``cwd``, or ``url`` with ``headers``; ``tools`` names those that are wanted. ``env`` is a list
    of names of environment variables, ``headers`` a mapping of a header to such a name: their values, and
    those of ``$NAME`` in a command or a url, are read by the worker and never stored. Example:
    ``{shop: {command: [python, shop.py], env: [SHOP_KEY]}, web: {url: http://127.0.0.1:8000/mcp}}``
    """

    servers: dict[str, Any] = field(default_factory=dict, hash=False)  # by names of your own; see above
    max_turns: int = 8  # replies of one episode: calls, and the answer
    timeout_s: float = 60.0  # of a server's start and of each call; a late one fails its episode
    max_result_characters: int = 4000  # of one call's result; what is longer is cut
    # ask the question again below the results, with the turns that are left: a memory may have cleared it
    repeat_question: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "max_turns", "timeout_s", "max_result_characters")
        tool_servers(self.servers)


@dataclass(frozen=True)
class EnvironmentConfig:
    """Where tasks come from."""

    name: Literal[
        "recall",
        "conversation",
        "search",
        "rubric",
        "records",
        "mcp",
        "harness",
        "custom",
        "gymnasium",
        "textarena",
        "openenv",
        "verifiers",
    ] = "recall"
    # with environment.name=custom: package.module:name of a function from options to an Environment
    custom: str = ""
    # the custom environment's argument
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    # several environments in one run: a list of {share: 0.7, name: mine, environment: {...}}. environment has
    # settings of environment.*, laid over the others here; shares are of the tasks; empty: one environment
    mix: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    # package.module:name of a function from Task and Outcome to the reward; empty: the environment's own
    reward: str = ""
    # the reward as a weighted sum of the outcome's parts, e.g. {f1: 1.0, well_formed: 0.2}. Parts are the
    # environment's (its tables name them), its own reward as "environment", and what environment.reward
    # returns: a mapping of named parts, or a number under the function's name; empty: no sum
    reward_weights: dict[str, Any] = field(default_factory=dict, hash=False)
    recall: RecallConfig = field(default_factory=RecallConfig)
    conversation: ConversationConfig = field(default_factory=ConversationConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    rubric: RubricConfig = field(default_factory=RubricConfig)
    records: RecordsConfig = field(default_factory=RecordsConfig)
    harness: HarnessConfig = field(default_factory=HarnessConfig)
    mcp: McpConfig = field(default_factory=McpConfig)
    gymnasium: GymnasiumConfig = field(default_factory=GymnasiumConfig)
    textarena: TextArenaConfig = field(default_factory=TextArenaConfig)
    openenv: OpenEnvConfig = field(default_factory=OpenEnvConfig)
    verifiers: VerifiersConfig = field(default_factory=VerifiersConfig)

    def __post_init__(self) -> None:
        known = self.name != "custom" or is_path(self.custom)
        require(known, "custom", self.custom, f"{FORM} where environment.name is custom")
        require(self.reward == "" or is_path(self.reward), "reward", self.reward, f"{FORM}, or empty")
        numbers = all(
            isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
            for weight in self.reward_weights.values()
        )
        moves = not self.reward_weights or (numbers and any(self.reward_weights.values()))
        bound = "a mapping of parts to numbers, one of them other than 0"
        require(numbers and moves, "reward_weights", self.reward_weights, bound)
        harness = self.harness
        one = self.name != "harness" or (len(harness.command) > 0) != (harness.function != "")
        bound = "given where environment.name is harness, or else harness.function"
        require(one, "harness.command", harness.command, bound)
        named = harness.function == "" or is_path(harness.function)
        require(named, "harness.function", harness.function, f"{FORM}, or empty")
        given = is_path(harness.tasks) or harness.tasks.endswith(".jsonl") or harness.tasks.startswith("hub:")
        readable = self.name != "harness" or given
        bound = f"a .jsonl file, hub:org/name, or {FORM} where environment.name is harness"
        require(readable, "harness.tasks", harness.tasks, bound)
        for name, path in (("records", self.records.path), ("mcp", self.mcp.path)):
            readable = self.name != name or _is_records(path)
            bound = f"a .jsonl or .parquet file, or hub:org/name, where environment.name is {name}"
            require(readable, f"{name}.path", path, bound)
        served = self.name != "mcp" or len(self.mcp.servers) > 0
        require(served, "mcp.servers", self.mcp.servers, "one server or more where environment.name is mcp")
        search, judge = self.search, self.rubric.judge
        for name, key, path, what in (
            ("conversation", "conversation.path", self.conversation.path, "a file of conversations"),
            ("search", "search.questions_path", search.questions_path, "a file"),
            ("search", "search.corpus_path", search.corpus_path, "a file"),
            ("rubric", "rubric.path", self.rubric.path, "a JSON lines file"),
            ("gymnasium", "gymnasium.id", self.gymnasium.id, "an id of gymnasium.make"),
            ("textarena", "textarena.game", self.textarena.game, "a game of textarena.make"),
            ("openenv", "openenv.url", self.openenv.url, "the address of a server"),
            ("verifiers", "verifiers.id", self.verifiers.id, "an id of verifiers.load_environment"),
        ):
            require(self.name != name or path != "", key, path, f"{what} where environment.name is {name}")
        judged = self.name == "rubric" and self.rubric.checker == "judge"
        bound = "given where environment.rubric.checker is judge"
        for key, value in (("url", judge.url), ("model", judge.model)):
            require(not judged or value != "", f"rubric.judge.{key}", value, bound, "or checker=rules")

    @property
    def starts_slowly(self) -> bool:
        """Whether a session may take long to start: it runs code that is not Engram's."""
        return self.name in ("custom", *ADAPTERS)

    @property
    def makes_reward(self) -> bool:
        """Whether the configuration replaces the environment's own reward."""
        return self.reward != "" or len(self.reward_weights) > 0

    @property
    def label(self) -> str:
        """The environment's name for people."""
        return "mix" if self.mix else self.name

    @property
    def acts(self) -> tuple[str, int]:
        """The setting that bounds how often an episode asks for an act, and its value.

        Texts that are only read are no acts. The bound of others' environments is unknown and counts as 1.
        """
        if self.mix:
            return "mix", 1  # each of its environments is checked alone
        if self.name == "recall":
            unknown = self.recall.unknown_questions
            setting = "recall.questions + recall.unknown_questions" if unknown else "recall.questions"
            return setting, self.recall.questions + unknown
        if self.name == "search":
            return "search.max_turns", self.search.max_turns
        if self.name == "mcp":
            return "mcp.max_turns", self.mcp.max_turns
        if self.name == "conversation" and self.conversation.format != "longmemeval":
            return "conversation.questions_per_episode", self.conversation.questions_per_episode
        return "name", 1  # LongMemEval, rubric and records ask once
