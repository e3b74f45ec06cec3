"""Runs llama-bench and resa_bench in turn and prints tokens/s and ratios.

Called by compare_llama_cpp.sh, which builds llama-bench and makes the models. Each round measures
llama.cpp with the model in bf16 and in f16, with its flash attention and without (one is better for
a long prefill, the other for decoding), and then resa_bench. A ratio is the median over the rounds
of that round's figures, so that what disturbs the machine for minutes cancels out.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

DEPTH = 7600
ROWS = 512
GENERATED = 32
LLAMA_TYPES = ("bf16", "f16")
LLAMA_FLASH = ("on", "off")
MODES = ("dense", "sparse", "rectified")

# Name of a figure and how either program calls it.
DECODE_SHORT = "decode, short context"
DECODE_LONG = f"decode after {DEPTH}"
PREFILL_SHORT = f"prefill {ROWS}"
PREFILL_LONG = f"prefill {ROWS} after {DEPTH}"


def run(command):
    try:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")


def llama_figures(program, model, threads):
    """Tokens/s by figure: the better one of both kinds of attention."""
    names = {(ROWS, 0, 0): PREFILL_SHORT, (ROWS, 0, DEPTH): PREFILL_LONG,
             (0, GENERATED, 0): DECODE_SHORT, (0, GENERATED, DEPTH): DECODE_LONG}
    figures = dict.fromkeys(names.values(), 0.0)
    for flash in LLAMA_FLASH:
        tests = json.loads(run([
            program, "-m", str(model), "-t", str(threads), "-p", str(ROWS), "-n", str(GENERATED),
            "-d", f"0,{DEPTH}", "-fa", flash, "-r", "1", "-o", "json"]))
        for test in tests:
            name = names[test["n_prompt"], test["n_gen"], test["n_depth"]]
            figures[name] = max(figures[name], test["avg_ts"])
    return figures


def resa_figures(program, model, threads):
    """Tokens/s by figure, decoding with its mode; and the roofline's share beside each."""
    # llama-bench decodes from an empty context on: the middle of its stretch.
    contexts = {GENERATED // 2: DECODE_SHORT, DEPTH + GENERATED // 2: DECODE_LONG}
    report = json.loads(run([
        program, "--model", str(model), "--threads", str(threads), "--seconds", "6",
        "--context", ",".join(map(str, contexts)), "--mode", ",".join(MODES),
        "--prefill", f"{ROWS},{ROWS}@{DEPTH}", "--json", "-"]))
    figures, shares = {}, {}
    for result in report["runs"]:
        if result["kind"] == "prefill":
            key = (PREFILL_LONG if result["context"] else PREFILL_SHORT, "dense")
        else:
            key = (contexts[result["context"]], result["mode"])
        figures[key] = result["whole"]["tokens_per_s"]
        shares[key] = result["whole"]["roofline_share"]
    return figures, shares, report


def measure(arguments):
    rounds = []
    for number in range(1, arguments.rounds + 1):
        print(f"==> round {number} of {arguments.rounds}", file=sys.stderr)
        llama = {
            kind: llama_figures(arguments.llama_bench,
                                arguments.models / f"smollm2-135m-{kind}.gguf", arguments.threads)
            for kind in LLAMA_TYPES
        }
        resa, shares, report = resa_figures(
            arguments.resa_bench, arguments.models / "smollm2-135m-bf16.gguf", arguments.threads)
        rounds.append({"llama": llama, "resa": resa, "shares": shares, "report": report})
    return rounds


def compare(rounds):
    """One row per figure and mode: medians of tokens/s, and of each round's ratio to the best."""
    rows = []
    for figure, mode in rounds[0]["resa"]:
        def median(value):
            return statistics.median(value(r) for r in rounds)

        best = [max(r["llama"][kind][figure] for kind in LLAMA_TYPES) for r in rounds]
        row = {"figure": figure, "mode": mode}
        for kind in LLAMA_TYPES:
            row[f"llama_{kind}"] = median(lambda r: r["llama"][kind][figure])
        row["resa"] = median(lambda r: r["resa"][figure, mode])
        row["roofline_share"] = median(lambda r: r["shares"][figure, mode])
        row["ratio"] = statistics.median(
            r["resa"][figure, mode] / b for r, b in zip(rounds, best))
        rows.append(row)
    return rows


def show(rows, rounds, threads):
    ceilings = rounds[-1]["report"]["ceilings"]
    print(f"SmolLM2-135M, {threads} threads, tokens/s, median of {len(rounds)} rounds; "
          f"{rounds[-1]['report']['device']}, read {ceilings['read_bytes_per_s'] / 1e9:.1f} GB/s, "
          f"multiply-add {ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s")
    print(f"{'':28}{'llama.cpp bf16':>15}{'llama.cpp f16':>15}{'resad bf16':>12}"
          f"{'roofline':>10}{'ratio to best':>15}")
    for row in rows:
        name = row["figure"]
        if not name.startswith("prefill"):
            name += f", {row['mode']}"
        print(f"{name:33}{row['llama_bf16']:10.1f}{row['llama_f16']:15.1f}{row['resa']:12.1f}"
              f"{row['roofline_share']:10.0%}{row['ratio']:14.2f}x")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--llama-bench", required=True)
    parser.add_argument("--resa-bench", required=True)
    parser.add_argument("--models", type=pathlib.Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rounds = measure(arguments)
    rows = compare(rounds)
    show(rows, rounds, arguments.threads)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"rows": rows, "reports": [r["report"] for r in rounds]}, file, indent=2)


if __name__ == "__main__":
    main()
