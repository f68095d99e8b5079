"""What the ranks of a test run: the real runner and engine over gloo."""

import itertools
import threading
import time
from collections.abc import Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from rankwright.executor.drawn import Drawn
from rankwright.executor.engine import Follower, Leader
from rankwright.executor.expert_slots import move_experts
from rankwright.executor.mesh import Mesh
from rankwright.executor.messages import (
    Abort,
    News,
    Sampling,
    Stop,
    Submit,
    Tokens,
    decode,
    encode,
)
from rankwright.executor.runner import Runner
from rankwright.executor.step_batch import StepBatch
from rankwright.executor.weights import SafetensorsSource
from rankwright.planner.plan import Plan


def make(
    rank: int, plan_json: str, folder: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Plan, Mesh, Runner]:
    plan = Plan.model_validate_json(plan_json)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    mesh = Mesh(plan, rank, where)
    source = SafetensorsSource(Path(folder), dtype, where)
    return plan, mesh, Runner(plan, mesh, source, dtype=dtype)


def teacher_batches(
    sequences: list[list[int]],
    prefill: list[int],
    chunk: int,
    block_tokens: int,
    num_parts: int = 1,
) -> Iterator[tuple[StepBatch, list[tuple[int, int]]]]:
    """Batches that compute given tokens: prompts in chunks, then one token a step, mixed.

    Yields each batch with the (sequence, position) of its tokens. Sequence i holds blocks
    i, i + S, i + 2 S, ...: neighbours in time are not neighbours in the cache. With attention DP
    the ranks take turns.
    """
    done = [0] * len(sequences)
    step = 0
    while any(count < len(tokens) for count, tokens in zip(done, sequences, strict=True)):
        decodes, chunks = [], []
        for index, tokens in enumerate(sequences):
            if done[index] >= len(tokens):
                continue
            if done[index] >= prefill[index]:
                decodes.append((index, 1))
            else:
                chunks.append((index, min(chunk, prefill[index] - done[index])))
        entries = decodes + chunks
        places = [(i, done[i] + k) for i, count in entries for k in range(count)]
        width = max(-(-(done[i] + count) // block_tokens) for i, count in entries)
        yield (
            StepBatch(
                step=step,
                num_decodes=len(decodes),
                query_lens_S=np.array([count for _, count in entries], dtype=np.int64),
                context_lens_S=np.array([done[i] + count for i, count in entries], dtype=np.int64),
                token_ids_T=np.array([sequences[i][k] for i, k in places], dtype=np.int64),
                block_tables_SN=np.array(
                    [[i + k * len(sequences) for k in range(width)] for i, _ in entries],
                    dtype=np.int32,
                ),
                parts_S=np.array([i % num_parts for i, _ in entries], dtype=np.int64),
                sample_rows_R=np.array([], dtype=np.int64),
                temperature_R=np.array([], dtype=np.float32),
                top_p_R=np.array([], dtype=np.float32),
                top_k_R=np.array([], dtype=np.int64),
                seeds_R=np.array([], dtype=np.int64),
                sample_positions_R=np.array([], dtype=np.int64),
            ),
            places,
        )
        for i, count in entries:
            done[i] += count
        step += 1


def logits(
    rank: int,
    plan_json: str,
    folder: str,
    sequences: list[list[int]],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[np.ndarray] | None:
    """Logits of every token of every sequence, from the ranks that sample; None elsewhere."""
    plan, mesh, runner = make(rank, plan_json, folder, device, dtype)
    return teacher_logits(plan, mesh, runner, sequences)


def teacher_logits(
    plan: Plan, mesh: Mesh, runner: Runner, sequences: list[list[int]]
) -> list[np.ndarray] | None:
    """Logits of every token of every sequence, on the rank that samples."""
    out = [
        np.full((len(tokens), plan.model.vocab_size), np.nan, np.float32) for tokens in sequences
    ]
    prefill = [max(1, len(tokens) - 5 - index) for index, tokens in enumerate(sequences)]
    block_tokens = plan.kv_cache.block_tokens * plan.split.cp
    parts = mesh.attention_ranks
    for batch, places in teacher_batches(sequences, prefill, 7, block_tokens, parts):
        logits_TV = runner.all_logits(batch)
        if logits_TV is not None:
            for row, (index, position) in zip(logits_TV.cpu().numpy(), places, strict=True):
                out[index][position] = row
    runner.finish()
    return out if mesh.is_sampler else None


def serve(
    rank: int,
    plan_json: str,
    folder: str,
    requests: list[tuple[str, list[int], dict[str, Any]]],
    abort: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    ahead: int | None = None,
) -> dict[str, list[int]] | None:
    """Tokens of each request, from each leader; requests of other replicas are not its own.

    A new request arrives for every two tokens that come back, so that they join and leave while
    others run. `abort` is withdrawn after its third token.
    """
    plan, mesh, runner = make(rank, plan_json, folder, device, dtype)
    runner.warm_up(plan.limits)
    return answers(plan, mesh, runner, requests, abort, ahead)


def answers(
    plan: Plan,
    mesh: Mesh,
    runner: Runner,
    requests: list[tuple[str, list[int], dict[str, Any]]],
    abort: str | None = None,
    ahead: int | None = None,
) -> dict[str, list[int]] | None:
    """Tokens of this replica's requests, on its leader."""
    if not mesh.is_leader:
        Follower(mesh, runner, ahead=ahead).run()
        return None
    ours, theirs = Pipe()
    mine = requests[mesh.place.replica :: plan.split.dp]
    out: dict[str, list[int]] = {}
    client = threading.Thread(target=_client, args=(ours, mine, abort, out))
    client.start()
    Leader(plan, mesh, runner, theirs, eos_token_ids=(), ahead=ahead).run()
    theirs.close()  # ends the client's reading
    client.join(timeout=60)
    ours.close()
    return out


def stages_at_once(
    rank: int,
    plan_json: str,
    folder: str,
    requests: list[tuple[str, list[int], dict[str, Any]]],
    ahead: int,
    path: str,
    batches: tuple[int, int],
) -> list[bool]:
    """Of some batches of the last stage: whether the first began a later one before they ended.

    The last stage holds each of them until it has, which it waits 20 s for.
    """
    plan, mesh, runner = make(rank, plan_json, folder)
    begun = np.memmap(path, dtype=np.int64, mode="r+", shape=(1,))
    forward = runner.stage.forward
    seen: list[bool] = []
    count = 0

    def watched(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if mesh.is_first_stage:
            begun[0] = count
        out = forward(*arguments)
        if mesh.is_last_stage and batches[0] <= count < batches[1] and all(seen):
            deadline_s = time.monotonic() + 20
            while begun[0] <= count and time.monotonic() < deadline_s:
                time.sleep(0.001)
            seen.append(bool(begun[0] > count))
        return out

    with patch.object(runner.stage, "forward", watched):
        answers(plan, mesh, runner, requests, ahead=ahead)
    return seen


def tokens_and_logits(
    rank: int, plan_json: str, folder: str, requests: list[tuple[str, list[int], dict[str, Any]]]
) -> tuple[dict[str, list[int]], dict[tuple[int, int], np.ndarray]]:
    """Tokens from leaders; from samplers what each was drawn from, by seed and position."""
    plan, mesh, runner = make(rank, plan_json, folder)
    rows: dict[tuple[int, int], np.ndarray] = {}
    draw = runner._draw

    def watched(logits_RV: torch.Tensor, batch: StepBatch) -> Drawn | None:
        if mesh.is_sampler:
            keys = zip(batch.seeds_R.tolist(), batch.sample_positions_R.tolist(), strict=True)
            rows.update(zip(keys, logits_RV.float().numpy(), strict=True))
        return draw(logits_RV, batch)

    with patch.object(runner, "_draw", watched):
        return answers(plan, mesh, runner, requests) or {}, rows


def _client(
    connection: Connection,
    requests: list[tuple[str, list[int], dict[str, Any]]],
    abort: str | None,
    out: dict[str, list[int]],
) -> None:
    waiting = list(requests)
    unfinished = {name for name, _, _ in requests}
    heard = 0
    while unfinished:
        message = decode(connection.recv_bytes())
        news = message.each() if isinstance(message, News) else (message,)
        for tokens in news:
            if not isinstance(tokens, Tokens):
                continue
            assert tokens.error is None, tokens.error
            out.setdefault(tokens.request_id, []).extend(tokens.token_ids)
            if abort is not None and tokens.request_id == abort and len(out[abort]) == 3:
                connection.send_bytes(encode(Abort(request_id=abort)))
            if tokens.finish_reason is not None:
                unfinished.discard(tokens.request_id)
            heard += 1
        sent = len(requests) - len(waiting)
        idle = sent == len(requests) - len(unfinished)
        if waiting and (idle or heard >= 2 * sent):
            name, prompt, sampling = waiting.pop(0)
            connection.send_bytes(
                encode(Submit(request_id=name, prompt=tuple(prompt), sampling=Sampling(**sampling)))
            )
    connection.send_bytes(encode(Stop()))
    while True:  # the leader may be telling its last state
        try:
            connection.recv_bytes()
        except (EOFError, OSError):
            return


def moved_experts(
    rank: int,
    plan_json: str,
    placements: list[tuple[tuple[int, ...], ...]],
) -> list[list[float]]:
    """What this rank's slots hold after each placement, when expert e starts with weights of e."""
    mesh = Mesh(Plan.model_validate_json(plan_json), rank, torch.device("cpu"))
    me = mesh.ep.ranks.index(rank)
    start = torch.tensor(placements[0][me], dtype=torch.float32)
    matrices = (start.view(-1, 1, 1).repeat(1, 3, 2), start.view(-1, 1).repeat(1, 5))
    out = []
    for old, new in itertools.pairwise(placements):
        move_experts(mesh, matrices, old, new)
        for matrix in matrices:
            assert (matrix.flatten(1) == matrix.flatten(1)[:, :1]).all()
        assert torch.equal(matrices[0][:, 0, 0], matrices[1][:, 0])
        out.append(matrices[1][:, 0].tolist())
    mesh.finish()
    return out


def serve_and_rebalance(
    rank: int, plan_json: str, folder: str, requests: list[tuple[str, list[int], dict[str, Any]]]
) -> tuple[dict[str, list[int]], list[list[float]], list[list[int]]] | None:
    """Tokens of each request, imbalance of each interval and layer, loads of each layer."""
    plan, mesh, runner = make(rank, plan_json, folder)
    runner.warm_up(plan.limits)
    assert runner.rebalancer is not None
    if not mesh.is_leader:
        Follower(mesh, runner).run()
        return None
    ours, theirs = Pipe()
    out: dict[str, list[int]] = {}
    client = threading.Thread(target=_client, args=(ours, requests, None, out))
    client.start()
    Leader(plan, mesh, runner, theirs, eos_token_ids=()).run()
    theirs.close()
    client.join(timeout=60)
    ours.close()
    return out, list(runner.rebalancer.imbalances), runner.rebalancer.totals


def control(rank: int, plan_json: str, size: int) -> bytes:
    """What this rank hears when its leader says `size` bytes."""
    mesh = Mesh(Plan.model_validate_json(plan_json), rank, torch.device("cpu"))
    said = bytes([mesh.place.replica + 1]) * size
    if mesh.is_leader:
        mesh.tell(said)
    heard = said if mesh.is_leader else mesh.hear()
    mesh.finish()
    return heard


def columns(rank: int, plan_json: str) -> list[float]:
    """The gathered columns, when each rank holds the numbers of its own."""
    mesh = Mesh(Plan.model_validate_json(plan_json), rank, torch.device("cpu"))
    gathered: list[float] = mesh.all_gather_columns(
        torch.arange(*mesh.place.vocab, dtype=torch.float32).view(1, -1)
    )[0].tolist()
    return gathered
