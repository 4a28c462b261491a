// What a child process says of a file is checked like the file: HDF5 may have been made to say
// anything.

#include "runtime/hdf5_table.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "runtime/hdf5_file.hpp"
#include "runtime/hdf5_sample.hpp"

namespace annulus {
namespace {

constexpr std::int64_t kFileBytes = 10000;

DatasetInfo chunked() {
  DatasetInfo info;
  info.path = "query";
  info.shape = {7, 5};
  info.storage = Storage::chunked;
  info.chunk = {2, 3};
  info.filters = {{ChunkFilter::kShuffle, {4}}, {ChunkFilter::kDeflate, {6}}};
  info.data_bytes = 140;
  info.chunks = std::make_shared<const std::vector<StoredChunk>>(
      std::vector<StoredChunk>{{0, 100, 24, 0}, {3, 200, 30, 1}, {7, 9970, 30, 0}});
  return info;
}

DatasetInfo compact() {
  DatasetInfo info;
  info.path = "key";
  info.shape = {3};
  info.storage = Storage::compact;
  info.data_bytes = 12;
  info.content = std::make_shared<const std::vector<std::byte>>(12, std::byte{5});
  return info;
}

Hdf5Table table_of(const DatasetInfo& info) {
  Hdf5Table table;
  table.file_bytes = kFileBytes;
  table.datasets.emplace(info.path, info);
  return table;
}

// True when it is refused as an Error.
bool is_refused(const std::vector<std::byte>& bytes) {
  try {
    static_cast<void>(Hdf5Table::decode(bytes, "in.h5"));
    return false;
  } catch (const Error&) {
    return true;
  }
}

bool is_refused(const DatasetInfo& info) { return is_refused(table_of(info).encode()); }

TEST(Hdf5Table, ArrivesAsItWasSent) {
  Hdf5Table table = table_of(chunked());
  table.datasets.emplace("key", compact());
  table.datasets.emplace("none", Error(ExitCode::missing_input, "none: does not exist"));
  table.attributes.emplace(Hdf5Table::AttributeName("output", "options"), std::string("a=1"));
  table.paths = std::vector<std::string>{"query", "key"};
  table.chosen = {"query"};
  const Hdf5Table found = Hdf5Table::decode(table.encode(), "in.h5");
  EXPECT_EQ(found.encode(), table.encode());
  EXPECT_EQ(value_of(found.datasets.at("query")).chunks->at(1).offset, 200);
  EXPECT_EQ(value_of(found.datasets.at("key")).content->size(), 12U);
  EXPECT_THROW(value_of(found.datasets.at("none")), Error);
  EXPECT_EQ(value_of(*found.paths).size(), 2U);
}

TEST(Hdf5Table, ClaimsThatLeaveTheFileTheGridOrTheBufferAreRefused) {
  ASSERT_FALSE(is_refused(chunked()));
  const auto with_chunk = [](std::size_t which, StoredChunk chunk) {
    DatasetInfo info = chunked();
    std::vector<StoredChunk> chunks = *info.chunks;
    chunks[which] = chunk;
    info.chunks = std::make_shared<const std::vector<StoredChunk>>(chunks);
    return info;
  };
  EXPECT_TRUE(is_refused(with_chunk(2, {7, 9971, 30, 0}))) << "beyond the file";
  EXPECT_TRUE(is_refused(with_chunk(2, {7, -1, 30, 0})));
  EXPECT_TRUE(is_refused(with_chunk(2, {8, 100, 30, 0}))) << "beyond the grid";
  EXPECT_TRUE(is_refused(with_chunk(1, {0, 100, 24, 0}))) << "twice";
  EXPECT_TRUE(is_refused(with_chunk(0, {0, 100, 0, 0})));
  DatasetInfo info = chunked();
  info.chunk = {2, 0};
  EXPECT_TRUE(is_refused(info));
  info = chunked();
  info.data_bytes = 144;
  EXPECT_TRUE(is_refused(info));
  info = chunked();
  info.filters[0].id = 32015;
  EXPECT_TRUE(is_refused(info));
  info = compact();
  info.content = std::make_shared<const std::vector<std::byte>>(11, std::byte{5});
  EXPECT_TRUE(is_refused(info));
}

TEST(Hdf5Table, AnyBytesAreATableOrAnError) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  Hdf5Table table = table_of(chunked());
  table.datasets.emplace("key", compact());
  table.chosen = {"query", "key"};
  const std::vector<std::byte> whole = table.encode();
  int refused = 0;
  for (int i = 0; i < 50000; ++i) {
    std::vector<std::byte> bytes = whole;
    for (unsigned change = random() % 4; change < 4; ++change) {
      const std::uint64_t word =
          random() % 3 == 0 ? ~std::uint64_t{0} >> (random() % 64) : random();
      std::memcpy(bytes.data() + random() % (bytes.size() - 8), &word, 1U << (random() % 4));
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    refused += is_refused(bytes) ? 1 : 0;
  }
  EXPECT_GT(refused, 10000);
}

// Filters with parameters that a file may state, over bytes that a file may hold.
TEST(ChunkFilters, AnyBytesAreAChunkOrAnError) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 engine(seed);
  const auto random = [&engine] { return static_cast<std::uint32_t>(engine()); };
  for (int i = 0; i < 50000; ++i) {
    std::vector<ChunkFilter> filters(random() % 3 + 1);
    for (ChunkFilter& filter : filters) {
      filter.id = static_cast<int>(random() % 6) + 1;
      for (int p = 0; p < 12; ++p)
        filter.parameters.push_back(random() % 3 ? random() % 9 : random());
      if (filter.id == ChunkFilter::kSzip) {
        filter.parameters = {141, 8, 8U << (random() % 4), 8 + random() % 64};
      }
    }
    std::vector<std::byte> buffer(random() % 300);
    for (std::byte& byte : buffer) byte = static_cast<std::byte>(random() % 4 ? random() : 0);
    if (buffer.size() > 4 && random() % 2 == 0) std::memset(&buffer[1], 0, 3);  // small lengths
    std::vector<std::byte> scratch;
    try {
      require_decodable(filters, "query");
      decode_chunk(filters, random() % 4, 96, buffer, scratch);
      EXPECT_EQ(buffer.size(), 96U);
    } catch (const Error&) {
    }
  }
}

}  // namespace
}  // namespace annulus
