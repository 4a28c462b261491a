#include "runtime/hdf5_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <string>
#include <utility>

#include "runtime/agreement.hpp"
#include "runtime/hdf5_reader.hpp"
#include "runtime/hdf5_source.hpp"
#include "runtime/posix_file.hpp"
#include "runtime/statement.hpp"

namespace annulus {
namespace {

// HDF5 keeps a small file's metadata there.
constexpr std::int64_t kHeadBytes = 65536;

// Refuses a pipe or a folder before anything could hang on it.
void require_regular_file(const std::string& path) {
  struct stat status {};
  const bool found = stat(path.c_str(), &status) == 0;
  require(found, ExitCode::missing_input, "{}: cannot be read: {}", path, errno_text(errno));
  require(S_ISREG(status.st_mode), ExitCode::bad_data, "{}: is not a regular file", path);
}

FileDescriptor open_to_read(const std::string& path) {
  require_regular_file(path);
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  require(static_cast<bool>(file), ExitCode::missing_input, "{}: cannot be read: {}", path,
          errno_text(errno));
  return file;
}

std::int64_t size_of(const FileDescriptor& file, const std::string& path) {
  struct stat status {};
  const bool known = fstat(file.value(), &status) == 0;
  require(known, ExitCode::io, "{}: its size: {}", path, errno_text(errno));
  return status.st_size;
}

std::uint64_t head_digest_of(const FileDescriptor& file, const std::string& path) {
  std::string head(static_cast<std::size_t>(std::min(kHeadBytes, size_of(file, path))), '\0');
  const ssize_t got = pread(file.value(), head.data(), head.size(), 0);
  require(got == static_cast<ssize_t>(head.size()), ExitCode::io,
          "{}: {} of its first {} bytes can be read: {}", path, got, head.size(),
          errno_text(errno));
  return digest(head);
}

void ask(const Hdf5Source& source, const Hdf5Questions& questions, Hdf5Table& table) {
  for (const std::string& name : questions.datasets) {
    table.datasets.insert_or_assign(name,
                                    answer_of<DatasetInfo>([&] { return source.describe(name); }));
  }
  for (const auto& name : questions.attributes) {
    table.attributes.insert_or_assign(name, answer_of<std::string>([&] {
                                        return source.text_attribute(name.first, name.second);
                                      }));
  }
  if (questions.paths) {
    table.paths = answer_of<std::vector<std::string>>([&] { return source.dataset_paths(); });
  }
}

}  // namespace

struct Hdf5File::State {
  std::string path;
  FileDescriptor file;
  mutable std::mutex mutex;  // of the table, which grows with questions
  mutable Hdf5Table table;

  explicit State(const std::string& name) : path(name), file(open_to_read(name)) {}

  Hdf5Table found_by(const Hdf5Walk& walk) const {
    Hdf5Table found = walk_hdf5(file.value(), path, size_of(file, path), walk);
    found.head_digest = head_digest_of(file, path);
    return found;
  }

  void answer(const Hdf5Questions& questions) const {
    Hdf5Table found = found_by(
        [&](const Hdf5Source& source, Hdf5Table& answers) { ask(source, questions, answers); });
    table.file_bytes = found.file_bytes;
    table.datasets.merge(found.datasets);
    table.attributes.merge(found.attributes);
    if (found.paths) table.paths = std::move(found.paths);
  }

  void use(const std::vector<std::byte>& found) const {
    table = Hdf5Table::decode(found, path);
    const std::int64_t bytes = size_of(file, path);
    require(bytes == table.file_bytes, ExitCode::bad_data,
            "{}: has {} bytes here, {} on rank 0; give all ranks the same file", path, bytes,
            table.file_bytes);
    require(head_digest_of(file, path) == table.head_digest, ExitCode::bad_data,
            "{}: is another file here than on rank 0: of the same {} bytes, the first {} differ",
            path, bytes, std::min(kHeadBytes, bytes));
  }
};

Hdf5File::Hdf5File(const std::string& path, const Hdf5Questions& questions)
    : state_(std::make_unique<State>(path)) {
  state_->answer(questions);
}

Hdf5File::Hdf5File(Communicator& ranks, const std::string& path, const Hdf5Questions& questions)
    : Hdf5File(ranks, path, [&](const Hdf5Source& source, Hdf5Table& answers) {
        ask(source, questions, answers);
      }) {}

Hdf5File::Hdf5File(Communicator& ranks, const std::string& path, const Hdf5Walk& walk) {
  std::vector<std::byte> found;
  agree(ranks, [&] {
    state_ = std::make_unique<State>(path);
    if (ranks.rank() == 0) found = state_->found_by(walk).encode();
  });
  found = broadcast_bytes(ranks, std::move(found));
  agree(ranks, [&] { state_->use(found); });
}

Hdf5File::~Hdf5File() = default;
Hdf5File::Hdf5File(Hdf5File&&) noexcept = default;
Hdf5File& Hdf5File::operator=(Hdf5File&&) noexcept = default;

const std::string& Hdf5File::path() const { return state_->path; }

std::int64_t Hdf5File::bytes() const { return state_->table.file_bytes; }

std::vector<std::string> Hdf5File::dataset_paths() const {
  const std::lock_guard lock(state_->mutex);
  if (!state_->table.paths) state_->answer({{}, {}, true});
  return value_of(*state_->table.paths);
}

DatasetInfo Hdf5File::describe(const std::string& dataset) const {
  const std::lock_guard lock(state_->mutex);
  const auto& known = state_->table.datasets;
  if (!known.contains(dataset)) state_->answer({{dataset}, {}, false});
  return value_of(known.at(dataset));
}

std::optional<std::string> Hdf5File::text_attribute(const std::string& object,
                                                    const std::string& name) const {
  const std::lock_guard lock(state_->mutex);
  const Hdf5Table::AttributeName key(object, name);
  const auto& known = state_->table.attributes;
  if (!known.contains(key)) state_->answer({{}, {key}, false});
  const std::string& text = value_of(known.at(key));
  if (text.empty()) return std::nullopt;
  return text;
}

const std::vector<std::string>& Hdf5File::chosen() const { return state_->table.chosen; }

OpenDataset Hdf5File::open_dataset(const DatasetInfo& dataset) const {
  return {state_->file.value(), state_->path + ": " + printable(dataset.path), dataset};
}

void Hdf5File::read(const DatasetInfo& dataset, const Selection& selection, TensorView destination,
                    const ReadOptions& options) const {
  read_dataset(open_dataset(dataset), selection, destination, options);
}

}  // namespace annulus
