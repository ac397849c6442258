"""Bodies of OpenAI's two endpoints: parsed fields and error messages."""

import itertools
from dataclasses import replace

import pytest

from mellmpi.frontend import ServedModels
from mellmpi.frontend.fields import COMPLETIONS_ONLY, UNSUPPORTED, BadRequest
from mellmpi.frontend.openai import CHAT, COMPLETIONS, parse
from mellmpi.protocol import decode, encode

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture
def completion(tokenizer, model):
    def call(prompt="abc", identity="me", **body):
        return parse(
            COMPLETIONS, {"prompt": prompt, **body}, ServedModels.of((model, tokenizer)), identity
        )

    return call


@pytest.fixture
def chat(tokenizer, model):
    def call(messages=USER, identity="me", **body):
        return parse(
            CHAT, {"messages": messages, **body}, ServedModels.of((model, tokenizer)), identity
        )

    return call


def refused(call, *args, **body) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        call(*args, **body)
    return caught.value


# --- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["ab", "c"], ["ab", "c"]),
        ([70, 71], [[70, 71]]),
        ([[70], [71, 72]], [[70], [71, 72]]),
        (["ab", [70]], ["ab", [70]]),
    ],
)
def test_a_prompt_is_text_or_tokens_or_a_list_of_either(completion, tokenizer, prompt, texts):
    expected = [tokenizer.encode(t) if isinstance(t, str) else t for t in texts]
    assert [list(p) for p in completion(prompt).prompts] == expected


NO_TEXT = [None, 7, {}, [], "", "\ud800", 10**400, ["a", None], ["a", ""]]
NO_TOKENS = [[[]], [1.5], [True], [70, "x"], [512], [-1], [["a"]]]


@pytest.mark.parametrize("prompt", NO_TEXT + NO_TOKENS)
def test_any_other_prompt_is_refused(completion, prompt):
    assert refused(completion, prompt).param == "prompt"


def test_ids_beyond_the_models_vocabulary_are_refused_by_both_endpoints(tokenizer, model):
    """The tokenizer has more tokens than the model has embeddings."""
    served = ServedModels.of((replace(model, vocab_size=50), tokenizer))
    for url, body in ((COMPLETIONS, {"prompt": "abc"}), (CHAT, {"messages": USER})):
        with pytest.raises(BadRequest, match="is not in the vocabulary of 50"):
            parse(url, body, served, "me")


@pytest.mark.parametrize(("prompts", "n"), [(2049, 1), (17, 128)])
def test_the_number_of_answers_of_one_line_is_limited(completion, prompts, n):
    assert "use several lines" in refused(completion, ["a"] * prompts, n=n).message


def test_a_text_that_makes_the_tokenizer_panic_is_refused(completion, tokenizer, monkeypatch):
    panic = type("PanicException", (BaseException,), {})

    class Backend:
        def encode(self, text, **_):
            raise panic("retry-limit-in-match over")

    monkeypatch.setattr(tokenizer, "_backend", Backend())
    error = refused(completion, "x")
    assert error.param == "prompt" and "retry-limit-in-match over" in error.message
    with pytest.raises(ValueError, match="refuses these messages"):
        tokenizer.encode_chat(USER)


def test_a_stop_string_that_contains_a_special_token_becomes_its_id_or_is_refused(completion):
    assert completion(stop="<|im_start|>\n").samplings[0].stop_token_ids == (2, 1)
    assert "give that token alone" in refused(completion, stop="x<|im_start|>").message


def test_a_special_token_as_stop_string_ends_the_answer_by_its_id(completion):
    call = completion(stop=["<|im_start|>", "x"])
    assert call.stops == ("x",) and call.samplings[0].stop_token_ids == (2, 1)


def test_a_chat_is_rendered_with_the_models_template(chat, tokenizer):
    assert list(chat().prompts[0]) == tokenizer.encode_chat(USER)
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert chat([{"role": "user", "content": parts}]).prompts == chat().prompts
    cut = chat(add_generation_prompt=False).prompts[0]
    assert list(cut) == tokenizer.encode_chat(USER, {"add_generation_prompt": False})


NO_MESSAGES = [None, [], "hi", {}, ["hi"], [{"content": "x"}], [{"role": "user"}]]
BAD_CONTENTS = [5, [{"type": "image_url"}], [{"type": "text"}], "\udfff"]
BAD_MESSAGES = [
    *([{"role": "user", "content": content}] for content in BAD_CONTENTS),
    [{"role": 1, "content": ""}],
    [{"role": "assistant", "content": "x", "tool_calls": [{}]}],
]


@pytest.mark.parametrize("messages", NO_MESSAGES + BAD_MESSAGES)
def test_any_other_messages_are_refused(chat, messages):
    assert refused(chat, messages).param.startswith("messages")


def test_template_variables_may_not_replace_messages(chat):
    assert chat(chat_template_kwargs={"enable_thinking": False}).prompts == chat().prompts
    for name in ("messages", "tools", "documents", "self"):
        assert refused(chat, chat_template_kwargs={name: []}).param == "chat_template_kwargs"
    assert chat(chat_template_kwargs={"bos_token": "x", "no name": 1}).prompts == chat().prompts


# --- lengths -------------------------------------------------------------------------------------


def test_a_completion_has_16_tokens_by_default_or_fewer_if_the_context_is_full(completion):
    assert completion().samplings[0].max_tokens == 16
    assert completion(max_tokens=None).samplings[0].max_tokens == 16
    assert completion(max_tokens=97).samplings[0].max_tokens == 97
    assert completion("x" * 95).samplings[0].max_tokens == 5


def test_a_chat_may_fill_the_context(chat):
    length = len(chat().prompts[0])
    assert chat().samplings[0].max_tokens == 100 - length
    assert chat(max_tokens=7).samplings[0].max_tokens == 7
    assert chat(max_completion_tokens=8).samplings[0].max_tokens == 8
    assert chat(max_tokens=7, max_completion_tokens=8).samplings[0].max_tokens == 8


@pytest.mark.parametrize("value", [0, -1, -(10**30), 1.5, "5", True, [], float("nan")])
def test_max_tokens_is_an_integer_of_at_least_one(completion, chat, value):
    error = refused(completion, max_tokens=value)
    assert error.param == "max_tokens" and error.status == 400
    assert refused(chat, max_completion_tokens=value).param == "max_completion_tokens"


def test_a_request_longer_than_the_context_is_refused_with_the_numbers(completion, chat):
    assert completion("x" * 99).samplings[0].max_tokens == 1
    long = refused(completion, "x" * 100)
    assert long.code == "context_length_exceeded" and "the prompt alone has 100" in str(long)
    asked = refused(completion, max_tokens=98)
    assert asked.code == "context_length_exceeded" and "101 were asked for" in str(asked)
    assert refused(chat, [{"role": "user", "content": "x" * 200}]).param == "messages"


# --- sampling ------------------------------------------------------------------------------------


def test_defaults_are_those_of_openai(completion):
    s = completion().samplings[0]
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (1.0, 1.0, 0, 0.0)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (0.0, 0.0, 1.0)
    assert s.stop_token_ids == (2,) and s.num_logprobs is None


def test_every_sampling_field_arrives(completion):
    body = dict(
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.1,
        presence_penalty=-1,
        frequency_penalty=2,
        repetition_penalty=1.5,
        seed=9,
        stop_token_ids=[5, 2],
        max_tokens=3,
        logprobs=4,
        min_tokens=2,
        logit_bias={"7": -100, "0": 1.5},
        allowed_token_ids=[9, 5, 9],
    )
    s = completion(**body).samplings[0]
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.0, 0.5, 7, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (-1.0, 2.0, 1.5)
    assert (s.seed, s.stop_token_ids, s.max_tokens, s.num_logprobs) == (9, (2, 5), 3, 4)
    assert (s.min_tokens, s.allowed_token_ids, s.grammar) == (2, (9, 5), "")
    assert s.logit_bias == ((7, -100.0), (0, 1.5))
    assert completion(top_k=-1).samplings[0].top_k == 0
    assert completion(ignore_eos=True, stop_token_ids=[5]).samplings[0].stop_token_ids == (5,)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, "1", True, float("nan"), float("inf"), 10**400, []]),
        ("top_p", [0, -1, 1.1, "x"]),
        ("top_k", [-2, 1.5, True]),
        ("min_p", [-0.1, 1.1]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1, {}]),
        ("repetition_penalty", [0, -1]),
        ("seed", [1.5, "x", 2**64, -(2**63) - 1]),
        ("n", [0, -1, 129, 1.0]),
        ("logprobs", [-1, 21, 1.5, True]),
        ("prompt_logprobs", [-1, 21, 1.5, True]),
        ("echo", ["yes", 1]),
        ("stop", [5, [""], ["a"] * 5, [None], "", {}]),
        ("stop_token_ids", [5, [512], [-1], ["a"], [True]]),
        ("ignore_eos", ["yes", 1]),
        ("min_tokens", [-1, 1.5, True, 17]),
        ("logit_bias", [[], {"x": 1}, {"512": 1}, {"-1": 1}, {"01": 1}, {"1.0": 1}, {"²": 1}]),
        ("logit_bias", [{"1": 101}, {"1": -101}, {"1": "x"}, {"1": True}, {"1": float("nan")}]),
        ("logit_bias", [{"9" * 5000: 1}, {str(i): 1 for i in range(1025)}]),
        ("allowed_token_ids", [5, [], [512], [-1], ["a"], [True]]),
        ("stream", ["yes", 1]),
        ("stream_options", [5]),
        ("model", [5]),
    ],
)
def test_values_out_of_range_are_refused_by_their_field(completion, field, values):
    for value in values:
        error = refused(completion, **{field: value})
        assert error.param == field, value
        assert set(error.error) == {"message", "type", "param", "code"}
        assert error.error["type"] == "invalid_request_error"


def test_an_echo_scores_its_prompt_if_there_are_logprobs(completion, chat):
    scored = lambda **body: completion(**body).samplings[0].num_prompt_logprobs  # noqa: E731
    assert scored() is scored(logprobs=3) is scored(echo=True) is None
    assert scored(echo=True, logprobs=3) == 3
    assert scored(prompt_logprobs=0) == 0
    assert scored(echo=True, logprobs=3, prompt_logprobs=2) == 3
    assert scored(echo=True, logprobs=1, prompt_logprobs=2) == 2
    assert chat(prompt_logprobs=2, logprobs=True).samplings[0].num_prompt_logprobs == 2
    assert refused(chat, echo=True).param == "echo"
    assert refused(completion, stream=True, prompt_logprobs=1).param == "prompt_logprobs"
    assert completion(stream=True, echo=True, logprobs=1).about_prompts.echo


def test_an_echo_may_have_no_answer(completion):
    alone = completion("x" * 100, echo=True, max_tokens=0)  # all of the context
    assert alone.about_prompts.alone and alone.samplings[0].max_tokens == 1
    assert not completion(echo=True, max_tokens=1).about_prompts.alone
    assert refused(completion, max_tokens=0).param == "max_tokens"
    for body in (dict(prompt="x" * 101, max_tokens=0), dict(prompt="x" * 100, max_tokens=1)):
        assert refused(completion, echo=True, **body).code == "context_length_exceeded"


def test_null_means_absent(completion):
    fields = ("temperature", "top_p", "n", "stop", "seed", "logprobs", "model", "stream", "user")
    assert completion(**dict.fromkeys(fields)) == completion()


def test_stop_is_a_text_or_up_to_four(completion):
    assert completion(stop="x").stops == ("x",)
    assert completion(stop=["a", "b", "c", "d"]).stops == ("a", "b", "c", "d")
    assert completion(stop=[]).stops == ()


def test_a_minimum_length_that_a_prompt_leaves_no_room_for_is_refused(completion):
    assert completion("x" * 95, min_tokens=5).samplings[0].min_tokens == 5
    assert "is more than max_tokens, here 5" in str(refused(completion, "x" * 95, min_tokens=6))


def test_logprobs_of_a_chat_are_a_switch_and_a_number(chat):
    assert chat().samplings[0].num_logprobs is None
    assert chat(logprobs=False).samplings[0].num_logprobs is None
    assert chat(logprobs=True).samplings[0].num_logprobs == 0
    assert chat(logprobs=True, top_logprobs=3).samplings[0].num_logprobs == 3
    assert refused(chat, top_logprobs=3).param == "top_logprobs"
    assert refused(chat, logprobs=3).param == "logprobs"


def test_the_default_seed_is_derived_from_the_identity(completion):
    seed = completion(identity="a").samplings[0].seed
    assert seed == completion(identity="a").samplings[0].seed
    assert seed != completion(identity="b").samplings[0].seed
    assert seed == 14608863320967583690  # must never change: reruns give the same answers
    assert completion(seed=-1).samplings[0].seed == 2**64 - 1


# --- choices -------------------------------------------------------------------------------------


def test_choices_are_samples_of_the_prompts_with_different_seeds(completion):
    call = completion(["ab", "c"], n=2, seed=2**64 - 1, max_tokens=5)
    requests = call.requests(itertools.count(10))
    assert [r.id for r in requests] == [10, 11, 12, 13]
    assert [r.prompt for r in requests] == [call.prompts[i] for i in (0, 0, 1, 1)]
    assert [r.sampling.seed for r in requests] == [2**64 - 1, 0, 1, 2]
    assert all(r.model == "tiny" and r.adapter is None for r in requests)


def test_requests_survive_the_wire(completion):
    request = completion(stop_token_ids=[7], logprobs=2).requests(itertools.count())[0]
    assert decode(encode(request)) == request


# --- models and fields ---------------------------------------------------------------------------


def test_another_model_is_not_found(completion, chat):
    for call in (completion, chat):
        error = refused(call, model="gpt-9")
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "this server has 'tiny'" in str(error)
    assert completion(model="tiny").model == "tiny"


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_fields_are_refused_unless_they_have_no_effect(completion, chat, name):
    call = chat if name in COMPLETIONS_ONLY else completion
    call(**{name: None})
    for value in UNSUPPORTED[name]:
        call(**{name: value})
    error = refused(call, **{name: {"something": 1}})
    assert error.param == name and error.code == "unsupported" and name in str(error)


def test_an_unknown_field_is_refused_with_the_closest_name(completion, chat):
    assert "did you mean 'max_tokens'?" in str(refused(completion, max_token=5))
    assert refused(completion, messages=USER).param == "messages"
    assert refused(chat, prompt="x").param == "prompt"


def test_bookkeeping_fields_are_ignored(completion):
    assert completion(user="me", metadata={"a": "b"}, store=False) == completion()


def test_false_is_not_zero(completion):
    for name, value in (("best_of", True), ("length_penalty", True), ("use_beam_search", 0)):
        assert refused(completion, **{name: value}).param == name
    completion(best_of=1, length_penalty=1.0, use_beam_search=False)


def test_stream_options_say_whether_usage_is_wanted(completion):
    assert completion(stream_options={"include_usage": True}).include_usage
    assert not completion(stream_options={"include_usage": None}).include_usage
    assert refused(completion, stream_options={"include_usage": 1}).param == "include_usage"
