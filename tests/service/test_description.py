"""Whatever the description allows, and much that it does not, gets an answer that the description names."""

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from fraud_nb.pipeline.contract import description
from tests.service.service_kit import House, house

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
def open_house() -> Iterator[House]:
    with house() as running:
        yield running


@schema.parametrize()
@settings(max_examples=60, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
def test_the_service_keeps_its_word(case: schemathesis.Case, open_house: House) -> None:
    case.call_and_validate(base_url=f"http://127.0.0.1:{open_house.port}", checks=CHECKED)
