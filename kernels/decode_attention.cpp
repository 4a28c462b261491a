#include "kernels/decode_attention.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/cpu/decode_cpu.hpp"
#include "kernels/decode_support.hpp"
#include "kernels/error.hpp"

namespace annulus {
namespace {

std::int64_t integer(const ConstTensorView& view, std::int64_t i) {
  return static_cast<const std::int32_t*>(view.data)[i];
}

void check_integers(const ConstTensorView& view, const Shape& shape, Device device,
                    std::string_view what) {
  require(view.dtype == DType::i32 && view.shape == shape && view.is_contiguous(),
          ExitCode::bad_data, "decode: {} is {} {}; expected contiguous i32 {}", what,
          name(view.dtype), view.shape.to_string(), shape.to_string());
  require(view.device == device && (view || shape.elements() == 0), ExitCode::bad_data,
          "decode: {} lies on {}; expected on {}", what, name(view.device), name(device));
}

void check_deal(const CacheDeal& deal) {
  require(deal.block > 0 && deal.ranks > 0 && 0 <= deal.rank && deal.rank < deal.ranks,
          ExitCode::usage, "decode: a cache dealt in blocks of {} to {} ranks has no rank {}",
          deal.block, deal.ranks, deal.rank);
}

void check_pages(const ConstTensorView& k, const ConstTensorView& v) {
  require(k.rank() == 4 && v.rank() == 4, ExitCode::bad_data,
          "decode: cache of keys {}, of values {}; expected [pages, page_size, kv_heads, dim]",
          k.shape.to_string(), v.shape.to_string());
  require(k.shape[0] == v.shape[0] && k.shape[1] == v.shape[1] && k.shape[2] == v.shape[2],
          ExitCode::bad_data, "decode: caches of keys {} and values {} differ in pages or heads",
          k.shape.to_string(), v.shape.to_string());
  require(k.shape[1] > 0 && k.shape[2] > 0, ExitCode::bad_data,
          "decode: cache {} has no room for a token", k.shape.to_string());
  require(k.dtype == v.dtype, ExitCode::bad_data, "decode: caches of {} keys and {} values",
          name(k.dtype), name(v.dtype));
}

struct Sequence {
  std::int64_t number = 0;
  std::int64_t rows = 0;
  std::int64_t length = 0;
};

// Offsets and lengths; calls visit(sequence) for every sequence with rows.
template <typename Visit>
void for_each_sequence(const ConstTensorView& query_begin, const ConstTensorView& lengths,
                       std::int64_t tokens, const Visit& visit) {
  const std::int64_t sequences = lengths.shape[0];
  require(integer(query_begin, 0) == 0 && integer(query_begin, sequences) <= tokens,
          ExitCode::bad_data, "decode: query rows begin at {} and end at {} of {}",
          integer(query_begin, 0), integer(query_begin, sequences), tokens);
  for (std::int64_t s = 0; s < sequences; ++s) {
    const std::int64_t rows = integer(query_begin, s + 1) - integer(query_begin, s);
    const std::int64_t length = integer(lengths, s);
    require(rows >= 0 && rows <= length, ExitCode::bad_data,
            "decode: sequence {} has {} query rows and length {}; accepted: 0 to length", s, rows,
            length);
    if (rows > 0) visit(Sequence{s, rows, length});
  }
}

// Whether the pages of a rank's tokens [local.begin, local.end) exist.
void check_table(const ConstTensorView& page_table, const ConstTensorView& k, std::int64_t s,
                 Span local) {
  if (local.empty()) return;
  const std::int64_t max_pages = page_table.shape[1];
  const std::int64_t last = (local.end - 1) / k.shape[1];
  require(last < max_pages, ExitCode::bad_data,
          "decode: sequence {} has {} tokens here, more than {} pages of {}", s, local.end,
          max_pages, k.shape[1]);
  for (std::int64_t i = local.begin / k.shape[1]; i <= last; ++i) {
    const std::int64_t page = integer(page_table, s * max_pages + i);
    require(0 <= page && page < k.shape[0], ExitCode::bad_data,
            "decode: page {} of sequence {} is {}; there are {}", i, s, page, k.shape[0]);
  }
}

void check_contents(const DecodeProblem& problem) {
  for_each_sequence(
      problem.query_begin, problem.lengths, problem.tokens(), [&](const Sequence& sequence) {
        const std::int64_t start = problem.starts ? integer(problem.starts, sequence.number) : 0;
        require(start >= 0, ExitCode::bad_data, "decode: sequence {} starts at {}", sequence.number,
                start);
        const std::int64_t first = sequence.length - sequence.rows;  // position of the first row
        const Span keys = visible_keys(problem, sequence.length - 1, start, sequence.length);
        const std::int64_t begin =
            problem.window_left < 0 ? start : std::max(start, first - problem.window_left);
        if (begin >= keys.end) return;
        check_table(problem.page_table, problem.k, sequence.number,
                    {problem.deal.tokens(begin), problem.deal.tokens(keys.end)});
      });
}

// Writes one row of [tokens, heads, dim] to a page.
void write_row(const ConstTensorView& from, std::int64_t token, const TensorView& to,
               std::int64_t page, std::int64_t row) {
  const ConstTensorView source = from.slice(0, {token, token + 1});
  const TensorView place = to.slice(0, {page, page + 1}).slice(1, {row, row + 1});
  const Shape shape{from.shape[1], from.shape[2]};
  copy(ConstTensorView(source.data, source.dtype, shape, Shape{from.strides[1], from.strides[2]}),
       TensorView(place.data, place.dtype, shape, Shape{to.strides[2], to.strides[3]}));
}

void check_append(const CacheAppend& call) {
  check_deal(call.deal);
  check_pages(call.k, call.v);
  require(call.new_v || call.k.data == call.v.data, ExitCode::bad_data,
          "decode: new keys {} come without values", call.new_k.shape.to_string());
  const auto fits = [&](const ConstTensorView& fresh, const TensorView& cache) {
    return fresh.shape == Shape{call.new_k.shape[0], cache.shape[2], cache.shape[3]};
  };
  require(fits(call.new_k, call.k) && (!call.new_v || fits(call.new_v, call.v)), ExitCode::bad_data,
          "decode: new keys {} and values {} do not fit caches {} and {}",
          call.new_k.shape.to_string(), call.new_v.shape.to_string(), call.k.shape.to_string(),
          call.v.shape.to_string());
  require(call.page_table.rank() == 2, ExitCode::bad_data,
          "decode: page table {}; expected [sequences, pages]", call.page_table.shape.to_string());
  const std::int64_t sequences = call.page_table.shape[0];
  const Device device = call.k.device;
  check_integers(call.page_table, call.page_table.shape, device, "the page table");
  check_integers(call.lengths, Shape{sequences}, device, "lengths");
  check_integers(call.query_begin, Shape{sequences + 1}, device, "query_begin");
}

}  // namespace

Span visible_keys(const DecodeProblem& problem, std::int64_t p, std::int64_t start,
                  std::int64_t length) {
  Span keys{start, length};
  if (problem.causal) keys.end = std::min(keys.end, p + 1);
  if (problem.window_left >= 0) keys.begin = std::max(keys.begin, p - problem.window_left);
  if (problem.window_right >= 0) {
    keys.end = p + 1 + std::min(keys.end - p - 1, problem.window_right);
  }
  return keys.empty() ? Span{} : keys;
}

void validate(const DecodeProblem& problem) {
  require(problem.q.rank() == 3, ExitCode::bad_data,
          "decode: query {}; expected [tokens, heads, head_dim]", problem.q.shape.to_string());
  check_pages(problem.k, problem.v);
  require(problem.k.shape[3] == problem.head_dim(), ExitCode::bad_data,
          "decode: head_dim {} of query, {} of the cache differ", problem.head_dim(),
          problem.k.shape[3]);
  require(problem.q.dtype == problem.k.dtype, ExitCode::bad_data,
          "decode: {} query over a {} cache", name(problem.q.dtype), name(problem.k.dtype));
  require(problem.q_heads() % problem.kv_heads() == 0, ExitCode::bad_data,
          "decode: {} query heads do not group over {} KV heads; accepted: a multiple",
          problem.q_heads(), problem.kv_heads());
  require(!problem.latent() || problem.value_dim() <= problem.head_dim(), ExitCode::bad_data,
          "decode: {} columns of values in {} columns of keys", problem.value_dim(),
          problem.head_dim());
  require(problem.page_table.rank() == 2 && problem.lengths.rank() == 1, ExitCode::bad_data,
          "decode: page table {}, lengths {}; expected [sequences, pages], [sequences]",
          problem.page_table.shape.to_string(), problem.lengths.shape.to_string());
  const std::int64_t sequences = problem.sequences();
  const Device device = problem.q.device;
  check_integers(problem.lengths, Shape{sequences}, device, "lengths");
  check_integers(problem.query_begin, Shape{sequences + 1}, device, "query_begin");
  check_integers(problem.page_table, Shape{sequences, problem.max_pages()}, device,
                 "the page table");
  if (problem.starts) check_integers(problem.starts, Shape{sequences}, device, "starts");
  require(!problem.sinks || (problem.sinks.dtype == DType::f32 &&
                             problem.sinks.shape == Shape{problem.q_heads()}),
          ExitCode::bad_data, "decode: sinks are {} {}; expected f32 [{}]",
          name(problem.sinks.dtype), problem.sinks.shape.to_string(), problem.q_heads());
  require(std::isfinite(problem.scale), ExitCode::usage, "decode: scale {}; accepted: finite",
          problem.scale);
  require(problem.soft_cap >= 0.0F && std::isfinite(problem.soft_cap), ExitCode::usage,
          "decode: soft cap {}; accepted: finite, >= 0", problem.soft_cap);
  require(problem.window_left >= -1 && problem.window_right >= -1, ExitCode::usage,
          "decode: window {},{}; accepted: 0 or more, -1 for unbounded", problem.window_left,
          problem.window_right);
  check_deal(problem.deal);
  if (device == Device::cpu) check_contents(problem);
}

std::span<const DecodeBackend> decode_backends() {
  static const std::vector<DecodeBackend> backends = [] {
    const std::span<const DecodeBackend> device = kernels::cuda::decode_backends();
    std::vector<DecodeBackend> all(device.begin(), device.end());
    all.push_back(
        {"cpu", Device::cpu, kernels::cpu::decode_unsupported, kernels::cpu::decode_forward});
    all.push_back({"reference", Device::cpu, kernels::reference::decode_unsupported,
                   kernels::reference::decode_forward});
    return all;
  }();
  return backends;
}

const DecodeBackend& select_backend(const DecodeProblem& problem, std::string_view name) {
  std::string reasons;
  for (const DecodeBackend& backend : decode_backends()) {
    if (!(name.empty() || backend.name == name) || backend.device != problem.q.device) continue;
    const std::string reason = backend.unsupported(problem);
    if (reason.empty()) return backend;
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", backend.name, reason);
  }
  throw Error(
      ExitCode::usage,
      fmt::format("decode: no backend{}{} for {} tensors{}{}", name.empty() ? "" : " named ", name,
                  annulus::name(problem.q.device), reasons.empty() ? "" : ": ", reasons));
}

void decode_forward(const DecodeCall& call, std::string_view backend) {
  validate(call.problem);
  const Shape& q = call.problem.q.shape;
  const std::int64_t value_dim = call.problem.value_dim();
  require(!call.o || call.o.shape == Shape{q[0], q[1], value_dim}, ExitCode::bad_data,
          "decode: output {} for queries {} and values of {} columns", call.o.shape.to_string(),
          q.to_string(), value_dim);
  require(call.o || call.state.accumulator.shape == Shape{1, q[0], q[1], value_dim},
          ExitCode::internal, "decode: neither an output nor a state of shape [1, {}, {}, {}]",
          q[0], q[1], value_dim);
  const DecodeBackend& chosen = select_backend(call.problem, backend);
  const DType o = call.o ? call.o.dtype : DType::f32;
  require(o == DType::f32 || o == DType::f16 || o == DType::bf16 ||
              (o == DType::f64 && chosen.name == "reference"),
          ExitCode::bad_data, "decode: output of {}; accepted: f32, f16, bf16", name(o));
  chosen.forward(call);
}

void append_to_cache(const CacheAppend& call) {
  check_append(call);
  if (call.k.device == Device::cuda) return kernels::cuda::append_to_cache(call);
  const std::int64_t page_size = call.k.shape[1];
  const auto for_each_new = [&](const auto& visit) {
    for_each_sequence(call.query_begin, call.lengths, call.new_k.shape[0],
                      [&](const Sequence& sequence) {
                        const Span local{call.deal.tokens(sequence.length - sequence.rows),
                                         call.deal.tokens(sequence.length)};
                        visit(sequence, local);
                      });
  };
  for_each_new([&](const Sequence& sequence, Span local) {
    check_table(call.page_table, call.k, sequence.number, local);
  });
  for_each_new([&](const Sequence& sequence, Span local) {
    const std::int64_t first = integer(call.query_begin, sequence.number) - sequence.length +
                               sequence.rows;  // row of position 0
    for (std::int64_t token = local.begin; token < local.end; ++token) {
      const std::int64_t row = first + call.deal.position(token);
      const std::int64_t page =
          integer(call.page_table, sequence.number * call.page_table.shape[1] + token / page_size);
      write_row(call.new_k, row, call.k, page, token % page_size);
      if (call.new_v) write_row(call.new_v, row, call.v, page, token % page_size);
    }
  });
}

}  // namespace annulus
