"""A rank that speaks the real protocol but has no model: it answers with the prompt, over and over.

For tests of what stands before the engine (front end, server, launch). A separate process with a
real socket; it needs no torch, so it starts fast. The environment tells it how to misbehave:

TEST_STEP_S       seconds between tokens (default 0.001)
TEST_START_S      seconds until it is ready
TEST_FAIL_RANK    this rank fails at the start, as the real worker does
TEST_SILENT       the leader says nothing after its hello
TEST_EVENTS       file to which the leader appends each request that ends, with its reason
A prompt that holds token 666 makes the leader exit at once; 667 makes it answer with an error.
"""

import argparse
import json
import os
import signal
import sys
import time
from multiprocessing.connection import Client, Connection
from pathlib import Path

from rankwright.executor.messages import Abort, Hello, Stats, Stop, Submit, Tokens, decode, encode
from rankwright.executor.parent_death import end_with_parent

CRASH_TOKEN, ERROR_TOKEN = 666, 667


def main() -> int:
    run_dir = Path(os.environ["RANKWRIGHT_RUN_DIR"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if os.environ.get("RANKWRIGHT_IGNORE_TERM") == "1":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parser = argparse.ArgumentParser()
    parser.add_argument("--plan", type=Path)
    plan_path = parser.parse_known_args()[0].plan
    rank = int(os.environ.get("RANK", "0"))
    if plan_path is None:
        replica, leads = rank, True
    else:
        place = json.loads(plan_path.read_text())["ranks"][rank]
        replica, leads = place["replica"], place["stage"] == 0 and place["tp_rank"] == 0
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    print(f"rank {rank} runs as {os.getpid()}, CUDA_VISIBLE_DEVICES={gpus}", flush=True)
    end_with_parent()
    if os.environ.get("TEST_FAIL_RANK") == str(rank):
        text = "traceback line\nRuntimeError: out of memory: 3 GB wanted"
        (run_dir / f"rank-{rank}.error").write_text(text)
        return 1
    time.sleep(float(os.environ.get("TEST_START_S", "0")))
    stopped = run_dir / f"stopped-{replica}"
    if not leads:
        while not stopped.exists():
            time.sleep(0.02)
        return 0
    host, port = os.environ["RANKWRIGHT_FRONT_END"].rsplit(":", 1)
    key = bytes.fromhex(os.environ["RANKWRIGHT_AUTHKEY"])
    try:
        with Client((host, int(port)), authkey=key) as connection:
            serve(connection, replica)
    except (EOFError, ConnectionError):
        return 1
    finally:
        stopped.touch()
    return 0


def serve(connection: Connection, replica: int) -> None:
    step_s = float(os.environ.get("TEST_STEP_S", "0.001"))
    hello = Hello(
        replica=replica,
        num_kv_blocks=64,
        block_tokens=64,
        max_num_seqs=8,
        max_model_len=512,
        eos_token_ids=(0,),
    )
    connection.send_bytes(encode(hello))
    running: dict[str, Submit] = {}
    sent: dict[str, int] = {}
    steps = prompt_tokens = generated = 0
    stats_at_s = 0.0
    while True:
        while connection.poll(0 if running else 0.05):
            message = decode(connection.recv_bytes())
            if isinstance(message, Stop):
                return
            if isinstance(message, Abort) and message.request_id in running:
                del running[message.request_id]
                note(message.request_id, "abort")
            if isinstance(message, Submit):
                if CRASH_TOKEN in message.prompt:
                    os._exit(3)
                if ERROR_TOKEN in message.prompt:
                    tokens = Tokens(
                        request_id=message.request_id,
                        token_ids=(),
                        finish_reason="error",
                        error="the engine says no",
                    )
                    connection.send_bytes(encode(tokens))
                    continue
                running[message.request_id] = message
                sent[message.request_id] = 0
                prompt_tokens += len(message.prompt)
        if "TEST_SILENT" in os.environ:
            continue
        for request_id, request in tuple(running.items()):
            index = sent[request_id]
            token = request.prompt[index % len(request.prompt)]
            sent[request_id] += 1
            generated += 1
            reason = None
            if token == 0 or token in request.sampling.stop_token_ids:
                reason = "stop" if index + 1 >= request.sampling.min_tokens else None
            if reason is None and index + 1 == request.sampling.max_tokens:
                reason = "length"
            tokens = Tokens(request_id=request_id, token_ids=(token,), finish_reason=reason)
            connection.send_bytes(encode(tokens))
            if reason is not None:
                del running[request_id]
                note(request_id, reason)
        if running:
            steps += 1
            time.sleep(step_s)
        if time.monotonic() - stats_at_s > 0.1:
            stats_at_s = time.monotonic()
            stats = Stats(
                replica=replica,
                steps=steps,
                running=len(running),
                waiting=0,
                free_kv_blocks=64 - len(running),
                generated_tokens=generated,
                prompt_tokens=prompt_tokens,
            )
            connection.send_bytes(encode(stats))


def note(request_id: str, reason: str) -> None:
    if "TEST_EVENTS" in os.environ:
        with Path(os.environ["TEST_EVENTS"]).open("a") as file:
            print(request_id, reason, file=file)


if __name__ == "__main__":
    sys.exit(main())
