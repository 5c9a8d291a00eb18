"""After installation nothing needs the network: a model is built, saved, loaded, trained, asked."""

import json
import socket

import pytest
from huggingface_hub import constants
from safetensors.torch import save_file
from test_convert import CONFIG, make_weights
from toy_manifest import make_world

from tlv import train
from tlv.ask import answer
from tlv.builders import load_model
from tlv.convert import convert
from tlv.train_config import TrainConfig

LOCAL = ("127.0.0.1", "::1", "localhost", None, "")


@pytest.fixture
def attempts(monkeypatch):
    """Refuses connections and look-ups that leave the machine; lists them, as some are caught."""
    found = []

    def guard(function, host_of):
        def call(*args, **kwargs):
            host = host_of(*args, **kwargs)
            if host not in LOCAL:
                found.append(host)
                raise OSError(f"the test forbids the network: {host}")
            return function(*args, **kwargs)

        return call

    def peer(connection, address):
        return None if connection.family == socket.AF_UNIX else address[0]

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, guard(getattr(socket.socket, name), peer))
    for name in ("getaddrinfo", "gethostbyname"):
        look_up = guard(getattr(socket, name), lambda host, *args, **kwargs: host)
        monkeypatch.setattr(socket, name, look_up)
    # As a user has it, who sets no HF_HUB_OFFLINE: the hub would be asked.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return found


def test_a_model_is_built_saved_loaded_and_asked_without_the_network(
    attempts, build_tiny, clip_frames, tmp_path
):
    for part in build_tiny():
        part.save_pretrained(tmp_path)
    model, processor = load_model(tmp_path)
    assert isinstance(answer(model, processor, clip_frames(), "Where?", 4), str)
    assert not attempts
    for name in ("example.org", "192.0.2.1"):  # what was forbidden is seen
        with pytest.raises(OSError, match="forbids"):
            socket.create_connection((name, 80), timeout=1)
    assert attempts == ["example.org", "192.0.2.1"]


def test_a_mixture_with_a_qformer_is_built_and_loaded_without_the_network(
    attempts, build_tiny, vision_dir, clip_frames, tmp_path
):
    """Upstream's Q-Former asks the Hub for BERT's config whenever it is built."""
    for part in build_tiny(second_vision_dir=vision_dir, connector_type="qformer",
                           connector_width=32):
        part.save_pretrained(tmp_path)
    model, processor = load_model(tmp_path)
    assert isinstance(answer(model, processor, clip_frames(), "Where?", 4), str)
    assert not attempts


@pytest.mark.slow
def test_a_model_is_trained_without_the_network(attempts, model_dir, tmp_path):
    world = make_world(tmp_path / "world", 2)
    train.train(TrainConfig(
        model_dir=str(model_dir), data=str(world / "data.json"), videos_dir=str(world),
        out_dir=str(tmp_path / "out"), num_steps=1, micro_batch_size=2, lr_connector=1e-3,
        device="cpu",
    ))  # fmt: skip
    assert (tmp_path / "out/checkpoint/model.safetensors").is_file()
    assert not attempts


def test_a_published_checkpoint_is_converted_without_the_network(
    attempts, tokenizer, clip_frames, tmp_path
):
    """Its config names repositories of the Hub, which upstream asks."""
    tokenizer.save_pretrained(tmp_path / "published")
    (tmp_path / "published/config.json").write_text(json.dumps(CONFIG))
    save_file(make_weights(), tmp_path / "published/model.safetensors")
    convert(tmp_path / "published", tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert isinstance(answer(model, processor, clip_frames(), "Where?", 4), str)
    assert not attempts
