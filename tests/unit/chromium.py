"""A headless Chromium that is told what to do over its DevTools protocol, with no more than aiohttp."""

import asyncio
import base64
import json
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WHY_NOT = "no Chromium here (Debian: apt-get install chromium)"
_LIMIT = 240  # seconds for an answer; a loaded machine is slow


class Browser:
    """One page in a browser of its own. Every event of the protocol is kept under its name in `events`.

    `async with Browser(profile_folder) as browser: …`
    """

    def __init__(self, profile: Path) -> None:
        self.profile = profile
        self.events = defaultdict(list)
        self._answers: dict[int, asyncio.Future] = {}
        self._count = 0

    async def __aenter__(self):
        import aiohttp

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
        flags += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        flags += [f"--user-data-dir={self.profile}", "--disable-dev-shm-usage", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([CHROMIUM, *flags], **quiet, start_new_session=True)
        self._session = aiohttp.ClientSession()
        port_file = self.profile / "DevToolsActivePort"
        try:
            async with asyncio.timeout(_LIMIT):
                while not (port_file.is_file() and port_file.read_text().count("\n")):
                    assert self.process.poll() is None, f"Chromium ended with {self.process.returncode}"
                    await asyncio.sleep(0.05)
                port = port_file.read_text().split()[0]
                async with self._session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    tabs = [tab for tab in await reply.json() if tab["type"] == "page"]
                self._socket = await self._session.ws_connect(tabs[0]["webSocketDebuggerUrl"], max_msg_size=0)
            self._reader = asyncio.create_task(self._read())
            for domain in ("Page", "Runtime", "Log", "Network"):
                await self.call(f"{domain}.enable")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_):
        if hasattr(self, "_reader"):
            self._reader.cancel()
        await self._session.close()
        self.process.terminate()
        try:
            await asyncio.to_thread(self.process.wait, 10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    async def _read(self):
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            else:
                self.events[told["method"]].append(told["params"])

    async def call(self, method: str, **parameters) -> dict:
        self._count += 1
        answer = self._answers[self._count] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._count, "method": method, "params": parameters})
        told = await asyncio.wait_for(answer, _LIMIT)
        assert "error" not in told, f"{method}: {told['error']}"
        return told["result"]

    async def open(self, file: Path) -> None:
        before = len(self.events["Page.loadEventFired"])
        await self.call("Page.navigate", url=file.resolve().as_uri())
        async with asyncio.timeout(_LIMIT):
            while len(self.events["Page.loadEventFired"]) == before:
                await asyncio.sleep(0.02)
        await self.settled()

    async def run(self, script: str):
        """The value of a JavaScript expression."""
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def settled(self) -> None:
        """Wait for two frames, after which what was asked of the page is drawn."""
        await self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    async def press(self, key: str, code: int, text: str = "", shift: bool = False) -> None:
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        await self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    async def look(self, width: int, dark: bool = False, height: int = 900, media: str = "screen") -> None:
        """The size of the window, in CSS pixels, the colours that its user prefers, and whether it is paper."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        await self.settled()

    async def picture(self, target: Path) -> None:
        told = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        target.write_bytes(base64.b64decode(told["data"]))

    async def paper(self, target: Path) -> None:
        told = await self.call("Page.printToPDF", printBackground=False)
        target.write_bytes(base64.b64decode(told["data"]))

    def complaints(self) -> list[str]:
        """Errors and warnings of the console and uncaught exceptions."""
        found = [entry["entry"]["text"] for entry in self.events["Log.entryAdded"]]
        found += [str(told["args"]) for told in self.events["Runtime.consoleAPICalled"]]
        return found + [str(told["exceptionDetails"]) for told in self.events["Runtime.exceptionThrown"]]

    def requests(self) -> list[str]:
        return [told["request"]["url"] for told in self.events["Network.requestWillBeSent"]]
