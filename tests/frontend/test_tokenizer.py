"""Encoding and decoding give the results of transformers, without torch."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from mellmpi.frontend import Tokenizer
from mellmpi.frontend.tokenizer import UNCHECKED, TooLong

CHATS = [
    [{"role": "user", "content": "hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "naïve 日本\n"},
    ],
]


@pytest.fixture(scope="session")
def smol(smollm2):
    return Tokenizer.load(smollm2)


@pytest.fixture
def with_template(byte_directory, tmp_path):
    """(template) -> the byte tokenizer with that chat template."""

    def load(template):
        shutil.copy(byte_directory / "tokenizer.json", tmp_path)
        config = json.loads((byte_directory / "tokenizer_config.json").read_text())
        config["chat_template"] = template
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.load(tmp_path)

    return load


def render(tokenizer, messages, **variables):
    tokens = tokenizer.encode_chat(messages, variables)
    return "".join(tokenizer.token_bytes.label(token) for token in tokens)


def test_loading_needs_neither_torch_nor_transformers(byte_directory):
    program = (
        "import sys; from pathlib import Path; from mellmpi.frontend.tokenizer import Tokenizer; "
        f"Tokenizer.load(Path({str(byte_directory)!r})).encode_chat([]); "
        "import mellmpi.frontend.batch; "
        "assert not {'torch', 'transformers', 'mpi4py'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("messages", CHATS)
def test_a_chat_is_rendered_as_transformers_renders_it(smol, smollm2, messages):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(smollm2))
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert smol.encode_chat(messages) == expected


def test_the_demo_model_gets_its_own_system_prompt(smol):
    text = smol.decode(smol.encode_chat(CHATS[0]))
    assert text.startswith("system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("user\nhi\nassistant\n")


# --- templates -----------------------------------------------------------------------------------


def test_templates_have_the_environment_of_transformers(with_template):
    from transformers.utils.chat_template_utils import render_jinja_template

    template = """
    {%- for m in messages %}
        {%- if m.role == 'skip' %}{% continue %}{% endif %}
        {{- bos_token + m['content'] | tojson }}
        {% generation %}{{ m.role }}{% endgeneration %}
    {%- endfor %}
    {{- strftime_now('%Y')[:2] }}{{ '!' if add_generation_prompt }}{{ mood }}"""
    messages = [{"role": "skip", "content": "x"}, {"role": "user", "content": "<é & 'b'>\n"}]
    expected, _ = render_jinja_template(
        [messages],
        chat_template=template,
        add_generation_prompt=True,
        bos_token="<|im_start|>",
        mood="glad",
    )
    ours = with_template(template)
    assert ours.encode_chat(messages, {"mood": "glad"}) == ours.encode(expected[0])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].content.no.such.thing }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_the_messages(with_template, template):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        with_template(template).encode_chat(CHATS[0])


def test_a_template_may_be_one_of_several(with_template):
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "yes"}]
    assert render(with_template(several), CHATS[0]) == "yes"


def test_a_template_file_overrides_the_tokenizer_config(with_template, tmp_path):
    with_template("old")
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert render(Tokenizer.load(tmp_path), CHATS[0]) == "new hi"


def test_the_template_of_the_user_overrides_all(byte_directory, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text("[{{ messages[0].content }}]")
    assert render(Tokenizer.load(byte_directory, mine), CHATS[0]) == "[hi]"
    mine.write_text("{% if %}")
    with pytest.raises(ValueError, match=r"mine\.jinja is not valid"):
        Tokenizer.load(byte_directory, mine)
    with pytest.raises(ValueError, match=r"--chat-template .* cannot be read"):
        Tokenizer.load(byte_directory, tmp_path / "none")


def test_a_model_without_template_says_so(with_template):
    tokenizer = with_template(None)
    assert not tokenizer.has_chat_template
    with pytest.raises(ValueError, match="use /v1/completions instead"):
        tokenizer.encode_chat(CHATS[0])


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "Unheard"}}', "\x00", "{}"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_tokenizer_is_refused_in_one_line(byte_directory, tmp_path, name, content):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(byte_directory / file, tmp_path)
    (tmp_path / name).write_text(content)
    if name == "tokenizer_config.json" and content.endswith("}"):
        assert Tokenizer.load(tmp_path).encode("a")
        return
    with pytest.raises(ValueError, match=str(tmp_path)) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [7, {"a": 1}, [3], [{"template": "x"}]])
def test_a_template_that_is_not_text_is_refused_or_ignored(with_template, template):
    if isinstance(template, list):
        assert not with_template(template).has_chat_template
        return
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be a text"):
        with_template(template)


def test_a_template_file_that_is_not_text_is_refused_by_name(with_template, tmp_path):
    with_template(None)
    (tmp_path / "chat_template.jinja").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"chat_template\.jinja cannot be read .*UTF-8"):
        Tokenizer.load(tmp_path)


def test_a_directory_of_any_name_can_be_read(byte_directory, tmp_path):
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/ti\xffny"))
    shutil.copytree(byte_directory, odd)
    assert Tokenizer.load(odd).encode("a")


def test_a_turn_may_end_with_a_token_that_was_added_as_text(byte_directory):
    backend = Backend.from_file(str(byte_directory / "tokenizer.json"))
    backend.add_tokens([AddedToken("<turn>", special=False)])
    turn = "{% for m in messages %}{{ m.content }}<turn>{% endfor %}"
    assert Tokenizer(backend, turn, {}).end_ids == (backend.token_to_id("<turn>"),)


def test_variables_that_transformers_always_passes_are_defined(with_template):
    template = "{{ tools is defined and tools is none and documents is none }}"
    assert render(with_template(template), CHATS[0]) == "True"


@pytest.mark.parametrize("error", ["raise_exception('no')", "messages[0].content.split(1)"])
def test_any_error_of_a_template_is_an_error_of_the_messages(with_template, error):
    with pytest.raises(ValueError, match="the chat template refuses these messages"):
        with_template("{{ " + error + " }}").encode_chat(CHATS[0])


# --- where answers end ---------------------------------------------------------------------------


def test_answers_end_at_the_tokenizers_eos_and_where_the_template_ends_a_turn(byte_directory):
    backend = Backend.from_file(str(byte_directory / "tokenizer.json"))
    start, end = (backend.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    turn = "{% for m in messages %}{{ m.content }}\n<|im_end|>\n{% endfor %}"
    none = "{{ messages[-1].content }}"
    raises = "{{ raise_exception('no') }}"
    assert Tokenizer(backend, turn, {}).end_ids == (end,)
    assert Tokenizer(backend, none, {}).end_ids == ()
    assert Tokenizer(backend, None, {"eos_token": "<|im_start|>"}).end_ids == (start,)
    assert Tokenizer(backend, raises, {"eos_token": "no such token"}).end_ids == ()
    assert Tokenizer(backend, none, {}, own_template=turn).end_ids == (end,), "of the model itself"


def test_end_tokens_come_from_the_models_template_even_if_the_user_gives_another(
    with_template, tmp_path
):
    with_template("{{ messages[-1].content }}<|im_start|>")
    mine = tmp_path / "mine.jinja"
    mine.write_text("{{ messages[0].content }}")
    assert 1 in Tokenizer.load(tmp_path, mine).end_ids


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_bos_token_goes_before_a_text_but_not_again_before_a_chat(byte_directory, tmp_path):
    from tokenizers.processors import TemplateProcessing

    backend = Backend.from_file(str(byte_directory / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(byte_directory / "tokenizer_config.json", tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("a")[0] == 1 and len(tokenizer.encode("a")) == 2
    assert tokenizer.encode_chat(CHATS[0]) == Tokenizer.load(byte_directory).encode_chat(CHATS[0])


def test_truncation_saved_with_a_tokenizer_does_not_cut_prompts(byte_directory, tmp_path):
    backend = Backend.from_file(str(byte_directory / "tokenizer.json"))
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.load(tmp_path).encode("more than five")) == 14


# --- decoding ------------------------------------------------------------------------------------


def test_a_stream_returns_complete_characters_only(tokenizer):
    stream = tokenizer.stream()
    deltas = [stream.push(token) for token in tokenizer.encode("aé日👍z")]
    assert [delta for delta in deltas if delta] == ["a", "é", "日", "👍", "z"]
    assert stream.finish() == ""


def test_bytes_of_an_incomplete_character_are_marked_at_the_end(tokenizer):
    stream = tokenizer.stream()
    tokens = tokenizer.encode("ok 日")[:-1]
    assert "".join(stream.push(token) for token in tokens) == "ok "
    assert stream.finish() == "�"


@pytest.mark.parametrize("seed", range(40))
def test_deltas_together_are_the_decoded_text(tokenizer, smol, seed):
    rng = random.Random(seed)
    for kind, size in ((tokenizer, 259), (smol, 49152)):
        common = kind.encode("née 日本語 👍🏽 \n\n x")
        tokens = [
            rng.choice(common) if rng.random() < 0.6 else rng.randrange(size) for _ in range(60)
        ]
        stream = kind.stream()
        deltas = [stream.push(token) for token in tokens]
        whole = kind.decode(tokens)
        assert whole.startswith("".join(deltas))
        assert "".join(deltas) + stream.finish() == whole


def test_special_tokens_have_no_text_but_a_name(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("a"), 2]) == "a"
    assert tokenizer.token_bytes.label(2) == "<|im_end|>"


def test_tokens_beyond_the_vocabulary_have_no_text(tokenizer):
    """Random models have more ids than their byte tokenizer has tokens."""
    stream = tokenizer.stream()
    assert stream.push(400) + stream.push(tokenizer.encode("a")[0]) + stream.finish() == "a"


@pytest.mark.parametrize("encode", ["encode", "encode_chat"])
def test_a_text_that_cannot_fit_is_not_tokenized(byte_directory, encode, monkeypatch):
    tokenizer = Tokenizer.load(byte_directory)
    text = "ab" * UNCHECKED
    argument = text if encode == "encode" else [{"role": "user", "content": text}]
    tokens = getattr(tokenizer, encode)(argument, max_tokens=10**6)
    assert len(tokens) >= len(text)
    monkeypatch.setattr("mellmpi.frontend.tokenizer._without_panic", None)  # not reached
    with pytest.raises(TooLong, match="context is 64 tokens; a text of 400"):
        getattr(tokenizer, encode)(argument, max_tokens=64)
