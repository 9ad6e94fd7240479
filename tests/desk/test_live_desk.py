"""The whole way once: a town buys, a worker decides, an analyst says what it was, and it comes back as a label."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import pytest
from playwright.sync_api import expect, sync_playwright

from fraud_nb.adapters.kafka_bus import create_topics
from fraud_nb.adapters.postgres import migrate
from tests.conftest import Running
from tests.desk.desk_kit import CALM, PARTITIONS, chromium, free_port, serving, until
from tests.e2e.stream_kit import MAIN, small_model


def asked(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        cursor.execute(query)
        return cursor.fetchall()


@pytest.fixture(scope="module")
def metrics(private_servers: Running) -> Iterator[str]:
    """A worker and a town at work; where the worker's metrics are."""
    found, port = private_servers.addresses, free_port()
    create_topics(found.kafka, PARTITIONS)
    migrate(found.postgres, PARTITIONS)
    model = small_model(private_servers.home / "model.bundle")
    addresses = {"FRAUD_KAFKA": found.kafka, "FRAUD_REDIS": found.redis, "FRAUD_POSTGRES": found.postgres}
    environment = os.environ | addresses | {"FRAUD_HOME": str(private_servers.home)}
    commands = (
        ("stream", "--model", str(model), "--metrics-port", str(port)),
        ("simulate", "--rate", "40", "--customers", "200"),
    )
    log = (private_servers.home / "words.log").open("wb")
    started = [
        subprocess.Popen([sys.executable, "-c", MAIN, *words], env=environment, stdout=log, stderr=log)
        for words in commands
    ]
    try:
        yield f"http://127.0.0.1:{port}/metrics"
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        log.close()


def test_a_verdict_at_the_desk_is_a_label_of_the_running_worker(private_servers: Running, metrics: str) -> None:
    dsn = private_servers.addresses.postgres
    alerts = "SELECT count(*) FROM decisions WHERE outcome <> 'approve'"
    until(lambda: asked(dsn, alerts), lambda found: found[0][0] > 0, 120)
    with serving(dsn, FRAUD_ANALYST="ada", FRAUD_METRICS_URLS=metrics) as site, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=CALM)
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.set_default_timeout(60_000)
        page.goto(site.url)
        page.wait_for_selector('.desk[data-face="live"]')
        expect(page.locator(".tile", has_text="Latency").locator("strong")).to_contain_text("ms", timeout=60_000)
        page.locator(".queue tbody tr").first.click()
        page.wait_for_selector(".case[data-id]")
        page.keyboard.press("f")
        expect(page.get_by_role("button", name="Fraud F")).to_have_attribute("aria-pressed", "true", timeout=30_000)
        browser.close()
    labels = "SELECT is_fraud, source, transaction_id FROM labels WHERE verdict IS NOT NULL"
    (label,) = until(lambda: asked(dsn, labels), lambda found: len(found) == 1)
    said = "SELECT says = 'fraud', 'analyst', transaction_id FROM verdicts"
    assert label == asked(dsn, said)[0], Path(private_servers.home / "words.log").read_text()
