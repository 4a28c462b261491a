#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "kernels/types.hpp"
#include "runtime/selection.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// One dataset to write and this rank's part of it. A part that several ranks hold alike is
/// written once, from the lowest of them.
struct OutputDataset {
  std::string path;  // "output/attention_outputs"
  Shape shape;       // global
  DType dtype = DType::f32;
  Selection mine;
  ConstTensorView data;  // the shape of `mine`, any strides and float dtype
};

/// Provenance, kept on the group /output.
struct OutputAttribute {
  std::string name;
  std::variant<std::string, std::int64_t, double> value;
};

struct OutputOptions {
  /// Replace an output that exists.
  bool force = false;
  /// Wait for the data to be on the disk before the file gets its name.
  bool durable = true;
};

/// Throws cannot_create unless `path` can be written: its folder exists and nothing stands there
/// (or `force`). For use before the work starts. Collective.
void require_writable_output(Communicator& communicator, const std::string& path, bool force);

/// Writes an HDF5 file that h5py and h5dump read: chunks of about 1 MB under Fletcher32, metadata
/// with checksums. Rank 0 lays the file out, then every rank writes its chunks at their places;
/// ranks that share a chunk send their parts to one of them first. The file has no name (or an
/// unguessable one, where the file system demands it) until it is complete on the disk: any error,
/// or the death of any rank, leaves an earlier output as it was and nothing behind.
/// Collective: all ranks throw together; io (with path and errno), cannot_create, bad_data when the
/// parts do not cover the shape exactly once.
void write_checkpoint(Communicator& communicator, const std::string& path,
                      std::span<const OutputDataset> datasets,
                      std::span<const OutputAttribute> attributes,
                      const OutputOptions& options = {});

}  // namespace annulus
