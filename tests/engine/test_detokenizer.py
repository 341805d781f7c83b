"""The incremental detokeniser: one text whatever the chunking, held back where it must be."""

from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from everstep.engine.detokenizer import Detokenizer
from everstep.engine.tokenizer import Tokenizer


def byte_level() -> Tokenizer:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["hello world é 你好 😀 stop STOP\n\n"] * 3, trainer)
    backend.add_special_tokens([AddedToken("</think>", special=True)])
    backend.add_tokens([AddedToken("a tag é"), AddedToken("<role>")])
    return Tokenizer(backend)


def byte_fallback() -> Tokenizer:
    pieces = ["<unk>", "▁", "▁a", "b", "▁stop", "é", "你"]
    vocab = [(piece, -1.0) for piece in pieces]
    vocab += [(f"<0x{byte:02X}>", -2.0) for byte in range(256)]
    backend = Backend(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return Tokenizer(backend)


def word_piece() -> Tokenizer:
    vocab = {"[UNK]": 0, "a": 1, "##b": 2, "stop": 3, ".": 4, "##你": 5, "n't": 6}
    backend = Backend(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return Tokenizer(backend)


BUILT = {"bytes": byte_level(), "fallback": byte_fallback(), "words": word_piece()}
BYTES = BUILT["bytes"]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    any_id = st.integers(0, tokenizer.vocab_size + 3)
    if tokenizer is BYTES:
        texts = st.sampled_from(["hello", "stop", "é", "你", "😀", "</think>", "\n", "a tag é"])
        runs = texts.map(tokenizer.encode)
        # cut through characters: the head of a multi-byte one
        heads = runs.flatmap(lambda ids: st.integers(1, len(ids)).map(lambda n: ids[:n]))
        parts = st.one_of(any_id.map(lambda i: [i]), runs, heads)
        return st.lists(parts, max_size=20).map(lambda lists: list(chain(*lists)))
    return st.lists(any_id, max_size=30)


def naive(tokenizer, ids, stop, include_stop, skip, min_tokens):
    """The text and number of tokens by decoding all ids again after each token."""
    base = 0
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=skip)
        # what later bytes could change is not looked at yet
        while text.endswith("\ufffd"):
            text = text[:-1]
        if n <= min_tokens:
            base = len(text)
            continue
        ends = [(text.find(s, base) + len(s), -len(s), s) for s in stop if s in text[base:]]
        if ends:
            end, _, matched = min(ends)
            return text[: end if include_stop else end - len(matched)], n, matched
    return tokenizer.decode(ids, skip_special_tokens=skip), len(ids), None


@pytest.mark.parametrize("kind", sorted(BUILT))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_text_is_a_prefix_of_decode_at_every_token(kind, data):
    tokenizer = BUILT[kind]
    ids = data.draw(ids_of(tokenizer))
    skip = data.draw(st.booleans())
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    text = ""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for n, token_id in enumerate(ids, 1):
        text += detokenizer.push(token_id)
        assert detokenizer.offset == len(text)
        assert whole.startswith(text)
        assert tokenizer.decode(ids[:n], skip_special_tokens=skip).startswith(text)
    text += detokenizer.finish()
    assert text == whole
    assert detokenizer.offset == detokenizer.position == len(text)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_stop_strings_equal_those_of_decoding_anew_after_each_token(data):
    ids = data.draw(ids_of(BYTES))
    whole = BYTES.decode(ids).replace("\ufffd", "")
    pieces = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 3, 7)] or ["x"]
    stop = data.draw(st.lists(st.sampled_from([*pieces, "stop", "aab", "é"]), max_size=4))
    include_stop, skip = data.draw(st.booleans()), data.draw(st.booleans())
    min_tokens = data.draw(st.integers(0, 3))
    expected = naive(BYTES, ids, stop, include_stop, skip, min_tokens)

    detokenizer = Detokenizer(
        BYTES, stop=stop, include_stop=include_stop, skip_special_tokens=skip, min_tokens=min_tokens
    )
    text, used, rest = "", 0, ids
    while rest and detokenizer.matched is None:
        size = data.draw(st.integers(1, len(rest)))
        new, n = detokenizer.extend(rest[:size])
        text, used, rest = text + new, used + n, rest[n:] if n == size else []
        assert BYTES.decode(ids[:used], skip_special_tokens=skip)[: len(text)] == text
    text += detokenizer.finish()
    assert (text, used, detokenizer.matched) == expected
    assert text == BYTES.decode(ids[:used], skip_special_tokens=skip)[: detokenizer.offset]


def test_a_possible_beginning_of_a_stop_string_is_held_back_and_no_more():
    ids = [BYTES.token_id(char) for char in "abcabx"]
    detokenizer = Detokenizer(BYTES, stop=["bcabc"])
    assert [detokenizer.push(i) for i in ids] == ["a", "", "", "", "", "bcabx"]


def test_the_match_complete_first_wins_and_of_those_the_longest():
    ids = BYTES.encode("one two three")
    text = Detokenizer(BYTES, stop=["three", "wo", "two", "one two three four"])
    assert text.extend(ids)[0] == "one "
    assert text.matched == "two"
    assert text.push(ids[0]) == ""
    assert text.finish() == ""


def test_include_stop_keeps_the_string_and_cuts_behind_it():
    ids = [BYTES.token_id(char) for char in "abc"] + BYTES.encode("hello")
    detokenizer = Detokenizer(BYTES, stop=["bch"], include_stop=True)
    text, used = detokenizer.extend(ids)
    assert (text, detokenizer.matched) == ("abch", "bch")
    assert used == 4
    assert detokenizer.offset == 4


def test_half_a_character_waits_and_is_replaced_only_at_the_end():
    ids = BYTES.encode("😀")
    assert len(ids) > 1
    detokenizer = Detokenizer(BYTES)
    assert "".join(detokenizer.push(i) for i in ids[:-1]) == ""
    assert detokenizer.push(ids[-1]) == "😀"
    cut = Detokenizer(BYTES)
    assert cut.extend(ids[:-1])[0] == ""
    assert cut.finish() == "\ufffd"


def test_position_before_a_push_is_where_that_token_begins():
    ids = [*BYTES.encode("a😀"), BYTES.token_id("b")]
    detokenizer = Detokenizer(BYTES, stop=["zzz", "bz"])
    offsets = []
    for token_id in ids:
        offsets.append(detokenizer.position)
        detokenizer.push(token_id)
    assert offsets[0] == 0
    assert offsets[1] == 1
    assert offsets[-1] == 2


def test_structural_tags_are_text_and_other_specials_are_not():
    end, tag = BYTES.token_id("<|end|>"), BYTES.token_id("</think>")
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.extend([end, tag, end])[0] == "</think>"
    shown = Detokenizer(BYTES, skip_special_tokens=False)
    assert shown.extend([end, tag])[0] == "<|end|></think>"


@settings(max_examples=250, deadline=None)
@given(
    data=st.lists(
        st.sampled_from([0x41, 0xC0, 0xC2, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF])
        | st.integers(0x80, 0xBF),
        max_size=10,
    ).map(bytes)
)
def test_broken_utf8_is_replaced_as_the_library_does(data):
    of_byte = {
        BYTES.token_bytes(i)[0]: i
        for i in range(BYTES.vocab_size)
        if len(BYTES.token_bytes(i)) == 1
    }
    ids = [of_byte[byte] for byte in data]
    detokenizer = Detokenizer(BYTES)
    text = detokenizer.extend(ids)[0] + detokenizer.finish()
    assert text == BYTES._backend.decode(ids, skip_special_tokens=False)


def test_work_does_not_grow_with_the_text_or_the_stop_strings():
    """Characters stepped through the automaton are counted, not seconds."""
    stop = ["a" * 1000 + "b", "a" * 500 + "c"]
    detokenizer = Detokenizer(BYTES, stop=stop)
    a = BYTES.token_id("a")
    steps = 0
    automaton = detokenizer._automaton

    class Counting(dict):
        def get(self, *args):
            nonlocal steps
            steps += 1
            return super().get(*args)

        def __contains__(self, key):
            nonlocal steps
            steps += 1
            return super().__contains__(key)

    automaton._next = [Counting(node) for node in automaton._next]
    text = "".join(detokenizer.push(a) for _ in range(5000)) + detokenizer.finish()
    assert text == "a" * 5000
    assert steps < 5000 * 6
