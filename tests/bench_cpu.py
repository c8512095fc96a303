#!/usr/bin/env python3
"""Ours and llama.cpp's server on the same GGUF and the same processors, side by side in one run: bench_cpu.py BINDERY MODEL LLAMA_SERVER.

Prompts of 128 random tokens, answers of 128, a closed loop of 1, 4, 16 and 64 streams; then prompts of 512 alone. The two
take turns level by level. Prints a table last: output tokens a second, latencies, memory, and the ratios. Some
prompts the peer breaks off at once (failed): they count for nothing and take no time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request

OURS, PEER = "http://127.0.0.1:18411", "http://127.0.0.1:18412"
# Streams and requests of each level.
LEVELS = ((1, 6), (4, 16), (16, 48), (64, 128))
VOCABULARY = "49000"


def start(command: list) -> subprocess.Popen:
    print(" ".join(command), file=sys.stderr)
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait(url: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"{server.args[0]} ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            pass
        time.sleep(0.1)
    sys.exit(f"{url} is not ready")


def measure(bindery: str, url: str, streams: int, requests: int, length: tuple) -> dict:
    with tempfile.NamedTemporaryFile() as report:
        command = [bindery, "bench", "serve", "--base-url", url, "--ignore-eos", "--temperature", "0"]
        command += ["--random-input-len", str(length[0]), "--random-output-len", str(length[1])]
        command += ["--random-vocab-size", VOCABULARY, "--max-concurrency", str(streams)]
        command += ["--num-prompts", str(requests), "--json", report.name]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        return json.load(open(report.name))


def peak_mib(server: subprocess.Popen) -> int:
    status = open(f"/proc/{server.pid}/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def row(name: str, found: dict) -> str:
    seconds = [found[key] / 1000 for key in ("median_ttft_ms", "p99_ttft_ms")]
    gaps = [found[key] for key in ("median_itl_ms", "p99_itl_ms")]
    return (
        f"{name:<16}{found['output_throughput']:>10.1f}{seconds[0]:>10.2f}{seconds[1]:>9.2f}"
        f"{gaps[0]:>10.1f}{gaps[1]:>9.1f}{found['failed']:>8}"
    )


def main() -> None:
    bindery, model, llama = sys.argv[1:4]
    threads = str(os.cpu_count())
    common = ["--host", "127.0.0.1", "--port"]
    # 64 sequences of 256 tokens and some room; the peer has 64 slots of 512.
    ours = [bindery, "serve", model, *common, OURS[-5:], "--max-model-len", "1024"]
    ours += ["--kv-cache-memory-bytes", "420MiB", "--max-num-seqs", "64"]
    peer = [llama, "-m", model, *common, PEER[-5:], "-t", threads, "-tb", threads, "-np", "64"]
    peer += ["-c", "65536", "--no-kv-unified", "-cb", "-cram", "0", "--no-webui", "-fa", "off"]
    servers = [start(ours), start(peer)]
    try:
        for url, server in zip((OURS, PEER), servers):
            wait(url, server)
        table(bindery, servers)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def table(bindery: str, servers: list) -> None:
    lines = []
    for streams, requests in LEVELS:
        found = [measure(bindery, url, streams, requests, (128, 128)) for url in (OURS, PEER)]
        for name, one in zip(("bindery", "llama.cpp"), found):
            lines.append(row(f"{name} {streams}", one))
        more = found[0]["output_throughput"] / found[1]["output_throughput"]
        gap = found[0]["p99_itl_ms"] / found[1]["p99_itl_ms"]
        lines.append(f"  ratio {streams:>3}: {more:.2f} times the tokens, ITL p99 {gap:.2f} times")
    prefill = [measure(bindery, url, 1, 4, (512, 1)) for url in (OURS, PEER)]
    rates = [512_000 / one["median_ttft_ms"] for one in prefill]
    print(f"{'':<16}{'out tok/s':>10}{'TTFT p50':>10}{'p99 s':>9}{'ITL p50':>10}{'p99 ms':>9}{'failed':>8}")
    print("\n".join(lines))
    print(f"prefill of 512 tokens: {rates[0]:.0f} and {rates[1]:.0f} tok/s: {rates[0] / rates[1]:.2f} times")
    print(f"most resident: {peak_mib(servers[0])} and {peak_mib(servers[1])} MiB")


if __name__ == "__main__":
    main()
