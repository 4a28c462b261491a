#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/hdf5_file.hpp"
#include "sharding/communicator.hpp"

namespace annulus {

/// The tensors that attention reads from a file.
enum class CheckpointField : std::uint8_t {
  query,        // float [batch, seq_q, q_heads, head_dim]
  key,          // float [batch, seq_kv, kv_heads, head_dim]
  value,        // float [batch, seq_kv, kv_heads, value_dim]
  documents,    // int [batch, seq], -1 is padding
  cu_seqlens,   // int [documents + 1]
  mask,         // bool or u8 [batch, q_heads | 1, seq_q, seq_kv]
  bias,         // float [batch, q_heads | 1, seq_q, seq_kv]
  sinks,        // float [q_heads]
  grad_output,  // float [batch, seq_q, q_heads, value_dim]
};
inline constexpr int kCheckpointFields = 9;

std::string_view name(CheckpointField field);

enum class InputLayout : std::uint8_t { bthd, bhtd };

struct CheckpointRequest {
  std::string path;
  InputLayout layout = InputLayout::bthd;
  /// Dataset of each field. Without names for query, key and value they are looked for as
  /// query, key, value, then q, k, v, then the same under the one group that has all three; the
  /// other fields are absent without a name.
  std::array<std::string, kCheckpointFields> datasets;

  std::string& dataset(CheckpointField field) { return datasets[static_cast<std::size_t>(field)]; }
  const std::string& dataset(CheckpointField field) const {
    return datasets[static_cast<std::size_t>(field)];
  }
};

struct CheckpointReadOptions {
  ReadOptions read;
  /// Collective MPI-IO over these ranks, for parallel file systems; null: plain reads, each rank
  /// for itself (20 GB/s on two cores where MPI-IO fell to 3 GB/s with four ranks).
  const MpiHandle* collective = nullptr;
};

/// A checked input file. Shapes and selections are always those of [batch, seq, heads, dim],
/// whatever the layout of the file.
class Checkpoint {
 public:
  /// Opens the file on every rank, with one child process of the job to read its metadata, and
  /// checks every field. All problems are reported together, by dataset, with what was expected and
  /// found: missing_input when all of them are of missing things, else bad_data. Collective: all
  /// ranks throw together.
  Checkpoint(Communicator& communicator, CheckpointRequest request);

  const Hdf5File& file() const { return file_; }
  bool has(CheckpointField field) const { return info(field).has_value(); }
  /// Throws internal when the field is absent.
  const DatasetInfo& dataset(CheckpointField field) const;
  const Shape& shape(CheckpointField field) const;
  /// The float type as stored; integers are i64 where 8 bytes are stored and i32 else, booleans u8.
  DType dtype(CheckpointField field) const;

  /// Reads this rank's part. Collective: all ranks throw together.
  void read(Communicator& communicator, CheckpointField field, const Selection& selection,
            TensorView destination, const CheckpointReadOptions& options = {}) const;
  /// A whole integer field, on every rank. Collective.
  std::vector<std::int64_t> read_integers(Communicator& communicator, CheckpointField field) const;

 private:
  struct Field {
    DatasetInfo dataset;
    Shape shape;
    bool swapped = false;  // stored as [batch, heads, seq, dim]
  };
  void check(const CheckpointRequest& request);
  const Field& present(CheckpointField field) const;
  const std::optional<Field>& info(CheckpointField field) const {
    return fields_[static_cast<std::size_t>(field)];
  }

  Hdf5File file_;
  std::array<std::optional<Field>, kCheckpointFields> fields_;
};

}  // namespace annulus
