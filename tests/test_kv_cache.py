"""The cache with room: the same keys, values and logits as transformers' own."""

import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

from tlv.kv_cache import RoomError, make_cache

CONFIG = Qwen2Config(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def llm():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(CONFIG).eval()


@torch.no_grad()
def feed(llm, cache, *pieces):
    for piece in pieces:
        logits = llm(input_ids=torch.tensor([piece]), past_key_values=cache).logits
    return logits[0, -1]  # (V,)


def test_it_gives_what_the_growing_cache_gives_and_copies_nothing(llm):
    grown, roomy = DynamicCache(config=CONFIG), make_cache(CONFIG, 20)
    for piece in ([3, 4, 5, 6, 7], [8, 9], [10]):
        assert torch.equal(feed(llm, grown, piece), feed(llm, roomy, piece))
        places = {layer.keys.data_ptr() for layer in roomy.layers}
        assert places == {layer.blocks[0].data_ptr() for layer in roomy.layers}
    assert roomy.get_seq_length() == 8
    for one, other in zip(grown.layers, roomy.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_what_was_cropped_is_overwritten(llm):
    cache = make_cache(CONFIG, 8)
    feed(llm, cache, [3, 4, 5], [6, 7, 8])
    cache.crop(-3)
    again = feed(llm, cache, [9, 2])
    assert torch.equal(again, feed(llm, make_cache(CONFIG, 8), [3, 4, 5], [9, 2]))


def test_more_than_its_room_is_refused(llm):
    with pytest.raises(RoomError, match="5 tokens for a cache made for 4"):
        feed(llm, make_cache(CONFIG, 4), [1, 2, 3], [4, 5])


def test_layers_with_a_window_keep_their_own_way():
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=kinds)
    kinds = [type(layer).__name__ for layer in make_cache(config, 9).layers]
    assert kinds[0] == "DynamicSlidingWindowLayer" and kinds[1] != "DynamicLayer"
