"""Shows a page in a real browser without a screen (Chromium of PySide6-WebEngine).

Prints JSON: the page's text, its requests, alerts and console messages.

python browser_page.py URL [SCREENSHOT.png]
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_DISABLE_SANDBOX": "1"}

from PySide6.QtCore import QTimer, QUrl  # type: ignore[import-not-found]
from PySide6.QtWebEngineCore import (  # type: ignore[import-not-found]
    QWebEnginePage,
    QWebEngineUrlRequestInterceptor,
)
from PySide6.QtWebEngineWidgets import QWebEngineView  # type: ignore[import-not-found]
from PySide6.QtWidgets import QApplication  # type: ignore[import-not-found]

SETTLE_MS, LONGEST_MS = 1000, 60_000
seen: dict[str, list[str]] = {"requests": [], "alerts": [], "console": []}


class Network(QWebEngineUrlRequestInterceptor):  # type: ignore[misc]
    def interceptRequest(self, request: object) -> None:
        seen["requests"].append(request.requestUrl().toString())  # type: ignore[attr-defined]


class Page(QWebEnginePage):  # type: ignore[misc]
    def javaScriptAlert(self, origin: object, message: str) -> None:
        seen["alerts"].append(message)

    def javaScriptConsoleMessage(self, level: object, message: str, line: int, source: str) -> None:
        seen["console"].append(message)


def main(url: str, screenshot: str) -> int:
    app = QApplication(["browser", "--no-sandbox"])
    view, network = QWebEngineView(), Network()
    page = Page(view)
    page.setUrlRequestInterceptor(network)
    view.setPage(page)
    view.resize(1400, 1000)
    view.show()

    def done(text: str) -> None:
        print(json.dumps({"text": text, **seen}))
        sys.stdout.flush()
        os._exit(0)  # WebEngine's own end waits for a display that is not there

    def look() -> None:
        if screenshot:
            view.grab().save(screenshot)
        page.toPlainText(done)

    page.loadFinished.connect(lambda whole: QTimer.singleShot(SETTLE_MS, look))
    QTimer.singleShot(LONGEST_MS, lambda: os._exit(3))
    page.load(QUrl(url))
    return int(app.exec())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""))
