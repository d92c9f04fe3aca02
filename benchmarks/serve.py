"""Measure ``protea serve``: throughput, latency against offered load, overload, and many clients for minutes.

``throughput`` asks for the vectors of a FASTA file's sequences with 16 clients, and runs ``protea embed`` on the same
file in the same round; the command's rate is without its start, which is measured with a file of one sequence.
``latency`` sends requests of one sequence at random moments, whether earlier ones were answered or not, at shares of
the rate at which transformers' service answers, to Protea and to a plain service: FastAPI over transformers, which
takes what waits, up to 8 requests, as one padded batch. ``overload`` has a thousand clients whose sequences do not fit
into the queue: the time of refusals while all cores compute. ``crowd`` is the same for two minutes with a longer queue;
it compares each answer with ``protea embed`` to the bit, and samples the service's memory.

Clients are asyncio protocols in a process of their own (``tests/crowd.py``); ``late`` is by how much that process was
late itself (percentiles 50, 99 and 100, as for all times, in seconds). Services run five steps of niceness below it.

Usage: python benchmarks/serve.py throughput|latency|overload|crowd [--model FOLDER] [--seconds S] [--rounds N]
       [--options "--max-queue-tokens 40000 ..."]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "src")]

from crowd import Order, finished, started

LETTERS = "LAGVSERTIDPKQNFYMHWC"
PADDED_BATCH = 8
LOADS = (0.25, 0.5, 0.75, 0.9, 1.1)


def proteins(count: int, longest: int = 1000) -> list[str]:
    """Random sequences of log-normal lengths, on average about 250."""
    rng = random.Random(0)
    lengths = [min(longest, max(30, int(rng.lognormvariate(5.35, 0.6)))) for _ in range(count)]
    return ["".join(rng.choices(LETTERS, k=length)) for length in lengths]


# ---- services ----
class Service:
    """A running service, and what it uses."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port

    @property
    def memory(self) -> int:
        """Resident megabytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20

    def seconds(self) -> tuple[float, float]:
        """Seconds of processor time: of the event loop's thread, and of all threads."""
        pid = self.process.pid
        tasks = {
            int(task.name): (task / "stat").read_text().rpartition(")")[2].split()
            for task in Path(f"/proc/{pid}/task").iterdir()
        }
        used = {task: (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK") for task, words in tasks.items()}
        return used[pid], sum(used.values())


@contextmanager
def running(*command: str) -> Iterator[Service]:
    """A service in a process of its own, a little below this one's priority."""
    words = ["nice", "-n", "5", sys.executable, *command]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if "serving" in line)
        drain = threading.Thread(target=lambda: [None for _ in process.stderr or ()])
        drain.start()
        yield Service(process, int(line.rpartition(":")[2]))
    finally:
        process.terminate()
        process.wait(60)
        drain.join()
        process.stderr.close()


def protea(model: str, *options: str) -> Any:
    """``protea serve``."""
    return running("-m", "protea", "serve", "-m", model, "--port", "0", *options)


def padded_service(model: str) -> None:
    """The plain service: what waits, up to 8 requests, is one padded batch; prints its address when it is ready."""
    import asyncio
    from queue import Empty, SimpleQueue

    import torch
    import uvicorn
    from fastapi import FastAPI
    from transformers import EsmTokenizer

    from peers import encoder

    tokenizer, run = EsmTokenizer.from_pretrained(model), encoder(Path(model))
    waiting: SimpleQueue[tuple[str, Any, asyncio.AbstractEventLoop]] = SimpleQueue()

    def compute() -> None:
        while True:
            taken = [waiting.get()]
            while len(taken) < PADDED_BATCH:
                try:
                    taken.append(waiting.get_nowait())
                except Empty:
                    break
            batch = tokenizer([sequence for sequence, _, _ in taken], return_tensors="pt", padding=True)
            with torch.inference_mode():
                states = run(batch["input_ids"], batch["attention_mask"])
            for row, (sequence, future, loop) in zip(states, taken, strict=True):
                vector = row[1 : len(sequence) + 1].mean(0).tolist()
                loop.call_soon_threadsafe(future.set_result, vector)

    app = FastAPI()

    @app.post("/v1/embed")
    async def embed(body: dict[str, Any]) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        waiting.put((body["sequences"][0], future, loop))
        return {"records": [{"embedding": await future}]}

    threading.Thread(target=compute, daemon=True).start()
    config = uvicorn.Config(app, port=0, log_level="critical")
    listening = config.bind_socket()
    print(f"serving on http://127.0.0.1:{listening.getsockname()[1]}", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listening])


# ---- what is measured ----
def bodies_of(sequences: list[str], each: int = 1) -> list[str]:
    return [json.dumps({"sequences": sequences[at : at + each]}) for at in range(0, len(sequences), each)]


def asked(**order: Any) -> dict[str, Any]:
    return finished(started(Order(**order)))


def throughput(args: argparse.Namespace) -> None:
    """Residues a second of 16 clients and of the command."""
    sequences = proteins(args.sequences)
    residues = sum(map(len, sequences))
    rates: dict[str, list[float]] = {}
    threads = [] if args.threads is None else ["--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, given in (("one", sequences[:1]), ("all", sequences)):
            (folder / f"{name}.fasta").write_text("".join(f">{n}\n{text}\n" for n, text in enumerate(given)))

        def command(name: str) -> float:
            output = ["-o", str(folder / f"{name}.npz"), "--overwrite", "-m", args.model, *threads]
            began = time.perf_counter()
            words = [sys.executable, "-m", "protea", "embed", str(folder / f"{name}.fasta"), *output]
            subprocess.run(words, check=True, capture_output=True)
            return time.perf_counter() - began

        with protea(args.model, *args.options.split(), *threads) as service:
            for _ in range(args.rounds):
                start, whole = command("one"), command("all")
                row = {"protea embed": residues / (whole - start)}
                for each in (1, 16):
                    found = asked(port=service.port, bodies=bodies_of(sequences, each))
                    assert list(found["answers"]) == ["200"], found
                    row[f"16 clients, {each} a request"] = residues / found["seconds"]
                for name, rate in row.items():
                    rates.setdefault(name, []).append(rate)
                    print(f"{name}: {rate:,.0f} residues/s, {rate / row['protea embed']:.2f}", flush=True)
    for name, every in rates.items():
        shares = [rate / base for rate, base in zip(every, rates["protea embed"], strict=True)]
        print(f"| {name} | {statistics.median(every):,.0f} | {statistics.median(shares):.2f} |")


def latency(args: argparse.Namespace) -> None:
    """Seconds of answers against requests a second."""
    sequences = proteins(args.sequences)
    model = str(ROOT / "src/protea/bundled") if args.model == "protea-mini" else args.model
    bodies = bodies_of(sequences)
    services = {
        "padded": lambda: running(__file__, "padded", "--model", model),
        "protea": lambda: protea(args.model, *args.options.split()),
    }
    capacity = 0.0
    for name, make in services.items():
        with make() as service:
            found = asked(port=service.port, bodies=bodies[:64], clients=16)
            found = asked(port=service.port, bodies=bodies, clients=16)
            rate = len(bodies) / found["seconds"]
            capacity = capacity or rate
            print(f"{name}: {rate:.1f} requests/s with 16 clients, seconds {found['taken']['200']}", flush=True)
            loads = LOADS if name == "padded" else (*LOADS, *(share * rate / capacity for share in LOADS[1:4]))
            for load in loads:
                found = asked(port=service.port, bodies=bodies, seconds=args.seconds, rate=load * capacity)
                taken = found["taken"].get("200")
                offered = f"{load * capacity:.1f}"
                print(f"| {name} | {offered} | {found['answers']} | {taken} | {found['late']} |", flush=True)


def overload(args: argparse.Namespace) -> None:
    """Seconds of refusals while both cores compute, memory, and what the event loop takes."""
    bodies = bodies_of(proteins(args.sequences), 2)
    _many(args, bodies, None, args.options or "--max-queue-tokens 20000")


def crowd(args: argparse.Namespace) -> None:
    """A thousand clients with mixed lengths, each answer compared."""
    import protea as package

    sequences = proteins(args.sequences)
    vectors = package.load(args.model, device="cpu").embed(sequences, pool="mean").tolist()
    bodies = bodies_of(sequences, 2)
    expected = [vectors[at : at + 2] for at in range(0, len(vectors), 2)]
    _many(args, bodies, expected, args.options or "--max-queue-tokens 40000")


def _many(args: argparse.Namespace, bodies: list[str], expected: Any, options: str) -> None:
    with protea(args.model, *options.split()) as service:
        before = service.seconds()
        clients = started(
            Order(port=service.port, bodies=bodies, clients=args.clients, seconds=args.seconds, expected=expected)
        )
        memory = []
        while clients.poll() is None:
            memory.append(service.memory)
            try:
                clients.wait(args.seconds / 24)
            except subprocess.TimeoutExpired:
                continue
        loop, every = (now - then for now, then in zip(service.seconds(), before, strict=True))
        print(json.dumps(finished(clients)))
        print(f"processor time: event loop {loop:.1f} s, all threads {every:.1f} s; memory {memory} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["throughput", "latency", "overload", "crowd", "padded"])
    parser.add_argument("--model", default="protea-mini")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--options", default="", help="of protea serve")
    parser.add_argument("--threads", type=int, help="of protea serve and protea embed, for throughput")
    args = parser.parse_args()
    if args.part == "padded":
        padded_service(args.model)
    else:
        {"throughput": throughput, "latency": latency, "overload": overload, "crowd": crowd}[args.part](args)


if __name__ == "__main__":
    main()
