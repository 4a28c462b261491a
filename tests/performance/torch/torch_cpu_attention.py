"""PyTorch's CPU attention and annulus on the same tensors, in turn.

    python3 -m venv venv && venv/bin/pip install torch
    taskset -c 0 venv/bin/python tests/performance/torch/torch_cpu_attention.py \
        build/libannulus_attention_c.so
"""
import ctypes
import itertools
import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS = 8
THREADS = 1
REPEATS = 7


def pointer(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


class Annulus:
    """Tensors [1, seq, heads, head_dim], as PyTorch sees them after a transpose."""

    def __init__(self, library):
        self.library = ctypes.CDLL(library)

    def forward(self, q, k, v, o, lse, causal):
        sizes = [ctypes.c_int64(n) for n in q.shape[1:]]
        args = [pointer(t) for t in (q, k, v, o, lse)]
        assert self.library.annulus_forward(*args, *sizes, int(causal), int(q.dtype == torch.bfloat16)) == 0

    def backward(self, q, k, v, o, grad_o, lse, delta, grads, causal):
        sizes = [ctypes.c_int64(n) for n in q.shape[1:]]
        args = [pointer(t) for t in (q, k, v, o, grad_o, lse, delta, *grads)]
        assert self.library.annulus_backward(*args, *sizes, int(causal), int(q.dtype == torch.bfloat16)) == 0


def seconds(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(first, second):
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(REPEATS)]
    return [statistics.median(times) for times in zip(*pairs)]


def compare(annulus, dtype, seq, head_dim, causal):
    shape = (1, seq, HEADS, head_dim)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    grad_o = torch.randn(shape).to(dtype)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    o = torch.empty(shape, dtype=dtype)
    lse = torch.empty(1, HEADS, seq)
    delta = torch.empty(1, HEADS, seq)
    grads = [torch.zeros(shape) for _ in range(3)]

    def torch_forward():
        with torch.no_grad():
            return scaled_dot_product_attention(*heads_first, is_causal=causal)

    def annulus_forward():
        annulus.forward(q, k, v, o, lse, causal)

    theirs, ours = in_turn(torch_forward, annulus_forward)
    difference = (torch_forward().transpose(1, 2) - o).abs().max().item()
    assert difference < (1e-4 if dtype == torch.float32 else 0.05), difference
    yield "forward", theirs, ours

    result = scaled_dot_product_attention(*heads_first, is_causal=causal)

    def torch_backward():
        return torch.autograd.grad(result, (q, k, v), grad_o.transpose(1, 2), retain_graph=True)

    def annulus_backward():
        annulus.backward(q, k, v, o, grad_o, lse, delta, grads, causal)

    theirs, ours = in_turn(torch_backward, annulus_backward)
    for grad in grads:
        grad.zero_()
    annulus_backward()
    for mine, torchs in zip(grads, torch_backward()):
        difference = (mine - torchs).abs().max().item()
        assert difference < (1e-3 if dtype == torch.float32 else 0.2), difference
    yield "backward", theirs, ours


def main():
    torch.set_num_threads(THREADS)
    annulus = Annulus(sys.argv[1])
    print(f"torch {torch.__version__}, {THREADS} thread, B=1 H={HEADS}")
    dtypes = [torch.float32, torch.bfloat16]
    for dtype, head_dim, causal in itertools.product(dtypes, (128, 64), (False, True)):
        for direction, theirs, ours in compare(annulus, dtype, 4096, head_dim, causal):
            print(f"{dtype} S=4096 D={head_dim} {'causal' if causal else 'full':6} {direction:8} "
                  f"torch {theirs * 1e3:7.1f} ms, annulus {ours * 1e3:7.1f} ms: "
                  f"{theirs / ours:.2f}x", flush=True)


if __name__ == "__main__":
    main()
