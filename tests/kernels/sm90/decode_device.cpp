#include "kernels/sm90/decode_device.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

namespace annulus::testing {
namespace {

constexpr std::int64_t kMarginBytes = 4096;

TensorView host_doubles(std::vector<double>& values, const Shape& shape) {
  return {values.data(), DType::f64, shape};
}

Shape rows_shape(const DecodeCase& of) {
  return {of.options.tokens(), of.options.q_heads, of.options.value_dim};
}

Shape statistics_shape(const DecodeCase& of) { return {of.options.q_heads, of.options.tokens()}; }

}  // namespace

DeviceCopy::DeviceCopy(DType dtype, const Shape& shape)
    : memory_(Device::cuda, shape.elements() * size_bytes(dtype) + 2 * kMarginBytes),
      view_(static_cast<char*>(memory_.data()) + kMarginBytes, dtype, shape, Device::cuda) {
  poison();
}

DeviceCopy::DeviceCopy(const ConstTensorView& host) : DeviceCopy(host.dtype, host.shape) {
  if (host.shape.elements() > 0) copy(host, view_);
}

DeviceCopy DeviceCopy::integers(const std::vector<std::int32_t>& values, const Shape& shape) {
  return DeviceCopy(ConstTensorView(values.data(), DType::i32, shape));
}

std::vector<double> DeviceCopy::values() const {
  std::vector<double> values(static_cast<std::size_t>(view_.shape.elements()));
  if (values.empty()) return values;
  // Through the same dtype: not every device copy converts.
  Buffer same(Device::cpu, view_.shape.elements() * size_bytes(view_.dtype));
  const TensorView dense(same.data(), view_.dtype, view_.shape);
  copy(view_, dense);
  copy(dense, host_doubles(values, view_.shape));
  return values;
}

void DeviceCopy::poison() const { fill_bytes(memory_.data(), Device::cuda, 0xff, memory_.bytes()); }

bool DeviceCopy::margins_intact() const {
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(kMarginBytes));
  const TensorView host(bytes.data(), DType::u8, Shape{kMarginBytes});
  for (const std::int64_t at : {std::int64_t{0}, memory_.bytes() - kMarginBytes}) {
    copy(ConstTensorView(static_cast<char*>(memory_.data()) + at, DType::u8, Shape{kMarginBytes},
                         Device::cuda),
         host);
    for (const std::uint8_t byte : bytes) {
      if (byte != 0xff) return false;
    }
  }
  return true;
}

DeviceDecode::DeviceDecode(const DecodeCase& of, const PagedCache& cache, const CacheDeal& deal,
                           std::int64_t skipped_pages)
    : q_(of.q.view()),
      o_(of.options.dtype, rows_shape(of)),
      lse_(DType::f32, statistics_shape(of)),
      host_table_(cache.page_table) {
  const auto sequences = static_cast<std::int64_t>(cache.lengths.size());
  problem_ = cache.problem(of, deal);
  const auto place = [&](const ConstTensorView& from) {
    Shape shape = from.shape;
    shape[0] += skipped_pages;
    DeviceCopy pages(from.dtype, shape);
    copy(from, pages.view().slice(0, {skipped_pages, shape[0]}));
    return pages;
  };
  k_ = place(cache.k.view());
  problem_.k = k_.view();
  if (of.options.latent) {
    problem_.v = problem_.k.slice(3, {0, of.options.value_dim});
  } else {
    v_ = place(cache.v.view());
    problem_.v = v_.view();
  }
  table_ = DeviceCopy::integers(cache.page_table, Shape{sequences, cache.max_pages});
  lengths_ = DeviceCopy::integers(cache.lengths, Shape{sequences});
  starts_ = DeviceCopy::integers(cache.starts, Shape{sequences});
  query_begin_ = DeviceCopy::integers(cache.query_begin, Shape{sequences + 1});
  problem_.q = q_.view();
  problem_.page_table = table_.view();
  problem_.lengths = lengths_.view();
  problem_.starts = starts_.view();
  problem_.query_begin = query_begin_.view();
  if (of.options.sinks) {
    sinks_ = DeviceCopy(of.sinks.view());
    problem_.sinks = sinks_.view();
  }
}

void DeviceDecode::split_pages(std::int64_t tokens) {
  const std::int64_t parts = problem_.page_size() / tokens;
  const auto split = [&](ConstTensorView& cache) {
    cache.shape[0] *= parts;
    cache.shape[1] = tokens;
    cache.strides[0] /= parts;
  };
  split(problem_.k);
  split(problem_.v);
  std::vector<std::int32_t> table;
  for (const std::int32_t page : host_table_) {
    for (std::int64_t i = 0; i < parts; ++i) {
      table.push_back(static_cast<std::int32_t>(page * parts + i));
    }
  }
  table_ = DeviceCopy::integers(table, Shape{problem_.sequences(), problem_.max_pages() * parts});
  problem_.page_table = table_.view();
}

void DeviceDecode::repeat_page(std::int64_t times) {
  const std::vector<std::int32_t> table(static_cast<std::size_t>(times), host_table_.front());
  table_ = DeviceCopy::integers(table, Shape{1, times});
  problem_.page_table = table_.view();
  set_lengths({static_cast<std::int32_t>(times * problem_.page_size())});
}

void DeviceDecode::set_lengths(const std::vector<std::int32_t>& lengths) {
  copy(ConstTensorView(lengths.data(), DType::i32, lengths_.view().shape), lengths_.view());
}

void DeviceDecode::poison() const {
  o_.poison();
  lse_.poison();
}

void DeviceDecode::run(Stream stream) const {
  decode_forward({problem_, {}, o_.view(), lse_.view(), stream}, "sm90");
}

void DeviceDecode::append(const ConstTensorView& new_k, const ConstTensorView& new_v) const {
  const auto there = [](const ConstTensorView& host) {
    DeviceCopy fresh(host.dtype, host.shape);
    copy(host, fresh.view());
    return fresh;
  };
  const DeviceCopy k = there(new_k);
  const DeviceCopy v = there(new_v);
  append_to_cache({k.view(),
                   v.view(),
                   problem_.query_begin,
                   k_.view(),
                   v_.view(),
                   problem_.page_table,
                   problem_.lengths,
                   problem_.deal,
                   {}});
}

bool DeviceDecode::same_bits(const ConstTensorView& device, const ConstTensorView& host) {
  const std::int64_t bytes = device.shape.elements() * size_bytes(device.dtype);
  const Buffer from_device(Device::cpu, bytes);
  const Buffer from_host(Device::cpu, bytes);
  copy(device, TensorView(from_device.data(), device.dtype, device.shape));
  copy(host, TensorView(from_host.data(), host.dtype, host.shape));
  return std::memcmp(from_device.data(), from_host.data(), static_cast<std::size_t>(bytes)) == 0;
}

AttentionState DeviceDecode::run_partial() {
  const Shape& q = problem_.q.shape;
  accumulator_ = DeviceCopy(DType::f32, Shape{1, q[0], q[1], problem_.value_dim()});
  row_max_ = DeviceCopy(DType::f32, Shape{1, q[1], q[0]});
  row_sum_ = DeviceCopy(DType::f32, Shape{1, q[1], q[0]});
  const AttentionState state{accumulator_.view(), row_max_.view(), row_sum_.view()};
  decode_forward({problem_, state, {}, {}, {}}, "sm90");
  return state;
}

void DeviceDecode::expect_margins_intact() const {
  for (const DeviceCopy* tensor : {&o_, &lse_}) EXPECT_TRUE(tensor->margins_intact());
  if (!accumulator_.view()) return;
  for (const DeviceCopy* tensor : {&accumulator_, &row_max_, &row_sum_}) {
    EXPECT_TRUE(tensor->margins_intact());
  }
}

void expect_decode_on_device(const DecodeCase& expected, const PagedCache& cache,
                             const CacheDeal& deal) {
  const DeviceDecode device(expected, cache, deal);
  device.run();
  expected.expect(device.o_values(), device.lse_values());
  device.expect_margins_intact();
}

void expect_merged_decode_on_device(const DecodeCase& expected, CacheDeal deal,
                                    std::int64_t page_size, std::uint64_t seed) {
  std::vector<DeviceDecode> ranks;
  std::vector<PagedCache> caches;
  std::vector<AttentionState> states;
  for (deal.rank = 0; deal.rank < deal.ranks; ++deal.rank) {
    caches.push_back(expected.paged(deal, page_size, seed + static_cast<std::uint64_t>(deal.rank)));
    ranks.emplace_back(expected, caches.back(), deal);
    if (deal.rank > 0) ranks.back().drop_sinks();
    states.push_back(ranks.back().run_partial());
    if (deal.rank > 0) merge(states.back(), states.front());
  }
  const DeviceCopy o(DType::f32, Shape{1, expected.options.tokens(), expected.options.q_heads,
                                       expected.options.value_dim});
  const DeviceCopy lse(DType::f32, Shape{1, expected.options.q_heads, expected.options.tokens()});
  finish(states.front(), o.view(), lse.view());
  expected.expect(o.values(), lse.values());
  for (const DeviceDecode& rank : ranks) rank.expect_margins_intact();
}

HostDecode decode_on_host(const DecodeCase& of, const PagedCache& cache) {
  HostDecode result;
  const Shape rows = rows_shape(of);
  const Shape statistics = statistics_shape(of);
  result.o.resize(static_cast<std::size_t>(rows.elements()));
  result.log_sum_exp.resize(static_cast<std::size_t>(statistics.elements()));
  decode_forward({cache.problem(of, {}),
                  {},
                  host_doubles(result.o, rows),
                  host_doubles(result.log_sum_exp, statistics),
                  {}},
                 "reference");
  return result;
}

void expect_near(const std::vector<double>& actual, const std::vector<double>& expected,
                 double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    if (std::isinf(expected[i])) {
      ASSERT_EQ(actual[i], expected[i]) << "at " << i;
    } else {
      ASSERT_NEAR(actual[i], expected[i], tolerance) << "at " << i;
    }
  }
}

}  // namespace annulus::testing
