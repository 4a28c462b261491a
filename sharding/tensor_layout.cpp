#include "sharding/tensor_layout.hpp"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/error.hpp"

namespace annulus {
namespace {

bool begins_first(Span a, Span b) { return a.begin < b.begin; }

/// Drops empty runs, checks the others against the dimension and each other.
Runs checked(Runs runs, int dim, std::int64_t extent) {
  std::erase_if(runs, [](Span run) { return run.empty(); });
  Runs sorted = runs;
  std::sort(sorted.begin(), sorted.end(), begins_first);
  std::int64_t free_from = 0;
  for (const Span run : sorted) {
    require(free_from <= run.begin && run.end <= extent, ExitCode::usage,
            "layout: run {}..{} of dimension {} overlaps another or leaves 0..{}", run.begin,
            run.end, dim, extent);
    free_from = run.end;
  }
  return runs;
}

/// Checks that every index lies somewhere; true when one lies on several parts.
bool check_cover(const std::vector<Runs>& runs_of_part, int dim, std::int64_t extent) {
  Runs all;
  for (const Runs& runs : runs_of_part) all.insert(all.end(), runs.begin(), runs.end());
  std::sort(all.begin(), all.end(), begins_first);
  std::int64_t covered = 0;
  bool shared = false;
  for (const Span run : all) {
    if (run.begin > covered) break;
    shared = shared || run.begin < covered;
    covered = std::max(covered, run.end);
  }
  require(covered == extent, ExitCode::usage, "layout: no part holds index {} of dimension {}",
          covered, dim);
  return shared;
}

}  // namespace

TensorLayout::TensorLayout(const Shape& global_shape, NamedSharding sharding)
    : global_shape_(global_shape), sharding_(std::move(sharding)) {
  sharding_.block(0, global_shape_);  // throws when they do not fit
}

TensorLayout TensorLayout::only_on(int root, const Shape& global_shape, const Mesh& mesh) {
  require(0 <= root && root < mesh.ranks(), ExitCode::usage, "layout: root {} is not in 0..{}",
          root, mesh.ranks() - 1);
  TensorLayout layout(global_shape, NamedSharding(mesh, {}));
  layout.root_ = root;
  return layout;
}

TensorLayout TensorLayout::with_runs(int dim, std::vector<Runs> runs_of_part) const {
  require(!root_ && 0 <= dim && dim < global_shape_.rank(), ExitCode::usage,
          "layout: dimension {} of {} cannot be dealt", dim, to_string());
  const int parts = sharding_.parts(dim);
  require(static_cast<int>(runs_of_part.size()) == parts, ExitCode::usage,
          "layout: runs for {} parts of dimension {}, which {} cuts in {}", runs_of_part.size(),
          dim, to_string(), parts);
  for (Runs& runs : runs_of_part) runs = checked(std::move(runs), dim, global_shape_[dim]);
  const bool shared = check_cover(runs_of_part, dim, global_shape_[dim]);
  TensorLayout layout = *this;
  layout.dealt_[dim] = {std::move(runs_of_part), shared};
  return layout;
}

Runs TensorLayout::runs_of_part(int dim, int part) const {
  if (const auto dealt = dealt_.find(dim); dealt != dealt_.end()) {
    return dealt->second.runs_of_part.at(static_cast<std::size_t>(part));
  }
  const Span block = split_evenly(global_shape_[dim], sharding_.parts(dim), part);
  return block.empty() ? Runs{} : Runs{block};
}

Runs TensorLayout::runs(int rank, int dim) const {
  if (root_ && rank != *root_) return {};
  return runs_of_part(dim, sharding_.part(rank, dim));
}

bool TensorLayout::shares(int dim) const {
  const auto dealt = dealt_.find(dim);
  return dealt != dealt_.end() && dealt->second.shared;
}

Shape TensorLayout::local_shape(int rank) const {
  Shape shape = global_shape_;
  for (int dim = 0; dim < shape.rank(); ++dim) {
    shape[dim] = 0;
    for (const Span run : runs(rank, dim)) shape[dim] += run.size();
  }
  return shape;
}

std::int64_t TensorLayout::global_index(int rank, int dim, std::int64_t local) const {
  std::int64_t left = local;
  for (const Span run : runs(rank, dim)) {
    if (left < run.size()) return run.begin + left;
    left -= run.size();
  }
  throw Error(ExitCode::internal,
              fmt::format("layout: rank {} holds no local index {} of dimension {} of {}", rank,
                          local, dim, to_string()));
}

std::string TensorLayout::to_string() const {
  const std::string where = root_ ? fmt::format("on rank {}", *root_) : sharding_.to_string();
  return fmt::format("{} {}{}", global_shape_.to_string(), where,
                     dealt_.empty() ? "" : ", dealt in runs");
}

}  // namespace annulus
