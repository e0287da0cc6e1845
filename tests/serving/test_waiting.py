"""An answer that waits for lost experts, as clients see it: a comment in a stream, nothing in a whole answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import openai
import pytest

from tests.lab.serving_bench import MODEL, EchoEngine, Server, serving
from wdmoe.errors import ExpertsUnavailableError
from wdmoe.records import Finished, GenerationRequest, TextDelta, Waiting

SAYS = "waiting for experts that were lost, 20 s at most"


class WaitingEngine(EchoEngine):
    """Waits before its second token, and says so in the receipt."""

    async def stream(self, request: GenerationRequest) -> AsyncIterator[TextDelta | Waiting | Finished]:
        events = super().stream(request)
        count = 0
        async for event in events:
            if isinstance(event, Finished):
                receipt = replace(event.receipt, waited_s=1.5 * len(request.prompt or ()), hedges=2)
                yield Finished(reason=event.reason, receipt=receipt)
                return
            if count == 1:
                yield Waiting(text=SAYS)
            count += 1
            yield event


@pytest.fixture
def server() -> Iterator[Server]:
    engine = WaitingEngine(errors={"lost": ExpertsUnavailableError("layer 3: none of its experts answered")})
    with serving(engine) as server:
        yield server


def lines(server: Server, prompt: str | list[str]) -> list[str]:
    body = {"prompt": prompt, "max_tokens": 3, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        assert response.status_code == 200
        return [line for line in response.iter_lines() if line]


def test_a_stream_says_that_it_waits_in_a_comment(server: Server) -> None:
    said = lines(server, "one two")
    assert said[1] == f": {SAYS}"
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in said if line.startswith("data: {")]
    assert "".join(texts) == "one two one"
    receipt = json.loads(said[-2][6:])["wdmoe"]
    assert (receipt["waited_s"], receipt["hedges"]) == (3.0, 2)


def test_a_client_of_openai_does_not_notice(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model=MODEL, prompt="one two", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == "one two one"
        whole = client.completions.create(model=MODEL, prompt=["one two", "two"], max_tokens=3)
        assert [choice.text for choice in whole.choices] == ["one two one", "two two two"]
        assert whole.wdmoe["waited_s"] == 3.0  # side by side: the longest wait
        assert whole.wdmoe["hedges"] == 4
        scraped = httpx.get(f"{server.url}/metrics").text
        assert "wdmoe_hedges_total 6.0" in scraped
        assert "wdmoe_waited_seconds_total 7.5" in scraped


def test_when_the_wait_was_in_vain_the_error_is_the_last_event(server: Server) -> None:
    server.engine.fails_after = 2
    said = lines(server, "lost one")
    assert f": {SAYS}" in said
    error = json.loads(said[-1][6:])["error"]
    assert (error["code"], error["type"]) == ("experts_unavailable", "server_error")
