"""The order in which sequences are read: a permutation of each epoch, found for any place in O(1) time and memory.

Neighbouring sequences form stretches. An epoch permutes the stretches, takes them by groups in that order, and
permutes the sequences inside each group. So each sequence of a group is as likely anywhere in the group, while only the
shards of one group's stretches are in use at a time.
"""

from __future__ import annotations

import functools

_MASK = (1 << 64) - 1
_ROUNDS = 8


def mix(value: int) -> int:
    """A well-mixed 64-bit number for each 64-bit number (the output function of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A permutation of 0..size-1 that is computed, not stored: a Feistel network, walked until it stays inside."""

    def __init__(self, size: int, *key: int) -> None:
        self._size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._low = (1 << self._half) - 1
        state = functools.reduce(lambda mixed, part: mix(mixed ^ (part & _MASK)), key, 0)
        self._keys = [mix(state ^ mix(number)) for number in range(_ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where the permutation takes an index."""
        while True:
            left, right = index >> self._half, index & self._low
            for key in self._keys:
                left, right = right, left ^ (mix(key ^ right) & self._low)
            index = left << self._half | right
            if index < self._size:
                return index

    def inverse(self, index: int) -> int:
        """The index that the permutation takes there."""
        while True:
            left, right = index >> self._half, index & self._low
            for key in reversed(self._keys):
                left, right = right ^ (mix(key ^ left) & self._low), left
            index = left << self._half | right
            if index < self._size:
                return index


class SequenceOrder:
    """Endless order over `sequences` sequences: one epoch after the other, each a permutation of its own.

    `stretch` sequences stay together in the outer permutation, `group` stretches are mixed in the inner one. With
    `seed` None every epoch has the natural order.
    """

    def __init__(self, sequences: int, stretch: int, group: int, seed: int | None) -> None:
        self._sequences = sequences
        self._stretch = stretch
        self._stretches = -(-sequences // stretch)
        self._group = group
        self._seed = seed
        self._missing = self._stretches * stretch - sequences
        """By how much the last stretch is shorter than the others."""
        self._permutation = functools.lru_cache(maxsize=8)(Permutation)

    def __call__(self, sample: int) -> int:
        """The sequence that is read as number `sample` since the beginning of training."""
        epoch, place = divmod(sample, self._sequences)
        if self._seed is None:
            return place
        outer = self._permutation(self._stretches, self._seed, epoch, 0)
        full = self._group * self._stretch
        # The group with the short stretch is shorter, and those after it begin earlier.
        short_place = outer.inverse(self._stretches - 1)
        short_group = short_place // self._group
        begin = short_group * full
        places = min(self._group, self._stretches - short_group * self._group)
        size = places * self._stretch - self._missing
        if place < begin:
            group, offset = divmod(place, full)
        elif place < begin + size:
            group, offset = short_group, place - begin
        else:
            group, offset = divmod(place + self._missing, full)
        if group != short_group:
            size = min(full, (self._stretches - group * self._group) * self._stretch)
        number, inside = divmod(self._permutation(size, self._seed, epoch, 1 + group)(offset), self._stretch)
        if group == short_group:
            # In its group the short stretch counts last, so that all places before it are of full stretches.
            last, short = places - 1, short_place - group * self._group
            number = short if number == last else last if number == short else number
        return outer(group * self._group + number) * self._stretch + inside
