"""OpenELM, a language model whose layers differ in width: narrow below, wide above.

TinyLLaVA Factory uses it, transformers has no class for it, and the Hub's folders bring code of
their own, which is not run here. This is the same model, written anew, and known to the Auto
classes as `openelm`. Published weights load by their names. Source: arXiv 2404.14619, section 2.
Taught in notebook 02.
"""

import numpy as np
import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple


@strict
class OpenELMConfig(PreTrainedConfig):
    """The published config.json. `num_query_heads`, `num_kv_heads` and `ffn_dims` follow from the
    multipliers of the first and the last layer, in even steps between them."""

    model_type = "openelm"
    attribute_map = {"hidden_size": "model_dim", "num_hidden_layers": "num_transformer_layers",
                     "max_position_embeddings": "max_context_length"}  # fmt: skip
    vocab_size: int = 32_000
    max_context_length: int = 2048
    num_transformer_layers: int = 20
    model_dim: int = 1536
    head_dim: int = 64
    qkv_multipliers: float | int | list | tuple = (0.5, 1.0)
    num_gqa_groups: int = 4  # query heads that share a key and a value
    ffn_multipliers: float | int | list | tuple = (0.5, 4.0)  # in published files one per layer
    ffn_dim_divisor: int = 256
    ffn_with_glu: bool = True
    activation_fn_name: str = "swish"
    normalization_layer_name: str = "rms_norm"
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float | int = 10_000
    rope_max_length: int = 4096
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list | None = 2

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.ffn_with_glu or self.normalization_layer_name != "rms_norm":
            raise ValueError(f"ffn_with_glu = {self.ffn_with_glu}, normalization_layer_name = "
                             f"{self.normalization_layer_name!r}: OpenELM has true and 'rms_norm'")
        self.tie_word_embeddings = self.share_input_output_layers
        shares = _per_layer(self.qkv_multipliers, self.num_transformer_layers, "qkv_multipliers")
        step = self.head_dim * self.num_gqa_groups
        widths = [make_divisible(self.model_dim * share, step) for share in shares]
        self.num_query_heads = [width // self.head_dim for width in widths]
        self.num_kv_heads = [heads // self.num_gqa_groups for heads in self.num_query_heads]
        shares = _per_layer(self.ffn_multipliers, self.num_transformer_layers, "ffn_multipliers")
        self.ffn_dims = [make_divisible(self.model_dim * s, self.ffn_dim_divisor) for s in shares]


def make_divisible(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, and never more than a tenth below it."""
    nearest = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * value else nearest


def _per_layer(multipliers, num_layers: int, name: str) -> list[float]:
    """One multiplier per layer, of one for all, of the first and the last, or of all."""
    if isinstance(multipliers, (int, float)):
        return [float(multipliers)] * num_layers
    if len(multipliers) == num_layers:
        return list(multipliers)
    if len(multipliers) != 2:
        raise ValueError(f"{name} has {len(multipliers)} values for {num_layers} layers; give one, "
                         "those of the first and the last layer, or one per layer")
    first, last = multipliers
    steps = np.linspace(first, last, num_layers)
    return [round(step, 2) for step in steps.tolist()]  # published widths are of rounded steps


class OpenELMAttention(nn.Module):
    """Causal attention; queries, keys and values from one product, queries and keys normalised."""

    def __init__(self, config: OpenELMConfig, number: int):
        super().__init__()
        self.config, self.layer_idx = config, number
        num_queries, num_keys = config.num_query_heads[number], config.num_kv_heads[number]
        self.heads = (num_queries, num_keys, num_keys)
        # These three are read by the attention functions of transformers.
        self.num_key_value_groups, self.is_causal = config.num_gqa_groups, True
        self.scaling = config.head_dim**-0.5
        self.qkv_proj = nn.Linear(config.model_dim, sum(self.heads) * config.head_dim, bias=False)
        self.out_proj = nn.Linear(num_queries * config.head_dim, config.model_dim, bias=False)
        is_normed = config.normalize_qk_projections
        self.q_norm = LlamaRMSNorm(config.head_dim) if is_normed else nn.Identity()
        self.k_norm = LlamaRMSNorm(config.head_dim) if is_normed else nn.Identity()

    def forward(self, x, rotation, attention_mask=None, past_key_values=None, **kwargs):
        """x (B, L, D) -> (B, L, D). `rotation`: cosines and sines of the positions (B, L, d)."""
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.config.head_dim)  # (B, L, h, d)
        q, k, v = qkv.transpose(1, 2).split(self.heads, dim=1)  # (B, h_q, L, d), (B, h_k, L, d)
        q, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *rotation)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        y, _ = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.out_proj(y.reshape(batch, length, -1))  # (B, L, D)


class OpenELMFeedForward(nn.Module):
    """A gated unit: W_2 (act(g) * u), where W_1 x = (g, u)."""

    def __init__(self, config: OpenELMConfig, number: int):
        super().__init__()
        width = config.ffn_dims[number]
        self.proj_1 = nn.Linear(config.model_dim, 2 * width, bias=False)
        self.proj_2 = nn.Linear(width, config.model_dim, bias=False)
        self.act = ACT2FN[config.activation_fn_name]

    def forward(self, x):
        gate, up = self.proj_1(x).chunk(2, dim=-1)  # each (B, L, ffn_dim)
        return self.proj_2(self.act(gate) * up)  # (B, L, D)


class OpenELMLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each behind its norm and beside the residual."""

    def __init__(self, config: OpenELMConfig, number: int):
        super().__init__()
        self.attn = OpenELMAttention(config, number)
        self.ffn = OpenELMFeedForward(config, number)
        self.attn_norm = LlamaRMSNorm(config.model_dim)
        self.ffn_norm = LlamaRMSNorm(config.model_dim)

    def forward(self, x, rotation, **kwargs):
        x = x + self.attn(self.attn_norm(x), rotation, **kwargs)
        return x + self.ffn(self.ffn_norm(x))


class OpenELMPreTrainedModel(PreTrainedModel):
    """What transformers has to know about the class."""

    config: OpenELMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OpenELMLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class OpenELMModel(OpenELMPreTrainedModel):
    """Embeddings, layers and the last norm."""

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.token_embeddings = nn.Embedding(config.vocab_size, config.model_dim)
        self.layers = nn.ModuleList(OpenELMLayer(config, n)
                                    for n in range(config.num_transformer_layers))
        self.norm = LlamaRMSNorm(config.model_dim)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.token_embeddings

    def set_input_embeddings(self, value):
        self.token_embeddings = value

    def rotate(self, position_ids, dtype):
        """Cosines and sines, (B, L, d), that turn pairs of a head's numbers by the position."""
        d, base = self.config.head_dim, self.config.rope_freq_constant
        pairs = torch.arange(0, d, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].float() * base ** (-pairs / d)  # (B, L, d / 2)
        angles = torch.cat([angles, angles], dim=-1)  # (B, L, d)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, **kwargs):
        """Token ids (B, L) or embeddings (B, L, D) -> hidden states (B, L, D) and the cache."""
        x = self.token_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + start  # (1, L)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=x, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        rotation = self.rotate(position_ids, x.dtype)
        for layer in self.layers:
            x = layer(x, rotation, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(self.norm(x), past_key_values if use_cache else None)


class OpenELMForCausalLM(OpenELMPreTrainedModel, GenerationMixin):
    """The model with its head, which published ones share with the embeddings."""

    _tied_weights_keys = {"lm_head.weight": "transformer.token_embeddings.weight"}

    def __init__(self, config: OpenELMConfig):
        super().__init__(config)
        self.transformer = OpenELMModel(config)
        self.lm_head = nn.Linear(config.model_dim, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs):
        """Loss if labels, logits (B, L, V), cache."""
        output = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])  # (B, L, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels,
                                      vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss, logits, output.past_key_values)


AutoConfig.register("openelm", OpenELMConfig)
AutoModelForCausalLM.register(OpenELMConfig, OpenELMForCausalLM)
