#!/usr/bin/env python3
"""Writes evaluation prompts of the demo model with their right answers, one JSON object a line.

  tests/quality/make_prompts.py --task recall --length 16384 --samples 200 > recall.jsonl

Fields: task, kind, seed, index, prompt, answer (texts), prompt_tokens (with <|bos|>), answer_tokens
(without <|eos|>), max_tokens (what a request should allow); with --token-ids also prompt_ids and
answer_ids. The same arguments always give the same lines. Needs numpy.
"""

import argparse
import json
import sys

import demo_tasks


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    demo_tasks.add_arguments(parser)
    parser.add_argument("--token-ids", action="store_true", help="write token ids as well")
    options = parser.parse_args()
    drawn = demo_tasks.samples(
        options.task, options.samples, options.seed, options.length, options.steps, options.kind
    )
    for index, sample in enumerate(drawn):
        line = {
            "task": sample.task,
            "kind": sample.kind,
            "seed": options.seed,
            "index": index,
            "prompt_tokens": len(sample.prompt),
            "answer_tokens": len(sample.answer) - 1,
            "max_tokens": len(sample.answer) + demo_tasks.SLACK_TOKENS,
            "prompt": demo_tasks.prompt_text(sample),
            "answer": demo_tasks.answer_text(sample),
        }
        if options.token_ids:
            line |= {"prompt_ids": sample.prompt.tolist(), "answer_ids": sample.answer.tolist()}
        json.dump(line, sys.stdout)
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
