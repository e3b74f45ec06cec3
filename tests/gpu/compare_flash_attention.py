#!/usr/bin/env python3
"""Times FlashAttention-2, as torch carries it, on the shapes that kernel_bench times on a GPU, and
with --kernel-bench also that, so that both figures of a line come from one machine in one run.

  compare_flash_attention.py                              FlashAttention-2 alone
  compare_flash_attention.py --kernel-bench KERNEL_BENCH  both; tests/gpu/run.sh makes the program
                                                          (its libraries: LD_LIBRARY_PATH=lib)

What is asked of FlashAttention-2 (aten._flash_attention_forward), K and V contiguous:
  dense decode  the query heads of a KV head stand as rows that see everything, so that keys and
                values are read once: without that it is slower.
  rectify       32 rows at the end, causal, aligned bottom right, which is checked first. The heads
                of a group cannot stand as rows here: each row sees another number of keys.
  prefill       all rows, causal.

Bytes are those of K and V, products the useful ones: 4 d for each row, head and key that it sees.
The median of many runs over several layers' tensors, together larger than the L2. Needs torch.
"""

import argparse
import collections
import math
import statistics
import subprocess

import torch

HEAD_DIM = 128
QWEN = (28, 4)
LLAMA = (32, 8)

Case = collections.namedtuple("Case", "what heads sequences length rows")
CASES = [
    Case("dense decode", QWEN, 1, 32768, 1),
    Case("dense decode", QWEN, 4, 131072, 1),
    Case("dense decode", QWEN, 8, 131072, 1),
    Case("dense decode", QWEN, 4, 262144, 1),
    Case("dense decode", QWEN, 8, 262144, 1),
    Case("rectify", QWEN, 1, 131072, 32),
    Case("rectify", QWEN, 4, 131072, 32),
    Case("rectify", LLAMA, 1, 131072, 32),
    Case("rectify", LLAMA, 4, 131072, 32),
    Case("prefill", QWEN, 1, 32768, 32768),
    Case("prefill", LLAMA, 1, 32768, 32768),
]
Figures = collections.namedtuple("Figures", "us tb_per_s tflops")


def name_of(case):
    """The name that kernel_bench gives the case."""
    heads, kv_heads = case.heads
    name = f"{case.what}, {heads}/{kv_heads} heads, {case.sequences} x {case.length}"
    return name if case.what == "dense decode" else f"{name}, {case.rows} rows"


def flash_attention(q, k, v, causal):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, causal, False)[0]


def check_alignment():
    """Row i of n sees all keys but the last n - 1 - i."""
    q, k, v = (torch.randn(1, n, 4, HEAD_DIM, device="cuda").bfloat16() for n in (3, 300, 300))
    got = flash_attention(q, k, v, True)
    for i in range(3):
        keys = 300 - 2 + i
        scores = torch.einsum("hd,khd->hk", q[0, i].float(), k[0, :keys].float())
        weights = (scores / math.sqrt(HEAD_DIM)).softmax(-1)
        want = torch.einsum("hk,khd->hd", weights, v[0, :keys].float())
        error = (got[0, i].float() - want).norm() / want.norm()
        assert error < 1e-2, f"row {i} does not see the first {keys} keys: off by {error:.3f}"


def time_flash_attention(case):
    heads, kv_heads = case.heads
    kv_bytes = case.sequences * case.length * kv_heads * HEAD_DIM * 4
    layers = int(min(8, max(2, 4e8 // kv_bytes)))
    decode = case.what == "dense decode"
    q_rows, q_heads = (heads // kv_heads, kv_heads) if decode else (case.rows, heads)

    def values(rows, count):
        return torch.randn(case.sequences, rows, count, HEAD_DIM, device="cuda",
                           dtype=torch.bfloat16)

    tensors = [(values(q_rows, q_heads), values(case.length, kv_heads),
                values(case.length, kv_heads)) for _ in range(layers)]
    seconds = []
    while len(seconds) < 10 or (len(seconds) < 50 and sum(seconds) * layers < 0.3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for q, k, v in tensors:
            flash_attention(q, k, v, not decode)
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3 / layers)
    del tensors
    torch.cuda.empty_cache()
    s = statistics.median(seconds[1:])
    keys = case.rows * case.length - case.rows * (case.rows - 1) // 2  # Seen by a head's rows.
    flops = 4 * HEAD_DIM * heads * case.sequences * keys
    return Figures(s * 1e6, kv_bytes / s / 1e12, flops / s / 1e12)


def run_kernel_bench(program, case):
    """The microseconds that it prints for the case; None where it does not know the case."""
    name = name_of(case)
    output = subprocess.run([program, "--device", "cuda:0", "--filter", name], check=True,
                            capture_output=True, text=True).stdout
    for line in output.splitlines():
        if line.startswith(name + " "):
            return float(line[len(name):].split()[0])
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel-bench", metavar="KERNEL_BENCH")
    parser.add_argument("--filter", default="", help="cases whose name holds this")
    options = parser.parse_args()
    check_alignment()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    print(f"{'case':<46} {'us':>9} {'TB/s':>6} {'TFLOP/s':>8}"
          + (f" {'ours, us':>9} {'TB/s':>6} {'TFLOP/s':>8} {'ratio':>6}"
             if options.kernel_bench else ""))
    for case in CASES:
        if options.filter not in name_of(case):
            continue
        theirs = time_flash_attention(case)
        line = f"{name_of(case):<46} {theirs.us:9.1f} {theirs.tb_per_s:6.2f} {theirs.tflops:8.1f}"
        us = run_kernel_bench(options.kernel_bench, case) if options.kernel_bench else None
        if us is not None:
            ratio = theirs.us / us
            line += (f" {us:9.1f} {theirs.tb_per_s * ratio:6.2f} {theirs.tflops * ratio:8.1f}"
                     f" {ratio:6.2f}")
        print(line, flush=True)


if __name__ == "__main__":
    main()
