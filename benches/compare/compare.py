#!/usr/bin/env python3
"""Helion beside llama.cpp and torch on one machine, in one run, against the bars that Helion sets itself.

    cargo build --release && cargo bench --bench overhead --no-run
    LLAMA_CPP_BIN=…/llama.cpp/build/bin python3 benches/compare/compare.py --quick

Random checkpoints of known shapes are made once (`checkpoints.py`), under --scratch. Every round goes through all programs
and formats in turn, so that a machine whose speed drifts hurts all alike; figures are medians of the rounds. The bandwidth of
the memory bus is measured in the same rounds (by `helion bench`): a decode bar is the smaller of its ratio and of 90 % of what
the bus allows, lanes × bandwidth ÷ bytes of the weights.

llama.cpp comes as built programs: llama-bench, llama-batched-bench, llama-quantize, and for the comparison over its RPC
backend ggml-rpc-server (cmake -DGGML_RPC=ON). Python needs numpy and gguf, and torch and transformers for the line about torch.
What isn't there is left out, and named. --quick: one shape and fewer rounds, about ten minutes on two cores.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf

import checkpoints

ROOT = Path(__file__).resolve().parents[2]
FORMATS = ["BF16", "Q8_0", "Q4_K"]
PROMPT = 512
LANES = 8
STEPS = 24
# Ratios to llama.cpp that are wanted. None: no bar, only told.
PREFILL_BARS = {"BF16": 1.5, "Q8_0": 1.5, "Q4_K": 1.5}
ONE_LANE_BARS = {"BF16": 1.25, "Q8_0": 1.25, "Q4_K": 1.1}
MANY_LANES_BARS = {"BF16": 2.5, "Q8_0": 3.0, "Q4_K": None}
TORCH_BAR = 1.2
RPC_BAR = 1.5
LOOPBACK_BAR = 0.95
SESSIONS_BAR = 4.0
BUS_SHARE = 0.9
MEMORY_ABOVE_MIB = 150
CACHE_TOKENS = 4096
TORCH = r"""
import json, sys, time, torch, transformers
torch.set_num_threads(int(sys.argv[2]))
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
ids = (torch.arange(int(sys.argv[3])) * 7919 % config.vocab_size)[None]
with torch.inference_mode():
    for _ in range(2):
        started = time.perf_counter()
        model(ids, logits_to_keep=1, use_cache=True)
        took = time.perf_counter() - started
print(json.dumps(ids.shape[1] / took))
"""


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, default=os.environ.get("LLAMA_CPP_BIN"),
                        help="the folder of llama.cpp's programs [default: LLAMA_CPP_BIN]")
    parser.add_argument("--helion", type=Path, default=ROOT / "target/release/helion", help="Helion's program")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "helion-compare",
                        help="where checkpoints are kept: 3.4 GB of Qwen3-0.6B, 7 GB of Llama-3.2-1B")
    parser.add_argument("--shapes", default=",".join(checkpoints.SHAPES), help="which shapes")
    parser.add_argument("--formats", default=",".join(FORMATS), help="which formats")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="what each of the programs gets")
    parser.add_argument("--parts", default="engine,torch,network,rpc,memory", help="which comparisons")
    parser.add_argument("--quick", action="store_true", help="one shape, three rounds")
    parser.add_argument("--out", type=Path, help="every sample, as JSON")
    args = parser.parse_args()
    if args.llama is None:
        parser.error("where is llama.cpp? Give --llama or set LLAMA_CPP_BIN")
    if args.quick:
        args.shapes, args.rounds = "qwen3-0.6b", 3
    return args


def run(command, **more):
    """Standard output of a program that must succeed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    return done.stdout


class Samples:
    """Measured speeds by what they are of."""

    def __init__(self):
        self.all = {}

    def add(self, value, *key):
        self.all.setdefault("/".join(map(str, key)), []).append(value)

    def median(self, *key):
        found = self.all.get("/".join(map(str, key)))
        return statistics.median(found) if found else None


def llama_engine(args, samples, path, key):
    lines = run([args.llama / "llama-bench", "-m", path, "-t", args.threads, "-p", PROMPT, "-n", STEPS, "-r", 1,
                 "-o", "jsonl"]).splitlines()
    for line in map(json.loads, lines):
        samples.add(line["avg_ts"], *key, "llama", "prefill" if line["n_prompt"] else 1)
    table = run([args.llama / "llama-batched-bench", "-m", path, "-t", args.threads, "-tb", args.threads, "-npp", 16,
                 "-ntg", STEPS, "-npl", LANES, "-c", 16 * LANES + 32 * LANES, "--output-format", "jsonl"])
    [line] = [json.loads(line) for line in table.splitlines() if line.startswith("{")]
    samples.add(line["speed_tg"], *key, "llama", LANES)


def helion_engine(args, samples, path, key):
    report = json.loads(run([args.helion, "bench", "--model", path, "--dtype", "bf16", "--prefill", PROMPT, "--lanes",
                             f"1,{LANES}", "--steps", STEPS, "--rounds", 1, "--threads", args.threads, "--json"]))
    samples.add(report["prefill"][0]["tokens_per_second"], *key, "helion", "prefill")
    for line in report["decode"]:
        samples.add(line["tokens_per_second"], *key, "helion", line["lanes"])
    samples.add(report["memory_bandwidth_bytes_per_second"], "bus")
    samples.add(report["weights_bytes"], *key, "bytes")
    samples.add(report["loaded_bytes"], *key, "loaded")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def llama_rpc(args, samples, path, key):
    """Decode through two of llama.cpp's RPC servers that share the blocks evenly."""
    ports = [free_port(), free_port()]
    servers = [subprocess.Popen([args.llama / "ggml-rpc-server", "-H", "127.0.0.1", "-p", str(port), "-t",
                                 str(args.threads)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
               for port in ports]
    try:
        for port in ports:
            wait_for(port)
        hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
        lines = run([args.llama / "llama-bench", "-m", path, "-t", args.threads, "--rpc", hosts, "-dev", "RPC0/RPC1", "-ngl",
                     99, "-ts", "1/1", "-p", 0, "-n", STEPS, "-r", 1, "-o", "jsonl"]).splitlines()
        samples.add(json.loads(lines[-1])["avg_ts"], *key, "rpc")
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def wait_for(port):
    for _ in range(100):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.1)
    sys.exit(f"nobody listens on port {port}")


def helion_network(args, samples, directory, key):
    """Two nodes on loopback against one process, and several sessions at once."""
    report = json.loads(run(["cargo", "bench", "-q", "--bench", "overhead", "--", directory, "--dtype", "bf16", "--nodes", 2,
                             "--sessions", LANES, "--tokens", STEPS, "--rounds", 1, "--json"], cwd=ROOT))
    [two] = report["through"]
    samples.add(report["in_process"], *key, "in process")
    samples.add(two["one_session"], *key, "two nodes")
    samples.add(two["together"], *key, "together")


def block_bytes(path):
    """What the tensors of the blocks take in a file."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors if tensor.name.startswith("blk."))


def helion_memory(args, samples, shape, files, key):
    """What a node with all blocks, quantized as it loads them, takes in MiB above its weights and the part of its KV pool that a
    prompt has used. It needs a tokenizer, which the GGUF file hasn't got; that one says how many bytes the format has."""
    directory, path = files
    quant = "auto" if key[-1] == "BF16" else key[-1].lower()
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"HELION_HOME": home, "RUST_LOG": "info"}
        node = subprocess.Popen(
            [args.helion, "node", "serve", "--model", directory, "--dtype", "bf16", "--quant", quant, "--blocks",
             f"0:{shape.blocks}", "--threads", str(args.threads), "--new-swarm", "--no-mdns", "--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--attn-cache-tokens", str(CACHE_TOKENS)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
        try:
            address = next(line.split()[-1] for line in node.stdout if "--initial-peers" in line)
            prompt = ",".join(str(2 + i % 200) for i in range(PROMPT))
            run([args.helion, "client", "generate", "--model", directory, "--initial-peers", address, "--input-ids", prompt,
                 "--max-tokens", 8, "--wait", 120, "--json"], env=environment)
            status = Path(f"/proc/{node.pid}/status").read_text()
        finally:
            node.terminate()
            node.wait()
    resident, peak = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) * 1024 for name in ["VmRSS", "VmHWM"])
    matrices = block_bytes(path)
    pool = 2 * 2 * CACHE_TOKENS * shape.blocks * shape.kv_heads * shape.head_size
    # The pool's pages take memory when they are first used.
    used = pool * (PROMPT + 16) // CACHE_TOKENS
    samples.add((resident - matrices - used) / 2**20, *key, "memory above")
    samples.add((peak - matrices - used) / 2**20, *key, "peak above")


def rows(args, samples):
    """The lines of the table: what, Helion's, the other's, the ratio, what is wanted, and whether it is reached."""
    bus = samples.median("bus")

    def line(what, ours, theirs, bar, limit=None):
        if ours is None or theirs is None:
            return None
        wanted = None if bar is None else bar * theirs
        why = "" if bar is None else f"≥ {bar:g}×"
        if wanted is not None and limit is not None and limit < wanted:
            wanted, why = limit, f"{why}, bus: {limit:.1f}"
        verdict = "" if wanted is None else "pass" if ours >= wanted else f"miss, {ours / wanted:.2f} of it"
        share = "" if limit is None else f"{ours / limit * BUS_SHARE:.0%}"
        return f"| {what} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} | {why} | {share} | {verdict} |"

    for name in args.shapes.split(","):
        for form in args.formats.split(","):
            of = lambda *key: samples.median(name, form, *key)
            weights = of("bytes")
            yield line(f"{name} {form} prefill {PROMPT}", of("helion", "prefill"), of("llama", "prefill"), PREFILL_BARS[form])
            for lanes, bars in [(1, ONE_LANE_BARS), (LANES, MANY_LANES_BARS)]:
                limit = BUS_SHARE * lanes * bus / weights if bus and weights else None
                yield line(f"{name} {form} decode, {lanes} lane(s)", of("helion", lanes), of("llama", lanes), bars[form], limit)
        of = lambda *key: samples.median(name, *key)
        yield line(f"{name} BF16 prefill {PROMPT}, torch", samples.median(name, "BF16", "helion", "prefill"), of("torch"), TORCH_BAR)
        yield line(f"{name} BF16, 2 nodes on loopback / 1 process", of("two nodes"), of("in process"), LOOPBACK_BAR)
        yield line(f"{name} BF16, 2 nodes / llama.cpp RPC, 2 backends", of("two nodes"), of("rpc"), RPC_BAR)
        yield line(f"{name} BF16, {LANES} sessions / 1, 2 nodes", of("together"), of("two nodes"), SESSIONS_BAR)
        for form in args.formats.split(","):
            above, peak = (samples.median(name, form, what) for what in ["memory above", "peak above"])
            if above is None:
                continue
            verdict = "pass" if above <= MEMORY_ABOVE_MIB else "miss"
            yield (f"| {name} {form} a node's memory above weights and KV, MiB (at its peak) | {above:.0f} ({peak:.0f}) | | "
                   f"| ≤ {MEMORY_ABOVE_MIB} | | {verdict} |")


def main():
    args = arguments()
    samples = Samples()
    parts = set(args.parts.split(","))
    if "rpc" in parts and not (args.llama / "ggml-rpc-server").exists():
        print("left out: llama.cpp's RPC, there is no ggml-rpc-server", file=sys.stderr)
        parts.discard("rpc")
    models = []
    for name in args.shapes.split(","):
        shape = checkpoints.SHAPES[name]
        whole = checkpoints.write_gguf(shape, args.scratch / f"{name}-BF16.gguf")
        files = {form: whole if form == "BF16" else checkpoints.quantize(whole, form, args.llama)
                 for form in args.formats.split(",")}
        directory = checkpoints.write_hub(shape, args.scratch / name)
        models.append((name, shape, directory, whole, files))
    started = time.monotonic()
    for round in range(args.rounds):
        for name, shape, directory, whole, files in models:
            if "engine" in parts:
                for form, path in files.items():
                    llama_engine(args, samples, path, (name, form))
                    helion_engine(args, samples, path, (name, form))
            if "torch" in parts:
                code = [sys.executable, "-c", TORCH, directory, args.threads, PROMPT]
                samples.add(json.loads(run(code).splitlines()[-1]), name, "torch")
            if "network" in parts:
                helion_network(args, samples, directory, (name,))
            if "rpc" in parts:
                llama_rpc(args, samples, whole, (name,))
            if "memory" in parts and round == 0:
                for form, path in files.items():
                    helion_memory(args, samples, shape, (directory, path), (name, form))
        print(f"round {round + 1} of {args.rounds} done after {time.monotonic() - started:.0f} s", file=sys.stderr)
    if bus := samples.median("bus"):
        print(f"{args.threads} threads, the bus reads {bus / 1e9:.1f} GB/s; tokens a second, medians of {args.rounds} rounds\n")
    print("| what | helion | other | ratio | bar | of the bus | |\n|---|---|---|---|---|---|---|")
    for line in rows(args, samples):
        if line:
            print(line)
    if args.out:
        args.out.write_text(json.dumps(samples.all, indent=1))


if __name__ == "__main__":
    main()
