"""Configuration of a picollm model for transformers; read with `trust_remote_code=True`."""

from transformers import PretrainedConfig


class PicollmConfig(PretrainedConfig):
    """Shape and features of a model; names are transformers' own where it has them.

    Args:
        windows: per layer the keys that a query sees behind itself, None for all of them.
        qk_scale: queries and keys are multiplied by this after their norm.
        final_logit_softcapping: logits z become c * tanh(z / c); None leaves them.
        value_embedding_layers: layers that add an embedding of the token to their values.
        value_gate_channels: channels of a layer's input that the gates of value embeddings read.
        x0_scalars: every layer mixes in the embedding.
        smear_channels: channels of the embedding that the gate of smear reads; 0 for models without smear.
        backout: a share of the stream of the middle layer is taken out before the head.
    """

    model_type = "picollm"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        vocab_size=32768,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=None,
        head_dim=None,
        max_position_embeddings=2048,
        rope_theta=100000.0,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        windows=None,
        qk_scale=1.2,
        final_logit_softcapping=None,
        value_embedding_layers=None,
        value_gate_channels=12,
        x0_scalars=False,
        smear_channels=0,
        backout=False,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = rope_theta
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.windows = list(windows or [None] * num_hidden_layers)
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.value_embedding_layers = list(value_embedding_layers or [])
        self.value_gate_channels = value_gate_channels
        self.x0_scalars = x0_scalars
        self.smear_channels = smear_channels
        self.backout = backout
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
