"""What a model is, as its config.json states it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRouting:
    """How DeepSeek's models and their kin choose experts. Their shared expert has no gate."""

    has_bias: bool
    """True: scores are sigmoids, and a bias of each expert, which is not trained, is added to them
    where experts are chosen and nowhere else (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    False: they are a softmax over the experts (DeepSeek-V2, arXiv 2405.04434, section 2.1.2)."""
    n_groups: int
    """Of as many experts each. A token goes to experts of its best groups only."""
    chosen_groups: int
    scale: float
    """Multiplies the weights of the chosen experts, after they are scaled to sum to 1 if they
    are."""

    @property
    def best_of_group(self) -> int:
        """Scores of a group whose sum is compared with those of other groups."""
        return 2 if self.has_bias else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEShape:
    """The experts of a mixture-of-experts model."""

    num_experts: int
    experts_per_token: int
    ffn_size: int
    """Intermediate size of one expert."""
    shared_ffn_size: int
    """Of the shared expert that every token visits; 0: there is none. It has a gate of its own,
    but with GroupRouting."""
    renormalised: bool
    """The weights of the chosen experts are scaled to sum to 1."""
    dense_layers: tuple[int, ...] = ()
    """Those that have an MLP instead, ascending."""
    routing: GroupRouting | None = None
    """None: scores are a softmax over the experts, and all of them are one group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentShape:
    """Attention over compressed keys and values (MLA, DeepSeek-V2, arXiv 2405.04434)."""

    q_rank: int
    """Elements that queries are compressed to; 0: they are not."""
    kv_rank: int
    """Elements that keys and values are compressed to."""
    rope_dim: int
    """Of a head's query and key the last elements, which are rotated; of the key they are the same
    in every head."""
    value_dim: int
    """Elements of a head's value."""
    score_scale: float
    """Multiplies head_dim ** -0.5, by which scores are scaled (YaRN)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaShape:
    """The gated delta net that some layers have instead of attention (arXiv 2412.06464)."""

    layers: tuple[int, ...]
    """Those that have it, ascending."""
    key_heads: int
    """Of queries and of keys; each serves value_heads / key_heads heads of values."""
    value_heads: int
    key_dim: int
    """Elements of one head of queries or keys."""
    value_dim: int
    kernel: int
    """Tokens that the convolution sees, the present one included."""
    fused: bool
    """The checkpoint has its input projections in two tensors, by key head; else in four."""

    @property
    def key_width(self) -> int:
        """Elements of all queries, or of all keys."""
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        """Elements of all values, or of all output gates."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every rotary angle is divided by the factor."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """The angles of Llama 3.1 and later."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int
    """Tokens, before the model was made longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071)."""

    factor: float
    original_length: int
    """Tokens, before the model was made longer."""
    beta_fast: float
    beta_slow: float
    truncate: bool
    """The ends of the ramp are whole numbers."""
    attention_factor: float
    """Multiplies cosine and sine."""


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The architecture of a Hugging Face model, as its config.json states it."""

    architecture: str
    """The first entry of "architectures", for example "Qwen2ForCausalLM"."""
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding as the checkpoint stores it, without padding for parallelism."""
    tied: bool
    """The output projection is the embedding; the checkpoint has no lm_head.weight."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    """Of both projections of the MLP; output_bias: of the attention's last one."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k (Qwen3)."""
    output_gate: bool = False
    """The query projection has twice the rows: of each head the query and a gate of its output."""
    centred_norms: bool = False
    """Norms multiply with 1 + weight, but for that inside of a gated delta net."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    post_norms: bool = False
    """RMSNorm of what attention and MLP give, before it is added (GLM-4)."""
    fused_gate_up: bool = False
    """The checkpoint has gate and up projection of the MLP in one tensor."""
    rope_theta: float
    rotary_dim: int | None = None
    """Elements of each head that are rotated, the first; None: all."""
    rotary_neighbours: bool = False
    """An element is rotated with its neighbour; else with the one half of them further on."""
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float
    max_position_embeddings: int
    moe: MoEShape | None = None
    delta: DeltaShape | None = None
    latent: LatentShape | None = None
    """None: each head, or group of heads, has keys and values of its own."""
    extra_layers: int = 0
    """That a checkpoint may have after the last one, to predict further tokens; passed over."""

    @property
    def num_experts(self) -> int:
        """0 for a dense model."""
        return self.moe.num_experts if self.moe else 0

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Those with an MLP, ascending; the others have experts."""
        return self.moe.dense_layers if self.moe else tuple(range(self.num_layers))

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Those with a gated delta net, ascending; the others have attention."""
        return self.delta.layers if self.delta else ()

    @property
    def layers_alike(self) -> bool:
        """Every layer has the same parameters."""
        return not self.delta_layers and len(self.dense_layers) in (0, self.num_layers)
