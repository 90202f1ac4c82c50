"""The API keeps its OpenAPI document, whatever is sent: every check of schemathesis."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig
from schemathesis.python.asgi import get_client

from server.app import create_app
from server.auth import Scope
from server.routes.common import JOB_ID
from server.settings import Settings
from server.states import Move
from tests.server.helpers import submission, succeeded

_EXAMPLES = 6
_JOB_MOVES = ("cancel_job", "pause_job", "resume_job")
# What a schema cannot say: a recipe has parameters of its own, a goal is one of several kinds,
# and a cursor is what the page before gave.
_REFUSED = {"expected-statuses": [200, 201, 202, 204, 206, 304, 401, 403, 404, 409, 422]}


class _Api:
    """An application with something of everything in it, and a client for each kind of caller."""

    def __init__(self, folder: Any, is_guarded: bool) -> None:
        self.settings = Settings(
            data_dir=folder,
            auth=is_guarded,
            requests_per_minute=10**6,
            max_asset_bytes=10**6,
            allowed_hosts=("testserver",),  # where schemathesis believes it to be
        )
        self.app = create_app(self.settings)

    def fill(self) -> str:
        """Add an ended and a paused job; return an admin's token."""
        services = self.app.state.services
        self.ended = succeeded(services.jobs, self.settings.database)
        self.paused = services.jobs.submit(submission(), "local")[0].id
        services.jobs.ask(self.paused, Move.PAUSE)
        secret: str = services.tokens.create("root", [Scope.ADMIN])[1]
        return secret

    def schema(self) -> Any:
        config = {
            "seed": 7,
            "checks": {"positive_data_acceptance": _REFUSED},
            "generation": {"deterministic": True, "max-examples": _EXAMPLES},
        }
        return schemathesis.openapi.from_dict(
            self.app.openapi(), config=SchemathesisConfig.from_dict(config)
        )


@pytest.fixture(scope="module", params=[False, True], ids=["open", "guarded"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The schema, with a session for calls: of a service on its own, and of one with tokens."""
    api = _Api(tmp_path_factory.mktemp("data"), request.param)
    with get_client(api.app) as client:
        secret = api.fill()
        if request.param:
            client.headers["Authorization"] = f"Bearer {secret}"
        schema = api.schema()
        schema.app = api.app
        yield schema, api, client


def _operation_ids() -> list[str]:
    paths = create_app(Settings()).openapi()["paths"].values()
    return [operation["operationId"] for path in paths for operation in path.values()]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("name", _operation_ids())
def test_the_api_keeps_its_document(name: str, mode: GenerationMode, api: Any) -> None:
    schema, service, client = api
    operation = schema.find_operation_by_id(name)

    @settings(
        max_examples=_EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        path = case.path_parameters or {}
        if re.fullmatch(JOB_ID, str(path.get("job_id", ""))):  # a job that exists tells more
            path["job_id"] = service.paused if name in _JOB_MOVES else service.ended
        case.call_and_validate(session=client)

    try:
        check()
    except Unsatisfiable:
        assert mode == GenerationMode.NEGATIVE  # it takes nothing that could be wrong


def test_all_checks_are_made() -> None:
    assert {
        "not_a_server_error",
        "status_code_conformance",
        "content_type_conformance",
        "response_headers_conformance",
        "response_schema_conformance",
        "negative_data_rejection",
        "positive_data_acceptance",
        "unsupported_method",
        "ignored_auth",
    } <= set(CHECKS.get_all_names())
