#include "runtime/chunk_filters.hpp"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>

#include "kernels/error.hpp"
#include "runtime/scale_offset_filter.hpp"
#include "runtime/szip_filter.hpp"

namespace annulus {
namespace {

// Sums run in lanes of 32 bits: a lane's second sum stays below 2^32 for 256 words.
constexpr std::size_t kLanes = 16;
constexpr std::size_t kLaneWords = 256;

std::uint64_t reduce(std::uint64_t sum) {
  sum = (sum & 0xffff) + (sum >> 16);
  sum = (sum & 0xffff) + (sum >> 16);
  return (sum & 0xffff) + (sum >> 16);
}

// Modulo 2^16 − 1 a byte swap is a multiplication by 256, so words may be summed in the machine's
// order and the two sums swapped at the end.
std::uint32_t swap_bytes(std::uint64_t sum) {
  return static_cast<std::uint32_t>(((sum & 0xff) << 8) | (sum >> 8));
}

struct FletcherSums {
  std::uint64_t first = 0;
  std::uint64_t second = 0;
};

// Adds lanes × lane_words words, dealt to the lanes in turn. Of N words, word i = t·lanes + l
// counts N − i = (lane_words − t)·lanes − l times in the second sum; the lane's own second sum
// counts it lane_words − t times.
void add_block(const std::byte* data, std::size_t lanes, std::size_t lane_words,
               FletcherSums& sums) {
  std::array<std::uint32_t, kLanes> first{};
  std::array<std::uint32_t, kLanes> second{};
  if (lanes == kLanes) {
    for (std::size_t t = 0; t < lane_words; ++t) {
      std::array<std::uint16_t, kLanes> words{};
      std::memcpy(words.data(), data + t * sizeof(words), sizeof(words));
      for (std::size_t l = 0; l < kLanes; ++l) {
        first[l] += words[l];
        second[l] += first[l];
      }
    }
  } else {
    for (std::size_t t = 0; t < lane_words; ++t) {
      std::uint16_t word = 0;
      std::memcpy(&word, data + t * sizeof(word), sizeof(word));
      first[0] += word;
      second[0] += first[0];
    }
  }
  std::uint64_t plain = 0;
  std::uint64_t weighted = 0;
  for (std::size_t l = 0; l < lanes; ++l) {
    plain += first[l];
    weighted += lanes * second[l] - l * first[l];
  }
  sums.second = reduce(sums.second + lanes * lane_words * sums.first + weighted);
  sums.first = reduce(sums.first + plain);
}

std::span<std::byte> without_checksum(std::vector<std::byte>& buffer) {
  require(buffer.size() >= kFletcherBytes, ExitCode::bad_data, "chunk too short for a checksum");
  const std::span<std::byte> data(buffer.data(), buffer.size() - kFletcherBytes);
  require_fletcher32(fletcher32(data), std::span<const std::byte, kFletcherBytes>(
                                           data.data() + data.size(), kFletcherBytes));
  return data;
}

template <std::size_t kBytes>
void interleave(const std::byte* planes, std::size_t count, std::byte* elements) {
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t byte = 0; byte < kBytes; ++byte) {
      elements[i * kBytes + byte] = planes[byte * count + i];
    }
  }
}

void interleave(const std::byte* planes, std::size_t count, std::size_t bytes,
                std::byte* elements) {
  for (std::size_t byte = 0; byte < bytes; ++byte) {
    for (std::size_t i = 0; i < count; ++i) elements[i * bytes + byte] = planes[byte * count + i];
  }
}

void unshuffle(std::size_t bytes, const std::vector<std::byte>& from, std::vector<std::byte>& to) {
  to.resize(from.size());
  const std::size_t count = bytes == 0 ? 0 : from.size() / bytes;
  switch (bytes) {
    case 2:
      interleave<2>(from.data(), count, to.data());
      break;
    case 4:
      interleave<4>(from.data(), count, to.data());
      break;
    case 8:
      interleave<8>(from.data(), count, to.data());
      break;
    default:
      interleave(from.data(), count, bytes, to.data());
  }
  // A remainder that is no whole element was left where it stood.
  std::copy(from.begin() + static_cast<std::ptrdiff_t>(count * bytes), from.end(),
            to.begin() + static_cast<std::ptrdiff_t>(count * bytes));
}

void inflate_chunk(std::size_t most_bytes, std::vector<std::byte>& from,
                   std::vector<std::byte>& to) {
  constexpr std::size_t kMost = std::numeric_limits<uInt>::max();
  require(from.size() <= kMost && most_bytes < kMost, ExitCode::bad_data, "chunk too large");
  to.resize(most_bytes + 1);  // one more tells "exactly full" from "more to come"
  z_stream stream{};
  stream.next_in = reinterpret_cast<Bytef*>(from.data());
  stream.avail_in = static_cast<uInt>(from.size());
  stream.next_out = reinterpret_cast<Bytef*>(to.data());
  stream.avail_out = static_cast<uInt>(to.size());
  require(inflateInit(&stream) == Z_OK, ExitCode::no_memory, "zlib could not start");
  const std::unique_ptr<z_stream, int (*)(z_stream*)> owner(&stream, inflateEnd);
  const int status = inflate(&stream, Z_FINISH);
  require(stream.total_out <= most_bytes, ExitCode::bad_data,
          "a chunk inflates to more than its {} bytes", most_bytes);
  require(status == Z_STREAM_END, ExitCode::bad_data, "inflate() failed: {}",
          stream.msg != nullptr ? stream.msg : "the stream ends early");
  to.resize(stream.total_out);
}

}  // namespace

std::string filter_name(int id) {
  constexpr std::array<const char*, 7> kNames = {"",     "deflate", "shuffle",    "fletcher32",
                                                 "szip", "nbit",    "scaleoffset"};
  return id > 0 && id < static_cast<int>(kNames.size()) ? kNames[static_cast<std::size_t>(id)] : "";
}

void require_decodable(std::span<const ChunkFilter> filters, const std::string& what) {
  require(filters.size() <= kMostFilters, ExitCode::bad_data,
          "{}: has {} filters, at most {} are accepted", what, filters.size(), kMostFilters);
  for (const ChunkFilter& filter : filters) {
    require(!filter_name(filter.id).empty(), ExitCode::bad_data,
            "{}: filter {} is not accepted; accepted: deflate, shuffle, fletcher32, szip, nbit, "
            "scaleoffset",
            what, filter.id);
    switch (filter.id) {
      case ChunkFilter::kSzip:
        require_szip(filter, what);
        break;
      case ChunkFilter::kScaleOffset:
        require_scale_offset(filter, what);
        break;
      case ChunkFilter::kNbit:
        // Its second parameter says that all bits of the elements are in use.
        require(filter.parameter(1) != 0, ExitCode::bad_data,
                "{}: nbit packs elements that have no unused bits", what);
        break;
      default:
        break;
    }
  }
}

void Fletcher32::add(std::span<const std::byte> data) {
  std::size_t words = data.size() / 2;
  const std::byte* next = data.data();
  FletcherSums sums{first_, second_};
  while (words > 0) {
    const std::size_t lanes = words >= kLanes ? kLanes : 1;
    const std::size_t lane_words = std::min(words / lanes, kLaneWords);
    add_block(next, lanes, lane_words, sums);
    next += 2 * lanes * lane_words;
    words -= lanes * lane_words;
  }
  if (data.size() % 2 != 0) {
    // The last byte is the high half of a big-endian word, hence the low one here.
    sums.first = reduce(sums.first + std::to_integer<std::uint64_t>(*next));
    sums.second = reduce(sums.second + sums.first);
  }
  first_ = sums.first;
  second_ = sums.second;
}

std::uint32_t Fletcher32::value() const { return (swap_bytes(second_) << 16) | swap_bytes(first_); }

std::uint32_t fletcher32(std::span<const std::byte> data) {
  Fletcher32 sum;
  sum.add(data);
  return sum.value();
}

void require_fletcher32(std::uint32_t found, std::span<const std::byte, kFletcherBytes> stored) {
  std::uint32_t wanted = 0;
  for (std::size_t i = 0; i < kFletcherBytes; ++i) {
    wanted |= std::to_integer<std::uint32_t>(stored[i]) << (8 * i);
  }
  // HDF5 before 1.6.3 wrote each half with its bytes exchanged on little-endian machines.
  const std::uint32_t exchanged = ((found & 0x00ff00ff) << 8) | ((found >> 8) & 0x00ff00ff);
  require(wanted == found || wanted == exchanged, ExitCode::bad_data,
          "checksum mismatch: Fletcher32 {:08x} stored, {:08x} found", wanted, found);
}

void decode_chunk(std::span<const ChunkFilter> filters, std::uint32_t skipped,
                  std::int64_t chunk_bytes, std::vector<std::byte>& buffer,
                  std::vector<std::byte>& scratch) {
  const std::size_t most_bytes =
      static_cast<std::size_t>(chunk_bytes) + kFletcherBytes * filters.size();
  for (std::size_t i = filters.size(); i-- > 0;) {
    if ((skipped >> i) & 1U) continue;
    switch (filters[i].id) {
      case ChunkFilter::kFletcher32:
        buffer.resize(without_checksum(buffer).size());
        continue;
      case ChunkFilter::kShuffle:
        unshuffle(filters[i].parameter(0), buffer, scratch);
        break;
      case ChunkFilter::kDeflate:
        inflate_chunk(most_bytes, buffer, scratch);
        break;
      case ChunkFilter::kNbit:
        continue;  // of elements without unused bits: nothing was packed
      case ChunkFilter::kSzip:
        decode_szip(filters[i], most_bytes, buffer, scratch);
        break;
      case ChunkFilter::kScaleOffset:
        decode_scale_offset(filters[i], most_bytes, buffer, scratch);
        break;
      default:
        throw Error(ExitCode::internal, fmt::format("no decoder for filter {}", filters[i].id));
    }
    buffer.swap(scratch);
  }
  require(buffer.size() == static_cast<std::size_t>(chunk_bytes), ExitCode::bad_data,
          "a chunk holds {} bytes, expected {}", buffer.size(), chunk_bytes);
}

}  // namespace annulus
