"""A headless Chromium by the W3C WebDriver protocol: chromedriver and a few JSON requests, no package."""

import base64
import json
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ranks import free_port

SWITCHES = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
# The words of all elements that can be seen, those in shadow trees too, from the top of the page down.
SEEN = """
const words = [];
const walk = (node) => {
  if (node.nodeType === Node.TEXT_NODE) {
    const text = node.textContent.trim(), range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    if (text && box.width && box.height) words.push([box.top, box.left, text]);
  }
  if (node.nodeType === Node.ELEMENT_NODE && ["STYLE", "SCRIPT", "TEMPLATE"].includes(node.tagName)) return;
  if (node.shadowRoot) walk(node.shadowRoot);
  node.childNodes.forEach(walk);
};
walk(document.body);
return words;
"""
# The elements that match a selector, those in shadow trees too: what arguments[1] makes of each.
ALL = """
const [selector, body] = arguments, found = [], of = new Function("element", body);
const walk = (root) => {
  root.querySelectorAll(selector).forEach((element) => found.push(of(element)));
  root.querySelectorAll("*").forEach((element) => element.shadowRoot && walk(element.shadowRoot));
};
walk(document);
return found;
"""


class Browser:
    """One window."""

    def __init__(self, address: str, session: str):
        self._root = f"{address}/session/{session}"

    def open(self, url: str) -> None:
        """Go to a page."""
        self._post("url", url="about:blank")  # a change of the fragment alone loads nothing
        self._post("url", url=url)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a JavaScript function body returns."""
        return self._post("execute/sync", script=script, args=list(arguments))

    def seen(self) -> list[tuple[float, float, str]]:
        """(top, left, text) in pixels of every piece of text that is laid out."""
        return [(top, left, text) for top, left, text in self.run(SEEN)]

    def text(self) -> str:
        """All text that is laid out, a piece a line."""
        return "\n".join(text for _, _, text in self.seen())

    def all(self, selector: str, body: str = "return element.textContent.trim()") -> list[Any]:
        """What `body`, JavaScript, returns for each `element` that matches."""
        return self.run(ALL, selector, body)

    def screenshot(self, path: Path) -> None:
        """The window as PNG."""
        with urllib.request.urlopen(f"{self._root}/screenshot", timeout=60) as answer:
            path.write_bytes(base64.b64decode(json.load(answer)["value"]))

    def wait_for(self, holds: Callable[[], Any], what: str, seconds: float = 90) -> Any:
        """What `holds` gives once it is true; AssertionError with the page's text where it never is."""
        deadline = time.monotonic() + seconds
        while not (found := holds()):
            assert time.monotonic() < deadline, f"no {what} on the page:\n{self.text()}"
            time.sleep(0.3)
        return found

    def _post(self, command: str, **body: Any) -> Any:
        return post(f"{self._root}/{command}", **body)


def get(address: str) -> Any:
    """The JSON document at an address."""
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.load(answer)


def post(address: str, /, **body: Any) -> Any:
    """The value that a WebDriver command gives."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["value"]


@contextmanager
def browser(width: int = 1600, height: int = 1200) -> Iterator[Browser]:
    """A window of this size until the end of the block."""
    with served("chromedriver", ready=lambda address: get(f"{address}/status")["value"]["ready"]) as address:
        options = {"args": [*SWITCHES, f"--window-size={width},{height}"]}
        capabilities = {"alwaysMatch": {"browserName": "chrome", "goog:chromeOptions": options}}
        session = post(f"{address}/session", capabilities=capabilities)["sessionId"]
        yield Browser(address, session)
        request = urllib.request.Request(f"{address}/session/{session}", method="DELETE")
        urllib.request.urlopen(request, timeout=60).close()


@contextmanager
def served(*command: str | Path, ready: Callable[[str], bool]) -> Iterator[str]:
    """The address of a server on a free port of this machine, from when it is ready to the end of the block."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*command, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not _is_ready(address, ready):
            assert server.poll() is None, f"{command[0]} ended with exit code {server.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} is not ready"
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _is_ready(address: str, ready: Callable[[str], bool]) -> bool:
    try:
        return ready(address)
    except OSError:  # nobody listens yet
        return False
