#include "runtime/checkpoint_output.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <optional>

#include "kernels/buffer.hpp"
#include "kernels/error.hpp"
#include "runtime/agreement.hpp"
#include "runtime/chunk_filters.hpp"
#include "runtime/hdf5_layout.hpp"
#include "runtime/output_layout.hpp"
#include "runtime/pending_file.hpp"

namespace annulus {
namespace {

// Bytes of chunks shared between ranks that one rank sends or receives in a round.
constexpr std::int64_t kRoundBytes = std::int64_t{16} << 20;

std::vector<std::byte> bytes_of(const std::vector<std::int64_t>& numbers) {
  const auto bytes = std::as_bytes(std::span(numbers));
  return {bytes.begin(), bytes.end()};
}

std::vector<std::int64_t> numbers_of(const std::vector<std::byte>& bytes) {
  std::vector<std::int64_t> numbers(bytes.size() / sizeof(std::int64_t));
  if (!numbers.empty()) std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return numbers;
}

// ---- what the ranks tell each other -------------------------------------------------------------

// Rank, dtype and extents of the tensor, then the number of ranges and the ranges of each
// dimension.
std::vector<std::int64_t> encode(const OutputDataset& dataset) {
  std::vector<std::int64_t> numbers = {dataset.shape.rank(),
                                       static_cast<std::int64_t>(dataset.dtype)};
  for (const std::int64_t extent : dataset.shape.dims()) numbers.push_back(extent);
  for (int dim = 0; dim < dataset.shape.rank(); ++dim) {
    numbers.push_back(static_cast<std::int64_t>(dataset.mine.runs(dim).size()));
    for (const Span& run : dataset.mine.runs(dim)) {
      numbers.insert(numbers.end(), {run.begin, run.end});
    }
  }
  return numbers;
}

Selection decode(const std::vector<std::int64_t>& numbers, const Shape& shape) {
  Selection selection(shape);
  auto next = numbers.begin() + 2 + shape.rank();
  for (int dim = 0; dim < shape.rank(); ++dim) {
    std::vector<Span> runs(static_cast<std::size_t>(*next++));
    for (Span& run : runs) {
      run.begin = *next++;
      run.end = *next++;
    }
    selection.set(dim, runs);
  }
  return selection;
}

OutputLayout agreed_layout(Communicator& communicator, const std::string& path,
                           const OutputDataset& dataset) {
  const std::string what = path + ": " + dataset.path;
  agree(communicator, [&] {
    require(dataset.shape.rank() > 0, ExitCode::internal, "{}: has no dimensions", what);
    dataset.mine.validate(dataset.shape, what);
    require(dataset.mine.shape() == dataset.data.shape, ExitCode::internal,
            "{}: a part of {} given as {}", what, dataset.mine.shape().to_string(),
            dataset.data.shape.to_string());
  });
  const auto gathered = gather_bytes(communicator, bytes_of(encode(dataset)));
  std::vector<Selection> parts;
  const std::vector<std::int64_t> first = numbers_of(gathered[0]);
  for (std::size_t rank = 0; rank < gathered.size(); ++rank) {
    const std::vector<std::int64_t> numbers = numbers_of(gathered[rank]);
    const auto head = std::min<std::size_t>(first.size(), static_cast<std::size_t>(first[0]) + 2);
    require(numbers.size() >= head &&
                std::equal(first.begin(), first.begin() + static_cast<std::ptrdiff_t>(head),
                           numbers.begin()),
            ExitCode::internal, "{}: rank {} has another shape or dtype than rank 0", what, rank);
    parts.push_back(decode(numbers, dataset.shape));
  }
  return {what, dataset.shape, size_bytes(dataset.dtype), std::move(parts)};
}

// ---- one dataset --------------------------------------------------------------------------------

struct OpenOutput {
  int descriptor = -1;
  const std::string& path;
};

class DatasetWriter {
 public:
  DatasetWriter(Communicator& communicator, const OpenOutput& output, const OutputDataset& dataset,
                const OutputLayout& layout, std::vector<std::int64_t> offsets)
      : communicator_(communicator),
        output_(output),
        dataset_(dataset),
        layout_(layout),
        offsets_(std::move(offsets)) {}

  /// Collective. A failed write is kept for the end, since the others still wait for our parts.
  std::optional<Error> write() {
    write_shared();
    for (const std::int64_t chunk : layout_.exclusive_chunks(communicator_.rank())) {
      attempt([&] { write_exclusive(chunk); });
    }
    return failure_;
  }

 private:
  void attempt(const std::function<void()>& step) {
    if (failure_) return;
    try {
      step();
    } catch (const Error& error) {
      failure_ = error;
    }
  }

  const Selection& part(int rank) const { return layout_.part(rank); }

  void store(std::int64_t chunk, const void* data) {
    const auto bytes = static_cast<std::size_t>(layout_.chunk_bytes());
    const std::uint32_t sum = fletcher32({static_cast<const std::byte*>(data), bytes});
    std::array<std::uint8_t, kChunkTailBytes> tail{};
    for (std::size_t i = 0; i < tail.size(); ++i) {
      tail[i] = static_cast<std::uint8_t>(sum >> (8 * i));
    }
    write_exactly(output_.descriptor, data, layout_.chunk_bytes(), tail.data(), kChunkTailBytes,
                  offsets_[static_cast<std::size_t>(chunk)], output_.path);
  }

  // Straight from the tensor where a chunk lies there as it lies in the file.
  void write_exclusive(std::int64_t chunk) {
    const void* direct = nullptr;
    const Shape begin = layout_.begin_of(chunk);
    for_each_box_within(part(communicator_.rank()), begin, layout_.chunk(), [&](const Box& box) {
      const ConstTensorView view = subview(dataset_.data, box.local_begin, box.extent);
      const bool whole = box.extent == layout_.chunk() && view.is_contiguous();
      if (whole && view.device == Device::cpu && view.dtype == dataset_.dtype) direct = view.data;
    });
    if (direct != nullptr) return store(chunk, direct);
    std::byte* data = cleared_chunk();
    gather_own(chunk, data);
    store(chunk, data);
  }

  std::byte* cleared_chunk() {
    if (chunk_.bytes() == 0) chunk_ = Buffer(Device::cpu, layout_.chunk_bytes());
    fill_bytes(chunk_.data(), Device::cpu, 0, layout_.chunk_bytes());
    return static_cast<std::byte*>(chunk_.data());
  }

  // The box as a place inside a chunk that lies at `data`.
  TensorView place_of(const Box& box, const Shape& begin, std::byte* data) const {
    Shape at = begin;
    for (int dim = 0; dim < begin.rank(); ++dim) at[dim] = box.global_begin[dim] - begin[dim];
    return subview(TensorView(data, dataset_.dtype, layout_.chunk()), at, box.extent);
  }

  void gather_own(std::int64_t chunk, std::byte* data) {
    const Shape begin = layout_.begin_of(chunk);
    for_each_box_within(part(communicator_.rank()), begin, layout_.chunk(), [&](const Box& box) {
      copy(subview(dataset_.data, box.local_begin, box.extent), place_of(box, begin, data));
    });
  }

  // ---- chunks of several ranks ----

  std::int64_t part_bytes(int rank, std::int64_t chunk) const {
    return layout_.elements(rank, chunk) * size_bytes(dataset_.dtype);
  }

  // Rounds end where some rank has sent or received enough; all ranks count alike.
  void write_shared() {
    const auto& shared = layout_.shared_chunks();
    std::size_t begin = 0;
    while (begin < shared.size()) {
      std::map<int, std::int64_t> load;
      std::size_t end = begin;
      bool full = false;
      for (; end < shared.size() && !full; ++end) {
        for (const int rank : shared[end].ranks) {
          const std::int64_t bytes = part_bytes(rank, shared[end].index);
          load[rank] += bytes;
          load[shared[end].owner] += bytes;
          full = full || load[rank] > kRoundBytes || load[shared[end].owner] > kRoundBytes;
        }
      }
      write_round({shared.data() + begin, end - begin});
      begin = end;
    }
  }

  void write_round(std::span<const SharedChunk> round) {
    const int me = communicator_.rank();
    std::map<int, std::vector<std::byte>> outgoing;
    std::map<int, std::vector<std::byte>> incoming;
    for (const SharedChunk& chunk : round) {
      for (const int rank : chunk.ranks) {
        if (rank == chunk.owner) continue;
        if (rank == me) pack(chunk.index, outgoing[chunk.owner]);
        if (chunk.owner != me) continue;
        auto& bytes = incoming[rank];
        bytes.resize(bytes.size() + static_cast<std::size_t>(part_bytes(rank, chunk.index)));
      }
    }
    exchange(outgoing, incoming);
    std::map<int, std::size_t> taken;
    for (const SharedChunk& chunk : round) {
      if (chunk.owner != me) continue;
      std::byte* data = cleared_chunk();
      for (const int rank : chunk.ranks) {
        if (rank == me) {
          gather_own(chunk.index, data);
        } else {
          unpack(chunk.index, rank, incoming[rank], taken[rank], data);
        }
      }
      attempt([&] { store(chunk.index, data); });
    }
  }

  void exchange(std::map<int, std::vector<std::byte>>& outgoing,
                std::map<int, std::vector<std::byte>>& incoming) {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    for (const auto& [peer, bytes] : outgoing) {
      sends.push_back({peer, bytes.data(), static_cast<std::int64_t>(bytes.size())});
    }
    for (auto& [peer, bytes] : incoming) {
      receives.push_back({peer, bytes.data(), static_cast<std::int64_t>(bytes.size())});
    }
    communicator_.exchange(sends, receives)->wait();
  }

  void pack(std::int64_t chunk, std::vector<std::byte>& bytes) {
    const Shape begin = layout_.begin_of(chunk);
    for_each_box_within(part(communicator_.rank()), begin, layout_.chunk(), [&](const Box& box) {
      const std::size_t at = bytes.size();
      bytes.resize(at +
                   static_cast<std::size_t>(box.extent.elements() * size_bytes(dataset_.dtype)));
      copy(subview(dataset_.data, box.local_begin, box.extent),
           TensorView(bytes.data() + at, dataset_.dtype, box.extent));
    });
  }

  void unpack(std::int64_t chunk, int rank, const std::vector<std::byte>& bytes, std::size_t& taken,
              std::byte* data) {
    const Shape begin = layout_.begin_of(chunk);
    for_each_box_within(part(rank), begin, layout_.chunk(), [&](const Box& box) {
      copy(ConstTensorView(bytes.data() + taken, dataset_.dtype, box.extent),
           place_of(box, begin, data));
      taken += static_cast<std::size_t>(box.extent.elements() * size_bytes(dataset_.dtype));
    });
  }

  Communicator& communicator_;
  const OpenOutput& output_;
  const OutputDataset& dataset_;
  const OutputLayout& layout_;
  std::vector<std::int64_t> offsets_;
  Buffer chunk_;
  std::optional<Error> failure_;
};

// Rank 0 lays the file out; everybody learns where the chunks are.
std::vector<std::vector<std::int64_t>> agreed_offsets(Communicator& communicator,
                                                      const OpenOutput& output,
                                                      std::span<const OutputDataset> datasets,
                                                      const std::vector<OutputLayout>& layouts,
                                                      std::span<const OutputAttribute> attributes) {
  std::vector<std::vector<std::int64_t>> offsets(datasets.size());
  agree(communicator, [&] {
    if (communicator.rank() != 0) return;
    std::vector<LayoutRequest> requests;
    for (std::size_t i = 0; i < datasets.size(); ++i) {
      requests.push_back({datasets[i].path, datasets[i].dtype, layouts[i].shape(),
                          layouts[i].chunk(), layouts[i].chunks()});
    }
    offsets = lay_out(output.descriptor, output.path, requests, attributes);
  });
  std::vector<Send> sends;
  std::vector<Receive> receives;
  for (std::size_t i = 0; i < datasets.size(); ++i) {
    offsets[i].resize(static_cast<std::size_t>(layouts[i].chunks()));
    const auto bytes = static_cast<std::int64_t>(offsets[i].size() * sizeof(std::int64_t));
    if (communicator.rank() != 0) receives.push_back({0, offsets[i].data(), bytes});
    for (int peer = 1; communicator.rank() == 0 && peer < communicator.size(); ++peer) {
      sends.push_back({peer, offsets[i].data(), bytes});
    }
  }
  communicator.exchange(sends, receives)->wait();
  return offsets;
}

}  // namespace

void require_writable_output(Communicator& communicator, const std::string& path, bool force) {
  agree(communicator, [&] {
    if (communicator.rank() == 0) check_destination(path, force);
  });
}

void write_checkpoint(Communicator& communicator, const std::string& path,
                      std::span<const OutputDataset> datasets,
                      std::span<const OutputAttribute> attributes, const OutputOptions& options) {
  require_writable_output(communicator, path, options.force);
  std::vector<OutputLayout> layouts;
  for (const OutputDataset& dataset : datasets) {
    layouts.push_back(agreed_layout(communicator, path, dataset));
  }
  PendingFile file(communicator, path);
  const OpenOutput output{file.descriptor(), path};
  const auto offsets = agreed_offsets(communicator, output, datasets, layouts, attributes);
  std::optional<Error> failure;
  for (std::size_t i = 0; i < datasets.size(); ++i) {
    DatasetWriter writer(communicator, output, datasets[i], layouts[i], offsets[i]);
    const std::optional<Error> failed = writer.write();
    if (!failure) failure = failed;
  }
  agree(communicator, [&] {
    if (failure) throw Error(*failure);
  });
  file.commit(communicator, options.force, options.durable);
}

}  // namespace annulus
