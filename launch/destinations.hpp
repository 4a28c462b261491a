#pragma once

#include <initializer_list>
#include <string_view>

namespace annulus::launch {

/// A file that an option names; an empty path is none.
struct NamedFile {
  std::string_view option;
  std::string_view path;
};

/// Throws usage where a file to be written is one of those to be read, or is written twice: by the
/// same path, by another one, or by a link.
void require_distinct_files(std::string_view command, std::initializer_list<NamedFile> written,
                            std::initializer_list<NamedFile> read);

}  // namespace annulus::launch
