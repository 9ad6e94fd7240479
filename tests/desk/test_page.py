"""The desk in a headless Chromium, under Voila as `fraud dashboard` starts it, on a log that fills up."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import psycopg2
import psycopg2.extensions
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from fraud_nb.apps.dashboard import HEADER, NOTEBOOK, dashboard_command
from tests.conftest import own_database
from tests.desk.desk_kit import CALM, Shop, Site, chromium, now_ms, serving, shop_in, until

SCRIPT = "<script>document.title='owned'</script><b>shop"
HEAVY = ("xgboost", "shap", "pandas", "matplotlib", "numba", "mlflow", "kafka", "redis", "sklearn")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium(), args=CALM)
        yield running
        running.close()


@pytest.fixture(scope="module")
def shop(postgres: str) -> Iterator[Shop]:
    with own_database(postgres, "page_test") as dsn:
        filled = shop_in(dsn)
        filled.trade(2_000)
        filled.sell(filled.purchase(now_ms(), bad=True, transaction_id="odd", merchant_id=SCRIPT, category=None,
                                    amount_minor=9_000_000))  # fmt: skip
        yield filled


@pytest.fixture(scope="module")
def site(shop: Shop) -> Iterator[Site]:
    with serving(shop.dsn, FRAUD_ANALYST="ada") as running:
        yield running


class Visit:
    """A tab, with everything it complained about or asked of others."""

    def __init__(self, context: BrowserContext) -> None:
        self.page: Page = context.new_page()
        self.errors: list[str] = []
        self.strangers: list[str] = []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda asked: self._asked(asked.url))

    def _asked(self, url: str) -> None:
        if not url.startswith(("http://127.0.0.1:", "ws://127.0.0.1:", "data:", "blob:")):
            self.strangers.append(url)

    def go(self, url: str) -> Page:
        """Open the desk and wait until it shows something."""
        self.page.goto(url, timeout=120_000)
        self.page.wait_for_selector(".desk[data-ticks]", timeout=90_000)
        return self.page

    def again(self) -> None:
        """Reload it."""
        self.page.reload()
        self.page.wait_for_selector(".desk[data-ticks]", timeout=90_000)

    def face(self, name: str) -> None:
        """Wait for it."""
        self.page.wait_for_selector(f'.desk[data-face="{name}"]', timeout=90_000)


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    yield Visit(context)
    context.close()


@pytest.fixture(autouse=True)
def fresh(shop: Shop) -> None:
    """Something new, so that the desk is live."""
    shop.trade(20, seconds=2)


def tell(figure: str) -> None:
    """For people who run the tests with -s."""
    sys.stdout.write(figure + "\n")


def row_of(page: Page, ident: str) -> Any:
    return page.locator(f'.queue tr[data-id="{ident}"]')


def verdicts(shop: Shop, ident: str) -> list[tuple[Any, ...]]:
    return shop.rows("SELECT says, note, analyst FROM verdicts WHERE transaction_id = %s ORDER BY verdict", ident)


def test_what_it_shows_is_what_the_log_holds(visit: Visit, site: Site, shop: Shop) -> None:
    page = visit.go(site.url)
    ((decided, alerts),) = shop.rows("SELECT count(*), count(*) FILTER (WHERE outcome <> 'approve') FROM decisions")
    tiles = page.locator(".tile")
    expect(tiles.nth(0).locator("strong")).to_have_text(f"{decided:,}")
    expect(page.locator(".tile", has_text="Alert rate").locator("span")).to_have_text(f"{alerts:,} not simply approved")
    expect(page.locator(".outcomes li").first).to_contain_text(f"{decided - alerts:,}")
    expect(page.locator(".categories li:visible")).to_have_count(8)
    expect(page.locator(".queue tbody tr:visible").first).to_have_attribute("data-id", "odd")
    assert page.locator(".map circle[visibility=visible]").count() > 100
    assert page.title() == "Fraud desk"
    assert visit.errors == [] and visit.strangers == []


def test_a_case_and_a_script_in_a_shops_name_is_text(visit: Visit, site: Site, shop: Shop) -> None:
    page = visit.go(site.url)
    row_of(page, "odd").click()
    case = page.locator(".case")
    expect(case.locator(".amount")).to_have_text("90,000.00 EUR")
    expect(case.locator("dd", has_text=SCRIPT).first).to_be_visible()
    ((reasons,),) = shop.rows("SELECT reasons FROM decisions WHERE transaction_id = 'odd'")
    told = [reason["text"] for reason in json.loads(reasons)]
    expect(case.locator(".waterfall li:visible span:first-child")).to_have_text([*told, "all other signs together"])
    case.locator("summary").click()
    expect(case.locator(".features dt", has_text=re.compile("^amount$"))).to_be_visible()
    assert page.title() == "Fraud desk" and page.locator(".desk b, .desk script").count() == 0
    assert visit.errors == []


def test_a_verdict_is_stored_by_a_click_survives_reload_and_is_undone(visit: Visit, site: Site, shop: Shop) -> None:
    page = visit.go(site.url)
    row_of(page, "odd").click()
    page.locator('.case[data-id="odd"]').wait_for()
    page.get_by_label("Note to the verdict").fill("the card holder called")
    page.evaluate("addEventListener('click', () => { window.clicked = Date.now() }, { capture: true, once: true })")
    page.get_by_role("button", name="Fraud F").click()
    expect(page.get_by_role("button", name="Fraud F")).to_have_attribute("aria-pressed", "true")
    assert verdicts(shop, "odd") == [("fraud", "the card holder called", "ada")]
    ((stored_ms,),) = shop.rows("SELECT (extract(epoch FROM max(given_at)) * 1000)::bigint FROM verdicts")
    tell(f"verdict: {stored_ms - page.evaluate('window.clicked')} ms from click to stored")
    visit.again()
    expect(page.locator(".said li").first).to_contain_text("the card holder called")
    expect(row_of(page, "odd").locator(".verdict")).to_have_text("fraud")
    page.get_by_role("button", name="Undo U").click()
    expect(page.get_by_role("button", name="Fraud F")).to_have_attribute("aria-pressed", "false")
    assert [says for says, *_ in verdicts(shop, "odd")] == ["fraud", "undo"]
    page.get_by_role("button", name="Undo U").click()
    expect(page.get_by_role("alert")).to_contain_text("no verdict stands")
    assert len(verdicts(shop, "odd")) == 2 and visit.errors == []


def test_everything_by_keyboard(visit: Visit, site: Site, shop: Shop) -> None:
    page = visit.go(site.url)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    chosen = page.locator('.queue tr[aria-selected="true"]')
    second = page.locator(".queue tbody tr").nth(1)
    expect(second).to_have_attribute("aria-selected", "true")
    expect(second).to_be_focused()
    ident = chosen.get_attribute("data-id")
    assert ident is not None
    page.locator(f'.case[data-id="{ident}"]').wait_for()
    page.keyboard.press("Enter")
    expect(page.locator(".case")).to_be_focused()
    page.keyboard.press("g")
    expect(page.get_by_role("button", name="Genuine G")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("n")
    page.keyboard.type("fug?")  # typing gives no verdict
    page.keyboard.press("Escape")
    expect(chosen).to_be_focused()
    page.keyboard.press("u")
    expect(page.get_by_role("button", name="Genuine G")).to_have_attribute("aria-pressed", "false")
    assert verdicts(shop, ident) == [("genuine", "", "ada"), ("undo", "fug?", "ada")]
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "focus can be seen"


def test_the_order_rests_while_it_is_looked_at(visit: Visit, site: Site, shop: Shop) -> None:
    page = visit.go(site.url)
    page.locator(".queue tbody tr").first.hover()
    top = page.locator(".queue tbody tr").first.get_attribute("data-id")
    (dear,) = shop.sell(shop.purchase(now_ms(), bad=True, amount_minor=900_000_000, transaction_id=f"dear-{now_ms()}"))
    expect(page.locator(".fresh")).to_contain_text("new")
    assert page.locator(".queue tbody tr").first.get_attribute("data-id") == top
    page.keyboard.press("r")
    expect(page.locator(".queue tbody tr").first).to_have_attribute("data-id", dear)


def test_themes(visit: Visit, browser: Browser, site: Site) -> None:
    page = visit.go(site.url)
    background = "getComputedStyle(document.querySelector('.desk')).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate(background) != light
    visit.again()
    assert page.locator(".desk").get_attribute("data-theme") == "dark", "the choice is remembered"
    context = browser.new_context(color_scheme="dark")
    assert Visit(context).go(site.url).locator(".desk").get_attribute("data-theme") == "dark", "the system's choice"
    context.close()


@pytest.mark.parametrize("width", [390, 768, 1024, 1600])
def test_nothing_sticks_out_at_any_width(browser: Browser, site: Site, width: int) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = Visit(context).go(site.url)
    row_of(page, "odd").click()
    page.locator('.case[data-id="odd"]').wait_for()
    wide = page.evaluate(
        "[...document.querySelectorAll('.desk *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1"
        " && !e.closest('svg, .scroll, .case, dialog')).map(e => e.className)"
    )
    assert wide == []
    context.close()


def test_faces_empty_stale_and_away(visit: Visit, postgres: str) -> None:
    with own_database(postgres, "faces_test") as dsn:
        shop = shop_in(dsn)
        with serving(dsn, FRAUD_ANALYST="ada") as site:
            page = visit.go(site.url)
            visit.face("empty")
            expect(page.locator(".face")).to_contain_text("fraud stream")
            shop.sell(shop.purchase(now_ms(), bad=True))
            visit.face("live")
            visit.face("stale")
            expect(page.locator(".face")).to_contain_text("Nothing new for")
            name, owner = psycopg2.extensions.parse_dsn(dsn)["dbname"], psycopg2.connect(postgres)
            owner.autocommit = True
            owner.cursor().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            owner.cursor().execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
            visit.face("away")
            expect(page.locator(".tile").first.locator("strong")).to_have_text("1"), "what was known stays"
            page.locator(".queue tbody tr").first.click()
            owner.cursor().execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
            owner.close()
            visit.face("stale")
            shop = Shop(dsn, seed=8)
            shop.sell(shop.purchase(now_ms(), transaction_id="after"))
            visit.face("live")
            expect(page.locator(".tile").first.locator("strong")).to_have_text("2")
            assert visit.errors == []
        visit.face("lost")
        expect(page.get_by_role("button", name="Reload")).to_be_visible()


def test_nobody_signed_in_gives_no_verdict_and_a_proxy_says_who_it_is(browser: Browser, shop: Shop) -> None:
    with serving(shop.dsn) as site:
        anonymous = browser.new_context()
        page = Visit(anonymous).go(site.url)
        row_of(page, "odd").click()
        expect(page.get_by_role("button", name="Fraud F")).to_be_disabled()
        expect(page.get_by_role("alert")).to_contain_text("FRAUD_ANALYST")
        before = len(verdicts(shop, "odd"))
        page.keyboard.press("f")
        anonymous.close()
        for pooled in (True, False):  # a kernel that was warm before the request, and one that was started by it
            until(lambda: site.log.read_text().count("Kernel pool of"), lambda filled: filled >= 2)
            signed_in = browser.new_context(extra_http_headers={HEADER: "bea"})
            pages = [Visit(signed_in).page for _ in range(1 if pooled else 2)]
            for page in pages:
                page.goto(site.url, wait_until="commit")
            expect(pages[-1].locator(".analyst")).to_have_text("bea", timeout=90_000)
            signed_in.close()
        assert len(verdicts(shop, "odd")) == before


# ---- what it costs


def test_the_kernel_is_thin() -> None:
    program = f"import sys, fraud_nb.apps.dashboard; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kernel_ends_when_the_tab_is_closed_and_was_small(browser: Browser, shop: Shop) -> None:
    with serving(shop.dsn, pool=0, quiet_s=5) as site:
        context = browser.new_context()
        visit = Visit(context)
        began_ms = now_ms()
        visit.go(site.url)
        tell(f"first paint, cold: {now_ms() - began_ms} ms")
        (kernel,) = site.kernels()
        visit.page.wait_for_selector('.desk[data-ticks="5"]')
        memory_mb = site.rss_mb(kernel)
        tell(f"kernel: {memory_mb:.0f} MB")
        assert memory_mb < 200
        context.close()
        until(site.kernels, lambda left: left == [], 120)


def test_a_tab_that_stays_open_does_not_grow(browser: Browser, shop: Shop, tmp_path: Path) -> None:
    """Some hundred ticks as fast as they go; each with other figures, because the shop goes on selling."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells[-1].source = "page = desk()\npage._every_s = 0.02\npage"
    nbformat.write(notebook, tmp_path / "fast.ipynb")
    with serving(shop.dsn, tmp_path / "fast.ipynb") as site:
        context = browser.new_context()
        page = Visit(context).go(site.url)
        tools = context.new_cdp_session(page)

        def heap_after(ticks: int) -> int:
            while int(page.locator(".desk").get_attribute("data-ticks") or 0) < ticks:
                shop.trade(5, seconds=1)
            tools.send("HeapProfiler.collectGarbage")
            return int(tools.send("Runtime.getHeapUsage")["usedSize"])

        nodes = "document.querySelectorAll('.desk *').length"
        heap_after(100)
        count, start, first = page.evaluate(nodes), 300, heap_after(300)
        end = 900
        grown = (heap_after(end) - first) / (end - start)
        tell(f"heap: {grown:.0f} bytes per update")
        assert page.evaluate(nodes) == count, "a tick adds no node"
        assert grown < 4_096, "coarse: the garbage collector has moods"
        context.close()


def test_the_command_binds_to_loopback_and_protects_from_forged_requests() -> None:
    command = dashboard_command(8866)
    assert "--Voila.ip=127.0.0.1" in command and not any("xsrf" in word for word in command)
