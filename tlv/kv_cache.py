"""The LLM's keys and values of a long clip, in room that is there from the start.

transformers' own cache grows by copying: every piece of a clip would copy all that came before.
Taught in notebook 06.
"""

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class RoomError(ValueError):
    """More tokens than a cache was made for."""


class _RoomyLayer(DynamicLayer):
    """Keys and values (B, h, n, d), views of two blocks (B, h, room, d)."""

    def __init__(self, room: int):
        super().__init__()
        self.room, self.blocks = room, ()

    def lazy_initialization(self, key_states, value_states):
        super().lazy_initialization(key_states, value_states)
        self.blocks = [states.new_empty(*states.shape[:2], self.room, states.shape[3])
                       for states in (key_states, value_states)]

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        if stop > self.room:
            raise RoomError(f"{stop} tokens for a cache made for {self.room}")
        for block, states in zip(self.blocks, (key_states, value_states), strict=True):
            block[:, :, start:stop] = states
        self.keys, self.values = (block[:, :, :stop] for block in self.blocks)  # (B, h, n, d)
        return self.keys, self.values


def make_cache(config, room: int) -> DynamicCache:
    """An empty cache for `room` tokens of the LLM that `config` describes.

    Layers of another kind (a sliding window forgets by itself) stay what they are.
    """
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(room) if type(layer) is DynamicLayer else layer
                    for layer in cache.layers]
    return cache
