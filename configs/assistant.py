"""Settings of the commands that use what was trained: ``chat`` and ``serve``. `configs.schema` puts them into a run."""

from __future__ import annotations

from dataclasses import dataclass

from configs.bounds import not_negative, positive


@dataclass(frozen=True)
class AssistantConfig:
    """A conversation is one long episode: it owns a memory. Context and flashcards are bounded by ``memory``, replies by ``sampling``."""

    system_prompt: str = (
        ""  # empty: that of the environment in this configuration, which a checkpoint was trained under
    )
    temperature: float = 0.0  # 0 is greedy
    max_conversations: int = (
        64  # that serve keeps in memory; when one more comes, the one that was idle longest is put away
    )
    idle_s: float = 3600.0  # a conversation that was idle for so long is put away too
    save_dir: str = ""  # put away means: saved here, and loaded when it is named again; empty: dropped
    max_body_kib: int = 256  # of one request to serve
    request_timeout_s: float = 300.0  # of one request to serve, waiting for its turn included

    def __post_init__(self) -> None:
        not_negative(self, "temperature")
        positive(self, "max_conversations", "idle_s", "max_body_kib", "request_timeout_s")
