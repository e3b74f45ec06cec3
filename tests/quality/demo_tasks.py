"""Finds the demo model's task generators, which live beside its training program."""

import pathlib
import sys

sys.path.insert(
    0, str(pathlib.Path(__file__).resolve().parents[2] / "deploy" / "models" / "demo" / "train")
)
import tasks  # noqa: E402,F401

SLACK_TOKENS = 16  # beyond the answer's length, so that an answer that runs on is seen to be wrong


def samples(task, count, seed, length, steps, kind=None):
    """Evaluation samples 0 to count-1 of a seed. length: prompt tokens (recall); steps: ledger."""
    if task == "recall":
        return [tasks.recall_sample(seed, i, length, kind) for i in range(count)]
    return [tasks.ledger_sample(seed, i, steps) for i in range(count)]


def prompt_text(sample):
    """The prompt as a client writes it: the tokenizer adds <|bos|>."""
    return tasks.render(sample.prompt[1:])


def answer_text(sample):
    """The right answer as the daemon returns it: <|eos|> ends it and is not part of the text."""
    return tasks.render(sample.answer[:-1])


def add_arguments(parser):
    parser.add_argument("--task", choices=("recall", "ledger"), required=True)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=16384, help="recall: tokens of a prompt")
    parser.add_argument(
        "--kind", choices=tasks.KINDS, help="recall: one kind only, not all in turn"
    )
    parser.add_argument(
        "--steps", type=int, default=60, help="ledger: steps; 23 output tokens each"
    )
