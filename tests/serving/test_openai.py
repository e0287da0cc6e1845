"""The official client, unchanged, over a real port."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from tests.lab.serving_bench import MODEL, EchoEngine, serving
from wdmoe.errors import ExpertsUnavailableError, OverloadedError, WdmoeError


@pytest.fixture(scope="module")
def server():
    errors = {
        "full": OverloadedError("16 requests are waiting already; try again later"),
        "lonely": ExpertsUnavailableError("layer 3 has no expert left"),
        "bug": ZeroDivisionError("secret detail"),
    }
    with serving(EchoEngine(errors=errors)) as running:
        yield running


@pytest.fixture
def client(server):
    with _client(server) as client:
        yield client


def _client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)


def _ask(client, text="one two three", **more):
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **more)


def test_lists_its_model(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "wdmoe"
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.models.retrieve("gpt-4")


def test_an_alias_is_served_and_listed():
    with serving(EchoEngine(), aliases=["default", MODEL, "default"]) as server, _client(server) as client:
        listed = list(client.models.list())
        assert [model.id for model in listed] == [MODEL, "default"]
        assert {model.root for model in listed} == {MODEL}
        assert client.models.retrieve("default").id == "default"
        message = {"role": "user", "content": "one two"}
        answer = client.chat.completions.create(model="default", messages=[message], max_tokens=2)
        assert (answer.model, answer.choices[0].message.content) == (MODEL, "one two")
        chunks = client.completions.create(model="default", prompt="one two", max_tokens=2, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "one two"
        with pytest.raises(openai.NotFoundError, match=f"'gpt-4' .* '{MODEL}', 'default'"):
            client.completions.create(model="gpt-4", prompt="one")


def test_chat_answers_with_its_receipt(client):
    answer = _ask(client, max_completion_tokens=4)
    assert answer.choices[0].message.content == "one two three one"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        3,
        4,
        7,
    )
    assert answer.wdmoe["dropped_weight"] == 0.25
    assert answer.wdmoe["stages"]["bs_compute"] == 0.5


def test_chat_streams_what_it_would_have_answered(client):
    chunks = list(_ask(client, max_tokens=4, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three one"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].wdmoe["completion_tokens"] == 4


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(client):
    chunks = list(_ask(client, max_tokens=2, stream=True, stream_options={"include_usage": True}))
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == 5
    assert chunks[-1].wdmoe["completion_tokens"] == 2


def test_content_parts_and_roles_reach_the_template_as_text(client, server):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "so "}, {"type": "text", "text": "long"}]},
    ]
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=4)
    assert answer.choices[0].message.content == "be brief so long"


def test_sampling_reaches_the_engine(client, server):
    _ask(client, max_tokens=3, temperature=0.5, top_p=0.9, seed=7, stop=["x", "y"])
    sampling = server.engine.seen[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (3, 0.5, 0.9)
    assert (sampling.seed, sampling.stop) == (7, ("x", "y"))


def test_defaults_are_those_of_openai_within_the_context(client, server):
    _ask(client)
    assert server.engine.seen[-1].sampling.max_tokens == EchoEngine.context_tokens - 3
    client.completions.create(model=MODEL, prompt="one two")
    sampling = server.engine.seen[-1].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (16, 1.0, None)


def test_stop_ends_an_answer(client):
    answer = _ask(client, stop="three")
    assert answer.choices[0].message.content == "one two"
    assert answer.choices[0].finish_reason == "stop"


def test_completions_take_text_tokens_and_lists(client, server):
    create = client.completions.create
    assert create(model=MODEL, prompt="red blue", max_tokens=3).choices[0].text == "red blue red"
    tokens = list(server.engine.seen[-1].prompt)
    assert create(model=MODEL, prompt=tokens, max_tokens=3).choices[0].text == "red blue red"
    assert create(model=MODEL, prompt=[tokens, tokens], max_tokens=1).choices[1].text == "red"
    several = create(model=MODEL, prompt=["red blue", "blue red", "red"], max_tokens=2)
    assert [choice.text for choice in several.choices] == ["red blue", "blue red", "red red"]
    assert several.usage.total_tokens == 5 + 6
    assert several.wdmoe["bytes_down"] == 600
    assert several.wdmoe["dropped_weight"] == pytest.approx(0.25)


def test_a_list_of_prompts_streams_side_by_side(client, server):
    texts = {0: "", 1: ""}
    options = {"include_usage": True}
    chunks = client.completions.create(
        model=MODEL, prompt=["red blue", "blue red"], max_tokens=3, stream=True, stream_options=options
    )
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: "red blue red", 1: "blue red blue"}
    assert chunk.usage.completion_tokens == 6


def test_one_client_computes_a_bounded_number_of_prompts_at_once(client, server):
    server.engine.most_running = 0
    client.completions.create(model=MODEL, prompt=["a b"] * 12, max_tokens=5)
    assert server.engine.most_running == 4


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"n": 2}, "n is not supported here: it must be 1"),
        ({"logprobs": True}, "logprobs is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty is not supported"),
        ({"temperature": 3}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": 1000}, "context holds 64"),
        ({"seed": 2**70}, "seed: "),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: "),
        ({"stop": [""]}, "stop: "),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"messages": [{"role": "user", "content": ""}]}, "the prompt is empty"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, more, says):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **more}
    with pytest.raises(openai.BadRequestError, match=says) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"logprobs": 0}, "logprobs is not supported"),
        ({"echo": True}, "echo is not supported"),
        ({"prompt": []}, "prompt: "),
        ({"prompt": ["a"] * 33}, "1 to 32"),
        ({"prompt": [[1], "a"]}, "prompt"),
    ],
)
def test_completions_refuse_by_name(client, more, says):
    with pytest.raises(openai.BadRequestError, match=says):
        client.completions.create(**{"model": MODEL, "prompt": "hi", **more})


def test_values_that_ask_for_nothing_and_unknown_fields_pass(client):
    harmless = {
        "n": 1,
        "logprobs": False,
        "tools": [],
        "presence_penalty": 0.0,
        "metadata": {"a": "b"},
        "user": "me",
    }
    answer = _ask(client, max_tokens=1, extra_body={**harmless, "response_format": {"type": "text"}, "new": 1})
    assert answer.choices[0].message.content == "one"


def test_another_model_is_404(client):
    with pytest.raises(openai.NotFoundError, match=MODEL) as caught:
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("word", "status", "says"),
    [("full", 429, "16 requests"), ("lonely", 503, "layer 3"), ("bug", 500, "internal error")],
)
def test_failures_have_their_status(client, server, word, status, says, stream, caplog):
    server.engine.fails_after = 0
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        _ask(client, word, max_tokens=4, stream=stream)
    response = caught.value.response
    assert response.status_code == status
    assert ("retry-after" in response.headers) == (status != 500)
    assert "secret" not in response.text
    if status == 500:  # the log has it, under the id that the client was told
        assert response.headers["x-request-id"] in response.text
        assert "secret detail" in caplog.text


def test_a_failure_in_mid_stream_is_its_last_event(client, server):
    server.engine.fails_after = 2
    text = ""
    stream = iter(_ask(client, "lonely times", max_tokens=4, stream=True))
    for _ in range(2):
        text += next(stream).choices[0].delta.content
    with pytest.raises(openai.APIError, match="layer 3"):
        next(stream)
    assert text == "lonely times"


def test_one_failing_prompt_fails_the_list_and_ends_the_others(client, server):
    server.engine.fails_after = 0
    with pytest.raises(openai.InternalServerError, match="layer 3"):
        client.completions.create(model=MODEL, prompt=["fine", "lonely", "good"], max_tokens=50)
    assert server.engine.running == 0


def test_async_client_too(server):
    import asyncio

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model=MODEL, prompt="one two", max_tokens=2, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == "one two"


def test_events_are_plain_sse(server):
    body = {"prompt": "grün two", "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0][6:])["choices"][0]["text"] == "grün"


def test_unforeseen_wdmoe_error_is_told_by_id_only(client, server):
    server.engine.fails_after = 0
    server.engine.errors["odd"] = WdmoeError("inside")
    with pytest.raises(openai.InternalServerError, match="internal error"):
        _ask(client, "odd", max_tokens=1)
