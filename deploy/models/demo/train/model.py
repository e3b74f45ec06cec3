"""The demo model: a Llama-style decoder (grouped queries, rotary positions, SwiGLU, no biases).

Matrices of the same shape are kept in one stacked parameter, so that the optimizer orthogonalizes
them as one batch: `qo` holds each layer's query and (transposed) output projection, `kv` its key
and value projection, `mlp` its gate, up and (transposed) down projection. Rows flow flat as
[tokens, width]; only attention sees [sequences, heads, length, head_dim]. So one compiled graph
serves every length.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

HEAD_DIM = 64
NORM_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    width: int
    query_heads: int
    kv_heads: int
    mlp_width: int
    vocabulary: int
    rope_theta: float = 5_000_000.0
    positions: int = 32768


def _norm(x, weight):
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight).to(
        torch.bfloat16
    )


def _rotate(x, cos, sin):
    """Rotary embedding on halves, as transformers' Llama does it. x: [tokens, heads, HEAD_DIM]."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(torch.bfloat16)


def before_attention(x, norm, wq, wk, wv, cos, sin):
    """x [tokens, width] (fp32) -> q, k, v [tokens, heads, HEAD_DIM] (bf16)."""
    rows = x.shape[0]
    qkv = _norm(x, norm) @ torch.cat([wq, wk, wv]).t()
    q, k, v = qkv.split([wq.shape[0], wk.shape[0], wv.shape[0]], -1)
    q, k, v = (t.reshape(rows, -1, HEAD_DIM) for t in (q, k, v))
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def after_attention(x, attention, wo_t, norm, gate, up, down_t):
    """Adds the attention's output projection and the MLP to x [tokens, width]."""
    x = x + attention @ wo_t
    h = _norm(x, norm)
    return x + (F.silu(h @ gate.t()) * (h @ up.t())) @ down_t


def weighted_loss(x, norm, head, targets, weights):
    """Weighted mean cross-entropy of the next tokens."""
    logits = (_norm(x, norm) @ head.t()).float()
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()


class DemoModel(torch.nn.Module):
    def __init__(self, shape: Shape, seed: int):
        super().__init__()
        self.shape = s = shape
        random = torch.Generator().manual_seed(seed)

        def matrices(count, rows, columns):
            return torch.randn(count, rows, columns, generator=random) * columns**-0.5

        qo = matrices(2 * s.layers, s.query_heads * HEAD_DIM, s.width)
        qo[1::2] = 0  # output projections start at zero: every layer starts as the identity
        mlp = matrices(3 * s.layers, s.mlp_width, s.width)
        mlp[2::3] = 0
        self.qo = torch.nn.Parameter(qo)
        self.kv = torch.nn.Parameter(matrices(2 * s.layers, s.kv_heads * HEAD_DIM, s.width))
        self.mlp = torch.nn.Parameter(mlp)
        self.embedding = torch.nn.Parameter(torch.randn(s.vocabulary, s.width, generator=random))
        self.head = torch.nn.Parameter(torch.zeros(s.vocabulary, s.width))
        self.norms = torch.nn.Parameter(torch.ones(2 * s.layers + 1, s.width))
        frequency = s.rope_theta ** (-torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)
        angle = torch.arange(s.positions).double()[:, None] * frequency
        self.register_buffer("cos", angle.cos().float()[:, None], persistent=False)
        self.register_buffer("sin", angle.sin().float()[:, None], persistent=False)
        self.before, self.after, self.loss = before_attention, after_attention, weighted_loss
        self.attend = plain_attention

    def compile(self):
        self.before, self.after = torch.compile(before_attention), torch.compile(after_attention)
        self.loss = torch.compile(weighted_loss)

    def hidden(self, tokens, compiled=False):
        """tokens [sequences, length] -> rows [sequences * length, width] before the last norm."""
        n, length = tokens.shape
        before = self.before if compiled else before_attention
        after = self.after if compiled else after_attention
        qo, kv, mlp = (p.to(torch.bfloat16).unbind(0) for p in (self.qo, self.kv, self.mlp))
        norms = self.norms.unbind(0)
        cos, sin = (
            t[:length].expand(n, length, 1, -1).reshape(n * length, 1, -1)
            for t in (self.cos, self.sin)
        )
        x = F.embedding(tokens.reshape(-1), self.embedding)
        for i in range(self.shape.layers):
            q, k, v = before(x, norms[2 * i], qo[2 * i], kv[2 * i], kv[2 * i + 1], cos, sin)
            q, k, v = (t.view(n, length, -1, HEAD_DIM).transpose(1, 2) for t in (q, k, v))
            attention = self.attend(q, k, v).transpose(1, 2).reshape(n * length, -1)
            x = after(x, attention, qo[2 * i + 1], norms[2 * i + 1], *mlp[3 * i : 3 * i + 3])
        return x

    def training_loss(self, tokens, targets, weights):
        x = self.hidden(tokens, compiled=True)
        return self.loss(
            x,
            self.norms[-1],
            self.head.to(torch.bfloat16),
            targets.reshape(-1),
            weights.reshape(-1),
        )

    @torch.no_grad()
    def predictions(self, tokens):
        """The likeliest next token after every prefix of tokens [sequences, length]."""
        x = self.hidden(tokens)
        logits = _norm(x, self.norms[-1]) @ self.head.to(torch.bfloat16).t()
        return logits.argmax(-1).view(tokens.shape)


def plain_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def fastest_attention(shape: Shape, length: int, sequences: int, report):
    """Times the attention kernels at hand, forward and backward; returns the fastest right one."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def candidate(backend, grouped):
        def attend(q, k, v):
            if not grouped:
                group = q.shape[1] // k.shape[1]
                k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)

        return attend

    def inputs(n, length):
        def rows(heads):
            return torch.randn(
                n, length, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16
            ).transpose(1, 2)

        return [
            rows(h).requires_grad_() for h in (shape.query_heads, shape.kv_heads, shape.kv_heads)
        ]

    small, large = inputs(2, 768), inputs(sequences, length)
    expected = F.scaled_dot_product_attention(
        *(t.detach().float() for t in small), is_causal=True, enable_gqa=True
    )
    times = {}
    for name, attend in {
        f"{backend.name.lower()}{' grouped' if grouped else ''}": candidate(backend, grouped)
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
        for grouped in (True, False)
    }.items():
        try:
            error = (attend(*small).float() - expected).norm() / expected.norm()
            if not error < 0.01:
                raise RuntimeError(f"relative error {error:.3g}")
            for attempt in range(3):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(
                    enable_timing=True
                )
                begin.record()
                out = attend(*large)
                out.backward(torch.ones_like(out))
                end.record()
                torch.cuda.synchronize()
            times[name] = (begin.elapsed_time(end), attend)
            report(f"attention {name}: {times[name][0]:.2f} ms at {sequences} x {length}")
        except (RuntimeError, ValueError) as error:
            report(f"attention {name}: not usable ({str(error).splitlines()[0][:100]})")
    return min(times.values(), key=lambda t: t[0])[1] if times else plain_attention
