#!/usr/bin/env python3
"""Runs prompts through resactl, shows the text as it comes and says what happened. Used by
quickstart.sh; needs nothing but Python's standard library."""

import argparse
import json
import os
import subprocess
import sys
import time

MODES = ("rectified", "sparse", "dense")


def duration_s(text):
    return float(text.rstrip("s")) if text else 0.0


class Run:
    """One generation: its text and the daemon's own account of it."""

    def __init__(self, resactl, server, prompt, max_tokens, mode, chat, show):
        command = [resactl, "generate", "--json", "--server", server, "--file", "-",
                   "--temperature", "0", "--max-tokens", str(max_tokens), "--mode", mode]
        if chat:
            command.append("--chat")
        self.text = ""
        self.finished = None
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   text=True)
        process.stdin.write(prompt)
        process.stdin.close()
        for line in process.stdout:
            event = json.loads(line)
            if "delta" in event:
                piece = event["delta"].get("text", "")
                self.text += piece
                if show:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
            elif "finished" in event:
                self.finished = event["finished"]
        if process.wait() != 0 or self.finished is None:
            sys.exit("error: resactl failed; see its message above and the daemon's log")

    def usage(self, name):
        return int(self.finished["usage"].get(name, 0))

    def attention(self, name):
        return int(self.finished.get("attention", {}).get(name, 0))

    @property
    def kept(self):
        return float(self.finished.get("attention", {}).get("kept_block_ratio", 1.0))

    @property
    def first_token_s(self):
        return duration_s(self.finished["timings"]["first_token"])

    @property
    def tokens_per_s(self):
        decode = duration_s(self.finished["timings"]["decode"])
        return (self.usage("output_tokens") - 1) / decode if decode > 0 else float("nan")


def document_prompt(paths, characters):
    """A long text for a chat model, and what to do with it."""
    text = ""
    for path in paths:
        with open(path, encoding="utf-8") as file:
            text += file.read()
    return text[:characters] + "\n\nSummarize the text above in a few sentences."


def prompts_of(arguments):
    """(title, prompt, max_tokens, chat, is_right) for each thing to show. is_right is None where
    there is no one right answer; dense attention is then the measure."""
    if arguments.document:
        prompt = document_prompt(arguments.document, 16000)
        yield "a chat about a long text", prompt, 160, True, None
    for path in arguments.example:
        with open(path, encoding="utf-8") as file:
            example = json.load(file)
        answer = example["answer"].strip()
        yield (f'{example["task"]}, {example["prompt_tokens"]} prompt tokens', example["prompt"],
               example["max_tokens"], False, lambda text, answer=answer: text.strip() == answer)


def verdict_of(run, dense, is_right):
    if is_right is not None:
        return "right" if is_right(run.text) else "wrong"
    same = len(os.path.commonprefix([run.text, dense.text]))
    return "as dense" if run.text == dense.text else f"as dense to char {same} of {len(dense.text)}"


def show(arguments, title, prompt, max_tokens, chat, is_right):
    print(f"\n--- {title}: the prompt ends with")
    print("    " + "\n    ".join(prompt.strip().splitlines()[-3:])[-600:])
    print("--- the daemon reads the prompt, then answers (ReSA):", flush=True)
    runs = {}
    for mode in MODES:
        runs[mode] = Run(arguments.resactl, arguments.server, prompt, max_tokens, mode, chat,
                         show=mode == "rectified")
        if mode == "rectified":
            print("\n--- the same prompt, sparse without rectification and dense ...", flush=True)
    run = runs["rectified"]
    print(f'{run.usage("prompt_tokens")} prompt tokens, {run.usage("output_tokens")} output tokens, '
          f'{run.attention("sparse_steps")} sparse steps that read {100 * run.kept:.1f}% of the blocks, '
          f'{run.attention("rectifications")} rectifications of '
          f'{run.attention("rectified_tokens")} tokens')
    print(f'{"":10} {"first token":>12} {"decoding":>18} {"against dense":>14}  answer')
    for mode in MODES:
        run = runs[mode]
        name = {"rectified": "ReSA"}.get(mode, mode)
        print(f'{name:10} {run.first_token_s:>10.2f} s {run.tokens_per_s:>9.1f} tokens/s '
              f'{run.tokens_per_s / runs["dense"].tokens_per_s:>13.2f}x  '
              f'{verdict_of(run, runs["dense"], is_right)}')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resactl", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--document", nargs="*", default=[],
                        help="text files for a chat model to summarize")
    parser.add_argument("example", nargs="*", help="a JSON file with prompt, answer, max_tokens")
    arguments = parser.parse_args()
    started = time.monotonic()
    for item in prompts_of(arguments):
        show(arguments, *item)
    print(f"\n({time.monotonic() - started:.0f} s; timings of a busy or small machine vary.)")


if __name__ == "__main__":
    main()
