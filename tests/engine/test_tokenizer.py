"""The tokenizer reads a checkpoint's own files and renders its own template."""

import json
import threading
import time

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from everstep.engine.errors import CheckpointError, InvalidRequest
from everstep.engine.tokenizer import Tokenizer

# Ring-mini's template, in short
SIMPLE = (
    "{% for m in messages %}<role>{{ {'user': 'HUMAN'}.get(m.role, m.role.upper()) }}</role>"
    "{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role><think>\n{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["hello world é"] * 3,
        trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False),
    )
    backend.add_special_tokens([AddedToken("<|endoftext|>"), AddedToken("<|role_end|>")])
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "eos_token": {"content": "<|role_end|>"},
        "bos_token": "<|endoftext|>",
        "chat_template": SIMPLE,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tmp_path


def change(folder, **settings):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return Tokenizer.from_folder(folder)


USER = [{"role": "user", "content": "Hi"}]


def test_eos_ids_are_the_union_of_three_files(folder):
    role_end = Tokenizer.from_folder(folder).token_id("<|role_end|>")
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    (folder / "config.json").write_text('{"eos_token_id": 6}')
    assert Tokenizer.from_folder(folder).eos_ids == (5, 6, 7, role_end)
    (folder / "config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.from_folder(folder).eos_ids == (5, 7, role_end)


def test_text_survives_and_truncation_and_padding_of_the_file_are_off(folder):
    tokenizer = Tokenizer.from_folder(folder)
    text = "hello world, ünïcode 你好 <|role_end|>!"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.replace("<|role_end|>", "")
    assert tokenizer.is_added(tokenizer.token_id("<|role_end|>"))
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


def test_a_long_text_lets_other_threads_go_on(folder):
    tokenizer = Tokenizer.from_folder(folder)
    ids: list[int] = []
    thread = threading.Thread(target=lambda: ids.extend(tokenizer.encode("x y " * 200_000)))
    thread.start()
    num_turns = 0
    while not ids:
        num_turns += 1
        time.sleep(0.001)
    thread.join()
    assert num_turns > 5, "encoding held the interpreter's lock to its end"


def test_no_text_of_so_many_tokens_is_longer(folder):
    tokenizer = Tokenizer.from_folder(folder)
    longest = tokenizer.longest_token_bytes
    assert longest is not None
    for text in ("hello world é", "<|endoftext|><|role_end|>", "é" * 50, "\x00 ü hello"):
        assert len(text.encode()) <= longest * len(tokenizer.encode(text))
    # a token that takes the blanks beside it stands for any number of them
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.add_special_tokens([AddedToken("<|x|>", rstrip=True)])
    assert Tokenizer(backend).longest_token_bytes is None


def test_ids_of_the_padded_vocabulary_are_empty(folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token_text(tokenizer.vocab_size + 100) == ""
    assert tokenizer.token_text(tokenizer.vocab_size - 1) == "<|role_end|>"


def test_missing_and_broken_files_are_named(folder, tmp_path_factory):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not found"):
        Tokenizer.from_folder(tmp_path_factory.mktemp("empty"))
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        Tokenizer.from_folder(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: must hold a JSON object"):
        Tokenizer.from_folder(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="does not parse"):
        change(folder, chat_template="{% if %}")
    with pytest.raises(CheckpointError, match="list of"):
        change(folder, chat_template=[1])
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(folder)


def test_the_simple_template_renders_as_published(folder):
    tokenizer = Tokenizer.from_folder(folder)
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.render_chat(messages) == (
        "<role>SYSTEM</role>S<role>HUMAN</role>Hi<role>ASSISTANT</role>Hello."
        "<role>HUMAN</role>Bye<role>ASSISTANT</role><think>\n"
    )


def test_a_jinja_file_wins_over_the_config_and_named_templates_are_chosen(folder):
    named = [
        {"name": "default", "template": "default"},
        {"name": "tool_use", "template": "tools: {{ tools|length }}"},
        {"name": "rag", "template": "{{ documents[0] }}"},
    ]
    tokenizer = change(folder, chat_template=named)
    assert tokenizer.render_chat(USER) == "default"
    assert tokenizer.render_chat(USER, tools=[{}, {}]) == "tools: 2"
    assert tokenizer.render_chat(USER, chat_template="rag", documents=["d"]) == "d"
    assert tokenizer.render_chat(USER, chat_template="{{ eos_token }}") == "<|role_end|>"
    (folder / "chat_template.jinja").write_text("from file")
    assert Tokenizer.from_folder(folder).render_chat(USER) == "from file"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ enable_thinking }}", "no"),
    ],
)
def test_what_templates_may_use(folder, template, text):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.render_chat(USER, chat_template=template, enable_thinking="no") == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|not safe"),
        ("{{ 'a' + messages[0].missing }}", "has no attribute"),
        ("{{ range(10**9) }}", "range"),
    ],
)
def test_a_template_that_refuses_is_a_fault_of_the_messages(folder, template, message):
    with pytest.raises(InvalidRequest, match=message) as caught:
        Tokenizer.from_folder(folder).render_chat(USER, chat_template=template)
    assert caught.value.field == "messages"


def test_the_last_message_is_continued_to_the_letter(folder):
    tokenizer = Tokenizer.from_folder(folder)
    messages = [*USER, {"role": "assistant", "content": "Hi Hi \n"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    expected = "<role>HUMAN</role>Hi<role>ASSISTANT</role>Hi Hi \n"
    assert tokenizer.render_chat(messages, **options) == expected
    ends = SIMPLE.replace("{{ m.content }}", "{{ m.content | trim }}<|role_end|>")
    kept = tokenizer.render_chat(messages, chat_template=ends, **options)
    assert kept.endswith("ASSISTANT</role>Hi Hi \n")
    with pytest.raises(InvalidRequest, match="exclude each other"):
        tokenizer.render_chat(messages, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="drops"):
        tokenizer.render_chat(messages, chat_template="x", **options)
    with pytest.raises(InvalidRequest, match="text content"):
        tokenizer.render_chat([], **options)


def test_template_arguments_may_not_shadow_the_conversation(folder):
    tokenizer = Tokenizer.from_folder(folder)
    with pytest.raises(InvalidRequest, match="bos_token") as caught:
        tokenizer.render_chat(USER, bos_token="x")
    assert caught.value.field == "chat_template_kwargs"


def test_without_a_template_the_message_says_how_to_give_one(folder):
    tokenizer = change(folder, chat_template=None)
    with pytest.raises(InvalidRequest, match="--chat-template"):
        tokenizer.render_chat(USER)
    with pytest.raises(InvalidRequest, match="does not parse") as caught:
        tokenizer.render_chat(USER, chat_template="{% if %}")
    assert caught.value.field == "chat_template"
