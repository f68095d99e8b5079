"""Requests are read as OpenAI means them, and what they ask for reaches the sampler."""

from typing import Any

import pytest
from pydantic import ValidationError

from rankwright.executor.openai_api import ChatMessage, ChatRequest, CompletionRequest


def completion(**body: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"prompt": "x", **body})


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_a_prompt_may_be_text_or_tokens_or_several(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


def test_what_a_request_says_comes_before_the_models_defaults() -> None:
    defaults = {"temperature": 0.6, "top_k": 20, "top_p": 0.9}
    sampling = completion(temperature=0, seed=5, top_k=-1).sampling(defaults, max_tokens=7)
    assert sampling.temperature == 0
    assert sampling.top_k == 0
    assert sampling.top_p == 0.9
    assert sampling.seed == 5
    assert sampling.max_tokens == 7


def test_choices_differ_by_their_seed() -> None:
    request = completion(seed=-1)
    seeds = [request.sampling({}, 1, choice).seed for choice in range(3)]
    assert seeds == [2**63 - 1, 0, 1]
    assert completion().sampling({}, 1, 2).seed is None


def test_ignoring_the_end_asks_for_every_token() -> None:
    assert completion(ignore_eos=True).sampling({}, 9).min_tokens > 9
    assert completion(min_tokens=5).sampling({}, 9).min_tokens == 5


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_stop_is_one_string_or_several(stop: Any, stops: list[str]) -> None:
    assert completion(stop=stop).stop == stops


@pytest.mark.parametrize(
    "neutral",
    [
        {"logprobs": None},
        {"logprobs": False},
        {"presence_penalty": 0.0},
        {"n": 1, "best_of": 1},
        {"logit_bias": {}},
        {"user": "me", "metadata": {"a": "b"}},
        {"tools": [], "tool_choice": "auto"},
        {"response_format": {"type": "text"}},
    ],
)
def test_a_field_that_changes_nothing_is_accepted(neutral: dict[str, Any]) -> None:
    assert completion(**neutral) == completion()


@pytest.mark.parametrize(
    "wanted",
    [
        {"logprobs": 0},
        {"logprobs": True},
        {"best_of": 2},
        {"echo": True},
        {"logit_bias": {"5": 1}},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.1},
    ],
)
def test_a_field_that_we_cannot_follow_is_refused_by_name(wanted: dict[str, Any]) -> None:
    (name,) = wanted
    with pytest.raises(ValidationError, match=f"{name} is not supported"):
        completion(**wanted)


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": [True, []]},
        {"prompt": {"a": 1}},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": 2**64},
        {"stop": [""] * 3},
        {"stop": ["a"] * 17},
        {"n": 129},
        {"max_tokens": 0},
        {"top_k": -2},
        {"stop_token_ids": [-1]},
    ],
)
def test_a_value_out_of_range_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        completion(**bad)


def test_one_wrong_token_among_many_is_one_error() -> None:
    with pytest.raises(ValidationError) as error:
        completion(prompt=[-1] * 100_000)
    assert error.value.error_count() == 1


def test_a_message_is_text_with_a_role() -> None:
    message = ChatMessage.model_validate(
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "tool_calls": None,
            "refusal": None,
        }
    )
    assert message.for_template() == {"role": "system", "content": "ab"}
    for bad in (
        {"role": "tool", "content": "x"},
        {"role": "user"},
        {"role": "user", "content": "x", "tool_calls": [{}]},
    ):
        with pytest.raises(ValidationError):
            ChatMessage.model_validate(bad)


def test_a_chat_needs_a_message() -> None:
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": []})
