"""Trains the demo model on one GPU and writes it as a Hugging Face directory, with its log.

  python train.py --seconds 450 --out OUT

Sequences grow in stages. The schedule (stage, learning rate) follows the share of --seconds that
has passed, or with --steps the share of a stage's steps, as train.log gives them. Batch k of stage
s depends on (--seed, s, k) only. Two runs still differ in rounding, and so in weights.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import math
import pathlib
import time

import numpy as np
import torch

import export
import model
import tasks

SHAPES = {  # "a" is shipped; "b" halves the cost of attention; "tiny" tries the program on a CPU
    "a": dict(layers=6, width=384, query_heads=6, kv_heads=2, mlp_width=1024),
    "b": dict(layers=4, width=384, query_heads=4, kv_heads=2, mlp_width=1024),
    "tiny": dict(layers=2, width=128, query_heads=2, kv_heads=1, mlp_width=256),
}
TOKENS_PER_STEP = 67_584  # a multiple of every stage's length
# (length, share of the time)
STAGES = ((768, 0.10), (2048, 0.14), (4224, 0.16), (8448, 0.28), (16896, 0.32))
PROMPT_WEIGHT = 0.02  # of the loss, beside 1 for answers
MATRIX_MOMENTUM = 0.95
WARMUP_SHARE = 0.01
LOG_SECONDS = 30


class Batches(torch.utils.data.IterableDataset):
    """Endless training batches of one stage; each loader worker makes every n-th."""

    def __init__(self, seed, stage, length, sequences):
        self.seed, self.stage, self.length, self.sequences = seed, stage, length, sequences

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for k in itertools.count(first, step):
            yield self.batch(k)

    def batch(self, k):
        rng = np.random.default_rng([self.seed, self.stage, k])
        tokens = np.empty((self.sequences, self.length + 1), np.int16)
        answer = np.empty((self.sequences, self.length + 1), np.uint8)
        for i in range(self.sequences):
            tokens[i], answer[i] = tasks.pack(rng, self.length + 1)
        return torch.from_numpy(tokens), torch.from_numpy(answer)


class Muon:
    """Momentum, orthogonalized by five Newton-Schulz steps.

    parameters: stacks of hidden matrices [count, rows, columns], each with a flag per matrix that
    says whether it is stored transposed.
    """

    def __init__(self, parameters):
        self.state = []
        for p, transposed in parameters:
            rows, columns = p.shape[1:]
            scale = torch.tensor(
                [max(1.0, columns / rows if t else rows / columns) ** 0.5 for t in transposed]
            )
            self.state.append((p, torch.zeros_like(p), scale.to(p.device).view(-1, 1, 1)))

    @torch.no_grad()
    def step(self, rate):
        for p, momentum, scale in self.state:
            momentum.lerp_(p.grad, 1 - MATRIX_MOMENTUM)
            update = orthogonalize(p.grad.lerp(momentum, MATRIX_MOMENTUM))
            p.sub_(update.float() * scale, alpha=rate)


def orthogonalize(g):
    """Brings the singular values of each matrix near 1 (quintic Newton-Schulz)."""
    x = g.bfloat16()
    if tall := g.shape[-2] > g.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x


def wrong_tokens(net, samples, device, tokens_per_pass=TOKENS_PER_STEP):
    """How many answer tokens of each sample are not the likeliest after the prompt and the right
    answer tokens before them.

    Greedy decoding gives the exact answer if and only if there are none, so one pass over prompt
    and answer tells, without a generation loop.
    """
    wrong = []
    length = max(len(s.prompt) + len(s.answer) for s in samples) - 1
    group = max(1, tokens_per_pass // length)
    for begin in range(0, len(samples), group):
        part = samples[begin : begin + group]
        tokens = np.full((len(part), length + 1), tasks.PAD, np.int64)
        for i, s in enumerate(part):
            tokens[i, : len(s.prompt) + len(s.answer)] = np.concatenate([s.prompt, s.answer])
        predicted = net.predictions(torch.from_numpy(tokens[:, :-1]).to(device)).cpu().numpy()
        for row, s in zip(predicted, part):
            at = len(s.prompt) - 1
            wrong.append(int((row[at : at + len(s.answer)] != s.answer).sum()))
    return np.array(wrong)


def interval(right):
    """Share and 95 % Wilson interval."""
    n, p, z = len(right), float(np.mean(right)), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p, (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def summary(wrong, samples):
    tokens = 1 - wrong.sum() / sum(len(s.answer) for s in samples)
    return f"{np.mean(wrong == 0):.2f} (tokens {tokens:.4f})"


def kinds_summary(wrong):
    return " ".join(
        f"{kind} {np.mean(wrong[k::len(tasks.KINDS)] == 0):.2f}"
        for k, kind in enumerate(tasks.KINDS)
    )


def quick_check(net, length, device):
    """Exact shares on a few held-out samples that fit the stage's length."""
    recall = [tasks.recall_sample(1, i, length - 192) for i in range(40)]
    wrong = wrong_tokens(net, recall, device)
    steps = min(100, (length - 9) // tasks.LEDGER_TOKENS_PER_STEP)
    ledger = [tasks.ledger_sample(1, i, steps) for i in range(32)]
    return (
        f"recall {length - 192}: {summary(wrong, recall)} {kinds_summary(wrong)} | "
        f"ledger {steps}: {summary(wrong_tokens(net, ledger, device), ledger)}"
    )


def final_check(net, device, say, lengths, steps, count):
    for length in lengths:
        wrong = wrong_tokens(net, [tasks.recall_sample(2, i, length) for i in range(count)], device)
        p, low, high = interval(wrong == 0)
        say(
            f"final recall {length}: {p:.3f} [{low:.3f}, {high:.3f}] of {count}  "
            f"{kinds_summary(wrong)}"
        )
    for n in steps:
        wrong = wrong_tokens(net, [tasks.ledger_sample(2, i, n) for i in range(count)], device)
        p, low, high = interval(wrong == 0)
        say(f"final ledger {n} steps ({23 * n} tokens): {p:.3f} [{low:.3f}, {high:.3f}] of {count}")


class Schedule:
    """Where training stands: stage and learning-rate factor from the time or the steps spent."""

    def __init__(self, seconds, steps, decay_share):
        self.seconds, self.steps, self.decay_share, self.begin = seconds, steps, decay_share, None
        self.ends = list(itertools.accumulate(share for _, share in STAGES))

    def start(self):
        self.begin = time.monotonic()

    def progress(self, stage, step):
        if self.steps is None:
            return (time.monotonic() - self.begin) / self.seconds
        return self.ends[stage] - STAGES[stage][1] * (1 - step / self.steps[stage])

    def factor(self, progress):
        return min(
            1.0, max(progress, 1e-4) / WARMUP_SHARE, max(0.0, 1.0 - progress) / self.decay_share
        )


def train_stage(net, optimizers, schedule, stage, options, device, say):
    length, sequences = STAGES[stage][0], options.tokens_per_step // STAGES[stage][0]
    loader = torch.utils.data.DataLoader(
        Batches(options.seed, stage, length, sequences),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
        pin_memory=device == "cuda",
    )
    muon, adam = optimizers
    losses, tick, tick_step = collections.deque(maxlen=50), time.monotonic(), 0
    for step, (tokens, answer) in enumerate(loader):
        progress = schedule.progress(stage, step)
        if progress >= schedule.ends[stage]:
            break
        tokens = tokens.to(device, non_blocking=True).long()
        answer = answer.to(device, non_blocking=True)
        weights = torch.where(answer[:, 1:] > 0, 1.0, PROMPT_WEIGHT) * (tokens[:, 1:] != tasks.PAD)
        loss = net.training_loss(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), weights)
        loss.backward()
        factor = schedule.factor(progress)
        muon.step(options.matrix_rate * factor)
        for group in adam.param_groups:
            group["lr"] = options.other_rate * factor
        adam.step()
        net.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if time.monotonic() - tick > options.log_seconds:
            mean = torch.stack(tuple(losses)).mean().item()
            rate = (step - tick_step) * options.tokens_per_step / (time.monotonic() - tick)
            say(
                f"{progress:6.1%} length {length} step {step} loss {mean:.4f} "
                f"{rate / 1e6:.2f} Mtok/s | " + quick_check(net, length, device)
            )
            tick, tick_step = time.monotonic(), step
    say(f"stage {stage} done: length {length}, {step} steps of {options.tokens_per_step} tokens")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="a")
    parser.add_argument(
        "--seconds", type=float, default=450, help="training time, start-up and checks aside"
    )
    parser.add_argument(
        "--steps", type=int, nargs=len(STAGES), help="steps per stage in place of --seconds"
    )
    parser.add_argument(
        "--matrix-rate", type=float, default=0.01, help="peak learning rate of the hidden matrices"
    )
    parser.add_argument(
        "--other-rate", type=float, default=1e-3, help="peak rate of embedding, head and norms"
    )
    parser.add_argument(
        "--decay-share", type=float, default=0.8, help="last share of training in which rates fall"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory to write")
    parser.add_argument("--workers", type=int, default=13, help="processes that make batches")
    parser.add_argument("--tokens-per-step", type=int, default=TOKENS_PER_STEP)
    parser.add_argument("--final-samples", type=int, default=200)
    parser.add_argument("--final-lengths", type=int, nargs="*", default=[4096, 16384, 20480])
    parser.add_argument("--final-ledgers", type=int, nargs="*", default=[50, 100, 200])
    parser.add_argument("--log-seconds", type=float, default=LOG_SECONDS)
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    log, begin = open(options.out / "train.log", "w"), time.monotonic()

    def say(line):
        line = f"[{time.monotonic() - begin:6.1f}s] {line}"
        print(line, flush=True)
        print(line, file=log, flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model.Shape(vocabulary=export.padded_vocabulary(), **SHAPES[options.shape])
    net = model.DemoModel(shape, options.seed).to(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    say(" ".join(f"{key}={value}" for key, value in vars(options).items()))
    say(
        f"{shape}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, "
        f"seed {options.seed}, torch {torch.__version__}, {name}"
    )
    if device == "cuda":
        net.attend = model.fastest_attention(
            shape, STAGES[-1][0], options.tokens_per_step // STAGES[-1][0], say
        )
    net.compile()
    layers = shape.layers
    muon = Muon(
        [
            (net.qo, [False, True] * layers),
            (net.kv, [False, False] * layers),
            (net.mlp, [False, False, True] * layers),
        ]
    )
    adam = torch.optim.AdamW(
        [net.embedding, net.head, net.norms],
        lr=options.other_rate,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=device == "cuda",
    )

    tokens, answer = (
        torch.zeros(options.tokens_per_step // STAGES[0][0], STAGES[0][0], dtype=t, device=device)
        for t in (torch.long, torch.float)
    )
    net.training_loss(tokens, tokens, answer + 1).backward()  # compiles before the clock starts
    net.zero_grad(set_to_none=True)
    say("compiled")

    schedule = Schedule(options.seconds, options.steps, options.decay_share)
    schedule.start()
    for stage in range(len(STAGES)):
        train_stage(net, (muon, adam), schedule, stage, options, device, say)
    export.write(net, options.out)
    say("weights written")
    export.round_to_bf16(net)
    final_check(
        net, device, say, options.final_lengths, options.final_ledgers, options.final_samples
    )
    say("done")


if __name__ == "__main__":
    main()
