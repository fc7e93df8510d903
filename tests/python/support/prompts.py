"""Seeded prompts as token ids, by length. A seed is printed by whoever draws from it."""

import random

# Ids below are special tokens of the tiny model's tokenizer.
FIRST_PLAIN_TOKEN = 3


class Prompts:
    """Draws prompts of random tokens; two draws never share a first block."""

    def __init__(self, vocabulary, seed):
        self.seed = seed
        self._vocabulary = vocabulary
        self._random = random.Random(seed)
        print(f"prompts: seed {seed}")

    def tokens(self, count):
        """A prompt of `count` tokens."""
        return [self._random.randrange(FIRST_PLAIN_TOKEN, self._vocabulary) for _ in range(count)]
