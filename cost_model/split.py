"""`Split`: how one model is cut over GPUs, before it is bound to devices."""

from typing import Literal

from pydantic import Field, model_validator

from rankwright.topology.value import Value

# How attention of a stage is shared by its `tp` ranks: by heads, or by sequences.
AttentionSplit = Literal["tp", "dp"]

# How the ranks of a context group come by each other's keys and values of prompts: all at once, or
# from rank to rank, each part attended to while the next one travels.
CpExchange = Literal["gather", "ring"]


class Split(Value):
    """Parallel degrees, layers of each stage, and batch sizes.

    A replica takes `tp * pp * cp` GPUs; `dp` replicas are alike and share nothing. In a MoE layer
    the `tp` ranks of a stage form `moe_tp * ep` (the product rule `moe_tp * ep == tp`).

    >>> Split(tp=8, pp=2, ep=4, stage_layers=(40, 40)).num_gpus
    16
    """

    dp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    attention: AttentionSplit = "tp"
    cp_exchange: CpExchange = "gather"
    stage_layers: tuple[int, ...] = Field(description="layers of each stage, first to last")
    max_batch_size: int = Field(default=1, ge=1, description="sequences a replica decodes at once")
    chunk_tokens: int = Field(default=2048, ge=1, description="tokens of a prefill step at most")
    micro_batches: int = Field(default=1, ge=1, description="batches in flight in a pipeline")

    @model_validator(mode="after")
    def _consistent(self) -> "Split":
        if len(self.stage_layers) != self.pp:
            raise ValueError(
                f"pp={self.pp} needs {self.pp} entries in stage_layers, got {self.stage_layers}"
            )
        if min(self.stage_layers) < 1:
            raise ValueError(f"every stage needs a layer, got stage_layers={self.stage_layers}")
        if self.tp % self.ep:
            raise ValueError(f"moe_tp * ep must equal tp: ep={self.ep} does not divide {self.tp}")
        if self.cp == 1 and self.cp_exchange == "ring":
            raise ValueError("cp_exchange='ring' needs ranks to go round: cp=2 or more")
        return self

    @property
    def moe_tp(self) -> int:
        """Ranks that share one expert's weights."""
        return self.tp // self.ep

    @property
    def cache_parts(self) -> int:
        """Ranks of a stage that share its KV cache out by tokens or by sequences.

        Context parallelism gives each a part of every sequence, attention DP whole sequences.
        """
        return self.cp * (self.tp if self.attention == "dp" else 1)

    @property
    def gpus_per_replica(self) -> int:
        """GPUs of one replica."""
        return self.tp * self.pp * self.cp

    @property
    def num_gpus(self) -> int:
        """GPUs of all replicas."""
        return self.dp * self.gpus_per_replica

    def label(self) -> str:
        """Short name for tables: `TP8 PP2 DP1 EP4`; degrees of one are left out.

        >>> Split(tp=8, pp=2, stage_layers=(40, 40)).label()
        'TP8 PP2'
        """
        sizes = {"TP": self.tp, "PP": self.pp, "EP": self.ep, "CP": self.cp, "DP": self.dp}
        text = " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1)
        if self.attention == "dp":
            text += " attnDP"
        if self.cp_exchange == "ring":
            text += " ring"
        return text or "TP1"
