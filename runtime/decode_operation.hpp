#pragma once

#include <string>
#include <utility>

#include "runtime/operation.hpp"

namespace annulus {

/// The common course of the operations over a cache: check, compare with the other ranks, bring
/// queries and new tokens to where the cache is, write them, attend over this rank's tokens, merge
/// over the ranks that share a sequence, leave the results where the query lies.
class DecodeOperation : public OperationImpl {
 public:
  enum class Cache : std::uint8_t {
    given,     // key and value are the cache, or a contiguous cache object
    read,      // a cache object that holds the query rows' tokens already
    appended,  // a cache object to which key and value are written first
    latent,    // the same in latent form, with a rope part
  };
  struct Traits {
    Cache cache = Cache::read;
    bool causal = true;
    /// Most query rows of a sequence; 0: any number.
    std::int64_t most_rows = 0;
  };

  DecodeOperation(std::string name, OperationMetadata metadata, const Traits& traits)
      : OperationImpl(std::move(name), std::move(metadata)), traits_(traits) {}

  /// On the CPU.
  OperationOutput forward_native(const AttentionInputs& inputs,
                                 const AttentionOptions& options) override;
  /// On this rank's device, where the cache must be too.
  OperationOutput forward_cuda(const AttentionInputs& inputs,
                               const AttentionOptions& options) override;
  AttentionLayouts layouts(const AttentionShape& shape,
                           const AttentionOptions& options) const override;
  bool causal_by_default() const override { return traits_.causal; }
  const Traits& traits() const { return traits_; }
  using OperationImpl::tuning;

 protected:
  bool caches_by_default() const override { return true; }

 private:
  Traits traits_;
};

}  // namespace annulus
