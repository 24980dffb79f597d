"""Figures of the driver's machine, in the section system/: MLflow's own monitors, logged like any metric."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_log = logging.getLogger(__name__)


class SystemMetrics(threading.Thread):
    """Calls ``log`` with "system/..." metrics every ``interval_s``.

    The step counts the seconds since ``began`` (s since 1970), so a resumed run continues the curves, also
    with another interval.
    """

    def __init__(
        self, log: Callable[[Mapping[str, float], int], None], interval_s: float, began: float
    ) -> None:
        super().__init__(name="system-metrics", daemon=True)
        self._log_metrics, self._interval_s, self._began = log, interval_s, began
        self._ended = threading.Event()

    def run(self) -> None:
        monitors = _monitors()
        while not self._ended.wait(self._interval_s):
            figures: dict[str, float] = {}
            for monitor in monitors:
                try:
                    monitor.collect_metrics()
                    figures |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
                except Exception as error:  # noqa: BLE001  none ends the rest
                    _log.debug("system metrics: %s", error)
            figures = {f"system/{name}": float(value) for name, value in figures.items()}
            self._log_metrics(figures, int(time.time() - self._began))

    def end(self) -> None:
        self._ended.set()
        if self.is_alive():
            self.join(5.0)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except (ImportError, RuntimeError) as error:  # no NVML, or no GPU
        _log.debug("system metrics: no GPU (%s)", error)
    return monitors
