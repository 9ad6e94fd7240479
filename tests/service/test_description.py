"""Whatever the description allows, and much that it does not, gets an answer that the description names.

On real servers: what is let in is decided and recorded.
"""

import json
import time
from collections.abc import Iterator

import psycopg2
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from fraud_nb.adapters.kafka_bus import create_topics
from fraud_nb.adapters.postgres import migrate
from fraud_nb.apps.parts import model_in, open_predictor
from fraud_nb.domain.config import Settings
from fraud_nb.pipeline.contract import EXAMPLES, description
from tests.conftest import Running
from tests.e2e.stream_kit import small_model
from tests.service.service_kit import House, house, patiently

schema = schemathesis.openapi.from_dict(description())
CHECKED = [
    CHECKS.get_one(name)
    for name in (
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_schema_conformance",
        "response_headers_conformance",
        "unsupported_method",
    )
]


@pytest.fixture(scope="module")
def open_house(private_servers: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    found = private_servers.addresses
    create_topics(found.kafka, 4)
    migrate(found.postgres, 4)
    model = model_in(small_model(tmp_path_factory.mktemp("description") / "model.bundle"))
    predictor = open_predictor(Settings(), found, model)
    predictor.warm_up(time.time_ns() // 1_000_000)
    with house(predictor=predictor) as running:
        for example in EXAMPLES.values():  # of the description; what is drawn later may or may not be let in
            assert patiently(running.port, json.dumps(example).encode()).status == 200
        yield running
        assert running.lines == [], "nothing failed"
    with psycopg2.connect(found.postgres) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT DISTINCT origin FROM decisions ORDER BY 1")
        assert cursor.fetchall() == [("http",), ("http-stateless",)], "both kinds of purchases were decided"
    connection.close()


@schema.parametrize()
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_word(case: schemathesis.Case, open_house: House) -> None:
    for _ in range(10):
        response = case.call(base_url=f"http://127.0.0.1:{open_house.port}")
        if response.status_code != 503:  # a busy machine was too slow; asked again, as it says
            break
    case.validate_response(response, checks=CHECKED)
