#!/usr/bin/env python3
"""Measures what a running daemon answers right on the demo model's tasks.

  tests/quality/run.sh evaluate.py --task recall --length 16384 --samples 200 --mode rectified

Prints exact-match accuracy with its 95 % Wilson interval (an answer counts when every token is
right and the model then ends), per kind of prompt; where wrong answers first go wrong; the share of
blocks that sparse steps read; rectifications; and speed. --json writes all of it, and every sample,
to a file. The selector belongs to the daemon: restart it with --selector or --preset to compare.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import math
import statistics
import sys
import time

import grpc

import demo_tasks
import resa_client
from resa_client import attention_pb2, inference_pb2

MODES = {
    "dense": attention_pb2.ATTENTION_MODE_DENSE,
    "sparse": attention_pb2.ATTENTION_MODE_SPARSE,
    "rectified": attention_pb2.ATTENTION_MODE_RECTIFIED,
}
POLICY = ("keep_ratio", "min_tokens", "local_tokens", "sink_tokens", "rectify_interval")


@dataclasses.dataclass
class Result:
    """One sample's outcome. first_wrong: index of the first wrong output token; None: all right."""

    index: int
    kind: str
    prompt_tokens: int
    answer_tokens: int
    first_wrong: int | None
    output: resa_client.Output

    @property
    def right(self):
        return self.first_wrong is None


def wilson(right, count):
    """95 % interval of a share."""
    if count == 0:
        return 0.0, 1.0
    p, z = right / count, 1.96
    middle = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def first_difference(expected, got, stopped):
    """Index of the first wrong token, an end too early or too late included; None if all right."""
    for i, (a, b) in enumerate(zip(expected, got)):
        if a != b:
            return i
    if len(got) != len(expected) or not stopped:
        return min(len(expected), len(got))
    return None


def request_for(sample, options):
    request = inference_pb2.GenerateRequest()
    if options.send == "ids":
        request.token_ids.ids.extend(int(i) for i in sample.prompt)
    else:
        request.text = demo_tasks.prompt_text(sample)
    request.sampling.temperature = 0
    request.stop.max_tokens = len(sample.answer) + demo_tasks.SLACK_TOKENS
    request.output.token_ids = True
    if options.mode:
        request.attention.mode = MODES[options.mode]
    for name in POLICY:
        if getattr(options, name) is not None:
            setattr(request.attention, name, getattr(options, name))
    return request


def measure(client, samples, options):
    """Runs all samples, --concurrency at a time. Returns results by index and the seconds taken."""
    end_id = demo_tasks.tasks.EOS

    def one(index):
        sample = samples[index]
        output = client.generate(request_for(sample, options))
        got = output.token_ids
        if got and got[-1] == end_id:
            got = got[:-1]
        wrong = first_difference(sample.answer[:-1].tolist(), got, output.stopped)
        return Result(index, sample.kind, len(sample.prompt), len(sample.answer) - 1, wrong, output)

    results, begin = [], time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(options.concurrency) as pool:
        futures = [pool.submit(one, i) for i in range(len(samples))]
        try:
            for future in concurrent.futures.as_completed(futures):
                results.append(future.result())
                show_progress(results, len(samples), time.monotonic() - begin)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return sorted(results, key=lambda r: r.index), time.monotonic() - begin


def show_progress(results, total, seconds):
    right = sum(r.right for r in results)
    end = "\n" if len(results) == total else ""
    if sys.stderr.isatty():
        line = f"\r{len(results)}/{total} answered, {right} right, {seconds:.0f} s"
        print(line, end=end, file=sys.stderr, flush=True)


def share(results):
    right = sum(r.right for r in results)
    low, high = wilson(right, len(results))
    return {"right": right, "count": len(results), "accuracy": right / len(results), "low": low,
            "high": high}  # fmt: skip


def summarize(results, seconds):
    kinds = sorted({r.kind for r in results}, key=lambda k: [r.kind for r in results].index(k))
    breaks = [r.first_wrong for r in results if not r.right]
    outputs = [r.output for r in results]
    sparse = sum(o.sparse_steps for o in outputs)
    decoded = [(len(o.token_ids) - 1, o.decode_s) for o in outputs if len(o.token_ids) > 1]
    return {
        **share(results),
        "kinds": {k: share([r for r in results if r.kind == k]) for k in kinds},
        "first_wrong_median": statistics.median(breaks) if breaks else None,
        "first_wrong_min": min(breaks, default=None),
        # Weighted by steps; None without sparse steps.
        "kept_block_ratio": (
            sum(o.kept_block_ratio * o.sparse_steps for o in outputs) / sparse if sparse else None
        ),
        "sparse_steps": sparse,
        "dense_steps": sum(o.dense_steps for o in outputs),
        "rectifications": sum(o.rectifications for o in outputs),
        "preemptions": sum(o.preemptions for o in outputs),
        # What one stream sees beside --concurrency - 1 others, and all streams together.
        "decode_tokens_per_s": (
            sum(n for n, _ in decoded) / max(sum(s for _, s in decoded), 1e-9) if decoded else None
        ),
        "first_token_s_median": statistics.median(o.first_token_s for o in outputs),
        "output_tokens_per_s": sum(len(o.token_ids) for o in outputs) / seconds,
        "seconds": seconds,
    }


def print_summary(title, s):
    print(f"{title}: exact {s['accuracy']:.3f} [{s['low']:.3f}, {s['high']:.3f}] of {s['count']}")
    if len(s["kinds"]) > 1:
        print("  by kind: " + ", ".join(f"{k} {v['accuracy']:.3f}" for k, v in s["kinds"].items()))
    if s["first_wrong_median"] is not None:
        print(
            f"  wrong answers first go wrong at output token {s['first_wrong_median']:.0f} "
            f"(median; the earliest {s['first_wrong_min']})"
        )
    if s["kept_block_ratio"] is not None:
        print(
            f"  sparse steps read {s['kept_block_ratio']:.3f} of the blocks "
            f"({s['sparse_steps']} sparse steps, {s['dense_steps']} dense, "
            f"{s['rectifications']} rectifications)"
        )
    decode = f"{s['decode_tokens_per_s']:.1f}" if s["decode_tokens_per_s"] else "-"
    print(
        f"  {decode} tokens/s a stream, {s['output_tokens_per_s']:.1f} tokens/s in all with "
        f"prompts, first token after {s['first_token_s_median']:.2f} s (median), "
        f"{s['seconds']:.0f} s in all"
    )


def describe(selector):
    text = f"{selector.kind} block {selector.block_tokens}"
    return text + (f" planes {selector.planes}" if selector.kind == "sketch" else "")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="127.0.0.1:50051", help="address of the daemon")
    demo_tasks.add_arguments(parser)
    parser.add_argument("--mode", choices=MODES, help="default: the daemon's")
    parser.add_argument("--keep-ratio", type=float)
    for name in POLICY[1:]:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--concurrency", type=int, default=1, help="requests at a time")
    parser.add_argument("--send", choices=("text", "ids"), default="text", help="prompts as")
    parser.add_argument("--json", metavar="FILE", help="write summary and samples here")
    options = parser.parse_args()
    if options.samples < 1 or options.concurrency < 1:
        parser.error("--samples and --concurrency must be at least 1")
    return options


def main():
    options = parse_arguments()
    client = resa_client.Client(options.target)
    try:
        model = client.model()
        if model.vocab_size < demo_tasks.tasks.TOKEN_COUNT:
            raise SystemExit(f"error: {model.name} at {options.target} is not the demo model")
        samples = demo_tasks.samples(
            options.task, options.samples, options.seed, options.length, options.steps, options.kind
        )
        results, seconds = measure(client, samples, options)
    except grpc.RpcError as error:
        raise SystemExit(f"error: {options.target}: {error.code().name}: {error.details()}")
    summary = summarize(results, seconds)
    size = f"{options.length} tokens" if options.task == "recall" else f"{options.steps} steps"
    mode = options.mode or "default mode"
    print_summary(f"{options.task} {size}, {mode}, {describe(model.selector)}", summary)
    if options.json:
        report = {
            "arguments": vars(options),
            "model": model.name,
            "device": model.device,
            "selector": describe(model.selector),
            "summary": summary,
            "samples": [dataclasses.asdict(r) for r in results],
        }
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
