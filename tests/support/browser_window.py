"""A window of Chromium without a screen, which `browser.Browser` talks to in lines of JSON.

The engine is Qt's, QtWebEngine, which is Chromium. It runs in a process of its own, because the
colour scheme is an argument of the process.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_FLAGS = ("--disable-gpu", "--disable-background-networking")
_SCHEMES = {"dark": 0, "light": 1}
_ROUND_MS, _MOST_ROUNDS = 10, 1000
_MARK = "#ff00fe"
_ADD_CORNER = f"""(() => {{
  const corner = document.createElement("div");
  corner.id = "corner";
  corner.style = "position: fixed; right: 0; bottom: 0; border: 2px solid {_MARK}; z-index: 99";
  document.body.append(corner);
}})()"""

os.environ["QT_QPA_PLATFORM"] = "offscreen"
os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"  # root has none
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = " ".join(
    (*_FLAGS, f"--blink-settings=preferredColorScheme={_SCHEMES[sys.argv[1]]}")
)

from PySide6.QtCore import QEventLoop, QTimer, QUrl  # noqa: E402
from PySide6.QtGui import QImage, QPainter  # noqa: E402
from PySide6.QtWebEngineCore import QWebEngineSettings  # noqa: E402
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402


class Window:
    def __init__(self) -> None:
        self.view = QWebEngineView()
        # as on a phone, where they take no room
        bars = QWebEngineSettings.WebAttribute.ShowScrollBars
        self.view.settings().setAttribute(bars, False)

    def show(self, page: str, width: int, height: int) -> None:
        loop = QEventLoop()
        finished = []
        connection = self.view.loadFinished.connect(lambda ok: (finished.append(ok), loop.quit()))
        self.view.resize(width, height)
        self.view.show()
        self.view.load(QUrl.fromLocalFile(page))
        loop.exec()
        self.view.loadFinished.disconnect(connection)
        assert finished == [True], page

    def run(self, script: str) -> Any:
        loop, results = QEventLoop(), []
        self.view.page().runJavaScript(
            f"JSON.stringify({script} ?? null)", lambda value: (results.append(value), loop.quit())
        )
        loop.exec()
        return json.loads(results[0])

    def picture(self, path: str) -> None:
        """The whole page as a PNG, put together from what the window shows on its way down."""
        width, step = self.view.width(), self.view.height()
        height = self.run("document.documentElement.scrollHeight")
        whole = QImage(width, height, QImage.Format.Format_RGB32)
        painter = QPainter(whole)
        for top in range(0, height, step):
            self.run(f"scrollTo(0, {top})")
            painter.drawImage(0, self.run("scrollY"), self._painted())
        painter.end()
        whole.save(path)

    def _painted(self) -> QImage:
        """What the window shows, once it shows what was asked for."""
        # a corner changes its colour in the same frame as all the rest is painted
        self.run(_ADD_CORNER)
        self._grabbed(True)
        self.run("document.getElementById('corner').remove()")
        return self._grabbed(False)

    def _grabbed(self, is_marked: bool) -> QImage:
        for _ in range(_MOST_ROUNDS):
            loop = QEventLoop()
            QTimer.singleShot(_ROUND_MS, loop.quit)
            loop.exec()
            image = self.view.grab().toImage()
            corner = image.pixelColor(image.width() - 1, image.height() - 1).name()
            if (corner == _MARK) is is_marked:
                return image
        raise TimeoutError("the page is not painted")


def main() -> None:
    application = QApplication(sys.argv[:1])
    window = Window()
    for line in sys.stdin:
        wish = json.loads(line)
        window.show(str(Path(wish["page"]).resolve()), wish["width"], wish["height"])
        answer = window.run(wish["script"])
        if wish["picture"] is not None:
            window.picture(wish["picture"])
        print(json.dumps(answer), flush=True)
    del window, application


if __name__ == "__main__":
    main()
