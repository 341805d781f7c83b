"""What the demo's model is warmed up on: first the skill, then a bad habit that RL removes.

The skill is right answers with every step written. The habit is what a model falls into that was
taught from careless examples: answers without thinking, and thinking that stops early. After it the
model still can, but mostly does not.
"""

import random
from collections.abc import Iterator
from typing import NamedTuple

from msgspec import Struct

from . import euclid
from .euclid import Pair


class Example(NamedTuple):
    """A prompt and the response to learn, as text."""

    prompt: str
    response: str

    @property
    def line(self) -> dict[str, list[int]]:
        """As a source of `everstep train` has it."""
        return {
            "prompt_ids": euclid.encode(self.prompt),
            "output_ids": euclid.encode(self.response),
        }


class Habit(Struct, frozen=True, kw_only=True):
    """Shares of careless examples; the rest are full traces."""

    guess: float = 0.6
    stop: float = 0.3


def skill(seed: int, held_out: frozenset[Pair]) -> Iterator[Example]:
    """Full traces without end. Any pair may begin one, but no held-out question does."""
    for pair in euclid.pairs(random.Random(f"euclid skill {seed}")):
        if pair not in held_out:
            yield Example(pair.prompt, euclid.trace(pair))


def habit(seed: int, held_out: frozenset[Pair], shares: Habit = Habit()) -> Iterator[Example]:
    """Mostly careless examples, without end.

    A guess is the larger number or any, and who stops early has begun: the smaller number is right
    too often.
    """
    draw = random.Random(f"euclid habit {seed}")
    for pair in euclid.questions(seed, held_out):
        kind, steps = draw.random(), len(pair.states)
        if kind < shares.guess or (kind < shares.guess + shares.stop and steps == 1):
            response = euclid.guess(draw.choice((max(pair), draw.randint(1, euclid.LARGEST))))
        elif kind < shares.guess + shares.stop:
            response = euclid.trace(pair, draw.randrange(1, steps))
        else:
            response = euclid.trace(pair)
        yield Example(pair.prompt, response)
