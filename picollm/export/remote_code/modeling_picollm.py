"""A picollm model for transformers: torch and transformers only; read with `trust_remote_code=True`.

A pre-norm decoder with weightless RMSNorm, rotary positions, QK norm after the rotation and relu(x)^2, and, where the
configuration says so, windows, value embeddings, the embedding in every layer, smear, backout and soft-capped logits.

Works with transformers' caches, with left-padded batches, beams and cropping. Every layer keeps all keys: a window is
a matter of the mask. Smear needs the token before the new ones, so one more layer of the cache holds the token ids.

Letters: B batch, T new tokens, S keys, C hidden size, H query heads, K key/value heads, D head size.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_picollm import PicollmConfig


def rms_norm(x, eps):
    """x / sqrt(mean(x^2) + eps), without a weight; the mean in float32."""
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return x * scale.to(x.dtype)


def rotary_table(position_ids, head_dim, theta, dtype):
    """Cosines and sines (B, 1, T, D/2). Made when they are needed: a buffer would not survive every way of loading."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angle = position_ids[:, None, :, None].float() * theta**-exponent
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, rotary):
    """Rotate pairs (i, i + D/2) by +angle."""
    cos, sin = rotary
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class PicollmAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx
        self.eps = config.rms_norm_eps
        self.window = config.windows[layer_idx]
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = config.qk_scale**2 * config.head_dim**-0.5
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.value_embed = self.value_gate = None
        if layer_idx in config.value_embedding_layers:
            self.value_embed = nn.Embedding(config.vocab_size, keys)
            self.value_gate = nn.Linear(config.value_gate_channels, self.num_kv_heads, bias=False)

    def forward(self, x, input_ids, rotary, mask, past_key_values):
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H or K, T, D)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rms_norm(rotate(q, rotary), self.eps), rms_norm(rotate(k, rotary), self.eps)
        if self.value_embed is not None:
            gate = 3 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, K)
            embedding = self.value_embed(input_ids).unflatten(-1, (-1, self.head_dim))  # (B, T, K, D)
            v = v + (gate.unsqueeze(-1) * embedding).transpose(1, 2)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for y in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask(k.size(2), self.window), scale=self.scale)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class PicollmMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())


class PicollmDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.resid_scale = nn.Parameter(torch.ones(1))
        self.x0_scale = nn.Parameter(torch.zeros(1)) if config.x0_scalars else None
        self.self_attn = PicollmAttention(config, layer_idx)
        self.mlp = PicollmMLP(config)

    def forward(self, x, x0, input_ids, rotary, mask, past_key_values=None):
        x = self.resid_scale * x if self.x0_scale is None else self.resid_scale * x + self.x0_scale * x0
        x = x + self.self_attn(rms_norm(x, self.eps), input_ids, rotary, mask, past_key_values)
        return x + self.mlp(rms_norm(x, self.eps))


class PicollmPreTrainedModel(PreTrainedModel):
    config_class = PicollmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PicollmDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    def _init_weights(self, module):
        """Start values of what is no usual layer; transformers makes those calls do nothing for loaded weights."""
        super()._init_weights(module)
        if isinstance(module, PicollmDecoderLayer):
            nn.init.ones_(module.resid_scale)
            if module.x0_scale is not None:
                nn.init.zeros_(module.x0_scale)
        elif isinstance(module, PicollmModel):
            if module.smear_gate is not None:
                nn.init.zeros_(module.smear_gate)
                nn.init.zeros_(module.smear_scale)
            if module.backout_scale is not None:
                nn.init.zeros_(module.backout_scale)


class PicollmModel(PicollmPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        channels = config.smear_channels
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PicollmDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.smear_gate = nn.Parameter(torch.zeros(channels)) if channels else None
        self.smear_scale = nn.Parameter(torch.zeros(1)) if channels else None
        self.backout_scale = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        inputs_embeds=None,
        **kwargs,
    ):
        """The normed stream after the last layer.

        Args:
            attention_mask: (B, tokens in the cache and new ones), 0 where a token pads. Padding stands left.
        """
        if inputs_embeds is not None:
            raise ValueError("a picollm model reads `input_ids`: its layers look up embeddings of their own")
        config = self.config
        if use_cache is None:
            use_cache = config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = input_ids.size(1)
        if position_ids is None:
            if attention_mask is None:
                position_ids = torch.arange(past, past + length, device=input_ids.device)[None]
            else:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -length:]
        mask = _Mask(attention_mask, past, length, input_ids.device)
        x = self.embed_tokens(input_ids)
        if self.smear_gate is not None:
            x = self._smear(x, input_ids, position_ids, past_key_values)
        x0, middle = x, None
        rotary = rotary_table(position_ids, config.head_dim, config.rope_theta, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, x0, input_ids, rotary, mask, past_key_values=past_key_values)
            if i == len(self.layers) // 2:
                middle = x
        if past_key_values is not None and self.smear_gate is not None:
            self._remember(input_ids, past_key_values)
        if self.backout_scale is not None:
            x = x - self.backout_scale * middle
        return BaseModelOutputWithPast(
            last_hidden_state=rms_norm(x, config.rms_norm_eps), past_key_values=past_key_values
        )

    def _smear(self, x, input_ids, position_ids, past_key_values):
        """Each token's embedding takes up some of the one before it, in its own row and not across padding."""
        count = self.config.num_hidden_layers
        first = torch.zeros_like(x[:, :1])
        if past_key_values is not None and past_key_values.get_seq_length() and len(past_key_values.layers) > count:
            first = self.embed_tokens(past_key_values.layers[count].keys[:, 0, -1:, 0].to(input_ids.device))
        before = torch.cat([first, x[:, :-1]], dim=1) * (position_ids > 0).unsqueeze(-1)
        share = torch.sigmoid(x[..., : self.smear_gate.numel()] @ self.smear_gate)
        return x + (self.smear_scale * share).unsqueeze(-1) * before

    def _remember(self, input_ids, past_key_values):
        """Keep the ids in a layer of the cache of their own, which is then reordered and cropped with the others."""
        count = self.config.num_hidden_layers
        if len(past_key_values.layers) == count:
            past_key_values.layers.append(DynamicLayer())
        ids = input_ids[:, None, :, None]
        past_key_values.update(ids, ids, count)


class _Mask:
    """Which keys a query sees, by number of keys and window; made once for all layers of a kind."""

    def __init__(self, attention_mask, past, length, device):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError("a picollm model takes an attention mask of (batch, tokens)")
        self.attention_mask = None if attention_mask is None else attention_mask.bool()
        self.queries = torch.arange(past, past + length, device=device)[:, None]
        self.made = {}

    def __call__(self, num_keys, window):
        """(B or 1, 1, T, S), True where the key is seen.

        A query sees itself in padding too: where nothing is seen some kernels give NaN, and NaN times zero is NaN.
        """
        if (num_keys, window) not in self.made:
            behind = self.queries - torch.arange(num_keys, device=self.queries.device)  # (T, S)
            seen = (behind >= 0) if window is None else (behind >= 0) & (behind <= window)
            seen = seen[None]
            if self.attention_mask is not None:
                present = F.pad(self.attention_mask, (0, max(0, num_keys - self.attention_mask.size(1))))
                seen = seen & present[:, None, :num_keys] | (behind == 0)
            self.made[num_keys, window] = seen[:, None]
        return self.made[num_keys, window]


class PicollmForCausalLM(PicollmPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = PicollmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """float32 logits of all new tokens or of those that `logits_to_keep` names."""
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept]).float()
        cap = self.config.final_logit_softcapping
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def create_masks_for_generate(self, attention_mask=None, **kwargs):
        """`generate` may not turn the mask into one of its own: `PicollmModel.forward` makes those."""
        return attention_mask
