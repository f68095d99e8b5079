"""Tokenizer files read without transformers, and text that comes in whole characters."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.executor.tiny_tokenizer import write_tokenizer
from transformers import AutoTokenizer

from rankwright.executor.detokenizer import Detokenizer, StopStrings
from rankwright.executor.tokenizer import ByteTokenizer, HubTokenizer, load_tokenizer

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "<b>naïve & 日本</b>"},
    ],
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> HubTokenizer:
    return HubTokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_text_goes_to_ids_and_back(tiny: HubTokenizer) -> None:
    ids = tiny.encode("héllo")
    assert len(ids) == 6
    assert tiny.decode(ids) == "héllo"


def test_special_tokens_are_not_text(tiny: HubTokenizer) -> None:
    assert tiny.decode([*tiny.encode("a"), 0]) == "a"


@pytest.mark.parametrize("messages", CHATS)
def test_smollm2_prompts_equal_those_of_transformers(
    smollm2: Path, messages: list[dict[str, str]]
) -> None:
    ours, theirs = HubTokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    text = ours.render_chat(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(
        text, add_special_tokens=False
    )
    assert ours.encode("a  b\n1234") == theirs.encode("a  b\n1234")


def test_a_template_may_use_what_transformers_offers(tmp_path: Path) -> None:
    template = (
        "{{ eos_token }}{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m['content'] | tojson }}{% endgeneration %}{% endfor %}"
        "{{ strftime_now('%Y')[:2] }}{% if thinking %}!{% endif %}"
    )
    tokenizer = HubTokenizer(write_tokenizer(tmp_path, template=template))
    messages = [{"role": "user", "content": text} for text in ("<é>", "b", "c")]
    assert tokenizer.render_chat(messages, thinking=True) == '</s>"<é>""b"20!'


def test_a_template_in_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    (write_tokenizer(tmp_path) / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert HubTokenizer(tmp_path).render_chat([{"role": "user", "content": "a"}]) == "a!"


def test_of_several_templates_the_default_is_used(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert HubTokenizer(tmp_path).render_chat([]) == "d"


def test_a_template_cannot_reach_python(tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    tokenizer = HubTokenizer(write_tokenizer(tmp_path, template=template))
    with pytest.raises(ValueError, match="refuses the messages"):
        tokenizer.render_chat([])


def test_a_malformed_template_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"chat template in .* is malformed"):
        HubTokenizer(write_tokenizer(tmp_path, template="{% if %}"))


def test_a_model_without_a_template_cannot_chat(tmp_path: Path) -> None:
    tokenizer = HubTokenizer(write_tokenizer(tmp_path, template=None))
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.render_chat([])


def test_a_first_token_that_only_the_config_asks_for_is_added(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = {"bos_token": "</s>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = HubTokenizer(tmp_path)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [0, *plain]


def test_a_slow_tokenizer_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        HubTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"slow tokenizer \(tokenizer\.model\).*save_pretrained"):
        load_tokenizer(tmp_path)


def test_a_malformed_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        HubTokenizer(tmp_path)


def test_without_a_folder_a_token_is_a_byte() -> None:
    tokenizer = load_tokenizer(None)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0xA9, 999]) == "é<999>"
    assert tokenizer.render_chat(CHATS[0]).endswith("\nassistant:")


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """`ids` in pieces of these sizes, and the rest one by one."""
    pieces: list[list[int]] = []
    start = 0
    for size in sizes:
        pieces.append(list(ids[start : start + size]))
        start += size
    return [*pieces, *([token] for token in ids[start:])]


@settings(deadline=None)  # a loaded machine is no error
@given(st.lists(st.integers(0, 300), max_size=60), st.lists(st.integers(0, 4), max_size=20))
def test_pieces_joined_equal_the_whole(ids: list[int], sizes: list[int]) -> None:
    decode = ByteTokenizer().decode
    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.add(piece) for piece in cut(ids, sizes)]
    assert "".join(pieces) + detokenizer.finish() == decode(ids)


@settings(deadline=None)  # a loaded machine is no error
@given(st.text(max_size=40), st.lists(st.integers(0, 4), max_size=20))
def test_no_character_is_ever_split(text: str, sizes: list[int]) -> None:
    detokenizer = Detokenizer(ByteTokenizer().decode)
    pieces = [detokenizer.add(piece) for piece in cut(list(text.encode()), sizes)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)
        assert "".join(pieces) == text  # nothing was left for the end


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2: Path) -> HubTokenizer:
    return HubTokenizer(smollm2)


@settings(deadline=None)  # a loaded machine is no error
@given(st.lists(st.integers(0, 49151), max_size=20))
def test_any_tokens_of_smollm2_stream_as_they_decode(
    smollm2_tokenizer: HubTokenizer, ids: list[int]
) -> None:
    detokenizer = Detokenizer(smollm2_tokenizer.decode)
    text = "".join(detokenizer.add([token]) for token in ids) + detokenizer.finish()
    assert text == smollm2_tokenizer.decode(ids)


def test_a_special_token_amid_a_text_takes_nothing_from_it(tiny: HubTokenizer) -> None:
    ids = [*tiny.encode("ab"), 0, *tiny.encode("é")]
    detokenizer = Detokenizer(tiny.decode)
    assert [detokenizer.add([token]) for token in ids] == ["a", "b", "", "", "é"]


@settings(deadline=None)  # a loaded machine is no error
@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=30, max_size=30),
)
def test_a_text_ends_before_the_first_stop_string(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    cutter = StopStrings(stops)
    shown, rest = "", text
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        shown += cutter.add(piece)
        assert text.startswith(shown)
    shown += cutter.finish()
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert shown == (text[: min(found)[1]] if found else text)
    assert (cutter.matched is not None) == bool(found)
