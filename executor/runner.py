"""`Runner`: runs step batches through this rank's stage and draws the tokens.

Shape letters: S sequences, T tokens, R rows to sample, D hidden, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from rankwright.cost_model.memory import SAMPLED_ROWS
from rankwright.cost_model.model_spec import ModelSpec
from rankwright.executor.cuda_graphs import LARGEST, DecodeGraphs, capture_sizes
from rankwright.executor.drawn import Drawn
from rankwright.executor.expert_slots import Rebalancer, all_loads
from rankwright.executor.forward_context import ForwardContext, GatheredPrompts
from rankwright.executor.kv_cache import allocate, cache_head_dim
from rankwright.executor.mesh import Mesh
from rankwright.executor.models import tensor_names
from rankwright.executor.models.decoder import DecoderStage
from rankwright.executor.rank_batch import Parts, RankBatch, rank_batch
from rankwright.executor.stage_link import GroupLink, StageLink
from rankwright.executor.stage_memory import open_stage_memory
from rankwright.executor.step_batch import StepBatch
from rankwright.executor.token_returns import TokenReturns
from rankwright.executor.warm_up import warm_up_batches
from rankwright.executor.weights import WeightSource
from rankwright.kernels.rotary import rope_table
from rankwright.kernels.sampling import sample
from rankwright.kernels.token_feed import feed_tokens
from rankwright.planner.plan import Limits, Plan


def _nothing() -> None:
    """What a step waits for whose tokens are all known."""


class Runner:
    """One rank's layers, cache and graphs.

    Args:
        plan: What to run; this rank's part of it is `mesh.place`.
        mesh: This rank's groups.
        source: Where its weights come from.
        dtype: Of weights, activations and cache.
        use_graphs: Capture decode steps as CUDA graphs; ignored on CPUs.
        progress: Called with a short text as loading goes on.
        before_steps: Called when the weights are loaded, before the first kernel is launched.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        source: WeightSource,
        *,
        dtype: torch.dtype,
        use_graphs: bool = True,
        progress: Callable[[str], None] = lambda text: None,
        before_steps: Callable[[], None] = lambda: None,
    ) -> None:
        spec: ModelSpec = plan.model
        self.mesh = mesh
        self._block_tokens = plan.kv_cache.block_tokens
        self._parts = Parts(
            self._block_tokens,
            attention_ranks=mesh.attention_ranks,
            attention_rank=mesh.place.tp_rank if mesh.attention_ranks > 1 else 0,
            cp=plan.split.cp,
            cp_rank=mesh.place.cp_rank,
        )
        # Blocks of a context on each rank: also what prompts are gathered by at once.
        self._max_blocks = -(-plan.limits.max_model_len // (self._block_tokens * plan.split.cp))
        self._hidden_size = spec.hidden_size
        self._dtype = dtype
        first, last = mesh.place.layers
        attention = spec.layers[first].attention
        first_kv, last_kv = mesh.place.kv_heads
        caches = allocate(
            num_layers=last - first,
            num_blocks=plan.kv_cache.num_blocks,
            num_kv_heads=last_kv - first_kv,
            block_tokens=self._block_tokens,
            head_dim=cache_head_dim(attention),
            dtype=dtype,
            device=mesh.device,
            latent=attention.kv_lora_rank,
        )
        scaling = None if spec.rope.scaling is None else dict(spec.rope.scaling)
        self._cos_sin_PD = rope_table(
            attention.rope_head_dim or attention.head_dim,
            plan.limits.max_model_len,
            spec.rope.theta,
            scaling,
            mesh.device,
        )
        mesh.open_peer_memory(
            max_rows=plan.limits.max_batched_tokens, dim=spec.hidden_size, dtype=dtype
        )
        self.stage_memory = open_stage_memory(
            mesh,
            rows=plan.limits.max_batched_tokens,
            dim=spec.hidden_size,
            dtype=dtype,
            max_num_seqs=plan.limits.max_num_seqs,
        )
        self._link: StageLink = self.stage_memory or GroupLink(mesh)
        progress("cache made")
        total = last - first
        self.stage = DecoderStage(
            source,
            mesh,
            tensor_names(spec.architecture),
            spec,
            caches,
            on_layer=lambda index: progress(f"layer {index - first + 1} of {total}"),
        )
        progress("weights loaded")
        before_steps()
        self.rebalancer: Rebalancer | None = None
        if plan.expert_slots is not None and plan.expert_slots.rebalance_steps is not None:
            every = plan.expert_slots.rebalance_steps
            self.rebalancer = Rebalancer(mesh, self.stage.expert_slots(), every=every)
        # What the last step drew, for the next to read. With attention DP the warm-up gives each
        # rank the most that any of them may have: 2 of 4 sequences over 3 ranks, 6 in all.
        rows = -(-plan.limits.max_num_seqs // mesh.attention_ranks) * mesh.attention_ranks
        self._drawn_R = torch.zeros(rows, dtype=torch.int64, device=mesh.device)
        # Rows of sampling that take the best token.
        self._zeros_R = torch.zeros_like(self._drawn_R)
        self._cold_R = torch.zeros_like(self._drawn_R, dtype=torch.float32)
        self._graphs: DecodeGraphs | None = None
        if use_graphs and mesh.device.type != "cpu":
            most = -(-plan.limits.max_num_seqs // mesh.attention_ranks)
            sizes = capture_sizes(min(most, LARGEST))
            self._graphs = DecodeGraphs(
                self.stage,
                sizes=sizes,
                max_blocks=self._max_blocks,
                parts=self._parts,
                hidden_size=spec.hidden_size,
                dtype=dtype,
                device=mesh.device,
                cos_sin_PD=self._cos_sin_PD,
                drawn_R=self._drawn_R if self._is_fed else None,
                on_size=lambda size: progress(
                    f"graph {len(sizes) - sizes.index(size)} of {len(sizes)}, batch {size}"
                ),
            )

    @property
    def feeds_itself(self) -> bool:
        """Whether every rank of the replica draws each step's tokens, for its own next step.

        The ranks of one TP group hold equal logits, with attention DP of all their sequences, and a
        draw is a function of its row. Ranks of a CP group sum in groups of their own: nothing makes
        their last bits equal.
        """
        split = self.mesh.split
        return split.pp == split.cp == 1

    @property
    def _is_fed(self) -> bool:
        """Whether steps take tokens of an earlier one from the device."""
        is_fed_back = self.stage_memory is not None and self.mesh.is_first_stage
        return self.feeds_itself or is_fed_back

    def warm_up(self, limits: Limits, progress: Callable[[str], None] = lambda text: None) -> None:
        """Run made-up batches, so that no request waits for a kernel to compile.

        They write to the first block of the cache, which holds nothing yet. All ranks of a replica
        must call this together.
        """
        batches = list(warm_up_batches(limits, self._parts))
        for number, batch in enumerate(batches, 1):
            self.execute(batch)
            progress(f"batch {number} of {len(batches)}, {batch.num_tokens} tokens")
        if self.rebalancer is not None:
            self.rebalancer.reset()
        for load_E in self.stage.expert_loads():
            load_E.zero_()

    def expert_loads(self) -> list[list[int]]:
        """Return how often each expert was chosen since the warm-up, of each layer that counts.

        All ranks of a stage must call this together.
        """
        counted = all_loads(self.mesh, self.stage.expert_loads())
        if self.rebalancer is None:
            return counted
        ended = self.rebalancer.totals
        return [
            [a + b for a, b in zip(before, now, strict=True)]
            for before, now in zip(ended, counted, strict=True)
        ]

    @torch.inference_mode()
    def execute(self, batch: StepBatch, returns: TokenReturns | None = None) -> Drawn | None:
        """Start a batch; return the R tokens drawn on the rank that samples, None elsewhere.

        Args:
            batch: What the replica computes.
            returns: Has the tokens of earlier steps; for the first stage of a pipeline.
        """
        if self.rebalancer is not None:
            self.rebalancer.step()
        part = self._part(batch)
        ready: Callable[[], None] = _nothing
        if returns is not None and self.mesh.is_first_stage and (part.token_ids_T < 0).any():
            before = batch.step - self.mesh.num_stages
            part = replace(part, token_ids_T=returns.known(part.token_ids_T, before))
            ready = partial(returns.leave, before, self._drawn_R)
        if (
            self._graphs is not None
            and batch.decode_only
            and part.num_tokens <= self._graphs.largest
        ):
            out = self._replay(self._graphs, part, ready)
            return None if out is None else self._draw(out, batch)
        normed_TD = self._forward(part, ready)
        if normed_TD is None or not batch.num_samples:
            return self._drawn(self._drawn_R[:0])
        return self._draw(self._logits(normed_TD, part), batch)

    @torch.inference_mode()
    def all_logits(self, batch: StepBatch) -> torch.Tensor | None:
        """Run a batch; return the logits of all tokens, [T, V], on the last stage."""
        part = self._part(replace(batch, sample_rows_R=np.arange(batch.num_tokens)))
        normed_TD = self._forward(part)
        return None if normed_TD is None else self._logits(normed_TD, part).float()

    def _part(self, batch: StepBatch) -> RankBatch:
        return rank_batch(batch, self._parts, max_gathered_blocks=self._max_blocks)

    def _logits(self, normed_TD: torch.Tensor, part: RankBatch) -> torch.Tensor:
        """Return the logits [R, V] of all rows to sample, on every rank of the stage."""
        rows_R = self._to_device(part.sample_rows_R)
        if self._parts.is_whole:
            return self.stage.logits(normed_TD[rows_R])
        chosen_RD = normed_TD[rows_R.clamp(min=0)] * (rows_R >= 0).unsqueeze(1)
        logits_RV = self.stage.logits(self.mesh.sum_context(chosen_RD))
        order = part.sample_order(len(rows_R))
        return logits_RV if order is None else logits_RV[self._to_device(order)]

    def _forward(
        self, batch: RankBatch, ready: Callable[[], None] = _nothing
    ) -> torch.Tensor | None:
        """Run the stage eagerly; return [T, D] on the last one, and send it on elsewhere.

        `ready` waits for the tokens of an earlier step, as late as possible.
        """
        context = ForwardContext(
            num_decodes=batch.num_decodes,
            positions_T=self._to_device(batch.positions_T),
            slots_T=self._to_device(batch.slots_T),
            context_lens_S=self._to_device(batch.context_lens_S).to(torch.int32),
            block_tables_SN=self._to_device(batch.block_tables_SN),
            cos_sin_PD=self._cos_sin_PD,
            parts=self._parts,
            num_padding=batch.num_padding,
            prefill_query_starts=batch.prefill_query_starts,
            prefill_context_lens=batch.prefill_context_lens,
            gathers=[
                GatheredPrompts(
                    blocks_M=self._to_device(group.blocks_M),
                    rows=slice(*group.rows),
                    query_starts=group.query_starts,
                    context_lens=group.context_lens,
                    block_tables_PN=self._to_device(group.block_tables_PN),
                    part_tables_PN=self._to_device(group.part_tables_PN),
                )
                for group in batch.gathers
            ],
        )
        hidden_TD = None
        if not self.mesh.is_first_stage:
            hidden_TD = self._link.receive(
                torch.empty(
                    batch.num_tokens, self._hidden_size, dtype=self._dtype, device=self.mesh.device
                )
            )
        ids_T = self._to_device(batch.token_ids_T)
        if self.mesh.is_first_stage and (batch.token_ids_T < 0).any():
            assert self._is_fed
            ready()
            ids_T = feed_tokens(ids_T, self._drawn_R)
        out_TD = self.stage.forward(ids_T, hidden_TD, context)
        if self.mesh.is_last_stage:
            return out_TD
        self._link.send(out_TD)
        return None

    def _replay(
        self, graphs: DecodeGraphs, batch: RankBatch, ready: Callable[[], None]
    ) -> torch.Tensor | None:
        """Run the stage from a graph; return [R, V] on the last one, and send it on elsewhere."""
        graphs.fill(batch)
        ready()
        count = batch.num_tokens
        if not self.mesh.is_first_stage:
            self._link.receive(graphs.hidden_BD[:count])
        out = graphs.replay(count)
        if self.mesh.is_last_stage:
            order = batch.sample_order(graphs.size_for(count))
            return out[:count] if order is None else out[self._to_device(order)]
        # The next replay overwrites it before the peer may have it.
        self._link.send(out[:count].clone())
        return None

    def finish(self) -> None:
        """Wait until the next stage has everything that was sent."""
        self._link.finish()

    def _draw(self, logits_RV: torch.Tensor, batch: StepBatch) -> Drawn | None:
        """Draw the tokens and leave them on the device, for the next step to read there."""
        if not (self.mesh.is_sampler or self.feeds_itself):
            return None
        tokens_R = self._best(logits_RV) if batch.greedy else self._sample(logits_RV, batch)
        self._drawn_R[: len(tokens_R)] = tokens_R
        return self._drawn(tokens_R)

    def _drawn(self, tokens_R: torch.Tensor) -> Drawn | None:
        """Return the tokens on the rank that samples; to its host only if that passes them on."""
        if not self.mesh.is_sampler:
            return None
        return Drawn(tokens_R, is_read=self.stage_memory is None)

    def _best(self, logits_RV: torch.Tensor) -> torch.Tensor:
        """Return the best tokens: PyTorch's argmax takes 28 us for a row of 128k, sampling 6."""
        rows = len(logits_RV)
        zeros, cold = self._zeros_R[:rows], self._cold_R[:rows]
        return sample(logits_RV, cold, zeros, cold, zeros, zeros, filtered=False)

    def _sample(self, logits_RV: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """Return tokens drawn `SAMPLED_ROWS` at a time: what sampling needs grows with the rows."""
        filtered = bool(((batch.top_k_R > 0) | (batch.top_p_R < 1)).any())
        rows = tuple(
            self._to_device(array).split(SAMPLED_ROWS)
            for array in (
                batch.temperature_R,
                batch.top_k_R,
                batch.top_p_R,
                batch.seeds_R,
                batch.sample_positions_R,
            )
        )
        return torch.cat(
            [
                sample(part_RV, *parts, filtered=filtered)
                for part_RV, *parts in zip(logits_RV.split(SAMPLED_ROWS), *rows, strict=True)
            ]
        )

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        # A batch that came over the wire is read-only memory, which torch warns of: copy it.
        host = torch.from_numpy(array.copy())
        if self.mesh.device.type == "cuda":
            host = host.pin_memory()  # else the copy would wait for the GPU to come to it
        return host.to(self.mesh.device, non_blocking=True)
