#include "runtime/agreement.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>
#include <string>

#include "kernels/error.hpp"

namespace annulus {
namespace {

std::vector<std::byte> bytes_of(const std::string& text) {
  std::vector<std::byte> bytes(text.size());
  if (!text.empty()) std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

template <typename Value>
std::vector<Value> gather_values(Communicator& communicator, const Value& mine) {
  std::vector<Value> all(static_cast<std::size_t>(communicator.size()));
  communicator.all_gather(std::as_bytes(std::span(&mine, 1)),
                          std::as_writable_bytes(std::span(all)));
  return all;
}

}  // namespace

std::vector<std::vector<std::byte>> gather_bytes(Communicator& communicator,
                                                 const std::vector<std::byte>& mine) {
  const auto sizes = gather_values(communicator, static_cast<std::int64_t>(mine.size()));
  const auto longest = static_cast<std::size_t>(*std::max_element(sizes.begin(), sizes.end()));
  std::vector<std::byte> padded = mine;
  padded.resize(longest);
  std::vector<std::byte> all(longest * sizes.size());
  if (longest > 0) communicator.all_gather(padded, all);
  std::vector<std::vector<std::byte>> result;
  for (std::size_t rank = 0; rank < sizes.size(); ++rank) {
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(rank * longest);
    result.emplace_back(begin, begin + static_cast<std::ptrdiff_t>(sizes[rank]));
  }
  return result;
}

std::vector<std::byte> broadcast_bytes(Communicator& communicator, std::vector<std::byte> bytes) {
  const auto size = gather_values(communicator, static_cast<std::int64_t>(bytes.size())).front();
  bytes.resize(static_cast<std::size_t>(size));
  const int rank = communicator.rank();
  for (int have = 1; have < communicator.size(); have *= 2) {
    std::vector<Send> sends;
    std::vector<Receive> receives;
    if (rank < have && rank + have < communicator.size()) {
      sends.push_back({rank + have, bytes.data(), size});
    }
    if (rank >= have && rank < 2 * have) receives.push_back({rank - have, bytes.data(), size});
    if (!sends.empty() || !receives.empty()) communicator.exchange(sends, receives)->wait();
  }
  return bytes;
}

void agree(Communicator& communicator, const std::function<void()>& step) {
  std::int32_t code = 0;
  std::string message;
  try {
    step();
  } catch (const Error& error) {
    code = static_cast<std::int32_t>(error.code());
    message = error.what();
  } catch (const std::bad_alloc& error) {
    code = static_cast<std::int32_t>(ExitCode::no_memory);
    message = error.what();
  } catch (const std::exception& error) {
    code = static_cast<std::int32_t>(ExitCode::internal);
    message = error.what();
  }
  const auto codes = gather_values(communicator, code);
  const auto failed =
      std::find_if(codes.begin(), codes.end(), [](std::int32_t other) { return other != 0; });
  if (failed == codes.end()) return;
  const auto messages = gather_bytes(communicator, bytes_of(message));
  const auto rank = static_cast<std::size_t>(failed - codes.begin());
  const bool everywhere =
      std::all_of(messages.begin(), messages.end(),
                  [&](const std::vector<std::byte>& other) { return other == messages[rank]; });
  const std::string text = text_of(messages[rank]);
  throw Error(static_cast<ExitCode>(*failed),
              everywhere || rank == 0 ? text : fmt::format("rank {}: {}", rank, text));
}

}  // namespace annulus
