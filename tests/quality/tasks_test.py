#!/usr/bin/env python3
"""Tests of the demo model's task generators: answers are worked out again from the text alone.

tests/quality/run.sh tasks_test.py
"""

import json
import pathlib
import re
import unittest

import numpy as np

import demo_tasks
from demo_tasks import tasks

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "deploy" / "models" / "demo" / "examples"


def solve_recall(prompt):
    """The answer to a recall prompt, from its text."""
    body, question = prompt.split("Question: ")
    values = {}
    for key, value in re.findall(r"^The (\w+ of .*) is(?: now)? (\d{5})\.$", body, re.M):
        values[key] = value
    asked = question.removesuffix("?\nAnswer:\n").split(", ")
    keys = [key.removeprefix("the ") for key in asked]
    return "".join(f"The {key} is {values[key]}.\n" for key in keys)


def solve_ledger(prompt):
    """The answer to a ledger prompt, from its text."""
    start = int(re.search(r"^001: start with (\d{3})\.$", prompt, re.M).group(1))
    results, lines = {1: start}, [f"001: start with {start:03}, makes {start:03}.\n"]
    for match in re.finditer(r"^(\d{3}): take (\d{3}), add (\d{3})\.$", prompt, re.M):
        step, source, addend = map(int, match.groups())
        results[step] = (results[source] + addend) % 1000
        lines.append(
            f"{step:03}: {source:03} has {results[source]:03}, add {addend:03}, "
            f"makes {results[step]:03}.\n"
        )
    return "".join(lines) + f"Result: {results[max(results)]:03}.\n"


class TasksTest(unittest.TestCase):
    def test_recall_answers_are_what_the_text_says(self):
        for length in (256, 1000, 4096):
            for kind in tasks.KINDS:
                for index in range(20):
                    sample = tasks.recall_sample(7, index, length, kind)
                    with self.subTest(length=length, kind=kind, index=index):
                        text = demo_tasks.prompt_text(sample)
                        self.assertEqual(solve_recall(text), demo_tasks.answer_text(sample))
                        self.assertLessEqual(len(sample.prompt), length)

    def test_recall_fills_the_length(self):
        for kind in tasks.KINDS:
            sample = tasks.recall_sample(7, 0, 16384, kind)
            facts = len(re.findall(r" is(?: now)? \d", demo_tasks.prompt_text(sample)))
            self.assertGreater(len(sample.prompt), 16384 - 64, kind)
            self.assertGreater(facts, 500, kind)

    def test_updates_and_lookalikes_are_there(self):
        updates = demo_tasks.prompt_text(tasks.recall_sample(7, 0, 4096, "update"))
        self.assertIn(" is now ", updates)
        crowded = demo_tasks.prompt_text(tasks.recall_sample(7, 0, 4096, "lookalike"))
        adjectives = set(re.findall(r"^The \w+ of the (\w+) \w+ is", crowded, re.M))
        facts = len(re.findall(r"^The \w+ of the ", crowded, re.M))
        self.assertGreater(facts / len(adjectives), 5)

    def test_ledger_answers_are_what_the_text_says(self):
        for steps in (2, 3, 60, 300):
            for index in range(10):
                sample = tasks.ledger_sample(7, index, steps)
                with self.subTest(steps=steps, index=index):
                    text = demo_tasks.prompt_text(sample)
                    self.assertEqual(solve_ledger(text), demo_tasks.answer_text(sample))
                    self.assertEqual(len(sample.prompt), 23 + 15 * (steps - 1))

    def test_same_arguments_give_the_same_sample_and_others_another(self):
        one, same, other = (tasks.recall_sample(s, 3, 1024) for s in (1, 1, 2))
        np.testing.assert_array_equal(one.prompt, same.prompt)
        self.assertNotEqual(one.prompt.tolist(), other.prompt.tolist())

    def test_impossible_sizes_are_refused(self):
        with self.assertRaisesRegex(ValueError, "room"):
            tasks.recall_sample(1, 1, 40, "multi")
        with self.assertRaisesRegex(ValueError, "steps"):
            tasks.ledger_sample(1, 1, 1000)

    def test_packed_sequences_are_full_and_mark_whole_answers(self):
        for seed in range(20):
            tokens, answer = tasks.pack(np.random.default_rng(seed), 4096)
            with self.subTest(seed=seed):
                self.assertLess((tokens == tasks.PAD).sum(), 64)
                self.assertEqual(tokens[0], tasks.BOS)
                self.assertFalse(answer[tokens == tasks.BOS].any())
                # Answers end with <|eos|>, and <|eos|> only ends answers.
                ends = np.flatnonzero(answer & ~np.append(answer[1:], False))
                np.testing.assert_array_equal(ends, np.flatnonzero(tokens == tasks.EOS))

    def test_examples_are_what_the_generators_give(self):
        for name, solve in (("recall_16k", solve_recall), ("ledger", solve_ledger)):
            example = json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))
            self.assertEqual(solve(example["prompt"]), example["answer"])
            if example["task"] == "recall":
                sample = tasks.recall_sample(example["seed"], example["index"], 16384)
            else:
                sample = tasks.ledger_sample(example["seed"], example["index"], 60)
            self.assertEqual(demo_tasks.prompt_text(sample), example["prompt"])


if __name__ == "__main__":
    unittest.main()
