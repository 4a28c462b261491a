#include "runtime/attention_setup.hpp"

#include <algorithm>
#include <vector>

#include "kernels/error.hpp"
#include "sharding/block_forward.hpp"
#include "sharding/cost_model.hpp"

namespace annulus {
namespace {

/// The axes that the mesh has: a mesh may leave out those it does not use.
AxisTuple present(const Mesh& mesh, AxisTuple axes) {
  std::erase_if(axes, [&](const std::string& axis) { return !mesh.has(axis); });
  return axes;
}

std::vector<Runs> runs_of(const SequenceLayout& rows) {
  std::vector<Runs> parts(static_cast<std::size_t>(rows.ranks()));
  for (int rank = 0; rank < rows.ranks(); ++rank) {
    for (const RowRun& run : rows.runs(rank)) {
      parts[static_cast<std::size_t>(rank)].push_back(run.global);
    }
  }
  return parts;
}

/// A layout whose dimension `dim` is dealt by `runs`; the plain one where that is the same.
TensorLayout dealt(const TensorLayout& layout, int dim, const std::vector<Runs>& runs) {
  bool plain = true;
  for (std::size_t part = 0; part < runs.size(); ++part) {
    Runs wanted = runs[part];
    std::erase_if(wanted, [](Span run) { return run.empty(); });
    plain = plain && layout.runs_of_part(dim, static_cast<int>(part)) == wanted;
  }
  return plain ? layout : layout.with_runs(dim, runs);
}

/// How `dim` of a layout is dealt along `axes`, as one run a rank or in zigzag; else nothing.
std::optional<SequenceLayout> rows_of(const TensorLayout& layout, int dim, const AxisTuple& axes) {
  const Mesh& mesh = layout.mesh();
  const AxisTuple& split = layout.sharding().spec()[dim];
  const auto several = [&](AxisTuple tuple) {
    std::erase_if(tuple, [&](const std::string& axis) { return mesh.size(axis) == 1; });
    return tuple;
  };
  if (several(split) != several(axes) || layout.shares(dim)) return std::nullopt;
  const std::int64_t seq = layout.global_shape()[dim];
  const int parts = mesh.size(axes);
  std::vector<std::int64_t> lengths;
  std::vector<Runs> runs;
  std::int64_t next = 0;
  bool one_run = true;
  for (int part = 0; part < parts; ++part) {
    runs.push_back(layout.runs_of_part(dim, part));
    lengths.push_back(0);
    for (const Span run : runs.back()) {
      one_run = one_run && run.begin == next;
      next = run.end;
      lengths.back() += run.size();
    }
  }
  if (one_run) return SequenceLayout::contiguous(lengths);
  const SequenceLayout zigzag = SequenceLayout::zigzag(seq, parts);
  if (runs == runs_of(zigzag)) return zigzag;
  return std::nullopt;
}

/// Rows of the rank that gets the most from others when one layout is changed for the other.
std::int64_t most_rows_moved(const SequenceLayout& from, const SequenceLayout& to) {
  std::int64_t most = 0;
  for (int rank = 0; rank < to.ranks(); ++rank) {
    std::int64_t moved = to.rows(rank);
    for (const RowRun& run : to.runs(rank)) {
      for (const SequenceLayout::Chunk& chunk : from.overlapping(run.global)) {
        if (chunk.rank == rank) moved -= intersect(chunk.global, run.global).size();
      }
    }
    most = std::max(most, moved);
  }
  return most;
}

/// What rows of the parts of a mesh cost to compute and to move.
struct RowCosts {
  const MaskSlices& mask;
  const AttentionShape& shape;
  int batch_parts = 1;
  int head_parts = 1;
  std::int64_t element_bytes = 4;
  Rates rates;

  double compute_seconds(const SequenceLayout& rows) const {
    const std::vector<std::int64_t> area = areas(rows, mask, shape.batch);
    const AttentionSizes sizes{shape.head_dim, shape.value_dim, element_bytes, true};
    const std::int64_t most = area.empty() ? 0 : *std::max_element(area.begin(), area.end());
    return forward_flops(most, sizes) * heads(shape.q_heads) / batch_parts / rates.forward_flops;
  }
  /// Queries, keys and values there, and results back: packed, sent and unpacked.
  double exchange_seconds(const SequenceLayout& from, const SequenceLayout& to) const {
    const auto dims = static_cast<double>(shape.head_dim + shape.value_dim);
    const double row = (heads(shape.q_heads) + heads(shape.kv_heads)) * dims *
                       static_cast<double>(element_bytes * shape.batch) / batch_parts;
    const double bytes = row * static_cast<double>(most_rows_moved(from, to));
    return bytes * (1.0 / rates.node_bandwidth + 2.0 / rates.copy_bandwidth) +
           2.0 * to.ranks() * rates.latency_seconds;
  }

 private:
  double heads(std::int64_t all) const {
    return static_cast<double>((all + head_parts - 1) / head_parts);
  }
};

/// The layout that rows lie in, or the balanced one where to compute in it saves more than it costs
/// to bring them there and back.
SequenceLayout given_or_balanced(const SequenceLayout& given, const RowCosts& costs) {
  constexpr double kWorthALook = 1.05;
  if (imbalance(areas(given, costs.mask, costs.shape.batch)) < kWorthALook) return given;
  const SequenceLayout balanced =
      SequenceLayout::balanced(costs.mask, costs.shape.batch, given.seq(), given.ranks());
  const double saved = costs.compute_seconds(given) - costs.compute_seconds(balanced);
  return saved > costs.exchange_seconds(given, balanced) ? balanced : given;
}

SequenceLayout deal_rows(const AttentionOptions& options, const MaskSlices& mask,
                         const AttentionShape& shape, std::int64_t seq, int parts,
                         std::optional<SequenceLayout> given) {
  if (!options.deal && given) return *given;
  const SequenceDeal deal = options.deal.value_or(SequenceDeal::contiguous);
  if (deal == SequenceDeal::zigzag) return SequenceLayout::zigzag(seq, parts);
  // Keys of another length have no share of the mask's area to balance.
  if (deal == SequenceDeal::balanced && seq == shape.seq_q) {
    return SequenceLayout::balanced(mask, shape.batch, seq, parts);
  }
  return SequenceLayout::contiguous(seq, parts);
}

NamedSharding sharding(const Mesh& mesh, std::vector<AxisTuple> entries) {
  return {mesh, PartitionSpec(std::move(entries))};
}

/// Dimension d of the result is dimension from[d] of `layout`, or a new one of extent 1 for -1.
TensorLayout rearranged(const TensorLayout& layout, std::span<const int> from, int width_dim = -1,
                        std::int64_t width = 0) {
  std::vector<std::int64_t> extents;
  std::vector<AxisTuple> entries;
  for (const int dim : from) {
    const bool replaced = dim < 0 || dim == width_dim;
    extents.push_back(dim < 0 ? 1 : dim == width_dim ? width : layout.global_shape()[dim]);
    entries.push_back(replaced ? AxisTuple{} : layout.sharding().spec()[dim]);
  }
  TensorLayout result(Shape(extents),
                      NamedSharding(layout.mesh(), PartitionSpec(std::move(entries))));
  for (int dim = 0; dim < static_cast<int>(from.size()); ++dim) {
    const int source = from[static_cast<std::size_t>(dim)];
    if (source < 0 || source == width_dim) continue;
    std::vector<Runs> runs;
    for (int part = 0; part < layout.sharding().parts(source); ++part) {
      runs.push_back(layout.runs_of_part(source, part));
    }
    result = dealt(result, dim, runs);
  }
  return result;
}

AttentionMask with_causal(const AttentionMask& mask, bool causal) {
  AttentionMask whole = mask;
  whole.causal = causal;
  return whole;
}

/// Builds the layouts of one setup; members are filled in order.
class LayoutBuilder {
 public:
  explicit LayoutBuilder(const AttentionSetup& setup, const Mesh& mesh)
      : s_(setup),
        mesh_(mesh),
        q_rows_(runs_of(setup.q_rows)),
        kv_rows_(runs_of(setup.kv_rows)),
        q_heads_(setup.heads.q_runs()),
        kv_heads_(setup.heads.kv_runs()) {}

  TensorLayout rows(std::int64_t width) const {
    const TensorLayout plain({s_.shape.batch, s_.shape.seq_q, s_.shape.q_heads, width},
                             sharding(mesh_, {s_.batch_axes, s_.sequence_axes, s_.head_axes}));
    return dealt(dealt(plain, 1, q_rows_), 2, q_heads_);
  }

  TensorLayout keys(std::int64_t width) const {
    const bool whole = s_.key_rows == KeyRows::whole;
    const TensorLayout plain(
        {s_.shape.batch, s_.shape.seq_kv, s_.shape.kv_heads, width},
        sharding(mesh_, {s_.batch_axes, whole ? AxisTuple{} : s_.sequence_axes, s_.head_axes}));
    return dealt(whole ? plain : dealt(plain, 1, kv_rows_), 2, kv_heads_);
  }

  /// [batch|1, heads|1, seq_q, seq_kv]: this rank's rows and all columns.
  TensorLayout pairs(const Shape& shape) const {
    const bool by_head = shape[1] == s_.shape.q_heads || shape[1] == s_.shape.kv_heads;
    const TensorLayout plain(
        shape, sharding(mesh_, {shape[0] == s_.shape.batch ? s_.batch_axes : AxisTuple{},
                                by_head ? s_.head_axes : AxisTuple{}, s_.sequence_axes}));
    const TensorLayout by_rows = dealt(plain, 2, q_rows_);
    if (!by_head) return by_rows;
    return dealt(by_rows, 1, shape[1] == s_.shape.q_heads ? q_heads_ : kv_heads_);
  }

  TensorLayout sinks(const Shape& shape) const {
    std::vector<AxisTuple> entries(static_cast<std::size_t>(shape.rank()));
    entries.back() = s_.head_axes;
    return dealt(TensorLayout(shape, sharding(mesh_, entries)), shape.rank() - 1, q_heads_);
  }

 private:
  const AttentionSetup& s_;
  const Mesh& mesh_;
  std::vector<Runs> q_rows_;
  std::vector<Runs> kv_rows_;
  std::vector<Runs> q_heads_;
  std::vector<Runs> kv_heads_;
};

}  // namespace

Span AttentionSetup::batch(int rank) const {
  return split_evenly(shape.batch, mesh().size(batch_axes), mesh().group_index(rank, batch_axes));
}

AttentionSetup make_setup(const OperationMetadata& metadata, const AttentionShape& shape,
                          const AttentionOptions& options, bool causal, KeyRows key_rows,
                          const GivenLayouts& given) {
  const Mesh& mesh = metadata.mesh;
  const Mode mode = shape.seq_q == 1 ? Mode::decode : Mode::train;
  const AttentionShardings specs = metadata.partition_manager.get_shardings(mode, DimOrder::bthd);
  const AxisTuple batch_axes = present(mesh, specs.query[0]);
  const AxisTuple rows = present(mesh, specs.query[1]);
  const AxisTuple head_axes = present(mesh, specs.query[2]);
  require(key_rows == KeyRows::whole || rows == present(mesh, specs.key[1]), ExitCode::usage,
          "attention: query_length is split along {} but key_length along {}; they must agree",
          PartitionSpec({rows}).to_string(), specs.key.to_string());
  const MaskSlices mask = make_slices(with_causal(options.mask, causal_in(mode, causal)),
                                      shape.batch, shape.seq_q, shape.seq_kv);
  const int parts = mesh.size(rows);
  std::optional<SequenceLayout> given_q;
  std::optional<SequenceLayout> given_kv;
  if (given.query != nullptr) given_q = rows_of(*given.query, 1, rows);
  if (given.key != nullptr) given_kv = rows_of(*given.key, 1, rows);
  const bool one_layout = given_q && given_kv && *given_q == *given_kv;
  if (!options.deal && one_layout && given.rows_share_work) {
    const bool on_device = metadata.backend != "cpu";
    const RowCosts costs{mask,
                         shape,
                         mesh.size(batch_axes),
                         mesh.size(head_axes),
                         size_bytes(metadata.runtime_dtype),
                         default_rates(on_device ? Device::cuda : Device::cpu)};
    given_q = given_kv = given_or_balanced(*given_q, costs);
  }
  const TensorLayout none({0}, NamedSharding(mesh, {}));
  AttentionSetup setup{.shape = shape,
                       .mask = mask,
                       .batch_axes = batch_axes,
                       .sequence_axes = rows,
                       .head_axes = head_axes,
                       .q_rows = deal_rows(options, mask, shape, shape.seq_q, parts, given_q),
                       .kv_rows = deal_rows(options, mask, shape, shape.seq_kv, parts, given_kv),
                       .heads = HeadLayout(shape.q_heads, shape.kv_heads, mesh.size(head_axes)),
                       .layouts = {none, none, none, none, none, none, {}, {}, {}},
                       .key_rows = key_rows};
  if (options.reproducible) {
    const bool together = setup.q_rows == setup.kv_rows;
    setup.q_rows = setup.q_rows.aligned(reproducible_query_rows(shape.seq_q));
    if (together) setup.kv_rows = setup.q_rows;
  }
  const LayoutBuilder build(setup, mesh);
  AttentionLayouts& layouts = setup.layouts;
  layouts.query = build.rows(shape.head_dim);
  layouts.key = build.keys(shape.head_dim);
  layouts.value = build.keys(shape.value_dim);
  layouts.output = build.rows(shape.value_dim);
  layouts.log_sum_exp = row_layout(layouts.query);
  layouts.weights = build.pairs({shape.batch, shape.q_heads, shape.seq_q, shape.seq_kv});
  if (shape.bias.rank() > 0) layouts.bias = build.pairs(shape.bias);
  if (shape.mask.rank() > 0) layouts.mask = build.pairs(shape.mask);
  if (shape.sinks.rank() > 0) layouts.sinks = build.sinks(shape.sinks);
  return setup;
}

MaskSlices mask_of(const MaskSlices& mask, Span batch) {
  if (mask.batch_offsets.empty()) return mask;
  MaskSlices part;
  part.batch_offsets.push_back(0);
  for (std::int64_t b = batch.begin; b < batch.end; ++b) {
    const std::span<const Slice> slices = mask.view().of_batch(b);
    part.slices.insert(part.slices.end(), slices.begin(), slices.end());
    part.batch_offsets.push_back(static_cast<std::int64_t>(part.slices.size()));
  }
  return part;
}

bool same_shards(const TensorLayout& a, const TensorLayout& b) {
  if (a == b) return true;
  if (a.global_shape() != b.global_shape() || a.mesh().ranks() != b.mesh().ranks()) return false;
  for (int rank = 0; rank < a.mesh().ranks(); ++rank) {
    for (int dim = 0; dim < a.global_shape().rank(); ++dim) {
      if (a.runs(rank, dim) != b.runs(rank, dim)) return false;
    }
  }
  return true;
}

TensorLayout bthd_layout(const TensorLayout& layout, DimOrder order) {
  if (order == DimOrder::bthd) return layout;
  if (layout.root()) {
    const Shape& s = layout.global_shape();
    const Shape shape =
        order == DimOrder::thd ? Shape{1, s[0], s[1], s[2]} : Shape{s[0], s[2], s[1], s[3]};
    return TensorLayout::only_on(*layout.root(), shape, layout.mesh());
  }
  constexpr int kFromBhtd[] = {0, 2, 1, 3};
  constexpr int kFromThd[] = {-1, 0, 1, 2};
  return rearranged(layout, order == DimOrder::bhtd ? kFromBhtd : kFromThd);
}

TensorLayout output_layout(const TensorLayout& query, std::int64_t width) {
  if (query.root()) {
    const Shape& s = query.global_shape();
    return TensorLayout::only_on(*query.root(), {s[0], s[1], s[2], width}, query.mesh());
  }
  constexpr int kSame[] = {0, 1, 2, 3};
  return rearranged(query, kSame, 3, width);
}

TensorLayout row_layout(const TensorLayout& query) {
  if (query.root()) {
    const Shape& s = query.global_shape();
    return TensorLayout::only_on(*query.root(), {s[0], s[2], s[1]}, query.mesh());
  }
  constexpr int kRows[] = {0, 2, 1};
  return rearranged(query, kRows);
}

}  // namespace annulus
