#include "runtime/hdf5_table.hpp"

#include <algorithm>

#include "runtime/byte_stream.hpp"

namespace annulus {
namespace {

// ---- writing ------------------------------------------------------------------------------------

void put(ByteWriter& writer, const std::string& text) { writer.put_text(text); }

void put(ByteWriter& writer, const std::vector<std::string>& texts) {
  writer.put(static_cast<std::uint64_t>(texts.size()));
  for (const std::string& text : texts) writer.put_text(text);
}

void put(ByteWriter& writer, const Shape& shape) {
  writer.put(static_cast<std::int32_t>(shape.rank()));
  for (const std::int64_t extent : shape.dims()) writer.put(extent);
}

void put(ByteWriter& writer, const DatasetInfo& info) {
  writer.put_text(info.path);
  put(writer, info.shape);
  writer.put(static_cast<std::uint8_t>(info.type.kind));
  writer.put(static_cast<std::uint8_t>(info.type.dtype));
  writer.put(static_cast<std::int32_t>(info.type.bytes));
  writer.put(static_cast<std::uint8_t>(info.type.is_signed));
  writer.put(static_cast<std::uint8_t>(info.type.big_endian));
  writer.put(static_cast<std::uint8_t>(info.storage));
  writer.put(info.file_offset);
  writer.put(info.data_bytes);
  if (info.storage == Storage::compact) writer.put_bytes(*info.content);
  if (info.storage != Storage::chunked) return;
  put(writer, info.chunk);
  writer.put(info.fill);
  writer.put(static_cast<std::uint64_t>(info.filters.size()));
  for (const ChunkFilter& filter : info.filters) {
    writer.put(static_cast<std::int32_t>(filter.id));
    writer.put_bytes(std::as_bytes(std::span(filter.parameters)));
  }
  writer.put_bytes(std::as_bytes(std::span(*info.chunks)));
}

template <typename Value>
void put(ByteWriter& writer, const Hdf5Answer<Value>& answer) {
  const auto* error = std::get_if<Error>(&answer);
  writer.put(static_cast<std::int32_t>(error != nullptr ? error->code() : ExitCode(0)));
  if (error != nullptr) return writer.put_text(error->what());
  put(writer, std::get<Value>(answer));
}

// ---- reading ------------------------------------------------------------------------------------

void take(ByteReader& reader, std::string& text) { text = reader.take_text(); }

void take(ByteReader& reader, std::vector<std::string>& texts) {
  texts.resize(reader.take_count(sizeof(std::uint64_t)));
  for (std::string& text : texts) text = reader.take_text();
}

void take(ByteReader& reader, Shape& shape) {
  std::array<std::int64_t, Shape::kMaxRank> extents{};
  const auto rank = reader.take<std::int32_t>();
  require(rank >= 0 && rank <= Shape::kMaxRank, ExitCode::bad_data, "a table with a rank of {}",
          rank);
  for (int dim = 0; dim < rank; ++dim) {
    extents[static_cast<std::size_t>(dim)] = reader.take<std::int64_t>();
  }
  shape = Shape(std::span<const std::int64_t>(extents.data(), static_cast<std::size_t>(rank)));
}

template <typename Value>
std::vector<Value> take_values(ByteReader& reader) {
  const auto bytes = reader.take_bytes();
  std::vector<Value> values(bytes.size() / sizeof(Value));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), values.size() * sizeof(Value));
  return values;
}

void take(ByteReader& reader, DatasetInfo& info) {
  info.path = reader.take_text();
  take(reader, info.shape);
  info.type.kind = static_cast<StoredType::Kind>(reader.take<std::uint8_t>());
  info.type.dtype = static_cast<DType>(reader.take<std::uint8_t>());
  info.type.bytes = reader.take<std::int32_t>();
  info.type.is_signed = reader.take<std::uint8_t>() != 0;
  info.type.big_endian = reader.take<std::uint8_t>() != 0;
  info.storage = static_cast<Storage>(reader.take<std::uint8_t>());
  info.file_offset = reader.take<std::int64_t>();
  info.data_bytes = reader.take<std::int64_t>();
  if (info.storage == Storage::compact) {
    info.content = std::make_shared<const std::vector<std::byte>>(take_values<std::byte>(reader));
  }
  if (info.storage != Storage::chunked) return;
  take(reader, info.chunk);
  info.fill = reader.take<decltype(info.fill)>();
  info.filters.resize(reader.take_count(sizeof(std::int32_t)));
  for (ChunkFilter& filter : info.filters) {
    filter.id = reader.take<std::int32_t>();
    filter.parameters = take_values<std::uint32_t>(reader);
  }
  info.chunks = std::make_shared<const std::vector<StoredChunk>>(take_values<StoredChunk>(reader));
}

template <typename Value>
Hdf5Answer<Value> take_answer(ByteReader& reader) {
  const auto code = reader.take<std::int32_t>();
  if (code != 0) {
    const bool known = code >= static_cast<std::int32_t>(ExitCode::usage) &&
                       code <= static_cast<std::int32_t>(ExitCode::peer);
    return Error(known ? static_cast<ExitCode>(code) : ExitCode::bad_data, reader.take_text());
  }
  Value value;
  take(reader, value);
  return value;
}

}  // namespace

std::vector<std::byte> Hdf5Table::encode() const {
  ByteWriter writer;
  writer.put(file_bytes);
  writer.put(head_digest);
  writer.put(static_cast<std::uint64_t>(datasets.size()));
  for (const auto& [name, answer] : datasets) {
    writer.put_text(name);
    put(writer, answer);
  }
  writer.put(static_cast<std::uint64_t>(attributes.size()));
  for (const auto& [name, answer] : attributes) {
    writer.put_text(name.first);
    writer.put_text(name.second);
    put(writer, answer);
  }
  writer.put(static_cast<std::uint8_t>(paths.has_value()));
  if (paths) put(writer, *paths);
  put(writer, chosen);
  return writer.take();
}

Hdf5Table Hdf5Table::decode(std::span<const std::byte> bytes, const std::string& file) {
  ByteReader reader(bytes, file + ": what its probe found");
  Hdf5Table table;
  table.file_bytes = reader.take<std::int64_t>();
  table.head_digest = reader.take<std::uint64_t>();
  for (std::size_t left = reader.take_count(1); left > 0; --left) {
    const std::string name = reader.take_text();
    auto answer = take_answer<DatasetInfo>(reader);
    if (const auto* info = std::get_if<DatasetInfo>(&answer)) {
      require_consistent(*info, table.file_bytes, file + ": " + printable(name));
    }
    table.datasets.insert_or_assign(name, std::move(answer));
  }
  for (std::size_t left = reader.take_count(1); left > 0; --left) {
    const std::string object = reader.take_text();
    const std::string name = reader.take_text();
    table.attributes.insert_or_assign(AttributeName(object, name),
                                      take_answer<std::string>(reader));
  }
  if (reader.take<std::uint8_t>() != 0) {
    table.paths = take_answer<std::vector<std::string>>(reader);
  }
  take(reader, table.chosen);
  return table;
}

}  // namespace annulus
