"""A real Chromium for the tests of the dashboard. Playwright drives Debian's browser, and downloads none."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, not installed here")

# Without these flags, Chromium looks up names outside of this machine at each start.
QUIET = (
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--no-first-run", "--disable-gpu",
    "--no-sandbox",  # root has no sandbox
)  # fmt: skip


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Run Chromium while entered."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        try:
            yield browser
        finally:
            await browser.close()


POLICY = """document.addEventListener("securitypolicyviolation",
  (event) => console.error(`policy: ${event.violatedDirective} forbids ${event.blockedURI}`));"""
"""Makes each violation of a page's policy an error that `Watch` notes."""


@dataclass
class Watch:
    """Events of a browser that a page must never cause."""

    origin: str
    dialogs: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)  # errors and warnings, such as violations of the policy
    foreign: list[str] = field(default_factory=list)  # requests to other origins

    def follow(self, page: Page) -> None:
        """Note what this page does from now on."""
        page.on("dialog", self._dialog)
        page.on("pageerror", lambda error: self.messages.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and self._message(message))
        page.on("request", lambda request: self._request(request.url))

    def check(self) -> None:
        """Assert that the page has done none of these things."""
        assert (self.dialogs, self.messages, self.foreign) == ([], [], [])

    def clear(self) -> None:
        """Forget what has happened."""
        for each in (self.dialogs, self.messages, self.foreign):
            each.clear()

    async def _dialog(self, dialog) -> None:
        self.dialogs.append(dialog.message)
        await dialog.dismiss()

    def _message(self, message) -> None:
        self.messages.append(message.text)

    def _request(self, url: str) -> None:
        if not url.startswith(f"{self.origin}/") and urlsplit(url).scheme not in ("data", "about"):
            self.foreign.append(url)


@asynccontextmanager
async def opened(
    browser: Browser, origin: str, token: str | None, **options
) -> AsyncIterator[tuple[Page, Watch]]:
    """Open a new page with this admin token, or none, and watch it; `options` as of `Browser.new_context`."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    context: BrowserContext = await browser.new_context(extra_http_headers=headers, **options)
    await context.add_init_script(POLICY)
    page = await context.new_page()
    watch = Watch(origin)
    watch.follow(page)
    try:
        yield page, watch
    finally:
        await context.close()
