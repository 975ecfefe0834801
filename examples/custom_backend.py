"""A sparse backend of your own: a rule that says which blocks to keep. Here each query block keeps the blocks nearest to it.

The base brings the dense steps, the order of the tokens, the protection of text and first frame, and the kernels of every device. To use
the backend by name in `ditattn.install` and on the command line, declare it as an entry point of your package: docs/adding_a_backend.md.
"""

import torch

from ditattn import BlockPlan, SparseAttentionBackend, SparseAttentionImpl, dense_attention
from ditattn.plan.block_plan import num_kept


class NearestAttentionImpl(SparseAttentionImpl):
    """`protected` (bool `[N]`) marks blocks that are kept as rows and as columns."""

    def plan(self, query, key, attn_metadata, order, protected):
        place = torch.arange(len(protected), device=query.device)
        distance = (place.unsqueeze(1) - place).abs()
        nearest = distance.argsort(dim=-1, stable=True)[:, : num_kept(len(place), attn_metadata.sparsity)]
        mask = torch.zeros_like(distance, dtype=torch.bool).scatter_(-1, nearest, True)
        mask = mask | protected | protected.unsqueeze(1)
        return BlockPlan.from_mask(mask[None, None], query.shape[1], key.shape[1])


class NearestAttentionBackend(SparseAttentionBackend):
    """What the entry point names."""

    name = "nearest_attn"
    impl_cls = NearestAttentionImpl


# one layer by hand: a video of 4 x 16 x 16 tokens in the second of ten steps, of which the first is dense
query, key, value = torch.randn(3, 1, 4 * 16 * 16, 2, 64)
step = NearestAttentionBackend.get_builder_cls()().build(
    current_timestep=1, num_steps=10, raw_latent_shape=(1, 16, 4, 32, 32), patch_size=(1, 2, 2), sparsity=0.5, skip_first_steps=1
)
calls = []
layer = NearestAttentionImpl(num_heads=2, head_size=64, observer=calls.append)
out = layer.forward(query, key, value, step)

difference = (out - dense_attention(query, key, value)).abs().mean()
print(f"computed {calls[0].plan.density():.2f} of the pairs, mean difference from dense attention {difference:.4f}")
