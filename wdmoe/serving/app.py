"""The routes of a base station's HTTP face. It knows the engine by `wdmoe.records.TextEngine` only."""

from __future__ import annotations

import time
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from wdmoe.errors import WdmoeError
from wdmoe.records import TextEngine
from wdmoe.serving.closing import Closing
from wdmoe.serving.errors import problem_from
from wdmoe.serving.metrics import Metrics
from wdmoe.serving.middleware import Guard, Rules
from wdmoe.serving.model_names import ModelNames
from wdmoe.serving.requests import ServingLimits, plan_chat, plan_completion
from wdmoe.serving.responses import ANSWERING, STOPPING, health
from wdmoe.serving.schemas import ChatRequest, CompletionRequest
from wdmoe.serving.streaming import Reply, Service


def create_app(
    engine: TextEngine,
    *,
    api_key: str = "",
    aliases: Sequence[str] = (),
    limits: ServingLimits | None = None,
    closing: Closing | None = None,
) -> ASGIApp:
    """The ASGI application.

    Args:
        engine: answers the requests; the caller owns it.
        api_key: wanted from every client, except at /health; "": none.
        aliases: names that clients may use for the model beside the engine's own.
        limits: bounds on what a client may ask for.
        closing: says when nothing new is taken on, and when answers that still run are ended with an error.
    """
    limits = limits or ServingLimits()
    metrics = Metrics()
    closing = closing or Closing()
    service = Service(engine=engine, limits=limits, metrics=metrics, closing=closing)
    # The interactive pages would load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="wdmoe base station", docs_url=None, redoc_url=None)
    for kind in (WdmoeError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _tell)
    _add_state_routes(app, service)
    names = ModelNames.of(engine.model_name, aliases)
    _add_model_routes(app, names)
    _add_generation_routes(app, service, names)
    paths = frozenset(getattr(route, "path", "") for route in app.routes)
    return Guard(app, Rules(api_key=api_key, limits=limits, closing=closing, metrics=metrics, paths=paths))


async def _tell(request: Request, error: Exception) -> Response:
    return problem_from(error, request.state.request_id).response()


def _add_state_routes(app: FastAPI, service: Service) -> None:
    engine, metrics = service.engine, service.metrics

    @app.get("/health")
    async def get_health() -> Response:
        """Whether requests can be answered: 200 with "ok" or "degraded", else 503 and what is the matter."""
        body = health(await engine.status())
        if service.closing.begun.is_set():
            body["status"] = STOPPING
        return JSONResponse(body, status_code=200 if body["status"] in ANSWERING else 503)

    @app.get("/metrics")
    async def get_metrics() -> Response:
        """Services in Prometheus' text format."""
        metrics.look(await engine.status())
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/wdmoe/status")
    async def get_status() -> Response:
        """Devices, links, experts and speed."""
        return JSONResponse(dict(await engine.status()))


def _add_model_routes(app: FastAPI, names: ModelNames) -> None:
    started_unix = int(time.time())

    @app.get("/v1/models")
    async def list_models() -> Response:
        """The one model that is served, under each of its names."""
        data = [names.describe(name, started_unix) for name in (names.own, *names.aliases)]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Response:
        """The model, by one of its names."""
        names.check(name)
        return JSONResponse(names.describe(name, started_unix))


def _add_generation_routes(app: FastAPI, service: Service, names: ModelNames) -> None:
    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Go on with a text."""
        names.check(body.model)
        job = await plan_completion(service.engine, body, request.state.request_id, service.limits)
        return Reply(job, service)

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        names.check(body.model)
        job = await plan_chat(service.engine, body, request.state.request_id, service.limits)
        return Reply(job, service)
