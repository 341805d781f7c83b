"""The demo's task: the greatest common divisor by written subtraction.

    prompt    9678<think>
    response  1878,1860,1842,1824,1806,1206,0606,</think>06<eos>

The smaller number is taken from the larger until both are equal; the pair is written after every
step. How many steps that takes is the sum of the partial quotients of a/b: the lengths have a heavy
tail by themselves. A reader can follow a trace, and every step can be checked.
"""

import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PAD, EOS, THINK, END_THINK = "<pad>", "<eos>", "<think>", "</think>"
TOKENS = (PAD, EOS, THINK, END_THINK, *"0123456789", ",")
"""The vocabulary; a token's id is its place."""
EOS_ID = TOKENS.index(EOS)
IDS = {token: i for i, token in enumerate(TOKENS)}

LARGEST = 99
MOST_STEPS = 60
LARGEST_SUM = 99
"""Of a question's numbers; traces for practice may start at larger ones."""


class Pair(NamedTuple):
    """Two different numbers from 1 to 99 with a divisor in common."""

    a: int
    b: int

    def __str__(self) -> str:
        return f"{self.a:02d}{self.b:02d}"

    @property
    def states(self) -> list["Pair"]:
        """What is written, step by step; the last has the answer twice."""
        a, b = self
        found = []
        while a != b:
            a, b = (a - b, b) if a > b else (a, b - a)
            found.append(Pair(a, b))
        return found

    @property
    def answer(self) -> int:
        return self.states[-1].a

    @property
    def prompt(self) -> str:
        return f"{self}{THINK}"


class Verdict(NamedTuple):
    """What is said of a response: is_right is the reward, legal and written count its steps."""

    is_right: bool
    num_legal: int
    num_written: int


def encode(text: str) -> list[int]:
    """Ids of a text in `TOKENS`. Raises ValueError for anything else."""
    found, at = [], 0
    while at < len(text):
        end = text.index(">", at) + 1 if text[at] == "<" and ">" in text[at:] else at + 1
        token = text[at:end]
        if token not in IDS:
            raise ValueError(f"{token!r} is not in the vocabulary; accepted: {' '.join(TOKENS)}")
        found.append(IDS[token])
        at = end
    return found


def decode(ids: Iterable[int]) -> str:
    """The text; an id behind the vocabulary, where a model has room for more, is padding."""
    return "".join(TOKENS[i] if i < len(TOKENS) else PAD for i in ids)


def trace(pair: Pair, steps: int | None = None) -> str:
    """A correct response; cut after `steps` it answers with the smaller number that it stands at."""
    states = pair.states if steps is None else pair.states[:steps]
    last = min(states[-1] if states else pair)
    return "".join(f"{state}," for state in states) + f"{END_THINK}{last:02d}{EOS}"


def guess(number: int) -> str:
    """A response that does not think."""
    return f"{END_THINK}{number:02d}{EOS}"


def judge(pair: Pair, response: str) -> Verdict:
    """Right if it ends with <eos>, has one </think>, and the answer stands between them, exactly.

    A written step is legal if it follows from the one before it, right or wrong.
    """
    thought, found, rest = response.partition(END_THINK)
    is_right = bool(found) and rest == f"{pair.answer:02d}{EOS}"
    written = thought.split(",")[:-1]
    legal = sum(
        _follows(before, after)
        for before, after in zip([str(pair), *written], written, strict=False)
    )
    return Verdict(is_right, legal, len(written))


def reward(prompt: str, response: str) -> float:
    """1 for a right answer, else 0. Raises ValueError for a prompt that is none of this task."""
    return float(judge(parse(prompt), response).is_right)


def parse(prompt: str) -> Pair:
    """The pair of a prompt. Raises ValueError naming what is accepted."""
    digits, found, rest = prompt.partition(THINK)
    if not found or rest or len(digits) != 4 or not digits.isdecimal():
        raise ValueError(f"prompt {prompt!r}: accepted: four digits and {THINK}")
    return Pair(int(digits[:2]), int(digits[2:]))


def pairs(draw: random.Random, *, largest_sum: int = 2 * LARGEST) -> Iterator[Pair]:
    """Pairs without end. Their divisor is drawn first, else every other answer would be 2."""
    while True:
        divisor = draw.randint(2, 12)
        pair = Pair(
            divisor * draw.randint(1, LARGEST // divisor),
            divisor * draw.randint(1, LARGEST // divisor),
        )
        is_question = pair.a != pair.b and sum(pair) <= largest_sum
        if is_question and len(pair.states) <= MOST_STEPS:
            yield pair


def held_out(seed: int, count: int) -> list[Pair]:
    """`count` different questions, the same for a seed, that nothing may be trained on."""
    found: dict[Pair, None] = {}
    for pair in pairs(random.Random(f"euclid held out {seed}"), largest_sum=LARGEST_SUM):
        found[pair] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("pairs end never")


def questions(seed: int, without: Iterable[Pair]) -> Iterator[Pair]:
    """Questions to train on, without end."""
    excluded = set(without)
    drawn = pairs(random.Random(f"euclid questions {seed}"), largest_sum=LARGEST_SUM)
    return (pair for pair in drawn if pair not in excluded)


def _follows(before: str, after: str) -> bool:
    if not (len(before) == len(after) == 4 and before.isdecimal() and after.isdecimal()):
        return False
    a, b = int(before[:2]), int(before[2:])
    return a != b and after == str(Pair(a - b, b) if a > b else Pair(a, b - a))
