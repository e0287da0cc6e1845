"""Our tokenizer against transformers', file by file: the same ids, the same texts, the same chats."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.lab.families import save_tiny_tokenizer
from wdmoe.backbone.default.model import default_source
from wdmoe.backbone.export.station_files import small_files
from wdmoe.backbone.export.tokenizer_files import station_small_files
from wdmoe.backbone.runtime.detokenizer import TextStream
from wdmoe.backbone.runtime.prompt import encode_prompt
from wdmoe.backbone.split.dense import read_dense
from wdmoe.backbone.text.chat_template import render
from wdmoe.backbone.text.tokenizer import FileTokenizer, load_tokenizer
from wdmoe.errors import BundleError, MissingExtraError, RequestError
from wdmoe.records import GenerationRequest, Sampling

MESSAGES = [{"role": "system", "content": "Be\tbrief."}, {"role": "user", "content": " Grüße, <eos> 北京 🙂\n"}]


def byte_level(extra: list[str]) -> Tokenizer:
    vocabulary = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(
        models.BPE(vocab={**vocabulary, **{text: 256 + i for i, text in enumerate(extra)}}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, *roles: str) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{f"{role}_token": f"<{role}>" for role in roles})
    fast.save_pretrained(folder)
    return fast


def plain(folder: Path) -> None:
    save_tiny_tokenizer(folder)


def with_a_beginning(folder: Path) -> None:
    """Its file begins every text with a token, whatever the config says of that."""
    tokenizer = byte_level(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos>:0 $A:0", special_tokens=[("<bos>", 256)])
    save(tokenizer, folder, "bos", "eos")
    change(folder, add_bos_token=False, add_eos_token=True)


def with_limits(folder: Path) -> None:
    """A truncation and a padding in the file, which no prompt obeys."""
    tokenizer = byte_level(["<eos>"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16, pad_id=0)
    save(tokenizer, folder, "eos")


def with_added_tokens(folder: Path) -> None:
    """Tokens that only the config knows, special and not; a template for each purpose; tokens of the model's own."""
    fast = save(byte_level([]), folder, "eos", "image")
    fast.add_tokens([AddedToken("naïve", lstrip=True, normalized=False)])
    fast.save_pretrained(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["added_tokens"] = []
    file.write_text(json.dumps(content))
    templates = [{"name": "default", "template": "{{ image_token }}{{ messages | tojson }}"}]
    change(folder, chat_template=[*templates, {"name": "tool_use", "template": "tools"}])


def of_an_older_version(folder: Path) -> None:
    """Special and added tokens in files of their own."""
    save_tiny_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": "{{ bos_token }}{{ messages[0].content }}", "eos_token": "<eos>"})
    )
    (folder / "chat_template.jinja").unlink()
    beginning = {"content": "<start>", "lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    names = {"bos_token": beginning, "pad_token": "<pad>", "additional_special_tokens": ["<more>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": 261, "<start>": 260, "word": 262}))


def without_splits(folder: Path) -> None:
    """Special tokens in a text are text."""
    save_tiny_tokenizer(folder)
    change(folder, split_special_tokens=True)


def change(folder: Path, **fields: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def default(folder: Path) -> None:
    try:
        source = default_source()
    except MissingExtraError as error:
        pytest.skip(str(error))
    read_dense(source).tokenizer.save_pretrained(folder)


KINDS: list[Callable[[Path], None]] = [
    plain,
    with_a_beginning,
    with_limits,
    with_added_tokens,
    of_an_older_version,
    without_splits,
    default,
]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[FileTokenizer, Any]:
    folder = tmp_path_factory.mktemp("tokenizer")
    request.param(folder)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_the_vocabulary_is_the_same(both: tuple[FileTokenizer, Any]) -> None:
    ours, theirs = both
    assert len(ours) == len(theirs)
    assert ours.backend_tokenizer.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    known = ours.backend_tokenizer.get_added_tokens_decoder()
    wanted = theirs.added_tokens_decoder
    assert {i: repr(token) for i, token in known.items()} == {i: repr(token) for i, token in wanted.items()}


PIECES = ["<eos>", "<|im_end|>", "<bos>", "<more>", "<start> ", " naïve", "word", "it's 123  x"]
TEXTS = st.lists(
    st.text() | st.sampled_from(PIECES),
    max_size=6,
).map("".join)


@given(text=TEXTS)
@example(text="")
@example(text="<|im_start|>user\nHello 123  world\n\n it's<|im_end|>")
def test_a_text_has_the_same_ids_and_the_ids_the_same_text(both: tuple[FileTokenizer, Any], text: str) -> None:
    ours, theirs = both
    for special in (False, True):
        ids = ours(text, add_special_tokens=special)["input_ids"]
        assert ids == theirs(text, add_special_tokens=special, verbose=False)["input_ids"]
        streams = TextStream(ours, ["stop"]), TextStream(theirs, ["stop"])
        told = [[stream.feed(token) for token in ids] + [stream.flush()] for stream in streams]
        assert told[0] == told[1]
    if ids:
        request = GenerationRequest(request_id="r", prompt=text, sampling=Sampling(max_tokens=4))
        assert encode_prompt(ours, request, 10_000) == encode_prompt(theirs, request, 10_000)


@given(content=TEXTS)
def test_a_chat_is_the_same_text(both: tuple[FileTokenizer, Any], content: str) -> None:
    ours, theirs = both
    if not theirs.chat_template:
        assert not ours.chat_template
        return
    chat = [*MESSAGES, {"role": "assistant", "content": content, "name": None}]
    for begin in (False, True):
        said = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=begin)
        assert said == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=begin)
    request = GenerationRequest(request_id="r", messages=tuple(MESSAGES), sampling=Sampling(max_tokens=4))
    assert encode_prompt(ours, request, 10_000) == encode_prompt(theirs, request, 10_000)


def rebuilt(folder: Path) -> None:
    """transformers makes tokenizers of this class anew, with a cut of the class's own."""
    save_tiny_tokenizer(folder)
    change(folder, tokenizer_class="Qwen2Tokenizer")


def without_tokenizer_json(folder: Path) -> None:
    save_tiny_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    change(folder, tokenizer_class="GPT2Tokenizer")


@pytest.mark.parametrize("kind", [*KINDS[:-1], rebuilt, without_tokenizer_json], ids=lambda kind: kind.__name__)
def test_a_bundle_gets_files_that_mean_the_same_to_both(kind: Callable[[Path], None], tmp_path: Path) -> None:
    model, station = tmp_path / "model", tmp_path / "station"
    model.mkdir()
    station.mkdir()
    kind(model)
    given = dict(small_files(model))
    for path, data in (files := station_small_files(model)).items():
        (tmp_path / path).write_bytes(data)
    assert (files == given) == (kind in KINDS)  # what both read alike is left as it is
    wanted = AutoTokenizer.from_pretrained(model)
    for tokenizer in (load_tokenizer(station), AutoTokenizer.from_pretrained(station)):
        for text in ("Hello  wörld 123 <eos>", "a\n\n b it's"):
            assert tokenizer(text)["input_ids"] == wanted(text)["input_ids"]
        assert bool(tokenizer.chat_template) == bool(wanted.chat_template)
        if wanted.chat_template:
            said = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
            assert said == wanted.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)


# What templates use: statements on lines of their own, loops that end early, JSON, names that change, dates, marks.
TEMPLATES = {
    "blocks": "{%- for m in messages %}\n{% if loop.first %}\n {{ x }}\n {%- endif %}\n{{ m.content }}\n{% endfor %}\n",
    "loops": "{% for m in messages %}{% if m.role == 'user' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "json": "{{ messages | tojson }}|{{ messages | tojson(indent=2) }}|{{ {'é': '<'} | tojson }}",
    "names": "{% set n = namespace(x='', self=1) %}{% for m in messages %}{% set n.x = m.role %}{% endfor %}{{ n.x }}",
    "dict": "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['a', 'b'], 2) }}",
    "marks": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ messages[0].content }}{% endgeneration %}{{ x }}",
    "defined": "{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ add_generation_prompt }}",
    "dates": "{{ strftime_now('%Y-%m-%d') }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_the_same(name: str, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    said = render(TEMPLATES[name], MESSAGES, theirs.special_tokens_map, add_generation_prompt=True)
    assert said == theirs.apply_chat_template(
        MESSAGES, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system message, please') }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ namespace(_x=1) }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
        "{% for %}",
    ],
)
def test_a_template_that_fails_or_breaks_out_is_a_request_error(template: str, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    request = GenerationRequest(request_id="r", messages=tuple(MESSAGES), sampling=Sampling(max_tokens=4))
    for tokenizer in (load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        with pytest.raises(RequestError, match="template refuses"):
            encode_prompt(tokenizer, request, 10_000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_files_that_make_no_tokenizer_are_one_line(name: str, content: str | None, tmp_path: Path) -> None:
    save_tiny_tokenizer(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(BundleError, match=r"the tokenizer in .* cannot be loaded: \S"):
        load_tokenizer(tmp_path)
