"""A hub that does not answer: one line, soon, and none of its libraries' own."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from actors.environments.hub_data import local_copy
from actors.protocols import TaskError
from cluster.cli import main
from configs.hub import hub_or_cache
from configs.models import ModelError, model_shape, resolve_model
from configs.schema import ModelConfig

NAME = "org/model"


def test_every_look_up_ends_soon_and_says_why(
    silent_hub: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    for look_up in (model_shape, resolve_model):
        with pytest.raises(ModelError, match=r"no answer in 0.5 s; HF_HUB_ETAG_TIMEOUT=30 waits longer"):
            look_up(ModelConfig(name=NAME))
    assert capfd.readouterr() == ("", "")  # a library prints each of its retries: 23 s for a model


def test_an_answer_that_is_no_hubs_is_said(
    silent_hub: socket.socket, capfd: pytest.CaptureFixture[str]
) -> None:
    """A portal answers every address with a page."""

    def answer() -> None:
        with silent_hub.accept()[0] as connection:
            connection.recv(65536)
            page = b"<html>Log in</html>"
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page))

    threading.Thread(target=answer, daemon=True).start()
    with hub_or_cache(NAME) as silence:
        assert silence.startswith("its answer cannot be read (") and "\n" not in silence
    assert capfd.readouterr() == ("", "")


def test_a_data_set_asks_once_too(silent_hub: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets", reason="the extra hub is not installed")
    with pytest.raises(TaskError, match=r"hub:org/rows: datasets cannot load it \(not in the local cache"):
        local_copy("hub:org/rows", False)
    assert "Retrying" not in capfd.readouterr().err


def test_plan_prints_its_one_line(silent_hub: socket.socket, capfd: pytest.CaptureFixture[str]) -> None:
    silent_hub.close()  # refused at once
    assert main(["plan", "one_gpu", f"model.name={NAME}", "--gpus", "1", "--gpu-gib", "24"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"error: model '{NAME}': its config.json is neither in the local cache")
    assert "refused" in err


def test_a_cached_model_needs_no_hub(silent_hub: socket.socket, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--org--model"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match=r"config\.json"):  # found, read, and no model of ours
        resolve_model(ModelConfig(name=NAME))
    with hub_or_cache(NAME) as silence:
        assert silence and constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE


def test_a_folder_asks_nobody(silent_hub: socket.socket, tmp_path: Path) -> None:
    with hub_or_cache(str(tmp_path)) as silence:
        assert silence == ""
