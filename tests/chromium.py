"""A headless Chromium driven through its own debugging protocol: no driver, no package but websocket-client
(JupyterLab brings it).

    with Chromium() as browser:
        page = browser.open("file:///…", width=400, dark=True)
        page.value("document.title")        # JavaScript, promises awaited
        page.click(".handle"), page.press("ArrowDown"), page.type("moon"), page.drag(x0, y0, x1, y1)
        page.shot("page.png")

`page.errors` holds uncaught exceptions and console errors, `page.requests` every address that was asked for.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections import deque
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
try:
    import websocket
except ImportError:
    websocket = None

needs_browser = pytest.mark.skipif(
    not (CHROMIUM and websocket),
    reason="needs Chromium on the PATH"
    if not CHROMIUM
    else "needs the package websocket-client, which JupyterLab brings",
)

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--mute-audio",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
]
KEYS = {
    "Enter": ("\r", 13),
    "Escape": ("", 27),
    "ArrowDown": ("", 40),
    "ArrowUp": ("", 38),
    "ArrowLeft": ("", 37),
    "ArrowRight": ("", 39),
    "Home": ("", 36),
    "End": ("", 35),
    "PageDown": ("", 34),
    "PageUp": ("", 33),
    "Tab": ("\t", 9),
    " ": (" ", 32),
}


class Chromium:
    """One browser process with a profile of its own."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": self.folder, "DBUS_SESSION_BUS_ADDRESS": "disabled:"},
            start_new_session=True,
        )
        port = Path(self.folder, "DevToolsActivePort")
        self.address = _wait(
            lambda: port.exists() and port.read_text().splitlines()[1:] and port.read_text().splitlines(),
            60,
            "Chromium to start",
        )
        self.socket = websocket.create_connection(
            f"ws://127.0.0.1:{self.address[0]}{self.address[1]}", timeout=60
        )
        self.count, self.events = 0, {}
        return self

    def __exit__(self, *error):
        try:
            self.send("Browser.close")
        except Exception:
            pass
        self.socket.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def send(self, method, session=None, **params):
        """Result of a command; events that come in between are kept for their page."""
        self.count += 1
        number = self.count
        self.socket.send(
            json.dumps(
                {
                    "id": number,
                    "method": method,
                    "params": params,
                    **({"sessionId": session} if session else {}),
                }
            )
        )
        while True:
            message = self.receive()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def receive(self):
        message = json.loads(self.socket.recv())
        if "method" in message and message.get("sessionId") in self.events:
            self.events[message["sessionId"]].append(message)
        return message

    def open(self, address=None, *, width=1200, height=900, dark=False):
        """A new page. Its window has the given size; `dark` is what the system prefers."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events[session] = deque()
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.send(f"{domain}.enable")
        page.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        if address:
            page.go(address)
        return page


class Page:
    def __init__(self, browser, session, target):
        self.browser, self.session, self.target, self.errors, self.requests, self.calls = (
            browser,
            session,
            target,
            [],
            [],
            deque(),
        )

    def send(self, method, **params):
        result = self.browser.send(method, self.session, **params)
        self.sort_events()
        return result

    def sort_events(self):
        events = self.browser.events[self.session]
        while events:
            event = events.popleft()
            method, params = event["method"], event["params"]
            if method == "Runtime.exceptionThrown":
                self.errors.append(
                    params["exceptionDetails"].get("exception", {}).get("description")
                    or params["exceptionDetails"]["text"]
                )
            elif method == "Runtime.consoleAPICalled" and params["type"] == "error":
                self.errors.append(
                    " ".join(str(a.get("value", a.get("description"))) for a in params["args"])
                )
            elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Page.javascriptDialogOpening":
                self.errors.append(f"dialog: {params['message']}")
                self.browser.send("Page.handleJavaScriptDialog", self.session, accept=False)
            elif method == "Runtime.bindingCalled":
                self.calls.append((params["name"], params["payload"]))

    def go(self, address):
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def value(self, script):
        """Value of a JavaScript expression; a promise is awaited."""
        result = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(
                result["exceptionDetails"].get("exception", {}).get("description")
                or result["exceptionDetails"]["text"]
            )
        return result["result"].get("value")

    def wait(self, script, seconds=30, pause=0.03, meanwhile=None):
        """Wait until an expression is truthy, and return it."""

        def check():
            if meanwhile:
                meanwhile()
            return self.value(
                f"(async () => "
                f"{{ const value = await ({script}); return value instanceof Node ? true : value; }})()"
            )

        try:
            return _wait(check, seconds, script, pause)
        except TimeoutError as err:
            raise TimeoutError(f"{err}; errors in the page: {self.errors}") from None

    def box(self, selector):
        box = self.value(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)}); if (!node) return null; "
            "node.scrollIntoView({block: 'nearest'}); const b = node.getBoundingClientRect(); "
            "return [b.x, b.y, b.width, b.height]; })()"
        )
        assert box, f"no element {selector}"
        return box

    def mouse(self, kind, x, y, **more):
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", **more)

    def click(self, selector, modifiers=0):
        x, y, width, height = self.box(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.mouse(kind, x + width / 2, y + height / 2, clickCount=1, modifiers=modifiers)

    def hover(self, selector):
        x, y, width, height = self.box(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x + width / 2, y=y + height / 2)

    def drag(self, x0, y0, x1, y1):
        self.mouse("mousePressed", x0, y0, clickCount=1, buttons=1)
        for step in range(1, 5):
            self.mouse("mouseMoved", x0 + (x1 - x0) * step / 4, y0 + (y1 - y0) * step / 4, buttons=1)
        self.mouse("mouseReleased", x1, y1, clickCount=1)

    def press(self, key, modifiers=0):
        """One key; modifiers are 1 Alt, 2 Ctrl, 4 Meta, 8 Shift."""
        text, code = KEYS.get(key, (key, ord(key.upper()) if len(key) == 1 else 0))
        self.send(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            key=key,
            text=text if not modifiers & 6 else "",
            windowsVirtualKeyCode=code,
            modifiers=modifiers,
        )
        self.send(
            "Input.dispatchKeyEvent", type="keyUp", key=key, windowsVirtualKeyCode=code, modifiers=modifiers
        )

    def type(self, text):
        self.send("Input.insertText", text=text)

    def shot(self, path, full=True):
        """A picture of the page."""
        Path(path).write_bytes(
            base64.b64decode(
                self.send("Page.captureScreenshot", format="png", captureBeyondViewport=full)["data"]
            )
        )
        return path

    def close(self):
        self.browser.send("Target.closeTarget", targetId=self.target)


def _wait(check, seconds, what, pause=0.05):
    end = time.monotonic() + seconds
    while True:
        if value := check():
            return value
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s in vain for {what}")
        time.sleep(pause)
