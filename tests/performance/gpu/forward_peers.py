#!/usr/bin/env python3
"""Times the Hopper forward kernel beside its ceilings and peers on the GPU at hand.

    forward_peers.py LIBRARY [--rounds 12] [--json FILE] [--only SUBSTRING]

LIBRARY is libannulus_gpu_api.so of the build. Ceilings: a bf16 product of 8192^3 (cuBLAS) and a
device copy. Peers: cuDNN through PyTorch, and FlashAttention-4 (package flash-attn-4) where it is
installed. All contenders of a row take turns, round after round, in bursts of several milliseconds,
so that they share the state of the card; a row gives medians, and ratios within the row.
"""
import argparse
import ctypes
import json
import random
import statistics
import sys

import torch
import torch.nn.functional as functional
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    from flash_attn.cute import flash_attn_func as flash_attention_4
except ImportError:
    flash_attention_4 = None

FAR = 1 << 60
POINTER, INT, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class Forward(ctypes.Structure):
    """Mirrors AnnulusForward."""
    _fields_ = ([(name, POINTER) for name in
                 ("q", "k", "v", "o", "lse", "accumulator", "row_max", "row_sum")] +
                [(name, INT) for name in
                 ("batch", "seq_q", "seq_kv", "q_heads", "kv_heads", "head_dim", "value_dim")] +
                [("slices", POINTER), ("slice_count", INT), ("segment_k", POINTER),
                 ("segment_v", POINTER), ("segment_count", INT), ("f16", INT), ("resume", INT),
                 ("chained", INT), ("scale", REAL), ("stream", POINTER)])


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def prepared(library, q, k, v, o, lse, slices, state=(None, None, None), resume=False, parts=(),
             chained=False):
    """A function that launches once; everything it points to stays alive with it. `parts`: pairs
    of keys and values to go through in one launch, each under the same slices."""
    flat = (INT * (6 * len(slices)))(*[bound for piece in slices for bound in piece])
    part_k = (POINTER * max(1, len(parts)))(*[address(part[0]) for part in parts])
    part_v = (POINTER * max(1, len(parts)))(*[address(part[1]) for part in parts])
    args = Forward(address(q), address(k), address(v), address(o), address(lse),
                   *[address(part) for part in state], *q.shape[:2], k.shape[1], q.shape[2],
                   k.shape[2], q.shape[3], v.shape[3], ctypes.addressof(flat), len(slices),
                   ctypes.addressof(part_k) if parts else None,
                   ctypes.addressof(part_v) if parts else None, len(parts), 0,
                   int(resume), int(chained), q.shape[3] ** -0.5,
                   torch.cuda.current_stream().cuda_stream)
    keep = (q, k, v, o, lse, state, flat, parts, part_k, part_v)

    def launch(args=args, keep=keep):
        if library.annulus_forward(ctypes.byref(args)) != 0:
            sys.exit("the kernel refused")
    return launch


def seconds(function, repeats):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(400000)  # the host gets ahead of the device
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats / 1e3


def take_turns(contenders, rounds, burst=0.008):
    times = {name: [] for name in contenders}
    repeats = {}
    for name, function in contenders.items():
        function()
        torch.cuda.synchronize()
        repeats[name] = max(1, int(burst / seconds(function, 2)))
    for _ in range(rounds):
        # What ran just before counts, by up to 4%: everybody gets all places in the order.
        for name, function in random.sample(list(contenders.items()), len(contenders)):
            times[name].append(seconds(function, repeats[name]))
    return {name: statistics.median(of) for name, of in times.items()}


def random_tensors(batch, seq, heads, kv_heads, dim, value_dim):
    options = dict(device="cuda", dtype=torch.bfloat16)
    return (torch.randn(batch, seq, heads, dim, **options),
            torch.randn(batch, seq, kv_heads, dim, **options),
            torch.randn(batch, seq, kv_heads, value_dim, **options))


def outputs(q, v):
    return (torch.empty(*q.shape[:3], v.shape[3], device="cuda", dtype=q.dtype),
            torch.empty(q.shape[0], q.shape[2], q.shape[1], device="cuda"))


def area(slices):
    """Kept pairs."""
    kept = 0
    for q0, q1, k0, k1, lo, hi in slices:
        q = torch.arange(q0, q1)
        kept += int((torch.clamp(q + hi + 1, k0, k1) - torch.clamp(q + lo, k0, k1)).clamp(0).sum())
    return kept


class Bench:
    def __init__(self, library, rounds, only):
        self.library, self.rounds, self.only, self.rows = library, rounds, only, []
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        self.gemm = lambda: a @ b

    def report(self, name, times, flops, peers=("cudnn", "fa4")):
        rates = {who: work / times[who] / 1e12 for who, work in flops.items()}
        best = max((rates[peer] for peer in peers if peer in rates), default=None)
        row = dict(name=name, tflops={k: round(v, 1) for k, v in rates.items()},
                   of_gemm=round(rates["ours"] / rates["gemm"], 3),
                   of_peer=round(rates["ours"] / best, 3) if best else None)
        self.rows.append(row)
        print(f"{name:28s} " + "  ".join(f"{k} {v:6.1f}" for k, v in rates.items()) +
              f"  of gemm {row['of_gemm']}  of best peer {row['of_peer']}", flush=True)

    def dense(self, dim, seq, causal, value_dim=None, tokens=16384):
        value_dim = value_dim or dim
        name = f"D{dim}{'' if dim == value_dim else f'/{value_dim}'} {'causal' if causal else 'full'} S={seq}"
        if self.only not in name:
            return
        heads = 2048 // dim
        q, k, v = random_tensors(tokens // seq, seq, heads, heads, dim, value_dim)
        o, lse = outputs(q, v)
        flops = 2 * tokens * heads * seq * (dim + value_dim) / (2 if causal else 1)
        slices = [(0, seq, 0, seq, -FAR, 0 if causal else FAR)]
        contenders = dict(gemm=self.gemm, ours=prepared(self.library, q, k, v, o, lse, slices))
        if dim == value_dim:
            views = [x.transpose(1, 2) for x in (q, k, v)]

            def cudnn():
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    functional.scaled_dot_product_attention(*views, is_causal=causal)
            contenders["cudnn"] = cudnn
            if flash_attention_4 and dim in (64, 128, 256):
                contenders["fa4"] = lambda: flash_attention_4(q, k, v, causal=causal)
        times = take_turns(contenders, self.rounds)
        self.report(name, times, {who: 2 * 8192 ** 3 if who == "gemm" else flops for who in times})

    def sparse(self, name, seq, slices, dim=128, heads=4):
        """Against the causal rate of the same tensors, a kept pair."""
        if self.only not in name:
            return
        q, k, v = random_tensors(1, seq, heads, heads, dim, dim)
        o, lse = outputs(q, v)
        causal = [(0, seq, 0, seq, -FAR, 0)]
        times = take_turns(dict(gemm=self.gemm,
                                ours=prepared(self.library, q, k, v, o, lse, slices),
                                causal=prepared(self.library, q, k, v, o, lse, causal)),
                           self.rounds)
        self.report(name, times, dict(gemm=2 * 8192 ** 3, ours=4 * area(slices) * heads * dim,
                                      causal=4 * area(causal) * heads * dim), peers=("causal",))

    def ring(self, steps=8, part=16384, dim=128, heads=4):
        """A rank's share of a ring: `part` queries over `steps` segments of `part` keys, by one call
        a segment with carried state (ours), by one launch over all, and as one long sequence."""
        name = f"ring {steps} steps of {part // 1024}k"
        if self.only not in name:
            return
        q, k, v = random_tensors(1, part, heads, heads, dim, dim)
        k, v = (torch.randn(1, steps * part, heads, dim, device="cuda", dtype=q.dtype)
                for _ in range(2))
        o, lse = outputs(q, v)
        state = (torch.empty(1, part, heads, dim, device="cuda"),
                 torch.empty(1, heads, part, device="cuda"), torch.empty(1, heads, part, device="cuda"))
        parts = [(k[:, i * part:(i + 1) * part], v[:, i * part:(i + 1) * part])
                 for i in range(steps)]
        slices = [(0, part, 0, part, -FAR, FAR)]
        calls = [prepared(self.library, q, *parts[i], o if i + 1 == steps else None,
                          lse if i + 1 == steps else None, slices, state, i > 0, chained=True)
                 for i in range(steps)]
        times = take_turns(dict(
            gemm=self.gemm, ours=lambda: [call() for call in calls],
            one_launch=prepared(self.library, q, *parts[0], o, lse, slices, parts=parts),
            one_call=prepared(self.library, q, k, v, o, lse,
                              [(0, part, 0, steps * part, -FAR, FAR)])), self.rounds)
        flops = 4 * part * part * steps * heads * dim
        self.report(name, times, {who: 2 * 8192 ** 3 if who == "gemm" else flops for who in times},
                    peers=("one_call",))

    def copy(self):
        source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        time = take_turns(dict(copy=lambda: target.copy_(source)), self.rounds)["copy"]
        print(f"copy {2 * source.numel() / time / 1e9:.0f} GB/s, read and written", flush=True)


def run_bench(make, measure, peer, doc, rounds):
    """What the scripts beside this one share: their arguments, what ran, and the rows as JSON."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("library")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    bench = make(ctypes.CDLL(options.library), options.rounds, options.only)
    print(f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}, "
          f"FlashAttention-4 {'there' if peer else 'absent'}", flush=True)
    measure(bench)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(bench.rows, file, indent=1)


def measure(bench):
    bench.copy()
    for dim in (128, 64, 256, 96, 192):
        for seq in (16384, 4096, 1024):
            for causal in (True, False):
                bench.dense(dim, seq, causal)
    bench.dense(192, 16384, True, value_dim=128)
    bench.sparse("window 4096 of 64k", 65536, [(0, 65536, 0, 65536, -4095, 0)])
    bench.sparse("32 documents of 2k", 65536,
                 [(i * 2048, i * 2048 + 2048, i * 2048, i * 2048 + 2048, -FAR, 0)
                  for i in range(32)])
    bench.ring()


if __name__ == "__main__":
    run_bench(Bench, measure, flash_attention_4, __doc__, rounds=12)
