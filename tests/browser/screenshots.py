"""Makes the pictures of docs/images from the running demo: `make screenshots`."""

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from browsers import chromium
from playwright.async_api import Browser
from wire import exchange, request

IMAGES = Path(__file__).parents[2] / "docs" / "images"
PICTURES = {
    "now": "", "events": "events", "event": "events/{event}", "deliveries": "deliveries?state=delivered",
    "destination": "destinations/receiver", "refused": "refused", "workers": "workers", "jobs": "jobs",
}  # fmt: skip
"""Path of the page of each picture."""

LOOKS = {"desktop-light": (1440, "light"), "desktop-dark": (1440, "dark"),
         "phone-light": (390, "light"), "phone-dark": (390, "dark")}  # fmt: skip
"""Width and colours."""

KEPT = ("now-desktop-light", "event-desktop-light", "destination-phone-dark")
"""The pictures in docs/images; the others are for those who judge the pages."""


@asynccontextmanager
async def demo() -> AsyncIterator[Path]:
    """Run the demo to the end of its story; yield the path of its socket."""
    command = (sys.executable, "-c", "from relay.cli import main; main()", "serve", "--demo")
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    text = ""
    try:
        async with asyncio.timeout(60):
            while "--socket" not in text:
                text += (await process.stdout.readline()).decode()
        [socket] = re.findall(r"--socket (\S+)", text)
        yield Path(socket)
    finally:
        process.terminate()
        await process.communicate()


async def ask(socket: Path, method: str, path: str) -> dict:
    """Ask the admin API over the socket."""
    return json.loads((await exchange(socket, request(method, f"/api/{path}"))).body)


async def take(browser: Browser, folder: Path, names: tuple[str, ...] | None = None) -> None:
    """Write the named pictures, or all, into a folder."""
    async with demo() as socket:
        [event, *_] = (await ask(socket, "GET", "events?type=moddy.*&limit=1"))["items"]
        for look, (width, scheme) in LOOKS.items():
            wanted = [name for name in PICTURES if names is None or f"{name}-{look}" in names]
            if not wanted:
                continue
            login = await ask(socket, "POST", "logins")
            context = await browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page = await context.new_page()
            await page.goto(login["url"])
            await page.locator("h1", has_text="Now").wait_for()
            root = login["url"].partition("#")[0]
            for name in wanted:
                await page.goto(root + PICTURES[name].format(event=event["id"]))
                await page.screenshot(path=folder / f"{name}-{look}.png", full_page=True)
            await context.close()


async def main(folder: Path, names: tuple[str, ...] | None) -> None:
    """Write the named pictures, or all, into a folder, with a new browser."""
    async with chromium() as browser:
        await take(browser, folder, names)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        asyncio.run(main(Path(sys.argv[1]), None))
    else:
        asyncio.run(main(IMAGES, KEPT))
