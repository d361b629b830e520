"""A real Chromium that looks at townhalls, and writes down what it should not have to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from ..support import PATIENCE, Hall

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
_WATCH = "addEventListener('securitypolicyviolation', (e) => console.error(`violates ${e.violatedDirective}`))"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine, without a window."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    assert found, 'no Chromium is installed, and make test-system is about one: apt-get install chromium'
    expect.set_options(timeout=2 * PATIENCE * 1000)  # a page that lost its townhall tries again within 18 s
    with sync_playwright() as playwright:
        arguments = ['--disable-dev-shm-usage', *(['--no-sandbox'] if os.geteuid() == 0 else [])]
        browser = playwright.chromium.launch(executable_path=found, args=arguments, timeout=6 * PATIENCE * 1000)
        yield browser
        browser.close()


class Visit:
    """One person at the dashboard of a townhall: a context of its own. At its end the page must have had no error."""

    def __init__(self, browser: Browser, hall: Hall, **options: Any) -> None:
        options = {'viewport': {'width': 1400, 'height': 1000}} | options
        self.context = browser.new_context(base_url=f'http://127.0.0.1:{hall.port}', **options)
        self.context.set_default_timeout(2 * PATIENCE * 1000)
        self.context.add_init_script(_WATCH)
        self.faults: list[str] = []
        self.requests: list[str] = []
        self.page = self.open()

    def open(self) -> Page:
        """A new tab."""
        page = self.context.new_page()
        page.on('pageerror', lambda error: self.faults.append(str(error)))
        page.on('console', lambda said: self.faults.append(said.text) if 'violates' in said.text else None)
        page.on('request', lambda request: self.requests.append(request.url))
        page.goto('/')
        return page

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: TracebackType | BaseException | None) -> None:
        self.context.close()
        assert kind or not self.faults, self.faults

    def is_live(self) -> None:
        """Waits until it is connected and shows the town."""
        expect(self.page.locator('#link')).to_have_text('Live')
        expect(self.page.locator('#agents .none')).not_to_have_text('Nothing is loaded yet.')

    def press(self, name: str, within: str = 'body') -> None:
        """Presses the button of that name."""
        self.page.locator(within).get_by_role('button', name=name, exact=True).click()

    def agent(self, name: str) -> Locator:
        """The row of an agent."""
        return self.page.locator('#agents tbody tr').filter(has=self.page.get_by_role('button', name=name, exact=True))

    def tab(self, name: str) -> Locator:
        return self.page.locator(f'#tab-{name}')

    def count(self, tab: str) -> Locator:
        """The number of tasks that a tab tells."""
        return self.tab(tab).locator('b')

    def fill(self, dialog: str, button: str, **fields: str) -> None:
        """Fills the form of a dialog, and sends it."""
        for name, value in fields.items():
            self.page.locator(f'#{dialog} [name={name}]').fill(value)
        self.press(button, f'#{dialog}')

    def is_too_wide(self) -> bool:
        """Whether one would have to scroll sideways."""
        return bool(self.page.evaluate('document.documentElement.scrollWidth > innerWidth'))
