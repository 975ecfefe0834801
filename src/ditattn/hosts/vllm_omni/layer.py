"""One attention layer: sparse by a backend of ours, or densely by the host's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ditattn.backends.base import AttentionBackend, AttentionMetadata, CallRecord
from ditattn.backends.config import SparseAttentionConfig
from ditattn.backends.sparse import SparseAttentionImpl, SparseAttentionMetadata
from ditattn.errors import UnsupportedCall
from ditattn.hosts.vllm_omni.run import Run, logger
from ditattn.hosts.vllm_omni.tokens import Tokens
from ditattn.models import TokenLayout
from ditattn.runtime.metadata import build_attn_metadata
from ditattn.runtime.self_attention import NOT_SELF_ATTENTION
from ditattn.runtime.step import Step

__all__ = ["Layer", "layer_number"]


def layer_number(prefix: str) -> int | None:
    """The one number in a layer's path; None if there is none, or several."""
    numbers = [int(part) for part in prefix.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else None


class Layer:
    """One attention layer of the host, served by a sparse backend of ours. It knows no class of vllm-omni's.

    Args:
        run: what all layers of the process share.
        num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix: as of `ditattn.AttentionImpl`.

    Attributes:
        number: in `prefix`; None if unknown.

    Raises:
        UnsupportedHeadSize, UnsupportedCall: what the backend does not take.
    """

    def __init__(
        self,
        backend: type[AttentionBackend],
        config: SparseAttentionConfig,
        run: Run,
        *,
        num_heads: int,
        head_size: int,
        softmax_scale: float | None = None,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
    ) -> None:
        self.backend, self.config, self.number = backend, config, layer_number(prefix)
        self._run, self._run_number = run, run.number
        self._records: list[CallRecord] = []
        make = backend.get_impl_cls()
        impl = make(
            num_heads, head_size, softmax_scale, causal, num_kv_heads, prefix, layer_index=self.number, observer=self._records.append
        )
        assert isinstance(impl, SparseAttentionImpl)
        impl.inside_op = True
        self._impl = impl
        self._builder = backend.get_builder_cls()()
        self._builder.prepare()
        self._known: tuple[object, AttentionMetadata] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, step: Step, dense: Callable[[], Tensor]) -> Tensor:
        """One call: `[B, S, H, D]` in and out; rows of padding are zero where it ran sparse.

        Args:
            dense: computes the same call by the host's own dense attention.

        Raises:
            UnsupportedCall: the last steps are to run densely, and the host does not say how many steps there are.
        """
        if tokens.why_dense == NOT_SELF_ATTENTION:
            # reports are about self-attention
            return dense()
        self._records.clear()
        self._run.enter(step)
        if self._run_number != self._run.number:
            self._run_number = self._run.number
            self._impl.end_run()
        with self._run.log_of(self).stopwatch.measure(query.device):
            out = self._attend(query, key, value, tokens, step, dense)
        for record in self._records:
            self._run.add(self, step, record)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, tokens: Tokens, step: Step, dense: Callable[[], Tensor]) -> Tensor:
        if tokens.why_dense is not None:
            self._records.append(CallRecord(tokens.why_dense))
            return dense()
        if self.config.skip_last_steps and step.index is not None and step.num_steps is None:
            raise UnsupportedCall(
                f"block_sparse.end_step={self.config.skip_last_steps} was asked for, and the pipeline does not say how many steps it runs "
                "(total_denoise_steps): leave end_step at 0"
            )
        metadata = self._metadata(step, tokens.layout)
        length, used = query.shape[1], query.shape[1] if tokens.used is None else tokens.used
        q, k, v = (query, key, value) if used == length else (x[:, :used] for x in (query, key, value))
        with self._impl.dense_by_host(lambda: dense()[:, :used]):
            out = self._impl.forward(q, k, v, metadata)
        if self._records[-1].reason is None:
            self._note_sparse(q, k, v, metadata)
        return out if used == length else torch.cat([out, out.new_zeros(out.shape[0], length - used, *out.shape[2:])], dim=1)

    def _metadata(self, step: Step, layout: TokenLayout | None) -> SparseAttentionMetadata:
        known = (step, layout)
        if self._known is None or self._known[0] != known:
            self._known = (known, build_attn_metadata(self._builder, self.config, step, layout))
        metadata = self._known[1]
        assert isinstance(metadata, SparseAttentionMetadata)
        return metadata

    def _note_sparse(self, query: Tensor, key: Tensor, value: Tensor, metadata: SparseAttentionMetadata) -> None:
        """The first sparse call of a run says who computes it."""
        log = self._run.log_of(self)
        if log.implementations:
            return
        for op, row in self._impl.rows(query, key, value, metadata).items():
            log.note_implementation(op, row.name)
        assert metadata.latent_shape is not None
        logger.info(
            "ditattn: %s is sparse from step %s, layer %s on: %s tokens, %s",
            self.backend.name,
            metadata.current_timestep,
            self.number,
            " x ".join(map(str, metadata.latent_shape)),
            ", ".join(sorted(log.implementations["block_sparse_attention"])),
        )
