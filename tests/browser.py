"""Pages in headless Chromium: what people look at, looked at.

Chromium is that of the system (Debian: `apt-get install chromium`): browsers of
playwright are no packages.
"""

import contextlib
import shutil
import urllib.parse

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome")
PHONE = (390, 844)


@pytest.fixture(scope="session")
def chromium():
  """The browser, started once."""
  from playwright.sync_api import sync_playwright

  found = [path for name in _NAMES if (path := shutil.which(name))]
  assert found, f"these tests need a browser: one of {', '.join(_NAMES)}"
  with sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=found[0], args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@pytest.fixture
def open_page(chromium):
  """Opens (url, size, dark, streams) -> playwright's page.

  When the test ends, no page may have written an error to its console, thrown
  one, failed to fetch something, or asked anybody but its own server. The
  browser reports an event stream that ends early as failed; `streams` is what
  the addresses of such streams begin with, and they may fail.
  """
  said: list[str] = []
  with contextlib.ExitStack() as stack:

    def open_one(url, size=(1280, 900), dark=False, streams=()):
      own = (urllib.parse.urljoin(url, "/"), "data:", "blob:")

      def note_request(request):
        if not request.url.startswith(own):
          said.append(f"asked for: {request.url}")

      def note_failure(request):
        if not request.url.startswith(tuple(streams)):
          said.append(f"not there: {request.url} ({request.failure})")

      context = chromium.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
      )
      stack.callback(context.close)
      page = context.new_page()
      page.on(
        "console", lambda m: said.append(m.text) if m.type == "error" else None
      )
      page.on("pageerror", lambda e: said.append(str(e)))
      page.on("request", note_request)
      page.on("requestfailed", note_failure)
      page.goto(url)
      return page

    yield open_one
    assert not said, said
