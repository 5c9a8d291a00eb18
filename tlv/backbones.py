"""The two tiny backbones of the toy world, trained side by side, and their tokenizer.

Taught in notebook 00.
"""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tlv import corpus, questions, templates
from tlv.background import Background
from tlv.devices import find_device
from tlv.toy_llm import train_llm
from tlv.toy_siglip import train_vision

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>", "<video>")


def train_backbones(
    out_dir,
    *,
    seed: int,
    vision_steps: int,
    llm_steps: int,
    num_texts: int,
    template: str = "plain",
    vision_width: int = 128,
    vision_layers: int = 4,
    llm_width: int = 128,
    llm_layers: int = 6,
    batch_size: int = 64,
    num_rows: int = 16,
    device: str = "cpu",
) -> Background:
    """Start to train vision encoder and language model; `wait` of the result gives the loss curves.

    They are written to `vision/` and `llm/` below `out_dir`. `num_texts` documents train the
    tokenizer; a step sees `batch_size` images, or `num_rows` texts with all their turns. Encoder
    and language model know nothing of each other: each is trained in a process of its own, with
    half of the CPU threads. The language model takes longer and goes first; for its last steps,
    when the encoder is done, it takes all of them, each for a process.
    """
    device = find_device(device)
    rng = np.random.default_rng([seed, 10])  # a stream of its own: no scene of the world
    lessons = [corpus.write_lesson(rng, i / num_texts) for i in range(num_texts)]
    texts = [templates.render([turn], template) for turns in lessons for turn in turns]
    texts += [questions.frame_caption(facts) for facts in corpus.write_frames(rng, num_texts)[1]]
    shared = dict(tokenizer=train_tokenizer(texts), seed=seed, device=device)
    llm = dict(
        out_dir=Path(out_dir) / "llm", num_steps=llm_steps, width=llm_width,
        num_layers=llm_layers, num_rows=num_rows, template=template,
        num_threads=torch.get_num_threads(), **shared,
    )  # fmt: skip
    vision = dict(
        out_dir=Path(out_dir) / "vision", num_steps=vision_steps, width=vision_width,
        num_layers=vision_layers, batch_size=batch_size, **shared,
    )  # fmt: skip
    jobs = {"llm": (train_llm, llm), "vision": (train_vision, vision)}
    return Background(jobs, num_threads=max(1, torch.get_num_threads() // 2))


def train_tokenizer(texts, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in Qwen2's form: <|endoftext|> ends, nothing is put in front."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL_TOKENS[2:]),
    )
