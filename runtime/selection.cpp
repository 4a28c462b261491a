#include "runtime/selection.hpp"

#include <algorithm>
#include <utility>

#include "kernels/error.hpp"

namespace annulus {
namespace {

// A run of one dimension: where it starts in the local tensor, and its global range.
struct PlacedRun {
  std::int64_t local_begin = 0;
  Span global;
};

std::vector<PlacedRun> placed_runs(const std::vector<Span>& runs, Span window) {
  std::vector<PlacedRun> placed;
  std::int64_t local = 0;
  for (const Span& run : runs) {
    const Span part = intersect(run, window);
    if (!part.empty()) placed.push_back({local + part.begin - run.begin, part});
    local += run.size();
  }
  return placed;
}

// Cells of one dimension that a list of ranges touches, ascending.
std::vector<std::int64_t> touched_cells(const std::vector<Span>& runs, std::int64_t cell) {
  std::vector<std::int64_t> touched;
  for (const Span& run : runs) {
    for (std::int64_t i = run.begin / cell; i <= (run.end - 1) / cell; ++i) touched.push_back(i);
  }
  std::sort(touched.begin(), touched.end());
  touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
  return touched;
}

// Visits every combination of one entry of each list, the last list fastest.
template <typename Entry, typename Visit>
void for_each_combination(const std::vector<std::vector<Entry>>& lists, const Visit& visit) {
  std::vector<std::size_t> index(lists.size(), 0);
  for (const std::vector<Entry>& list : lists) {
    if (list.empty()) return;
  }
  while (true) {
    visit(index);
    std::size_t dim = lists.size();
    while (dim > 0 && ++index[dim - 1] == lists[dim - 1].size()) index[--dim] = 0;
    if (dim == 0) return;
  }
}

template <typename View>
View part_of(const View& view, const Shape& begin, const Shape& extent) {
  View part = view;
  for (int dim = 0; dim < view.rank(); ++dim) {
    part = part.slice(dim, {begin[dim], begin[dim] + extent[dim]});
  }
  return part;
}

}  // namespace

Selection::Selection(const Shape& global) : rank_(global.rank()) {
  for (int dim = 0; dim < rank_; ++dim) set(dim, {{0, global[dim]}});
}

Selection Selection::block(const Shape& begin, const Shape& extent) {
  Selection selection(extent);
  for (int dim = 0; dim < extent.rank(); ++dim) {
    selection.set(dim, {{begin[dim], begin[dim] + extent[dim]}});
  }
  return selection;
}

Selection& Selection::set(int dim, const std::vector<Span>& ranges) {
  require(dim >= 0 && dim < rank_, ExitCode::internal, "selection: dimension {} of {}", dim, rank_);
  std::vector<Span>& runs = runs_[static_cast<std::size_t>(dim)];
  runs.clear();
  for (const Span& range : ranges) {
    if (range.empty()) continue;
    if (!runs.empty() && runs.back().end == range.begin) {
      runs.back().end = range.end;
    } else {
      runs.push_back(range);
    }
  }
  return *this;
}

Selection Selection::transposed(int a, int b) const {
  Selection result = *this;
  std::swap(result.runs_[static_cast<std::size_t>(a)], result.runs_[static_cast<std::size_t>(b)]);
  return result;
}

Shape Selection::shape() const {
  std::array<std::int64_t, Shape::kMaxRank> dims{};
  for (int dim = 0; dim < rank_; ++dim) {
    for (const Span& run : runs(dim)) dims[static_cast<std::size_t>(dim)] += run.size();
  }
  return Shape(std::span<const std::int64_t>(dims.data(), static_cast<std::size_t>(rank_)));
}

void Selection::validate(const Shape& global, const std::string& what) const {
  require(rank_ == global.rank(), ExitCode::bad_data, "{}: a selection of rank {} from {}", what,
          rank_, global.to_string());
  for (int dim = 0; dim < rank_; ++dim) {
    for (const Span& run : runs(dim)) {
      require(run.begin >= 0 && run.end <= global[dim], ExitCode::bad_data,
              "{}: [{}, {}) of dimension {} asked for, the shape is {}", what, run.begin, run.end,
              dim, global.to_string());
    }
  }
}

void for_each_box(const Selection& selection, const std::function<void(const Box&)>& visit) {
  Shape begin = selection.shape();
  Shape extent = begin;
  for (int dim = 0; dim < selection.rank(); ++dim) {
    begin[dim] = 0;
    extent[dim] = 0;
    for (const Span& run : selection.runs(dim)) extent[dim] = std::max(extent[dim], run.end);
  }
  for_each_box_within(selection, begin, extent, visit);
}

void for_each_box_within(const Selection& selection, const Shape& begin, const Shape& extent,
                         const std::function<void(const Box&)>& visit) {
  std::vector<std::vector<PlacedRun>> runs;
  for (int dim = 0; dim < selection.rank(); ++dim) {
    runs.push_back(placed_runs(selection.runs(dim), {begin[dim], begin[dim] + extent[dim]}));
  }
  Box box{begin, begin, begin};
  for_each_combination(runs, [&](const std::vector<std::size_t>& index) {
    for (std::size_t i = 0; i < index.size(); ++i) {
      const PlacedRun& run = runs[i][index[i]];
      const int dim = static_cast<int>(i);
      box.global_begin[dim] = run.global.begin;
      box.local_begin[dim] = run.local_begin;
      box.extent[dim] = run.global.size();
    }
    visit(box);
  });
}

void for_each_cell(const Selection& selection, const Shape& cell,
                   const std::function<void(const Shape&)>& visit) {
  std::vector<std::vector<std::int64_t>> touched;
  for (int dim = 0; dim < selection.rank(); ++dim) {
    touched.push_back(touched_cells(selection.runs(dim), cell[dim]));
  }
  Shape coordinates = cell;
  for_each_combination(touched, [&](const std::vector<std::size_t>& index) {
    for (std::size_t i = 0; i < index.size(); ++i) {
      coordinates[static_cast<int>(i)] = touched[i][index[i]];
    }
    visit(coordinates);
  });
}

TensorView subview(const TensorView& view, const Shape& begin, const Shape& extent) {
  return part_of(view, begin, extent);
}

ConstTensorView subview(const ConstTensorView& view, const Shape& begin, const Shape& extent) {
  return part_of(view, begin, extent);
}

}  // namespace annulus
