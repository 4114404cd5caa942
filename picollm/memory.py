"""Peak memory of a training process, computed from what a step keeps: no table, no fit per depth.

Letters: N tokens in a pass, C hidden size, I width inside the MLP, H query heads, K key/value heads, D head size,
T tokens in a row, V vocabulary (padded), W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from picollm.attention_choice import AttentionChoice
from picollm.config.model import Architecture
from picollm.scaling import Params, num_params

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# A worker without its model: interpreter, torch, tokenizer, data, a checkpoint being written (240 of the 450 are there
# before it starts: bench/memory.py); on a GPU the CUDA context and libraries.
BASE_BYTES = {"cpu": 450 * 2**20, "cuda": 700 * 2**20}
# What allocators hold beyond live tensors: freed blocks that nothing fits into. Workers on CPUs keep all of them.
ALLOCATOR_FACTOR = {"cpu": 1.25, "cuda": 1.05}
# Share of a machine's own memory that its GPUs' ranks may take for copies of what they save: it cannot be swapped out.
COPIES_SHARE = 0.5
# As in `model/loss.py`, `model/attention.py` and `optim/buckets.py`; a test compares.
LOGITS_PER_CHUNK = 1 << 22
GPU_MEMORY_SHARE = 32
MATMUL_BLOCK = 128
STACK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class Memory:
    """Peak of one training process, in bytes, by what holds it; the comments say when."""

    base: int
    weights: int  # always, fp8 copies included
    optimizer: int  # always, this rank's share
    gradients: int  # from the first backward of a step to its update
    activations: int  # from a forward pass to its backward
    compute_copy: int  # likewise: weights in the compute type
    loss: int  # between the two
    block: int  # work space while a block's gradients are made, or its activations once more
    update: int  # work space of the optimizer, and messages to other ranks
    accumulates: bool
    """A step has several passes, so gradients are there while activations are."""

    @property
    def total(self) -> int:
        always = self.base + self.weights + self.optimizer
        earlier = self.gradients if self.accumulates else 0
        turning_point = earlier + self.activations + self.compute_copy + max(self.loss, self.block)
        return always + max(turning_point, self.gradients + self.update)


def optimizer_bytes(params: Params, ranks: int = 1, largest_matrix: int = 1) -> int:
    """State that a rank keeps between steps: float32 momentum of its matrices (Muon), two moments of the rest (AdamW).

    Args:
        largest_matrix: elements; a rank owns whole matrices, so its share is rounded up to slots of this size.
    """
    matrices = params.matrices + params.gates
    if ranks > 1:
        matrices = -(-matrices // (largest_matrix * ranks)) * largest_matrix
    tables = params.embedding + params.head + params.value_embeddings
    return 4 * matrices + 8 * (-(-tables // ranks) + params.scalars)


def _largest_matrix(arch: Architecture) -> int:
    return arch.hidden_size * max(arch.intermediate_size, arch.num_attention_heads * arch.head_dim)


def copies_bytes(arch: Architecture, dtype: str, *, ranks: int = 1, ranks_per_node: int = 1) -> int:
    """Memory of the host that GPUs' ranks take to save beside training: copies of the weights and of their states.

    Of the machine with rank 0, which alone copies weights. Up to half a GiB a rank comes on top: what torch pins is
    rounded up to a power of two.

    Args:
        ranks_per_node: those on one machine.
    """
    params, master = num_params(arch), max(4, ITEMSIZE[dtype])
    state = optimizer_bytes(params, ranks, _largest_matrix(arch))
    return master * params.total + ranks_per_node * state * master // 4


def copies_fit(needed: int, memory_bytes: int) -> bool:
    """Whether a machine with so much memory has room for `copies_bytes`; without it training waits for saves."""
    return needed <= COPIES_SHARE * memory_bytes


def training_memory(
    arch: Architecture,
    dtype: str,
    rows: int,
    device: str,
    attention: AttentionChoice,
    *,
    passes: int = 1,
    fp8: bool = False,
    ranks: int = 1,
    checkpointing: bool = False,
    gpu_bytes: int | None = None,
) -> Memory:
    """Estimate the peak of one training process.

    Args:
        dtype: compute type; master weights, gradients and optimizer state are float32, float64 in float64 runs.
        rows: in one forward pass.
        device: `cpu` (eager) or `cuda` (compiled).
        attention: kernels; only `matmul` keeps its probabilities.
        passes: forward passes of a step on one rank.
        ranks: processes that share the optimizer's state.
        checkpointing: blocks keep their input alone.
        gpu_bytes: memory of the GPU, by which the loss chooses its chunks.
    """
    params, size = num_params(arch), ITEMSIZE[dtype]
    master, tokens = max(4, size), rows * arch.max_position_embeddings
    slack = ALLOCATOR_FACTOR[device]
    kept = [size * _kept(arch, layer, device, attention) for layer in range(arch.num_hidden_layers)]
    if fp8:  # inputs of the four products once more, in 8 bits
        width = 2 * arch.hidden_size + arch.num_attention_heads * arch.head_dim + arch.intermediate_size
        kept = [per_token + width for per_token in kept]
    again = 0
    if checkpointing:
        again = max(kept)
        kv = arch.num_key_value_heads * arch.head_dim
        kept = [size * (arch.hidden_size + kv * (i in arch.value_embedding_layers)) for i in range(len(kept))]
    # The embedding in float32 and normed, what the head reads and its gradient, x0 and the middle of the stream.
    ends = size * arch.hidden_size * (3 + arch.x0_scalars + arch.backout + 2 * arch.smear)
    largest = _largest_matrix(arch)
    copies = 0 if fp8 or size == master else size * params.matrices
    if checkpointing:  # casts are made again with the block
        copies //= arch.num_hidden_layers
    return Memory(
        base=BASE_BYTES[device],
        weights=master * params.total + (2 * params.matrices if fp8 else 0),
        optimizer=optimizer_bytes(params, ranks, largest) * master // 4,
        gradients=master * params.total,
        activations=int(slack * tokens * (sum(kept) + ends)),
        compute_copy=copies,
        loss=int(slack * _loss_bytes(arch, params, tokens, size, master, gpu_bytes)),
        # The gradient of relu^2 with the root it is made from; the head's gradient is there by then.
        block=int(slack * tokens * (again + 2 * size * arch.intermediate_size)) + master * params.head,
        update=master * _update_elements(arch, params, device, ranks, largest),
        accumulates=passes > 1,
    )


def _kept(arch: Architecture, layer: int, device: str, attention: AttentionChoice) -> int:
    """Elements of the compute type that a block keeps per token from forward to backward."""
    c, inner = arch.hidden_size, arch.intermediate_size
    q, kv = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    if device == "cuda":
        # Compiled: input, the norms' outputs and the stream between; queries and keys before and after their norm,
        # values, output; relu^2. 30·C bytes in bf16 for plain shapes, where GPU.md 1.2 counted 31.
        return 5 * c + 3 * (q + kv) + inner + 2 * kv * (layer in arch.value_embedding_layers)
    # Eager: input and both norms' outputs; relu^2; normed queries and keys; attention's output.
    elements = 3 * c + inner + (q + kv) + q
    windowed = arch.windows[layer] is not None
    matmul = (attention.window if windowed else attention.full) == "matmul"
    if layer in arch.value_embedding_layers:
        elements += kv + (0 if matmul else kv)  # the embedding, and values with it
    elif not matmul:
        elements += q + 2 * kv  # values are a part of the packed product, which stays for them
    return elements + (_matmul_elements(arch, arch.windows[layer]) if matmul else 0)


def _matmul_elements(arch: Architecture, window: int | None) -> int:
    """Per token, of attention with its scores in memory: probabilities, and copies of q, k and v block by block."""
    row = arch.max_position_embeddings
    blocks = [(start, min(start + MATMUL_BLOCK, row)) for start in range(0, row, MATMUL_BLOCK)]
    keys = [end - (0 if window is None else max(0, start - window)) for start, end in blocks]
    probabilities = sum((end - start) * seen for (start, end), seen in zip(blocks, keys, strict=True))
    per_head = probabilities + arch.head_dim * (row + 2 * sum(keys))
    return arch.num_attention_heads * per_head // row


def _loss_bytes(arch: Architecture, params: Params, tokens: int, size: int, master: int, gpu_bytes: int | None) -> int:
    """Logits of a chunk with what is made of them, the head in compute type, its gradient and that of its input."""
    vocab = arch.padded_vocab_size
    if gpu_bytes is None:
        most = max(16, LOGITS_PER_CHUNK // vocab)
        # Logits, probabilities and what they are made of in float32, the gradient of the chunk before; a soft cap
        # makes two more such tensors.
        per_logit = size * (2 if tokens > most else 1) + master * (2 if arch.final_logit_softcapping is None else 4)
    else:
        most = max(16, gpu_bytes // GPU_MEMORY_SHARE // (vocab * size))
        per_logit = 2 * size
    chunk = min(tokens, most) * vocab
    head = params.head * (master + (size if size < master else 0))
    return chunk * per_logit + head + tokens * arch.hidden_size * size


def _update_elements(arch: Architecture, params: Params, device: str, ranks: int, largest: int) -> int:
    """Elements of the optimizer's work space: copies of the largest group of matrices, or of the largest table.

    Five of the one or two of the other, where code is eager; compiled code fuses some. One rank updates many matrices
    of a shape at once, one of several a slot at a time, beside two buckets of messages.
    """
    matrix, table = (5, 2) if device == "cpu" else (4, 2)
    if ranks == 1:
        together = min(arch.num_hidden_layers, max(1, STACK_ELEMENTS // largest))
        return max(matrix * together * largest, table * params.embedding)
    bucket = max(ranks * largest, params.embedding)
    return max(matrix * largest, table * params.embedding // ranks) + 2 * bucket
