"""Published designs: their encoders and LLMs as configs, and what a model made of them costs.

Nothing is allocated and nothing downloaded: models are built on the meta device, so that any size
can be counted. Sources: the Hub's config.json files of the models named. Taught in notebook 02.
"""

import itertools

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from tlv.model import TlvConfig, TlvForConditionalGeneration, new_connector
from tlv.vision import count_patches, count_unseen

ENCODERS = {
    "openai/clip-vit-large-patch14-336": dict(
        model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096,
        num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14,
    ),
    "google/siglip-so400m-patch14-384": dict(
        model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304,
        num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14,
    ),
    "facebook/dinov2-large": dict(
        model_type="dinov2", hidden_size=1024, num_hidden_layers=24, num_attention_heads=16,
        image_size=518, patch_size=14, picture_size=224,
    ),
}  # fmt: skip
ENCODERS["CLIP + DINOv2"] = dict(
    model_type="tlv_mixture",
    first_config=ENCODERS["openai/clip-vit-large-patch14-336"],
    second_config=ENCODERS["facebook/dinov2-large"],
)
LLMS = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": dict(
        model_type="llama", vocab_size=32_000, hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        max_position_embeddings=2048,
    ),
    "stabilityai/stablelm-2-zephyr-1_6b": dict(
        model_type="stablelm", vocab_size=100_352, hidden_size=2048, intermediate_size=5632,
        num_hidden_layers=24, num_attention_heads=32, num_key_value_heads=32, use_qkv_bias=True,
        partial_rotary_factor=0.25, max_position_embeddings=4096,
    ),
    "microsoft/phi-2": dict(
        model_type="phi", vocab_size=51_200, hidden_size=2560, intermediate_size=10_240,
        num_hidden_layers=32, num_attention_heads=32, partial_rotary_factor=0.4,
        max_position_embeddings=2048,
    ),
    "google/gemma-2b-it": dict(
        model_type="gemma", vocab_size=256_000, hidden_size=2048, intermediate_size=16_384,
        num_hidden_layers=18, num_attention_heads=8, num_key_value_heads=1, head_dim=256,
        max_position_embeddings=8192,
    ),
    "apple/OpenELM-450M-Instruct": dict(
        model_type="openelm", num_transformer_layers=20, model_dim=1536, head_dim=64,
    ),
    "Qwen/Qwen2-0.5B": dict(
        model_type="qwen2", vocab_size=151_936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, rope_theta=1e6,
        max_position_embeddings=131_072, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-3B": dict(
        model_type="qwen2", vocab_size=151_936, hidden_size=2048, intermediate_size=11_008,
        num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, rope_theta=1e6,
        max_position_embeddings=32_768, tie_word_embeddings=True, bos_token_id=151_643,
        eos_token_id=151_643,
    ),
}  # fmt: skip
# As published, but for mean_pool and frame_resampler, which were not: they too make 512 tokens of
# 16 frames, as the resamplers of video do.
CONNECTOR_SIZES = {
    "identity": {},
    "linear": {},
    "mlp2x_gelu": {},
    "mof_mlp": {},
    "mean_pool": dict(num_groups=8),
    "resampler": dict(num_queries=128, num_groups=1),
    "bench_resampler": dict(num_queries=128, num_groups=1, resampler_heads=12),
    "qformer": dict(num_queries=128, num_groups=1, resampler_heads=12, num_resampler_layers=12),
    "naive_resampler": {},
    "group_resampler": {},
    "frame_resampler": {},
    "vilamp": dict(sampling="fps", query_width=512, keyframe_grid=14),
}
HAS_CLASS_TOKEN = ("clip_vision_model", "dinov2", "tlv_mixture")


def make_design(encoder: str, llm: str, **fields) -> TlvConfig:
    """The config of a model of a published encoder and LLM; `fields` are those of TlvConfig.

    A class token is left out, as every published model does. ValueError for an unknown name.
    """
    for part, name, known in (("encoder", encoder, ENCODERS), ("llm", llm, LLMS)):
        if name not in known:
            raise ValueError(f"{part} {name!r} is unknown; known are {', '.join(known)}")
    vision = ENCODERS[encoder]
    fields = {"drop_first_patch": vision["model_type"] in HAS_CLASS_TOKEN} | fields
    return TlvConfig(vision_config=dict(vision), text_config=dict(LLMS[llm]), **fields)


def paper_config() -> TlvConfig:
    """TinyLLaVA-Video's best: SigLIP-so400m-384, group resampler of 512 tokens, Qwen2.5-3B."""
    return make_design(
        "google/siglip-so400m-patch14-384", "Qwen/Qwen2.5-3B",
        drop_first_patch=True, video_token_id=151_665,
    )  # fmt: skip


def count_parameters(config: TlvConfig) -> dict[str, int]:
    """Parameters per part, their total, and `unseen`: those of the encoder that the output never
    depends on."""
    with torch.device("meta"):
        model = TlvForConditionalGeneration(config)
    parts = {"vision": model.vision_encoder, "connector": model.connector,
             "llm": model.language_model}  # fmt: skip
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    unseen = count_unseen(config.vision_config, config.vision_feature_layer)
    return {**counts, "total": sum(counts.values()), "unseen": unseen}


def count_tokens(config: TlvConfig, num_frames: int) -> int:
    """Video tokens of a clip of `num_frames` frames; a picture is one frame."""
    with torch.device("meta"):
        connector = new_connector(config)
    num_patches = count_patches(config.vision_config, config.drop_first_patch)
    return connector.num_tokens(num_frames * num_patches)


def tabulate_designs() -> dict[tuple[str, str], dict]:
    """The design space: every published encoder with every connector and every LLM.

    {(encoder, connector): {"picture": video tokens, "clip": those of 16 frames, llm: parameters}}.
    None where the connector does not fit the LLM; a connector that fits none has no row.
    """
    with torch.device("meta"):
        llms = {name: _count(AutoModelForCausalLM, fields) for name, fields in LLMS.items()}
        encoders = {name: _count(AutoModel, fields) for name, fields in ENCODERS.items()}
    table = {}
    for encoder, (name, sizes) in itertools.product(ENCODERS, CONNECTOR_SIZES.items()):
        designs = {llm: make_design(encoder, llm, connector_type=name, **sizes) for llm in LLMS}
        costs = {llm: _connector_cost(design) for llm, design in designs.items()}
        fitting = [cost for cost in costs.values() if cost]
        if fitting:
            table[encoder, name] = {"picture": fitting[0][0], "clip": fitting[0][1]} | {
                llm: cost and encoders[encoder] + cost[2] + llms[llm]
                for llm, cost in costs.items()
            }
    return table


def _connector_cost(config: TlvConfig) -> tuple[int, int, int] | None:
    """(tokens of a picture, of 16 frames, parameters) of its connector; None where none fits."""
    try:
        with torch.device("meta"):
            connector = new_connector(config)
    except ValueError:  # says which size does not fit
        return None
    num_patches = count_patches(config.vision_config, config.drop_first_patch)
    tokens = (connector.num_tokens(num_frames * num_patches) for num_frames in (1, 16))
    return *tokens, sum(p.numel() for p in connector.parameters())


def _count(auto_class, fields: dict) -> int:
    config = AutoConfig.for_model(**dict(fields))
    return sum(p.numel() for p in auto_class.from_config(config).parameters())
