#pragma once

#include <string>

#include "runtime/checkpoint_output.hpp"
#include "runtime/context.hpp"
#include "runtime/key_value_cache.hpp"

namespace annulus {

/// Writes a cache to an HDF5 file that says nothing of pages or ranks: /cache/key [tokens,
/// kv_heads, head_dim] with the sequences one after another, /cache/value likewise (none of a
/// latent cache), /cache/lengths and /cache/starts i64 [sequences]. Pages need not fill up, nor the
/// mesh be the same, to load it. Collective; as write_checkpoint().
void save_cache(Context& context, const std::string& path, KeyValueCache& cache,
                const OutputOptions& options = {});

/// Fills an empty cache, of the same heads and columns but any pages and mesh, from such a file;
/// numbers are converted to its dtype. Throws bad_data where they do not fit, no_memory where its
/// pages do not suffice. Collective: all ranks throw together.
void load_cache(Context& context, const std::string& path, KeyValueCache& cache);

}  // namespace annulus
