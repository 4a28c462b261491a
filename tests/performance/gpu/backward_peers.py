#!/usr/bin/env python3
"""Times the Hopper backward kernel beside its ceiling and peers on the GPU at hand.

    backward_peers.py LIBRARY [--rounds 9] [--json FILE] [--only SUBSTRING]

LIBRARY is libannulus_gpu_api.so of the build. Ceiling: a bf16 product of 8192^3 (cuBLAS). Peers:
cuDNN's backward through PyTorch, and FlashAttention-4 (package flash-attn-4) where it is installed.
"ours" is the kernel with delta before it, which adds to fp32 gradients; "fresh" clears dQ first and
overwrites dK and dV, which makes all that the peers make.
All contenders of a row take turns as in forward_peers.py, which has what the scripts share; a row
gives medians.
"""
import ctypes
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import forward_peers
from forward_peers import (FAR, INT, POINTER, REAL, address, outputs, prepared, random_tensors,
                           take_turns)

try:
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
except ImportError:
    _flash_attn_bwd = None


class Backward(ctypes.Structure):
    """Mirrors AnnulusBackward."""
    _fields_ = ([(name, POINTER) for name in ("q", "k", "v", "o", "grad_o", "lse", "delta",
                                              "grad_q", "grad_k", "grad_v")] +
                [(name, INT) for name in ("batch", "seq_q", "seq_kv", "q_heads", "kv_heads",
                                          "head_dim", "value_dim")] +
                [("slices", POINTER), ("slice_count", INT), ("f16", INT), ("deterministic", INT),
                 ("overwrites_kv", INT), ("scale", REAL), ("stream", POINTER)])


def gradients(library, q, k, v, o, lse, grad_o, causal, deterministic=False, fresh=False):
    """A function that launches once."""
    seq_q, seq_kv = q.shape[1], k.shape[1]
    slices = (INT * 6)(0, seq_q, 0, seq_kv, -FAR, seq_kv - seq_q if causal else FAR)
    delta = torch.empty_like(lse)
    grads = [torch.zeros(x.shape, device="cuda") for x in (q, k, v)]
    args = Backward(*[address(x) for x in (q, k, v, o, grad_o, lse, delta, *grads)], q.shape[0],
                    seq_q, seq_kv, q.shape[2], k.shape[2], q.shape[3], v.shape[3],
                    ctypes.addressof(slices), 1, 0, int(deterministic), int(fresh),
                    q.shape[3] ** -0.5, torch.cuda.current_stream().cuda_stream)

    def launch(args=args, keep=(q, k, v, o, lse, grad_o, slices, delta, grads)):
        if fresh:
            grads[0].zero_()
        if library.annulus_backward(ctypes.byref(args)) != 0:
            sys.exit("the kernel refused")
    return launch


def cudnn_backward(q, k, v, grad_o, causal):
    leaves = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    grad = grad_o.transpose(1, 2)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


class Bench(forward_peers.Bench):
    def forward(self, dim, seq, causal, tokens):
        heads = 2048 // dim
        q, k, v = random_tensors(tokens // seq, seq, heads, heads, dim, dim)
        o, lse = outputs(q, v)
        prepared(self.library, q, k, v, o, lse,
                 [(0, seq, 0, seq, -FAR, 0 if causal else FAR)])()
        return q, k, v, o, lse, torch.randn_like(o)

    def compare(self, name, contenders, flops):
        times = take_turns(contenders, self.rounds)
        self.report(name, times, {who: 2 * 8192 ** 3 if who == "gemm" else flops for who in times})

    def dense(self, dim, seq, causal, tokens=16384):
        name = f"D{dim} {'causal' if causal else 'full'} S={seq}"
        if self.only not in name:
            return
        q, k, v, o, lse, grad_o = self.forward(dim, seq, causal, tokens)
        tensors = (self.library, q, k, v, o, lse, grad_o, causal)
        contenders = dict(gemm=self.gemm, ours=gradients(*tensors),
                          fresh=gradients(*tensors, fresh=True),
                          cudnn=cudnn_backward(q, k, v, grad_o, causal))
        if _flash_attn_bwd and dim in (64, 128, 256):
            fa_o, fa_lse = _flash_attn_fwd(q, k, v, causal=causal, return_lse=True)[:2]
            contenders["fa4"] = lambda: _flash_attn_bwd(q, k, v, fa_o, grad_o, fa_lse,
                                                        causal=causal)
        self.compare(name, contenders, 5 * q.shape[0] * q.shape[2] * seq * seq * 2 * dim /
                    (2 if causal else 1))

    def deterministic(self, dim=128, seq=8192, tokens=16384):
        name = f"deterministic D{dim} causal S={seq}"
        if self.only not in name:
            return
        q, k, v, o, lse, grad_o = self.forward(dim, seq, True, tokens)
        free = gradients(self.library, q, k, v, o, lse, grad_o, True)
        ordered = gradients(self.library, q, k, v, o, lse, grad_o, True, True)
        self.compare(name, dict(gemm=self.gemm, free=free, ours=ordered),
                    5 * q.shape[0] * q.shape[2] * seq * seq * dim)


def measure(bench):
    for dim in (128, 64, 256):
        for seq in (16384, 4096, 1024):
            for causal in (True, False):
                bench.dense(dim, seq, causal)
    bench.deterministic()


if __name__ == "__main__":
    forward_peers.run_bench(Bench, measure, _flash_attn_bwd, __doc__, rounds=9)
