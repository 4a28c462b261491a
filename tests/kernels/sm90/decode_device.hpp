#pragma once

#include <vector>

#include "kernels/buffer.hpp"
#include "kernels/decode_case.hpp"

namespace annulus::testing {

/// A tensor on the device, dense, with margins of NaN before and after it.
class DeviceCopy {
 public:
  DeviceCopy() = default;
  DeviceCopy(DType dtype, const Shape& shape);
  explicit DeviceCopy(const ConstTensorView& host);
  static DeviceCopy integers(const std::vector<std::int32_t>& values, const Shape& shape);

  TensorView view() const { return view_; }
  std::vector<double> values() const;
  void poison() const;
  bool margins_intact() const;

 private:
  Buffer memory_;
  TensorView view_;
};

/// A case's paged cache on the device and a decode call over it. `skipped_pages`: how many pages
/// lie before those of the cache.
class DeviceDecode {
 public:
  DeviceDecode(const DecodeCase& of, const PagedCache& cache, const CacheDeal& deal,
               std::int64_t skipped_pages = 0);

  const DecodeProblem& problem() const { return problem_; }
  /// The same memory seen as pages of `tokens` tokens.
  void split_pages(std::int64_t tokens);
  /// A single sequence that sees its first page over and over.
  void repeat_page(std::int64_t times);
  void drop_sinks() { problem_.sinks = {}; }
  void set_lengths(const std::vector<std::int32_t>& lengths);
  void poison() const;
  void run(Stream stream = {}) const;
  void append(const ConstTensorView& new_k, const ConstTensorView& new_v) const;
  static bool same_bits(const ConstTensorView& device, const ConstTensorView& host);
  /// Leaves a state instead of finishing; what merge() and finish() take.
  AttentionState run_partial();
  std::vector<double> o_values() const { return o_.values(); }
  std::vector<double> lse_values() const { return lse_.values(); }
  void expect_margins_intact() const;

 private:
  DeviceCopy q_, k_, v_, sinks_, table_, lengths_, starts_, query_begin_, o_, lse_;
  DeviceCopy accumulator_, row_max_, row_sum_;
  std::vector<std::int32_t> host_table_;
  DecodeProblem problem_;
};

void expect_decode_on_device(const DecodeCase& expected, const PagedCache& cache,
                             const CacheDeal& deal);

/// Every rank of the deal leaves a state; merged, they are the result.
void expect_merged_decode_on_device(const DecodeCase& expected, CacheDeal deal,
                                    std::int64_t page_size, std::uint64_t seed);

struct HostDecode {
  std::vector<double> o, log_sum_exp;
};

/// The double reference over a paged cache.
HostDecode decode_on_host(const DecodeCase& of, const PagedCache& cache);

void expect_near(const std::vector<double>& actual, const std::vector<double>& expected,
                 double tolerance);

}  // namespace annulus::testing
