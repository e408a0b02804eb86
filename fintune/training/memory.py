"""Estimate the peak memory of a training run."""

from fintune.hardware import GIB
from fintune.model.batch import CHUNK
from fintune.model.sizes import ModelSize

# per weight: 4 bits, and a doubly quantized scale for every 64 (Dettmers et al. 2023)
NF4_BYTES = 0.516
ACTIVATION_BYTES = 44  # of plain kernels: per token, layer and hidden unit in 16 bits; measured


def estimate_memory_gib(
    model: ModelSize,
    quantization: str,
    bytes_per_value: int,
    kernels: str,
    checkpointing: str,
    cache_weights: bool,
    tokens: int,
    base_gib: float = 0.0,
    shards: int = 1,
) -> dict[str, float]:
    """Estimate the peak memory of a training run in GiB, by part.

    Args:
        bytes_per_value: of an activation and of an unquantized weight.
        cache_weights: a dequantized copy of the 4-bit base is cached.
        tokens: of a micro-batch, padding included.
        base_gib: of the base's weights as loaded, if that is more than follows from the sizes: the experts
            of a mixture, which stay in 16 bits, or other layers that a Llama does not have.
        shards: processes among which the linear layers' weights are shared out; two layers are whole at once.
    """
    s, size = model, bytes_per_value
    per_weight = NF4_BYTES if quantization == "nf4" else size
    table = s.vocabulary * s.hidden * size
    tables = table if s.tied else 2 * table
    norms = (2 * s.layers + 1) * s.hidden * size
    qkv = s.q_dim + 2 * s.kv_dim
    copies = s.layers * s.rank * (7 * s.hidden + 3 * qkv + s.q_dim + 5 * s.intermediate_size)
    logits = CHUNK * s.vocabulary * (2 * size if kernels == "fused" else size + 8)
    if kernels == "fused":
        layer_full = s.hidden * size
        attention = (qkv + s.q_dim + s.hidden) * size + 4 * s.heads
        attention += (qkv * s.normed_heads + 2 * s.hidden * s.normed_outputs) * size
        kept = {
            "none": layer_full + attention + 2 * s.intermediate_size * size,
            "selective": layer_full + attention,
            "full": layer_full,
        }[checkpointing] * s.layers
        # backward pass of the feed-forward block: gradients of gate and up, intermediate values and gradients
        working = (4 * s.intermediate_size + 4 * s.hidden) * size
        if checkpointing == "selective":
            working += 2 * s.intermediate_size * size
        if checkpointing == "full":
            working += attention + 2 * s.intermediate_size * size
        buffer = quantization == "nf4" and not cache_weights
        weights = max(2 * s.intermediate_size, qkv) * s.hidden * size if buffer else 0
        activations = tokens * (kept + working) + weights
        adapter = s.adapter_weights * 16 + copies * size
    else:
        kept = ACTIVATION_BYTES * s.hidden * (s.layers if checkpointing == "none" else 1)
        if checkpointing == "full":
            kept += 2 * s.layers * s.hidden
        # PEFT copies embedding and head to change two rows
        activations = tokens * kept * size // 2 + 3 * table
        adapter = s.adapter_weights * 16
    linear = s.linear_weights * per_weight
    if shards > 1:
        linear = linear / shards + 2 * linear / s.layers
    dequantized = s.linear_weights * size if cache_weights else 0
    return {
        "weights": max((linear + tables + norms) / GIB, base_gib) + dequantized / GIB,
        "adapter and optimizer": adapter / GIB,  # weight, gradient and two moments in float32
        "activations": activations / GIB,
        "logits": logits / GIB,
    }
