#include "runtime/checkpoint.hpp"

#include <algorithm>
#include <functional>
#include <utility>

#include "kernels/error.hpp"
#include "runtime/agreement.hpp"
#include "runtime/hdf5_source.hpp"

namespace annulus {
namespace {

using Names = std::array<std::string, 3>;  // of query, key, value

const std::array<Names, 2> kDefaultNames = {{{"query", "key", "value"}, {"q", "k", "v"}}};

constexpr std::array<std::string_view, kCheckpointFields> kFieldNames = {
    "query", "key", "value", "documents", "cu_seqlens", "mask", "bias", "sinks", "grad_output"};

// What is wrong with a file, to be told in one message.
struct Problems {
  std::vector<std::string> texts;
  bool all_missing = true;

  void add(const Error& error) {
    all_missing = all_missing && error.code() == ExitCode::missing_input;
    if (std::find(texts.begin(), texts.end(), error.what()) == texts.end()) {
      texts.emplace_back(error.what());
    }
  }
  /// Runs one check; later ones run whatever it finds.
  void collect(const std::function<void()>& check) {
    try {
      check();
    } catch (const Error& error) {
      add(error);
    }
  }
  void raise() const {
    if (texts.empty()) return;
    std::string text;
    for (const std::string& problem : texts) text += (text.empty() ? "" : "; ") + problem;
    throw Error(all_missing ? ExitCode::missing_input : ExitCode::bad_data, text);
  }
};

bool has_all(const Hdf5Source& file, const std::string& group, const Names& names) {
  return std::all_of(names.begin(), names.end(),
                     [&](const std::string& name) { return file.has(group + name); });
}

// Groups, with a final slash, that hold a dataset with the first name.
std::vector<std::string> groups_with(const Hdf5Source& file, const std::vector<std::string>& paths,
                                     const Names& names) {
  std::vector<std::string> groups;
  const std::string ending = "/" + names[0];
  for (const std::string& path : paths) {
    if (!path.ends_with(ending)) continue;
    const std::string group = path.substr(0, path.size() - names[0].size());
    if (has_all(file, group, names)) groups.push_back(group);
  }
  return groups;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// The default search: the root first, then the one group that has all three.
Names find_names(const Hdf5Source& file) {
  for (const Names& names : kDefaultNames) {
    if (has_all(file, "", names)) return names;
  }
  const std::vector<std::string> paths = file.dataset_paths();
  for (const Names& names : kDefaultNames) {
    const std::vector<std::string> groups = groups_with(file, paths, names);
    require(groups.size() <= 1, ExitCode::bad_data,
            "{}: {} groups have {}, {} and {} ({}); name the datasets with --query, --key, --value",
            file.path(), groups.size(), names[0], names[1], names[2], joined(groups));
    if (groups.size() == 1) {
      return {groups[0] + names[0], groups[0] + names[1], groups[0] + names[2]};
    }
  }
  return kDefaultNames[0];  // the check of each says what is missing and what there is
}

bool is_swappable(CheckpointField field) {
  return field == CheckpointField::query || field == CheckpointField::key ||
         field == CheckpointField::value || field == CheckpointField::grad_output;
}

int wanted_rank(CheckpointField field) {
  switch (field) {
    case CheckpointField::documents:
      return 2;
    case CheckpointField::cu_seqlens:
    case CheckpointField::sinks:
      return 1;
    default:
      return 4;
  }
}

std::string_view wanted_form(CheckpointField field, InputLayout layout) {
  switch (field) {
    case CheckpointField::documents:
      return "[batch, seq]";
    case CheckpointField::cu_seqlens:
      return "[documents + 1]";
    case CheckpointField::sinks:
      return "[heads]";
    case CheckpointField::mask:
    case CheckpointField::bias:
      return "[batch, heads or 1, seq_q, seq_kv]";
    default:
      return layout == InputLayout::bthd ? "[batch, seq, heads, dim]" : "[batch, heads, seq, dim]";
  }
}

void check_type(CheckpointField field, const DatasetInfo& dataset, const std::string& what) {
  using Kind = StoredType::Kind;
  const StoredType& type = dataset.type;
  if (field == CheckpointField::documents || field == CheckpointField::cu_seqlens) {
    return require(type.kind == Kind::integer, ExitCode::bad_data,
                   "{}: stores {}, expected integers", what, type.to_string());
  }
  if (field == CheckpointField::mask) {
    const bool byte = type.kind == Kind::integer && type.bytes == 1 && !type.is_signed;
    return require(type.kind == Kind::boolean || byte, ExitCode::bad_data,
                   "{}: stores {}, expected booleans or u8", what, type.to_string());
  }
  const bool bare = type.kind == Kind::integer && type.bytes == 2 && !type.is_signed;
  require(!bare, ExitCode::bad_data,
          "{}: stores u16, which would read 49216 for -3.0 if it holds bf16; give it the "
          "attribute dtype=\"bfloat16\"",
          what);
  require(type.kind == Kind::floating, ExitCode::bad_data,
          "{}: stores {}, expected f32, f16, bf16 or f64", what, type.to_string());
}

void check_rank(CheckpointField field, InputLayout layout, const DatasetInfo& dataset,
                const std::string& what) {
  require(dataset.shape.rank() == wanted_rank(field), ExitCode::bad_data,
          "{}: rank {} {}, expected rank {} {}", what, dataset.shape.rank(),
          dataset.shape.to_string(), wanted_rank(field), wanted_form(field, layout));
}

// ---- checks between fields ----------------------------------------------------------------------

// Compares the shapes that were found; fields that have problems of their own are left out.
class CheckpointShapes {
 public:
  CheckpointShapes(const std::string& path, Problems& problems)
      : path_(path), problems_(problems) {}

  void set(CheckpointField field, const Shape& shape, const std::string& dataset) {
    shapes_[static_cast<std::size_t>(field)] = shape;
    datasets_[static_cast<std::size_t>(field)] = dataset;
  }

  void check() {
    using F = CheckpointField;
    same(F::key, 0, F::query, 0, "batch");
    same(F::value, 0, F::query, 0, "batch");
    same(F::value, 1, F::key, 1, "seq");
    same(F::value, 2, F::key, 2, "heads");
    same(F::key, 3, F::query, 3, "head_dim");
    check_groups();
    for (int dim = 0; dim < 3; ++dim) {
      same(F::grad_output, dim, F::query, dim, kDims[static_cast<std::size_t>(dim)]);
    }
    same(F::grad_output, 3, F::value, 3, "value_dim");
    same(F::documents, 0, F::query, 0, "batch");
    same(F::documents, 1, F::query, 1, "seq_q");
    same(F::documents, 1, F::key, 1, "seq_kv");
    same(F::sinks, 0, F::query, 2, "heads");
    for (const F field : {F::mask, F::bias}) {
      same_or_one(field, 0, F::query, 0, "batch");
      same_or_one(field, 1, F::query, 2, "heads");
      same(field, 2, F::query, 1, "seq_q");
      same(field, 3, F::key, 1, "seq_kv");
    }
  }

 private:
  static constexpr std::array<const char*, 3> kDims = {"batch", "seq", "heads"};

  bool known(CheckpointField field) const {
    return shapes_[static_cast<std::size_t>(field)].rank() > 0;
  }
  std::int64_t extent(CheckpointField field, int dim) const {
    return shapes_[static_cast<std::size_t>(field)][dim];
  }
  const std::string& dataset(CheckpointField field) const {
    return datasets_[static_cast<std::size_t>(field)];
  }

  void expect(bool holds, CheckpointField field, int dim, CheckpointField other, int other_dim,
              const char* what, const char* also) {
    if (holds) return;
    problems_.add(
        Error(ExitCode::bad_data,
              fmt::format("{}: {}: {} {}, expected {}{} as in {}", path_, dataset(field), what,
                          extent(field, dim), extent(other, other_dim), also, dataset(other))));
  }

  void same(CheckpointField field, int dim, CheckpointField other, int other_dim,
            const char* what) {
    if (!known(field) || !known(other)) return;
    expect(extent(field, dim) == extent(other, other_dim), field, dim, other, other_dim, what, "");
  }

  void same_or_one(CheckpointField field, int dim, CheckpointField other, int other_dim,
                   const char* what) {
    if (!known(field) || !known(other)) return;
    const std::int64_t found = extent(field, dim);
    expect(found == 1 || found == extent(other, other_dim), field, dim, other, other_dim, what,
           " (or 1)");
  }

  void check_groups() {
    using F = CheckpointField;
    if (!known(F::query) || !known(F::key)) return;
    const std::int64_t q_heads = extent(F::query, 2);
    const std::int64_t kv_heads = extent(F::key, 2);
    const bool groups = kv_heads > 0 ? q_heads % kv_heads == 0 : q_heads == 0;
    if (groups) return;
    problems_.add(Error(ExitCode::bad_data,
                        fmt::format("{}: {}: {} heads do not group over the {} heads of {}; "
                                    "expected a multiple",
                                    path_, dataset(F::query), q_heads, kv_heads, dataset(F::key))));
  }

  const std::string& path_;
  Problems& problems_;
  std::array<Shape, kCheckpointFields> shapes_;
  std::array<std::string, kCheckpointFields> datasets_;
};

}  // namespace

std::string_view name(CheckpointField field) {
  return kFieldNames[static_cast<std::size_t>(field)];
}

// ---- Checkpoint ---------------------------------------------------------------------------------

namespace {

CheckpointRequest completed(const Hdf5Source& file, CheckpointRequest request) {
  using F = CheckpointField;
  const std::array<F, 3> fields = {F::query, F::key, F::value};
  const bool named = std::all_of(fields.begin(), fields.end(),
                                 [&](F field) { return !request.dataset(field).empty(); });
  if (named) return request;
  const Names names = find_names(file);
  for (std::size_t i = 0; i < fields.size(); ++i) {
    if (request.dataset(fields[i]).empty()) request.dataset(fields[i]) = names[i];
  }
  return request;
}

// Chooses the datasets and asks all there is to know of each.
void walk(const Hdf5Source& file, const CheckpointRequest& request, Hdf5Table& table) {
  const CheckpointRequest complete = completed(file, request);
  table.chosen.assign(complete.datasets.begin(), complete.datasets.end());
  for (const std::string& name : complete.datasets) {
    if (name.empty()) continue;
    table.datasets.insert_or_assign(name,
                                    answer_of<DatasetInfo>([&] { return file.describe(name); }));
  }
}

Hdf5File open_on_all(Communicator& communicator, CheckpointRequest& request) {
  Hdf5File file(communicator, request.path,
                [&](const Hdf5Source& source, Hdf5Table& table) { walk(source, request, table); });
  const std::vector<std::string> chosen = file.chosen();
  require(chosen.size() == request.datasets.size(), ExitCode::bad_data,
          "{}: {} datasets chosen, expected {}", request.path, chosen.size(),
          request.datasets.size());
  std::copy(chosen.begin(), chosen.end(), request.datasets.begin());
  return file;
}

}  // namespace

Checkpoint::Checkpoint(Communicator& communicator, CheckpointRequest request)
    : file_(open_on_all(communicator, request)) {
  agree(communicator, [&] { check(request); });
}

void Checkpoint::check(const CheckpointRequest& request) {
  Problems problems;
  CheckpointShapes shapes(file_.path(), problems);
  for (int i = 0; i < kCheckpointFields; ++i) {
    const auto field = static_cast<CheckpointField>(i);
    const std::string& dataset = request.dataset(field);
    if (dataset.empty()) continue;
    problems.collect([&] {
      const std::string what = file_.path() + ": " + dataset;
      Field found{file_.describe(dataset), {}, false};
      problems.collect([&] { check_type(field, found.dataset, what); });
      check_rank(field, request.layout, found.dataset, what);
      found.swapped = request.layout == InputLayout::bhtd && is_swappable(field);
      found.shape = found.dataset.shape;
      if (found.swapped) std::swap(found.shape[1], found.shape[2]);
      shapes.set(field, found.shape, dataset);
      fields_[static_cast<std::size_t>(i)] = std::move(found);
    });
  }
  shapes.check();
  problems.raise();
}

const Checkpoint::Field& Checkpoint::present(CheckpointField field) const {
  require(has(field), ExitCode::internal, "{}: no {} was asked for", file_.path(), name(field));
  return *info(field);
}

const DatasetInfo& Checkpoint::dataset(CheckpointField field) const {
  return present(field).dataset;
}

const Shape& Checkpoint::shape(CheckpointField field) const { return present(field).shape; }

DType Checkpoint::dtype(CheckpointField field) const {
  const StoredType& type = present(field).dataset.type;
  switch (type.kind) {
    case StoredType::Kind::boolean:
      return DType::u8;
    case StoredType::Kind::integer:
      if (field == CheckpointField::mask) return DType::u8;
      return type.bytes == 8 || (type.bytes == 4 && !type.is_signed) ? DType::i64 : DType::i32;
    case StoredType::Kind::floating:
      break;
  }
  return type.dtype;
}

void Checkpoint::read(Communicator& communicator, CheckpointField field, const Selection& selection,
                      TensorView destination, const CheckpointReadOptions& options) const {
  const Field& found = present(field);
  const Selection stored = found.swapped ? selection.transposed(1, 2) : selection;
  const TensorView target = found.swapped ? destination.transposed(1, 2) : destination;
  agree(communicator, [&] {
    if (options.collective == nullptr) {
      file_.read(found.dataset, stored, target, options.read);
    } else {
      file_.read_collectively(*options.collective, found.dataset, stored, target, options.read);
    }
  });
}

std::vector<std::int64_t> Checkpoint::read_integers(Communicator& communicator,
                                                    CheckpointField field) const {
  const Shape& shape = present(field).shape;
  std::vector<std::int64_t> values(static_cast<std::size_t>(shape.elements()));
  read(communicator, field, Selection(shape), TensorView(values.data(), DType::i64, shape));
  return values;
}

}  // namespace annulus
